// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! How long I/O takes, by operation: how many have ended, and their times added up. Who reads them twice has
//! the mean of what was between.

use crate::engine::backend::IoKind;

/// I/O of one operation that has ended. A request that is done in pieces is several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Took {
    /// How many.
    pub done: u64,
    /// Nanoseconds for which the backend had them, added up.
    pub ns: u64,
}

/// All operations. What flushes before it writes is a flush, as in the counters of requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// Reads.
    pub read: Took,
    /// Writes.
    pub write: Took,
    /// Flushes, barriers, and writes with a flush before them.
    pub flush: Took,
    /// Discards.
    pub discard: Took,
}

impl Times {
    /// One that was begun then has ended, at a time that [`add`](Self::add) is told: so the clock is read once
    /// for all that have ended.
    #[inline]
    pub(super) fn ends(&mut self, kind: IoKind, begun: u64) {
        let took = match kind {
            IoKind::Read => &mut self.read,
            IoKind::Write => &mut self.write,
            IoKind::Flush | IoKind::PreFlushWrite | IoKind::BarrierWrite => &mut self.flush,
            IoKind::Discard { .. } => &mut self.discard,
        };
        took.done = took.done.wrapping_add(1);
        took.ns = took.ns.wrapping_sub(begun);
    }

    /// Adds those that have ended now.
    pub(super) fn add(&mut self, batch: &Times, now: u64) {
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
