// SPDX-License-Identifier: MIT OR Apache-2.0
//! The return of a disk to the image that its configuration names, after the copy of that image is made.
//!
//! A disk that is served is merged by its process, while the guest works. The disk of a guest that was shut down in
//! between, or whose host has died, is merged by tapimg, but only if its image cannot have changed since.

use super::journal::{remove_overlay, JournalDisk};
use super::tool::CopyTool;
use crate::cli::Cli;
use crate::host::Host;
use crate::jobs::{self, JobState};
use crate::{ask, Error};
use control::supervisor::{Filter, MirrorTo, Reply, Request, Row};
use control::{Code, Failure, FrozenDevices, ImageMark, Target};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// Time between two questions for the progress.
const STEP: Duration = Duration::from_millis(200);
/// Longest time in which another verb on the disk, such as a snapshot of a program that was killed, is waited for.
const LIMIT: Duration = Duration::from_secs(120);
/// Times that a merge is begun, because the disk's process or the guest may end in between.
const ATTEMPTS: u32 = 5;
/// Time between two merges.
const PAUSE: Duration = Duration::from_secs(1);
/// Bytes in a second of the merge, if there is no limit: the guest has written little.
const RATE: u64 = 1 << 30;
/// Permission bits for writing.
const WRITABLE: u32 = 0o222;

/// State of the image that has the guest's writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OverlayState {
    /// There is none, or one that no disk was ever served from.
    Missing,
    /// The disk's own image has its content.
    Merged,
    /// Only this image has the guest's last writes, if there were some.
    Needed,
}

/// Image from which a disk is served.
enum ServedFrom<'r> {
    Overlay(&'r Row),
    Own(&'r Row),
    None,
}

/// Merges the guest's writes since the snapshot into the disk's own image, and removes the image that had them. Success
/// if that was done before.
///
/// # Errors
/// The disk is not what the backup knows, or the merge failed; then the journal stays.
pub(super) fn merge(
    cli: &Cli,
    tool: &CopyTool,
    disk: &JournalDisk,
    rate: Option<u32>,
) -> Result<(), Error> {
    let mut attempt = 0;
    loop {
        let rows = settled_rows(cli, disk)?;
        let failure = match served_from(&rows, disk) {
            ServedFrom::Own(row)
                if row.vbd.as_ref() == Some(&disk.vbd) && boot(cli) == disk.boot =>
            {
                return Ok(remove_overlay(disk)?)
            }
            ServedFrom::Own(row) => return Ok(remove_merged(disk, row)?),
            ServedFrom::None => return Ok(merge_unserved(tool, disk)?),
            ServedFrom::Overlay(row) => match commit(cli, disk, row, rate) {
                Ok(()) => continue,
                Err(error) => error,
            },
        };
        attempt += 1;
        if attempt >= ATTEMPTS {
            return Err(failure);
        }
        thread::sleep(PAUSE);
    }
}

/// Returns the identifier of this boot of the host, if the kernel tells it.
pub(super) fn boot(cli: &Cli) -> Option<String> {
    let path = Host::at(&cli.root).path("/proc/sys/kernel/random/boot_id");
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned())
}

/// Returns all disks, once no verb works on this one.
fn settled_rows(cli: &Cli, disk: &JournalDisk) -> Result<Vec<Row>, Error> {
    // The answer comes after the verbs of a program that was killed; whatever it is.
    let barrier = Request::Changed {
        which: disk.which(),
        since: disk.mark.clone(),
        from: u64::MAX,
    };
    match ask(cli, &barrier) {
        Ok(_) | Err(Error::Failed(_)) => {}
        Err(error) => return Err(error),
    }
    let limit = Instant::now() + LIMIT;
    loop {
        let Reply::Disks { disks } = ask(cli, &Request::List(Filter::default()))? else {
            return Err(Failure::invalid("blktapctrl answered something else").into());
        };
        let works = disks
            .iter()
            .find(|row| row.vbd.as_ref() == Some(&disk.vbd))
            .and_then(|row| row.doing);
        match works {
            None => return Ok(disks),
            Some(doing) if Instant::now() >= limit => {
                return Err(Failure::new(
                    Code::State,
                    format!(
                        "disk {} is still busy with {doing}: `tap-ctl status` shows why; then repeat the command",
                        disk.minor
                    ),
                )
                .into())
            }
            Some(_) => thread::sleep(STEP),
        }
    }
}

fn served_from<'r>(rows: &'r [Row], disk: &JournalDisk) -> ServedFrom<'r> {
    let of = |path: Option<&Path>| {
        rows.iter()
            .find(|row| row.target.as_ref().and_then(Target::path) == path)
    };
    if let Some(row) = of(Some(&disk.overlay)) {
        return ServedFrom::Overlay(row);
    }
    of(disk.target.path()).map_or(ServedFrom::None, ServedFrom::Own)
}

/// Has the disk's process merge, and waits for that.
fn commit(cli: &Cli, disk: &JournalDisk, row: &Row, rate: Option<u32>) -> Result<(), Error> {
    let which = control::supervisor::Which {
        minor: row.minor,
        vbd: row.vbd.clone(),
        pid: None,
    };
    let to = MirrorTo {
        target: disk.target.clone(),
        rate: rate.map_or(RATE, |mib| u64::from(mib) << 20),
    };
    ask(
        cli,
        &Request::Commit {
            which: which.clone(),
            to,
        },
    )?;
    loop {
        let state = Request::Mirror {
            which: which.clone(),
            to: None,
        };
        let failure = match jobs::state(&ask(cli, &state)?)? {
            JobState::Runs(..) => None,
            JobState::Done => return Ok(()),
            JobState::Ended => Some("another program has ended the merge".to_owned()),
            JobState::Failed(why) => Some(why),
        };
        if let Some(why) = failure {
            let text = format!(
                "disk {} is still served from {}, because the merge into {} failed: {why}",
                disk.minor,
                disk.overlay.display(),
                disk.target
            );
            return Err(Failure::new(Code::System, text).into());
        }
        thread::sleep(STEP);
    }
}

/// A guest was started with the disk's own image: what the backup left may go only if that has its content.
fn remove_merged(disk: &JournalDisk, row: &Row) -> Result<(), Failure> {
    match overlay_state(&disk.overlay)? {
        OverlayState::Missing | OverlayState::Merged => remove_overlay(disk),
        OverlayState::Needed => Err(Failure::new(
            Code::State,
            format!(
                "tap disk {} was started from {}, although the guest's last writes before that are in {}: they cannot be \
                 merged any more. Remove that file if the disk is good without them, or shut the guest down and name \
                 qcow2:{2} in its configuration; then repeat the command",
                row.minor.unwrap_or_default(),
                disk.target,
                disk.overlay.display()
            ),
        )),
    }
}

/// Merges a disk that no process serves.
fn merge_unserved(tool: &CopyTool, disk: &JournalDisk) -> Result<(), Failure> {
    let own = disk.target.path().unwrap_or(Path::new("/"));
    match overlay_state(&disk.overlay)? {
        OverlayState::Missing => return Ok(()),
        OverlayState::Merged => {}
        OverlayState::Needed if mark(own)?.is_some() => {
            tool.commit(&disk.overlay)?;
            // From here on it has nothing that the disk's own image lacks.
            change_mode(&disk.overlay, |mode| mode & !WRITABLE)?;
        }
        OverlayState::Needed => {
            return Err(Failure::new(
                Code::State,
                format!(
                    "no disk is served from {0} or from {1}, which has the guest's last writes, and whether {0} was used \
                     since is not known. If the guest was not started since the backup: `tapimg commit qcow2:{1}`. Then, \
                     or if it was, remove {1} and repeat the command",
                    own.display(),
                    disk.overlay.display()
                ),
            ))
        }
    }
    unmark(own)?;
    remove_overlay(disk)
}

fn overlay_state(path: &Path) -> Result<OverlayState, Failure> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(OverlayState::Missing),
        Err(error) => Err(looked(path, &error)),
        // blktapctrl made it, and ended before it had content.
        Ok(data) if data.len() == 0 => Ok(OverlayState::Merged),
        Ok(data) if data.permissions().mode() & WRITABLE == 0 => Ok(OverlayState::Merged),
        Ok(_) => Ok(OverlayState::Needed),
    }
}

/// Returns the mark of an image that no disk may write, if blktapctrl has marked it.
fn mark(path: &Path) -> Result<Option<ImageMark>, Failure> {
    FrozenDevices::of_host().mark(path, path)
}

/// Allows writing an image again, which is the disk from now on.
fn unmark(path: &Path) -> Result<(), Failure> {
    match mark(path)? {
        None => Ok(()),
        Some(ImageMark::Record(_)) => FrozenDevices::of_host().remove(path, path),
        Some(ImageMark::Permission) => change_mode(path, |mode| mode | 0o200),
    }
}

fn change_mode(path: &Path, mode: impl Fn(u32) -> u32) -> Result<(), Failure> {
    let change = || {
        let old = fs::metadata(path)?.permissions().mode();
        fs::set_permissions(path, fs::Permissions::from_mode(mode(old) & 0o7777))
    };
    change().map_err(|error| {
        Failure::system(
            format!("cannot change the permissions of {}", path.display()),
            &error,
        )
    })
}

fn looked(path: &Path, error: &io::Error) -> Failure {
    Failure::system(format!("cannot look at {}", path.display()), error)
}
