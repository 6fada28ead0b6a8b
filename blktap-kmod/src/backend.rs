// SPDX-License-Identifier: GPL-2.0-only

//! The engine's backend over the shadow of a disk.

use super::disk::{DiskInner, QueueSignal, TapDisk, BATCH};
use super::express::ExpressSignal;
use super::passthrough::{Executor, MappedAt};
use super::queue_slice::QueueSlice;
use crate::engine::segments::Segments;
use crate::engine::{Backend, Io, IoKind, ReapContext};
use crate::linux::block::bio;
use crate::linux::memory::data::DataPages;
use crate::linux::memory::vectors::push;
use crate::linux::monotonic_ns;
use crate::linux::task::wake_event::WakeEvent;
use crate::memory::Lease;
use crate::ring::numbers::QueueTag;
use crate::ring::response::ResponseStatus;
use crate::ring::tap::abi::TapSegment;
use crate::ring::tap::shadow::passthrough::RequestParts;
use crate::ring::tap::shadow::{Op, PostedRequest};
use kernel::prelude::*;
use kernel::sync::atomic::{ordering::Full, ordering::Relaxed, AtomicFlag};
use kernel::sync::Arc;

/// The backend of one queue. Dropping it leaves requests that the process has to the disk, and forgets the rest.
///
/// # Invariants
///
/// The disk has `share` in the queue's place.
pub(crate) struct TapQueue {
    /// Present if the disk had a backing when the queue was made. First field, because its drop waits for the last
    /// bios.
    executor: Option<KBox<Executor>>,
    disk: Arc<TapDisk>,
    share: Arc<QueueSignal>,
    place: QueueSlice,
    /// Requests to be posted; has room for a batch.
    ready: KVec<ReadyRequest>,
    /// Places of the request that was begun last. In an allocation of its own, because the queue would otherwise be too
    /// large to be moved.
    parts: KBox<RequestParts>,
    /// Requests that could not be posted; has room for all tags.
    rejected: KVec<QueueTag>,
}

/// A request that is to be posted.
struct ReadyRequest {
    tag: QueueTag,
    request: PostedRequest,
    /// Place of its data, if that is in pages of the guest.
    mapped: Option<MappedAt>,
}

impl TapQueue {
    /// Takes a queue's place. May sleep.
    ///
    /// # Errors
    ///
    /// `EBUSY` while a queue or a request of an earlier connection is left.
    pub(super) fn new(
        disk: Arc<TapDisk>,
        wake_event: Arc<WakeEvent>,
        place: QueueSlice,
        pages: &Arc<DataPages>,
        lease: Option<Lease>,
    ) -> Result<Self> {
        let executor = disk
            .has_backings()
            .then(|| Executor::new(pages.clone(), &wake_event, place.depth, lease))
            .transpose()?;
        let share = super::shared(QueueSignal {
            wake_event,
            done: AtomicFlag::new(false),
            resumable: AtomicFlag::new(false),
            express: ExpressSignal::new(),
        })?;
        let ready = KVec::with_capacity(BATCH, GFP_KERNEL)?;
        let rejected = KVec::with_capacity(usize::from(place.depth), GFP_KERNEL)?;
        let parts = KBox::new(RequestParts::default(), GFP_KERNEL)?;
        // From here on the only possible error is that the place is not free. A queue gives its place back when it is
        // dropped, and there is no queue yet.
        let mut inner = disk.inner.lock();
        if inner.shadow.orphans() > 0 {
            return Err(EBUSY);
        }
        match inner.shares.get_mut(usize::from(place.index)) {
            Some(free @ None) => *free = Some(share.clone()),
            Some(Some(_)) | None => return Err(EBUSY),
        }
        inner.shadow.set_able(place.index, executor.is_some());
        drop(inner);
        // INVARIANT: Just put there.
        Ok(Self {
            executor,
            disk,
            share,
            place,
            ready,
            parts,
            rejected,
        })
    }

    /// Returns the request to post, and writes its segments into the descriptor area if it may go to the process.
    fn prepare(&self, io: &Io<'_>) -> Option<PostedRequest> {
        let (op, preflush, fua) = match io.kind {
            IoKind::Read => (Op::Read, false, false),
            IoKind::Write => (Op::Write, false, false),
            IoKind::PreFlushWrite => (Op::Write, true, false),
            IoKind::BarrierWrite if io.count() == 0 => (Op::Flush, false, false),
            IoKind::BarrierWrite => (Op::Write, true, true),
            IoKind::Flush => (Op::Flush, false, false),
            IoKind::Discard { secure: false } => (Op::Discard, false, false),
            IoKind::Discard { secure: true } => (Op::SecureDiscard, false, false),
        };
        let request = PostedRequest {
            op,
            preflush,
            fua,
            sector: io.sector,
            sectors: io.sectors,
            segments: 0,
        };
        if io.is_mapped() {
            return Some(request);
        }
        let first = u32::from(self.place.first_page);
        let pieces = io.slices().map(|slice| TapSegment {
            offset: first
                .wrapping_add(slice.page.number().into())
                .wrapping_mul(4096)
                .wrapping_add(slice.offset.into()),
            len: slice.len.into(),
        });
        let segments = self
            .disk
            .areas
            .write_segments(self.place.disk_tag(io.tag), pieces)?;
        Some(PostedRequest {
            segments,
            ..request
        })
    }

    /// Posts the requests in `ready`, and wakes the process if it waits. Begins those that need no process.
    fn post(&mut self, segments: &Segments<'_>) {
        let now = monotonic_ns();
        let place = self.place;
        let (mut begun, mut given_back) = (0u16, 0u16);
        {
            let mut inner = self.disk.inner.lock();
            let DiskInner {
                shadow, backings, ..
            } = &mut *inner;
            for ready in &self.ready {
                let disk_tag = place.disk_tag(ready.tag);
                let posted = shadow.post(disk_tag, place.index, &ready.request, now);
                if posted.is_err() {
                    reject(&mut self.rejected, ready.tag);
                    continue;
                }
                let Some(executor) = &mut self.executor else {
                    continue;
                };
                let parts = &mut *self.parts;
                let start = match ready.mapped {
                    Some(_) => shadow.begin_mapped(disk_tag, parts),
                    None => shadow.begin(disk_tag, parts),
                };
                if let Some(start) = start {
                    begun = begun.wrapping_add(1);
                    let parts = parts.as_slice();
                    executor.take(backings, ready.tag, start, parts, ready.mapped);
                } else if ready.mapped.is_some() {
                    given_back = given_back.wrapping_add(1);
                    executor.give_back(ready.tag);
                }
            }
            if let Some(executor) = self.executor.as_mut().filter(|_| begun > 0) {
                executor.take_express(&mut inner, place);
            }
            self.disk.announce(&mut inner);
        }
        self.ready.clear();
        if let Some(executor) = &mut self.executor {
            executor.learn(begun, given_back);
            executor.start(&self.disk, place, Some(segments));
        }
    }

    /// Begins what can be begun in express, and [posts](Self::post) all else. May sleep.
    // A function of its own, so that the thread has a small stack frame.
    #[inline(never)]
    fn begin_or_post<'b>(&mut self, batch: impl Iterator<Item = Io<'b>>, in_express: bool) {
        let mut segments = None;
        for io in batch {
            if in_express && self.begin_in_express(&io) {
                continue;
            }
            segments = Some(io.segments);
            self.make_ready(&io);
            if self.ready.len() >= BATCH {
                self.post(io.segments);
            }
        }
        if let Some(segments) = segments.filter(|_| !self.ready.is_empty()) {
            self.post(segments);
        }
    }

    fn begin_in_express(&mut self, io: &Io<'_>) -> bool {
        let (executor, signal) = (self.executor.as_mut(), &self.share.express);
        executor.is_some_and(|executor| executor.begin_in_express(io, signal))
    }

    /// Appends a request to those that are to be posted.
    fn make_ready(&mut self, io: &Io<'_>) {
        let Some(request) = self.prepare(io) else {
            return reject(&mut self.rejected, io.tag);
        };
        let ready = ReadyRequest {
            tag: io.tag,
            request,
            mapped: io.is_mapped().then_some(MappedAt {
                head: io.head,
                count: io.count,
            }),
        };
        if push(&mut self.ready, ready).is_err() {
            // Cannot happen: `ready` has room for a batch, and holds less than one.
            reject(&mut self.rejected, io.tag);
        }
    }

    // A function of its own, because the plug is on its stack.
    #[inline(never)]
    fn submit_in_express<'b>(&mut self, count: u16, batch: impl Iterator<Item = Io<'b>>) {
        if let Some(executor) = &mut self.executor {
            executor.learn_express();
        }
        bio::plugged(count, || self.begin_or_post(batch, true));
    }

    fn show_express(&self) {
        if let Some(executor) = &self.executor {
            executor.express.show(&self.share.express);
        }
    }
}

fn reject(rejected: &mut KVec<QueueTag>, tag: QueueTag) {
    // There is room for all tags, and each is in it once, because a tag is in use until it is reaped.
    let _pushed = push(rejected, tag);
}

impl Backend for TapQueue {
    fn submit<'b>(&mut self, count: u16, batch: impl Iterator<Item = Io<'b>>) {
        let executor = self.executor.as_ref();
        if executor.is_some_and(|executor| executor.may_use_express(&self.share.express)) {
            self.submit_in_express(count, batch);
        } else {
            self.begin_or_post(batch, false);
        }
    }

    fn can_resume(&self) -> bool {
        self.executor.is_some() && self.share.resumable.load(Relaxed)
    }

    fn resume(&mut self) {
        // Cleared before the queue looks for such requests: code that adds one later sets it again.
        let _told = self.share.resumable.xchg(false, Full);
        if let Some(executor) = &mut self.executor {
            executor.resume(&self.disk, self.place);
        }
    }

    fn is_bound(&self, _unfinished: u16) -> bool {
        // The disk keeps the requests that the process has.
        self.executor
            .as_ref()
            .is_some_and(|executor| executor.is_busy())
    }

    fn gathers(&self) -> bool {
        self.executor
            .as_ref()
            .is_none_or(|executor| !executor.has_begun())
    }

    fn forget_wake_ups(&mut self) {
        self.share.wake_event.rearm();
    }

    fn reap_context(&self) -> ReapContext {
        match &self.executor {
            None => ReapContext::Task,
            // No lock of the disk is needed for what ends in express, and no storage is released.
            Some(executor) if executor.is_express_only() => ReapContext::Any,
            // What else the queue executes itself ends in interrupts, which wake the thread.
            Some(_) => ReapContext::Thread,
        }
    }

    fn reap_anywhere(&mut self, mut done: impl FnMut(QueueTag, ResponseStatus)) -> bool {
        let executor = self.executor.as_mut();
        let left = executor.is_some_and(|executor| executor.reap_express(&mut done));
        self.show_express();
        left
    }

    fn reap(&mut self, mut done: impl FnMut(QueueTag, ResponseStatus)) {
        while let Some(tag) = self.rejected.pop() {
            done(tag, ResponseStatus::Error);
        }
        if let Some(executor) = &mut self.executor {
            executor.reap(&self.disk, self.place, &mut done);
            if executor.must_leave_express(&self.share.express) {
                executor.leave_express(&self.disk, self.place, &self.share.express);
            }
        }
        self.show_express();
        self.disk.fail_overdue();
        if !self.share.done.load(Relaxed) || !self.share.done.xchg(false, Full) {
            return;
        }
        loop {
            let mut results = [None; BATCH];
            let mut places = results.iter_mut();
            let queue = self.place.index;
            let count = self
                .disk
                .inner
                .lock()
                .shadow
                .reap(queue, BATCH, |tag, status| {
                    if let Some(place) = places.next() {
                        *place = Some((tag, status));
                    }
                });
            for (tag, status) in results.into_iter().flatten() {
                done(self.place.queue_tag(tag), status);
            }
            if count < BATCH {
                return;
            }
        }
    }

    fn prefers_mapped(&self, kind: IoKind) -> bool {
        let moves_data = matches!(kind, IoKind::Read | IoKind::Write);
        let executor = self.executor.as_ref();
        moves_data && executor.is_some_and(|executor| executor.prefers_mapped())
    }

    fn give_back(&mut self, each: impl FnMut(QueueTag)) {
        if let Some(executor) = &mut self.executor {
            executor.given_back(each);
        }
    }

    fn now(&self) -> u64 {
        monotonic_ns()
    }
}

impl Drop for TapQueue {
    fn drop(&mut self) {
        // Waits for the last bios, so that no request is in express when the queue gives that up.
        self.executor = None;
        let share = {
            let mut inner = self.disk.inner.lock();
            let (executed, _) = self.share.express.counts();
            inner.shadow.count_express(executed);
            inner.shadow.gave_up_express(self.place.index);
            inner.shadow.set_able(self.place.index, false);
            // The requests that the process has remain as orphans.
            let _orphans = inner.shadow.orphan(self.place.index);
            let place = inner.shares.get_mut(usize::from(self.place.index));
            let share = place.and_then(Option::take);
            // Another queue's request may have waited for one that was forgotten.
            self.disk.announce(&mut inner);
            // A process may have waited until this queue gives express up.
            inner.tell_recallers(&self.disk.ready);
            inner.kick();
            share
        };
        drop(share);
    }
}
