// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The backend's half of the ring index protocol of Xen's `public/io/ring.h`.
//!
//! Indices are free-running and wrap; a slot is the index masked with the ring's size. The
//! backend keeps private copies of everything that it wrote: `rsp_prod` and `req_event` in the
//! shared page belong to the guest's memory and are never read back after attach.

use crate::ring::abi::MAX_SLOT_SIZE;
use crate::ring::response::Response;
use crate::ring::shared_ring::SharedRing;

/// The private side of a backend ring.
///
/// # Invariants
///
/// With `-` in wrapping arithmetic:
/// - `size` is a power of two;
/// - `published`, `rsp_prod` and `req_cons` follow one another in this order;
/// - `req_cons - published <= size`: never more than `size` requests are without an answer that
///   the frontend can see.
#[derive(Debug)]
pub struct BackRing<R> {
    shared: R,
    size: u32,
    req_cons: u32,
    rsp_prod: u32,
    published: u32,
    broken: bool,
}

/// Reason that a ring could not be attached or must not be served any longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingError {
    /// The frontend's producer index is further ahead than the ring is large.
    Overflow {
        /// The producer index as read.
        req_prod: u32,
        /// The index of the first request without a published answer.
        rsp_prod: u32,
    },
    /// The size is not a power of two.
    BadSize,
}

impl<R> BackRing<R> {
    /// Replaces the access to the shared ring, and returns the ring with the new access and the old access.
    pub fn replace<S>(self, shared: S) -> (BackRing<S>, R) {
        let Self {
            shared: before,
            size,
            req_cons,
            rsp_prod,
            published,
            broken,
        } = self;
        let ring = BackRing {
            shared,
            size,
            req_cons,
            rsp_prod,
            published,
            broken,
        };
        (ring, before)
    }

    /// Number of slots.
    pub fn size(&self) -> u32 {
        self.size
    }
}

impl<R: SharedRing> BackRing<R> {
    /// Attaches to a ring at the state in which the shared page is (`BACK_RING_ATTACH`).
    ///
    /// A page freshly initialised by the frontend has both producers at 0. A page left by an
    /// earlier backend has every request up to `rsp_prod` answered.
    pub fn attach(shared: R, size: u32) -> Result<Self, RingError> {
        if !size.is_power_of_two() {
            return Err(RingError::BadSize);
        }
        let rsp_prod = shared.load_rsp_prod();
        let req_prod = shared.load_req_prod();
        if req_prod.wrapping_sub(rsp_prod) > size {
            return Err(RingError::Overflow { req_prod, rsp_prod });
        }
        // INVARIANT: all three private indices are equal, and `size` was checked.
        Ok(Self {
            shared,
            size,
            req_cons: rsp_prod,
            rsp_prod,
            published: rsp_prod,
            broken: false,
        })
    }

    /// Returns true once the ring was given back; the caller must not use it then.
    pub fn is_gone(&self) -> bool {
        self.shared.is_gone()
    }

    /// Returns true once the frontend's index ran ahead of the ring; the backend never serves it again.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Requests taken and not yet answered.
    pub fn unanswered(&self) -> u32 {
        self.req_cons.wrapping_sub(self.rsp_prod)
    }

    /// The number of requests that can be taken now.
    ///
    /// Reads the producer index once. Marks the ring broken and returns the error if the index is
    /// impossible; a broken ring stays so.
    pub fn available(&mut self) -> Result<u32, RingError> {
        let req_prod = self.shared.load_req_prod();
        // The frontend may reuse a slot once it can see the answer, not once the backend has written it. Counted from
        // `self.rsp_prod`, it could refill the ring without end between two publications.
        let rsp_prod = self.published;
        if self.broken || req_prod.wrapping_sub(rsp_prod) > self.size {
            self.broken = true;
            return Err(RingError::Overflow { req_prod, rsp_prod });
        }
        // A producer index behind `req_cons` gives a huge difference; such a guest took back
        // requests that we already copied. There is nothing new in the ring then.
        let new = req_prod.wrapping_sub(self.req_cons);
        Ok(if new > self.size { 0 } else { new })
    }

    /// True if [`available`](Self::available) would find requests, or an impossible index. Costs
    /// no more than reading the producer index.
    pub fn is_worth_a_look(&self) -> bool {
        let req_prod = self.shared.peek_req_prod();
        let new = req_prod.wrapping_sub(self.req_cons);
        let impossible = req_prod.wrapping_sub(self.published) > self.size;
        !self.broken && (impossible || (new > 0 && new <= self.size))
    }

    /// Copies the next request out of its slot and consumes it.
    ///
    /// The caller has called [`available`](Self::available) and takes at most the number that it returned. Returns
    /// `false` and takes nothing when that would leave more than `size` requests without a published answer.
    pub fn take(&mut self, slot: &mut [u8; MAX_SLOT_SIZE]) -> bool {
        if self.req_cons.wrapping_sub(self.published) >= self.size {
            return false;
        }
        self.shared.copy_slot(self.req_cons, slot);
        // INVARIANT: `req_cons - published < size` before, so `<= size` after.
        self.req_cons = self.req_cons.wrapping_add(1);
        true
    }

    /// Writes a response into the next slot without publishing it.
    ///
    /// Returns `false` and writes nothing when every taken request is answered already: a second
    /// answer would destroy a request that the guest has queued.
    pub fn respond(&mut self, response: &Response) -> bool {
        if self.unanswered() == 0 {
            return false;
        }
        self.shared.write_response(self.rsp_prod, response.words());
        // INVARIANT: `req_cons - rsp_prod > 0` before, so no underflow after.
        self.rsp_prod = self.rsp_prod.wrapping_add(1);
        true
    }

    /// Publishes all written responses at once and says whether the frontend wants an event
    /// (`RING_PUSH_RESPONSES_AND_CHECK_NOTIFY`).
    #[must_use = "a frontend that waits for an event stalls without it"]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.rsp_prod);
        if old == new {
            return false;
        }
        self.shared.store_rsp_prod(new);
        self.published = new;
        // The store of `rsp_prod` must be visible before `rsp_event` is read: the frontend writes
        // `rsp_event`, executes a full barrier and then reads `rsp_prod`.
        self.shared.full_barrier();
        let rsp_event = self.shared.load_rsp_event();
        new.wrapping_sub(rsp_event) < new.wrapping_sub(old)
    }

    /// Asks for an event at the next request and returns whether a request has arrived in between
    /// (`RING_FINAL_CHECK_FOR_REQUESTS`). Call it before sleeping.
    pub fn final_check(&mut self) -> Result<bool, RingError> {
        self.final_check_for(1)
    }

    /// Asks for an event as soon as `least` requests can be taken, at least one, and returns whether as many have arrived in
    /// between. For a sleep with a limit, because fewer of them bring no event.
    pub fn final_check_for(&mut self, least: u32) -> Result<bool, RingError> {
        let least = least.max(1);
        if self.available()? >= least {
            return Ok(true);
        }
        self.shared
            .store_req_event(self.req_cons.wrapping_add(least));
        // `req_event` must be visible before `req_prod` is read again: the frontend writes
        // `req_prod`, executes a full barrier and then reads `req_event`.
        self.shared.full_barrier();
        Ok(self.available()? >= least)
    }
}
