// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is written down of each disk, for the next supervisor and for people.

use crate::sharing::Identity;
use control::supervisor::{Mode, Policy};
use control::tapdisk::Open;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Version of the files.
const VERSION: u32 = 1;

/// What the supervisor wants of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Want {
    /// Nothing: it is there, and perhaps a process is attached.
    #[default]
    Idle,
    /// It is to be served: a process that dies is replaced.
    Served,
    /// It is to wait.
    Paused,
}

/// A process that can be recognised: numbers of processes are used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// Its number.
    pub pid: u32,
    /// When it was started, in clock ticks since the host was.
    pub started: u64,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Version of this file.
    version: u32,
    /// The node.
    pub minor: u32,
    /// What it serves.
    pub open: Option<Open>,
    /// What its image is.
    pub identity: Option<Identity>,
    /// Who may share the image.
    pub mode: Mode,
    /// What to do when things go wrong.
    pub policy: Policy,
    /// The backend's directory in xenstore, relative to the domain's.
    pub vbd: Option<String>,
    /// It speaks NBD too.
    pub nbd: bool,
    /// What is wanted.
    pub want: Want,
    /// Its process.
    pub process: Option<Known>,
    /// How often the process was replaced.
    pub restarts: u32,
    /// Requests that failed because processes died of them, of which was told.
    #[serde(default)]
    pub poisoned: u32,
}

impl Record {
    /// A node without anything.
    #[must_use]
    pub fn new(minor: u32, policy: Policy) -> Record {
        Record {
            version: VERSION,
            minor,
            open: None,
            identity: None,
            mode: Mode::default(),
            policy,
            vbd: None,
            nbd: false,
            want: Want::Idle,
            process: None,
            restarts: 0,
            poisoned: 0,
        }
    }

    /// Writes it: after a crash at any time there is the old or the new one.
    ///
    /// # Errors
    /// The system refuses to.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let beside = path.with_extension("new");
        let mut file = File::options()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(&beside)?;
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        file.write_all(&text)?;
        fs::rename(&beside, path)
    }

    /// Reads one.
    ///
    /// # Errors
    /// The system refuses to, or it is none of this version.
    pub fn read(path: &Path) -> io::Result<Record> {
        let record: Record = serde_json::from_slice(&fs::read(path)?)?;
        if record.version != VERSION {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("it has the version {}, not {VERSION}", record.version),
            ));
        }
        Ok(record)
    }
}

#[cfg(test)]
mod tests {
    use super::{Known, Record, Want};
    use crate::sharing::Identity;
    use control::supervisor::{Mode, Policy};
    use control::tapdisk::Open;

    #[test]
    fn record_comes_back_as_it_was() {
        let path = std::env::temp_dir().join(format!("record-{}.json", std::process::id()));
        let mut record = Record::new(7, Policy::default());
        record.open = Some(Open::new("aio:/srv/a.img".parse().expect("a target")));
        record.identity = Some(Identity::File { dev: 3, ino: 9 });
        record.mode = Mode::WriteShared;
        record.vbd = Some("backend/vbd/3/51712".into());
        record.want = Want::Served;
        record.process = Some(Known {
            pid: 12,
            started: 345,
        });
        record.write(&path).expect("write");
        assert_eq!(Record::read(&path).expect("read"), record);
        std::fs::write(&path, "{\"version\":1}").expect("write");
        assert!(Record::read(&path).is_err());
        record.version = 2;
        record.write(&path).expect("write");
        let error = Record::read(&path).expect_err("another version");
        assert!(error.to_string().contains("version 2"), "{error}");
        std::fs::remove_file(path).expect("remove");
    }
}
