// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The pages with memory that are free, in blocks of eight neighbours.
//!
//! Memory comes and goes in whole blocks, and a request gets whole blocks where possible, because small requests share
//! the blocks that are in use already. So after any sequence of requests the pages of a large one lie in few pieces,
//! and unused blocks become free as a whole.

/// Pages of a block.
pub const BLOCK: u16 = 8;
/// The bits of a block whose pages are all free.
const ALL: u8 = u8::MAX;
/// Blocks of a group.
const GROUP: u16 = 64;
/// Broken blocks beyond the first that are searched for a run before a whole block is broken.
const TRIES: u32 = 3;

/// State of 64 blocks: one bit, or one byte of bits, for each.
#[derive(Clone, Copy, Debug)]
pub struct BlockGroup {
    /// Has memory.
    present: u64,
    /// All pages are free.
    whole: u64,
    /// Some pages are free.
    broken: u64,
    /// The free pages of each block.
    free: [u8; GROUP as usize],
}

impl BlockGroup {
    /// Blocks without memory.
    pub const EMPTY: Self = Self {
        present: 0,
        whole: 0,
        broken: 0,
        free: [0; GROUP as usize],
    };

    /// Returns the number of groups for `pages` pages.
    pub const fn needed(pages: u16) -> usize {
        pages.div_ceil(BLOCK * GROUP) as usize
    }

    /// Records which pages of a block are free.
    fn set(&mut self, index: u32, free: u8) {
        let bit = 1u64.wrapping_shl(index);
        self.whole &= !bit;
        self.broken &= !bit;
        match free {
            0 => {}
            ALL => self.whole |= bit,
            _ => self.broken |= bit,
        }
        if let Some(entry) = self.free.get_mut(index as usize) {
            *entry = free;
        }
    }

    fn free(&self, index: u32) -> u8 {
        self.free.get(index as usize).copied().unwrap_or(0)
    }
}

/// Neighbouring pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageRun {
    first: u16,
    pub(crate) len: u16,
}

impl PageRun {
    pub(crate) fn pages(self) -> impl Iterator<Item = u16> {
        self.first..self.first.saturating_add(self.len)
    }
}

/// The pages with memory of a queue.
#[derive(Debug)]
pub(crate) struct PageBlocks<'a> {
    groups: &'a mut [BlockGroup],
    most: u16,
    own: u16,
    capacity: u16,
    free: u16,
    /// The least number of free pages since [`reset_low`](Self::reset_low).
    low: u16,
    /// The block from which a page was taken last.
    last: u16,
}

/// Returns a block's group, and its number in that group.
fn place(block: u16) -> (usize, u32) {
    (usize::from(block / GROUP), u32::from(block % GROUP))
}

fn number(group: usize, index: u32) -> u16 {
    // CAST: a table has fewer than 65536 pages, and so 8192 blocks.
    (group as u16)
        .wrapping_mul(GROUP)
        .wrapping_add(index as u16)
}

impl<'a> PageBlocks<'a> {
    /// Makes a table of up to `most` pages, of which the first `own` always have memory.
    pub(crate) fn new(groups: &'a mut [BlockGroup], most: u16, own: u16) -> Self {
        groups.fill(BlockGroup::EMPTY);
        let mut blocks = Self {
            groups,
            most,
            own: own.min(most),
            capacity: 0,
            free: 0,
            low: 0,
            last: 0,
        };
        for block in 0..blocks.own.div_ceil(BLOCK) {
            let pages = blocks.own.saturating_sub(block.saturating_mul(BLOCK));
            blocks.add(block, pages.min(BLOCK));
        }
        blocks.low = blocks.free;
        blocks
    }

    pub(crate) fn most(&self) -> u16 {
        self.most
    }

    pub(crate) fn capacity(&self) -> u16 {
        self.capacity
    }

    pub(crate) fn free(&self) -> u16 {
        self.free
    }

    /// Returns the number of pages with memory beyond the queue's own.
    pub(crate) fn borrowed(&self) -> u16 {
        self.capacity.saturating_sub(self.own)
    }

    /// Returns the least number of free pages since the last call.
    pub(crate) fn reset_low(&mut self) -> u16 {
        core::mem::replace(&mut self.low, self.free)
    }

    fn add(&mut self, block: u16, pages: u16) {
        let (group, index) = place(block);
        if let Some(group) = self.groups.get_mut(group) {
            group.present |= 1u64.wrapping_shl(index);
            group.set(
                index,
                ALL.checked_shr(u32::from(BLOCK.wrapping_sub(pages)))
                    .unwrap_or(0),
            );
            self.capacity = self.capacity.saturating_add(pages);
            self.free = self.free.saturating_add(pages);
        }
    }

    /// Returns the first block that could have memory and has none.
    pub(crate) fn first_absent(&self) -> Option<u16> {
        // A last block of fewer than eight pages is either one of the own blocks or never has memory.
        let total = self.most / BLOCK;
        let mut groups = (0..self.groups.len()).zip(self.groups.iter());
        let (group, index) = groups.find_map(|(at, group)| {
            let absent = !group.present;
            (absent != 0).then(|| (at, absent.trailing_zeros()))
        })?;
        Some(number(group, index)).filter(|block| *block < total)
    }

    /// Records that a block has memory now.
    pub(crate) fn attached(&mut self, block: u16) {
        self.add(block, BLOCK);
    }

    /// Takes the memory from the last block beyond the own ones that has no page in use, and returns the block's
    /// number.
    pub(crate) fn detach(&mut self) -> Option<u16> {
        let own = self.own.div_ceil(BLOCK);
        let count = self.groups.len();
        let mut groups = (0..count).rev();
        let at = groups.find(|at| self.groups.get(*at).is_some_and(|group| group.whole != 0))?;
        let group = self.groups.get_mut(at)?;
        let index = 63u32.wrapping_sub(group.whole.leading_zeros());
        let block = number(at, index);
        if block < own {
            return None;
        }
        group.set(index, 0);
        group.present &= !1u64.wrapping_shl(index);
        self.capacity = self.capacity.saturating_sub(BLOCK);
        self.free = self.free.saturating_sub(BLOCK);
        self.low = self.low.min(self.free);
        Some(block)
    }

    /// Takes neighbouring pages, at most `wanted`; `None` if no page is free.
    pub(crate) fn take_run(&mut self, wanted: u16) -> Option<PageRun> {
        let (block, mask) = self.find_run(wanted)?;
        let (group, index) = place(block);
        let group = self.groups.get_mut(group)?;
        let free = group.free(index);
        group.set(index, free & !mask);
        // CAST: at most 8.
        let (start, len) = (mask.trailing_zeros() as u16, mask.count_ones() as u16);
        self.took(len);
        let first = block.wrapping_mul(BLOCK).wrapping_add(start);
        Some(PageRun { first, len })
    }

    /// Returns a block, and the bits of its pages to take.
    fn find_run(&self, wanted: u16) -> Option<(u16, u8)> {
        if wanted < BLOCK {
            if let Some(found) = self.broken_with(wanted) {
                return Some(found);
            }
        }
        match self.first_whole() {
            Some(block) => Some((block, low_bits(wanted))),
            None => self.first_broken(),
        }
    }

    /// Takes one page, from the block from which the last one came if it has more.
    #[inline]
    pub(crate) fn take_page(&mut self) -> Option<u16> {
        let (group, index) = place(self.last);
        let free = self.groups.get(group).map_or(0, |group| group.free(index));
        if free == 0 || free == ALL {
            let run = self.take_run(1)?;
            self.last = run.first / BLOCK;
            return Some(run.first);
        }
        let page = free.trailing_zeros();
        let rest = free & free.wrapping_sub(1);
        self.groups.get_mut(group)?.set(index, rest);
        self.took(1);
        // CAST: below 8.
        Some(self.last.wrapping_mul(BLOCK).wrapping_add(page as u16))
    }

    fn took(&mut self, pages: u16) {
        self.free = self.free.saturating_sub(pages);
        self.low = self.low.min(self.free);
    }

    /// Gives pages of one block back, by the block's number and their bits.
    #[inline]
    pub(crate) fn release(&mut self, block: u16, pages: u8) {
        let (group, index) = place(block);
        if let Some(group) = self.groups.get_mut(group) {
            let free = group.free(index);
            group.set(index, free | pages);
            // CAST: at most 8.
            let count = (pages & !free).count_ones() as u16;
            self.free = self.free.saturating_add(count);
        }
    }

    fn first_whole(&self) -> Option<u16> {
        let mut groups = (0..self.groups.len()).zip(self.groups.iter());
        groups.find_map(|(at, group)| {
            (group.whole != 0).then(|| number(at, group.whole.trailing_zeros()))
        })
    }

    /// Finds a broken block with `wanted` free neighbours among the first few broken ones.
    fn broken_with(&self, wanted: u16) -> Option<(u16, u8)> {
        let mut tries = TRIES;
        for (at, group) in (0..self.groups.len()).zip(self.groups.iter()) {
            let mut broken = group.broken;
            while broken != 0 {
                let index = broken.trailing_zeros();
                let starts = runs(group.free(index), wanted);
                if starts != 0 {
                    let mask = low_bits(wanted).wrapping_shl(starts.trailing_zeros());
                    return Some((number(at, index), mask));
                }
                tries = tries.checked_sub(1)?;
                broken &= broken.wrapping_sub(1);
            }
        }
        None
    }

    /// Returns the first free run of the first broken block.
    fn first_broken(&self) -> Option<(u16, u8)> {
        let mut groups = (0..self.groups.len()).zip(self.groups.iter());
        groups.find_map(|(at, group)| {
            if group.broken == 0 {
                return None;
            }
            let index = group.broken.trailing_zeros();
            let free = group.free(index);
            let start = free.trailing_zeros();
            let len = free.checked_shr(start)?.trailing_ones();
            // CAST: at most 8.
            let mask = low_bits(len as u16).wrapping_shl(start);
            Some((number(at, index), mask))
        })
    }
}

/// Returns the bits at which runs of `wanted` free neighbours begin.
fn runs(free: u8, wanted: u16) -> u8 {
    (1..wanted).fold(free, |starts, _| starts & starts >> 1)
}

/// Returns a mask of the lowest `count` bits, at most 8.
fn low_bits(count: u16) -> u8 {
    ALL.checked_shr(u32::from(BLOCK.saturating_sub(count)))
        .unwrap_or(0)
}
