// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Histograms of the time that each I/O took, and of the spans before and after it, while counting is switched on:

use crate::engine::backend::IoKind;
use crate::engine::timing::spans::Spans;

/// Operations with a histogram each, in this order: reads, writes, flushes (also of writes with a flush), discards.
pub const OPERATIONS: usize = 4;
/// Spans of a request's life outside its I/O. Their histograms are behind those of the operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LatencySpan {
    /// In the ring, until it is taken; an upper bound, because the frontend does not say when it put the request there.
    Ring,
    /// From being taken until the backend gets it: it waits for pages, and its data is brought in.
    Pages,
    /// From when it is found to be complete until the guest is shown the answer: its data is brought out.
    Answer,
}

/// Number of histograms.
pub const ROWS: usize = OPERATIONS + 3;
/// Steps of a histogram. The upper bound of each step is twice that of the step before; the last step counts all longer
/// times too.
pub const STEPS: usize = 24;
/// Upper bound of the first step, in nanoseconds.
pub const FIRST_STEP_NS: u64 = 1024;

/// Counts by the time that something took, of each operation and each span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Latencies {
    counts: [[u64; STEPS]; ROWS],
    on: bool,
    pub(in crate::engine) spans: Spans,
}

impl Latencies {
    /// No counts, and counting is off.
    pub const OFF: Self = Self {
        counts: [[0; STEPS]; ROWS],
        on: false,
        spans: Spans::NONE,
    };

    /// Returns the counts, in the order of the operations, then of the spans.
    pub fn counts(&self) -> &[[u64; STEPS]; ROWS] {
        &self.counts
    }

    /// Reports whether counting is on.
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// Switches counting on or off; the counts stay.
    pub fn switch(&mut self, on: bool) {
        self.on = on;
    }

    pub(in crate::engine) fn add(&mut self, kind: IoKind, ns: u64) {
        let operation = match kind {
            IoKind::Read => 0,
            IoKind::Write => 1,
            IoKind::Flush | IoKind::PreFlushWrite | IoKind::BarrierWrite => 2,
            IoKind::Discard { .. } => 3,
        };
        self.count(operation, ns, 1);
    }

    /// Counts `requests` requests that each spent `ns` nanoseconds in a span.
    pub(in crate::engine) fn add_span(&mut self, span: LatencySpan, ns: u64, requests: u32) {
        let row = match span {
            LatencySpan::Ring => OPERATIONS,
            LatencySpan::Pages => OPERATIONS + 1,
            LatencySpan::Answer => OPERATIONS + 2,
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

/// Returns the step of a histogram for a time in nanoseconds.
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
        latencies.add_span(LatencySpan::Answer, 5000, 7);
        assert_eq!(latencies.counts()[ROWS - 1][3], 7);
    }
}
