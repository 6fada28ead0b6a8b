// SPDX-License-Identifier: GPL-2.0-only

//! Grant copies, maps and unmaps in batches: the kernel's side of the engine's `Grants` port.
//!
//! Wraps `gnttab_batch_copy`, `gnttab_map_refs` and `gnttab_unmap_refs_sync`
//! (include/xen/grant_table.h).

use crate::linux::memory::data::DataPages;
use crate::linux::memory::pages::Pages;
use crate::linux::memory::vectors::filled;
use crate::linux::sys;
use crate::ring::abi::{RawSegment, PAGE_SIZE, SEGMENTS_PER_INDIRECT_PAGE};
use crate::ring::grants::{Buffer, Copy, CopyDirection, Grants, MapOutcome};
use crate::ring::numbers::{PageIndex, QueueTag};
use core::mem::MaybeUninit;
use kernel::prelude::*;
use kernel::sync::Arc;

/// Most operations of one hypercall.
const BATCH: usize = 512;
/// Most maps or unmaps of one hypercall.
const MAPS: usize = 128;
/// Descriptor buffers, one for each request whose descriptors one hypercall fetches.
const DESCRIPTORS: u8 = 8;

/// Nothing is mapped at a page, and nothing is about to be.
const FREE: u32 = u32::MAX;
/// Something is about to be mapped at a page.
const QUEUED: u32 = u32::MAX - 1;
/// A guest's page is there for ever, because it could not be unmapped.
const LOST: u32 = u32::MAX - 2;

/// A batch of operations and the purpose of each.
struct Batch<Op, For> {
    ops: KVec<Op>,
    what: KVec<For>,
}

impl<Op, For> Batch<Op, For> {
    /// Makes a batch of up to `most` operations.
    fn new(most: usize) -> Result<Self> {
        Ok(Self {
            ops: KVec::with_capacity(most, GFP_KERNEL)?,
            what: KVec::with_capacity(most, GFP_KERNEL)?,
        })
    }

    const fn bytes(most: usize) -> usize {
        most.saturating_mul(size_of::<Op>().saturating_add(size_of::<For>()))
    }

    /// Adds an operation; `false` if the batch is full. Allocates nothing.
    #[inline]
    fn push(&mut self, op: Op, what: For) -> bool {
        self.ops.len() < self.what.capacity()
            && self.ops.push_within_capacity(op).is_ok()
            && self.what.push_within_capacity(what).is_ok()
    }

    fn clear(&mut self) {
        self.ops.clear();
        self.what.clear();
    }
}

/// The grants of one guest for one queue.
pub(crate) struct GuestGrants {
    domain: u16,
    pages: Arc<DataPages>,
    descriptors: Pages,
    copies: Batch<sys::GnttabCopy, QueueTag>,
    maps: Batch<sys::GnttabMap, (QueueTag, PageIndex)>,
    map_pages: KVec<*mut kernel::bindings::page>,
    unmaps: Batch<sys::GnttabUnmap, PageIndex>,
    unmap_pages: KVec<*mut kernel::bindings::page>,
    /// Not on the stack: the kernel puts a work in it.
    unmap_data: KBox<MaybeUninit<sys::UnmapData>>,
    /// For each page of `pages` at which guest pages are mapped: the handle of the mapping, [`FREE`], [`QUEUED`] or
    /// [`LOST`].
    handles: KVec<u32>,
}

// SAFETY: The raw page pointers are those of `pages`, which is `Send`.
unsafe impl Send for GuestGrants {}

impl GuestGrants {
    /// Allocates the batches. May sleep.
    pub(crate) fn new(domain: u16, pages: Arc<DataPages>) -> Result<KBox<Self>> {
        let mappable = usize::from(pages.mappable());
        let maps = MAPS.min(mappable);
        let grants = Self {
            domain,
            pages,
            descriptors: Pages::new(u16::from(DESCRIPTORS))?,
            copies: Batch::new(BATCH)?,
            maps: Batch::new(maps)?,
            map_pages: KVec::with_capacity(maps, GFP_KERNEL)?,
            unmaps: Batch::new(maps)?,
            unmap_pages: KVec::with_capacity(maps, GFP_KERNEL)?,
            unmap_data: KBox::new_uninit(GFP_KERNEL)?,
            handles: filled(FREE, mappable)?,
        };
        Ok(KBox::new(grants, GFP_KERNEL)?)
    }

    /// Returns the bytes of memory of this object if `mappable` pages can be mapped.
    pub(crate) const fn bytes(mappable: u16) -> usize {
        let page = size_of::<*mut kernel::bindings::page>();
        let most = if (mappable as usize) < MAPS {
            mappable as usize
        } else {
            MAPS
        };
        (DESCRIPTORS as usize)
            .saturating_mul(PAGE_SIZE)
            .saturating_add(Batch::<sys::GnttabCopy, QueueTag>::bytes(BATCH))
            .saturating_add(Batch::<sys::GnttabMap, (QueueTag, PageIndex)>::bytes(most))
            .saturating_add(Batch::<sys::GnttabUnmap, PageIndex>::bytes(most))
            .saturating_add(most.saturating_mul(page).saturating_mul(2))
            .saturating_add((mappable as usize).saturating_mul(size_of::<u32>()))
    }

    /// Returns the grant handle of a page at which guest pages are mapped.
    fn handle(&mut self, page: PageIndex) -> Option<&mut u32> {
        let index = self.pages.map_index(page)?;
        self.handles.get_mut(index)
    }

    fn frame(&self, buffer: Buffer) -> Option<u64> {
        match buffer {
            Buffer::Page(page) => self.pages.frame(page),
            Buffer::Descriptor(index) => self.descriptors.frame(u16::from(index)),
        }
    }
}

impl Grants for GuestGrants {
    fn descriptor_buffers(&self) -> u8 {
        DESCRIPTORS
    }

    fn descriptor(&self, buffer: u8) -> &[RawSegment] {
        const _: () = assert!(SEGMENTS_PER_INDIRECT_PAGE as usize * 8 == PAGE_SIZE);
        match self.descriptors.bytes(u16::from(buffer)) {
            // SAFETY: The page holds that number of segments, any bytes are valid ones, and nothing writes to it but
            // `run_copies` and `read_mapped`, which need `&mut self`.
            Some(bytes) => unsafe {
                core::slice::from_raw_parts(bytes.cast(), SEGMENTS_PER_INDIRECT_PAGE as usize)
            },
            None => &[],
        }
    }

    #[inline]
    fn queue_copy(&mut self, copy: &Copy) -> bool {
        let Some(frame) = self.frame(copy.buffer) else {
            return false;
        };
        let guest = sys::GnttabCopyPtr {
            u: u64::from(copy.gref),
            domid: self.domain,
            offset: copy.offset,
        };
        let local = sys::GnttabCopyPtr {
            u: frame,
            domid: sys::DOMID_SELF,
            offset: copy.offset,
        };
        let (source, dest, flags) = match copy.direction {
            CopyDirection::FromGuest => (guest, local, sys::GNTCOPY_SOURCE_GREF),
            CopyDirection::ToGuest => (local, guest, sys::GNTCOPY_DEST_GREF),
        };
        let op = sys::GnttabCopy {
            source,
            dest,
            len: copy.len,
            flags,
            status: 0,
        };
        self.copies.push(op, copy.tag)
    }

    fn run_copies(&mut self, mut failed: impl FnMut(QueueTag)) {
        let ops = &mut self.copies.ops;
        if ops.is_empty() {
            return;
        }
        // SAFETY: The operations are initialised; each local frame is a page that is ours, and
        // the engine lets offset and length stay inside it.
        unsafe { sys::gnttab_batch_copy(ops.as_mut_ptr(), ops.len() as u32) };
        for (op, tag) in ops.iter().zip(self.copies.what.iter()) {
            if op.status != sys::GNTST_OKAY {
                failed(*tag);
            }
        }
        self.copies.clear();
    }

    fn queue_map(&mut self, tag: QueueTag, page: PageIndex, gref: u32, read_only: bool) -> bool {
        // Only where no page is mapped: a page with memory of its own is no such place.
        if self.handle(page).is_none_or(|handle| *handle != FREE) {
            return false;
        }
        let Some(raw) = self.pages.map_page(page) else {
            self.pages.want_mappable();
            return false;
        };
        let flags = if read_only {
            sys::GNTMAP_HOST_MAP | sys::GNTMAP_READONLY
        } else {
            sys::GNTMAP_HOST_MAP
        };
        let mut op = sys::GnttabMap::default();
        // SAFETY: `op` is valid for writes and the page is one of ours.
        unsafe { sys::xbr_set_map_op(&mut op, raw, flags, gref, self.domain) };
        // 0 would mean success: an operation that is not carried out must not look like that.
        op.status = sys::GNTST_NO_DEVICE_SPACE;
        let queued =
            self.maps.push(op, (tag, page)) && self.map_pages.push_within_capacity(raw).is_ok();
        if let Some(handle) = self.handle(page).filter(|_| queued) {
            *handle = QUEUED;
        }
        queued
    }

    fn run_maps(&mut self, mut outcome: impl FnMut(QueueTag, PageIndex, MapOutcome)) {
        let ops = &mut self.maps.ops;
        if ops.is_empty() {
            return;
        }
        // SAFETY: There are as many pages as operations; nothing is mapped at these pages, which `queue_map` has
        // checked.
        let result = unsafe {
            sys::gnttab_map_refs(
                ops.as_mut_ptr(),
                core::ptr::null_mut(),
                self.map_pages.as_mut_ptr(),
                ops.len() as u32,
            )
        };
        for (op, (tag, page)) in ops.iter().zip(self.maps.what.iter()) {
            // Each operation has its own outcome (XSA-361); one that succeeded must be unmapped
            // even if the call as a whole failed.
            let what = match op.status {
                sys::GNTST_OKAY => MapOutcome::Mapped(op.handle),
                sys::GNTST_NO_DEVICE_SPACE => MapOutcome::NoSpace,
                _ => MapOutcome::Refused,
            };
            let now = match what {
                MapOutcome::Mapped(handle) => handle,
                _ => FREE,
            };
            let index = self.pages.map_index(*page);
            if let Some(handle) = index.and_then(|index| self.handles.get_mut(index)) {
                *handle = now;
            }
            outcome(*tag, *page, what);
            if result != 0 {
                outcome(*tag, *page, MapOutcome::Refused);
            }
        }
        self.maps.clear();
        self.map_pages.clear();
    }

    fn read_mapped(&mut self, page: PageIndex, buffer: u8, len: u16) -> bool {
        let is_mapped = self.handle(page).is_some_and(|handle| *handle < LOST);
        let from = self.pages.map_page(page).filter(|_| is_mapped);
        let to = self.descriptors.bytes(u16::from(buffer));
        let (Some(from), Some(to), true) = (from, to, usize::from(len) <= PAGE_SIZE) else {
            return false;
        };
        // SAFETY: The page is one of ours, and a guest's page is mapped at it, so it has an address.
        let from = unsafe { sys::xbr_page_address(from) }.cast::<u64>();
        let to = to.cast_mut().cast::<u64>();
        for word in 0..usize::from(len) / 8 {
            // SAFETY: Both pages have that number of words. The guest may write to its page at the same time: a
            // volatile access of one aligned word is never torn. Nothing else uses the other page while `self` is
            // borrowed mutably.
            unsafe { to.add(word).write(from.add(word).read_volatile()) };
        }
        true
    }

    fn queue_unmap(&mut self, page: PageIndex, handle: u32) -> bool {
        if self.handle(page).is_none_or(|mapped| *mapped != handle) {
            return false;
        }
        let Some(raw) = self.pages.map_page(page) else {
            return false;
        };
        let mut op = sys::GnttabUnmap::default();
        // SAFETY: `op` is valid for writes and the page is one of ours.
        unsafe { sys::xbr_set_unmap_op(&mut op, raw, handle) };
        // As for a map: an operation that is not carried out must not look like a success.
        op.status = sys::GNTST_GENERAL_ERROR;
        let queued =
            self.unmaps.push(op, page) && self.unmap_pages.push_within_capacity(raw).is_ok();
        if let Some(handle) = self.handle(page).filter(|_| queued) {
            // So that the page is unmapped once.
            *handle = QUEUED;
        }
        queued
    }

    fn run_unmaps(&mut self, mut lost: impl FnMut(PageIndex)) {
        let ops = &mut self.unmaps.ops;
        if ops.is_empty() {
            return;
        }
        // SAFETY: Each operation names a mapping that `run_maps` has made and that is unmapped once, which
        // `queue_unmap` has looked at. The data is used by this call only, which waits until no other user holds a page
        // (network storage may).
        let result = unsafe {
            sys::xbr_unmap_refs_sync(
                self.unmap_data.as_mut_ptr(),
                ops.as_mut_ptr(),
                self.unmap_pages.as_mut_ptr(),
                ops.len() as u32,
            )
        };
        for (op, page) in ops.iter().zip(self.unmaps.what.iter()) {
            let gone = result == 0 && op.status == sys::GNTST_OKAY;
            let index = self.pages.map_index(*page);
            if let Some(handle) = index.and_then(|index| self.handles.get_mut(index)) {
                *handle = if gone { FREE } else { LOST };
            }
            if !gone {
                kernel::pr_err_once!(
                    "a page of domain {} cannot be unmapped (status {}, {result}): it is never used \
                     again, and the domain stays until the host restarts\n",
                    self.domain,
                    op.status
                );
                self.pages.lose(*page);
                lost(*page);
            }
        }
        self.unmaps.clear();
        self.unmap_pages.clear();
    }

    fn is_held(&self, page: PageIndex) -> bool {
        let Some(page) = self.pages.map_page(page) else {
            return false;
        };
        // SAFETY: The page is one of ours.
        let count = unsafe { sys::xbr_page_count(page) };
        // One reference belongs to this module. `gnttab_unmap_refs_sync` waits for the end of any other.
        count > 1
    }

    fn nothing_is_mapped(&mut self) {
        self.free_pages();
    }
}

impl GuestGrants {
    /// Frees the pages for mappings, unless something is mapped.
    fn free_pages(&mut self) {
        let is_unused = |handle: &u32| matches!(*handle, FREE | LOST);
        if self.handles.iter().all(is_unused) {
            // SAFETY: Just checked: `handles` has the state of each page. Nothing is queued either, nor is I/O under
            // way, which has pages that are mapped.
            unsafe { self.pages.free_mappable() };
        }
    }
}

impl Drop for GuestGrants {
    fn drop(&mut self) {
        // The queue's thread has unmapped everything; if not, it is done here, because the pages are given back next.
        self.run_unmaps(|_| {});
        for index in 0..self.pages.mappable() {
            let page = PageIndex::new(self.pages.with_memory().wrapping_add(index));
            let handle = self.handle(page).map_or(FREE, |handle| *handle);
            if handle < LOST && !self.queue_unmap(page, handle) {
                self.run_unmaps(|_| {});
                let _queued = self.queue_unmap(page, handle);
            }
        }
        self.run_unmaps(|_| {});
    }
}
