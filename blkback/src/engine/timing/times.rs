// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Number and duration of I/Os, by operation. A reader that reads them twice has the mean of the time between.

use crate::engine::backend::IoKind;

/// I/O of one operation that has ended. A request that is done in pieces is several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoTime {
    /// Number of I/Os.
    pub done: u64,
    /// Sum of the nanoseconds for which the backend had them.
    pub ns: u64,
}

/// All operations. A write with a flush before it counts as a flush, as in the counters of requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// Reads.
    pub read: IoTime,
    /// Writes.
    pub write: IoTime,
    /// Flushes, barriers, and writes with a flush before them.
    pub flush: IoTime,
    /// Discards.
    pub discard: IoTime,
}

impl Times {
    /// Records that an I/O that began at `begun` has ended. [`add`](Self::add) gets the time of the end, so the clock
    /// is read once for all I/Os that have ended.
    #[inline]
    pub(in crate::engine) fn ends(&mut self, kind: IoKind, begun: u64) {
        let took = match kind {
            IoKind::Read => &mut self.read,
            IoKind::Write => &mut self.write,
            IoKind::Flush | IoKind::PreFlushWrite | IoKind::BarrierWrite => &mut self.flush,
            IoKind::Discard { .. } => &mut self.discard,
        };
        took.done = took.done.wrapping_add(1);
        took.ns = took.ns.wrapping_sub(begun);
    }

    /// Reports whether no I/O has ended.
    #[inline]
    pub(in crate::engine) fn is_empty(&self) -> bool {
        let done = self.read.done | self.write.done | self.flush.done | self.discard.done;
        done == 0
    }

    /// Adds a batch of I/Os that have ended at the time `now`.
    pub(in crate::engine) fn add(&mut self, batch: &Times, now: u64) {
        let ours = [
            &mut self.read,
            &mut self.write,
            &mut self.flush,
            &mut self.discard,
        ];
        let theirs = [batch.read, batch.write, batch.flush, batch.discard];
        for (took, more) in ours.into_iter().zip(theirs) {
            let ended = now.wrapping_mul(more.done);
            took.done = took.done.wrapping_add(more.done);
            took.ns = took.ns.wrapping_add(ended.wrapping_add(more.ns));
        }
    }
}
