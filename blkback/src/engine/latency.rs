// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! How long each I/O took, and what was before and after it, as histograms, while somebody wants to know:
//! [`Times`](crate::engine::Times) has the sums at any time.

use crate::engine::backend::IoKind;
use crate::engine::spans::Spans;

/// Operations that are told apart, in the order of their histograms: reads, writes, flushes with what flushes, discards.
pub const OPERATIONS: usize = 4;
/// What a request goes through beside its I/O. Their histograms are behind those of the operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// In the ring, until it is taken; at most so long.
    Ring,
    /// From there until the backend gets it: it waits for pages, and its data is brought in.
    Pages,
    /// From when it is found to be complete until the guest is shown the answer: its data is brought out.
    Answer,
}

/// All histograms.
pub const ROWS: usize = OPERATIONS + 3;
/// Steps of a histogram. Each one after the first has what took less than twice as long, and the last one all else.
pub const STEPS: usize = 24;
/// The first one has what took less than this.
pub const FIRST_STEP_NS: u64 = 1024;

/// Counts by the time that something took, of each operation and each span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Latencies {
    counts: [[u64; STEPS]; ROWS],
    on: bool,
    pub(super) spans: Spans,
}

impl Latencies {
    /// Nothing is counted until it is asked for.
    pub const OFF: Self = Self {
        counts: [[0; STEPS]; ROWS],
        on: false,
        spans: Spans::NONE,
    };

    /// The counts, in the order of the operations, then of the spans.
    pub fn counts(&self) -> &[[u64; STEPS]; ROWS] {
        &self.counts
    }

    /// Whether it is counted at present.
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// Counts from now on, or no more; what was counted stays.
    pub fn switch(&mut self, on: bool) {
        self.on = on;
    }

    pub(super) fn add(&mut self, kind: IoKind, ns: u64) {
        let operation = match kind {
            IoKind::Read => 0,
            IoKind::Write => 1,
            IoKind::Flush | IoKind::PreFlushWrite | IoKind::BarrierWrite => 2,
            IoKind::Discard { .. } => 3,
        };
        self.count(operation, ns, 1);
    }

    /// So many requests were there for so long.
    pub(super) fn add_span(&mut self, span: Span, ns: u64, requests: u32) {
        let row = match span {
            Span::Ring => OPERATIONS,
            Span::Pages => OPERATIONS + 1,
            Span::Answer => OPERATIONS + 2,
        };
        self.count(row, ns, requests);
    }

    fn count(&mut self, row: usize, ns: u64, many: u32) {
        let counts = self.counts.get_mut(row);
        if let Some(count) = counts.and_then(|counts| counts.get_mut(step(ns))) {
            *count = count.wrapping_add(many.into());
        }
    }
}

/// The step of a histogram that counts what took so many nanoseconds.
fn step(ns: u64) -> usize {
    let steps = u64::BITS.wrapping_sub((ns / FIRST_STEP_NS).leading_zeros());
    // CAST: at most 64.
    (steps as usize).min(STEPS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_is_twice_as_long() {
        assert_eq!((step(0), step(1023)), (0, 0));
        assert_eq!((step(1024), step(2047)), (1, 1));
        assert_eq!((step(2048), step(4095)), (2, 2));
        assert_eq!((step(1 << 31), step(u64::MAX)), (22, STEPS - 1));
    }

    #[test]
    fn operations_are_counted_apart() {
        let mut latencies = Latencies::OFF;
        let kinds = [
            IoKind::Read,
            IoKind::Write,
            IoKind::Flush,
            IoKind::BarrierWrite,
        ];
        for kind in kinds {
            latencies.add(kind, 5000);
        }
        let sums = latencies.counts().map(|counts| counts[3]);
        assert_eq!(sums, [1, 1, 2, 0, 0, 0, 0]);
        latencies.add_span(Span::Answer, 5000, 7);
        assert_eq!(latencies.counts()[ROWS - 1][3], 7);
    }
}
