// SPDX-License-Identifier: GPL-2.0-only

//! Pages of ours, one by one and in blocks of eight.
//!
//! Wraps `alloc_pages`, `split_page` and `__free_pages` (include/linux/gfp.h, include/linux/mm.h).
//! `kernel::page::Page` allocates one page at a time, and says nothing of neighbours.

use super::vectors::push;
use crate::linux::sys;
use core::ptr::NonNull;
use kernel::bindings;
use kernel::prelude::*;

/// Pages of a block.
pub(crate) const PAGES: usize = 8;
/// Pages are allocated in runs of up to `1 << MAX_ORDER`, so that the data of a large request lies
/// in few pieces. The page allocator counts longer runs as expensive.
pub(in crate::linux) const MAX_ORDER: u32 = 3;
const _: () = assert!(PAGES == 1 << MAX_ORDER);

/// A page that belongs to this module.
///
/// # Invariants
///
/// The page is valid, and one reference to it belongs to this object.
pub(in crate::linux) struct Page(NonNull<bindings::page>);

// SAFETY: A page may be used and freed from any thread.
unsafe impl Send for Page {}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::__free_pages(self.0.as_ptr(), 0) };
    }
}

impl Page {
    pub(in crate::linux) fn as_raw(&self) -> *mut bindings::page {
        self.0.as_ptr()
    }

    /// Returns the page's frame number, as the hypervisor knows it.
    pub(in crate::linux) fn frame(&self) -> u64 {
        // SAFETY: The page is valid.
        unsafe { sys::xbr_page_gfn(self.0.as_ptr()) as u64 }
    }

    fn clear(&mut self) {
        // SAFETY: The page is valid and, on a 64-bit kernel, always mapped.
        let start = unsafe { sys::xbr_page_address(self.0.as_ptr()) }.cast::<u8>();
        // SAFETY: A page has that number of bytes, and no other code has this one.
        unsafe { start.write_bytes(0, kernel::page::PAGE_SIZE) };
    }
}

/// Allocates `1 << order` zeroed pages that lie one behind the other, and passes each to `each`. May sleep if `flags`
/// allow it.
pub(in crate::linux) fn alloc_run(
    flags: u32,
    order: u32,
    mut each: impl FnMut(Page) -> Result,
) -> Result {
    let flags = flags | bindings::__GFP_ZERO;
    // Order-0 pages suffice: do not reclaim for more, and do not report that there are none.
    let lightly = bindings::__GFP_NOWARN | 1 << bindings::___GFP_NORETRY_BIT;
    let flags = if order == 0 { flags } else { flags | lightly };
    // SAFETY: Depends on its arguments alone.
    let run = unsafe { bindings::alloc_pages(flags, order) };
    let run = NonNull::new(run).ok_or(ENOMEM)?;
    // SAFETY: The pages were just allocated as one run of this order; from here on each of them is
    // freed alone.
    unsafe { bindings::split_page(run.as_ptr(), order) };
    let mut result = Ok(());
    for index in 0..1usize.wrapping_shl(order) {
        // SAFETY: The descriptors of the pages of a run lie one behind the other.
        let raw = unsafe { run.add(index) };
        // Even after an error: the rest of the run must be freed, too.
        // INVARIANT: The page has a reference of its own since the run was split.
        result = result.and(each(Page(raw)));
    }
    result
}

/// Effort that an allocation may take to get memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AllocEffort {
    /// Any effort, for a frontend that connects.
    Full,
    /// Only without starting I/O, waiting for it, or reporting a failure.
    Light,
}

impl AllocEffort {
    fn flags(self) -> u32 {
        const RECLAIM: u32 =
            1 << bindings::___GFP_DIRECT_RECLAIM_BIT | 1 << bindings::___GFP_KSWAPD_RECLAIM_BIT;
        match self {
            Self::Full => bindings::GFP_KERNEL,
            Self::Light => RECLAIM | bindings::__GFP_NOWARN | 1 << bindings::___GFP_NORETRY_BIT,
        }
    }
}

/// Eight pages, neighbours if memory allows.
///
/// # Invariants
///
/// `pages` has [`PAGES`] of them.
pub(crate) struct PageBlock {
    pages: KVec<Page>,
    /// The domain whose data is in the block.
    domain: Option<u16>,
    /// The next block of a list.
    pub(in crate::linux) next: Option<KBox<PageBlock>>,
}

impl PageBlock {
    /// Allocates a block of zeroed pages. May sleep.
    pub(crate) fn new(effort: AllocEffort) -> Result<KBox<Self>> {
        let light = match effort {
            AllocEffort::Full => GFP_KERNEL,
            AllocEffort::Light => {
                kernel::alloc::flags::GFP_NOWAIT | kernel::alloc::flags::__GFP_NOWARN
            }
        };
        let mut block = KBox::new(
            Self {
                pages: KVec::with_capacity(PAGES, light)?,
                domain: None,
                next: None,
            },
            light,
        )?;
        let flags = effort.flags();
        let pages = &mut block.pages;
        let mut add = |page| push(pages, page);
        if alloc_run(flags, MAX_ORDER, &mut add).is_err() {
            for _ in 0..PAGES {
                alloc_run(flags, 0, &mut add)?;
            }
        }
        // INVARIANT: One run of eight, or eight of one.
        Ok(block)
    }

    pub(in crate::linux) fn pages(&self) -> &[Page] {
        &self.pages
    }

    /// Records that the block holds data of this domain alone from now on.
    pub(in crate::linux) fn give_to(&mut self, domain: u16) {
        if self
            .domain
            .replace(domain)
            .is_some_and(|before| before != domain)
        {
            self.pages.iter_mut().for_each(Page::clear);
        }
    }
}
