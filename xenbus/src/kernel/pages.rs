// SPDX-License-Identifier: GPL-2.0-only

//! The data pages of a queue.

use super::sys;
use core::ptr::NonNull;
use kernel::alloc::{Allocator, Vec};
use kernel::bindings;
use kernel::error::to_result;
use kernel::prelude::*;
use kernel::sync::Arc;

/// Pages with memory are allocated in blocks of up to `1 << MAX_ORDER`, so that the data of a large
/// request lies in few pieces. The page allocator counts larger blocks as expensive.
const MAX_ORDER: u32 = 3;

/// Pages with memory of our own, followed by pages without memory at which guest pages are mapped.
///
/// # Invariants
///
/// `all` holds the pages with memory, then `mappable` pages from `gnttab_alloc_pages`. Those with
/// memory are those of `own`, or some of `_arena`; `frames` holds the frame number of each.
pub(crate) struct Pages {
    all: KVec<*mut bindings::page>,
    frames: KVec<u64>,
    /// True for each page with memory that the next one adjoins, but for the last.
    joined: KVec<bool>,
    own: KVec<Page>,
    _arena: Option<Arc<Pages>>,
    mappable: usize,
}

// SAFETY: Pages may be used from any thread; who uses which is decided by the segment table.
unsafe impl Send for Pages {}
// SAFETY: As above.
unsafe impl Sync for Pages {}

/// A page that is ours.
///
/// # Invariants
///
/// It is valid, and one reference to it belongs to this object.
struct Page(NonNull<bindings::page>);

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::__free_pages(self.0.as_ptr(), 0) };
    }
}

/// Appends to a vector that was made large enough.
///
/// `KVec::push` would do, but the arithmetic with which it grows a vector can panic.
pub(crate) fn push<T, A: Allocator>(vec: &mut Vec<T, A>, value: T) -> Result {
    vec.push_within_capacity(value).map_err(|_| ENOMEM)
}

/// A vector of `count` equal values. May sleep.
pub(crate) fn filled<T: Copy>(value: T, count: usize) -> Result<KVec<T>> {
    let mut vec = KVec::with_capacity(count, GFP_KERNEL)?;
    for _ in 0..count {
        push(&mut vec, value)?;
    }
    Ok(vec)
}

impl Pages {
    /// Allocates `owned` zeroed pages and `mappable` pages without memory. May sleep.
    pub(crate) fn new(owned: u16, mappable: u16) -> Result<Self> {
        let total = usize::from(owned).saturating_add(usize::from(mappable));
        let mut pages = Self {
            all: KVec::with_capacity(total, GFP_KERNEL)?,
            frames: KVec::with_capacity(usize::from(owned), GFP_KERNEL)?,
            joined: KVec::new(),
            own: KVec::with_capacity(usize::from(owned), GFP_KERNEL)?,
            _arena: None,
            mappable: 0,
        };
        let mut left = usize::from(owned);
        let mut order = MAX_ORDER;
        while left > 0 {
            while order > 0 && left < 1usize.wrapping_shl(order) {
                order = order.wrapping_sub(1);
            }
            match pages.add_owned(order) {
                Ok(()) => left = left.saturating_sub(1usize.wrapping_shl(order)),
                // Memory is in pieces: smaller ones will do.
                Err(_) if order > 0 => order = order.wrapping_sub(1),
                Err(error) => return Err(error),
            }
        }
        pages.note_joined()?;
        pages.add_mappable(usize::from(mappable))?;
        Ok(pages)
    }

    /// `count` of the pages with memory of an arena, from `first` on, as the pages of a queue that
    /// maps nothing. The arena lives as long as they do. Who else uses the same pages is the
    /// caller's affair: an arena is shared by the queues of one disk, never by two disks. May sleep.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the arena has no such pages.
    pub(crate) fn part_of(arena: &Arc<Self>, first: u16, count: u16) -> Result<Self> {
        let (first, count) = (usize::from(first), usize::from(count));
        let end = first.saturating_add(count);
        let mut pages = Self {
            all: KVec::with_capacity(count, GFP_KERNEL)?,
            frames: KVec::with_capacity(count, GFP_KERNEL)?,
            joined: KVec::new(),
            own: KVec::new(),
            _arena: Some(arena.clone()),
            mappable: 0,
        };
        for frame in arena.frames.get(first..end).ok_or(EINVAL)? {
            push(&mut pages.frames, *frame)?;
        }
        // As many have memory as have a frame.
        for page in arena.all.get(first..end).ok_or(EINVAL)? {
            push(&mut pages.all, *page)?;
        }
        pages.note_joined()?;
        Ok(pages)
    }

    /// Adds `1 << order` zeroed pages that lie one behind the other.
    fn add_owned(&mut self, order: u32) -> Result {
        let flags = bindings::GFP_KERNEL | bindings::__GFP_ZERO;
        // Single pages are as good, so nobody shall suffer for a larger block.
        let lightly = bindings::__GFP_NOWARN | 1 << bindings::___GFP_NORETRY_BIT;
        let flags = if order == 0 { flags } else { flags | lightly };
        // SAFETY: Depends on its arguments alone, and may sleep.
        let block = unsafe { bindings::alloc_pages(flags, order) };
        let block = NonNull::new(block).ok_or(ENOMEM)?;
        // SAFETY: The pages were just allocated as one block of this order; from here on each of
        // them is freed alone.
        unsafe { bindings::split_page(block.as_ptr(), order) };
        let mut result = Ok(());
        for index in 0..1usize.wrapping_shl(order) {
            // SAFETY: The descriptors of the pages of a block lie one behind the other.
            let raw = unsafe { block.add(index) };
            // Even if there is no room: the rest of the block must be freed, too.
            // INVARIANT: The page has a reference of its own since the block was split.
            result = result.and(self.add_page(Page(raw)));
        }
        result
    }

    fn add_page(&mut self, page: Page) -> Result {
        let raw = page.0.as_ptr();
        // SAFETY: The page is valid.
        let frame = unsafe { sys::xbr_page_gfn(raw) };
        push(&mut self.own, page)?;
        push(&mut self.all, raw)?;
        push(&mut self.frames, frame as u64)
    }

    fn add_mappable(&mut self, count: usize) -> Result {
        if count == 0 {
            return Ok(());
        }
        let mut raw = filled(core::ptr::null_mut(), count)?;
        // SAFETY: `raw` has room for `count` pointers.
        to_result(unsafe { sys::gnttab_alloc_pages(count as i32, raw.as_mut_ptr()) })?;
        // INVARIANT: The pages follow those with memory.
        self.mappable = count;
        for page in raw {
            push(&mut self.all, page)?;
        }
        Ok(())
    }

    /// Memory of the pages that have some, in KiB.
    pub(crate) fn memory_kib(&self) -> u64 {
        (self.frames.len() as u64).wrapping_mul(4)
    }

    /// Number of pages with memory; they are the first ones.
    pub(crate) fn with_memory(&self) -> u16 {
        // CAST: the constructors take the number as one of 16 bits.
        self.frames.len() as u16
    }

    /// Number of all pages.
    pub(crate) fn len(&self) -> usize {
        self.all.len()
    }

    /// The pages with memory.
    pub(super) fn raw_with_memory(&self) -> &[*mut bindings::page] {
        self.all.get(..self.frames.len()).unwrap_or(&[])
    }

    /// The page of an index.
    pub(super) fn page(&self, index: u16) -> Option<*mut bindings::page> {
        self.all.get(usize::from(index)).copied()
    }

    /// The frame number of a page with memory.
    pub(super) fn frame(&self, index: u16) -> Option<u64> {
        self.frames.get(usize::from(index)).copied()
    }

    /// True if both pages have memory and `next` lies directly behind `page`, for this kernel and
    /// for the machine: then one transfer can go through both.
    pub(super) fn adjoin(&self, page: u16, next: u16) -> bool {
        page.checked_add(1) == Some(next) && self.joined.get(usize::from(page)) == Some(&true)
    }

    /// Notes which pages with memory adjoin the ones that follow them.
    fn note_joined(&mut self) -> Result {
        self.joined = KVec::with_capacity(self.frames.len(), GFP_KERNEL)?;
        let pairs = self.frames.iter().zip(self.frames.iter().skip(1));
        let raw = self.all.iter().zip(self.all.iter().skip(1));
        for ((frame, next_frame), (page, next)) in pairs.zip(raw) {
            let joined = frame.wrapping_add(1) == *next_frame && page.wrapping_add(1) == *next;
            push(&mut self.joined, joined)?;
        }
        Ok(())
    }

    /// The first byte of a page with memory.
    pub(super) fn bytes(&self, index: u16) -> Option<*const u8> {
        self.frames.get(usize::from(index))?;
        let page = self.page(index)?;
        // SAFETY: The page has memory, so by the type invariant it is valid, and on a 64-bit
        // kernel it is always mapped.
        Some(unsafe { sys::xbr_page_address(page) }.cast())
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if self.mappable == 0 {
            return;
        }
        if let Some(mappable) = self.all.get_mut(self.frames.len()..) {
            // SAFETY: By the type invariant these came from `gnttab_alloc_pages`. Nothing is
            // mapped there any more: whoever mapped has unmapped before it let go of the pages.
            unsafe { sys::gnttab_free_pages(mappable.len() as i32, mappable.as_mut_ptr()) };
        }
    }
}
