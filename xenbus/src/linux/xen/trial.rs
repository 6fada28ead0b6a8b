// SPDX-License-Identifier: GPL-2.0-only

//! A trial of whether Xen has room to map pages of a frontend.
//!
//! The kernel's own function for rings ends the device when a page cannot be mapped, whatever the reason is. One of
//! these reasons passes: Xen has one table for all pages that this domain has mapped, and it may be full of other
//! guests' pages.
//!
//! Wraps `gnttab_alloc_pages`, `gnttab_map_refs`, `gnttab_unmap_refs_sync` and `gnttab_free_pages`
//! (include/xen/grant_table.h).

use crate::linux::memory::vectors::filled;
use crate::linux::sys;
use core::mem::MaybeUninit;
use kernel::bindings;
use kernel::error::to_result;
use kernel::prelude::*;

/// Pages at which nothing is mapped.
///
/// # Invariants
///
/// `raw` has pages of `gnttab_alloc_pages` that were not freed, and null in other places.
struct UnmappedPages {
    raw: KVec<*mut bindings::page>,
}

impl UnmappedPages {
    /// Allocates `count` pages. May sleep.
    fn new(count: u32) -> Result<Self> {
        let mut raw = filled(core::ptr::null_mut(), count as usize)?;
        // SAFETY: `raw` has room for that number of pointers.
        to_result(unsafe { sys::gnttab_alloc_pages(count as i32, raw.as_mut_ptr()) })?;
        // INVARIANT: Just allocated.
        Ok(Self { raw })
    }
}

impl Drop for UnmappedPages {
    fn drop(&mut self) {
        for page in self.raw.iter_mut().filter(|page| !page.is_null()) {
            // SAFETY: By the type invariant the page may be freed; a page from which a guest's page was not taken away
            // is null here.
            unsafe { sys::gnttab_free_pages(1, page) };
        }
    }
}

/// Maps these pages of a domain and unmaps them again. May sleep.
///
/// # Errors
///
/// `ENOSPC` while Xen has no room for this number of mappings, and `ENOMEM`. A page that cannot be mapped for another
/// reason is no error here, because the kernel's function for rings reports it.
pub(super) fn map_once(domain: u16, refs: &[u32]) -> Result {
    let count = u32::try_from(refs.len()).map_err(|_| EINVAL)?;
    let mut places = UnmappedPages::new(count)?;
    let mut maps = filled(sys::GnttabMap::default(), refs.len())?;
    let mut unmaps: KVec<sys::GnttabUnmap> = KVec::with_capacity(refs.len(), GFP_KERNEL)?;
    let mut mapped: KVec<*mut bindings::page> = KVec::with_capacity(refs.len(), GFP_KERNEL)?;
    let mut data: KBox<MaybeUninit<sys::UnmapData>> = KBox::new_uninit(GFP_KERNEL)?;
    for ((op, page), gref) in maps.iter_mut().zip(places.raw.iter()).zip(refs) {
        // SAFETY: `op` is valid for writes and the page is one of ours.
        unsafe { sys::xbr_set_map_op(op, *page, sys::GNTMAP_HOST_MAP, *gref, domain) };
        // An operation that the hypervisor does not carry out must not look like a success.
        op.status = sys::GNTST_GENERAL_ERROR;
    }
    // SAFETY: There are as many pages as operations, and nothing is mapped at them.
    let _result = unsafe {
        sys::gnttab_map_refs(
            maps.as_mut_ptr(),
            core::ptr::null_mut(),
            places.raw.as_mut_ptr(),
            count,
        )
    };
    let is_full = maps
        .iter()
        .any(|op| op.status == sys::GNTST_NO_DEVICE_SPACE);
    for (op, page) in maps.iter().zip(places.raw.iter_mut()) {
        // Each operation has its own outcome (XSA-361).
        if op.status != sys::GNTST_OKAY {
            continue;
        }
        let mut unmap = sys::GnttabUnmap::default();
        // SAFETY: `unmap` is valid for writes, and the page has this mapping.
        unsafe { sys::xbr_set_unmap_op(&mut unmap, *page, op.handle) };
        unmap.status = sys::GNTST_GENERAL_ERROR;
        let is_queued = unmaps.push_within_capacity(unmap).is_ok()
            && mapped.push_within_capacity(*page).is_ok();
        if !is_queued {
            // Both have room for all. A page that stays mapped must not be freed.
            *page = core::ptr::null_mut();
        }
    }
    unmap_all(&mut unmaps, &mut mapped, &mut data, &mut places);
    match is_full {
        true => Err(ENOSPC),
        false => Ok(()),
    }
}

/// Unmaps the mapped pages. A page from which the guest's page cannot be taken away is never used again.
fn unmap_all(
    ops: &mut KVec<sys::GnttabUnmap>,
    mapped: &mut KVec<*mut bindings::page>,
    data: &mut MaybeUninit<sys::UnmapData>,
    places: &mut UnmappedPages,
) {
    if ops.is_empty() {
        return;
    }
    // SAFETY: Each operation names a mapping that was just made and that is unmapped once. The data is used by this call
    // only, which no other user of a page can delay, because no code but this has had the pages.
    let result = unsafe {
        sys::xbr_unmap_refs_sync(
            data.as_mut_ptr(),
            ops.as_mut_ptr(),
            mapped.as_mut_ptr(),
            ops.len() as u32,
        )
    };
    for (op, page) in ops.iter().zip(mapped.iter()) {
        if result == 0 && op.status == sys::GNTST_OKAY {
            continue;
        }
        kernel::pr_err_once!(
            "a page of a ring cannot be unmapped (status {}, {result}): it is never used again\n",
            op.status
        );
        for place in places.raw.iter_mut().filter(|place| *place == page) {
            *place = core::ptr::null_mut();
        }
    }
}
