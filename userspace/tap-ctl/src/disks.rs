// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk as its owner names it, by its guest and its name in the guest.
//!
//! The name becomes the disk's number and its backend's directory (`backend/vbd/DOMID/DEVICE`) at the moment of the
//! command, and the supervisor checks both: if the guest is booted again in between, its disks have other directories,
//! and no other disk is taken for the named one.

use crate::cli::{Cli, Verb, Which};
use crate::host::xenstore::GuestNames;
use crate::host::Host;
use crate::{ask, complain, Error};
use control::supervisor::{Filter, Reply, Request, Row};
use control::{Code, Failure};

/// Names of a guest and of a disk of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wanted<'a> {
    /// The guest's name or number.
    pub(crate) guest: &'a str,
    /// The disk's name in the guest or its number; nothing for the only one.
    pub(crate) vdev: Option<&'a str>,
}

/// A guest's disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GuestDisk {
    /// The guest's number.
    pub(crate) guest: u32,
    /// Number of the disk in the guest, such as 51712.
    pub(crate) device: u32,
    minor: u32,
    directory: String,
}

impl GuestDisk {
    fn of(row: &Row) -> Option<GuestDisk> {
        let (guest, device) = parts(row.vbd.as_deref()?)?;
        Some(GuestDisk {
            guest,
            device,
            minor: row.minor?,
            directory: row.vbd.clone()?,
        })
    }
}

/// Returns the numbers of the guest and of the disk in the name of a backend's directory.
pub(crate) fn parts(directory: &str) -> Option<(u32, u32)> {
    let mut words = directory.rsplit('/');
    let device = words.next()?.parse().ok()?;
    Some((words.next()?.parse().ok()?, device))
}

/// Whether this is the disk's name in its guest, or its number.
pub(crate) fn is_called(device: u32, vdev: &str) -> bool {
    control::vdev(device) == vdev || vdev.parse() == Ok(device)
}

/// Returns the numbers of the guests that have this name or number, out of those that have disks.
///
/// # Errors
/// No guest has it, or several do.
pub(crate) fn guest(
    name: &str,
    guests: &[u32],
    names: &GuestNames,
    line: &TypedLine,
) -> Result<u32, Failure> {
    let is_named = |guest: &&u32| match name.parse::<u32>() {
        Ok(number) => number == **guest,
        Err(_) => names.get(**guest) == Some(name),
    };
    let mut named: Vec<u32> = guests.iter().filter(is_named).copied().collect();
    named.sort_unstable();
    named.dedup();
    match named[..] {
        [one] => Ok(one),
        [] => Err(unknown(name, guests, names)),
        [first, ..] => {
            let numbers: Vec<String> = named.iter().map(ToString::to_string).collect();
            Err(Failure::invalid(format!(
                "{} guests are named {name}, the domains {}: name one by its number, as in `{}`",
                named.len(),
                list(&numbers),
                line.with_guest(name, &first.to_string())
            )))
        }
    }
}

fn unknown(name: &str, guests: &[u32], names: &GuestNames) -> Failure {
    let mut near: Vec<&str> = guests
        .iter()
        .filter_map(|guest| names.get(*guest))
        .filter(|other| control::is_near(name, other))
        .collect();
    near.sort_unstable();
    near.dedup();
    let near: Vec<String> = near.into_iter().map(String::from).collect();
    let meant = match near.is_empty() {
        true => String::new(),
        false => format!(", but {} has", list(&near)),
    };
    let unread = match &names.why {
        Some(why) if name.parse::<u32>().is_err() => {
            format!(" Not all names are known ({why}): a guest's number is a name, too.")
        }
        _ => String::new(),
    };
    let text = format!(
        "no guest that is named {name} has a disk here{meant}: `tap-ctl list` shows guests and disks.{unread}"
    );
    Failure::new(Code::NotFound, text)
}

/// Returns the disk that is named.
///
/// # Errors
/// There is none, or several fit.
pub(crate) fn find<'a>(
    wanted: Wanted<'_>,
    disks: &'a [GuestDisk],
    names: &GuestNames,
    line: &TypedLine,
) -> Result<&'a GuestDisk, Failure> {
    let guests: Vec<u32> = disks.iter().map(|disk| disk.guest).collect();
    let guest = guest(wanted.guest, &guests, names, line)?;
    let its: Vec<&GuestDisk> = disks.iter().filter(|disk| disk.guest == guest).collect();
    let fits = |disk: &&&GuestDisk| wanted.vdev.is_none_or(|vdev| is_called(disk.device, vdev));
    let fitting: Vec<&GuestDisk> = its.iter().filter(fits).copied().collect();
    if let [one] = fitting[..] {
        return Ok(one);
    }
    Err(not_one(wanted, its.iter().map(|disk| disk.device), line))
}

/// The failure for words that name no disk, or more than one, of a guest with these disks.
pub(crate) fn not_one(
    wanted: Wanted<'_>,
    devices: impl IntoIterator<Item = u32>,
    line: &TypedLine,
) -> Failure {
    let vdevs: Vec<String> = devices.into_iter().map(control::vdev).collect();
    let example = line.with_vdev(wanted, vdevs.first().map_or("", String::as_str));
    let (has, name) = (list(&vdevs), wanted.guest);
    match wanted.vdev {
        Some(vdev) => Failure::new(
            Code::NotFound,
            format!(
                "guest {name} has no tap disk {vdev}: it has {has}, as in `{example}`; `tap-ctl status {name}` shows \
                 its phy disks too"
            ),
        ),
        None => Failure::invalid(format!(
            "guest {name} has the tap disks {has}: name one, as in `{example}`"
        )),
    }
}

/// Words in a sentence.
fn list(words: &[String]) -> String {
    match words {
        [] => "none".into(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

/// The command line as the user typed it, to show how it is meant.
#[derive(Clone, Debug)]
pub(crate) struct TypedLine(Vec<String>);

impl TypedLine {
    /// The command line of this process.
    pub(crate) fn own() -> TypedLine {
        let words = std::env::args_os().skip(1);
        TypedLine::of(words.map(|word| word.to_string_lossy().into_owned()))
    }

    /// A command line, without the program.
    pub(crate) fn of(words: impl IntoIterator<Item = String>) -> TypedLine {
        TypedLine(words.into_iter().collect())
    }

    /// With another word for the guest.
    fn with_guest(&self, guest: &str, other: &str) -> String {
        let changed = self.0.iter().map(|word| match word == guest {
            true => other.to_owned(),
            false => word.clone(),
        });
        shell(changed)
    }

    /// With another disk of the guest.
    fn with_vdev(&self, wanted: Wanted<'_>, vdev: &str) -> String {
        let place = self.0.iter().position(|word| word == wanted.guest);
        let place = place.map_or(self.0.len(), |place| place + 1);
        let mut words = self.0.clone();
        match wanted.vdev {
            Some(_) if place < words.len() => words[place] = vdev.to_owned(),
            _ => words.insert(place, vdev.to_owned()),
        }
        shell(words)
    }
}

/// A command line as a shell reads it.
fn shell(words: impl IntoIterator<Item = String>) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./:,=+@%".contains(c);
    let mut line = String::from("tap-ctl");
    for word in words {
        line.push(' ');
        match !word.is_empty() && word.chars().all(plain) {
            true => line.push_str(&word),
            false => line.push_str(&format!("'{}'", word.replace('\'', r"'\''"))),
        }
    }
    line
}

/// Replaces the guests and disks that the command line names by the numbers of nodes and the directories of backends.
pub(crate) fn resolve(cli: &mut Cli) -> Result<(), Error> {
    cli.verb.settle()?;
    if let Some(minor) = cli.verb.lone_minor() {
        complain(&format!(
            "{minor} alone is the number of a node, as before; the next release takes it for a guest: type -m {minor}"
        ));
    }
    if cli.verb.disks().iter().all(|disk| disk.guest.is_none()) {
        return Ok(());
    }
    let Reply::Disks { disks } = ask(cli, &Request::List(Filter::default()))? else {
        return Err(Failure::invalid("blktapctrl answered something else").into());
    };
    let disks: Vec<GuestDisk> = disks.iter().filter_map(GuestDisk::of).collect();
    let names = GuestNames::read(&Host::at(&cli.root), disks.iter().map(|disk| disk.guest));
    let line = TypedLine::own();
    Ok(put(&mut cli.verb, &disks, &names, &line)?)
}

fn put(
    verb: &mut Verb,
    disks: &[GuestDisk],
    names: &GuestNames,
    line: &TypedLine,
) -> Result<(), Failure> {
    for which in verb.disks() {
        let Some(guest) = which.guest.take() else {
            continue;
        };
        let vdev = which.vdev.take();
        let wanted = Wanted {
            guest: &guest,
            vdev: vdev.as_deref(),
        };
        let found = find(wanted, disks, names, line)?;
        *which = Which {
            minor: Some(found.minor),
            vbd: Some(found.directory.clone()),
            ..Which::default()
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests;
