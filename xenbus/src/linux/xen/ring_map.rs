// SPDX-License-Identifier: GPL-2.0-only

//! The mapped pages of a ring.
//!
//! Wraps `xenbus_map_ring_valloc` and `xenbus_unmap_ring_vfree` (include/xen/xenbus.h).

use super::device::XenDevice;
use super::trial;
use crate::linux::barrier;
use crate::linux::sys;
use crate::proto::frontend::MAX_RING_PAGES;
use crate::ring::abi::{self, Protocol, MAX_SLOT_SIZE};
use crate::ring::shared_ring::SharedRing;
use core::ptr::NonNull;
use kernel::error::to_result;
use kernel::prelude::*;
use kernel::sync::Arc;

/// A frontend's ring, mapped; dropping it unmaps it.
///
/// # Invariants
///
/// `base` is the start of a mapping, page aligned, that holds the header and `mask + 1` slots of
/// `stride` bytes; `mask + 1` is a power of two and `stride` a multiple of 4.
pub(crate) struct RingMap {
    base: NonNull<u8>,
    mask: u32,
    stride: usize,
    device: Arc<XenDevice>,
}

// SAFETY: The mapping may be used from any thread; all accesses are volatile.
unsafe impl Send for RingMap {}

impl RingMap {
    /// Maps a ring. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOSPC` while Xen has no room for more mappings of this domain, and `ENOMEM`; both pass. Any other error is the
    /// hypervisor's status of one of the frontend's pages, whatever that number is in Linux, and the bus has then
    /// published Closing.
    pub(crate) fn map(
        device: &Arc<XenDevice>,
        refs: &[u32; MAX_RING_PAGES],
        order: u8,
        protocol: Protocol,
    ) -> Result<Self> {
        let slots = protocol.ring_size(order).ok_or(EINVAL)?;
        let mut refs = *refs;
        let used = refs.get(..1 << order).ok_or(EINVAL)?;
        trial::map_once(device.otherend_id(), used)?;
        let mut base = core::ptr::null_mut();
        // SAFETY: `refs` has room for the pages of the largest order, which `ring_size` checked.
        to_result(unsafe {
            sys::xenbus_map_ring_valloc(device.as_raw(), refs.as_mut_ptr(), 1 << order, &mut base)
        })?;
        // INVARIANT: The pages were mapped one behind the other, and `ring_size` says how many
        // slots fit.
        Ok(Self {
            base: NonNull::new(base.cast()).ok_or(ENOMEM)?,
            mask: slots.wrapping_sub(1),
            stride: protocol.slot_size(),
            device: device.clone(),
        })
    }

    fn load(&self, offset: usize) -> u32 {
        // SAFETY: The offsets used are in the header, which is mapped and aligned. The peer may
        // write at the same time; a volatile access of one aligned word is never torn.
        unsafe { self.base.as_ptr().add(offset).cast::<u32>().read_volatile() }
    }

    fn store(&self, offset: usize, value: u32) {
        // SAFETY: As for `load`.
        unsafe {
            self.base
                .as_ptr()
                .add(offset)
                .cast::<u32>()
                .write_volatile(value)
        }
    }

    fn slot(&self, index: u32) -> *mut u8 {
        let slot = (index & self.mask) as usize;
        let offset = abi::RING_HEADER_SIZE.wrapping_add(slot.wrapping_mul(self.stride));
        // SAFETY: By the type invariant the slot lies inside the mapping.
        unsafe { self.base.as_ptr().add(offset) }
    }
}

impl SharedRing for RingMap {
    fn load_req_prod(&self) -> u32 {
        let value = self.load(abi::REQ_PROD);
        // Pairs with the frontend's write barrier between its slots and `req_prod`.
        barrier::virt_rmb();
        value
    }

    fn peek_req_prod(&self) -> u32 {
        self.load(abi::REQ_PROD)
    }

    fn load_rsp_prod(&self) -> u32 {
        self.load(abi::RSP_PROD)
    }

    fn load_rsp_event(&self) -> u32 {
        self.load(abi::RSP_EVENT)
    }

    fn store_req_event(&self, value: u32) {
        self.store(abi::REQ_EVENT, value);
    }

    fn store_rsp_prod(&self, value: u32) {
        // Pairs with the frontend's read barrier after its load of `rsp_prod`.
        barrier::virt_wmb();
        self.store(abi::RSP_PROD, value);
    }

    fn full_barrier(&self) {
        barrier::virt_mb();
    }

    fn copy_slot(&self, index: u32, slot: &mut [u8; MAX_SLOT_SIZE]) {
        let from = self.slot(index);
        if self.stride % 8 == 0 {
            let mut words = self.stride / 8;
            for (word, to) in slot.chunks_exact_mut(8).enumerate() {
                if word >= words {
                    break;
                }
                // SAFETY: The word lies inside the slot, and slots of this stride are aligned to
                // 8 bytes, as the header's size is a multiple of 8. Each word is read once;
                // everything later uses the copy (XSA-155).
                let value = unsafe { from.cast::<u64>().add(word).read_volatile() };
                to.copy_from_slice(&value.to_ne_bytes());
                if word == 0 {
                    words = words.min(abi::used_words(value));
                }
            }
        } else {
            for (word, to) in slot.chunks_exact_mut(4).take(self.stride / 4).enumerate() {
                // SAFETY: The word lies inside the slot, and slots are aligned to 4 bytes. Each
                // word is read once, as above.
                let value = unsafe { from.cast::<u32>().add(word).read_volatile() };
                to.copy_from_slice(&value.to_ne_bytes());
            }
        }
    }

    fn write_response(&self, index: u32, words: [u32; 4]) {
        let to = self.slot(index).cast::<u32>();
        for (word, value) in words.into_iter().enumerate() {
            // SAFETY: A response is smaller than a slot, and slots are aligned to 4 bytes.
            unsafe { to.add(word).write_volatile(value) }
        }
    }
}

impl Drop for RingMap {
    fn drop(&mut self) {
        // SAFETY: The mapping was made for this device and is unmapped once. The call itself reports an error in the
        // device's xenstore node; nothing is left to do about it here.
        unsafe { sys::xenbus_unmap_ring_vfree(self.device.as_raw(), self.base.as_ptr().cast()) };
    }
}
