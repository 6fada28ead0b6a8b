// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The pages at which guest pages are mapped, and the state of each.
//!
//! A guest that offers persistent grants sends its data in the same pages again and again. Such a page stays mapped
//! when its request is done, and is found by its grant reference, so a request whose pages are all known needs no
//! hypercall. A page of any other guest is mapped for one segment of one request.
//!
//! ```text
//!        reserve           mapped                     release, the last one
//! Free ---------> Queued ---------> Mapped ------------------------------------> Leaving
//!  ^                |                 |  ^                                          |  |
//!  |  unreserve,    |         release |  | find               sweep: not used       |  | lost
//!  |  or failed and |                 v  |                    for a while           |  v
//!  |  released      |               idle (kept) ------------------------------------+  Lost
//!  +----------------+-------------------------------------------- unmapped ---------+
//! ```

use crate::ring::grants::MapOutcome;
use crate::ring::numbers::PageIndex;

/// The end of a list.
const END: u16 = u16::MAX;
/// Most mappings that a search looks at. A guest that chooses its grant references so that they collide has some of its
/// pages copied.
const WALK: u32 = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MappingState {
    Free,
    /// A guest's page is about to be mapped.
    Queued,
    /// The page is mapped for its current segments.
    Mapped,
    /// The page can be found by its grant reference, and stays mapped.
    Kept,
    /// The page could not be mapped; a request still names it.
    Failed,
    /// The page is about to be unmapped.
    Leaving,
    /// A guest's page is there for ever: it could not be unmapped.
    Lost,
}

/// State of one page.
#[derive(Clone, Copy, Debug)]
pub struct Mapping {
    gref: u32,
    handle: u32,
    /// Number of segments whose data is at the page.
    users: u16,
    /// The next mapping of the list that this one is in: kept, free, or leaving.
    next: u16,
    /// The first mapping of the list of kept ones whose grant references lead to this entry.
    head: u16,
    state: MappingState,
    /// A request has used the page since the last sweep that found it idle.
    used: bool,
}

impl Mapping {
    /// A page at which nothing is.
    pub const FREE: Self = Self {
        gref: 0,
        handle: 0,
        users: 0,
        next: END,
        head: END,
        state: MappingState::Free,
        used: false,
    };
}

/// A page that must be unmapped because no request uses it.
pub(crate) struct Unused {
    pub(crate) page: PageIndex,
    pub(crate) handle: u32,
    /// The entry from which the sweep continues.
    pub(crate) next: u16,
}

/// The pages of a queue at which guest pages are mapped.
///
/// # Invariants
///
/// - A mapping that is free or leaving is in the list of those, and in no other.
/// - A kept mapping is in the list that its grant reference leads to, and no other mapping with that reference is
///   before it there.
#[derive(Debug)]
pub(crate) struct Mappings<'a> {
    table: &'a mut [Mapping],
    /// The page of the first one.
    first: u16,
    free: u16,
    leaving: u16,
    /// Number of mappings in state [`Kept`](MappingState::Kept).
    kept: u16,
    /// Number of mappings in state [`Mapped`](MappingState::Mapped), which are unmapped with their request.
    going: u16,
    keeps: bool,
    /// The hypervisor, or the table, had no room for one more since the last sweep.
    short: bool,
}

impl<'a> Mappings<'a> {
    /// Makes the mappings for the pages from `first` on, one for each entry of `table`.
    pub(crate) fn new(table: &'a mut [Mapping], first: u16, keeps: bool) -> Self {
        table.fill(Mapping::FREE);
        let total = u16::try_from(table.len()).unwrap_or(END);
        let mut mappings = Self {
            keeps,
            table,
            first,
            free: END,
            leaving: END,
            kept: 0,
            going: 0,
            short: false,
        };
        // Backwards, so that the first ones are used first.
        for at in (0..total).rev() {
            mappings.set_free(at);
        }
        mappings
    }

    /// Reports whether pages stay mapped when their requests are done.
    pub(crate) fn keeps(&self) -> bool {
        self.keeps
    }

    /// Returns the number of pages that are kept, in use or not.
    pub(crate) fn kept(&self) -> u16 {
        self.kept
    }

    /// Reports whether a sweep may unmap a page, or permit mapping again after there was no room.
    pub(crate) fn wants_sweep(&self) -> bool {
        self.kept > 0 || self.short
    }

    /// Reports whether no page is mapped except lost ones.
    pub(crate) fn is_empty(&self) -> bool {
        let is_empty = |at: &Mapping| matches!(at.state, MappingState::Free | MappingState::Lost);
        self.table.iter().all(is_empty)
    }

    /// Returns the number of pages that no request uses, without lost ones.
    pub(crate) fn unused(&self) -> u16 {
        let unused = |at: &&Mapping| at.users == 0 && at.state != MappingState::Lost;
        // CAST: there are fewer than 65536.
        self.table.iter().filter(unused).count() as u16
    }

    /// Returns the number of pages that are not lost.
    pub(crate) fn sound(&self) -> u16 {
        let sound = |at: &&Mapping| at.state != MappingState::Lost;
        // CAST: there are fewer than 65536.
        self.table.iter().filter(sound).count() as u16
    }

    fn get(&self, at: u16) -> Option<&Mapping> {
        self.table.get(usize::from(at))
    }

    fn get_mut(&mut self, at: u16) -> Option<&mut Mapping> {
        self.table.get_mut(usize::from(at))
    }

    fn index(&self, page: PageIndex) -> u16 {
        page.number().wrapping_sub(self.first)
    }

    fn page(&self, at: u16) -> PageIndex {
        PageIndex::new(self.first.wrapping_add(at))
    }

    /// Puts one on the list of those that are free, whatever it was.
    fn set_free(&mut self, at: u16) {
        let next = self.free;
        if let Some(mapping) = self.get_mut(at) {
            mapping.state = MappingState::Free;
            mapping.users = 0;
            mapping.next = next;
            self.free = at;
        }
    }

    /// Returns the entry that holds the head of the list for a grant reference.
    #[inline]
    fn bucket(&self, gref: u32) -> usize {
        // References that follow one another are spread evenly (Knuth's multiplicative hash).
        let spread = u64::from(gref.wrapping_mul(0x9e37_79b1));
        // CAST: less than the number of entries.
        (spread.wrapping_mul(self.table.len() as u64) >> 32) as usize
    }

    #[inline]
    fn head(&self, gref: u32) -> u16 {
        let bucket = self.table.get(self.bucket(gref));
        bucket.map_or(END, |bucket| bucket.head)
    }

    fn set_head(&mut self, gref: u32, head: u16) {
        let bucket = self.bucket(gref);
        if let Some(bucket) = self.table.get_mut(bucket) {
            bucket.head = head;
        }
    }

    /// Finds the page at which a guest's page is mapped already, and counts one more segment that uses it.
    #[inline]
    pub(crate) fn find(&mut self, gref: u32) -> Option<PageIndex> {
        let mut at = self.head(gref);
        for _ in 0..WALK {
            let mapping = self.table.get_mut(usize::from(at))?;
            if mapping.gref == gref {
                mapping.users = mapping.users.wrapping_add(1);
                mapping.used = true;
                return Some(self.page(at));
            }
            at = mapping.next;
        }
        None
    }

    /// Reserves a page at which a guest's page is to be mapped for a segment. `None` if there is no room.
    pub(crate) fn reserve(&mut self, gref: u32) -> Option<PageIndex> {
        if self.keeps && self.short {
            return None;
        }
        let at = self.free;
        let Some(mapping) = self.table.get_mut(usize::from(at)) else {
            self.short = true;
            return None;
        };
        self.free = mapping.next;
        mapping.gref = gref;
        mapping.users = 1;
        mapping.state = MappingState::Queued;
        mapping.used = true;
        Some(self.page(at))
    }

    /// Gives back a reserved page at which nothing was mapped.
    pub(crate) fn unreserve(&mut self, page: PageIndex) {
        self.set_free(self.index(page));
    }

    /// Records the outcome of mapping a guest's page at a reserved page.
    pub(crate) fn told(&mut self, page: PageIndex, outcome: MapOutcome) {
        match outcome {
            MapOutcome::Mapped(handle) => self.mapped(page, handle),
            MapOutcome::NoSpace => self.failed(page, true),
            MapOutcome::Refused => self.failed(page, false),
        }
    }

    /// Records that a guest's page is mapped at `page`.
    fn mapped(&mut self, page: PageIndex, handle: u32) {
        let at = self.index(page);
        let Some(mapping) = self.get_mut(at) else {
            return;
        };
        mapping.state = MappingState::Mapped;
        mapping.handle = handle;
        let gref = mapping.gref;
        self.going = self.going.saturating_add(1);
        if self.keeps && !self.is_known(gref) {
            self.keep(at, gref);
        }
    }

    /// Reports whether a mapping of this grant reference is kept already. Two segments of one batch may name the same
    /// page; the second mapping is then for its segment only.
    fn is_known(&self, gref: u32) -> bool {
        let mut at = self.head(gref);
        for _ in 0..WALK {
            let Some(mapping) = self.get(at) else {
                return false;
            };
            if mapping.gref == gref {
                return true;
            }
            at = mapping.next;
        }
        // A search stops after `WALK` mappings, so one behind them would never be found.
        true
    }

    fn keep(&mut self, at: u16, gref: u32) {
        let next = self.head(gref);
        if let Some(mapping) = self.get_mut(at) {
            mapping.next = next;
            mapping.state = MappingState::Kept;
            self.kept = self.kept.saturating_add(1);
            self.going = self.going.saturating_sub(1);
            self.set_head(gref, at);
        }
    }

    /// Removes a kept mapping from the list of its grant reference.
    fn unkeep(&mut self, at: u16) {
        let Some(Mapping { gref, next, .. }) = self.get(at).copied() else {
            return;
        };
        let mut before = self.head(gref);
        if before == at {
            self.set_head(gref, next);
        } else {
            // No list is longer than that.
            for _ in 0..WALK {
                let Some(mapping) = self.get_mut(before) else {
                    break;
                };
                if mapping.next == at {
                    mapping.next = next;
                    break;
                }
                before = mapping.next;
            }
        }
        if let Some(mapping) = self.get_mut(at) {
            mapping.state = MappingState::Mapped;
            self.kept = self.kept.saturating_sub(1);
            self.going = self.going.saturating_add(1);
        }
    }

    /// Records that a guest's page could not be mapped.
    fn failed(&mut self, page: PageIndex, is_full: bool) {
        self.short |= is_full;
        let at = self.index(page);
        match self.get_mut(at) {
            Some(mapping) if mapping.state == MappingState::Queued => {
                mapping.state = MappingState::Failed
            }
            // The page is mapped, but the call as a whole has failed.
            Some(mapping) if mapping.state == MappingState::Kept => self.unkeep(at),
            _ => {}
        }
    }

    /// Reports whether any page is unmapped with its request. A guest whose pages are kept rarely has any, and its
    /// requests' pages then need not be checked.
    #[inline]
    pub(crate) fn any_goes(&self) -> bool {
        self.going > 0
    }

    /// Reports whether the page of a segment is unmapped with its request.
    #[inline]
    pub(crate) fn goes(&self, page: PageIndex) -> bool {
        let mapping = self.get(self.index(page));
        mapping.is_some_and(|mapping| mapping.state == MappingState::Mapped)
    }

    /// Releases a page from a segment. Returns the page's handle if it must be unmapped now. The caller then calls
    /// [`lost`](Self::lost) for each page that it could not unmap, and [`unmapped`](Self::unmapped) after that.
    #[inline]
    pub(crate) fn release(&mut self, page: PageIndex) -> Option<u32> {
        let at = self.index(page);
        let mapping = self.get_mut(at)?;
        mapping.users = mapping.users.saturating_sub(1);
        if mapping.users > 0 {
            return None;
        }
        match mapping.state {
            MappingState::Mapped => Some(self.leave(at)),
            MappingState::Failed => {
                self.set_free(at);
                None
            }
            _ => None,
        }
    }

    fn leave(&mut self, at: u16) -> u32 {
        let next = self.leaving;
        let Some(mapping) = self.get_mut(at) else {
            return 0;
        };
        mapping.state = MappingState::Leaving;
        mapping.next = next;
        let handle = mapping.handle;
        self.leaving = at;
        self.going = self.going.saturating_sub(1);
        handle
    }

    /// Records that a page could not be unmapped. It is never used again.
    pub(crate) fn lost(&mut self, page: PageIndex) {
        let at = self.index(page);
        if let Some(mapping) = self.get_mut(at) {
            mapping.state = MappingState::Lost;
        }
    }

    /// Frees the pages that were to be unmapped, except lost ones.
    pub(crate) fn unmapped(&mut self) {
        let mut at = core::mem::replace(&mut self.leaving, END);
        while let Some(mapping) = self.get(at).copied() {
            if mapping.state == MappingState::Leaving {
                self.set_free(at);
            }
            at = mapping.next;
        }
    }

    /// Maps nothing more to be kept before the next sweep.
    pub(crate) fn set_short(&mut self) {
        self.short = true;
    }

    /// Begins a sweep: permits mapping again after there was no room.
    pub(crate) fn begin_sweep(&mut self) {
        self.short = false;
    }

    /// Returns the next page of a sweep, from entry `from` on, that is kept and was not used since the last sweep; with
    /// `all`, the next kept page that no request uses. The caller must unmap it, as a page that
    /// [`release`](Self::release) returns. A page that storage still holds (`is_held`) is left for a later sweep.
    pub(crate) fn next_unused(
        &mut self,
        from: u16,
        all: bool,
        is_held: impl Fn(PageIndex) -> bool,
    ) -> Option<Unused> {
        let mut at = from;
        loop {
            let page = self.page(at);
            let mapping = self.get_mut(at)?;
            if mapping.state == MappingState::Kept && mapping.users == 0 {
                let used = core::mem::replace(&mut mapping.used, false);
                if (all || !used) && !is_held(page) {
                    break;
                }
            }
            at = at.checked_add(1)?;
        }
        self.unkeep(at);
        Some(Unused {
            handle: self.leave(at),
            page: self.page(at),
            next: at.saturating_add(1),
        })
    }
}
