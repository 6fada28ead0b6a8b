// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! How long each I/O took, as histograms, while somebody wants to know: [`Times`](crate::engine::Times) has
//! the sums at any time.

use crate::engine::backend::IoKind;

/// Operations that are told apart, in the order of their histograms: reads, writes, flushes with what flushes, discards.
pub const OPERATIONS: usize = 4;
/// Steps of a histogram. Each one after the first has what took less than twice as long, and the last one all else.
pub const STEPS: usize = 24;
/// The first one has what took less than this.
pub const FIRST_STEP_NS: u64 = 1024;

/// Counts of I/O by the time that it took, of each operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Latencies {
    counts: [[u64; STEPS]; OPERATIONS],
    on: bool,
}

impl Latencies {
    /// Nothing is counted until it is asked for.
    pub const OFF: Self = Self {
        counts: [[0; STEPS]; OPERATIONS],
        on: false,
    };

    /// The counts, in the order of the operations.
    pub fn counts(&self) -> &[[u64; STEPS]; OPERATIONS] {
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
        let counts = self.counts.get_mut(operation);
        if let Some(count) = counts.and_then(|counts| counts.get_mut(step(ns))) {
            *count = count.wrapping_add(1);
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
        assert_eq!(sums, [1, 1, 2, 0]);
    }
}
