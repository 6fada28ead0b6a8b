// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The segment table: one entry for each data page of a queue, and some more.
//!
//! A request owns a chain of entries, one for each of its segments. The table has three pools: entries of pages with
//! this domain's memory, into which data is copied, each of which has the index of its page; entries for mapped guest
//! pages, which get a page when its place is known (`mappings`); and entries without a page, which keep the segments of
//! a request that is done piece by piece.
//!
//! Pages with memory come and go in blocks of eight neighbours (`blocks`). Nothing is allocated
//! here: a request that finds too little waits, or is done in pieces.

use crate::engine::blocks::{BlockGroup, PageBlocks, BLOCK};
use crate::ring::numbers::PageIndex;
use crate::ring::segment::GrantSegment;

/// The end of a chain.
const END: u16 = u16::MAX;

/// The pools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// Pages with memory: data is copied.
    Copy,
    /// Guest pages are mapped: the entries get their pages later.
    Map,
    /// No pages: the remaining segments of a request that is done in pieces.
    Rest,
}

/// Shares of the kinds of pages in a table. The entries behind both kinds have no pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableShape {
    /// Pages that can have memory; they are the first ones.
    pub copy: u16,
    /// Those of them that always have memory.
    pub own: u16,
    /// Pages at which guest pages are mapped; they follow.
    pub map: u16,
}

/// An entry of the table.
#[derive(Clone, Copy, Debug)]
pub struct SegmentEntry {
    segment: Option<GrantSegment>,
    next: u16,
    /// The page of its data.
    page: u16,
}

impl SegmentEntry {
    /// A free entry.
    pub const EMPTY: Self = Self {
        segment: None,
        next: END,
        page: END,
    };
}

/// A piece of a data page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The page.
    pub page: PageIndex,
    /// Grant reference of the guest's page.
    pub gref: u32,
    /// Byte offset in the page.
    pub offset: u16,
    /// Bytes, at most `4096 - offset`.
    pub len: u16,
}

/// Entries for one request: a chain of `count` with pages, and of `left` without behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) head: u16,
    pub(crate) count: u16,
    pub(crate) rest: u16,
    pub(crate) left: u16,
}

/// The segment table of a queue.
///
/// # Invariants
///
/// Every entry that is not free is in the chain of exactly one request.
#[derive(Debug)]
pub struct Segments<'a> {
    entries: &'a mut [SegmentEntry],
    copy: PageBlocks<'a>,
    map: Free,
    rest: Free,
}

#[derive(Clone, Copy, Debug)]
struct Free {
    head: u16,
    count: u16,
    capacity: u16,
}

impl<'a> Segments<'a> {
    /// Makes a table. `groups` has one for each 512 copy pages; at most 65534 entries are used.
    pub fn new(
        entries: &'a mut [SegmentEntry],
        groups: &'a mut [BlockGroup],
        shape: TableShape,
    ) -> Self {
        let empty = Free {
            head: END,
            count: 0,
            capacity: 0,
        };
        let total = u16::try_from(entries.len())
            .unwrap_or(END)
            .min(END.wrapping_sub(1));
        let copy = shape.copy.min(total);
        let mut table = Self {
            entries,
            copy: PageBlocks::new(groups, copy, shape.own),
            map: empty,
            rest: empty,
        };
        // Backwards, so that the first allocation gets the lowest pages.
        for index in (0..total).rev() {
            if let Some(entry) = table.entries.get_mut(usize::from(index)) {
                *entry = SegmentEntry {
                    page: if index < copy { index } else { END },
                    ..SegmentEntry::EMPTY
                };
            }
            let pool = match index {
                _ if index < copy => continue,
                _ if index < copy.saturating_add(shape.map) => Pool::Map,
                _ => Pool::Rest,
            };
            table.release(pool, index, 1);
        }
        table.map.capacity = table.map.count;
        table.rest.capacity = table.rest.count;
        table
    }

    /// Returns the number of entries that a pool can have in all.
    pub fn most(&self, pool: Pool) -> u16 {
        match pool {
            Pool::Copy => self.copy.most(),
            Pool::Map => self.map.capacity,
            Pool::Rest => self.rest.capacity,
        }
    }

    /// Returns the number of entries that a pool has now.
    pub fn capacity(&self, pool: Pool) -> u16 {
        match pool {
            Pool::Copy => self.copy.capacity(),
            _ => self.most(pool),
        }
    }

    /// Returns the number of free entries of a pool.
    pub fn free(&self, pool: Pool) -> u16 {
        match pool {
            Pool::Copy => self.copy.free(),
            Pool::Map => self.map.count,
            Pool::Rest => self.rest.count,
        }
    }

    /// Returns the blocks of pages with memory.
    pub(crate) fn blocks(&mut self) -> &mut PageBlocks<'a> {
        &mut self.copy
    }

    /// Takes a chain of `count` entries and returns its head.
    pub fn alloc(&mut self, pool: Pool, count: u16) -> Option<u16> {
        if count == 0 {
            return Some(END);
        }
        let entries = &mut *self.entries;
        match pool {
            Pool::Copy => alloc_pages(entries, &mut self.copy, count),
            Pool::Map => alloc_listed(entries, &mut self.map, count),
            Pool::Rest => alloc_listed(entries, &mut self.rest, count),
        }
    }

    /// Takes pages for `count` segments, and entries without a page for the `left` other segments of a request.
    pub(crate) fn alloc_in_part(&mut self, count: u16, left: u16) -> Option<Chain> {
        let rest = self.alloc(Pool::Rest, left)?;
        let Some(head) = self.alloc(Pool::Copy, count) else {
            self.release(Pool::Rest, rest, left);
            return None;
        };
        let mut last = head;
        for _ in 1..count {
            last = self.after(last);
        }
        if let Some(entry) = self.entries.get_mut(usize::from(last)) {
            entry.next = rest;
        }
        Some(Chain {
            head,
            count,
            rest,
            left,
        })
    }

    /// Gives a chain back to its pool.
    pub fn release(&mut self, pool: Pool, head: u16, count: u16) {
        if count == 0 {
            return;
        }
        let entries = &mut *self.entries;
        match pool {
            Pool::Copy => release_pages(entries, &mut self.copy, head, count),
            Pool::Map => release_listed(entries, &mut self.map, head, count),
            Pool::Rest => release_listed(entries, &mut self.rest, head, count),
        }
    }

    /// Puts a segment into entry `index` and returns the next entry of the chain.
    pub fn fill(&mut self, index: u16, segment: GrantSegment) -> u16 {
        match self.entries.get_mut(usize::from(index)) {
            Some(entry) => {
                entry.segment = Some(segment);
                entry.next
            }
            None => END,
        }
    }

    /// Returns the grant reference of an entry's segment, if it has one.
    pub(crate) fn gref(&self, index: u16) -> Option<u32> {
        Some(self.entries.get(usize::from(index))?.segment?.gref())
    }

    /// Puts a segment and its page into entry `index` of [`Pool::Map`] and returns the next entry of the chain.
    #[inline]
    pub(crate) fn fill_at(&mut self, index: u16, segment: GrantSegment, page: PageIndex) -> u16 {
        match self.entries.get_mut(usize::from(index)) {
            Some(entry) => {
                entry.segment = Some(segment);
                entry.page = page.number();
                entry.next
            }
            None => END,
        }
    }

    /// Stores the page of an entry of [`Pool::Map`] and returns the next entry of the chain.
    pub(crate) fn put_at(&mut self, index: u16, page: PageIndex) -> u16 {
        match self.entries.get_mut(usize::from(index)) {
            Some(entry) => {
                entry.page = page.number();
                entry.next
            }
            None => END,
        }
    }

    /// Takes the page of an entry of [`Pool::Map`] away, and returns the next entry of the chain as well.
    #[inline]
    pub(crate) fn take_page(&mut self, index: u16) -> (Option<PageIndex>, u16) {
        match self.entries.get_mut(usize::from(index)) {
            Some(entry) => {
                let page = core::mem::replace(&mut entry.page, END);
                ((page != END).then_some(PageIndex::new(page)), entry.next)
            }
            None => (None, END),
        }
    }

    /// Gives a chain of [`Pool::Map`] back to its pool, and each page of its entries to `each`.
    #[inline]
    pub(crate) fn release_mapped(
        &mut self,
        head: u16,
        count: u16,
        mut each: impl FnMut(PageIndex),
    ) {
        let (mut at, mut last) = (head, END);
        for _ in 0..count {
            let Some(entry) = self.entries.get_mut(usize::from(at)) else {
                return;
            };
            let page = core::mem::replace(&mut entry.page, END);
            last = core::mem::replace(&mut at, entry.next);
            if page != END {
                each(PageIndex::new(page));
            }
        }
        put_in_front(self.entries, &mut self.map, (head, last), count);
    }

    /// Returns the pages of `count` entries of a chain of [`Pool::Map`], without those that have none.
    pub(crate) fn pages(&self, head: u16, count: u16) -> impl Iterator<Item = PageIndex> + '_ {
        let mut index = head;
        (0..count).filter_map(move |_| {
            let entry = self.entries.get(usize::from(index))?;
            index = entry.next;
            (entry.page != END).then_some(PageIndex::new(entry.page))
        })
    }

    /// Returns the entry behind `index` in its chain.
    pub fn after(&self, index: u16) -> u16 {
        self.entries
            .get(usize::from(index))
            .map_or(END, |entry| entry.next)
    }

    /// Copies the segments of `count` entries of one chain into another. Returns the entry of the first chain that
    /// follows them.
    pub fn move_chain(&mut self, from: u16, to: u16, count: u16) -> u16 {
        let (mut from, mut to) = (from, to);
        for _ in 0..count {
            let Some(entry) = self.entries.get(usize::from(from)).copied() else {
                return END;
            };
            if let Some(target) = self.entries.get_mut(usize::from(to)) {
                target.segment = entry.segment;
                to = target.next;
            }
            from = entry.next;
        }
        from
    }

    /// Returns the sectors (512 bytes) of `count` segments of a chain.
    pub(crate) fn sectors(&self, head: u16, count: u16) -> u64 {
        let bytes = self.slices(head, count).map(|slice| u64::from(slice.len));
        bytes.fold(0, u64::wrapping_add) / 512
    }

    /// Returns the filled entries of a chain, in order.
    pub fn slices(&self, head: u16, count: u16) -> impl Iterator<Item = Slice> + '_ {
        let mut index = head;
        (0..count).filter_map(move |_| {
            let entry = self.entries.get(usize::from(index))?;
            index = entry.next;
            let segment = entry.segment?;
            Some(Slice {
                page: PageIndex::new(entry.page),
                gref: segment.gref(),
                // CAST: both are at most 4096 by the type's invariant.
                offset: segment.offset() as u16,
                len: segment.len() as u16,
            })
        })
    }
}

/// Takes `count` pages with memory, in as few runs of neighbours as there are.
fn alloc_pages(
    entries: &mut [SegmentEntry],
    blocks: &mut PageBlocks<'_>,
    count: u16,
) -> Option<u16> {
    if blocks.free() < count {
        return None;
    }
    if count == 1 {
        let page = blocks.take_page()?;
        entries.get_mut(usize::from(page))?.next = END;
        return Some(page);
    }
    let (mut head, mut last, mut left) = (END, END, count);
    while left > 0 {
        // There are as many free pages, so there is a run, and none is empty.
        let run = blocks.take_run(left)?;
        for page in run.pages() {
            match entries.get_mut(usize::from(last)) {
                Some(entry) => entry.next = page,
                None => head = page,
            }
            last = page;
        }
        left = left.saturating_sub(run.len);
    }
    entries.get_mut(usize::from(last))?.next = END;
    Some(head)
}

/// Gives the pages of a chain back, all of one block that follow one another at once.
fn release_pages(entries: &[SegmentEntry], blocks: &mut PageBlocks<'_>, head: u16, count: u16) {
    let (mut block, mut pages) = (head / BLOCK, 0u8);
    let mut page = head;
    for _ in 0..count {
        let Some(entry) = entries.get(usize::from(page)) else {
            break;
        };
        if page / BLOCK != block {
            blocks.release(block, core::mem::replace(&mut pages, 0));
            block = page / BLOCK;
        }
        pages |= 1u8.wrapping_shl(u32::from(page % BLOCK));
        page = entry.next;
    }
    blocks.release(block, pages);
}

fn alloc_listed(entries: &mut [SegmentEntry], free: &mut Free, count: u16) -> Option<u16> {
    if free.count < count {
        return None;
    }
    let head = free.head;
    let mut last = head;
    for _ in 1..count {
        last = entries.get(usize::from(last))?.next;
    }
    let entry = entries.get_mut(usize::from(last))?;
    free.head = core::mem::replace(&mut entry.next, END);
    free.count = free.count.wrapping_sub(count);
    Some(head)
}

fn release_listed(entries: &mut [SegmentEntry], free: &mut Free, head: u16, count: u16) {
    let mut last = head;
    for _ in 1..count {
        let Some(entry) = entries.get(usize::from(last)) else {
            return;
        };
        last = entry.next;
    }
    put_in_front(entries, free, (head, last), count);
}

/// Puts a chain of `count` entries, from the first to the last one, in front of those that are free.
#[inline]
fn put_in_front(entries: &mut [SegmentEntry], free: &mut Free, chain: (u16, u16), count: u16) {
    let (head, last) = chain;
    if let Some(entry) = entries.get_mut(usize::from(last)) {
        entry.next = free.head;
        free.head = head;
        free.count = free.count.wrapping_add(count);
    }
}
