// SPDX-License-Identifier: GPL-2.0-only

//! Passthrough: requests that a queue executes itself, in a block device or a file behind the disk, without the
//! process.
//!
//! The data is where it is for a process: in the arena, at the places (segments) that the queue has stored before the
//! request was posted, and which no process can change. So a request can go to the process after all. The process can
//! change the data there at any time, which affects only its own disk.
//!
//! If the guest grants persistently, the data may also be in the guest's pages, which are mapped; then it is not
//! copied. No process ever sees such a request: if the queue cannot begin it, or it fails, the queue gives it back to
//! the engine, which brings the data to the arena.

use super::disk::{BackingTable, DiskInner, TapDisk, BATCH};
use super::express::{ExpressSignal, QueueExpress};
use super::queue_slice::QueueSlice;
use crate::engine::segments::Segments;
use crate::engine::{Io, IoKind};
use crate::linux::block::bio::{self, Inflight, Operation, PagePiece};
use crate::linux::block::storage::DiskStorage;
use crate::linux::memory::data::DataPages;
use crate::linux::memory::vectors::push;
use crate::linux::task::wake_event::WakeEvent;
use crate::memory::Lease;
use crate::ring::abi::PAGE_SIZE;
use crate::ring::numbers::{PageIndex, QueueTag};
use crate::ring::response::ResponseStatus;
use crate::ring::tap::abi::{self, TapSegment};
use crate::ring::tap::extent::{BackingNumber, ExtentAccess};
use crate::ring::tap::shadow::passthrough::{RequestPart, Start, MAX_PARTS};
use core::pin::Pin;
use kernel::prelude::*;
use kernel::sync::Arc;

/// Sectors of 512 bytes of a page.
const SECTORS_OF_PAGE: u64 = (PAGE_SIZE / 512) as u64;

/// A request that the shadow has given to the queue.
struct Begun {
    tag: QueueTag,
    start: Start,
    /// Number of the executor's parts that belong to it.
    parts: usize,
    /// Target of the I/O; `None` if the backing is gone, or if the whole request reads as zeroes.
    storage: Option<DiskStorage>,
    /// Place of its data, if that is in pages of the guest.
    mapped: Option<MappedAt>,
}

/// The chain of segments, in the engine's table, of a request with its data in pages of the guest.
#[derive(Clone, Copy)]
pub(super) struct MappedAt {
    pub(super) head: u16,
    pub(super) count: u16,
}

/// Resources of a queue for executing requests.
pub(super) struct Executor {
    // First, because its drop waits for the last bios, which use the pages.
    bios: Pin<KBox<bio::BioDisk>>,
    /// To be started; has room for a batch.
    begun: KVec<Begun>,
    /// The places of their data, in the same order; has room for all parts of a batch.
    parts: KVec<RequestPart>,
    /// Ended requests, and their results, unless they are for the process now; has room for all tags.
    ended: EndedRequests,
    /// Requests to be given back; has room for all tags.
    back: KVec<QueueTag>,
    pub(super) express: QueueExpress,
    /// A request of the last batch was begun (`has_begun`); more requests of it were begun than given back (`begins`).
    has_begun: bool,
    begins: bool,
    /// The backing of a request needs stable pages, so pages of the guest cannot be used.
    shuns_mapped: bool,
    /// The queue's part of what its guest may have mapped.
    _lease: Option<Lease>,
    /// Requests that were begun with the shadow and have not ended.
    executing: u16,
}

/// Requests that have ended, and their results, unless they are for the process now.
type EndedRequests = KVec<(QueueTag, Option<ResponseStatus>)>;

impl Executor {
    /// Allocates the resources of a queue. May sleep.
    // A function of its own, as `reap` is, so that it and its caller have small stack frames.
    #[inline(never)]
    pub(super) fn new(
        pages: Arc<DataPages>,
        wake_event: &Arc<WakeEvent>,
        depth: u16,
        lease: Option<Lease>,
    ) -> Result<KBox<Self>> {
        let executor = Self {
            bios: bio::BioDisk::new(pages, wake_event.clone(), None, depth)?,
            begun: KVec::with_capacity(BATCH, GFP_KERNEL)?,
            parts: KVec::with_capacity(BATCH.saturating_mul(MAX_PARTS), GFP_KERNEL)?,
            ended: KVec::with_capacity(depth.into(), GFP_KERNEL)?,
            back: KVec::with_capacity(depth.into(), GFP_KERNEL)?,
            express: QueueExpress::new(),
            has_begun: true,
            begins: true,
            shuns_mapped: false,
            _lease: lease,
            executing: 0,
        };
        Ok(KBox::new(executor, GFP_KERNEL)?)
    }

    /// Returns true while bios may use the pages.
    pub(super) fn is_busy(&self) -> bool {
        self.executing > 0 || self.express.is_busy()
    }

    /// Returns true if all requests in flight are in express, and others are not begun before its thread has looked.
    pub(super) fn is_express_only(&self) -> bool {
        self.executing == 0 && self.express.is_there()
    }

    /// Records that all of the last batch was begun in express.
    pub(super) fn learn_express(&mut self) {
        self.has_begun = true;
    }

    /// Begins waiting requests that the queue can begin now, at most a batch. May sleep.
    pub(super) fn resume(&mut self, disk: &TapDisk, place: QueueSlice) {
        {
            let mut inner = disk.inner.lock();
            let DiskInner {
                shadow, backings, ..
            } = &mut *inner;
            shadow.resume(place.index, BATCH, |tag, start, parts| {
                self.take(backings, place.queue_tag(tag), start, parts, None);
            });
            // Requests whose range is not mapped any more are for the process.
            disk.announce(&mut inner);
        }
        self.start(disk, place, None);
    }

    /// Takes a request that the shadow has given to the queue; at most [`BATCH`] of them before [`start`](Self::start).
    pub(super) fn take(
        &mut self,
        backings: &BackingTable,
        tag: QueueTag,
        start: Start,
        parts: &[RequestPart],
        mapped: Option<MappedAt>,
    ) {
        let number = start.backing.map(BackingNumber::index);
        let storage = number.and_then(|number| backings.get(number).cloned().flatten());
        self.executing = self.executing.wrapping_add(1);
        let stable = |storage: &DiskStorage| mapped.is_some() && storage.wants_stable_pages();
        if storage.as_ref().is_some_and(stable) {
            self.shuns_mapped = true;
            return fail(&mut self.ended, tag);
        }
        let begun = Begun {
            tag,
            start,
            parts: parts.len(),
            storage,
            mapped,
        };
        let before = self.parts.len();
        let mut parts = parts.iter();
        let has_room = parts.all(|part| push(&mut self.parts, *part).is_ok());
        if !has_room || push(&mut self.begun, begun).is_err() {
            // There is room for a batch, and no more are taken.
            self.parts.truncate(before);
            fail(&mut self.ended, tag);
        }
    }

    /// Starts the requests that were taken; `segments` has the places of data in pages of the guest. May sleep.
    pub(super) fn start(
        &mut self,
        disk: &TapDisk,
        place: QueueSlice,
        segments: Option<&Segments<'_>>,
    ) {
        if self.begun.is_empty() {
            return;
        }
        // CAST: at most a batch.
        bio::plugged(self.begun.len() as u16, || {
            let mut rest = self.parts.as_slice();
            for begun in &mut self.begun {
                let (parts, behind) = rest.split_at_checked(begun.parts).unwrap_or_default();
                rest = behind;
                let inflight = match begun.storage.take() {
                    Some(storage) => self.bios.begin(begun.tag, Some(storage)),
                    None if begun.start.backing.is_none() => self.bios.begin_nowhere(begun.tag),
                    None => None,
                };
                let Some(inflight) = inflight else {
                    fail(&mut self.ended, begun.tag);
                    continue;
                };
                match begun.mapped.zip(segments) {
                    Some((at, segments)) => {
                        let pieces = segments.slices(at.head, at.count).map(PagePiece::from);
                        transfer(&inflight, &begun.start, parts, at.count, true, pieces);
                    }
                    None => start_in_arena(&inflight, disk, place, begun, parts),
                }
            }
        });
        self.begun.clear();
        self.parts.clear();
    }

    /// Gives back a request with its data in pages of the guest, which cannot be begun or has failed.
    pub(super) fn give_back(&mut self, tag: QueueTag) {
        give_back(&mut self.back, tag);
    }

    /// Yields the requests that must be submitted once more with their data in the arena.
    pub(super) fn given_back(&mut self, mut each: impl FnMut(QueueTag)) {
        self.back.iter().for_each(|tag| each(*tag));
        self.back.clear();
    }

    /// Records how many requests of the last batch were begun, and how many were given back.
    pub(super) fn learn(&mut self, begun: u16, given_back: u16) {
        self.has_begun = begun > 0;
        self.begins = begun > given_back;
    }

    /// Reports whether a request of the last batch was begun.
    pub(super) fn has_begun(&self) -> bool {
        self.has_begun
    }

    /// Reports whether requests are served best with pages of the guest, because most of them can be.
    pub(super) fn prefers_mapped(&self) -> bool {
        self.begins && !self.shuns_mapped
    }

    /// Collects the requests that have ended: `done` gets those that the process does not have to execute now.
    #[inline(never)]
    pub(super) fn reap(
        &mut self,
        disk: &TapDisk,
        place: QueueSlice,
        mut done: impl FnMut(QueueTag, ResponseStatus),
    ) {
        let _left = self.reap_express(&mut done);
        let ended = &mut self.ended;
        for batch in ended.chunks_mut(BATCH) {
            let mut inner = disk.inner.lock();
            for (tag, ending) in batch {
                self.executing = self.executing.wrapping_sub(1);
                let disk_tag = place.disk_tag(*tag);
                let is_mapped = inner.shadow.is_mapped(disk_tag);
                let status = ending.unwrap_or(ResponseStatus::Error);
                *ending = inner.shadow.ended(disk_tag, status);
                if is_mapped && ending.is_none() {
                    give_back(&mut self.back, *tag);
                }
            }
            disk.announce(&mut inner);
            inner.tell_recallers(&disk.ready);
        }
        for (tag, status) in &self.ended {
            if let Some(status) = status {
                done(*tag, *status);
            }
        }
        self.ended.clear();
    }
}

/// Requests in express.
impl Executor {
    /// Returns true if the queue may begin requests in express now.
    pub(super) fn may_use_express(&self, signal: &ExpressSignal) -> bool {
        self.express.is_there() && !signal.is_withdrawn()
    }

    /// Begins an I/O in express, if it is a read or write with its data in pages of the guest and the extent has it. May sleep.
    pub(super) fn begin_in_express(&mut self, io: &Io<'_>, signal: &ExpressSignal) -> bool {
        let (operation, access) = match io.kind {
            IoKind::Read => (Operation::Read, ExtentAccess::Read),
            IoKind::Write => (
                Operation::Write {
                    preflush: false,
                    fua: false,
                },
                ExtentAccess::ReadWrite,
            ),
            _ => return false,
        };
        let extent = self.express.extent.as_ref();
        let place = extent.and_then(|extent| extent.place_of(io.sector, io.sectors, access));
        let Some(place) = place.filter(|_| io.is_mapped()) else {
            return false;
        };
        let Some(inflight) = self.bios.begin(io.tag, None) else {
            return false;
        };
        // Shown before it is submitted, which may sleep for as long as the storage hangs.
        self.express.begins();
        self.express.show(signal);
        let pieces = io.slices().map(PagePiece::from);
        inflight.scatter(operation, place, io.count(), pieces);
        true
    }

    /// Takes express, if the shadow offers it to a queue that has just begun a request. The disk is locked.
    pub(super) fn take_express(&mut self, inner: &mut DiskInner, place: QueueSlice) {
        // A process that waits for the end of all I/O would find a queue in express again and again.
        if self.express.extent.is_some() || inner.recallers > 0 {
            return;
        }
        let Some(extent) = inner.shadow.offer_express(place.index) else {
            return;
        };
        let backing = inner.backings.get(extent.backing().index());
        let device = match backing {
            Some(Some(DiskStorage::Device(device))) if !device.wants_stable_pages() => {
                device.clone()
            }
            // A file is not called in interrupts, and what wants stable pages gets none of the guest.
            _ => return inner.shadow.gave_up_express(place.index),
        };
        match self.bios.set_device(Some(device)) {
            Ok(_none) => self.express.extent = Some(extent),
            Err(_busy) => inner.shadow.gave_up_express(place.index),
        }
    }

    /// Returns true if the queue must give express up.
    pub(super) fn must_leave_express(&self, signal: &ExpressSignal) -> bool {
        self.express.extent.is_some() && signal.is_withdrawn()
    }

    /// Gives express up, which the queue must, if its requests have ended. The queue's thread calls this after it has
    /// collected what has ended.
    // A function of its own, so that the thread has a small stack frame.
    #[inline(never)]
    pub(super) fn leave_express(
        &mut self,
        disk: &TapDisk,
        place: QueueSlice,
        signal: &ExpressSignal,
    ) {
        // Completions wake the thread from now on.
        self.express.is_leaving = true;
        if self.express.is_busy() {
            return;
        }
        // The reference to the device goes first: afterwards the backing may be taken from the disk.
        let Ok(device) = self.bios.set_device(None) else {
            return;
        };
        drop(device);
        self.express.extent = None;
        self.express.is_leaving = false;
        let mut inner = disk.inner.lock();
        signal.gave_up();
        inner.shadow.gave_up_express(place.index);
        disk.announce(&mut inner);
        inner.tell_recallers(&disk.ready);
    }

    /// Collects the requests that have ended while the queue's thread waits. Callable in any context if all of them are in
    /// express. Returns true if something is left for the thread.
    pub(super) fn reap_express(&mut self, mut done: impl FnMut(QueueTag, ResponseStatus)) -> bool {
        let Self {
            bios,
            express,
            ended,
            back,
            ..
        } = self;
        bios.reap(|tag, status, is_own| match is_own {
            true => {
                express.ends(status == 0);
                match status {
                    0 => done(tag, ResponseStatus::Okay),
                    _ => give_back(back, tag),
                }
            }
            false => {
                // There is room for all tags, and each is in it once, because a tag is in use until it is reaped.
                let _pushed = push(ended, (tag, Some(result(status))));
            }
        });
        !self.back.is_empty() || !self.ended.is_empty()
    }
}

/// Ends a request that was not started: the process gets it, or it is given back.
fn fail(ended: &mut EndedRequests, tag: QueueTag) {
    let _pushed = push(ended, (tag, Some(ResponseStatus::Error)));
}

fn give_back(back: &mut KVec<QueueTag>, tag: QueueTag) {
    // There is room for all tags, and each is in it once, because a request is submitted until it is given back.
    let _pushed = push(back, tag);
}

fn result(status: u32) -> ResponseStatus {
    match status {
        0 => ResponseStatus::Okay,
        bio::NOT_SUPPORTED => ResponseStatus::NotSupported,
        _ => ResponseStatus::Error,
    }
}

/// Starts a request with its data in the arena, or without data.
fn start_in_arena(
    inflight: &Inflight<'_>,
    disk: &TapDisk,
    place: QueueSlice,
    begun: &Begun,
    parts: &[RequestPart],
) {
    let start = &begun.start;
    let tag = place.disk_tag(begun.tag);
    let segments = (0..start.segments).filter_map(|index| disk.areas.segment(tag, index));
    let pieces = segments.map(|segment| piece(&segment, place.first_page));
    transfer(inflight, start, parts, start.segments, false, pieces);
}

/// Starts a request with its data in `count` pieces.
fn transfer(
    inflight: &Inflight<'_>,
    start: &Start,
    parts: &[RequestPart],
    count: u16,
    is_mapped: bool,
    pieces: impl Iterator<Item = PagePiece>,
) {
    let operation = match start.op {
        abi::OP_READ => Operation::Read,
        abi::OP_WRITE => Operation::Write {
            preflush: false,
            fua: false,
        },
        _ => return inflight.without_data(Operation::Flush, 0, 0),
    };
    // One place on the storage, as most requests have.
    let sector = match parts {
        [part] if is_mapped => part.sector,
        _ => None,
    };
    if let Some(sector) = sector {
        return inflight.scatter(operation, sector, count, pieces);
    }
    // A range for each page, and two for the ends of each segment and each part, which may lie within pages.
    let most = start.sectors / SECTORS_OF_PAGE;
    let most = most.saturating_add(u64::from(count).saturating_mul(2));
    // CAST: no more than `MAX_PARTS`.
    let most = most.saturating_add((parts.len() as u64).saturating_mul(2));
    let most = u16::try_from(most).unwrap_or(u16::MAX);
    let places = parts.iter().map(|part| bio::DeviceTarget {
        sector: part.sector,
        bytes: part.sectors.saturating_mul(512),
    });
    inflight.transfer(operation, places, most, pieces);
}

/// Returns a segment with the page numbers that the queue uses.
fn piece(segment: &TapSegment, first_page: u16) -> PagePiece {
    const PAGE: u32 = PAGE_SIZE as u32;
    // CAST: an arena has fewer pages than that.
    let page = (segment.offset / PAGE) as u16;
    PagePiece {
        page: PageIndex::new(page.wrapping_sub(first_page)),
        // CAST: below a page.
        offset: (segment.offset % PAGE) as u16,
        len: segment.len,
    }
}
