// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Pages for requests: taking, borrowing and giving back, and serving requests with too few of them.
//!
//! A queue has a few pages of its own, and borrows more while it is busy. A large request for which it can borrow none
//! is done piece by piece in the pages that the queue has. So the own pages are enough for any request, and a request
//! waits for them only while the same queue's I/O uses them.

use crate::engine::backend::Backend;
use crate::engine::blocks::BLOCK;
use crate::engine::requests::{Completed, Handle, PendingRequest};
use crate::engine::segments::{Chain, Pool};
use crate::engine::state::Engine;
use crate::ring::abi::MAX_DIRECT_SEGMENTS;
use crate::ring::grants::Grants;
use crate::ring::shared_ring::SharedRing;

/// A request is done in pieces of no fewer pages, unless there are no more.
const PIECE: u16 = 2 * BLOCK;
const _: () = assert!(PIECE as usize >= MAX_DIRECT_SEGMENTS);

impl<R: SharedRing, G: Grants, B: Backend> Engine<'_, R, G, B> {
    /// Pages that a queue must always have, unless it has all its pages from the beginning.
    pub const OWN: u16 = PIECE;

    /// Returns the numbers of free pages with memory, of pages for mappings that are not in use, and of free entries
    /// without a page, for tests.
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

    /// Returns the number of guest pages that stay mapped, in use or not.
    pub fn kept(&self) -> u16 {
        self.transfers.mappings.kept()
    }

    /// Reports whether [`sweep`](Self::sweep) must be called from time to time.
    pub fn wants_sweep(&self) -> bool {
        self.transfers.mappings.wants_sweep()
    }

    /// Unmaps the guest pages that were not used since the last call, or with `all` those that are not in use, and
    /// permits mapping again after there was no room. Returns how many pages stay mapped.
    pub fn sweep(&mut self, all: bool) -> u16 {
        if self.wants_sweep() {
            self.transfers.sweep(all);
        }
        self.kept()
    }

    /// Unmaps all guest pages that no request uses, and maps none to keep before the next [`sweep`](Self::sweep).
    pub fn make_room(&mut self) {
        self.transfers.make_room();
    }

    /// Returns the number of pages with memory now.
    pub fn pages(&self) -> u16 {
        self.requests.segments.capacity(Pool::Copy)
    }

    /// Returns the number of pages with memory that are borrowed now.
    pub fn borrowed(&mut self) -> u16 {
        self.requests.segments.blocks().borrowed()
    }

    /// Returns the number of borrowed pages that were free all the time since the last call.
    pub fn unused(&mut self) -> u16 {
        let blocks = self.requests.segments.blocks();
        let least = blocks.reset_low();
        least.min(blocks.borrowed())
    }

    /// Gives back unused pages that other queues have a right to.
    #[inline]
    pub fn settle(&mut self, thorough: bool) {
        let owed = self.backend.owed(thorough);
        if owed > 0 {
            self.give_back(owed.saturating_add(BLOCK - 1));
        }
    }

    /// Gives back pages that were not used since the last call. Returns the number of pages that are still borrowed.
    pub fn tidy(&mut self) -> u16 {
        let unused = self.unused();
        self.give_back(unused);
        self.settle(true);
        if self.requests.used() == 0 {
            self.backend.is_content();
        }
        self.borrowed()
    }

    /// Gives back at most `pages` borrowed pages, in blocks without a page in use. Returns their number.
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

    /// Takes pages for a request of `count` segments; `None` if it must wait for other requests.
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
        // If the queue has enough pages in all, the request gets them when other requests are done.
        if pool != Pool::Copy || !may_split || now >= count || free < PIECE.min(now).max(1) {
            return None;
        }
        self.requests
            .segments
            .alloc_in_part(free, count.saturating_sub(free))
    }

    /// Borrows until `count` pages are free or no more can be borrowed.
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

    /// Begins the next piece of a request.
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
