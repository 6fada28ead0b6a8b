// SPDX-License-Identifier: MIT OR Apache-2.0
//! Counters of a tapdisk.

use crate::{Limits, Target};
use serde::{Deserialize, Serialize};

/// Number of classes of a [`Histogram`].
pub const CLASSES: usize = 32;

/// How long requests took: class `n` counts those of at least `2^n` and less than `2^(n+1)`
/// nanoseconds; the first class has also those of 0, the last one all that took longer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// Requests in each class.
    pub counts: [u64; CLASSES],
}

impl Histogram {
    /// Counts a request that took `ns` nanoseconds.
    pub fn add(&mut self, ns: u64) {
        let class = (ns.max(1).ilog2() as usize).min(CLASSES - 1);
        self.counts[class] += 1;
    }

    /// Requests counted.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Returns the counts since `before`; a counter that has begun anew since then gives 0.
    pub fn since(&self, before: &Self) -> Self {
        self.merged(before, u64::saturating_sub)
    }

    /// The requests of both.
    pub fn with(&self, other: &Self) -> Self {
        self.merged(other, u64::saturating_add)
    }

    fn merged(&self, other: &Self, merge: fn(u64, u64) -> u64) -> Self {
        Self {
            counts: std::array::from_fn(|class| merge(self.counts[class], other.counts[class])),
        }
    }

    /// A bound in nanoseconds that all but `share` (0 to 1) of the requests reached; 0 without any.
    pub fn above(&self, share: f64) -> u64 {
        self.below(share) / 2
    }

    /// A bound in nanoseconds that `share` (0 to 1) of the requests stayed below; 0 without any.
    pub fn below(&self, share: f64) -> u64 {
        let total = self.total();
        let mut seen = 0;
        for (class, count) in self.counts.iter().enumerate() {
            seen += count;
            if *count > 0 && seen as f64 >= share * total as f64 {
                return 2 << class;
            }
        }
        0
    }
}

/// Requests of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counter {
    /// Requests that are done, with or without an error.
    pub requests: u64,
    /// Bytes of those without an error.
    pub bytes: u64,
    /// Requests that ended in an error.
    pub errors: u64,
    /// From the arrival of the request in the kernel to its answer.
    pub latency: Histogram,
}

/// Progress of a scrub, which reads all data of a disk to find unreadable data.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scrub {
    /// The operation is not over.
    pub running: bool,
    /// Where on the disk it is, in bytes.
    pub offset: u64,
    /// Bytes that were read, or could not be; the others take no space.
    pub read: u64,
    /// Pieces that could not be read.
    pub errors: u64,
}

/// Progress of a stream, which copies the data of the backing images into the image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stream {
    /// State of the stream.
    pub state: Streaming,
    /// Where on the disk it is, in bytes.
    pub offset: u64,
    /// Bytes that were copied, by this process.
    pub copied: u64,
}

/// State of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Streaming {
    /// The operation is not over.
    #[default]
    Running,
    /// The image needs no backing image any more.
    Done,
    /// A user ended the stream, or the image is no longer served.
    Ended,
    /// The operation could not continue. The copied blocks stay allocated in the image.
    Failed {
        /// Reason of the failure.
        why: String,
    },
}

/// Progress of a mirror, which copies the disk to another image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mirror {
    /// State of the mirror.
    pub state: Mirroring,
    /// Number of bytes from the start of the disk that are equal on both.
    pub offset: u64,
    /// Bytes that were copied; the others hold no data, or are there already.
    pub copied: u64,
    /// The other image, where the supervisor says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Target>,
}

/// State of a mirror.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mirroring {
    /// The disk is being copied.
    #[default]
    Copying,
    /// Both images are equal, and each write goes to both.
    Same,
    /// Both images are equal and durable, and neither is in use; or the disk is served from the other one.
    Complete,
    /// The operation ended before that.
    Ended,
    /// The copy is not usable.
    Failed {
        /// Reason of the failure.
        why: String,
    },
}

impl Mirroring {
    /// Returns the meaning for an image to which a disk was to be copied, in words.
    pub fn told(&self, image: &Target) -> String {
        match self {
            Self::Complete => format!("the disk is served from {image}"),
            Self::Failed { why } => format!("the disk does not switch to {image}: {why}"),
            Self::Copying | Self::Same | Self::Ended => {
                format!("the disk does not switch to {image}: another image is served by now")
            }
        }
    }
}

impl Streaming {
    /// Returns the meaning for an image, in words.
    pub fn told(&self, image: &Target) -> String {
        match self {
            Self::Done => format!("{image} needs no backing image any more"),
            Self::Failed { why } => format!("{image} still needs its backing image: {why}"),
            Self::Running | Self::Ended => {
                format!("{image} still needs its backing image, because it is not served any more")
            }
        }
    }
}

/// Work of the kernel for a disk beside its process (passthrough).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Direct {
    /// Requests that the kernel has executed by passthrough since the disk was made.
    pub executed: u64,
    /// Requests that the kernel is executing by passthrough.
    pub executing: u32,
    /// Counters of the mappings that the process has reported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mapped: Option<Mapped>,
}

/// Counters of the mappings of a disk since it was made. A driver of an earlier version does not count that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mapped {
    /// Requests that the process got, by the reason.
    pub missed: Missed,
    /// Extents that there is room for now.
    pub room: u32,
    /// Mappings that were dropped because others needed their place.
    pub evicted: u64,
    /// Mappings that the process reported and the kernel did not take.
    pub refused: u64,
    /// Ranges that the process has taken back.
    pub recalled: u64,
}

/// Requests that the kernel left to the process, by the reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Missed {
    /// Requests whose beginning the kernel has no mapping for.
    pub unmapped: u64,
    /// Requests of which the kernel has no mapping for a later part.
    pub partial: u64,
    /// Writes to ranges that the kernel may only read.
    pub read_only: u64,
    /// Requests that are not whole blocks of the image's storage.
    pub unaligned: u64,
    /// Requests whose ranges are in too many pieces.
    pub pieces: u64,
    /// Requests whose ranges are in several files.
    pub backings: u64,
    /// Requests of a kind that only a process executes, or that have to be executed again.
    pub never: u64,
    /// Requests of a queue that was connected before the disk had a backing.
    pub queue: u64,
}

impl Missed {
    /// The numbers with the names of their reasons.
    pub fn by_reason(&self) -> [(&'static str, u64); 8] {
        [
            ("unmapped", self.unmapped),
            ("partial", self.partial),
            ("read-only", self.read_only),
            ("unaligned", self.unaligned),
            ("pieces", self.pieces),
            ("backings", self.backings),
            ("never", self.never),
            ("queue", self.queue),
        ]
    }
}

/// Everything a tapdisk counts. Unless a field differs, they count since the image was opened first: a new process
/// continues the counters of the last one, but for the last second before a death.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Stats {
    /// Version of the program that serves now.
    pub version: String,
    /// Reads.
    pub read: Counter,
    /// Writes.
    pub write: Counter,
    /// Flushes; a write with a flush before or after it counts as a write only.
    pub flush: Counter,
    /// Discards.
    pub discard: Counter,
    /// Writes of zeroes without data.
    pub zeroes: Counter,
    /// Requests that an earlier process may have executed already.
    pub replayed: u64,
    /// Requests that waited because of the disk's limits.
    pub held: u64,
    /// Nanoseconds that they waited, together.
    pub held_ns: u64,
    /// The limits, if there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    /// Traces of the guest's requests that ended because their file could not be extended.
    pub failed_traces: u64,
    /// Number of the error of which the guest learns with its next flush: something that was answered could not be made
    /// durable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owed: Option<i32>,
    /// Requests that are executed now.
    pub in_flight: u64,
    /// Turns of the loop that serves requests, of this process.
    pub turns: u64,
    /// Times this process slept because there was nothing to do.
    pub sleeps: u64,
    /// System calls of this process that moved requests and data, as far as they are counted.
    pub calls: u64,
    /// Requests of NBD clients.
    pub nbd: u64,
    /// The scrub that runs, or the last one.
    pub scrub: Option<Scrub>,
    /// The stream that runs, or the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<Stream>,
    /// The mirror that there is, or was last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<Mirror>,
    /// Counters of passthrough, if it is on: the process knows nothing of it, so the supervisor adds them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct: Option<Direct>,
    /// Facts that the driver adds, such as the number of its clusters: names and numbers.
    pub driver: std::collections::BTreeMap<String, u64>,
}

#[cfg(test)]
mod tests {
    use super::{Histogram, CLASSES};

    #[test]
    fn classes_are_powers_of_two() {
        let mut histogram = Histogram::default();
        for ns in [0, 1, 2, 3, 4, 1 << 31, u64::MAX] {
            histogram.add(ns);
        }
        assert_eq!(histogram.counts[..3], [2, 2, 1]);
        assert_eq!(histogram.counts[CLASSES - 1], 2);
        assert_eq!(histogram.total(), 7);
    }

    #[test]
    fn bound_of_a_share() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.below(0.5), 0);
        for ns in [1000, 1000, 1000, 1_000_000] {
            histogram.add(ns);
        }
        assert_eq!(histogram.below(0.5), 1024);
        assert_eq!(histogram.below(1.0), 1 << 20);
        assert_eq!(histogram.above(0.5), 512);
    }

    #[test]
    fn intervals_are_differences() {
        let mut before = Histogram::default();
        before.add(1 << 30);
        let mut now = before.clone();
        now.add(1000);
        assert_eq!(now.since(&before).below(1.0), 1024);
        assert_eq!(before.since(&now), Histogram::default());
        assert_eq!(now.since(&before).with(&before), now);
    }
}
