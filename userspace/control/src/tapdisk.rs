// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests of blktapctrl to a tapdisk, which serves one disk.
//!
//! The order is: [`Request::Attach`], [`Request::Open`]; then, any number of times,
//! [`Request::Pause`] and [`Request::Unpause`]; at the end [`Request::Close`] and
//! [`Request::Exit`]. A tapdisk that dies is replaced by another one that is attached and opened in
//! the same way.
//!
//! A guest that moves has a disk on either side, of which one at a time may use the image. The one that may not is
//! *inactive*: [`Request::Inactivate`] makes it so, or [`Request::OpenInactive`] when it begins. It has the node and no
//! part of the image, and reports ([`Request::Wanted`]) when it gets a request; [`Request::Activate`] is the way back.

use crate::stats::{Stats, Stream};
use crate::{Changed, Driver, Failure, Limits, Mark, RateShare, ShareUsage, Target, TlsFile};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How I/O on an image is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// `io_uring`, and Linux AIO where that is not allowed.
    #[default]
    Auto,
    /// `io_uring`; refused where that is not allowed.
    Uring,
    /// Linux AIO.
    Aio,
    /// One system call after the other.
    Sync,
}

/// The image to serve, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// Driver and image. The path is for messages: the image is the descriptor that comes along.
    pub target: Target,
    /// Guests may not write.
    #[serde(default)]
    pub read_only: bool,
    /// How I/O is done.
    #[serde(default)]
    pub engine: Engine,
    /// Guests may discard, which makes holes in the image.
    #[serde(default = "yes")]
    pub discard: bool,
    /// Take no lock on the image: for a disk that several hosts write by agreement (mode `w!`).
    #[serde(default)]
    pub shared: bool,
    /// The image may be smaller than the disk that the guest knows.
    #[serde(default)]
    pub may_shrink: bool,
    /// The kernel has the image and has it locked, whatever becomes of processes: the process locks no more
    /// than what says when its own I/O is over.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub kernel_holds: bool,
    /// Other hosts or disks write the image at the same time: the guest may not write less than the storage's own unit,
    /// because the rest of that would be overwritten with old data.
    #[serde(default)]
    pub whole_blocks: bool,
    /// Action when the image has no room for a write.
    #[serde(default)]
    pub on_no_space: OnError,
    /// Action when I/O on the image fails for another reason.
    #[serde(default)]
    pub on_error: OnError,
    /// Format of a parent whose child does not name it, as images of some formats cannot: a driver with an image.
    /// Without this such an image is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parents: Option<Driver>,
    /// How much the guest may do.
    #[serde(default, skip_serializing_if = "Limits::is_default")]
    pub limits: Limits,
    /// Its share of the group's limits, if it is in one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<RateShare>,
    /// The caller answers [`Request::Needs`] too, so the process may request files that it finds necessary while it
    /// opens the image.
    #[serde(default)]
    pub may_ask: bool,
    /// Bytes for each bit of the map of the guest's writes ([`RequestedFile::Notes`]); nothing without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notes: Option<u64>,
    /// The process records the guest's requests in [`RequestedFile::Trace`]. A process that does not get that serves all the
    /// same.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub trace: bool,
}

/// Action on a request that failed on the image. The process reports it to the supervisor in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// The guest gets the error.
    #[default]
    Report,
    /// The request goes back to the kernel, and nothing is served until the disk was paused and unpaused: the guest
    /// waits. But the guest gets the error if something that was answered before may be lost: of a flush that failed,
    /// and of a durable (FUA) write unless it had no room.
    Stop,
}

/// Rules that can change while a disk is served, see [`Open`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    /// As [`Open::on_no_space`].
    pub on_no_space: OnError,
    /// As [`Open::on_error`].
    pub on_error: OnError,
    /// As [`Open::limits`].
    pub limits: Limits,
    /// As [`Open::share`]. Nothing takes the disk out of its group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<RateShare>,
}

fn yes() -> bool {
    true
}

impl Open {
    /// Serves `target` with everything else as it is by default.
    pub fn new(target: Target) -> Self {
        Self {
            target,
            read_only: false,
            engine: Engine::Auto,
            discard: true,
            shared: false,
            may_shrink: false,
            kernel_holds: false,
            whole_blocks: false,
            on_no_space: OnError::Report,
            on_error: OnError::Report,
            parents: None,
            limits: Limits::default(),
            share: None,
            may_ask: false,
            notes: None,
            trace: false,
        }
    }
}

/// A question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Request {
    /// Who is there? Answered with [`Reply::Process`].
    Ping,
    /// Takes the disk's node. One descriptor: the node, opened for reading and writing, and closed
    /// by the sender afterwards. Answered with [`Reply::Node`].
    Attach,
    /// Opens the image, describes the disk and starts to serve it; requests of an earlier process
    /// come first. One descriptor if [`Driver::has_image`](crate::Driver::has_image): the image,
    /// with `O_DIRECT` (but for the driver `sync`), and read-only if the disk is. For the driver `ram`
    /// it is a file in memory of the disk's size, which is there for the next process too. Answered
    /// with [`Reply::Disk`].
    Open(Open),
    /// Finishes and commits what has been fetched, fetches no more, and closes the image; requests
    /// wait in the kernel. Answered with [`Reply::Done`] when the image is closed.
    Pause,
    /// Serves again, from the image that is given; the size may have changed, little else. The
    /// descriptor is as for [`Request::Open`]. Answered with [`Reply::Disk`].
    Unpause(Open),
    /// As [`Request::Pause`], of a guest that is suspended: what waits in the kernel is served first, so that nothing
    /// is left which the image would have to be there for. Answered with [`Reply::Inactive`]; refused, and nothing has
    /// changed, if the guest continues to send requests.
    Inactivate,
    /// Opens an image as [`Request::Open`], but only reads its size, because another host may be using it: nothing is
    /// locked, nothing of it is kept, and requests wait. The disk is inactive then. Answered with [`Reply::Disk`].
    OpenInactive(Open),
    /// Serves an inactive disk: the image is locked, and only then read. The descriptor is as for
    /// [`Request::Open`]. Answered with [`Reply::Disk`].
    Activate {
        /// The image to serve, and how.
        open: Open,
        /// State of the image when the disk became inactive: it must not have changed since.
        #[serde(default)]
        stamp: Option<ImageStamp>,
    },
    /// Waits until the disk is inactive and gets a request. Answered with [`Reply::Done`]. On a connection of its own:
    /// others are answered meanwhile.
    Wanted,
    /// From now on this is done with requests that fail, and with those that are too many. Answered with
    /// [`Reply::Done`].
    Set(Rules),
    /// From now on this is what the disk may do of what its group may. Of a disk in a group. Answered with
    /// [`Reply::Used`] at once, whatever else is being done.
    Share(RateShare),
    /// Waits until more requests have come than these, as [`ShareUsage::came`] counts them. Answered with [`Reply::Done`]. On
    /// a connection of its own: others are answered meanwhile.
    Busy {
        /// Requests that are known.
        came: u64,
    },
    /// Starts to record writes in the attached map, including those that are under way. Answered with [`Reply::Done`].
    /// One descriptor, like that of an answer to [`RequestedFile::Notes`], if there is a map.
    Note {
        /// As [`Open::notes`].
        unit: Option<u64>,
    },
    /// A mark is gone: what the process knows of marks it has to ask for again. Answered with [`Reply::Done`] at once.
    Unmarked,
    /// Starts or ends the recording of the guest's requests in the attached trace file. Requests that are under way are
    /// finished first. Answered with [`Reply::Done`]. One descriptor, like that of an answer to [`RequestedFile::Trace`], if
    /// there is a trace.
    Trace {
        /// As [`Open::trace`].
        on: bool,
    },
    /// Waits until a trace has ended without a request, and reports it until the next [`Request::Trace`]. Answered with
    /// [`Reply::Untraced`]. On a connection of its own: others are answered meanwhile.
    Untraced,
    /// Looks at the image's size again and tells the guest. Answered with [`Reply::Disk`].
    Resize,
    /// Makes the image larger, and tells the guest; requests wait meanwhile. Answered with
    /// [`Reply::Disk`].
    Grow {
        /// Bytes of the disk: whole blocks, and no fewer than it has.
        size: u64,
    },
    /// Reads all data of the disk, to find unreadable parts: [`Reply::Troubles`] reports them, and [`Reply::Stats`] the
    /// progress. Answered with [`Reply::Done`] at once. A scrub that runs continues with the new rate.
    Scrub {
        /// Bytes in a second at most; 0 to end it.
        rate: u64,
    },
    /// Copies into the image what it shows of those below it, and then forgets them: it needs them no more.
    /// Answered with [`Reply::Stream`] at once: who wants to know how it ends asks again, which begins one only
    /// where none runs and there is something to copy.
    Stream {
        /// Bytes in a second at most; 0 to end it.
        rate: u64,
        /// A stream that has failed begins once more; else the failure is reported again.
        #[serde(default)]
        anew: bool,
    },
    /// Copies the disk to another image, and repeats the guest's writes there. After a pause both images are equal, if
    /// they were before: [`Reply::Stats`] shows that. Answered with [`Reply::Done`] when it has begun. The descriptor
    /// is as for [`Request::Open`].
    Mirror {
        /// The other image. It needs no others.
        open: Open,
        /// Bytes in a second at most.
        rate: u64,
        /// The image is the backing image, and the blocks that it shows need no copy. The process has the further files
        /// of that image already, and requests them once more.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        below: bool,
    },
    /// Could an image be opened, asks who is about to let another process go for this one. The descriptor is as for
    /// [`Request::Open`], and another process serves the image: this one locks, changes and keeps nothing of it.
    /// Without a node. Answered with [`Reply::Fit`].
    Prepare(Open),
    /// Makes an image with the served one as its backing image, for the disk to be served from after a pause. One
    /// descriptor: the new image, an empty file that is open for writing. Answered with [`Reply::Done`] when it is
    /// durable.
    Overlay {
        /// Format of the new image, and its path.
        target: Target,
    },
    /// As [`Request::Pause`], and gives the node back as well: another process may take it.
    Close,
    /// Time until which the process may do I/O on its image: the kernel kills it then, unless a later time arrives
    /// before. Answered with [`Reply::Done`], whatever else it is doing.
    Term {
        /// The time since the host was booted, that of suspends included; nothing for ever.
        until: Option<Duration>,
    },
    /// What is served? Answered with [`Reply::Status`].
    Status,
    /// Answered with [`Reply::Stats`].
    Stats,
    /// Waits until I/O on the image has failed more often than `after` says, since the process was
    /// started; without a number, it does not wait. Answered with [`Reply::Troubles`]. On a connection
    /// of its own: others are answered meanwhile.
    Troubles {
        /// How often is known.
        after: Option<u64>,
    },
    /// Waits until the process needs something that it cannot open itself, with a higher number than
    /// `after`. Answered with [`Reply::Needs`]. On a connection of its own: others are answered
    /// meanwhile, and what needs it may be a question that has not been answered yet.
    Needs {
        /// Number of the last known need. 0 for none.
        after: u64,
    },
    /// The answer to a need: one descriptor, unless [`FdGrant`] says otherwise. Answered with [`Reply::Done`], also
    /// when the process waits for it no more.
    Provide {
        /// Number of the need.
        number: u64,
        /// The supervisor's decision.
        provided: FdGrant,
        /// The number by which the kernel knows a file below the image, and no other one of this disk.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        backing: Option<u16>,
    },
    /// Serves NBD clients too. One descriptor: a listening unix socket. Answered with
    /// [`Reply::Done`]. Once for each process.
    Nbd {
        /// Name of the export.
        export: String,
    },
    /// As [`Request::Close`], and ends the process after the answer ([`Reply::Done`]).
    Exit,
}

/// State of a tapdisk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// The process has no node.
    Idle,
    /// The process has a node and serves nothing yet.
    Attached,
    /// The process serves the disk.
    Running,
    /// The process has a node and an image that was closed; requests wait.
    Paused,
    /// The process is inactive, and reports when a request waits.
    Inactive,
}

/// How an image was left. Every change of a file changes it; for a block device it has only the size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStamp {
    /// Bytes of the file, 0 of a device.
    pub size: u64,
    /// Time of the last change, in seconds.
    pub modified_s: i64,
    /// The rest of that in nanoseconds.
    pub modified_ns: u64,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub enum Reply {
    /// The process did that.
    Done,
    /// The process.
    Process(Process),
    /// The node.
    Node(Node),
    /// The disk.
    Disk(Disk),
    /// The image can be opened.
    Fit {
        /// Bytes of the disk, if the process can find them while another one serves it.
        size: Option<u64>,
    },
    /// The disk is inactive.
    Inactive {
        /// State of the image; nothing if the system does not show it.
        stamp: Option<ImageStamp>,
    },
    /// Status of the process and its disk.
    Status(Box<Status>),
    /// Counters.
    Stats(Box<Stats>),
    /// Use of the shares of a group.
    Used(ShareUsage),
    /// A trace has ended without a request.
    Untraced {
        /// Reason of the refusal.
        why: String,
    },
    /// How far a stream is.
    Stream(Stream),
    /// Failures.
    Troubles(IoErrorReport),
    /// Needs that the supervisor has not answered yet.
    Needs {
        /// The needs, the oldest first.
        needs: Vec<FdRequest>,
    },
}

/// A request of a process to its supervisor, which decides. The process repeats the request for a file that is gone,
/// such as a socket whose server has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdRequest {
    /// Names it in the answer; chosen by the process, from 1 on.
    pub number: u64,
    /// Kind of the file.
    pub what: RequestedFile,
}

/// A file or an answer that a process may request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum RequestedFile {
    /// The backing image of the one that is served: for reading.
    Parent {
        /// Its absolute path.
        path: PathBuf,
    },
    /// A file that holds a part of the image, open like the image itself.
    Extent {
        /// Its absolute path.
        path: PathBuf,
    },
    /// A connection to a unix socket where a server listens.
    Socket {
        /// Its absolute path.
        path: PathBuf,
    },
    /// A connection to the server of the [export](Target::export) that is served, or is to be.
    Server {
        /// Target of that image.
        target: Target,
    },
    /// A file of the [encryption](Target::tls) of a connection to that server, for reading. The process requests it for
    /// each connection, so that a renewed file is used from the next one on.
    Credential {
        /// Target that is served, or is about to be.
        target: Target,
        /// Which of the files.
        file: TlsFile,
    },
    /// The file with the [key](Target::key) of an image, for reading. The process requests it for each opening.
    Key {
        /// Target that is served, or is about to be.
        target: Target,
    },
    /// Memory that outlives the process: zeroes at first, then the content that the disk's last process left. Its size
    /// never changes. A process that gets no answer for a while works without it; one that does not understand the
    /// content takes it for zeroes.
    State {
        /// Bytes.
        size: u64,
    },
    /// Memory with a bit for each [unit](Open::notes) of the disk. One that is set says that there may be something
    /// else than was there when the memory was made.
    Notes,
    /// The marks of the disk, for NBD clients.
    Marks,
    /// The parts of the disk that have changed since a mark, from a place on, for an NBD client that asks for that.
    Changed {
        /// Number of the mark.
        mark: u64,
        /// Bytes of the disk.
        size: u64,
        /// Where to begin, in bytes.
        from: u64,
    },
    /// The file of a trace, open for reading and writing, as the process before has left it.
    Trace,
    /// Something of a newer program, which is refused.
    #[serde(other)]
    Other,
}

impl RequestedFile {
    /// The path, if it has one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Parent { path } | Self::Extent { path } | Self::Socket { path } => Some(path),
            Self::Server { .. }
            | Self::Credential { .. }
            | Self::Key { .. }
            | Self::State { .. }
            | Self::Notes
            | Self::Marks
            | Self::Changed { .. }
            | Self::Trace
            | Self::Other => None,
        }
    }
}

/// The supervisor's decision about a need.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FdGrant {
    /// The file comes along, and the process has to lock it, as it locks the image.
    Locked,
    /// The file comes with this and is not to be locked, because it is a device or shared.
    Shared,
    /// The answer to [`RequestedFile::Marks`]. Nothing comes along.
    Marks(Vec<Mark>),
    /// The answer to [`RequestedFile::Changed`]. Nothing comes along.
    Changed(Changed),
    /// The supervisor refuses the file.
    Refused(Failure),
}

/// I/O on the image that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoErrorReport {
    /// How often, since the process was started.
    pub count: u64,
    /// The one for which the disk stopped, or else the latest.
    pub last: Option<Trouble>,
    /// Nothing is served until the disk was paused and unpaused.
    pub is_stopped: bool,
}

/// A call on an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Call {
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// A flush.
    Flush,
    /// Forgetting.
    Discard,
    /// Writing zeroes without data.
    Zeroes,
    /// Something of a newer program.
    #[serde(other)]
    Other,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::Zeroes => "zeroing",
            Self::Other => "something",
        })
    }
}

/// A request that failed on the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// The failed call.
    pub what: Call,
    /// Where on the disk, in bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Number of the error, as the system has it.
    pub errno: i32,
}

/// A process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Version of the program.
    pub program: String,
    /// Version of the kernel's interface that it was made for.
    pub abi: u32,
    /// The process records writes in a map, if [`Open::notes`] asks for that. An older one does not know of that.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub notes: bool,
    /// The process tells NBD clients of marks, and hears of those that are [gone](Request::Unmarked). An older one does
    /// neither.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub marks: bool,
    /// The process records the guest's requests if [`Open::trace`] says so. An older one does not know of that.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub traces: bool,
    /// The process knows [shares](Open::share). An older one has no limit.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shares: bool,
}

/// A node, as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Number of the node.
    pub minor: u32,
    /// Requests that it can hand out at once.
    pub tags: u32,
    /// Bytes of its arena.
    pub arena: u64,
    /// How often it was opened.
    pub epoch: u64,
}

/// A disk that is open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Size in bytes.
    pub size: u64,
    /// Bytes of a logical block.
    pub logical_block: u32,
    /// Bytes of a physical block.
    pub physical_block: u32,
    /// Guests may not write.
    pub read_only: bool,
    /// Guests may discard.
    pub discard: bool,
    /// How I/O is done; never [`Engine::Auto`].
    pub engine: Engine,
}

/// Status of the process and its disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The state.
    pub state: State,
    /// The node, unless idle.
    pub node: Option<Node>,
    /// The image that is served, and how, unless idle or attached.
    pub open: Option<Open>,
    /// The disk, if it runs or is inactive.
    pub disk: Option<Disk>,
    /// Something that was answered could not be made durable, and the guest learns of it with its next flush: from
    /// this process, so that no other one may take its place before.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub owes: bool,
}
