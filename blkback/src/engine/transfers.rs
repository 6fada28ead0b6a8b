// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Transfers between the guest's pages and this domain's, in batches: copies, maps and unmaps of data, and copies of
//! the descriptors of indirect requests.

use crate::engine::backend::IoKind;
use crate::engine::mappings::{Mappings, Unused};
use crate::engine::requests::{PendingRequest, Requests, Slots};
use crate::engine::segments::Pool;
use crate::ring::grants::{Buffer, Copy, CopyDirection, Grants, MapOutcome};
use crate::ring::numbers::{PageIndex, QueueTag};
use crate::ring::request::Indirect;
use crate::ring::response::ResponseStatus;

/// An indirect request whose segments are being fetched.
#[derive(Clone, Copy, Debug)]
pub struct Fetch {
    pub(super) tag: QueueTag,
    pub(super) request: Indirect,
    /// The page at which the guest's page with the descriptors is mapped, so that the next request finds it.
    page: Option<PageIndex>,
}

/// The transfers of a queue. An operation is queued, and carried out at the latest by the next `run_*`;
/// one that fails fails its request.
#[derive(Debug)]
pub(crate) struct Transfers<'a, G> {
    pub(super) grants: G,
    pub(super) mappings: Mappings<'a>,
    fetches: &'a mut [Option<Fetch>],
    fetching: usize,
}

impl<'a, G: Grants> Transfers<'a, G> {
    pub(super) fn new(grants: G, mappings: Mappings<'a>, fetches: &'a mut [Option<Fetch>]) -> Self {
        Self {
            grants,
            mappings,
            fetches,
            fetching: 0,
        }
    }

    /// Returns true if descriptors are queued to be fetched.
    pub(super) fn is_fetching(&self) -> bool {
        self.fetching > 0
    }

    /// Returns true if nothing can be queued by [`Self::fetch`], nor read by [`Self::read_kept`], before
    /// [`Self::run_fetches`].
    pub(super) fn is_full(&self) -> bool {
        let room = usize::from(self.grants.descriptor_buffers()).min(self.fetches.len());
        self.fetching >= room
    }

    /// Queues the descriptors of a request.
    pub(super) fn fetch(&mut self, slots: &mut Slots<'_>, tag: QueueTag, request: &Indirect) {
        // CAST: below the number of descriptor buffers.
        let buffer = self.fetching as u8;
        for (gref, len) in request.descriptors() {
            let copy = Copy {
                tag,
                gref,
                buffer: Buffer::Descriptor(buffer),
                offset: 0,
                // CAST: at most 4096.
                len: len as u16,
                direction: CopyDirection::FromGuest,
            };
            self.queue_copy(slots, &copy);
        }
        if let Some(fetch) = self.fetches.get_mut(self.fetching) {
            *fetch = Some(Fetch {
                tag,
                request: *request,
                page: None,
            });
            self.fetching = self.fetching.wrapping_add(1);
        }
    }

    /// Carries out the fetches that [`Self::fetch`] has queued; `each` gets the requests with their raw segments.
    pub(super) fn run_fetches(
        &mut self,
        requests: &mut Requests<'_>,
        mut each: impl FnMut(&mut Requests<'_>, &Fetch, &G, u8),
    ) {
        self.run_copies(&mut requests.slots);
        let fetches = self.fetches.iter().take(self.fetching).flatten();
        for (buffer, fetch) in (0..=u8::MAX).zip(fetches) {
            each(requests, fetch, &self.grants, buffer);
        }
        if self.mappings.keeps() {
            self.keep_descriptors(&requests.slots);
        }
        self.fetching = 0;
    }

    /// Maps the pages of the descriptors that were fetched, and keeps them mapped: descriptors in a known page need no
    /// copy.
    #[cold]
    fn keep_descriptors(&mut self, slots: &Slots<'_>) {
        let (grants, mappings) = (&mut self.grants, &mut self.mappings);
        for fetch in self.fetches.iter_mut().take(self.fetching).flatten() {
            let is_well = slots
                .get(fetch.tag)
                .is_some_and(|request| request.status == ResponseStatus::Okay);
            let descriptor = fetch.request.descriptors().next();
            let Some((gref, _)) = descriptor.filter(|_| is_well) else {
                continue;
            };
            let Some(page) = mappings.reserve(gref) else {
                break;
            };
            if !grants.queue_map(fetch.tag, page, gref, false) {
                mappings.unreserve(page);
                break;
            }
            fetch.page = Some(page);
        }
        // No other map is queued, because data is mapped after all descriptors are fetched.
        grants.run_maps(|_, page, outcome| mappings.told(page, outcome));
        for at in 0..self.fetching {
            if let Some(Some(Fetch {
                page: Some(page), ..
            })) = self.fetches.get(at).copied()
            {
                self.let_go(page);
            }
        }
        // Unmaps the pages that were known already, or that no search would find.
        self.run_unmaps();
    }

    /// Reads the descriptors of a request at once, if their page is known; returns the buffer that holds them until
    /// others are fetched.
    pub(super) fn read_kept(&mut self, request: &Indirect) -> Option<u8> {
        let (gref, len) = request.descriptors().next()?;
        let page = self.mappings.find(gref)?;
        // CAST: below the number of descriptor buffers; at most 4096.
        let (buffer, len) = (self.fetching as u8, len as u16);
        let is_read = self.grants.read_mapped(page, buffer, len);
        self.let_go(page);
        is_read.then_some(buffer)
    }

    /// Queues the copies of a request's data.
    pub(super) fn copy(
        &mut self,
        requests: &mut Requests<'_>,
        tag: QueueTag,
        direction: CopyDirection,
    ) {
        let (slots, segments) = (&mut requests.slots, &requests.segments);
        let Some(&PendingRequest { head, count, .. }) = slots.get(tag) else {
            return;
        };
        for slice in segments.slices(head, count) {
            let copy = Copy {
                tag,
                gref: slice.gref,
                buffer: Buffer::Page(slice.page),
                offset: slice.offset,
                len: slice.len,
                direction,
            };
            self.queue_copy(slots, &copy);
        }
    }

    #[inline]
    fn queue_copy(&mut self, slots: &mut Slots<'_>, copy: &Copy) {
        if !self.grants.queue_copy(copy) {
            self.queue_copy_of_next_batch(slots, copy);
        }
    }

    #[cold]
    fn queue_copy_of_next_batch(&mut self, slots: &mut Slots<'_>, copy: &Copy) {
        self.run_copies(slots);
        if !self.grants.queue_copy(copy) {
            slots.fail(copy.tag);
        }
    }

    pub(super) fn run_copies(&mut self, slots: &mut Slots<'_>) {
        self.grants.run_copies(|tag| slots.fail(tag));
    }

    /// Gives each segment of a request the page at which the guest's page is, or will be by the next
    /// [`run_maps`](Self::run_maps).
    pub(super) fn map(&mut self, requests: &mut Requests<'_>, tag: QueueTag) {
        let Some(request) = requests.get(tag) else {
            return;
        };
        // A mapping that is kept serves later requests, which may be reads, so it is writable.
        let read_only = request.kind != IoKind::Read && !self.mappings.keeps();
        let (mut at, count) = (request.head, request.count);
        for _ in 0..count {
            let Some(gref) = requests.segments.gref(at) else {
                return;
            };
            let known = self.mappings.find(gref);
            let page = known.or_else(|| self.map_one(requests, tag, gref, read_only));
            let Some(page) = page else {
                requests.slots.fail_to_map(tag);
                return;
            };
            at = requests.segments.put_at(at, page);
        }
    }

    /// Queues the map of a guest page. `None` if there is no room for it.
    #[cold]
    fn map_one(
        &mut self,
        requests: &mut Requests<'_>,
        tag: QueueTag,
        gref: u32,
        read_only: bool,
    ) -> Option<PageIndex> {
        let page = self.mappings.reserve(gref)?;
        if !self.grants.queue_map(tag, page, gref, read_only) {
            self.run_maps(requests);
            if !self.grants.queue_map(tag, page, gref, read_only) {
                self.mappings.unreserve(page);
                return None;
            }
        }
        Some(page)
    }

    pub(super) fn run_maps(&mut self, requests: &mut Requests<'_>) {
        let (slots, mappings) = (&mut requests.slots, &mut self.mappings);
        self.grants.run_maps(|tag, page, outcome| {
            mappings.told(page, outcome);
            if let MapOutcome::Mapped(_) = outcome {
                return;
            }
            // A copy needs fewer rights of a grant than a mapping that is kept.
            if outcome == MapOutcome::NoSpace || mappings.keeps() {
                slots.fail_to_map(tag);
            } else {
                slots.refuse_to_map(tag);
            }
        });
    }

    /// Reports whether storage still holds a page of a request that is to be unmapped.
    #[inline]
    pub(super) fn is_held(&self, requests: &Requests<'_>, tag: QueueTag) -> bool {
        self.mappings.any_goes() && self.holds_page_of(requests, tag)
    }

    // A function of its own, so that the passes of a guest whose pages are kept stay short.
    #[inline(never)]
    fn holds_page_of(&self, requests: &Requests<'_>, tag: QueueTag) -> bool {
        let Some(request) = requests.get(tag) else {
            return false;
        };
        let mut pages = requests.segments.pages(request.head, request.count);
        pages.any(|page| self.mappings.goes(page) && self.grants.is_held(page))
    }

    /// Takes a request's pages from it, and queues the unmaps of those that are not kept.
    pub(super) fn unmap(&mut self, requests: &mut Requests<'_>, tag: QueueTag) {
        let (slots, segments) = (&requests.slots, &mut requests.segments);
        let (mut at, count) = match slots.get(tag) {
            Some(request) if request.pool == Pool::Map => (request.head, request.count),
            _ => return,
        };
        for _ in 0..count {
            let (page, next) = segments.take_page(at);
            at = next;
            if let Some(page) = page {
                self.let_go(page);
            }
        }
    }

    /// Releases a page from a segment, or from the read of descriptors there, and queues its unmap if it is not kept.
    #[inline]
    pub(super) fn let_go(&mut self, page: PageIndex) {
        if let Some(handle) = self.mappings.release(page) {
            self.queue_unmap(page, handle);
        }
    }

    /// Unmaps all kept pages that are not in use, and keeps no more pages before the next sweep.
    pub(super) fn make_room(&mut self) {
        if self.mappings.keeps() {
            self.sweep(true);
            self.mappings.set_short();
        }
    }

    /// Unmaps kept pages that were not used for a while, or with `all` those that are not in use.
    pub(super) fn sweep(&mut self, all: bool) {
        self.mappings.begin_sweep();
        let mut from = 0;
        while let Some(Unused { page, handle, next }) =
            (self.mappings).next_unused(from, all, |page| self.grants.is_held(page))
        {
            self.queue_unmap(page, handle);
            from = next;
        }
        self.run_unmaps();
        if self.mappings.is_empty() {
            self.grants.nothing_is_mapped();
        }
    }

    fn queue_unmap(&mut self, page: PageIndex, handle: u32) {
        if self.grants.queue_unmap(page, handle) {
            return;
        }
        self.carry_out_unmaps();
        // The batch is empty now and takes the operation.
        if !self.grants.queue_unmap(page, handle) {
            self.mappings.lost(page);
        }
    }

    fn carry_out_unmaps(&mut self) {
        let mappings = &mut self.mappings;
        self.grants.run_unmaps(|page| mappings.lost(page));
    }

    pub(super) fn run_unmaps(&mut self) {
        self.carry_out_unmaps();
        self.mappings.unmapped();
    }
}
