// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The hinge of the design: what carries out the I/O of a disk.
//!
//! `phy` implements it with bios; a disk served by a process implements it with a character
//! device. Everything in front of it (ring, validation, grants, responses, statistics) is common.

use crate::engine::segments::{Pool, Segments, Slice};
use crate::ring::numbers::QueueTag;
use crate::ring::response::Status;

/// What to do with the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoKind {
    /// Read into the pages.
    Read,
    /// Write from the pages.
    Write,
    /// Make every completed write durable, then write from the pages.
    PreFlushWrite,
    /// Make every completed write durable, then write from the pages and make that durable.
    BarrierWrite,
    /// Make every completed write durable; no data.
    Flush,
    /// Forget a range; no data.
    Discard {
        /// True if the old content must not be recoverable.
        secure: bool,
    },
}

impl IoKind {
    /// Its number in traces.
    pub const fn number(self) -> u8 {
        match self {
            IoKind::Read => 0,
            IoKind::Write => 1,
            IoKind::Flush => 2,
            IoKind::PreFlushWrite => 3,
            IoKind::BarrierWrite => 4,
            IoKind::Discard { .. } => 5,
        }
    }
}

/// One I/O of a batch.
#[derive(Debug)]
pub struct Io<'b> {
    /// Names the I/O in its completion.
    pub tag: QueueTag,
    /// What to do.
    pub kind: IoKind,
    /// First 512-byte sector on the disk; meaningless for a flush.
    pub sector: u64,
    /// Number of 512-byte sectors.
    pub sectors: u64,
    /// When it began, in nanoseconds.
    pub since: u64,
    pub(crate) segments: &'b Segments<'b>,
    pub(crate) pool: Pool,
    pub(crate) head: u16,
    pub(crate) count: u16,
}

impl Io<'_> {
    /// The pieces of pages that hold the data, in disk order; empty for flush and discard.
    pub fn slices(&self) -> impl Iterator<Item = Slice> + '_ {
        self.segments.slices(self.head, self.count)
    }

    /// The data is in pages at which guest pages are mapped, each piece in one of its own.
    pub fn is_mapped(&self) -> bool {
        self.pool == Pool::Map
    }

    /// Number of pieces.
    pub fn count(&self) -> u16 {
        self.count
    }
}

/// What carries out the I/O of a disk.
pub trait Backend {
    /// Starts every I/O of the batch, in order. May sleep.
    ///
    /// Each one completes exactly once, possibly before this returns, and is then yielded by
    /// [`reap`](Self::reap); an I/O that cannot be started completes with an error.
    fn submit<'b>(&mut self, batch: impl Iterator<Item = Io<'b>>);

    /// True if there is something that could not be started before and can be now. Neither sleeps nor takes
    /// long: it is asked in each pass, the last time after [`reap`](Self::reap).
    fn can_resume(&self) -> bool {
        false
    }

    /// Starts it. May sleep.
    fn resume(&mut self) {}

    /// True while pages are used by I/O that goes on if the backend is dropped, of `unfinished` that were
    /// submitted and not yielded.
    fn is_bound(&self, unfinished: u16) -> bool {
        unfinished > 0
    }

    /// Who executes what was submitted last sleeps and wakes up with the queue: the more requests come at once, the
    /// less that costs.
    fn gathers(&self) -> bool {
        false
    }

    /// Yields the completions that came since the last call, in any order. Does not sleep.
    fn reap(&mut self, done: impl FnMut(QueueTag, Status));

    /// Requests of this kind are best served where the pages are mapped that the guest keeps granted.
    fn prefers_mapped(&self, _kind: IoKind) -> bool {
        true
    }

    /// Yields what it does not have any more and has not completed, because it cannot serve it with pages that are
    /// mapped: to be submitted once more with pages of the queue's own. Called after each [`reap`](Self::reap).
    fn give_back(&mut self, _each: impl FnMut(QueueTag)) {}

    /// Nanoseconds since some moment, by a clock that is one for all processors. Asked for at most twice a
    /// pass, to tell how long I/O takes.
    fn now(&self) -> u64;

    /// Puts memory behind the eight pages of a block that has none; `false` if none is to be had
    /// now. Neither sleeps nor allocates. A disk whose queues have all their pages from the
    /// beginning has no more to give.
    fn attach(&mut self, _block: u16) -> bool {
        false
    }

    /// Takes the memory of a block away that [`attach`](Self::attach) has put there. No page of it
    /// is in use.
    fn detach(&mut self, _block: u16) {}

    /// Pages that are to be given back by [`detach`](Self::detach) as soon as they are not used.
    /// Looks closely if `thorough`, else only if there is a reason.
    fn owed(&mut self, _thorough: bool) -> u16 {
        0
    }

    /// Nothing more is wanted at present.
    fn is_content(&mut self) {}
}

impl<B: Backend> Backend for &mut B {
    #[inline]
    fn submit<'b>(&mut self, batch: impl Iterator<Item = Io<'b>>) {
        (**self).submit(batch);
    }

    #[inline]
    fn can_resume(&self) -> bool {
        (**self).can_resume()
    }

    #[inline]
    fn resume(&mut self) {
        (**self).resume();
    }

    #[inline]
    fn is_bound(&self, unfinished: u16) -> bool {
        (**self).is_bound(unfinished)
    }

    #[inline]
    fn gathers(&self) -> bool {
        (**self).gathers()
    }

    #[inline]
    fn reap(&mut self, done: impl FnMut(QueueTag, Status)) {
        (**self).reap(done);
    }

    #[inline]
    fn prefers_mapped(&self, kind: IoKind) -> bool {
        (**self).prefers_mapped(kind)
    }

    #[inline]
    fn give_back(&mut self, each: impl FnMut(QueueTag)) {
        (**self).give_back(each);
    }

    #[inline]
    fn now(&self) -> u64 {
        (**self).now()
    }

    #[inline]
    fn attach(&mut self, block: u16) -> bool {
        (**self).attach(block)
    }

    #[inline]
    fn detach(&mut self, block: u16) {
        (**self).detach(block);
    }

    #[inline]
    fn owed(&mut self, thorough: bool) -> u16 {
        (**self).owed(thorough)
    }

    #[inline]
    fn is_content(&mut self) {
        (**self).is_content();
    }
}
