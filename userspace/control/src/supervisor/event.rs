// SPDX-License-Identifier: MIT OR Apache-2.0
//! What happened to disks, for who listens.

use super::{HandedOff, Moved, Poison, Snapshot};
use crate::stats::{Mirroring, Streaming};
use crate::tapdisk::Trouble;
use crate::Target;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Numbers events without a gap, from 1. The next supervisor goes on with the numbers.
    pub number: u64,
    /// Which numbers these are: a random one, another one when they begin anew, as after a boot. 0 of a supervisor whose
    /// numbers end with it.
    #[serde(default)]
    pub series: u32,
    /// Milliseconds since 1970.
    pub at_ms: u64,
    /// The disk.
    pub minor: Option<u32>,
    /// What.
    pub what: What,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum What {
    /// A disk was made.
    Created {
        /// What it serves.
        target: Option<Target>,
    },
    /// A process serves.
    Started {
        /// The process.
        pid: u32,
    },
    /// A process ended that should not have.
    Died {
        /// The process.
        pid: u32,
        /// How, in words.
        how: String,
    },
    /// A process has had a request for too long.
    Hung {
        /// The process.
        pid: u32,
        /// Milliseconds since the oldest request was delivered.
        for_ms: u64,
        /// It was killed for it.
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
        /// What failed last, or what the disk was stopped for.
        trouble: Trouble,
        /// What is served.
        target: Option<Target>,
        /// The error in words.
        error: String,
        /// So many others failed since the last event of this kind.
        more: u64,
        /// The request is kept and the disk paused, so that the guest waits until it is unpaused.
        stopped: bool,
    },
    /// A process could not be replaced; the next attempt follows.
    Failed {
        /// Why.
        message: String,
        /// Milliseconds until the next attempt.
        retry_ms: u64,
    },
    /// Another process serves, by our wish.
    HandedOff(HandedOff),
    /// A new process could not take a disk over: the one that had it serves on.
    Kept {
        /// The process that serves, if it lives.
        pid: Option<u32>,
        /// Why the new one does not.
        why: String,
    },
    /// A disk goes on in a new image.
    Snapshot(Snapshot),
    /// A disk could not: it is served from the image that it had.
    SnapshotUndone {
        /// Why.
        why: String,
    },
    /// The image of a disk was to take over what is below it, and that is over.
    Streamed {
        /// The image.
        target: Target,
        /// What has become of it.
        outcome: Streaming,
    },
    /// A disk was copied to another image, and is served from that.
    Moved(Moved),
    /// A disk was to be copied to another image, and that has ended before.
    Mirrored {
        /// The image, which is of no use.
        target: Target,
        /// What has become of it.
        outcome: Mirroring,
    },
    /// Where the guest has written since its marks is not known any more: they are gone.
    Unmarked {
        /// Why.
        why: String,
    },
    /// It is not written down any more what the guest asks for, and nobody has ended that.
    Untraced {
        /// The file, which has what was asked for until then.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// A disk was paused.
    Paused,
    /// A disk goes on.
    Unpaused,
    /// The guest is suspended, and the image is free.
    Inactive,
    /// Something was asked of an inactive disk, and it has its image.
    Active,
    /// The same, and it does not get it: the guest waits.
    Held {
        /// Why, and what to do.
        why: String,
    },
    /// The size changed.
    Resized {
        /// Bytes.
        size: u64,
    },
    /// Something of the disk is not understood, and left alone.
    Unknown {
        /// What, and what to do.
        why: String,
    },
    /// A process asked for something that it may not have.
    Refused {
        /// What, why, and what to do.
        why: String,
    },
    /// The kernel does not serve the disk by itself: its process does all.
    NotDirect {
        /// Why.
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
    /// Events are not kept any more that a subscriber does not know.
    Lost {
        /// How many.
        count: u64,
    },
    /// What a subscriber knows is of another series: the numbers have begun anew, and it is not known what happened
    /// before.
    Renumbered,
    /// An event of a newer program.
    #[serde(other)]
    Other,
}

/// What a supervisor has counted since it began.
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
