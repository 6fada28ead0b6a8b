// SPDX-License-Identifier: GPL-2.0-only

//! A queue's backend, by way of its guest's side and the trace points.

use crate::engine::{Backend, Io, IoKind, ReapContext};
use crate::events::DeviceEvents;
use crate::linux::xen::guest_mapping::GuestMapping;
use crate::ring::numbers::QueueTag;
use crate::ring::response::ResponseStatus;
use crate::totals::Begun;
use kernel::sync::atomic::{ordering::Acquire, ordering::Release, AtomicFlag};
use kernel::sync::Arc;

/// The mark of a queue that has given ring and event channel back; after a drain also the disk.
pub(crate) struct Detached {
    mark: AtomicFlag,
    events: Arc<dyn DeviceEvents>,
}

impl Detached {
    /// Makes the mark of a queue that has both, for this device.
    pub(crate) fn new(events: Arc<dyn DeviceEvents>) -> Self {
        Self {
            mark: AtomicFlag::new(false),
            events,
        }
    }

    /// Sets the mark, and schedules the device's work, which looks at it. Does not sleep.
    pub(crate) fn set(&self) {
        self.mark.store(true, Release);
        self.events.clone().reconcile();
    }

    /// Returns true if the queue has given both back.
    pub(crate) fn is_set(&self) -> bool {
        self.mark.load(Acquire)
    }
}

/// A queue's guest, the mark that is set when the guest's ring is given back, and where an I/O is shown when it begins.
/// It outlasts the queue's state.
pub(crate) struct BlockingContext<'a> {
    pub(crate) guest: &'a GuestMapping,
    pub(crate) detached: &'a Detached,
    pub(crate) begun: Begun,
}

/// A backend that may sleep for as long as its device hangs. During such a sleep, what the queue holds of its guest can
/// be given back without the queue's thread.
// A reference to the context, because the thread's frame holds several copies of this type.
pub(crate) struct BlockingBackend<'a, B> {
    pub(crate) backend: B,
    pub(crate) context: &'a BlockingContext<'a>,
}

impl<B: Backend> Backend for BlockingBackend<'_, B> {
    fn submit<'b>(&mut self, count: u16, batch: impl Iterator<Item = Io<'b>>) {
        let traced = self.context.guest.traced();
        let begun = &self.context.begun;
        let batch = batch.inspect(|io| {
            begun.show(io.since);
            traced.submit(io.tag.number(), io.kind.number(), io.sector, io.sectors);
        });
        let BlockingContext {
            guest, detached, ..
        } = self.context;
        guest.away(|| detached.set(), || self.backend.submit(count, batch));
    }

    fn can_resume(&self) -> bool {
        self.backend.can_resume()
    }

    fn resume(&mut self) {
        let BlockingContext {
            guest, detached, ..
        } = self.context;
        guest.away(|| detached.set(), || self.backend.resume());
    }

    fn is_bound(&self, unfinished: u16) -> bool {
        self.backend.is_bound(unfinished)
    }

    fn gathers(&self) -> bool {
        self.backend.gathers()
    }

    fn forget_wake_ups(&mut self) {
        self.backend.forget_wake_ups();
    }

    fn reap_context(&self) -> ReapContext {
        self.backend.reap_context()
    }

    fn reap(&mut self, mut done: impl FnMut(QueueTag, ResponseStatus)) {
        let traced = self.context.guest.traced();
        self.backend.reap(|tag, status| {
            traced.complete(tag.number(), status.to_wire());
            done(tag, status);
        });
    }

    fn reap_anywhere(&mut self, mut done: impl FnMut(QueueTag, ResponseStatus)) -> bool {
        let traced = self.context.guest.traced();
        self.backend.reap_anywhere(|tag, status| {
            traced.complete(tag.number(), status.to_wire());
            done(tag, status);
        })
    }

    fn prefers_mapped(&self, kind: IoKind) -> bool {
        self.backend.prefers_mapped(kind)
    }

    fn give_back(&mut self, each: impl FnMut(QueueTag)) {
        self.backend.give_back(each);
    }

    fn aside<T>(&mut self, body: impl FnOnce() -> T) -> T {
        let BlockingContext {
            guest, detached, ..
        } = self.context;
        guest.away(|| detached.set(), body)
    }

    fn now(&self) -> u64 {
        self.backend.now()
    }

    fn attach(&mut self, block: u16) -> bool {
        self.backend.attach(block)
    }

    fn detach(&mut self, block: u16) {
        self.backend.detach(block);
    }

    fn owed(&mut self, thorough: bool) -> u16 {
        self.backend.owed(thorough)
    }

    fn is_content(&mut self) {
        self.backend.is_content();
    }
}
