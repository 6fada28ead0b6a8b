// SPDX-License-Identifier: GPL-2.0-only

//! The data pages of a queue, and the present place of each.
//!
//! Pages that have memory come first, then those at which guest pages are mapped. Memory comes and
//! goes in blocks while the queue is served: one thread changes the table, the same one that looks
//! things up in it for grant operations and bios.

use super::mappable::Mappable;
use super::page_blocks::{Page, PageBlock, PAGES};
use super::pages::Pages;
use super::vectors::push;
use crate::ring::abi::PAGE_SIZE;
use crate::ring::numbers::PageIndex;
use core::ops::Range;
use kernel::bindings;
use kernel::prelude::*;
use kernel::sync::atomic::{ordering::Relaxed, Atomic};
use kernel::sync::Arc;

/// Place of one page; both fields are 0 if it has no memory.
struct PagePlace {
    page: Atomic<usize>,
    frame: Atomic<u64>,
}

impl PagePlace {
    fn get(&self) -> (*mut bindings::page, u64) {
        let page = self.page.load(Relaxed) as *mut bindings::page;
        (page, self.frame.load(Relaxed))
    }
}

/// Returns a bit for each page of a block: set if the next page lies directly behind it, for this kernel and for the
/// machine.
fn joins(places: &[PagePlace]) -> u32 {
    let mut bits = 0;
    let pairs = places.iter().zip(places.iter().skip(1));
    for (at, (place, next)) in (0..PAGES as u32).zip(pairs) {
        let ((page, frame), next) = (place.get(), next.get());
        let adjoins = next == (page.wrapping_add(1), frame.wrapping_add(1));
        bits |= u32::from(adjoins).wrapping_shl(at);
    }
    bits
}

/// The data pages of a queue.
///
/// # Invariants
///
/// A page in `places` is valid as long as it is there: it belongs to `_arena`, or to the block that
/// the table's [`PageBacking`] has for it, which `joins` describes.
pub(crate) struct DataPages {
    places: KVec<PagePlace>,
    /// Result of [`joins`] for each block of pages.
    joins: KVec<Atomic<u32>>,
    mappable: Option<Arc<Mappable>>,
    _arena: Option<Arc<Pages>>,
}

// SAFETY: The places are atomic, and the other pages do not change.
unsafe impl Send for DataPages {}
// SAFETY: As above.
unsafe impl Sync for DataPages {}

impl DataPages {
    /// Makes a table for up to `with_memory` pages and `mappable` pages without memory, which has no page of either
    /// kind yet. May sleep.
    fn new(with_memory: u16, mappable: u16, arena: Option<Arc<Pages>>) -> Result<Self> {
        let count = usize::from(with_memory);
        let mut places = KVec::with_capacity(count, GFP_KERNEL)?;
        for _ in 0..count {
            let place = PagePlace {
                page: Atomic::new(0),
                frame: Atomic::new(0),
            };
            push(&mut places, place)?;
        }
        let mappable = (mappable > 0).then(|| Mappable::new(mappable));
        Ok(Self {
            places,
            joins: KVec::new(),
            mappable: mappable.transpose()?,
            _arena: arena,
        })
    }

    /// Makes a table of an arena's pages from `first` on, and of `mappable` pages without memory. The arena lives as
    /// long as the table. The caller decides which other users the pages have: the queues of one disk share an arena,
    /// two disks never do. May sleep.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the arena has no such pages.
    pub(crate) fn of_arena(
        arena: &Arc<Pages>,
        first: u16,
        count: u16,
        mappable: u16,
    ) -> Result<Self> {
        let end = first.checked_add(count).ok_or(EINVAL)?;
        let mut table = Self::new(count, mappable, Some(arena.clone()))?;
        for (place, index) in table.places.iter().zip(first..end) {
            let page = arena.raw().get(usize::from(index)).ok_or(EINVAL)?;
            // INVARIANT: The page is the arena's.
            place.page.store(page.addr(), Relaxed);
            place
                .frame
                .store(arena.frame(index).ok_or(EINVAL)?, Relaxed);
        }
        table.joins = KVec::with_capacity(usize::from(count).div_ceil(PAGES), GFP_KERNEL)?;
        for block in table.places.chunks(PAGES) {
            push(&mut table.joins, Atomic::new(joins(block)))?;
        }
        Ok(table)
    }

    /// Returns the bytes of a table for `with_memory` pages with memory.
    pub(crate) const fn bytes(with_memory: u16) -> usize {
        let joins = (with_memory as usize / PAGES).saturating_mul(size_of::<Atomic<u32>>());
        let places = (with_memory as usize).saturating_mul(size_of::<PagePlace>());
        places.saturating_add(joins)
    }

    /// Returns the number of pages that can have memory; they are the first ones.
    pub(crate) fn with_memory(&self) -> u16 {
        // CAST: the constructor takes the number as one of 16 bits.
        self.places.len() as u16
    }

    /// Returns the number of pages at which guest pages can be mapped.
    pub(crate) fn mappable(&self) -> u16 {
        self.mappable.as_ref().map_or(0, |pages| pages.count())
    }

    /// Returns the number of a page among those at which guest pages can be mapped.
    pub(in crate::linux) fn map_index(&self, index: PageIndex) -> Option<usize> {
        let at = index.number().checked_sub(self.with_memory())?;
        (at < self.mappable()).then_some(usize::from(at))
    }

    /// Returns a page at which a guest page can be mapped, if it is there now.
    #[inline]
    pub(in crate::linux) fn map_page(&self, index: PageIndex) -> Option<*mut bindings::page> {
        let at = index.number().checked_sub(self.with_memory())?;
        self.mappable.as_ref()?.get(usize::from(at))
    }

    /// Schedules the allocation of the pages at which guest pages can be mapped, if there are none. Does not sleep.
    pub(in crate::linux) fn want_mappable(&self) {
        if let Some(pages) = &self.mappable {
            pages.want();
        }
    }

    /// Frees the pages at which guest pages can be mapped.
    ///
    /// # Safety
    ///
    /// Nothing is mapped at one of them that was not lost, and no code uses one before [`map_page`](Self::map_page)
    /// gives it again.
    pub(in crate::linux) unsafe fn free_mappable(&self) {
        if let Some(pages) = &self.mappable {
            // SAFETY: The caller's promise.
            unsafe { pages.free() };
        }
    }

    /// Drops this page for good, because a guest's page cannot be taken from it.
    pub(in crate::linux) fn lose(&self, index: PageIndex) {
        if let (Some(at), Some(pages)) = (self.map_index(index), &self.mappable) {
            pages.lose(at);
        }
    }

    #[inline]
    fn place(&self, index: PageIndex) -> Option<(*mut bindings::page, u64)> {
        let (page, frame) = self.places.get(index.index())?.get();
        (!page.is_null()).then_some((page, frame))
    }

    /// Returns the frame number of a page with memory.
    #[inline]
    pub(in crate::linux) fn frame(&self, index: PageIndex) -> Option<u64> {
        Some(self.place(index)?.1)
    }

    /// Returns a page, and the number of bytes from its beginning on that lie one behind the other, for this kernel and
    /// for the machine, so that one transfer can cover them.
    #[inline]
    pub(in crate::linux) fn run(&self, index: PageIndex) -> Option<(*mut bindings::page, u32)> {
        let Some((page, _)) = self.place(index) else {
            // The memory behind a page at which a guest's page is mapped is not known.
            return Some((self.map_page(index)?, PAGE_SIZE as u32));
        };
        let block = index.index() / PAGES;
        let joins = self.joins.get(block).map_or(0, |word| word.load(Relaxed));
        let follow = joins
            .checked_shr(u32::from(index.number()) % PAGES as u32)
            .map_or(0, u32::trailing_ones);
        let pages = follow.wrapping_add(1);
        Some((page, pages.wrapping_mul(PAGE_SIZE as u32)))
    }
}

/// The memory behind a table of data pages. Only its owner can change the table.
pub(crate) struct PageBacking {
    table: Arc<DataPages>,
    blocks: KVec<Option<KBox<PageBlock>>>,
    domain: u16,
}

impl PageBacking {
    /// Makes a table for up to `with_memory` pages, in whole blocks, that hold data of `domain`. May sleep.
    pub(crate) fn new(domain: u16, with_memory: u16, mappable: u16) -> Result<Self> {
        let count = usize::from(with_memory) / PAGES;
        let mut blocks = KVec::with_capacity(count, GFP_KERNEL)?;
        for _ in 0..count {
            push(&mut blocks, None)?;
        }
        let mut table = DataPages::new(with_memory, mappable, None)?;
        table.joins = KVec::with_capacity(count, GFP_KERNEL)?;
        for _ in 0..count {
            push(&mut table.joins, Atomic::new(0))?;
        }
        Ok(Self {
            table: Arc::new(table, GFP_KERNEL)?,
            blocks,
            domain,
        })
    }

    /// Returns the table.
    pub(crate) fn table(&self) -> &Arc<DataPages> {
        &self.table
    }

    fn pages(index: u16) -> Range<usize> {
        let start = usize::from(index).wrapping_mul(PAGES);
        start..start.wrapping_add(PAGES)
    }

    /// Puts memory behind the pages of a block that has none.
    ///
    /// # Errors
    ///
    /// Returns the block if there is no such place, or if the place has memory.
    pub(crate) fn attach(
        &mut self,
        index: u16,
        mut block: KBox<PageBlock>,
    ) -> Result<(), KBox<PageBlock>> {
        let places = self.table.places.get(Self::pages(index));
        let word = self.table.joins.get(usize::from(index));
        let slot = self.blocks.get_mut(usize::from(index));
        let (Some(slot @ None), Some(places), Some(word)) = (slot, places, word) else {
            return Err(block);
        };
        block.give_to(self.domain);
        for (place, page) in places.iter().zip(block.pages()) {
            place.frame.store(Page::frame(page), Relaxed);
            // INVARIANT: The block is in `blocks` from here on.
            place.page.store(page.as_raw().addr(), Relaxed);
        }
        // INVARIANT: `joins` reads it from the pages.
        word.store(joins(places), Relaxed);
        *slot = Some(block);
        Ok(())
    }

    /// Takes back the memory of a block. No I/O uses it any more, because the engine's segment table gives a block back
    /// only when none of its pages belongs to a request.
    pub(crate) fn detach(&mut self, index: u16) -> Option<KBox<PageBlock>> {
        let places = self.table.places.get(Self::pages(index))?;
        let joins = self.table.joins.get(usize::from(index))?;
        let block = self.blocks.get_mut(usize::from(index))?.take()?;
        joins.store(0, Relaxed);
        for place in places {
            place.page.store(0, Relaxed);
            place.frame.store(0, Relaxed);
        }
        Some(block)
    }
}

impl Drop for PageBacking {
    fn drop(&mut self) {
        // Other owners may have the table for longer: they find no page in it any more.
        for word in &self.table.joins {
            word.store(0, Relaxed);
        }
        for place in &self.table.places {
            place.page.store(0, Relaxed);
            place.frame.store(0, Relaxed);
        }
    }
}
