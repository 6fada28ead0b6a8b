// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The central interface of the design: a backend carries out the I/O of a disk.
//!
//! `phy` implements it with bios; a disk served by a process implements it with a character
//! device. Everything in front of it (ring, validation, grants, responses, statistics) is common.

use crate::engine::segments::{Pool, Segments, Slice};
use crate::ring::numbers::QueueTag;
use crate::ring::request::Direction;
use crate::ring::response::ResponseStatus;

/// Operation on the disk.
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
    /// Returns that of a plain read or write.
    pub(crate) const fn of(direction: Direction) -> Self {
        match direction {
            Direction::Read => IoKind::Read,
            Direction::Write => IoKind::Write,
        }
    }

    /// Returns the operation's number in traces.
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

/// An I/O of a batch.
#[derive(Debug)]
pub struct Io<'b> {
    /// Names the I/O in its completion.
    pub tag: QueueTag,
    /// Operation.
    pub kind: IoKind,
    /// First 512-byte sector on the disk; meaningless for a flush.
    pub sector: u64,
    /// Number of 512-byte sectors.
    pub sectors: u64,
    /// Time at which the backend got it, in nanoseconds of [`Backend::now`].
    pub since: u64,
    pub(crate) segments: &'b Segments<'b>,
    pub(crate) pool: Pool,
    pub(crate) head: u16,
    pub(crate) count: u16,
}

impl Io<'_> {
    /// Returns the pieces of pages that hold the data, in disk order; empty for flush and discard.
    pub fn slices(&self) -> impl Iterator<Item = Slice> + '_ {
        self.segments.slices(self.head, self.count)
    }

    /// Reports whether the data is in mapped guest pages, each piece in a page of its own.
    pub fn is_mapped(&self) -> bool {
        self.pool == Pool::Map
    }

    /// Returns the number of pieces.
    pub fn count(&self) -> u16 {
        self.count
    }
}

/// Where completions may be collected while the queue's thread waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReapContext {
    /// By the thread alone.
    Thread,
    /// By any task.
    Task,
    /// In any context, interrupts included.
    Any,
}

/// The part that carries out the I/O of a disk.
pub trait Backend {
    /// Starts every I/O of the batch, in order; there are `count` of them. May sleep.
    ///
    /// Each I/O completes exactly once, possibly before this returns, and is then yielded by [`reap`](Self::reap); an
    /// I/O that cannot be started completes with an error.
    fn submit<'b>(&mut self, count: u16, batch: impl Iterator<Item = Io<'b>>);

    /// Reports whether I/O that could not be started before can be started now. Neither sleeps nor takes long, because
    /// each pass calls it, the last time after [`reap`](Self::reap).
    fn can_resume(&self) -> bool {
        false
    }

    /// Starts the I/O that [`can_resume`](Self::can_resume) reports. May sleep.
    fn resume(&mut self) {}

    /// Reports whether pages are in use by I/O that continues if the backend is dropped. `unfinished` is the number of
    /// I/Os that were submitted and not yielded.
    fn is_bound(&self, unfinished: u16) -> bool {
        unfinished > 0
    }

    /// Reports whether the last batch went to a process that sleeps and must be woken, so that the cost of one I/O
    /// falls with the number of I/Os that come at once.
    fn gathers(&self) -> bool {
        false
    }

    /// Forgets earlier wake-ups of the queue's thread: it calls this before it reaps, so that a wake-up for what it finds then
    /// costs no further look.
    fn forget_wake_ups(&mut self) {}

    /// Yields the completions that came since the last call, in any order. Does not sleep.
    fn reap(&mut self, done: impl FnMut(QueueTag, ResponseStatus));

    /// Returns where [`reap`](Self::reap) and [`now`](Self::now) may be called, if not by the queue's thread; in place of the
    /// former it is [`reap_anywhere`](Self::reap_anywhere) that may be called in any context. Changes only while the thread has
    /// the backend.
    fn reap_context(&self) -> ReapContext {
        ReapContext::Thread
    }

    /// Yields completions like [`reap`](Self::reap), in any context. Returns true if something is left that the thread must
    /// collect.
    fn reap_anywhere(&mut self, done: impl FnMut(QueueTag, ResponseStatus)) -> bool {
        self.reap(done);
        false
    }

    /// Reports whether requests of this kind are served best from mapped pages that the guest keeps granted.
    fn prefers_mapped(&self, _kind: IoKind) -> bool {
        true
    }

    /// Yields I/Os that it gives up without completing them, because it cannot serve them with mapped pages: the engine
    /// submits them again with pages of the queue's own. Called after each [`reap`](Self::reap).
    fn give_back(&mut self, _each: impl FnMut(QueueTag)) {}

    /// Runs work that may wait until storage releases pages and that needs nothing else of the guest, whose ring may be
    /// given back while it runs.
    fn aside<T>(&mut self, body: impl FnOnce() -> T) -> T {
        body()
    }

    /// Returns nanoseconds since an arbitrary moment, by one clock for all processors. A pass calls it at most twice to
    /// measure how long I/O takes.
    fn now(&self) -> u64;

    /// Puts memory behind the eight pages of a block that has none; `false` if none is to be had now. Neither sleeps
    /// nor allocates. The default is for a disk whose queues have all their pages from the beginning: it has no more to
    /// give.
    fn attach(&mut self, _block: u16) -> bool {
        false
    }

    /// Takes back the memory that [`attach`](Self::attach) has put behind a block. No page of the block is in use.
    fn detach(&mut self, _block: u16) {}

    /// Returns the number of pages that must be given back by [`detach`](Self::detach) as soon as they are unused.
    /// Looks closely if `thorough`, else only if there is a reason.
    fn owed(&mut self, _thorough: bool) -> u16 {
        0
    }

    /// Records that the queue needs no more memory at present.
    fn is_content(&mut self) {}
}

impl<B: Backend> Backend for &mut B {
    #[inline]
    fn submit<'b>(&mut self, count: u16, batch: impl Iterator<Item = Io<'b>>) {
        (**self).submit(count, batch);
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
    fn forget_wake_ups(&mut self) {
        (**self).forget_wake_ups();
    }

    #[inline]
    fn reap(&mut self, done: impl FnMut(QueueTag, ResponseStatus)) {
        (**self).reap(done);
    }

    #[inline]
    fn reap_context(&self) -> ReapContext {
        (**self).reap_context()
    }

    #[inline]
    fn reap_anywhere(&mut self, done: impl FnMut(QueueTag, ResponseStatus)) -> bool {
        (**self).reap_anywhere(done)
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
    fn aside<T>(&mut self, body: impl FnOnce() -> T) -> T {
        (**self).aside(body)
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
