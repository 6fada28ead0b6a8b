// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests of tap-ctl and the hotplug script to blktapctrl.
//!
//! Two sets of verbs: [`Request::Create`] and [`Request::Destroy`] do all that a disk needs; the
//! others are the single steps, with the names and meanings that tap-ctl has had since blktap2.

mod event;
mod group;

use crate::stats::{Direct, Mapped, Mirror, Stats, Stream};
use crate::tapdisk::{Disk, OnError, Open, State};
use crate::{
    Changed, Failure, GroupName, InGroup, Limits, Mark, MarkName, Target, TraceTo, Tracing,
};
pub use event::{Counted, Event, What};
pub use group::{Group, GroupChanges, Member};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Action on a process that answers nothing for a while although it has requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HungAction {
    /// An event tells about it.
    #[default]
    Report,
    /// An event, and the process is killed and replaced.
    Kill,
}

/// Behaviour of a disk on errors, and the limits of its guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Policy {
    /// Seconds without a process after which requests of the guest fail; 0 holds them for ever.
    pub fail_after_s: u32,
    /// Deaths of processes at one request after which it fails, without the others; 0 for never.
    pub max_deaths: u32,
    /// Seconds without an answer after which a process counts as hung; 0 for never.
    pub hung_after_s: u32,
    /// Action on a process that hangs.
    pub hung: HungAction,
    /// Action when the image has no room for a write.
    pub on_no_space: OnError,
    /// Action when I/O on the image fails for another reason.
    pub on_error: OnError,
    /// How much the guest may do.
    #[serde(skip_serializing_if = "Limits::is_default")]
    pub limits: Limits,
    /// The group with which it shares limits, too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<GroupName>,
}

/// Changes of a [`Policy`]. The rest stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Changes {
    /// As [`Policy::hung_after_s`].
    pub hung_after_s: Option<u32>,
    /// As [`Policy::hung`].
    pub hung: Option<HungAction>,
    /// As [`Policy::on_no_space`].
    pub on_no_space: Option<OnError>,
    /// As [`Policy::on_error`].
    pub on_error: Option<OnError>,
    /// As [`Limits::bytes`].
    pub bytes: Option<u64>,
    /// As [`Limits::requests`].
    pub requests: Option<u32>,
    /// As [`Limits::burst_s`].
    pub burst_s: Option<u32>,
    /// As [`Policy::group`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<InGroup>,
}

impl Policy {
    /// The policy with these changes.
    #[must_use]
    pub fn with(&self, changes: &Changes) -> Policy {
        let limits = self.limits;
        Policy {
            hung_after_s: changes.hung_after_s.unwrap_or(self.hung_after_s),
            hung: changes.hung.unwrap_or(self.hung),
            on_no_space: changes.on_no_space.unwrap_or(self.on_no_space),
            on_error: changes.on_error.unwrap_or(self.on_error),
            limits: Limits {
                bytes: changes.bytes.unwrap_or(limits.bytes),
                requests: changes.requests.unwrap_or(limits.requests),
                burst_s: changes.burst_s.unwrap_or(limits.burst_s),
            },
            group: match &changes.group {
                None => self.group.clone(),
                Some(InGroup::None) => None,
                Some(InGroup::Named(name)) => Some(name.clone()),
            },
            ..self.clone()
        }
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            fail_after_s: 0,
            max_deaths: 3,
            hung_after_s: 30,
            hung: HungAction::Report,
            on_no_space: OnError::Stop,
            on_error: OnError::Report,
            limits: Limits::default(),
            group: None,
        }
    }
}

/// A verb that changes a disk, and has begun. The record has it before its first step, so that a supervisor that starts
/// anew finishes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PendingOperation {
    /// The disk is being made.
    Create,
    /// Its image is opened.
    Open,
    /// Its image is closed.
    Close,
    /// The disk is being paused.
    Pause,
    /// The disk resumes after a pause, perhaps with another image.
    Unpause,
    /// The disk passes from its process to another one.
    Handoff,
    /// The disk switches to a new image over the one that it had.
    Snapshot,
    /// The disk switches to an image to which it was copied.
    Mirror,
    /// The disk has neither a process nor a node while the kernel's module is exchanged. A request ends this.
    Park,
    /// The disk is being removed.
    Destroy,
}

impl fmt::Display for PendingOperation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Create => "create",
            Self::Open => "open",
            Self::Close => "close",
            Self::Pause => "pause",
            Self::Unpause => "unpause",
            Self::Handoff => "handoff",
            Self::Snapshot => "snapshot",
            Self::Mirror => "mirror",
            Self::Park => "park",
            Self::Destroy => "destroy",
        })
    }
}

/// Sharing mode of an image, with the letters of Xen's disk configurations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// `r`: read-only, beside other readers.
    #[serde(rename = "r")]
    Read,
    /// `r!`: read-only, whoever writes it.
    #[serde(rename = "r!")]
    ReadShared,
    /// `w`: alone.
    #[default]
    #[serde(rename = "w")]
    Write,
    /// `w!`: whoever else has it.
    #[serde(rename = "w!")]
    WriteShared,
}

impl Mode {
    /// Guests may not write.
    pub fn is_read_only(self) -> bool {
        matches!(self, Self::Read | Self::ReadShared)
    }

    /// Others may write the image as well.
    pub fn is_shared(self) -> bool {
        matches!(self, Self::ReadShared | Self::WriteShared)
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "r",
            Self::ReadShared => "r!",
            Self::Write => "w",
            Self::WriteShared => "w!",
        })
    }
}

impl FromStr for Mode {
    type Err = Failure;

    /// Reads what a toolstack writes to the key `mode`; `ro` and `rw` are older forms.
    fn from_str(text: &str) -> Result<Self, Failure> {
        Ok(match text {
            "r" | "ro" => Self::Read,
            "r!" | "ro!" => Self::ReadShared,
            "w" | "rw" => Self::Write,
            "w!" | "rw!" => Self::WriteShared,
            _ => {
                return Err(Failure::invalid(format!(
                    "'{text}' is no mode: use r, w, r! or w!"
                )))
            }
        })
    }
}

/// A disk to make and to serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Create {
    /// Driver and image. [`Open::read_only`] and [`Open::shared`] follow from `mode`.
    pub open: Open,
    /// Sharing mode of the image.
    #[serde(default)]
    pub mode: Mode,
    /// Requested number of the node; the lowest free one if absent.
    #[serde(default)]
    pub minor: Option<u32>,
    /// Error policy, limits and group.
    #[serde(default)]
    pub policy: Policy,
    /// KiB of the arena; 0 for the default.
    #[serde(default)]
    pub arena_kib: u32,
    /// The backend's directory in xenstore for which the disk is: it goes when that goes.
    #[serde(default)]
    pub vbd: Option<String>,
    /// Serve NBD clients at `/run/xentap/nbd/MINOR.sock`.
    #[serde(default)]
    pub nbd: bool,
    /// Answer with [`Reply::Minor`] as soon as the image is this disk's. Repeating the request without this waits until
    /// the disk is served.
    #[serde(default)]
    pub no_wait: bool,
    /// Other files that its process may have beside the image: files, and folders with all that is below them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<PathBuf>,
}

/// An image to look at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Target that would be served.
    pub target: Target,
    /// Sharing mode that it would have.
    #[serde(default)]
    pub mode: Mode,
    /// The backend's directory in xenstore for which it would be.
    #[serde(default)]
    pub vbd: Option<String>,
}

/// A question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Request {
    /// Who is there? Answered with [`Reply::Process`].
    Ping,
    /// All disks that fit: [`Reply::Disks`].
    List(Filter),
    /// Makes a node: [`Reply::Minor`].
    Allocate(Allocate),
    /// Takes a node away that nothing uses, also one that was not made here.
    Free {
        /// The node.
        minor: u32,
    },
    /// Starts a tapdisk: [`Reply::Pid`].
    Spawn,
    /// Gives a node to a tapdisk.
    Attach(Which),
    /// Takes the node from a tapdisk that serves nothing; it then ends.
    Detach(Which),
    /// Opens an image on an attached tapdisk: [`Reply::Opened`].
    Open {
        /// The disk.
        which: Which,
        /// The image.
        open: Open,
        /// Sharing mode.
        mode: Mode,
        /// As of [`Create::files`].
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        files: Vec<PathBuf>,
    },
    /// Closes the image.
    Close {
        /// The disk.
        which: Which,
        /// Kill the process if it does not end its I/O in time.
        force: bool,
        /// Seconds to wait; 0 for the default.
        timeout_s: u32,
    },
    /// Stops serving and closes the image; requests of the guest wait.
    Pause {
        /// The disk.
        which: Which,
        /// Seconds to wait; 0 for the default.
        timeout_s: u32,
    },
    /// Serves again: [`Reply::Opened`].
    Unpause {
        /// The disk.
        which: Which,
        /// Another image, or the same one.
        target: Option<Target>,
        /// The image may be smaller than the disk that the guest knows.
        #[serde(default)]
        may_shrink: bool,
        /// As of [`Create::files`], instead of those that were named before; none leaves them.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        files: Vec<PathBuf>,
    },
    /// Replaces the process of a disk by a new one, perhaps of another program, while its guest works:
    /// [`Reply::HandedOff`]. If the new one cannot, the old one serves on.
    Handoff {
        /// The disk.
        which: Which,
        /// Program of the new process; nothing for the supervisor's default.
        program: Option<PathBuf>,
        /// Seconds that the new process gets for each of its steps; 0 for the default.
        timeout_s: u32,
    },
    /// Makes a new image with the served one as its backing image, and switches the disk to it while its guest works:
    /// [`Reply::Snapshot`]. If it cannot be, the disk is served as it was, and nothing of the new image is left.
    /// Repeating the request after that gets the result of the first one.
    Snapshot {
        /// The disk.
        which: Which,
        /// Kind and path of the new image; no file may have that path.
        target: Target,
    },
    /// Takes snapshots of several disks at one instant: [`Reply::Snapshots`].
    Snapshots {
        /// Each with its new image.
        disks: Vec<(Which, Target)>,
    },
    /// Looks at the image's size again: [`Reply::Opened`].
    Resize(Which),
    /// Makes the image larger, and tells the guest: [`Reply::Opened`].
    Grow {
        /// The disk.
        which: Which,
        /// Bytes of the disk: whole blocks, and no fewer than it has.
        size: u64,
    },
    /// Changes what a disk does when things go wrong, and how much its guest may do, while it is served:
    /// [`Reply::Policy`].
    Set {
        /// The disk.
        which: Which,
        /// Changes of the policy.
        changes: Changes,
    },
    /// Makes a group of disks that share limits, or changes one while they are served: [`Reply::Groups`], of it.
    SetGroup {
        /// Its name.
        name: GroupName,
        /// Changes of the group. A new one needs a limit.
        changes: GroupChanges,
    },
    /// Takes away a group without disks.
    RemoveGroup {
        /// Its name.
        name: GroupName,
    },
    /// The groups, or one of them: [`Reply::Groups`].
    Groups {
        /// Its name; nothing for all.
        name: Option<GroupName>,
    },
    /// Reads all data of a disk to find what cannot be read: [`Reply::Done`] when it has begun. Errors that it finds
    /// are events; its progress is among the counters.
    Scrub {
        /// The disk.
        which: Which,
        /// Bytes in a second at most; 0 ends one that runs.
        rate: u64,
    },
    /// Copies the blocks of the backing images that the disk's image shows into it, while its guest works; then it
    /// needs them no more: [`Reply::Stream`] when it has begun. An event tells of its end.
    Stream {
        /// The disk.
        which: Which,
        /// Bytes in a second at most; 0 ends one that runs. Nothing asks how far it is, or how the last one has
        /// ended.
        rate: Option<u64>,
    },
    /// Copies a disk to another image while its guest works, and then serves the disk from that: [`Reply::Mirror`] when
    /// it has begun. An event tells of its end. Repeating the request changes nothing.
    Mirror {
        /// The disk.
        which: Which,
        /// The image. Nothing asks how far it is, or how the last one has ended.
        to: Option<MirrorTo>,
    },
    /// Copies the blocks that a disk's image has allocated into its backing image while its guest works, and then
    /// serves the disk from that one: as [`Request::Mirror`], which also reports the progress.
    Commit {
        /// The disk.
        which: Which,
        /// The image below.
        to: MirrorTo,
    },
    /// Ends that: [`Reply::Mirror`] when nothing more is done to the other image.
    EndMirror(Which),
    /// Starts to record the guest's writes from now on: [`Reply::Marks`].
    Mark {
        /// The disk.
        which: Which,
        /// How this moment is called.
        name: MarkName,
    },
    /// A mark is of no use any more: [`Reply::Marks`].
    Unmark {
        /// The disk.
        which: Which,
        /// Its name.
        name: MarkName,
    },
    /// The marks of a disk: [`Reply::Marks`].
    Marks(Which),
    /// Where the guest has written since a mark: [`Reply::Changed`].
    Changed {
        /// The disk.
        which: Which,
        /// The mark.
        since: MarkName,
        /// Where on the disk to begin, in bytes: an answer has so many parts at most.
        #[serde(default)]
        from: u64,
    },
    /// Writes down what the guest of a disk asks for from now on: [`Reply::Trace`].
    Trace {
        /// The disk.
        which: Which,
        /// Where. Nothing asks whether that is done.
        to: Option<TraceTo>,
    },
    /// Ends that: [`Reply::Trace`].
    EndTrace(Which),
    /// Asks for the counters: [`Reply::Stats`].
    Stats(Which),
    /// Makes a disk and serves it: [`Reply::Created`]. If the backend's directory has just this disk
    /// already, that is the answer.
    Create(Box<Create>),
    /// Ends a disk, whatever it is doing, and leaves nothing of it. Success if there is none.
    Destroy {
        /// The disk.
        which: Which,
        /// Seconds to wait; 0 for the default. The operation continues afterwards.
        #[serde(default)]
        timeout_s: u32,
        /// The backend's directory in xenstore for which the disk was made, if the caller looked the disk up by it: a
        /// disk of another directory stays. A directory in `which` means a toolstack, which knows whether a guest uses
        /// the disk; this one does not.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        of: Option<String>,
    },
    /// Has all disks let go of the kernel's module, so that it can be exchanged: [`Reply::Parked`]. None is attached to
    /// a guest then. If one cannot, all are served as before.
    Park {
        /// Seconds that a disk gets; 0 for the default.
        timeout_s: u32,
    },
    /// Resumes all parked disks: [`Reply::Parked`].
    Unpark,
    /// Takes over a disk that is listed as unknown: the supervisor makes its record anew from information of the kernel
    /// and of its process.
    Adopt {
        /// The node.
        minor: u32,
    },
    /// Removes the record of a disk that is listed as unknown. Its node and its process stay. Of a disk that is being
    /// destroyed and waits for its lease to be given up, it ends that wait: the lease stays held.
    Forget {
        /// The node.
        minor: u32,
    },
    /// May an image be used? Nothing is changed.
    Check(Check),
    /// Asks for the counters of all disks, for a display that refreshes: [`Reply::Top`].
    Top,
    /// Events from the one after `after` on (those that are kept, then those to come) follow the
    /// answer on this connection, as messages with id 0 and an [`Event`].
    Subscribe {
        /// Number of the last event that is known; 0 for all that are kept. An event counts those that have happened
        /// since and are not kept any more ([`What::Lost`], [`What::Renumbered`]).
        after: u64,
        /// The series of that event ([`Event::series`]); nothing if it is not known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        series: Option<u32>,
    },
}

/// Where a disk is copied to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorTo {
    /// The image, which is there. Its contents are lost.
    pub target: Target,
    /// Bytes in a second at most.
    pub rate: u64,
}

/// Names a disk: at least one of the three.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Which {
    /// Number of its node.
    pub minor: Option<u32>,
    /// Its process; does not count beside `minor`, because a process may have been replaced.
    pub pid: Option<u32>,
    /// The backend's directory in xenstore for which it was made.
    pub vbd: Option<String>,
}

/// Filter for a list: a disk must match every given field.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Filter {
    /// Of this process.
    pub pid: Option<u32>,
    /// With this node.
    pub minor: Option<u32>,
    /// Of this driver.
    pub driver: Option<crate::Driver>,
    /// Of this image.
    pub file: Option<PathBuf>,
}

/// A node to make.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Allocate {
    /// Requested number.
    pub minor: Option<u32>,
    /// KiB of the arena; 0 for the default.
    pub arena_kib: u32,
    /// Error policy, limits and group.
    pub policy: Policy,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub enum Reply {
    /// The request was executed and has no result.
    Done,
    /// The process that answers.
    Process(crate::tapdisk::Process),
    /// A node.
    Minor {
        /// Its number.
        minor: u32,
    },
    /// A process.
    Pid {
        /// Its number.
        pid: u32,
    },
    /// Behaviour of a disk on errors, and the limits of its guest.
    Policy(Policy),
    /// Groups of disks that share limits.
    Groups {
        /// Each of them.
        groups: Vec<Group>,
    },
    /// An image that was opened.
    Opened(Disk),
    /// A disk that was made.
    Created {
        /// Its node.
        minor: u32,
        /// Its process.
        pid: u32,
        /// Properties of the disk.
        disk: Disk,
    },
    /// A disk that is served by another process.
    HandedOff(HandedOff),
    /// A disk that is served from a new image.
    Snapshot(Snapshot),
    /// Disks that are served from new images, by their numbers.
    Snapshots {
        /// The snapshots.
        taken: Vec<Snapshot>,
    },
    /// Disks that released the kernel's module, or resumed with the next one.
    Parked {
        /// Their numbers.
        minors: Vec<u32>,
    },
    /// Disks.
    Disks {
        /// One for each.
        disks: Vec<Row>,
    },
    /// Progress of a stream, which copies the data of the backing images into the image.
    Stream(Stream),
    /// Progress of a copy of the disk to another image.
    Mirror(Mirror),
    /// Dirty bitmaps of a disk, the oldest first.
    Marks {
        /// Each of them.
        marks: Vec<Mark>,
    },
    /// Ranges that a guest has written.
    Changed(Changed),
    /// The file that records the guest's requests.
    Trace {
        /// The trace; nothing if no requests are recorded.
        trace: Option<Tracing>,
    },
    /// Counters of one disk.
    Stats(Box<Stats>),
    /// Counters of all disks.
    Top {
        /// One for each disk.
        rows: Vec<TopRow>,
        /// Counters of the supervisor; an older one does not send them.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        counted: Option<Counted>,
        /// The groups of disks that share limits.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        groups: Vec<Group>,
    },
}

/// A disk that was handed from one process to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandedOff {
    /// Its node.
    pub minor: u32,
    /// The process that served it; nothing if that ended on the way.
    pub from: Option<u32>,
    /// The process that serves it.
    pub to: u32,
    /// Program of that process.
    pub program: PathBuf,
    /// Version that the process reports.
    pub version: String,
    /// Microseconds without a process, in which the guest's requests waited.
    pub pause_us: u64,
}

/// A disk that switched to a new image. Its content of that moment is in the image that it had, which must not change
/// from then on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its node.
    pub minor: u32,
    /// The new image. The configuration of the disk must name this one from now on.
    pub target: Target,
    /// Its backing image.
    pub parent: PathBuf,
    /// The supervisor has marked that image, so that no tap disk writes it: without write permission a file, by a record a
    /// device.
    pub marked: bool,
    /// Microseconds without a process, in which the guest's requests waited. Nothing if that is not known, because an
    /// earlier request did it, or an earlier supervisor had begun.
    pub pause_us: Option<u64>,
}

/// A disk that was copied to another image, and is served from that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovedDisk {
    /// The image that it had, which is not the disk any more.
    pub from: Target,
    /// The one that it has. The configuration of the disk must name this one from now on.
    pub to: Target,
    /// The supervisor has marked the old one, so that no tap disk writes it: without write permission a file, by a record a
    /// device.
    pub marked: bool,
    /// Microseconds without a process, in which the guest's requests waited. Nothing if that is not known.
    pub pause_us: Option<u64>,
}

impl MovedDisk {
    /// Returns the meaning, in words.
    pub fn told(&self) -> String {
        let Self {
            from, to, marked, ..
        } = self;
        let mark = if *marked { "is" } else { "could NOT be" };
        format!(
            "now served from {to}, which its configuration must name; {from} keeps the former content, and {mark} marked, so that no tap disk writes it"
        )
    }
}

/// Program of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessBinary {
    /// The file. If it was replaced or removed since, this is where it was.
    pub path: PathBuf,
    /// Another file, or none, has that name by now.
    pub replaced: bool,
    /// Version of the process, once it has reported it.
    pub version: Option<String>,
}

/// A disk in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Its node; a process that was only spawned has none.
    pub minor: Option<u32>,
    /// Its process, if there is one.
    pub pid: Option<u32>,
    /// State that the process reports; nothing if there is none.
    pub state: Option<State>,
    /// State that the kernel reports.
    pub kernel: Option<Kernel>,
    /// Target that is served.
    pub target: Option<Target>,
    /// Sharing mode.
    pub mode: Option<Mode>,
    /// The backend's directory in xenstore.
    pub vbd: Option<String>,
    /// Properties of the disk.
    pub disk: Option<Disk>,
    /// How often its process was replaced.
    pub restarts: u32,
    /// Command that has begun and is not finished.
    #[serde(default)]
    pub doing: Option<PendingOperation>,
    /// Reason why the supervisor ignores the disk, if it does.
    #[serde(default)]
    pub unknown: Option<String>,
    /// Error of the image that stopped the disk, which is paused until an administrator resumes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
    /// Size in bytes of the state that processes of the disk pass on to each other.
    #[serde(default)]
    pub state_bytes: u64,
    /// Program of its process.
    #[serde(default)]
    pub binary: Option<ProcessBinary>,
}

/// The kernel's information about a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Kernel {
    /// `idle`, `open`, `live`, `fencing` or `recovering`.
    pub state: String,
    /// Requests that wait to be delivered.
    pub waiting: u32,
    /// Requests that are delivered and not committed.
    pub delivered: u32,
    /// Requests committed since the disk was made.
    pub committed: u64,
    /// Requests delivered again that a process had when it went.
    pub replayed: u64,
    /// Completions that were refused.
    pub refused: u64,
    /// Nanoseconds since the oldest delivered request was delivered; 0 if there is none.
    pub oldest_ns: u64,
    /// Requests that are delivered one at a time, because processes died with them.
    pub isolated: u32,
    /// Requests that failed because processes died of them.
    pub poisoned: u32,
    /// The last request that failed for that reason.
    pub poison: Option<Poison>,
    /// Flushes that the kernel has executed without the process, and that failed.
    #[serde(default)]
    pub failed_flushes: u32,
    /// Memory of the kernel that the disk holds, in KiB.
    pub memory_kib: u32,
    /// Block devices that the kernel may use without the process.
    pub backings: u32,
    /// Requests that the kernel has executed by passthrough since the disk was made.
    pub direct: u64,
    /// Requests that the kernel is executing by passthrough.
    pub executing: u32,
    /// How its mappings serve the disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mapped: Option<Mapped>,
}

impl Kernel {
    /// Returns the counters of passthrough, if the kernel has a file.
    pub fn by_itself(&self) -> Option<Direct> {
        (self.backings > 0).then_some(Direct {
            executed: self.direct,
            executing: self.executing,
            mapped: self.mapped,
        })
    }
}

/// A request that failed because processes died of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Poison {
    /// `read`, `write`, `flush`, `discard` or `write-zeroes`.
    pub operation: String,
    /// First sector of 512 bytes.
    pub sector: u64,
    /// Number of sectors.
    pub sectors: u64,
}

impl fmt::Display for Poison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            operation,
            sector,
            sectors,
        } = self;
        write!(f, "{operation} of {sectors} sectors at sector {sector}")
    }
}

/// A disk in the display of all of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopRow {
    /// The disk.
    pub row: Row,
    /// Counters of the disk; nothing if its process did not answer.
    pub stats: Option<Box<Stats>>,
    /// Bytes of its process that are in memory, without the arena.
    pub resident: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::Mode;

    #[test]
    fn modes_are_those_of_the_toolstack() {
        for (text, mode, shown) in [
            ("r", Mode::Read, "r"),
            ("ro", Mode::Read, "r"),
            ("w", Mode::Write, "w"),
            ("rw", Mode::Write, "w"),
            ("w!", Mode::WriteShared, "w!"),
            ("rw!", Mode::WriteShared, "w!"),
            ("r!", Mode::ReadShared, "r!"),
        ] {
            assert_eq!(text.parse::<Mode>().unwrap(), mode, "{text}");
            assert_eq!(mode.to_string(), shown);
        }
        for text in ["", "!", "x", "w!!", "rwx", "W"] {
            let error = text.parse::<Mode>().unwrap_err();
            assert!(error.message.contains("use r, w, r! or w!"), "{error}");
        }
    }
}
