// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The segment table: one entry for each data page of a queue.
//!
//! A request owns a chain of entries, one for each of its segments; entry and page have the same
//! index. The table has two pools: pages with memory of our own, into which data is copied, and
//! pages without memory, at which guest pages are mapped. Nothing is allocated after connect: a
//! request that finds its pool empty waits.

use crate::ring::segment::Segment;

/// The end of a chain.
const END: u16 = u16::MAX;

/// The two pools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// Pages with memory: data is copied.
    Copy,
    /// Pages without memory: guest pages are mapped.
    Map,
}

/// One entry of the table.
#[derive(Clone, Copy, Debug)]
pub struct SegmentEntry {
    segment: Option<Segment>,
    handle: Option<u32>,
    next: u16,
}

impl SegmentEntry {
    /// An entry that belongs to nobody.
    pub const EMPTY: Self = Self {
        segment: None,
        handle: None,
        next: END,
    };
}

/// A piece of a data page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Index of the page.
    pub page: u16,
    /// Grant reference of the guest's page.
    pub gref: u32,
    /// Byte offset in the page.
    pub offset: u16,
    /// Bytes, at most `4096 - offset`.
    pub len: u16,
    /// The mapping's handle, if the guest's page is mapped there.
    pub handle: Option<u32>,
}

/// The segment table of a queue.
///
/// # Invariants
///
/// Every entry is in exactly one chain: a pool's free chain or that of one request.
#[derive(Debug)]
pub struct Segments<'a> {
    entries: &'a mut [SegmentEntry],
    free: [Free; 2],
}

#[derive(Clone, Copy, Debug)]
struct Free {
    head: u16,
    count: u16,
    capacity: u16,
}

impl<'a> Segments<'a> {
    /// Makes a table whose first `copy` entries are of the copy pool, the others of the map pool.
    ///
    /// At most 65534 entries are used.
    pub fn new(entries: &'a mut [SegmentEntry], copy: u16) -> Self {
        let empty = Free {
            head: END,
            count: 0,
            capacity: 0,
        };
        let mut table = Self {
            entries,
            free: [empty; 2],
        };
        let total = u16::try_from(table.entries.len())
            .unwrap_or(END)
            .min(END.wrapping_sub(1));
        // Backwards, so that the first allocation gets the lowest pages: neighbours in memory.
        for index in (0..total).rev() {
            let pool = if index < copy { Pool::Copy } else { Pool::Map };
            if let Some(entry) = table.entries.get_mut(usize::from(index)) {
                *entry = SegmentEntry::EMPTY;
            }
            table.release(pool, index, 1);
            let free = table.pool_mut(pool);
            free.capacity = free.count;
        }
        table
    }

    fn pool(&self, pool: Pool) -> &Free {
        let [copy, map] = &self.free;
        match pool {
            Pool::Copy => copy,
            Pool::Map => map,
        }
    }

    fn pool_mut(&mut self, pool: Pool) -> &mut Free {
        let [copy, map] = &mut self.free;
        match pool {
            Pool::Copy => copy,
            Pool::Map => map,
        }
    }

    /// Entries that a pool has in all.
    pub fn capacity(&self, pool: Pool) -> u16 {
        self.pool(pool).capacity
    }

    /// Entries of a pool that are free.
    pub fn free(&self, pool: Pool) -> u16 {
        self.pool(pool).count
    }

    /// Takes a chain of `count` entries and returns its head.
    pub fn alloc(&mut self, pool: Pool, count: u16) -> Option<u16> {
        if count == 0 {
            return Some(END);
        }
        if self.pool(pool).count < count {
            return None;
        }
        let head = self.pool(pool).head;
        let mut last = head;
        for _ in 1..count {
            last = self.entries.get(usize::from(last))?.next;
        }
        let entry = self.entries.get_mut(usize::from(last))?;
        let rest = core::mem::replace(&mut entry.next, END);
        let free = self.pool_mut(pool);
        free.head = rest;
        free.count = free.count.wrapping_sub(count);
        Some(head)
    }

    /// Gives a chain back to its pool, in one piece: the request that gets it next finds pages in
    /// the same order, and neighbours in memory stay neighbours.
    pub fn release(&mut self, pool: Pool, head: u16, count: u16) {
        if count == 0 {
            return;
        }
        let mut last = head;
        for _ in 1..count {
            let Some(entry) = self.entries.get(usize::from(last)) else {
                return;
            };
            last = entry.next;
        }
        let free = self.pool(pool).head;
        let Some(entry) = self.entries.get_mut(usize::from(last)) else {
            return;
        };
        entry.next = free;
        let free = self.pool_mut(pool);
        free.head = head;
        free.count = free.count.wrapping_add(count);
    }

    /// Puts a segment into entry `index` and returns the next entry of the chain.
    pub fn fill(&mut self, index: u16, segment: Segment) -> u16 {
        match self.entries.get_mut(usize::from(index)) {
            Some(entry) => {
                entry.segment = Some(segment);
                entry.next
            }
            None => END,
        }
    }

    /// Records or forgets the mapping at a page.
    pub fn set_handle(&mut self, page: u16, handle: Option<u32>) {
        if let Some(entry) = self.entries.get_mut(usize::from(page)) {
            entry.handle = handle;
        }
    }

    /// The mapping at a page, if there is one.
    pub fn handle(&self, page: u16) -> Option<u32> {
        self.entries.get(usize::from(page))?.handle
    }

    /// The entry behind `page` in its chain.
    pub fn after(&self, page: u16) -> u16 {
        self.entries
            .get(usize::from(page))
            .map_or(END, |entry| entry.next)
    }

    /// Copies the segments of one chain into another of the same length.
    pub fn move_chain(&mut self, from: u16, to: u16, count: u16) {
        let (mut from, mut to) = (from, to);
        for _ in 0..count {
            let Some(entry) = self.entries.get(usize::from(from)).copied() else {
                return;
            };
            if let Some(target) = self.entries.get_mut(usize::from(to)) {
                target.segment = entry.segment;
                to = target.next;
            }
            from = entry.next;
        }
    }

    /// The filled entries of a chain, in order.
    pub fn slices(&self, head: u16, count: u16) -> impl Iterator<Item = Slice> + '_ {
        let mut index = head;
        (0..count).filter_map(move |_| {
            let page = index;
            let entry = self.entries.get(usize::from(page))?;
            index = entry.next;
            let segment = entry.segment?;
            Some(Slice {
                page,
                gref: segment.gref(),
                // CAST: both are at most 4096 by the type's invariant.
                offset: segment.offset() as u16,
                len: segment.len() as u16,
                handle: entry.handle,
            })
        })
    }
}
