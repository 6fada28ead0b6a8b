// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Pages for requests: taken, borrowed, given back, and what is done with too few of them.
//!
//! A queue has a few pages of its own, and borrows more while it is busy. A large request for which
//! it can borrow none is done piece by piece in those that it has: so its own ones are enough for
//! any request, and none of them is ever waited for but for I/O of this very queue.

use crate::engine::backend::Backend;
use crate::engine::blocks::BLOCK;
use crate::engine::parts::Engine;
use crate::engine::requests::{Completed, Handle, PendingRequest};
use crate::engine::segments::{Chain, Pool};
use crate::ring::abi::MAX_DIRECT_SEGMENTS;
use crate::ring::grants::Grants;
use crate::ring::ports::SharedRing;

/// A request is done in pieces of no fewer pages, unless there are no more.
const PIECE: u16 = 2 * BLOCK;
const _: () = assert!(PIECE as usize >= MAX_DIRECT_SEGMENTS);

impl<R: SharedRing, G: Grants, B: Backend> Engine<'_, R, G, B> {
    /// Pages that a queue must have for ever, if it has not all that it can have.
    pub const OWN: u16 = PIECE;

    /// Free pages with memory, pages for mappings that are not in use, and free entries without a page, for tests.
    pub fn free_pages(&self) -> (u16, u16, u16) {
        let (segments, mappings) = (&self.requests.segments, &self.transfers.mappings);
        let named = segments
            .most(Pool::Map)
            .saturating_sub(segments.free(Pool::Map));
        let unnamed = mappings.sound().saturating_sub(named);
        (
            segments.free(Pool::Copy),
            mappings.unused().min(unnamed),
            segments.free(Pool::Rest),
        )
    }

    /// Guest pages that stay mapped, in use or not.
    pub fn kept(&self) -> u16 {
        self.transfers.mappings.kept()
    }

    /// There is something for [`sweep`](Self::sweep) to do now and then.
    pub fn wants_sweep(&self) -> bool {
        self.transfers.mappings.wants_sweep()
    }

    /// Unmaps the guest pages that were not used since the last call, or `all` that are not in use, and has what
    /// there was no room to map tried once more. Returns how many are left.
    pub fn sweep(&mut self, all: bool) -> u16 {
        if self.wants_sweep() {
            self.transfers.sweep(all);
        }
        self.kept()
    }

    /// Pages with memory now.
    pub fn pages(&self) -> u16 {
        self.requests.segments.capacity(Pool::Copy)
    }

    /// Pages with memory that are borrowed now.
    pub fn borrowed(&mut self) -> u16 {
        self.requests.segments.blocks().borrowed()
    }

    /// Borrowed pages that were free all the time since the last call.
    pub fn unused(&mut self) -> u16 {
        let blocks = self.requests.segments.blocks();
        let least = blocks.reset_low();
        least.min(blocks.borrowed())
    }

    /// Gives back what others have a right to, as far as it is not in use.
    #[inline]
    pub fn settle(&mut self, thorough: bool) {
        let owed = self.backend.owed(thorough);
        if owed > 0 {
            self.give_back(owed.saturating_add(BLOCK - 1));
        }
    }

    /// Gives back what was not used since the last call. Returns what is still borrowed.
    pub fn tidy(&mut self) -> u16 {
        let unused = self.unused();
        self.give_back(unused);
        self.settle(true);
        if self.requests.used() == 0 {
            self.backend.is_content();
        }
        self.borrowed()
    }

    /// Gives back up to so many borrowed pages, in blocks of which no page is in use. Returns how
    /// many that were.
    pub fn give_back(&mut self, pages: u16) -> u16 {
        let mut given: u16 = 0;
        while given.saturating_add(BLOCK) <= pages {
            let Some(block) = self.requests.segments.blocks().detach() else {
                break;
            };
            self.backend.detach(block);
            given = given.wrapping_add(BLOCK);
        }
        given
    }

    /// Pages for a request of so many segments; `None` if it must wait for other requests.
    pub(super) fn room(&mut self, pool: Pool, count: u16, may_split: bool) -> Option<Chain> {
        if pool == Pool::Copy && self.requests.segments.free(pool) < count {
            self.borrow(count);
        }
        if let Some(head) = self.requests.segments.alloc(pool, count) {
            return Some(Chain {
                head,
                count,
                rest: 0,
                left: 0,
            });
        }
        let (free, now) = (
            self.requests.segments.free(pool),
            self.requests.segments.capacity(pool),
        );
        // With enough pages in all it gets them when others are done.
        if pool != Pool::Copy || !may_split || now >= count || free < PIECE.min(now).max(1) {
            return None;
        }
        self.requests
            .segments
            .alloc_in_part(free, count.saturating_sub(free))
    }

    /// Borrows until so many pages are free, as far as there is something to borrow.
    #[cold]
    fn borrow(&mut self, count: u16) {
        while self.requests.segments.free(Pool::Copy) < count {
            let Some(block) = self.requests.segments.blocks().first_absent() else {
                return;
            };
            if !self.backend.attach(block) {
                return;
            }
            self.requests.segments.blocks().attached(block);
        }
    }

    /// Goes on with the next piece of a request.
    #[cold]
    pub(super) fn next_piece(&mut self, handle: Handle<Completed>) {
        let request = *self.requests.of(&handle);
        let segments = &mut self.requests.segments;
        segments.release(request.pool, request.head, request.count);
        if segments.free(Pool::Copy) < request.left {
            self.borrow(request.left);
        }
        let segments = &mut self.requests.segments;
        let count = segments.free(Pool::Copy).min(request.left);
        self.stats.pieces = self.stats.pieces.wrapping_add(1);
        // The pages of the last piece, at least, are free.
        let head = segments.alloc(Pool::Copy, count).unwrap_or(u16::MAX);
        let rest = segments.move_chain(request.rest, head, count);
        segments.release(Pool::Rest, request.rest, count);
        let sectors = segments.sectors(head, count);
        *self.requests.of_mut(&handle) = PendingRequest {
            sector: request.sector.wrapping_add(request.sectors),
            sectors,
            head,
            count,
            rest,
            left: request.left.wrapping_sub(count),
            continued: true,
            ..request
        };
        self.requests.push_taken(handle.go_on());
    }
}
