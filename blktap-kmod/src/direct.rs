// SPDX-License-Identifier: GPL-2.0-only

//! What a queue executes itself, in a block device or a file behind the disk, without the process.
//!
//! The data is where it is for a process: in the arena, at the segments that the queue has written before
//! the request was posted, and which nobody else can write. So a request can go to the process after all.

use super::disk::{Backings, Inner, TapDisk, BATCH};
use super::place::Place;
use crate::linux::block::bio::{self, Inflight, Operation, Piece};
use crate::linux::block::storage::Storage;
use crate::linux::memory::data::DataPages;
use crate::linux::memory::vectors::push;
use crate::linux::task::wake_event::WakeEvent;
use crate::ring::abi::PAGE_SIZE;
use crate::ring::numbers::{PageIndex, QueueTag};
use crate::ring::response::Status;
use crate::ring::tap::abi::{self, Segment};
use crate::ring::tap::shadow::direct::Start;
use core::pin::Pin;
use kernel::prelude::*;
use kernel::sync::Arc;

/// Sectors of 512 bytes of a page.
const SECTORS_OF_PAGE: u64 = (PAGE_SIZE / 512) as u64;

/// A request that the shadow has given to the queue, and where it goes; nowhere if that is gone.
type Begun = (QueueTag, Start, Option<Storage>);

/// What a queue needs to execute requests.
pub(super) struct Executor {
    // First: it waits for the last bios, which use the pages.
    bios: Pin<KBox<bio::Disk>>,
    /// To be started; has room for a batch.
    begun: KVec<Option<Begun>>,
    /// What has ended, and how; has room for all tags.
    ended: KVec<(QueueTag, Status)>,
    /// Requests that were begun and have not ended.
    executing: u16,
}

impl Executor {
    /// Reserves what a queue needs. May sleep.
    pub(super) fn new(
        pages: Arc<DataPages>,
        wake_event: &Arc<WakeEvent>,
        depth: u16,
    ) -> Result<KBox<Self>> {
        let executor = Self {
            bios: bio::Disk::new(pages, wake_event.clone(), None, depth)?,
            begun: KVec::with_capacity(BATCH, GFP_KERNEL)?,
            ended: KVec::with_capacity(depth.into(), GFP_KERNEL)?,
            executing: 0,
        };
        Ok(KBox::new(executor, GFP_KERNEL)?)
    }

    /// True while bios may use the pages.
    pub(super) fn is_busy(&self) -> bool {
        self.executing > 0
    }

    /// Begins what the queue can begin now of what waited, a batch at most. May sleep.
    pub(super) fn resume(&mut self, disk: &TapDisk, place: Place) {
        {
            let mut inner = disk.inner.lock();
            let Inner {
                shadow, backings, ..
            } = &mut *inner;
            shadow.resume(place.index, BATCH, |tag, start| {
                self.take(backings, place.queue_tag(tag), start);
            });
            // What is not mapped any more is for the process.
            disk.announce(&mut inner);
        }
        self.start(disk, place);
    }

    /// Takes what the shadow has given to the queue, at most [`BATCH`] until [`start`](Self::start).
    pub(super) fn take(&mut self, backings: &Backings, tag: QueueTag, start: Start) {
        let storage = backings.get(start.place.backing.index()).cloned();
        self.executing = self.executing.wrapping_add(1);
        if push(&mut self.begun, Some((tag, start, storage.flatten()))).is_err() {
            // There is room for a batch, and no more are taken.
            fail(&mut self.ended, tag);
        }
    }

    /// Starts what was taken. May sleep.
    pub(super) fn start(&mut self, disk: &TapDisk, place: Place) {
        if self.begun.is_empty() {
            return;
        }
        bio::plugged(|| {
            for index in 0..self.begun.len() {
                let begun = self.begun.get_mut(index).and_then(Option::take);
                if let Some((tag, start, storage)) = begun {
                    let inflight = storage.and_then(|storage| self.bios.begin(tag, Some(storage)));
                    match inflight {
                        Some(inflight) => start_one(&inflight, disk, place, tag, &start),
                        None => fail(&mut self.ended, tag),
                    }
                }
            }
        });
        self.begun.clear();
    }

    /// Takes note of what has ended: `done` gets those that the process is not to execute now.
    pub(super) fn reap(
        &mut self,
        disk: &TapDisk,
        place: Place,
        mut done: impl FnMut(QueueTag, Status),
    ) {
        let ended = &mut self.ended;
        self.bios.reap(|tag, status| {
            // There is room for all tags, and each is there once: it is taken until it is reaped.
            let _pushed = push(ended, (tag, result(status)));
        });
        while !self.ended.is_empty() {
            let mut results = [None; BATCH];
            let mut inner = disk.inner.lock();
            for answer in &mut results {
                let Some((tag, status)) = self.ended.pop() else {
                    break;
                };
                self.executing = self.executing.wrapping_sub(1);
                let status = inner.shadow.ended(place.disk_tag(tag), status);
                *answer = status.map(|status| (tag, status));
            }
            disk.announce(&mut inner);
            inner.tell_recallers(&disk.ready);
            drop(inner);
            for (tag, status) in results.into_iter().flatten() {
                done(tag, status);
            }
        }
    }
}

/// A request ends without having been started: the process gets it.
fn fail(ended: &mut KVec<(QueueTag, Status)>, tag: QueueTag) {
    let _pushed = push(ended, (tag, Status::Error));
}

fn result(status: u32) -> Status {
    match status {
        0 => Status::Okay,
        bio::NOT_SUPPORTED => Status::NotSupported,
        _ => Status::Error,
    }
}

fn start_one(inflight: &Inflight<'_>, disk: &TapDisk, place: Place, tag: QueueTag, start: &Start) {
    let operation = match start.op {
        abi::OP_READ => Operation::Read,
        abi::OP_WRITE => Operation::Write {
            preflush: false,
            fua: false,
        },
        _ => return inflight.without_data(Operation::Flush, 0, 0),
    };
    let tag = place.disk_tag(tag);
    let segments = (0..start.segments).filter_map(|index| disk.areas.segment(tag, index));
    let pieces = segments.map(|segment| piece(&segment, place.first_page));
    // One for each page, and two for the ends of each segment, which may lie within pages.
    let most = start.sectors / SECTORS_OF_PAGE;
    let most = most.saturating_add(u64::from(start.segments).saturating_mul(2));
    let most = u16::try_from(most).unwrap_or(u16::MAX);
    inflight.transfer(operation, start.place.sector, most, pieces);
}

/// A segment, with the numbers that the queue gives its pages.
fn piece(segment: &Segment, first_page: u16) -> Piece {
    const PAGE: u32 = PAGE_SIZE as u32;
    // CAST: an arena has fewer pages than that.
    let page = (segment.offset / PAGE) as u16;
    Piece {
        page: PageIndex::new(page.wrapping_sub(first_page)),
        // CAST: below a page.
        offset: (segment.offset % PAGE) as u16,
        len: segment.len,
    }
}
