// SPDX-License-Identifier: MIT OR Apache-2.0
//! The plan for each disk of a backup, which is decided before anything is changed.

use super::folder::BackupFolder;
use super::journal::JournalDisk;
use super::manifest::{chain, newest, BackupManifest};
use super::merge::boot;
use super::tool::image;
use crate::cli::{Backup, Cli};
use crate::host::xenstore::GuestNames;
use crate::host::Host;
use crate::time::{now_ms, utc};
use crate::{ask, disks, something_else, Error};
use control::supervisor::{Filter, Mode, Reply, Request, Row};
use control::tapdisk::State;
use control::{Code, Driver, Failure, LeaseKind, Mark, Target};
use rustix::rand::{getrandom, GetRandomFlags};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// Increments behind a full backup at most, because a chain of images has at most 64.
const LONGEST: usize = 60;

/// Plan for one disk.
#[derive(Debug)]
pub(super) struct DiskPlan {
    pub(super) id: String,
    pub(super) guest: String,
    pub(super) vdev: String,
    /// Bytes of the disk.
    pub(super) size: u64,
    pub(super) sector_size: u32,
    /// The backup that this one continues.
    pub(super) parent: Option<BackupManifest>,
    /// Reason why there is none.
    pub(super) why_full: Option<String>,
    pub(super) disk: JournalDisk,
}

/// Returns the identifier of a new backup: its time, and a random number.
fn new_id() -> Result<String, Failure> {
    let mut bytes = [0; 4];
    getrandom(&mut bytes[..], GetRandomFlags::empty())
        .map_err(|error| Failure::system("cannot get random numbers", &error.into()))?;
    let time: String = utc(now_ms()).chars().take(19).collect();
    let time = time.replace(['-', ':'], "");
    Ok(format!("{time}Z-{:08x}", u32::from_ne_bytes(bytes)))
}

/// Decides for each disk.
///
/// # Errors
/// A disk cannot be backed up while its guest works.
pub(super) fn plan(
    cli: &Cli,
    asked: &Backup,
    folder: &BackupFolder,
    all: &[BackupManifest],
) -> Result<Vec<DiskPlan>, Error> {
    let Reply::Disks { disks: rows } = ask(cli, &Request::List(Filter::default()))? else {
        return Err(Failure::invalid("blktapctrl answered something else").into());
    };
    let guests = rows
        .iter()
        .filter_map(|row| Some(disks::parts(row.vbd.as_deref()?)?.0));
    let names = GuestNames::read(&Host::at(&cli.root), guests);
    let id = new_id()?;
    let (mut plans, mut seen) = (Vec::new(), BTreeSet::new());
    for which in &asked.disks {
        let is_it = |row: &&Row| row.minor == which.minor && row.vbd == which.vbd;
        let row = rows
            .iter()
            .find(is_it)
            .ok_or_else(|| Failure::new(Code::NotFound, "the guest has just been shut down"))?;
        let vbd = row.vbd.as_deref().unwrap_or_default();
        let (guest, device) = disks::parts(vbd).ok_or_else(|| {
            Failure::unsupported("only disks of guests have backups: this one has no guest")
        })?;
        let vdev = control::vdev(device);
        if !seen.insert(row.minor) {
            return Err(
                Failure::invalid(format!("{vdev} is named twice: name each disk once")).into(),
            );
        }
        let name = names.typed(guest);
        let place = (asked, folder);
        plans.push(plan_one(cli, place, all, row, (&id, &name, &vdev))?);
    }
    Ok(plans)
}

fn plan_one(
    cli: &Cli,
    (asked, folder): (&Backup, &BackupFolder),
    all: &[BackupManifest],
    row: &Row,
    (id, guest, vdev): (&str, &str, &str),
) -> Result<DiskPlan, Error> {
    let about = |why: String| Failure::unsupported(format!("{guest} {vdev} has no backup: {why}"));
    let (target, size, sector_size) = check(row).map_err(about)?;
    let last = newest(all, guest, vdev);
    let disk = JournalDisk {
        minor: row.minor.unwrap_or_default(),
        vbd: row.vbd.clone().unwrap_or_default(),
        boot: boot(cli),
        overlay: overlay(&target, asked.scratch.as_deref(), id).map_err(about)?,
        target,
        mark: format!("backup-{id}").parse()?,
        old_mark: last.map(|last| last.mark.clone()),
        stem: format!("{}-{vdev}-{id}", plain(guest)),
        done: None,
    };
    let marks = match ask(cli, &Request::Marks(disk.which()))? {
        Reply::Marks { marks } => marks,
        other => return Err(something_else(&other).into()),
    };
    let new = (size, sector_size);
    let parent = match asked.full {
        true => Err("--full".to_owned()),
        false => continued(last, all, &marks, folder, asked.keep, new),
    };
    Ok(DiskPlan {
        id: id.to_owned(),
        guest: guest.to_owned(),
        vdev: vdev.to_owned(),
        size,
        sector_size,
        why_full: parent.as_ref().err().cloned(),
        parent: parent.ok(),
        disk,
    })
}

/// Returns the backup that a new one can continue, or the reason why that must be a full one.
fn continued(
    last: Option<&BackupManifest>,
    all: &[BackupManifest],
    marks: &[Mark],
    folder: &BackupFolder,
    keep: Option<u32>,
    (size, sector_size): (u64, u32),
) -> Result<BackupManifest, String> {
    let last = last.ok_or("the folder has none of this disk")?;
    if !marks.iter().any(|mark| mark.name == last.mark) {
        return Err(
            "the changes since the last one are not known, because the guest was started again or migrated, the disk was \
             unpaused, or the host was booted"
                .into(),
        );
    }
    if size < last.size || sector_size != last.sector_size {
        return Err("the disk is smaller than it was, or has other sectors".into());
    }
    let chain = chain(all, last).map_err(|failure| failure.message)?;
    let most = keep.map_or(LONGEST, |keep| usize::try_from(keep).unwrap_or(LONGEST));
    if chain.len() >= most.min(LONGEST) {
        return Err(format!("there are {} since the last full one", chain.len()));
    }
    for one in chain {
        let found = fs::metadata(folder.path.join(&one.file));
        if found.map(|data| data.len()).ok() != Some(one.file_size) {
            return Err(format!(
                "{} is missing or damaged: `tap-ctl backup verify {}`",
                one.file,
                folder.path.display()
            ));
        }
    }
    Ok(last.clone())
}

/// Refuses a disk that cannot be frozen while it is served, or not be merged afterwards. Returns its target, bytes, and
/// bytes of a logical sector.
fn check(row: &Row) -> Result<(Target, u64, u32), String> {
    let target = row
        .target
        .clone()
        .ok_or("blktapctrl does not know its image")?;
    if row.mode != Some(Mode::Write) {
        return Err(
            "its image may have other readers or writers (mode r, r! or w!), which would not see a snapshot: copy it \
             inside of the guests, or with `tapimg convert IMAGE NEW` while none writes it"
                .into(),
        );
    }
    if *target.lease() != LeaseKind::Lock {
        return Err(
            "its lease is of the one image, so there are no snapshots: copy it with \
             `tapimg convert IMAGE NEW` while it is paused"
                .into(),
        );
    }
    if target.key().is_some() || target.driver() == Driver::Luks {
        return Err(
            "it is encrypted, and a copy of a snapshot would be in plain text: copy it with \
             `tapimg convert IMAGE NEW`, which takes keys, while it is paused"
                .into(),
        );
    }
    if target.path().is_none() || target.below().is_some() {
        return Err("it has no image that could be frozen (ram:, null:, cow: or an export)".into());
    }
    image(&target).map_err(|failure| failure.message)?;
    if row.state != Some(State::Running) || row.doing.is_some() {
        return Err("it is not served at the moment: `tap-ctl status` says why".into());
    }
    let disk = row.disk.as_ref().ok_or("its size is not known yet")?;
    Ok((target.clone(), disk.size, disk.logical_block))
}

/// Returns the path of the new image that has the guest's writes until the end.
fn overlay(target: &Target, scratch: Option<&Path>, id: &str) -> Result<PathBuf, String> {
    let path = target.path().ok_or("it has no image")?;
    let data = fs::metadata(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let folder = match (scratch, path.parent()) {
        (Some(scratch), _) => {
            std::path::absolute(scratch).map_err(|error| format!("--scratch: {error}"))?
        }
        (None, Some(folder)) if !data.file_type().is_block_device() => folder.to_owned(),
        _ => {
            return Err(format!(
                "{} is a device: name a folder for the guest's writes while the copy is made, such as --scratch /srv",
                path.display()
            ))
        }
    };
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.ok_or("the name of its image is not UTF-8: rename it")?;
    Ok(folder.join(format!("{name}.backup-{id}.qcow2")))
}

/// Returns a guest's name as a part of a file's name.
fn plain(guest: &str) -> String {
    let kept = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
    guest
        .chars()
        .map(|c| if kept(c) { c } else { '_' })
        .take(64)
        .collect()
}
