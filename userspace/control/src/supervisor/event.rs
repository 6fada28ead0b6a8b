// SPDX-License-Identifier: MIT OR Apache-2.0
//! Events of disks, for listeners.

use super::{HandedOff, MovedDisk, Poison, Snapshot};
use crate::stats::{Mirroring, Streaming};
use crate::tapdisk::Trouble;
use crate::Target;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Numbers events without a gap, from 1. The next supervisor continues the numbers.
    pub number: u64,
    /// Random number of this row of event numbers; a new one when they begin anew, as after a boot. 0 of a supervisor
    /// whose numbers end with it.
    #[serde(default)]
    pub series: u32,
    /// Milliseconds since 1970.
    pub at_ms: u64,
    /// The disk.
    pub minor: Option<u32>,
    /// Number of the guest that had the disk at that moment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<u32>,
    /// Name of that guest, if the supervisor knew it by then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_name: Option<String>,
    /// Name of the disk in that guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vdev: Option<String>,
    /// Kind of the event, with its details.
    pub what: What,
}

/// Kind of an event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum What {
    /// A disk was made.
    Created {
        /// Target that it serves.
        target: Option<Target>,
    },
    /// A process serves.
    Started {
        /// The process.
        pid: u32,
    },
    /// A process ended unexpectedly.
    Died {
        /// The process.
        pid: u32,
        /// How it ended, in words.
        how: String,
    },
    /// A process has had a request for too long.
    Hung {
        /// The process.
        pid: u32,
        /// Milliseconds since the oldest request was delivered.
        for_ms: u64,
        /// The supervisor killed the process for that.
        killed: bool,
    },
    /// Processes died of a request again and again: the guest got an error for it.
    Poisoned {
        /// The request; the last one, if there are several.
        request: Option<Poison>,
        /// How many requests of the disk failed so far for this reason.
        count: u32,
    },
    /// I/O on the image failed.
    Trouble {
        /// The last failure, or the reason for the stop of the disk.
        trouble: Trouble,
        /// Target that is served.
        target: Option<Target>,
        /// The error in words.
        error: String,
        /// Number of other failures since the last event of this kind.
        more: u64,
        /// The request is kept and the disk paused, so that the guest waits until it is unpaused.
        stopped: bool,
    },
    /// A process could not be replaced; the next attempt follows.
    Failed {
        /// Reason of the failure.
        message: String,
        /// Milliseconds until the next attempt.
        retry_ms: u64,
    },
    /// A command handed the disk to another process.
    HandedOff(HandedOff),
    /// A new process could not take the disk over, so the former one keeps serving.
    Kept {
        /// The process that serves, if it lives.
        pid: Option<u32>,
        /// Reason why the new process does not serve.
        why: String,
    },
    /// A disk switched to a new image.
    Snapshot(Snapshot),
    /// A snapshot failed, so the disk keeps its image.
    SnapshotUndone {
        /// Reason of the failure.
        why: String,
    },
    /// A stream of the backing chain into the disk's image has ended.
    Streamed {
        /// The image.
        target: Target,
        /// Result of the stream.
        outcome: Streaming,
    },
    /// A disk was copied to another image, and is served from that.
    Moved(MovedDisk),
    /// A copy of a disk to another image ended before the disk switched to that image.
    Mirrored {
        /// The image, which is of no use.
        target: Target,
        /// Result of the mirror.
        outcome: Mirroring,
    },
    /// The dirty bitmaps of a disk are lost, so the next backup has to be a full one.
    Unmarked {
        /// Reason of the loss.
        why: String,
    },
    /// A trace of the guest's requests ended without a user's request.
    Untraced {
        /// The file, which has the requests until then.
        path: PathBuf,
        /// Reason of the end.
        why: String,
    },
    /// A disk was paused.
    Paused,
    /// A disk resumed.
    Unpaused,
    /// The guest is suspended, and the image is free.
    Inactive,
    /// An inactive disk got a request, and has its image.
    Active,
    /// An inactive disk got a request, and does not get its image: the guest waits.
    Held {
        /// Reason, and what to do.
        why: String,
    },
    /// The size changed.
    Resized {
        /// Bytes.
        size: u64,
    },
    /// A part of the disk's state is unreadable, so the supervisor ignores the disk.
    Unknown {
        /// Description of the problem, and the remedy.
        why: String,
    },
    /// A process requested a file that it may not have.
    Refused {
        /// Description of the problem, its reason, and the remedy.
        why: String,
    },
    /// The disk has no passthrough: the kernel passes all requests to the process.
    NotDirect {
        /// Reason of the problem.
        why: String,
    },
    /// A process connects to a server once more.
    Reconnected {
        /// The server's socket.
        path: PathBuf,
    },
    /// The disk is gone.
    Destroyed,
    /// A supervisor has begun.
    Began {
        /// Its version.
        version: String,
        /// Its process.
        pid: u32,
    },
    /// Events that the subscriber has not received are no longer stored.
    Lost {
        /// Number of these events.
        count: u64,
    },
    /// The last known event of the subscriber is of another series: the numbers have begun anew, and earlier events are
    /// unknown.
    Renumbered,
    /// An event of a newer program.
    #[serde(other)]
    Other,
}

/// Counters of a supervisor since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counted {
    /// Events that a subscriber did not get, because they were not kept for so long.
    pub events_lost: u64,
    /// Traces of disks that have ended by themselves ([`What::Untraced`]).
    pub traces_failed: u64,
    /// Lines of the log that were left out, because there were too many or its reader did not take them.
    pub lines_suppressed: u64,
}
