// SPDX-License-Identifier: MIT OR Apache-2.0
//! The folder of backups: a lock, manifests, and the journal of the backup that is being taken.

use super::journal::BackupJournal;
use super::manifest::{BackupManifest, ENDING};
use control::{Code, Failure};
use rustix::fs::{flock, FlockOperation};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// Name of the file that a program locks while it works in the folder.
const LOCK: &str = ".lock";
/// Name of the journal.
const JOURNAL: &str = ".backup-under-way";
/// Ending of a file that is not whole.
pub(crate) const UNFINISHED: &str = ".unfinished";
/// Bytes of a manifest or a journal at most.
const LONGEST: u64 = 1 << 22;

/// A folder of backups.
#[derive(Debug)]
pub(crate) struct BackupFolder {
    pub(crate) path: PathBuf,
    /// Locked as long as this exists.
    _lock: Option<File>,
}

/// Returns a closure that says what failed with a file.
fn failed<'a>(what: &'a str, path: &'a Path) -> impl Fn(io::Error) -> Failure + 'a {
    move |error| Failure::system(format!("cannot {what} {}", path.display()), &error)
}

impl BackupFolder {
    /// Opens a folder to change it. No other program works in it as long as this exists.
    ///
    /// # Errors
    /// The folder does not exist or is in use.
    pub(crate) fn change(path: &Path) -> Result<Self, Failure> {
        let path = std::path::absolute(path).map_err(failed("find", path))?;
        if !path.is_dir() {
            return Err(Failure::new(
                Code::NotFound,
                format!("{0} is no folder: make it: `mkdir -p {0}`", path.display()),
            ));
        }
        let name = path.join(LOCK);
        let mut options = File::options();
        let file = options.create(true).truncate(false).write(true).open(&name);
        let file = file.map_err(failed("open", &name))?;
        lock(&file, &path, FlockOperation::NonBlockingLockExclusive)?;
        let folder = Self {
            path,
            _lock: Some(file),
        };
        folder.remove(&format!("{JOURNAL}{UNFINISHED}"))?;
        Ok(folder)
    }

    /// Opens a folder to read it. No program removes backups as long as this exists.
    ///
    /// # Errors
    /// The folder does not exist, or a backup is being taken.
    pub(crate) fn read(path: &Path) -> Result<Self, Failure> {
        let path = std::path::absolute(path).map_err(failed("find", path))?;
        let name = path.join(LOCK);
        let file = match File::open(&name) {
            Ok(file) => {
                lock(&file, &path, FlockOperation::NonBlockingLockShared)?;
                Some(file)
            }
            // A copy of a folder, on storage that is only read, say.
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed("open", &name)(error)),
        };
        Ok(Self { path, _lock: file })
    }

    /// Reads all manifests, the oldest first.
    ///
    /// # Errors
    /// One cannot be read: without it a backup might seem to be whole that is not.
    pub(crate) fn manifests(path: &Path) -> Result<Vec<BackupManifest>, Failure> {
        let mut all = Vec::new();
        for entry in fs::read_dir(path).map_err(failed("read", path))? {
            let name = entry.map_err(failed("read", path))?.file_name();
            let Some(stem) = name.to_str().and_then(|name| name.strip_suffix(ENDING)) else {
                continue;
            };
            let manifest: BackupManifest = parsed(&path.join(&name))?;
            manifest.check(stem)?;
            all.push(manifest);
        }
        all.sort_by(|a, b| (a.taken_ms, &a.file).cmp(&(b.taken_ms, &b.file)));
        Ok(all)
    }

    /// Returns the journal of a backup that has not ended in order.
    ///
    /// # Errors
    /// The journal cannot be read.
    pub(crate) fn journal(&self) -> Result<Option<BackupJournal>, Failure> {
        let path = self.path.join(JOURNAL);
        if !path.exists() {
            return Ok(None);
        }
        let journal: BackupJournal = parsed(&path)?;
        journal.check().map(|()| Some(journal))
    }

    /// Writes the journal, durably.
    pub(crate) fn keep_journal(&self, journal: &BackupJournal) -> Result<(), Failure> {
        self.keep(JOURNAL, journal)
    }

    /// Removes the journal, which is the last step.
    pub(crate) fn remove_journal(&self) -> Result<(), Failure> {
        self.remove(JOURNAL)?;
        self.sync()
    }

    /// Writes a manifest, durably; then its backup exists.
    pub(crate) fn keep_manifest(&self, manifest: &BackupManifest) -> Result<(), Failure> {
        self.keep(&format!("{}{ENDING}", manifest.stem()), manifest)
    }

    fn keep(&self, name: &str, what: &impl serde::Serialize) -> Result<(), Failure> {
        let path = self.path.join(name);
        let part = self.path.join(format!("{name}{UNFINISHED}"));
        let write = || -> io::Result<()> {
            let mut text = serde_json::to_vec_pretty(what)?;
            text.push(b'\n');
            let mut file = File::create(&part)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&part, &path)
        };
        write().map_err(|error| {
            // The failure to write is the one to report; the next backup removes the part.
            let _ = fs::remove_file(&part);
            failed("write", &path)(error)
        })?;
        self.sync()
    }

    /// Gives an image that is whole its name.
    pub(crate) fn rename(&self, from: &str, to: &str) -> Result<(), Failure> {
        let (from, to) = (self.path.join(from), self.path.join(to));
        fs::rename(&from, &to).map_err(failed("rename", &from))?;
        self.sync()
    }

    /// Removes a file; success if there is none.
    pub(crate) fn remove(&self, name: &str) -> Result<(), Failure> {
        remove(&self.path.join(name))
    }

    fn sync(&self) -> Result<(), Failure> {
        let synced = File::open(&self.path).and_then(|folder| folder.sync_all());
        synced.map_err(failed("make durable", &self.path))
    }
}

/// Removes a file; success if there is none.
pub(crate) fn remove(path: &Path) -> Result<(), Failure> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

fn lock(file: &File, folder: &Path, how: FlockOperation) -> Result<(), Failure> {
    match flock(file, how) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Failure::new(
            Code::Busy,
            format!(
                "another backup, restore or verification works in {}: try again when that has ended",
                folder.display()
            ),
        )),
        Err(error) => Err(failed("lock", folder)(error.into())),
    }
}

fn parsed<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, Failure> {
    let file = File::open(path).map_err(failed("read", path))?;
    let mut text = String::new();
    let read = file.take(LONGEST).read_to_string(&mut text);
    read.map_err(failed("read", path))?;
    serde_json::from_str(&text).map_err(|error| {
        Failure::new(
            Code::Image,
            format!("{} is damaged: {error}", path.display()),
        )
    })
}

/// Returns the bytes of a file and its SHA-256, and makes it durable.
pub(crate) fn digest(path: &Path) -> Result<(u64, String), Failure> {
    let read = || -> io::Result<(u64, String)> {
        let mut file = File::open(path)?;
        file.sync_all()?;
        let (mut sum, mut size) = (Sha256::new(), 0);
        let mut buffer = vec![0; 1 << 20];
        loop {
            let count = file.read(&mut buffer)?;
            if count == 0 {
                let sum = sum.finalize();
                let digits = sum.iter().map(|byte| format!("{byte:02x}"));
                return Ok((size, digits.collect()));
            }
            sum.update(&buffer[..count]);
            size += count as u64;
        }
    };
    read().map_err(failed("read", path))
}
