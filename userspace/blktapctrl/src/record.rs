// SPDX-License-Identifier: MIT OR Apache-2.0
//! The record of each disk, for the next supervisor and for administrators.

mod files;
mod leases;
mod peek;

use crate::folder;
use crate::image::Identity;
use control::supervisor::{Mode, PendingOperation, Policy};
use control::tapdisk::{ImageStamp, Open};
use control::{MarkName, Target};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub use files::{Files, Records};
pub use leases::{image_of, is_one_lease, leased, Hold, Leased};
pub use peek::{PeekNext, RecordPeek, UnreadRecord};

/// Version of the files. A program may misunderstand a file with a higher number; a field that may be ignored does not
/// raise it.
const VERSION: u32 = 4;
/// The version of a record without a trace. A program that does not know of traces would leave requests out of one.
const WITHOUT_TRACE: u32 = 3;
/// The version of a record without marks, too. A program that does not know of marks would have the disk changed
/// without tracking that.
const WITHOUT_MARKS: u32 = 2;
/// The version of a record without parts, too. A program that does not know of parts would give them to other disks.
const WITHOUT_PARTS: u32 = 1;

/// State in which the supervisor is to keep a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DesiredState {
    /// Nothing: it is there, and perhaps a process is attached.
    #[default]
    Idle,
    /// The disk is to be served: a process that dies is replaced.
    Served,
    /// The disk is paused.
    Paused,
}

/// Why a disk that is to be served has no image for the time being.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InactiveReason {
    /// Its guest has not arrived.
    Arriving,
    /// Its guest was suspended.
    Suspended {
        /// How the image was left, if that is known.
        stamp: Option<ImageStamp>,
    },
}

/// A process that can be recognised: numbers of processes are used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownProcess {
    /// Its number.
    pub pid: u32,
    /// When it was started, in clock ticks since the host was.
    pub started: u64,
}

/// Purpose of a file beside the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PartRole {
    /// A backing image of the one that is served.
    Parent,
    /// The file holds a part of the image.
    Extent,
    /// A server listens there.
    Socket,
    /// The image to which the disk is copied.
    Mirror,
}

impl std::fmt::Display for PartRole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            PartRole::Parent => "parent",
            PartRole::Extent => "extent",
            PartRole::Socket => "server",
            PartRole::Mirror => "mirror",
        })
    }
}

/// Something beside the image that the disk's process was given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPart {
    /// Purpose of the file.
    pub role: PartRole,
    /// By which path it was named.
    pub path: PathBuf,
    /// Identity of the file; nothing for a socket.
    pub identity: Option<Identity>,
    /// When it was made, as of an image.
    #[serde(default)]
    pub born: Option<u64>,
    /// Sharing mode.
    pub mode: Mode,
    /// The process has orders to lock it.
    pub locked: bool,
}

impl DiskPart {
    /// Whether it is a backing image.
    #[must_use]
    pub fn is_parent(&self) -> bool {
        self.role == PartRole::Parent
    }
}

/// Returns the backing images among the parts.
pub fn parents(parts: &[DiskPart]) -> impl Iterator<Item = &DiskPart> {
    parts.iter().filter(|part| part.is_parent())
}

/// A file below the image, as the kernel knows it: its place in the list says by which number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LentFile {
    /// Identity of the file.
    pub identity: Identity,
    /// When it was made, as of an image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub born: Option<u64>,
}

/// A process that is to take a disk over from the one that serves it. Until it has, the disk's process is
/// the old one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingHandoff {
    /// Program of the new process, if it is not the supervisor's default.
    pub program: Option<PathBuf>,
    /// The new process; nothing before the old one begins to release the disk.
    pub process: Option<KnownProcess>,
}

/// A new image over the present one, to which a disk is to switch. Until it is served, it is a file that can be taken
/// away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingOverlay {
    /// Image to be served, with its options.
    pub open: Open,
    /// Identity of the file that was made for it.
    pub identity: Option<Identity>,
    /// When that was made.
    #[serde(default)]
    pub born: Option<u64>,
}

/// An image that is to take over what it shows of those below it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingStream {
    /// Target that is served.
    pub target: Target,
    /// Bytes in a second.
    pub rate: u64,
}

/// An image that a disk is copied to, which is one of its parts, and then served from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingMirror {
    /// Image to which the disk is copied, with its options.
    pub open: Open,
    /// Bytes in a second.
    pub rate: u64,
    /// The target is the backing image of the disk's image.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub below: bool,
    /// Its mode had no write permission.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub marked: bool,
}

/// A moment (mark) from which on a [map](crate::bitmap_files) records the guest's writes, until the next one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MarkRecord {
    /// Number of the map; a later map has a higher one.
    pub number: u64,
    /// Name of the mark; nothing if it was removed while an older mark still needs its map.
    pub name: Option<MarkName>,
    /// In milliseconds since 1970.
    pub at_ms: u64,
    /// Bytes of the disk by then.
    pub size: u64,
    /// Bytes for each bit of the map.
    pub unit: u64,
    /// The disk's process has said that it notes there. Before that it is no mark.
    pub is_set: bool,
}

/// The [file](crate::traces) that records the requests of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceRecord {
    /// Where it is.
    pub path: PathBuf,
    /// Identity of the file.
    pub identity: Identity,
    /// When it was made, as of an image.
    #[serde(default)]
    pub born: Option<u64>,
    /// The file also has the data of writes.
    pub data: bool,
    /// Bytes of it.
    pub size: u64,
    /// In milliseconds since 1970.
    pub at_ms: u64,
}

/// The image from which a disk is to be served after a pause. Until it is, the disk keeps what it had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NextImage {
    /// Image to be served, with its options.
    pub open: Open,
    /// Identity of the image.
    pub identity: Option<Identity>,
    /// When that was made.
    #[serde(default)]
    pub born: Option<u64>,
    /// Other files that its process got for it.
    #[serde(default)]
    pub parts: Vec<DiskPart>,
    /// Other files that it may get.
    #[serde(default)]
    pub files: Vec<PathBuf>,
    /// Requests that had been executed before, by whomever: if there are more, it has been served.
    pub committed: u64,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Version of this file.
    version: u32,
    /// The node.
    pub minor: u32,
    /// Image that it serves, with its options.
    pub open: Option<Open>,
    /// Identity of its image.
    pub identity: Option<Identity>,
    /// When its image was made, in nanoseconds since 1970: the number of a file is used again. Nothing
    /// if its file system does not know.
    #[serde(default)]
    pub born: Option<u64>,
    /// Other files that its process got.
    #[serde(default)]
    pub parts: Vec<DiskPart>,
    /// Other files that it may get, as the administrator has named them.
    #[serde(default)]
    pub files: Vec<PathBuf>,
    /// Files below its images that the kernel has had, or was to get. Nothing ever leaves this list.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lent: Vec<LentFile>,
    /// Sharing mode of the image.
    pub mode: Mode,
    /// Error policy, limits and group.
    pub policy: Policy,
    /// The backend's directory in xenstore, relative to the domain's.
    pub vbd: Option<String>,
    /// The process serves NBD clients as well.
    pub nbd: bool,
    /// KiB of its node's arena; 0 for the default.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub arena_kib: u32,
    /// State in which the disk is to be.
    pub want: DesiredState,
    /// Token of its leases: see [`Record::token`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lease: Option<String>,
    /// Written for a supervisor that does not know `leases`: see [`Record::is_reserved`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    reserved: bool,
    /// Leases that this host has for it, or may have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    leases: Vec<Leased>,
    /// Another host or disk may use the image for now: a new process does not open it.
    #[serde(default)]
    pub inactive: Option<InactiveReason>,
    /// The disk that has taken over the image. This one does not get it again.
    #[serde(default)]
    pub passed_on: Option<String>,
    /// The verb that has begun and is not done: a supervisor that finds one finishes it.
    #[serde(default)]
    pub doing: Option<PendingOperation>,
    /// The image to which an unpause leads, if that is another one.
    #[serde(default)]
    pub next: Option<NextImage>,
    /// The new image of a snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<PendingOverlay>,
    /// The stream into its image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<PendingStream>,
    /// The image to which it is copied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<PendingMirror>,
    /// Marks, from which on its guest's writes are recorded, the oldest first. Its process uses the last one's map.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub marks: Vec<MarkRecord>,
    /// The trace of its guest's requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<TraceRecord>,
    /// Its process.
    pub process: Option<KnownProcess>,
    /// Program of its processes, if it is not the supervisor's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub program: Option<PathBuf>,
    /// The process that is to take it over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handoff: Option<PendingHandoff>,
    /// How often the process was replaced.
    pub restarts: u32,
    /// Number of requests that failed because processes died of them, and that were reported.
    #[serde(default)]
    pub poisoned: u32,
    /// Number of failed flushes in the kernel that were reported.
    #[serde(default)]
    pub failed_flushes: u32,
    /// Error of the image that stopped the disk, until it is served again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
    /// Fields of a newer supervisor, which finds them again.
    #[serde(flatten)]
    other: Map<String, Value>,
}

// By reference: that is how serde asks.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

impl Record {
    /// Returns the parts of the image that is served, or of the one that is about to replace it.
    #[must_use]
    pub fn its_parts(&self) -> &[DiskPart] {
        let next = self.next.as_ref();
        next.map_or(&self.parts, |next| &next.parts)
    }

    /// A node without anything.
    #[must_use]
    pub fn new(minor: u32, policy: Policy) -> Record {
        Record {
            version: VERSION,
            minor,
            open: None,
            identity: None,
            born: None,
            parts: Vec::new(),
            files: Vec::new(),
            lent: Vec::new(),
            mode: Mode::default(),
            policy,
            vbd: None,
            nbd: false,
            arena_kib: 0,
            want: DesiredState::Idle,
            lease: None,
            reserved: false,
            leases: Vec::new(),
            inactive: None,
            passed_on: None,
            doing: None,
            next: None,
            overlay: None,
            stream: None,
            mirror: None,
            marks: Vec::new(),
            trace: None,
            process: None,
            program: None,
            handoff: None,
            restarts: 0,
            poisoned: 0,
            failed_flushes: 0,
            stopped: None,
            other: Map::new(),
        }
    }

    /// Sets the present error policy, limits, map and trace, whatever the record had when a verb began.
    pub fn rule(&self, open: &mut Open) {
        open.on_no_space = self.policy.on_no_space;
        open.on_error = self.policy.on_error;
        open.limits = self.policy.limits;
        open.notes = self.marks.last().map(|mark| mark.unit);
        open.trace = self.trace.is_some();
    }

    /// Completes a hand-off: the new process has the disk.
    pub fn take_over(&mut self, process: KnownProcess) {
        if let Some(handoff) = self.handoff.take() {
            self.program = handoff.program;
        }
        self.process = Some(process);
        self.doing = None;
    }

    /// Writes it: after a crash at any time there is the old or the new one.
    ///
    /// # Errors
    /// The system refuses to; the old one is still there.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let next = self.next.iter().flat_map(|next| &next.parts);
        let version = match self.parts.iter().chain(next).next() {
            _ if self.trace.is_some() => VERSION,
            _ if !self.marks.is_empty() => WITHOUT_TRACE,
            Some(_) => WITHOUT_MARKS,
            None => WITHOUT_PARTS,
        };
        let record = Record {
            version,
            reserved: self.is_reserved(),
            ..self.clone()
        };
        let mut text = serde_json::to_vec_pretty(&record)?;
        text.push(b'\n');
        folder::replace(path, &text)
    }

    /// Reads one.
    ///
    /// # Errors
    /// The system refuses to, or it is none of this version.
    pub fn read(path: &Path) -> Result<Record, UnreadRecord> {
        Record::parse(path, fs::read(path))
    }

    fn parse(path: &Path, bytes: io::Result<Vec<u8>>) -> Result<Record, UnreadRecord> {
        let named = || {
            let stem = path.file_stem()?.to_str()?;
            stem.parse::<u32>().ok()
        };
        let unread = |why: String, value: Value| UnreadRecord {
            minor: named(),
            why: format!("{} is not understood: {why}", path.display()),
            peek: Box::new(RecordPeek::of(&value)),
        };
        let bytes = bytes.map_err(|error| unread(error.to_string(), Value::Null))?;
        let value: Value = serde_json::from_slice(&bytes)
            .map_err(|error| unread(error.to_string(), Value::Null))?;
        let version = value.get("version").and_then(Value::as_u64);
        if version.is_some_and(|version| version > VERSION.into()) {
            let why = "a newer blktapctrl wrote it: install that one again".into();
            return Err(unread(why, value));
        }
        match serde_json::from_value::<Record>(value.clone()) {
            Ok(mut record) if Some(record.minor) == named() => {
                record.version = VERSION;
                record.understand_leases();
                Ok(record)
            }
            Ok(record) => Err(unread(format!("it is of disk {}", record.minor), value)),
            Err(error) => Err(unread(error.to_string(), value)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{DesiredState, DiskPart, KnownProcess, MarkRecord, PartRole, Record, TraceRecord};
    use crate::image::Identity;
    use control::supervisor::{Mode, Policy};
    use control::tapdisk::Open;
    use serde_json::Value;
    use std::fs;
    use std::path::PathBuf;

    fn sample() -> Record {
        let mut record = Record::new(7, Policy::default());
        record.open = Some(Open::new("aio:/srv/a.img".parse().expect("a target")));
        record.identity = Some(Identity::File { dev: 3, ino: 9 });
        record.mode = Mode::WriteShared;
        record.vbd = Some("backend/vbd/3/51712".into());
        record.want = DesiredState::Served;
        record.process = Some(KnownProcess {
            pid: 12,
            started: 345,
        });
        record
    }

    fn part(ino: u64) -> DiskPart {
        DiskPart {
            role: PartRole::Extent,
            path: "/srv/part.img".into(),
            identity: Some(Identity::File { dev: 3, ino }),
            born: None,
            mode: Mode::Write,
            locked: true,
        }
    }

    #[test]
    fn a_supervisor_that_does_not_know_of_something_leaves_its_disk_alone() {
        let path = place("parts");
        let version = || {
            let text = fs::read(&path).expect("read");
            let value: Value = serde_json::from_slice(&text).expect("json");
            value["version"].clone()
        };
        let mut record = sample();
        record.write(&path).expect("write");
        assert_eq!(version(), 1);
        record.parts.push(part(8));
        record.write(&path).expect("write");
        assert_eq!(version(), 2);
        assert_eq!(Record::read(&path).expect("read"), record);
        record.marks.push(MarkRecord {
            number: 1,
            name: "a".parse().ok(),
            at_ms: 5,
            size: 1 << 20,
            unit: 65536,
            is_set: true,
        });
        record.write(&path).expect("write");
        assert_eq!(version(), 3);
        assert_eq!(Record::read(&path).expect("read"), record);
        record.trace = Some(TraceRecord {
            path: "/srv/t".into(),
            identity: Identity::File { dev: 3, ino: 10 },
            born: None,
            data: true,
            size: 1 << 24,
            at_ms: 5,
        });
        record.write(&path).expect("write");
        assert_eq!(version(), 4);
        assert_eq!(Record::read(&path).expect("read"), record);
        fs::remove_dir_all(path.parent().expect("a folder")).expect("remove");
    }

    fn place(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("record-{}-{name}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        folder.join("7.json")
    }

    #[test]
    fn record_comes_back_as_it_was() {
        let path = place("same");
        let record = sample();
        record.write(&path).expect("write");
        assert_eq!(Record::read(&path).expect("read"), record);
        fs::write(&path, "{\"version\":1}").expect("write");
        assert!(Record::read(&path).is_err());
        fs::rename(&path, path.with_file_name("8.json")).expect("rename");
        record.write(&path.with_file_name("8.json")).expect("write");
        let unread = Record::read(&path.with_file_name("8.json")).expect_err("of another disk");
        assert!(unread.why.contains("it is of disk 7"), "{}", unread.why);
        fs::remove_dir_all(path.parent().expect("a folder")).expect("remove");
    }

    #[test]
    fn what_a_newer_supervisor_wrote_is_kept_or_left_alone() {
        let path = place("newer");
        let mut value = serde_json::to_value(sample()).expect("json");
        value["version"] = 1.into();
        value["colour"] = "green".into();
        fs::write(&path, value.to_string()).expect("write");
        let mut record = Record::read(&path).expect("a field that may be passed over");
        record.restarts = 5;
        record.write(&path).expect("write");
        let text = fs::read(&path).expect("read");
        let again: Value = serde_json::from_slice(&text).expect("json");
        assert_eq!(again["colour"], "green");
        assert_eq!(again["restarts"], 5);
        value["version"] = 5.into();
        value["policy"] = "strict".into();
        let mut other = serde_json::to_value(part(1)).expect("json");
        other["role"] = "shadow".into();
        value["parts"] = vec![serde_json::to_value(part(2)).expect("json"), other].into();
        value["next"] =
            serde_json::json!({ "identity": { "device": { "rdev": 5 } }, "parts": [part(3)] });
        fs::write(&path, value.to_string()).expect("write");
        let unread = Record::read(&path).expect_err("another version");
        let inos = unread.peek.all_parts().map(|part| part.identity);
        let file = |ino| Some(Identity::File { dev: 3, ino });
        assert_eq!(inos.collect::<Vec<_>>(), [file(2), file(1), file(3)]);
        let next = unread.peek.next.as_ref().and_then(|next| next.identity);
        assert_eq!(next, Some(Identity::Device { rdev: 5 }));
        assert!(unread.why.contains("newer blktapctrl"), "{}", unread.why);
        assert_eq!(unread.minor, Some(7));
        assert_eq!(unread.peek.vbd.as_deref(), Some("backend/vbd/3/51712"));
        assert_eq!(
            unread.peek.identity,
            Some(Identity::File { dev: 3, ino: 9 })
        );
        assert_eq!(unread.peek.policy, None);
        fs::remove_dir_all(path.parent().expect("a folder")).expect("remove");
    }

    #[test]
    fn a_record_that_cannot_be_written_leaves_the_old_one() {
        let path = place("full");
        let mut record = sample();
        record.write(&path).expect("write");
        // In the way of the file beside it.
        fs::create_dir(path.with_extension("new")).expect("a folder");
        record.restarts = 5;
        assert!(record.write(&path).is_err());
        assert_eq!(Record::read(&path).expect("read"), sample());
        fs::remove_dir_all(path.parent().expect("a folder")).expect("remove");
    }
}
