// SPDX-License-Identifier: MIT OR Apache-2.0
//! The end of a backup: what has begun is finished or undone, by the program that took it or, if that was killed, by the
//! next one. The journal, which is durable before the first step, names all that a backup makes.
//!
//! A backup exists as soon as the journal has the manifests of all its disks. After that its end is finished, before
//! that it is undone; in both cases the disks return to the images that their configurations name.

use super::folder::{self, BackupFolder, UNFINISHED};
use super::freeze::FreezeMeans;
use super::manifest::{BackupManifest, ENDING, VERSION};
use super::merge;
use super::tool::CopyTool;
use crate::cli::Cli;
use crate::{ask, something_else, Error};
use control::supervisor::{Reply, Request, Which};
use control::{Code, Failure, MarkName, Target};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Ending of the name of an image that is not verified yet.
pub(crate) const PART: &str = ".part";
/// Times that the removal of a dirty bitmap is requested from a supervisor that ends.
const ATTEMPTS: u32 = 3;

/// A backup that is under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct BackupJournal {
    version: u32,
    /// Identifier of the backup.
    pub(crate) id: String,
    /// Its disks.
    pub(crate) disks: Vec<JournalDisk>,
    /// Names of outdated backups, without their endings, which are removed once this one exists.
    pub(crate) outdated: Vec<String>,
    /// Means by which the guest's file systems are frozen for the snapshot; nothing if they are not.
    #[serde(default)]
    pub(crate) frozen: Option<FreezeMeans>,
    /// MiB in a second, if there is a limit.
    pub(crate) rate: Option<u32>,
}

/// A disk of a backup that is under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct JournalDisk {
    /// Its node.
    pub(crate) minor: u32,
    /// The backend's directory in xenstore, which another start of the guest does not have.
    pub(crate) vbd: String,
    /// The boot of the host, after which the same directory may be that of another start of a guest.
    pub(crate) boot: Option<String>,
    /// The target that its configuration names.
    pub(crate) target: Target,
    /// The new image that has the guest's writes until the end.
    pub(crate) overlay: PathBuf,
    /// The dirty bitmap that begins with this backup.
    pub(crate) mark: MarkName,
    /// The dirty bitmap of the backup before, which is not needed once this one exists.
    pub(crate) old_mark: Option<MarkName>,
    /// Name of the backup's files, without their endings.
    pub(crate) stem: String,
    /// The manifest, once all images of the backup are verified.
    pub(crate) done: Option<BackupManifest>,
}

impl JournalDisk {
    /// Returns the words that name the disk for the supervisor, which checks that the guest was not started again.
    pub(crate) fn which(&self) -> Which {
        Which {
            minor: Some(self.minor),
            vbd: Some(self.vbd.clone()),
            pid: None,
        }
    }
}

impl BackupJournal {
    pub(crate) fn new(id: String, disks: Vec<JournalDisk>, rate: Option<u32>) -> Self {
        Self {
            version: VERSION,
            id,
            disks,
            outdated: Vec::new(),
            frozen: None,
            rate,
        }
    }

    /// # Errors
    /// Another version of this program has written it.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        match self.version {
            VERSION => Ok(()),
            other => Err(Failure::unsupported(format!(
                "the journal of the last backup has version {other}: repair the folder with the program that wrote it"
            ))),
        }
    }

    /// Whether the backup exists.
    pub(crate) fn is_done(&self) -> bool {
        self.disks.iter().all(|disk| disk.done.is_some())
    }
}

/// Finishes or undoes a backup: afterwards each disk has the image that its configuration names, and nothing is left of
/// what the backup needed. Repeating that does no harm.
///
/// # Errors
/// A step failed. The journal stays, so that the next backup, or `tap-ctl backup repair`, continues.
pub(crate) fn settle(
    cli: &Cli,
    tool: &CopyTool,
    folder: &BackupFolder,
    journal: &BackupJournal,
) -> Result<(), Error> {
    for disk in &journal.disks {
        settle_files(folder, disk, journal.is_done())?;
    }
    for disk in &journal.disks {
        merge::merge(cli, tool, disk, journal.rate)?;
        let outdated = match journal.is_done() {
            true => disk.old_mark.as_ref(),
            false => Some(&disk.mark),
        };
        if let Some(mark) = outdated {
            forget(cli, disk, mark)?;
        }
    }
    if journal.is_done() {
        for stem in &journal.outdated {
            // Without its manifest an image is no backup.
            folder.remove(&format!("{stem}{ENDING}"))?;
            folder.remove(&format!("{stem}.qcow2"))?;
        }
    }
    Ok(folder.remove_journal()?)
}

/// Writes the manifest of a backup that exists, or removes the files of one that does not.
fn settle_files(folder: &BackupFolder, disk: &JournalDisk, is_done: bool) -> Result<(), Failure> {
    let (stem, manifest) = (&disk.stem, disk.done.as_ref().filter(|_| is_done));
    let name = format!("{stem}{ENDING}");
    folder.remove(&format!("{name}{UNFINISHED}"))?;
    match manifest {
        Some(manifest) => folder.keep_manifest(manifest),
        None => [
            format!("{stem}.qcow2"),
            format!("{stem}.qcow2{PART}"),
            format!("{stem}.qcow2{PART}{UNFINISHED}"),
        ]
        .iter()
        .try_for_each(|name| folder.remove(name)),
    }
}

/// Removes a dirty bitmap, if the disk still has it.
fn forget(cli: &Cli, disk: &JournalDisk, mark: &MarkName) -> Result<(), Error> {
    for attempt in 1.. {
        let marks = match ask(cli, &Request::Marks(disk.which())) {
            Ok(Reply::Marks { marks }) => marks,
            Ok(other) => return Err(something_else(&other).into()),
            // The disk is gone, and its bitmaps with it.
            Err(Error::Failed(failure)) if failure.code == Code::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        if !marks.iter().any(|one| one.name == *mark) {
            return Ok(());
        }
        let request = Request::Unmark {
            which: disk.which(),
            name: mark.clone(),
        };
        match ask(cli, &request) {
            Ok(_) => return Ok(()),
            // A supervisor that has ended may have done it.
            Err(Error::Silent(_)) if attempt < ATTEMPTS => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Removes the image that had the guest's writes, which are in the disk's own image by now.
pub(super) fn remove_overlay(disk: &JournalDisk) -> Result<(), Failure> {
    folder::remove(&disk.overlay)
}
