// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The port to the grant table: copies, maps and unmaps in batches.
//!
//! An operation is queued and carried out by the next `run_*`, which is one hypercall for all of
//! them. No operation may sleep on a lock that a guest holds; retries of `GNTST_eagain` (a page
//! paged out by the hypervisor) may sleep and are bounded.

use crate::ring::abi::RawSegment;
use crate::ring::numbers::{PageIndex, QueueTag};

/// Where the local side of a copy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Buffer {
    /// A data page.
    Page(PageIndex),
    /// A descriptor buffer for indirect segments; its number is below [`Grants::descriptor_buffers`].
    Descriptor(u8),
}

/// Direction of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyDirection {
    /// From the guest's page.
    FromGuest,
    /// Into the guest's page.
    ToGuest,
}

/// One copy between a granted page and a local one; offsets are the same on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copy {
    /// The request that the copy is for.
    pub tag: QueueTag,
    /// The guest's page.
    pub gref: u32,
    /// The local side.
    pub buffer: Buffer,
    /// Byte offset in both pages.
    pub offset: u16,
    /// Bytes, at most `4096 - offset`.
    pub len: u16,
    /// Direction.
    pub direction: CopyDirection,
}

/// Outcome of one map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapOutcome {
    /// Mapped; the handle is needed to unmap it.
    Mapped(u32),
    /// The guest's grant cannot be mapped.
    Refused,
    /// This domain has no room for more mappings; the copy path still works.
    NoSpace,
}

/// The port to the grant table of one guest.
pub trait Grants {
    /// Number of descriptor buffers, at least one.
    fn descriptor_buffers(&self) -> u8;

    /// The segments in a descriptor buffer: private memory, filled by what was last copied into it.
    fn descriptor(&self, buffer: u8) -> &[RawSegment];

    /// Queues a copy. Returns `false` and does nothing if the batch is full.
    fn queue_copy(&mut self, copy: &Copy) -> bool;

    /// Carries out the queued copies and names the request of each one that failed.
    fn run_copies(&mut self, failed: impl FnMut(QueueTag));

    /// Queues a map of `gref` at data page `page`. Returns `false` if the batch is full.
    fn queue_map(&mut self, tag: QueueTag, page: PageIndex, gref: u32, read_only: bool) -> bool;

    /// Carries out the queued maps and reports the outcome of each (request, page, outcome).
    fn run_maps(&mut self, outcome: impl FnMut(QueueTag, PageIndex, MapOutcome));

    /// Copies `len` bytes, whole words of eight, from the beginning of the guest's page that is mapped at `page` into a
    /// descriptor buffer. Reads each word once, because the guest may write to the page. Returns `false` if nothing is
    /// mapped there.
    fn read_mapped(&mut self, page: PageIndex, buffer: u8, len: u16) -> bool;

    /// Queues an unmap. Returns `false` if the batch is full.
    fn queue_unmap(&mut self, page: PageIndex, handle: u32) -> bool;

    /// Carries out the queued unmaps, and names the data page of each one that failed: the guest's page is still mapped
    /// there, so the caller must not map another one there. After a successful unmap the page is not the guest's any
    /// more.
    fn run_unmaps(&mut self, lost: impl FnMut(PageIndex));

    /// Returns true if the page, at which a guest's page is mapped, has another user, so that an unmap would wait.
    /// Network storage may hold it until it gives up a connection, even after the I/O has completed.
    fn is_held(&self, page: PageIndex) -> bool;

    /// Releases memory that only mappings need, after nothing has been mapped for a while; the next map allocates it
    /// again. May sleep, but not for I/O.
    fn nothing_is_mapped(&mut self) {}
}

impl<G: Grants> Grants for &mut G {
    #[inline]
    fn descriptor_buffers(&self) -> u8 {
        (**self).descriptor_buffers()
    }

    #[inline]
    fn descriptor(&self, buffer: u8) -> &[RawSegment] {
        (**self).descriptor(buffer)
    }

    #[inline]
    fn queue_copy(&mut self, copy: &Copy) -> bool {
        (**self).queue_copy(copy)
    }

    #[inline]
    fn run_copies(&mut self, failed: impl FnMut(QueueTag)) {
        (**self).run_copies(failed);
    }

    #[inline]
    fn queue_map(&mut self, tag: QueueTag, page: PageIndex, gref: u32, read_only: bool) -> bool {
        (**self).queue_map(tag, page, gref, read_only)
    }

    #[inline]
    fn run_maps(&mut self, outcome: impl FnMut(QueueTag, PageIndex, MapOutcome)) {
        (**self).run_maps(outcome);
    }

    #[inline]
    fn read_mapped(&mut self, page: PageIndex, buffer: u8, len: u16) -> bool {
        (**self).read_mapped(page, buffer, len)
    }

    #[inline]
    fn queue_unmap(&mut self, page: PageIndex, handle: u32) -> bool {
        (**self).queue_unmap(page, handle)
    }

    #[inline]
    fn run_unmaps(&mut self, lost: impl FnMut(PageIndex)) {
        (**self).run_unmaps(lost);
    }

    #[inline]
    fn is_held(&self, page: PageIndex) -> bool {
        (**self).is_held(page)
    }

    fn nothing_is_mapped(&mut self) {
        (**self).nothing_is_mapped();
    }
}
