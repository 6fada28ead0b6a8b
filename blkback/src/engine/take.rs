// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Take: requests from the ring, each with a number and pages.

use crate::engine::backend::{Backend, IoKind};
use crate::engine::parked::{NoRoom, Parked};
use crate::engine::requests::{Handle, PendingRequest, Taken};
use crate::engine::segments::Pool;
use crate::engine::state::Engine;
use crate::ring::abi::{MAX_SLOT_SIZE, OP_DISCARD, OP_FLUSH_DISKCACHE};
use crate::ring::grants::Grants;
use crate::ring::request::{
    Direct, Direction, Discard, Indirect, Ordering, Plain, RawRequest, Reason, RingRequest,
};
use crate::ring::response::{Response, ResponseStatus};
use crate::ring::shared_ring::SharedRing;

/// A new read or write.
struct Transfer {
    id: u64,
    operation: u8,
    kind: IoKind,
    /// First sector on the disk.
    sector: u64,
    /// 0 while its segments are not known.
    sectors: u64,
    /// Its segments.
    count: u16,
}

impl<R: SharedRing, G: Grants, B: Backend> Engine<'_, R, G, B> {
    /// Gives requests that waited for pages another chance.
    pub(super) fn take_waiting(&mut self) {
        let _first = self.resume_stalled();
        if let Some(Parked { request, since, .. }) = self.parked.take() {
            self.latencies.spans.taken = since;
            if let Err(why) = self.admit(&request) {
                self.parked = Some(Parked {
                    request,
                    why,
                    since,
                });
            }
        }
    }

    /// Returns true while a request waits for pages.
    pub(super) fn is_short_of_pages(&self) -> bool {
        let parked = self.parked.as_ref();
        parked.is_some_and(|parked| parked.why == NoRoom::Pages)
            || !self.requests.stalled.is_empty()
    }

    pub(super) fn take(&mut self) -> u32 {
        self.take_waiting();
        if !self.can_take() {
            return 0;
        }
        let Ok(available) = self.ring.available() else {
            return 0;
        };
        let mut raw = RawRequest {
            bytes: [0; MAX_SLOT_SIZE],
            protocol: self.config.protocol,
        };
        let mut taken: u32 = 0;
        self.begin_taking();
        while taken < available && self.can_take() && self.ring.take(&mut raw.bytes) {
            taken = taken.wrapping_add(1);
            let plain = raw.plain(&self.limits);
            if plain.is_some_and(|plain| self.plain(&plain)) {
                continue;
            }
            match raw.check(&self.limits) {
                Ok(request) => {
                    if let Err(why) = self.admit(&request) {
                        self.stats.oo_req = self.stats.oo_req.wrapping_add(1);
                        self.parked = Some(Parked {
                            request,
                            why,
                            since: self.latencies.spans.taken,
                        });
                    }
                }
                Err(reject) => self.refuse(&reject),
            }
        }
        self.end_taking(taken);
        taken
    }

    /// Takes a plain read or write, as most requests are; [`admit`](Self::admit) does the same for all kinds. Returns
    /// false if the request must wait.
    #[inline]
    fn plain(&mut self, plain: &Plain<'_>) -> bool {
        let taken = self.with_pages(Transfer {
            id: plain.id,
            operation: plain.operation,
            kind: IoKind::of(plain.direction),
            sector: plain.sector,
            sectors: plain.sectors,
            count: plain.count(),
        });
        let Ok(handle) = taken else {
            return false;
        };
        let request = self.requests.of(&handle);
        // A request that has failed has no pages to fill.
        if request.status == ResponseStatus::Okay {
            let mut at = request.head;
            if request.pool == Pool::Map && self.is_quick() {
                if self.find_pages(at, plain) {
                    self.start_at_once(handle);
                    return true;
                }
                // All pages are looked for together later.
                self.transfers.unmap(&mut self.requests, handle.tag());
            }
            for segment in plain.segments() {
                at = self.requests.segments.fill(at, segment);
            }
        }
        self.requests.push_taken(handle);
        true
    }

    /// Gives a checked request its number and pages, or answers it.
    fn admit(&mut self, request: &RingRequest) -> Result<(), NoRoom> {
        match request {
            RingRequest::Flush(id) => self.flush(*id),
            RingRequest::Discard(discard) => self.discard(discard),
            RingRequest::Direct(direct) => self.direct(direct),
            RingRequest::Indirect(indirect) => self.indirect(indirect),
        }
    }

    fn flush(&mut self, id: u64) -> Result<(), NoRoom> {
        if !self.limits.flush {
            // Completed writes are durable already.
            self.stats.f_req = self.stats.f_req.wrapping_add(1);
            self.answer(&Response {
                id,
                operation: OP_FLUSH_DISKCACHE,
                status: ResponseStatus::Okay,
            });
            return Ok(());
        }
        let handle = self.without_pages(PendingRequest {
            id,
            operation: OP_FLUSH_DISKCACHE,
            kind: IoKind::Flush,
            ..PendingRequest::FREE
        })?;
        self.requests.push_taken(handle);
        Ok(())
    }

    fn discard(&mut self, discard: &Discard) -> Result<(), NoRoom> {
        if discard.sectors == 0 {
            self.answer(&Response {
                id: discard.id,
                operation: OP_DISCARD,
                status: ResponseStatus::Okay,
            });
            return Ok(());
        }
        let handle = self.without_pages(PendingRequest {
            id: discard.id,
            operation: OP_DISCARD,
            kind: IoKind::Discard {
                secure: discard.secure,
            },
            sector: discard.sector,
            sectors: discard.sectors,
            ..PendingRequest::FREE
        })?;
        self.requests.push_taken(handle);
        self.stats.ds_req = self.stats.ds_req.wrapping_add(1);
        Ok(())
    }

    fn direct(&mut self, direct: &Direct) -> Result<(), NoRoom> {
        let barrier = direct.ordering == Ordering::Barrier;
        if barrier && self.requests.used() > 0 {
            return Err(NoRoom::Turn);
        }
        let kind = match (direct.direction, direct.ordering) {
            (Direction::Read, _) => IoKind::Read,
            (Direction::Write, Ordering::Plain) => IoKind::Write,
            (Direction::Write, Ordering::PreFlush) => IoKind::PreFlushWrite,
            (Direction::Write, Ordering::Barrier) => IoKind::BarrierWrite,
        };
        let handle = self.with_pages(Transfer {
            id: direct.id,
            operation: direct.operation,
            kind,
            sector: direct.sector,
            sectors: 0,
            count: direct.count(),
        })?;
        let request = self.requests.of(&handle);
        // A request that has failed has no pages to fill.
        if request.status == ResponseStatus::Okay {
            let mut at = request.head;
            let mut sectors: u64 = 0;
            for segment in direct.segments() {
                sectors = sectors.wrapping_add(u64::from(segment.sectors()));
                at = self.requests.segments.fill(at, segment);
            }
            self.requests.of_mut(&handle).sectors = sectors;
            self.barrier = barrier;
        }
        self.requests.push_taken(handle);
        Ok(())
    }

    fn indirect(&mut self, indirect: &Indirect) -> Result<(), NoRoom> {
        // A buffer holds one page of segments; this driver never advertises more pages than that.
        if indirect.pages() != 1 {
            self.refuse(&indirect.reject(Reason::SegmentCount));
            return Ok(());
        }
        if self.transfers.is_full() {
            self.fetch();
        }
        let handle = self.with_pages(Transfer {
            id: indirect.id,
            operation: indirect.operation,
            kind: IoKind::of(indirect.direction),
            sector: indirect.sector,
            sectors: 0,
            count: indirect.count(),
        })?;
        if self.requests.of(&handle).status == ResponseStatus::Okay {
            self.fetch_soon(handle.tag(), indirect);
        }
        self.requests.push_taken(handle);
        Ok(())
    }

    fn without_pages(&mut self, request: PendingRequest) -> Result<Handle<Taken>, NoRoom> {
        let since = self.latencies.spans.taken;
        let request = PendingRequest { since, ..request };
        self.requests.take(|| request).ok_or(NoRoom::Turn)
    }

    /// Gives a transfer a number and a chain of `count` pages. One that can never get them is marked as failed.
    #[inline]
    fn with_pages(&mut self, transfer: Transfer) -> Result<Handle<Taken>, NoRoom> {
        let Transfer {
            id,
            operation,
            kind,
            sector,
            sectors,
            count,
        } = transfer;
        let keeps = self.transfers.mappings.keeps();
        let maps = match keeps {
            true => self.backend.prefers_mapped(kind),
            false => count > self.config.copy_max_segments,
        };
        let wanted = match maps {
            true => [Pool::Map, Pool::Copy],
            false => [Pool::Copy, Pool::Map],
        };
        let fits = |pool: &Pool| self.requests.segments.most(*pool) >= count;
        let Some(pool) = wanted.into_iter().find(fits) else {
            return self.without_pages(PendingRequest {
                id,
                operation,
                kind,
                sector,
                status: ResponseStatus::Error,
                ..PendingRequest::FREE
            });
        };
        // A barrier or a flush is the first of its queue's I/O, or is for the whole request.
        let may_split = matches!(kind, IoKind::Read | IoKind::Write);
        let mut room = |pool| Some((pool, self.room(pool, count, may_split)?));
        let found = match room(pool) {
            // Mappings that stay are only for speed, so no request waits for them.
            None if keeps && pool == Pool::Map => room(Pool::Copy),
            found => found,
        };
        let (pool, chain) = found.ok_or(NoRoom::Pages)?;
        let since = self.latencies.spans.taken;
        let handle = self.requests.take(|| PendingRequest {
            id,
            operation,
            kind,
            sector,
            sectors,
            since,
            pool,
            head: chain.head,
            count: chain.count,
            rest: chain.rest,
            left: chain.left,
            ..PendingRequest::FREE
        });
        handle.ok_or_else(|| {
            self.requests.release(pool, chain);
            NoRoom::Turn
        })
    }
}
