// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl backup list` and `verify`.

use super::folder::{digest, BackupFolder};
use super::manifest::{chain, BackupManifest, VERSION};
use crate::cli::{BackupCompression, Cli};
use crate::time::utc;
use crate::{print, say, Error};
use control::{Code, Failure};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

/// Backups of a folder.
#[derive(Debug, Serialize)]
pub(crate) struct BackupList {
    /// Always `backups`.
    is: &'static str,
    /// Version of this form: 1.
    version: u32,
    /// The backups, the oldest first.
    backups: Vec<BackupManifest>,
}

/// Verified backups of a folder.
#[derive(Debug, Serialize)]
pub(crate) struct VerifiedBackups {
    /// Always `verified`.
    is: &'static str,
    /// Version of this form: 1.
    version: u32,
    /// True if all backups are good.
    good: bool,
    /// Result for each backup, the oldest first.
    backups: Vec<BackupVerdict>,
}

/// Result for one backup.
#[derive(Debug, Serialize)]
pub(crate) struct BackupVerdict {
    /// The backup.
    backup: BackupManifest,
    /// Reason why it cannot be restored; nothing if it can.
    problem: Option<String>,
}

/// A backup as a line of words `name=value`.
pub(super) fn line(one: &BackupManifest) -> String {
    let kind = match &one.parent {
        Some(parent) => format!("increment parent={parent}"),
        None => "full".into(),
    };
    let known =
        |name: &str, value: Option<u64>| value.map_or(String::new(), |v| format!(" {name}={v}"));
    let data = known("data_size", one.data_size);
    let allocated = known("allocated", one.allocated);
    let compression = one.compression.map_or("none", BackupCompression::name);
    format!(
        "id={} at={} guest={} vdev={} kind={kind} size={}{data} file_size={}{allocated} compression={compression} consistency={} \
         file={}\n",
        one.id,
        utc(one.taken_ms),
        one.guest,
        one.vdev,
        one.size,
        one.file_size,
        one.consistency.name(),
        one.file
    )
}

pub(super) fn list(cli: &Cli, dir: &Path) -> Result<(), Error> {
    let backups = BackupFolder::manifests(dir)?;
    if !cli.json {
        return Ok(say(&backups.iter().map(line).collect::<String>())?);
    }
    print(&BackupList {
        is: "backups",
        version: VERSION,
        backups,
    })
}

pub(super) fn verify(cli: &Cli, dir: &Path) -> Result<ExitCode, Error> {
    let folder = BackupFolder::read(dir)?;
    let all = BackupFolder::manifests(&folder.path)?;
    let mut files = BTreeMap::new();
    for one in &all {
        files.insert(one.file.as_str(), check_file(&folder, one));
    }
    let problem = |one: &BackupManifest| -> Option<String> {
        let parents = match chain(&all, one) {
            Ok(parents) => parents,
            Err(failure) => return Some(failure.message),
        };
        let mut wrong = parents
            .iter()
            .filter_map(|one| files.get(one.file.as_str())?.as_ref().err());
        wrong.next().map(|failure| failure.message.clone())
    };
    let backups: Vec<BackupVerdict> = all
        .iter()
        .map(|one| BackupVerdict {
            backup: one.clone(),
            problem: problem(one),
        })
        .collect();
    let good = backups.iter().all(|one| one.problem.is_none());
    let verified = VerifiedBackups {
        is: "verified",
        version: VERSION,
        good,
        backups,
    };
    match cli.json {
        true => print(&verified)?,
        false => {
            let text = |one: &BackupVerdict| match &one.problem {
                None => format!("good {}", line(&one.backup)),
                Some(why) => format!("BAD  {}     {why}\n", line(&one.backup)),
            };
            say(&verified.backups.iter().map(text).collect::<String>())?;
        }
    }
    Ok(match good {
        true => ExitCode::SUCCESS,
        false => control::ExitStatus::Found.into(),
    })
}

/// Checks that the file of a backup has not changed since it was made.
pub(super) fn check_file(folder: &BackupFolder, one: &BackupManifest) -> Result<(), Failure> {
    let (size, sum) = digest(&folder.path.join(&one.file))?;
    match size == one.file_size && sum == one.sha256 {
        true => Ok(()),
        false => Err(Failure::new(
            Code::Image,
            format!(
                "{} has changed since it was made, so this backup and those over it are lost: take a full one (--full)",
                one.file
            ),
        )),
    }
}
