// SPDX-License-Identifier: GPL-2.0-only

//! Pages of this module that stay where they are: the arena of a tap disk, and areas of descriptors.
//!
//! Wraps `page_address` (include/linux/mm.h), and uses the functions that `block` wraps.

use super::page_blocks::{alloc_run, Page, MAX_ORDER};
use super::vectors::push;
use crate::linux::sys;
use kernel::bindings;
use kernel::prelude::*;

/// Pages with memory.
///
/// # Invariants
///
/// `all` has the pages of `own`, in the same order, and `frames` the frame number of each.
pub(crate) struct Pages {
    all: KVec<*mut bindings::page>,
    frames: KVec<u64>,
    own: KVec<Page>,
}

// SAFETY: The vectors do not change after `new`, and `Pages` hands out raw pointers only: it never reads or writes the
// memory, which the hypervisor, devices and processes may write at any time.
unsafe impl Send for Pages {}
// SAFETY: As above.
unsafe impl Sync for Pages {}

impl Pages {
    /// Allocates `count` zeroed pages, as neighbours where possible. May sleep.
    pub(crate) fn new(count: u16) -> Result<Self> {
        let total = usize::from(count);
        let mut pages = Self {
            all: KVec::with_capacity(total, GFP_KERNEL)?,
            frames: KVec::with_capacity(total, GFP_KERNEL)?,
            own: KVec::with_capacity(total, GFP_KERNEL)?,
        };
        let mut left = total;
        let mut order = MAX_ORDER;
        while left > 0 {
            while order > 0 && left < 1usize.wrapping_shl(order) {
                order = order.wrapping_sub(1);
            }
            match alloc_run(bindings::GFP_KERNEL, order, |page| pages.add(page)) {
                Ok(()) => left = left.saturating_sub(1usize.wrapping_shl(order)),
                // Memory is fragmented, so smaller runs are allocated.
                Err(_) if order > 0 => order = order.wrapping_sub(1),
                Err(error) => return Err(error),
            }
        }
        Ok(pages)
    }

    fn add(&mut self, page: Page) -> Result {
        let (raw, frame) = (page.as_raw(), page.frame());
        push(&mut self.own, page)?;
        push(&mut self.all, raw)?;
        push(&mut self.frames, frame)
    }

    /// Returns the number of pages.
    pub(crate) fn len(&self) -> u16 {
        // CAST: the constructor takes the number as one of 16 bits.
        self.frames.len() as u16
    }

    /// Returns the pages.
    pub(in crate::linux) fn raw(&self) -> &[*mut bindings::page] {
        &self.all
    }

    /// Returns the frame number of a page.
    pub(in crate::linux) fn frame(&self, index: u16) -> Option<u64> {
        self.frames.get(usize::from(index)).copied()
    }

    /// Returns the first byte of a page.
    pub(in crate::linux) fn bytes(&self, index: u16) -> Option<*const u8> {
        let page = self.all.get(usize::from(index))?;
        // SAFETY: By the type invariant the page is valid, and on a 64-bit kernel it is always
        // mapped.
        Some(unsafe { sys::xbr_page_address(*page) }.cast())
    }
}
