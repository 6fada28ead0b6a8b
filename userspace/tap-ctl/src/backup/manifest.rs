// SPDX-License-Identifier: MIT OR Apache-2.0
//! The description of each backup, and the chains that backups form.

use crate::cli::BackupCompression;
use control::{Code, Failure, MarkName};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Version of the form of manifests and journals that this program writes and reads.
pub(crate) const VERSION: u32 = 1;
/// Ending of the name of a manifest.
pub(crate) const ENDING: &str = ".backup.json";

/// A backup of one disk: one file, and the parents that it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BackupManifest {
    /// Version of this form: 1.
    pub(crate) version: u32,
    /// Identifier of the backup. Disks that were copied as of one instant have the same one.
    pub(crate) id: String,
    /// Name of the guest, or its number if it has no name of its own.
    pub(crate) guest: String,
    /// Name of the disk in the guest.
    pub(crate) vdev: String,
    /// Point in time of the content, in milliseconds since 1970.
    pub(crate) taken_ms: u64,
    /// Bytes of the disk.
    pub(crate) size: u64,
    /// Bytes of a logical sector.
    pub(crate) sector_size: u32,
    /// Identifier of the backup that this one continues; nothing for a full backup.
    pub(crate) parent: Option<String>,
    /// Name of the qcow2 image in the folder. An increment has that of its parent as its backing image.
    pub(crate) file: String,
    /// Bytes of that file.
    pub(crate) file_size: u64,
    /// Bytes of storage that the file takes, of which its holes take none; nothing if an older program took the backup.
    #[serde(default)]
    pub(crate) allocated: Option<u64>,
    /// Bytes of the disk that were copied into that file, before compression; nothing if an older program took the
    /// backup.
    #[serde(default)]
    pub(crate) data_size: Option<u64>,
    /// Compression of the data in that file; nothing if it is not compressed.
    #[serde(default)]
    pub(crate) compression: Option<BackupCompression>,
    /// Agreement of the guest's file systems with that point in time.
    #[serde(default)]
    pub(crate) consistency: BackupConsistency,
    /// SHA-256 of that file, in hexadecimal digits.
    pub(crate) sha256: String,
    /// Dirty bitmap of the disk that began with this backup.
    pub(crate) mark: MarkName,
}

/// State of a guest's file systems in a backup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum BackupConsistency {
    /// As after a power cut: file systems replay their journals.
    #[default]
    Crash,
    /// The guest's file systems were frozen at that moment (`--freeze`).
    FileSystem,
}

impl BackupConsistency {
    /// Returns its name, as in JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Crash => "crash",
            Self::FileSystem => "file-system",
        }
    }
}

impl BackupManifest {
    /// Checks a manifest that was read from the file `stem` with [`ENDING`]: it names the image beside it and nothing
    /// else.
    ///
    /// # Errors
    /// Another program has written it, or a newer one.
    pub(crate) fn check(&self, stem: &str) -> Result<(), Failure> {
        let wrong = |why: String| Err(Failure::new(Code::Image, format!("{stem}{ENDING}: {why}")));
        if self.version != VERSION {
            return wrong(format!(
                "the manifest has version {}, and this program reads version {VERSION}: use the one that wrote it",
                self.version
            ));
        }
        match self.file == format!("{stem}.qcow2") {
            true => Ok(()),
            false => wrong(format!(
                "the manifest names the file {:?} in place of {stem}.qcow2: the backup was renamed or damaged",
                self.file
            )),
        }
    }

    /// Returns the name of its files without their endings.
    pub(crate) fn stem(&self) -> &str {
        self.file.strip_suffix(".qcow2").unwrap_or(&self.file)
    }

    /// Whether it is of the same disk.
    fn is_with(&self, other: &Self) -> bool {
        self.is_of(&other.guest, &other.vdev)
    }

    /// Whether it is of this disk.
    pub(crate) fn is_of(&self, guest: &str, vdev: &str) -> bool {
        self.guest == guest && self.vdev == vdev
    }
}

/// Returns the newest backup of a disk.
pub(crate) fn newest<'a>(
    all: &'a [BackupManifest],
    guest: &str,
    vdev: &str,
) -> Option<&'a BackupManifest> {
    let its = all.iter().filter(|one| one.is_of(guest, vdev));
    its.max_by(|a, b| (a.taken_ms, &a.id).cmp(&(b.taken_ms, &b.id)))
}

/// Returns the backups that one consists of: a full one first, itself last.
///
/// # Errors
/// One is missing, or does not fit.
pub(crate) fn chain<'a>(
    all: &'a [BackupManifest],
    of: &'a BackupManifest,
) -> Result<Vec<&'a BackupManifest>, Failure> {
    let wrong = |why: String| Err(Failure::new(Code::Image, format!("{}: {why}", of.file)));
    let mut chain = vec![of];
    while let Some((last, parent)) = chain
        .last()
        .and_then(|last| Some((*last, last.parent.as_ref()?)))
    {
        let found = all
            .iter()
            .find(|one| one.id == *parent && one.is_with(last));
        let Some(found) = found else {
            return wrong(format!(
                "the backup needs the backup {parent}, which is not in the folder: restore an older one, or put it back"
            ));
        };
        if chain.len() > all.len() {
            return wrong("its parents are a circle: the manifests are damaged".into());
        }
        if found.size > last.size || found.sector_size != last.sector_size {
            return wrong(format!(
                "its parent {} is a larger disk or one of other sectors: the manifests are damaged",
                found.file
            ));
        }
        chain.push(found);
    }
    chain.reverse();
    Ok(chain)
}

/// Returns the backups of one disk that may be removed, the newest first: all that neither the `keep` newest ones nor
/// those that they need are.
///
/// # Errors
/// A chain is not whole, so no backup is removed.
pub(crate) fn outdated<'a>(
    all: &'a [BackupManifest],
    keep: usize,
    guest: &str,
    vdev: &str,
) -> Result<Vec<&'a BackupManifest>, Failure> {
    let mut its: Vec<&BackupManifest> = all.iter().filter(|one| one.is_of(guest, vdev)).collect();
    its.sort_by(|a, b| (b.taken_ms, &b.id).cmp(&(a.taken_ms, &a.id)));
    let mut needed = BTreeSet::new();
    for one in its.iter().take(keep) {
        needed.extend(chain(all, one)?.into_iter().map(|one| one.file.as_str()));
    }
    its.retain(|one| !needed.contains(one.file.as_str()));
    Ok(its)
}

#[cfg(test)]
mod tests {
    use super::{chain, newest, outdated, BackupConsistency, BackupManifest, VERSION};

    /// Backups of web xvda, each with its parent.
    fn some(backups: &[(u64, Option<u64>)]) -> Vec<BackupManifest> {
        let one = |&(number, parent): &(u64, Option<u64>)| BackupManifest {
            version: VERSION,
            id: number.to_string(),
            guest: "web".into(),
            vdev: "xvda".into(),
            taken_ms: number,
            size: 1 << 20,
            sector_size: 512,
            parent: parent.map(|parent| parent.to_string()),
            file: format!("web-xvda-{number}.qcow2"),
            file_size: 1,
            allocated: None,
            data_size: None,
            compression: None,
            consistency: BackupConsistency::Crash,
            sha256: String::new(),
            mark: format!("backup-{number}").parse().expect("a name"),
        };
        backups.iter().map(one).collect()
    }

    fn ids(backups: &[&BackupManifest]) -> String {
        backups.iter().map(|one| one.id.as_str()).collect()
    }

    #[test]
    fn a_chain_is_whole_and_of_one_disk() {
        let mut all = some(&[(3, Some(2)), (1, None), (2, Some(1))]);
        let last = newest(&all, "web", "xvda").expect("one");
        assert_eq!(ids(&chain(&all, last).expect("a chain")), "123");
        assert_eq!(newest(&all, "web", "xvdb"), None);
        all[1].vdev = "xvdb".into();
        let why = chain(&all, &all[0]).expect_err("another disk").message;
        assert!(why.contains("needs the backup 1"), "{why}");
        all[1].vdev = "xvda".into();
        all[1].size = 2 << 20;
        assert!(chain(&all, &all[0]).is_err());
        let circle = some(&[(1, Some(2)), (2, Some(1))]);
        assert!(chain(&circle, &circle[0]).is_err());
    }

    #[test]
    fn backups_that_kept_ones_need_are_kept() {
        let all = some(&[
            (1, None),
            (2, Some(1)),
            (3, None),
            (4, Some(3)),
            (5, Some(4)),
        ]);
        let gone = |keep| ids(&outdated(&all, keep, "web", "xvda").expect("whole chains"));
        assert_eq!([gone(1), gone(3), gone(4), gone(9)], ["21", "21", "", ""]);
        let torn = some(&[(2, Some(1)), (3, Some(2))]);
        assert!(outdated(&torn, 1, "web", "xvda").is_err());
    }

    #[test]
    fn a_manifest_of_an_older_program_is_read() {
        let mut text = serde_json::to_value(&some(&[(1, None)])[0]).expect("JSON");
        let fields = text.as_object_mut().expect("fields");
        for name in ["allocated", "data_size", "compression", "consistency"] {
            assert!(fields.remove(name).is_some(), "{name}");
        }
        let read: BackupManifest = serde_json::from_value(text).expect("a manifest");
        assert_eq!(read, some(&[(1, None)])[0]);
    }

    #[test]
    fn a_manifest_names_the_file_beside_it() {
        let mut one = some(&[(1, None)]).remove(0);
        assert_eq!(one.check("web-xvda-1"), Ok(()));
        assert!(one.check("web-xvda-2").is_err());
        one.file = "../../etc/shadow".into();
        assert!(one.check("web-xvda-1").is_err());
        (one.file, one.version) = ("web-xvda-1.qcow2".into(), 2);
        assert!(one.check("web-xvda-1").is_err());
    }
}
