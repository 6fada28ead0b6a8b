// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl restore`: a disk from a backup and the ones that it needs.

use super::folder::BackupFolder;
use super::list::check_file;
use super::manifest::{chain, BackupManifest, VERSION};
use super::tool::CopyTool;
use crate::cli::{Cli, Restore};
use crate::{print, say, Error};
use control::{Code, Extent, Failure};
use serde::Serialize;
use std::collections::BTreeSet;
use std::ffi::OsString;

/// A disk that was restored.
#[derive(Debug, Serialize)]
pub(crate) struct RestoreResult {
    /// Always `restored`.
    is: &'static str,
    /// Version of this form: 1.
    version: u32,
    /// The backup.
    backup: BackupManifest,
    /// The new image, as the command line names it.
    image: String,
}

pub(crate) fn restore(cli: &Cli, asked: &Restore) -> Result<(), Error> {
    let tool = CopyTool::start(&asked.tool.tapimg, asked.rate, cli.json)?;
    let folder = BackupFolder::read(&asked.dir)?;
    let all = BackupFolder::manifests(&folder.path)?;
    let chosen = choose(&all, asked)?;
    // Nothing is touched before all that is needed has been found as it was written.
    for one in chain(&all, chosen)? {
        check_file(&folder, one)?;
        tool.check()?;
    }
    let from = format!("qcow2:{}", folder.path.join(&chosen.file).display());
    let options: Vec<OsString> = match asked.force {
        true => vec!["--force".into()],
        false => Vec::new(),
    };
    tool.convert(&from, &asked.image, &options, None)?;
    // A device may be larger than the disk.
    let disk = [Extent {
        offset: 0,
        length: chosen.size,
    }];
    tool.compare(&from, &asked.image, Some(&disk))?;
    let image = asked.image.clone();
    if cli.json {
        return print(&RestoreResult {
            is: "restored",
            version: VERSION,
            backup: chosen.clone(),
            image,
        });
    }
    Ok(say(&format!(
        "{image} holds {} {} as of the backup {}: name it in the guest's configuration\n",
        chosen.guest, chosen.vdev, chosen.id
    ))?)
}

/// Returns the backup that the command line names: the newest one, if the rest names one disk.
fn choose<'a>(all: &'a [BackupManifest], asked: &Restore) -> Result<&'a BackupManifest, Failure> {
    let is_meant = |one: &&BackupManifest| {
        let fits = |asked: &Option<String>, its: &str| asked.as_deref().is_none_or(|a| a == its);
        fits(&asked.guest, &one.guest) && fits(&asked.vdev, &one.vdev) && fits(&asked.id, &one.id)
    };
    let meant: Vec<&BackupManifest> = all.iter().filter(is_meant).collect();
    let disks: BTreeSet<(&str, &str)> = meant
        .iter()
        .map(|one| (one.guest.as_str(), one.vdev.as_str()))
        .collect();
    let dir = asked.dir.display();
    match (disks.len(), meant.last()) {
        (1, Some(last)) => Ok(last),
        (0, _) | (_, None) => Err(Failure::new(
            Code::NotFound,
            format!(
                "{dir} has no such backup: `tap-ctl backup list {dir}` shows those that there are"
            ),
        )),
        _ => {
            let names: Vec<String> = disks
                .iter()
                .map(|(guest, vdev)| format!("--guest {guest} --vdev {vdev}"))
                .collect();
            Err(Failure::invalid(format!(
                "{dir} has backups of several disks: add one of {}",
                names.join(", ")
            )))
        }
    }
}
