// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The pages at which guest pages are mapped, and what is at each.
//!
//! A guest that offers persistent grants sends its data in the same pages again and again. Such a page stays
//! mapped when its request is done, and is found by its grant reference: a request all of whose pages are known
//! needs no hypercall. Of other guests a page is mapped for one segment of one request.
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
/// Mappings that are looked at to find one, at most: a guest that chooses its references so that they collide
/// has some of its pages copied.
const WALK: u32 = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    /// A guest's page is about to be mapped.
    Queued,
    /// It is there for the segments that have it now.
    Mapped,
    /// It is found by its grant reference, and stays.
    Kept,
    /// It could not be mapped; a request still names it.
    Failed,
    /// It is about to be unmapped.
    Leaving,
    /// A guest's page is there for ever: it could not be unmapped.
    Lost,
}

/// What is known of one page.
#[derive(Clone, Copy, Debug)]
pub struct Mapping {
    gref: u32,
    handle: u32,
    /// Segments whose data is there.
    users: u16,
    /// The next one of the list in which it is: of those that are kept, free, or leaving.
    next: u16,
    /// The first one of the list of those that are kept and whose grant reference leads here.
    head: u16,
    state: State,
    /// It was used since the last sweep but one.
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
        state: State::Free,
        used: false,
    };
}

/// A page that is to be unmapped because nobody uses it.
pub(crate) struct Unused {
    pub(crate) page: PageIndex,
    pub(crate) handle: u32,
    /// Where the sweep goes on.
    pub(crate) next: u16,
}

/// The pages of a queue at which guest pages are mapped.
///
/// # Invariants
///
/// - A mapping that is free or leaving is in the list of those, and in no other.
/// - One that is kept is in the list that its grant reference leads to, and none other with that reference is
///   before it there.
#[derive(Debug)]
pub(crate) struct Mappings<'a> {
    table: &'a mut [Mapping],
    /// The page of the first one.
    first: u16,
    free: u16,
    leaving: u16,
    /// Those that are found.
    kept: u16,
    keeps: bool,
    /// The hypervisor, or the table, had no room for one more since the last sweep.
    short: bool,
}

impl<'a> Mappings<'a> {
    /// For the pages from `first` on, one for each entry of `table`.
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
            short: false,
        };
        // Backwards, so that the first ones are used first.
        for at in (0..total).rev() {
            mappings.set_free(at);
        }
        mappings
    }

    /// Pages stay mapped when their requests are done.
    pub(crate) fn keeps(&self) -> bool {
        self.keeps
    }

    /// Pages that are kept, in use or not.
    pub(crate) fn kept(&self) -> u16 {
        self.kept
    }

    /// A sweep may find something to unmap, or have what there was no room for tried once more.
    pub(crate) fn wants_sweep(&self) -> bool {
        self.kept > 0 || self.short
    }

    /// Nothing is mapped, but for what is lost.
    pub(crate) fn is_empty(&self) -> bool {
        let is_empty = |at: &Mapping| matches!(at.state, State::Free | State::Lost);
        self.table.iter().all(is_empty)
    }

    /// Pages that no request uses, of those that are not lost.
    pub(crate) fn unused(&self) -> u16 {
        let unused = |at: &&Mapping| at.users == 0 && at.state != State::Lost;
        // CAST: there are fewer than 65536.
        self.table.iter().filter(unused).count() as u16
    }

    /// Pages that are not lost.
    pub(crate) fn sound(&self) -> u16 {
        let sound = |at: &&Mapping| at.state != State::Lost;
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
            mapping.state = State::Free;
            mapping.users = 0;
            mapping.next = next;
            self.free = at;
        }
    }

    /// The entry that has the head of the list in which a grant reference is found.
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

    /// The page at which a guest's page is mapped already, for one more segment.
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

    /// A page for a guest's page that is to be mapped for a segment.
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
        mapping.state = State::Queued;
        mapping.used = true;
        Some(self.page(at))
    }

    /// Nothing is mapped at a page that was reserved.
    pub(crate) fn unreserve(&mut self, page: PageIndex) {
        self.set_free(self.index(page));
    }

    /// What came of the map of a guest's page there.
    pub(crate) fn told(&mut self, page: PageIndex, outcome: MapOutcome) {
        match outcome {
            MapOutcome::Mapped(handle) => self.mapped(page, handle),
            MapOutcome::NoSpace => self.failed(page, true),
            MapOutcome::Refused => self.failed(page, false),
        }
    }

    /// A guest's page is there now.
    fn mapped(&mut self, page: PageIndex, handle: u32) {
        let at = self.index(page);
        let Some(mapping) = self.get_mut(at) else {
            return;
        };
        mapping.state = State::Mapped;
        mapping.handle = handle;
        let gref = mapping.gref;
        if self.keeps && !self.is_known(gref) {
            self.keep(at, gref);
        }
    }

    /// Two segments of one batch may name the same page: the second mapping is for its segment only.
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
        // Behind so many it would not be found.
        true
    }

    fn keep(&mut self, at: u16, gref: u32) {
        let next = self.head(gref);
        if let Some(mapping) = self.get_mut(at) {
            mapping.next = next;
            mapping.state = State::Kept;
            self.kept = self.kept.saturating_add(1);
            self.set_head(gref, at);
        }
    }

    /// One that is kept is not found any more.
    fn unkeep(&mut self, at: u16) {
        let Some(Mapping { gref, next, .. }) = self.get(at).copied() else {
            return;
        };
        let mut before = self.head(gref);
        if before == at {
            self.set_head(gref, next);
        } else {
            // No list is longer.
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
            mapping.state = State::Mapped;
            self.kept = self.kept.saturating_sub(1);
        }
    }

    /// A guest's page could not be mapped.
    fn failed(&mut self, page: PageIndex, is_full: bool) {
        self.short |= is_full;
        let at = self.index(page);
        match self.get_mut(at) {
            Some(mapping) if mapping.state == State::Queued => mapping.state = State::Failed,
            // It is there, but the call as a whole has failed.
            Some(mapping) if mapping.state == State::Kept => self.unkeep(at),
            _ => {}
        }
    }

    /// A segment is done with a page. If it is to be unmapped now: its handle. Whoever unmaps says so by
    /// [`unmapped`](Self::unmapped), and for each that he could not by [`lost`](Self::lost) before.
    #[inline]
    pub(crate) fn release(&mut self, page: PageIndex) -> Option<u32> {
        let at = self.index(page);
        let mapping = self.get_mut(at)?;
        mapping.users = mapping.users.saturating_sub(1);
        if mapping.users > 0 {
            return None;
        }
        match mapping.state {
            State::Mapped => Some(self.leave(at)),
            State::Failed => {
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
        mapping.state = State::Leaving;
        mapping.next = next;
        let handle = mapping.handle;
        self.leaving = at;
        handle
    }

    /// A page could not be unmapped, and is never used again.
    pub(crate) fn lost(&mut self, page: PageIndex) {
        let at = self.index(page);
        if let Some(mapping) = self.get_mut(at) {
            mapping.state = State::Lost;
        }
    }

    /// All that was to be unmapped is, unless it is lost.
    pub(crate) fn unmapped(&mut self) {
        let mut at = core::mem::replace(&mut self.leaving, END);
        while let Some(mapping) = self.get(at).copied() {
            if mapping.state == State::Leaving {
                self.set_free(at);
            }
            at = mapping.next;
        }
    }

    /// A sweep begins: what was short is tried once more.
    pub(crate) fn begin_sweep(&mut self) {
        self.short = false;
    }

    /// The next page of a sweep, from that entry on, that is kept and was not used since the last sweep, or that no
    /// request uses if `all` of those are meant. It is to be unmapped, as one that [`release`](Self::release) names.
    /// One that `is_held` by others is left for another sweep.
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
            if mapping.state == State::Kept && mapping.users == 0 {
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
