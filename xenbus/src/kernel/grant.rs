// SPDX-License-Identifier: GPL-2.0-only

//! Grant copies, maps and unmaps in batches: the kernel's side of the engine's `Grants` port.

use super::pages::Pages;
use super::sys;
use crate::ring::abi::{RawSegment, PAGE_SIZE, SEGMENTS_PER_INDIRECT_PAGE};
use crate::ring::grants::{Buffer, Copy, CopyDirection, Grants, MapOutcome, Tag};
use kernel::prelude::*;
use kernel::sync::Arc;

/// Operations of one hypercall at most.
const BATCH: usize = 512;
/// Descriptor buffers.
const DESCRIPTORS: u8 = 16;

/// A batch of operations and what each is for.
struct Batch<Op, For> {
    ops: KVec<Op>,
    what: KVec<For>,
}

impl<Op, For> Batch<Op, For> {
    fn new() -> Result<Self> {
        Ok(Self {
            ops: KVec::with_capacity(BATCH, GFP_KERNEL)?,
            what: KVec::with_capacity(BATCH, GFP_KERNEL)?,
        })
    }

    /// Adds an operation; `false` if the batch is full. Allocates nothing.
    #[inline]
    fn push(&mut self, op: Op, what: For) -> bool {
        self.ops.len() < BATCH
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
    pages: Arc<Pages>,
    descriptors: Pages,
    copies: Batch<sys::GnttabCopy, Tag>,
    maps: Batch<sys::GnttabMap, (Tag, u16)>,
    map_pages: KVec<*mut kernel::bindings::page>,
    unmaps: Batch<sys::GnttabUnmap, u16>,
    unmap_pages: KVec<*mut kernel::bindings::page>,
}

// SAFETY: The raw page pointers are those of `pages`, which is `Send`.
unsafe impl Send for GuestGrants {}

impl GuestGrants {
    /// Reserves what the batches need. May sleep.
    pub(crate) fn new(domain: u16, pages: Arc<Pages>) -> Result<KBox<Self>> {
        let grants = Self {
            domain,
            pages,
            descriptors: Pages::new(u16::from(DESCRIPTORS), 0)?,
            copies: Batch::new()?,
            maps: Batch::new()?,
            map_pages: KVec::with_capacity(BATCH, GFP_KERNEL)?,
            unmaps: Batch::new()?,
            unmap_pages: KVec::with_capacity(BATCH, GFP_KERNEL)?,
        };
        Ok(KBox::new(grants, GFP_KERNEL)?)
    }

    /// Memory of the data pages, in KiB.
    pub(crate) fn memory_kib(&self) -> u64 {
        self.pages.memory_kib()
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
            // SAFETY: The page holds so many segments, any bytes are valid ones, and nothing
            // writes to it but `run_copies`, which needs `&mut self`.
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

    fn run_copies(&mut self, mut failed: impl FnMut(Tag)) {
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

    fn queue_map(&mut self, tag: Tag, page: u16, gref: u32, read_only: bool) -> bool {
        let Some(raw) = self.pages.page(page) else {
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
        self.maps.push(op, (tag, page)) && self.map_pages.push_within_capacity(raw).is_ok()
    }

    fn run_maps(&mut self, mut outcome: impl FnMut(Tag, u16, MapOutcome)) {
        let ops = &mut self.maps.ops;
        if ops.is_empty() {
            return;
        }
        // SAFETY: There are as many pages as operations; nothing is mapped at these pages, because
        // the segment table hands out a page once until it is unmapped.
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
            outcome(*tag, *page, what);
            if result != 0 {
                outcome(*tag, *page, MapOutcome::Refused);
            }
        }
        self.maps.clear();
        self.map_pages.clear();
    }

    fn queue_unmap(&mut self, page: u16, handle: u32) -> bool {
        let Some(raw) = self.pages.page(page) else {
            return false;
        };
        let mut op = sys::GnttabUnmap::default();
        // SAFETY: `op` is valid for writes and the page is one of ours.
        unsafe { sys::xbr_set_unmap_op(&mut op, raw, handle) };
        self.unmaps.push(op, page) && self.unmap_pages.push_within_capacity(raw).is_ok()
    }

    fn run_unmaps(&mut self) {
        let ops = &mut self.unmaps.ops;
        if ops.is_empty() {
            return;
        }
        // SAFETY: Each operation names a mapping that the engine got from `run_maps` and that it
        // unmaps once. The call waits until nobody else holds a page (network storage may).
        let result = unsafe {
            sys::xbr_unmap_refs_sync(
                ops.as_mut_ptr(),
                self.unmap_pages.as_mut_ptr(),
                ops.len() as u32,
            )
        };
        if result != 0 {
            kernel::pr_err_once!("unmapping guest pages failed ({result})\n");
        }
        self.unmaps.clear();
        self.unmap_pages.clear();
    }
}
