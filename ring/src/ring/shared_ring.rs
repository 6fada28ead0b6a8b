// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Surroundings that the pure code needs: shared ring memory and barriers.
//!
//! The kernel implements [`SharedRing`] over mapped guest pages, the tests over plain memory and
//! over loom's atomics.

use crate::ring::abi::MAX_SLOT_SIZE;

/// The shared pages of one ring.
///
/// Every method is one access to shared memory. The peer may change any word at any time, so
/// nothing read here is trusted and nothing is read twice.
pub trait SharedRing {
    /// Returns true once the ring was given back: the backend must not touch its guest any more. That may happen while
    /// the backend starts I/O, because starting I/O may sleep for as long as a device hangs.
    fn is_gone(&self) -> bool {
        false
    }

    /// Reads `req_prod` and orders all later reads after it (`virt_rmb` after the load).
    ///
    /// Pairs with the frontend's write barrier between its slots and `req_prod`
    /// (`RING_PUSH_REQUESTS`).
    fn load_req_prod(&self) -> u32;

    /// Reads `req_prod` without ordering later reads, to see whether there is anything to take.
    fn peek_req_prod(&self) -> u32 {
        self.load_req_prod()
    }

    /// Reads `rsp_prod` as found in the page; used at attach only.
    fn load_rsp_prod(&self) -> u32;

    /// Reads `rsp_event`.
    fn load_rsp_event(&self) -> u32;

    /// Writes `req_event`.
    fn store_req_event(&self, value: u32);

    /// Orders all earlier writes before it, then writes `rsp_prod` (`virt_wmb` before the store).
    ///
    /// Pairs with the frontend's read barrier after its load of `rsp_prod`.
    fn store_rsp_prod(&self, value: u32);

    /// A full barrier (`virt_mb`).
    ///
    /// Pairs with the full barrier of the frontend in `RING_PUSH_REQUESTS_AND_CHECK_NOTIFY` and
    /// `RING_FINAL_CHECK_FOR_RESPONSES`.
    fn full_barrier(&self);

    /// Copies the slot of `index` once into `slot`, or the part of it that its request uses
    /// ([`used_words`](super::abi::used_words)); the kernel's `RING_COPY_REQUEST`.
    ///
    /// The implementation masks the index with the ring's size.
    fn copy_slot(&self, index: u32, slot: &mut [u8; MAX_SLOT_SIZE]);

    /// Writes a response into the slot of `index`.
    fn write_response(&self, index: u32, words: [u32; 4]);
}
