// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests of the kernel as calls of a driver.

mod quick;

use self::quick::QuickTable;
use crate::dirty_bitmap::DirtyBitmap;
use crate::kernel_link::KernelLink;
use crate::mirror_target::MirrorTarget;
use crate::passthrough::Direct;
use crate::ranges::{Range, RangeClaim, Ranges, Source};
use crate::throttle::{Throttle, Wanted};
use crate::tracer::{TracedRequest, Tracing};
use crate::writeback_errors::WritebackErrors;
use crate::IoErrorLog;
use control::stats::{Counter, Stats};
use control::tapdisk::{Call, OnError, Rules, Trouble};
use control::{Code, Failure};
use diskio::{of_earlier, Bytes, Errno, Runtime, SeenErrors};
use drivers::{Attributes, Disk, DiskInfo};
use futures::future::join;
use rustix::time::{clock_gettime, ClockId};
use std::cell::{Cell, RefCell};
use std::future::{poll_fn, Future};
use std::io;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;
use tapdev::abi::Completion;
use tapdev::{Kind, Request, Tap};
use trace::{Flags, Operation};

/// Conditions under which requests are served, whatever the disk is.
#[derive(Clone, Debug, Default)]
pub struct ServeConfig {
    /// Guests may not write.
    pub read_only: bool,
    /// The disk's lease is a reservation, so what its storage refuses was another host's to write.
    pub reserved: bool,
    /// Policy for requests that fail. It may change.
    pub rules: Rc<Cell<Rules>>,
    /// Holds the guest's requests back.
    pub throttle: Rc<Throttle>,
    /// Record of the requests that failed.
    pub troubles: Rc<IoErrorLog>,
    /// Data that no flush made durable, and the clients that know of the loss.
    pub lost: Rc<WritebackErrors>,
    /// Passthrough: the part of the disk that the kernel may serve without this process.
    pub direct: Rc<Direct>,
}

/// Failure of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failed {
    /// The error.
    pub(crate) error: Errno,
    /// Earlier writes that were answered may be lost. The system reports that once: another try would hide it.
    pub(crate) is_final: bool,
}

impl Failed {
    /// Nothing but this request failed.
    pub(crate) fn alone(error: Errno) -> Self {
        Self {
            error,
            is_final: false,
        }
    }

    fn for_good(error: Errno) -> Self {
        Self {
            error,
            is_final: true,
        }
    }
}

/// A disk that is served. Each request is a task of its own, or takes the short way without one.
#[derive(Debug)]
pub struct Server {
    runtime: Runtime,
    tap: Rc<Tap>,
    link: Rc<KernelLink>,
    disk: Disk,
    size: Cell<u64>,
    block: u32,
    terms: ServeConfig,
    stats: Rc<RefCell<Stats>>,
    in_flight: Cell<u64>,
    /// Ranges of the disk that requests of the guest and of others use.
    ranges: Ranges,
    quick: QuickTable,
    /// Tags that are being looked at; kept for its memory.
    tags: RefCell<Vec<u16>>,
    /// Tasks that wait until everything is over.
    quiet: RefCell<Vec<Waker>>,
    /// Tasks that wait for a moment without requests.
    calm: RefCell<Vec<Waker>>,
    /// Requests that came.
    came: Cell<u64>,
    /// Number of requests that had come when a drain began.
    drains: Cell<Option<u64>>,
    /// Other image that a mirror or a commit copies the disk to: writes of the disk go there as well.
    twin: RefCell<Option<Rc<MirrorTarget>>>,
    /// Dirty bitmap, which records the ranges of writes, if there is one.
    notes: RefCell<Option<Rc<DirtyBitmap>>>,
    /// Trace of the requests, if it is on.
    pub(crate) tracing: Tracing,
}

/// A discard costs as much as a write of `DISCARD_COST` bytes for each `DISCARD_UNIT` bytes begun, because the storage
/// changes its own tables, and writes no data.
const DISCARD_COST: u64 = 4 << 10;
const DISCARD_UNIT: u64 = 4 << 20;
/// A guest that is suspended has no more requests than its rings hold.
const SUSPENDED: u64 = tapdev::abi::MAX_TAGS as u64;
/// Time without a request after which a guest with empty rings counts as calm: the kernel may still take requests out
/// of them for which there was no room before.
const CALM: Duration = Duration::from_millis(2);

impl Server {
    /// Serves requests of `tap`, which is started, from `disk`, which is active and has this shape.
    /// [`turn`](Self::turn) is to be called again and again.
    pub fn new(
        runtime: &Runtime,
        tap: &Rc<Tap>,
        disk: Disk,
        shape: &DiskInfo,
        terms: ServeConfig,
        stats: &Rc<RefCell<Stats>>,
    ) -> Rc<Self> {
        let link = KernelLink::new(runtime, tap);
        Self::on_link(runtime, tap, link, disk, shape, terms, stats)
    }

    /// As [`new`](Self::new), with the link that the node has already.
    pub(crate) fn on_link(
        runtime: &Runtime,
        tap: &Rc<Tap>,
        link: Rc<KernelLink>,
        disk: Disk,
        shape: &DiskInfo,
        terms: ServeConfig,
        stats: &Rc<RefCell<Stats>>,
    ) -> Rc<Self> {
        link.start();
        Rc::new(Self {
            runtime: runtime.clone(),
            tap: tap.clone(),
            link,
            disk,
            size: Cell::new(shape.size),
            block: shape.logical_block,
            terms,
            stats: stats.clone(),
            in_flight: Cell::new(0),
            ranges: Ranges::default(),
            quick: QuickTable::default(),
            tags: RefCell::default(),
            quiet: RefCell::default(),
            calm: RefCell::default(),
            came: Cell::new(0),
            drains: Cell::new(None),
            twin: RefCell::default(),
            notes: RefCell::default(),
            tracing: Tracing::default(),
        })
    }

    /// Returns the disk that is served.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// The disk has another size now.
    pub fn set_size(&self, size: u64) {
        if self.size.replace(size) != size {
            self.terms.direct.resize(size);
        }
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size.get()
    }

    /// Guests may not write.
    pub fn is_read_only(&self) -> bool {
        self.terms.read_only
    }

    /// Bytes of a logical block.
    pub fn block(&self) -> u32 {
        self.block
    }

    /// Until this is dropped the disk is not closed, as if a request were executed.
    pub(crate) fn hold(self: &Rc<Self>) -> Hold {
        self.in_flight.set(self.in_flight.get() + 1);
        Hold(self.clone())
    }

    /// Waits until no other request is in the way of one that does not come from the guest, and holds later requests of
    /// the guest to this range back until the claim is dropped.
    pub async fn claim(&self, offset: u64, len: u64, writes: bool) -> RangeClaim {
        self.range(Source::Client, offset, len, writes).await
    }

    async fn range(&self, source: Source, offset: u64, len: u64, writes: bool) -> RangeClaim {
        let range = Range {
            from: offset,
            end: offset.saturating_add(len),
            writes,
        };
        self.ranges.claim(source, range).await
    }

    /// Requests that are executed now.
    pub fn in_flight(&self) -> u64 {
        self.in_flight.get()
    }

    /// Commits finished requests and makes tasks of new ones; true if any came. An error means that the kernel does not
    /// talk to us: the process has to end.
    pub fn turn(self: &Rc<Self>) -> io::Result<bool> {
        self.end_quick();
        self.terms.lost.turn(self.disk.owes());
        // A command takes the answers of a turn along when that is over, a call at once.
        self.tell_kernel();
        let mut tags = self.tags.take();
        self.link.pump(&mut tags)?;
        self.terms.direct.answered();
        if !self.link.has_commands() {
            self.tell_kernel();
        }
        let came = !tags.is_empty();
        // CAST: there are at most as many as a disk has.
        self.came
            .set(self.came.get().wrapping_add(tags.len() as u64));
        for tag in tags.drain(..) {
            match self.tap.request(tag) {
                Ok(request) => self.begin(request),
                Err(malformed) => self.link.commit(malformed.completion),
            }
        }
        *self.tags.borrow_mut() = tags;
        if !self.terms.lost.has_any() {
            self.look_for_places();
        }
        if self.is_quiet() {
            for waker in self.quiet.take() {
                waker.wake();
            }
        }
        if self.is_calm() || self.goes_on() {
            for waker in self.calm.take() {
                waker.wake();
            }
        }
        Ok(came)
    }

    /// Gives the kernel the places of the disk, unless writes are lost: the guest has to learn of that, and the kernel
    /// would not report it.
    fn tell_kernel(&self) {
        if !self.terms.lost.has_any() {
            self.terms.direct.turn();
        }
    }

    /// Gives the kernel the places of ranges that the guest asked for or will ask for, in a task of its own. The disk
    /// is not closed before that ends.
    fn look_for_places(self: &Rc<Self>) {
        let is_idle = self.in_flight.get() == 0 && self.is_fetching();
        if self.terms.direct.must_look(is_idle) {
            let hold = self.hold();
            self.runtime.tasks.spawn(async move {
                let server = &hold.0;
                server.terms.direct.look(&server.disk).await;
            });
        }
    }

    /// Serves a request, on the short way or in a task of its own.
    fn begin(self: &Rc<Self>, request: Request) {
        let Some(request) = self.begin_quick(request) else {
            return;
        };
        let hold = self.hold();
        let forgets = match request.kind {
            Kind::Discard { .. } | Kind::WriteZeroes => Some(self.terms.direct.forgets()),
            Kind::Read | Kind::Write | Kind::Flush => None,
        };
        self.runtime.tasks.spawn(async move {
            let server = &hold.0;
            server.link.commit(server.serve(&request).await);
            drop(forgets);
        });
    }

    /// Waits until the kernel serves no part of the disk any more. The kernel's I/O is on the image as if this process
    /// had done it.
    ///
    /// # Errors
    /// As the kernel says. The kernel may be using the image.
    pub(crate) async fn take_back(&self) -> Result<(), Failure> {
        self.terms.direct.end().await
    }

    /// Serves on until a guest that is suspended has nothing to ask for any more, and then [fetches](Self::quiesce) no
    /// more. Requests that come later wait in the kernel.
    ///
    /// # Errors
    /// Requests keep coming, or the disk has stopped for one that failed.
    pub(crate) async fn drain(&self) -> Result<(), Failure> {
        // This process does not see the requests that the kernel executes, so passthrough is off during the drain. The
        // guest gets it back if it resumes.
        let _ban = self.terms.direct.forbid().await?;
        self.drains.set(Some(self.came.get()));
        self.terms.throttle.look_again();
        let drained = self.until_calm().await;
        self.drains.set(None);
        drained?;
        self.take_back().await?;
        self.quiesce().await;
        Ok(())
    }

    async fn until_calm(&self) -> Result<(), Failure> {
        loop {
            poll_fn(
                |cx| match self.is_calm() || self.goes_on() || !self.is_fetching() {
                    true => Poll::Ready(()),
                    false => {
                        self.calm.borrow_mut().push(cx.waker().clone());
                        Poll::Pending
                    }
                },
            )
            .await;
            let before = self.came.get();
            let slept = self.runtime.io.sleep(CALM).await;
            slept.map_err(|error| Failure::system("cannot wait", &error.into()))?;
            if !self.is_fetching() {
                return Err(Failure::new(
                    Code::State,
                    "the disk has stopped because I/O on its image failed: repair its storage, then `tap-ctl unpause -m MINOR`",
                ));
            }
            if self.goes_on() {
                return Err(Failure::new(
                    Code::State,
                    "requests keep coming: the guest is not suspended",
                ));
            }
            let waiting = self.tap.look().map_or(0, |info| info.waiting);
            if self.came.get() == before && self.is_calm() && waiting == 0 {
                return Ok(());
            }
        }
    }

    /// True during a drain.
    pub(crate) fn is_draining(&self) -> bool {
        self.drains.get().is_some()
    }

    /// More came since a drain began than a suspended guest can have.
    fn goes_on(&self) -> bool {
        let first = self.drains.get();
        first.is_some_and(|first| self.came.get().wrapping_sub(first) > SUSPENDED)
    }

    /// Fetches no more, and waits until everything that was fetched is committed. The kernel keeps later requests.
    pub async fn quiesce(&self) {
        self.link.stop();
        self.terms.throttle.look_again();
        poll_fn(|cx| match self.is_quiet() {
            true => Poll::Ready(()),
            false => {
                self.quiet.borrow_mut().push(cx.waker().clone());
                Poll::Pending
            }
        })
        .await;
        self.tracing.settle();
    }

    /// True while the process fetches requests: the disk is not about to be closed.
    pub(crate) fn is_fetching(&self) -> bool {
        self.link.is_fetching()
    }

    fn is_quiet(&self) -> bool {
        self.in_flight.get() == 0 && self.link.is_quiet()
    }

    fn is_calm(&self) -> bool {
        self.in_flight.get() == 0 && self.link.is_calm()
    }

    /// Executes a request; returns its completion.
    async fn serve(&self, request: &Request) -> Completion {
        if let Err(error) = self.check(request) {
            let refused = async { Err(Failed::alone(error)) };
            let told = self.tracing.around(|| asked(request), refused).await;
            let result = told.map_err(|failed| failed.error);
            self.count(request, result);
            return request.done(result);
        }
        if !self.may_begin(request).await {
            return request.returned();
        }
        let executed = self.execute(request).await;
        self.complete(request, executed)
    }

    /// Returns the completion of a request that was executed, with this result.
    fn complete(&self, request: &Request, executed: Result<(), Failed>) -> Completion {
        let result = executed.map_err(|failed| failed.error);
        if let Err(failed) = executed {
            let what = match request.kind {
                Kind::Read => Call::Read,
                Kind::Write => Call::Write,
                Kind::Flush => Call::Flush,
                Kind::Discard { .. } => Call::Discard,
                Kind::WriteZeroes => Call::Zeroes,
            };
            if self.failed(what, request.offset, request.len, failed) {
                return request.returned();
            }
        }
        let writes = request.kind == Kind::Write;
        if result.is_ok() && (writes || request.kind == Kind::Read) {
            let direct = &self.terms.direct;
            direct.missed(request.offset, request.len, writes);
        }
        self.count(request, result);
        request.done(result)
    }

    /// Waits until the guest may have this done; false if it is not to be done here any more.
    async fn may_begin(&self, request: &Request) -> bool {
        let Some(bytes) = cost(request.kind, request.len) else {
            return true;
        };
        let is_wanted = || match (self.is_draining(), self.is_fetching()) {
            (true, _) => Wanted::Now,
            (false, true) => Wanted::InTime,
            (false, false) => Wanted::NoMore,
        };
        let throttle = &self.terms.throttle;
        throttle.pass(&self.runtime, bytes, is_wanted).await
    }

    /// Something failed on the image. True if the request is to be kept: nothing is served any more
    /// until the disk was paused and unpaused.
    pub(crate) fn failed(&self, what: Call, offset: u64, len: u64, failed: Failed) -> bool {
        let Failed { error, is_final } = failed;
        let rules = self.terms.rules.get();
        let policy = match error {
            // An operation that the image does not support is no failure of its storage.
            Errno::OPNOTSUPP => return false,
            Errno::NOSPC | Errno::DQUOT => rules.on_no_space,
            // A host that takes the reservation away ends the I/O under way, by whatever error its driver has for that.
            _ if self.terms.reserved => OnError::Stop,
            _ => rules.on_error,
        };
        let stops = self.is_lost_lease(error) || (policy == OnError::Stop && !is_final);
        self.tell(what, offset, len, error, stops);
        if stops {
            self.link.stop();
            self.terms.throttle.look_again();
            self.stop_kernel();
            for waker in self.calm.take() {
                waker.wake();
            }
        }
        stops
    }

    /// The storage has refused something because it is reserved for another host. The guest learns nothing of it,
    /// whatever it is to learn of failures: its requests wait until the disk has the lease again. Nothing was lost by
    /// it either, because a disk with a reservation has nothing in the page cache.
    pub(crate) fn is_lost_lease(&self, error: Errno) -> bool {
        self.terms.reserved && error == Errno::BADE
    }

    /// Nothing is served any more, by the kernel either.
    fn stop_kernel(&self) {
        let direct = self.terms.direct.clone();
        self.runtime.tasks.spawn(async move {
            // A later pause of the disk tries once more, and reports the failure.
            if let Err(failure) = direct.end().await {
                diskio::say!("tapdisk: the disk does not stop: {failure}");
            }
        });
    }

    /// Something failed on the image; the disk stops for it, or not.
    pub(crate) fn tell(&self, what: Call, offset: u64, len: u64, error: Errno, stops: bool) {
        let trouble = Trouble {
            what,
            offset,
            len,
            errno: error.raw_os_error(),
        };
        self.terms.troubles.add(trouble, stops);
    }

    /// Checks that the request makes sense for this disk, whatever its image can do.
    fn check(&self, request: &Request) -> Result<(), Errno> {
        let end = request.offset.checked_add(request.len);
        if end.is_none_or(|end| end > self.size.get()) {
            return Err(Errno::IO);
        }
        if self.terms.read_only && !matches!(request.kind, Kind::Read | Kind::Flush) {
            return Err(Errno::ROFS);
        }
        // To promise that nothing can be recovered takes more than a driver can say.
        if request.kind == (Kind::Discard { secure: true }) {
            return Err(Errno::OPNOTSUPP);
        }
        Ok(())
    }

    async fn execute(&self, request: &Request) -> Result<(), Failed> {
        let _claim = match request.kind {
            Kind::Flush => None,
            kind => {
                let (offset, len) = (request.offset, request.len);
                let claim = self.range(Source::Guest, offset, len, kind != Kind::Read);
                Some(claim.await)
            }
        };
        let asked = || asked(request);
        self.tracing
            .around(asked, self.execute_alone(request))
            .await
    }

    /// Executes a request. Nothing that overlaps is in its way.
    async fn execute_alone(&self, request: &Request) -> Result<(), Failed> {
        let guest = self.terms.lost.guest();
        if request.preflush {
            self.flush(guest).await?;
        }
        let how = Attributes {
            fua: request.fua,
            replay: request.replay,
            sequence: Some(request.sequence),
        };
        let (offset, len) = (request.offset, request.len);
        let work = async {
            let data = || request.data.clone().ok_or(Errno::INVAL);
            match request.kind {
                Kind::Read => self.disk.read(offset, data()?).await,
                Kind::Write => self.write(offset, data()?.into(), how).await,
                Kind::Flush => Ok(()),
                Kind::Discard { .. } => self.discard(offset, len, how).await,
                Kind::WriteZeroes => self.write_zeroes(offset, len, how).await,
            }
        };
        match request.kind {
            Kind::Flush => self.flush(guest).await,
            Kind::Read => work.await.map_err(Failed::alone),
            _ => self.changing(how.fua, work).await,
        }
    }

    /// Returns the other image that a mirror or a commit copies the disk to, if there is one.
    pub(crate) fn twin(&self) -> Option<Rc<MirrorTarget>> {
        self.twin.borrow().clone()
    }

    pub(crate) fn set_twin(&self, twin: Option<Rc<MirrorTarget>>) {
        self.twin.replace(twin);
    }

    /// Sets or removes the dirty bitmap, which records writes from now on.
    pub(crate) fn set_notes(&self, notes: Option<Rc<DirtyBitmap>>) {
        self.notes.replace(notes);
    }

    /// Returns the dirty bitmap, if there is one.
    pub(crate) fn notes(&self) -> Option<Rc<DirtyBitmap>> {
        self.notes.borrow().clone()
    }

    /// Marks a range in the dirty bitmap before a write. If that fails, the caller must not write the range.
    fn note(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let notes = self.notes.borrow();
        notes
            .as_ref()
            .map_or(Ok(()), |notes| notes.add(offset, len))
    }

    /// Writes a range that is claimed. A commit's backing image changes only after the image over it has the range
    /// allocated.
    pub(crate) async fn write(
        &self,
        offset: u64,
        data: Bytes,
        how: Attributes,
    ) -> Result<(), Errno> {
        let len = data.len() as u64;
        self.note(offset, len)?;
        let Some(twin) = self.twin() else {
            return self.disk.write(offset, data, how).await;
        };
        let own = self.disk.write(offset, data.clone(), how);
        if twin.is_below() {
            own.await?;
            twin.write(offset, data).await;
            return Ok(());
        }
        let (written, ()) = join(own, twin.write(offset, data)).await;
        self.after(&twin, written, offset, len).await
    }

    /// Makes zeroes of a range that is claimed.
    pub(crate) async fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        how: Attributes,
    ) -> Result<(), Errno> {
        self.note(offset, len)?;
        let own = self.disk.write_zeroes(offset, len, how);
        let Some(twin) = self.twin() else {
            return own.await;
        };
        if twin.is_below() {
            own.await?;
            twin.write_zeroes(offset, len).await;
            return Ok(());
        }
        let (zeroed, ()) = join(own, twin.write_zeroes(offset, len)).await;
        self.after(&twin, zeroed, offset, len).await
    }

    /// Handles the result of an operation on both: if it failed here, only this disk has the content, which is copied
    /// again.
    async fn after(
        &self,
        twin: &MirrorTarget,
        done: Result<(), Errno>,
        offset: u64,
        len: u64,
    ) -> Result<(), Errno> {
        if done.is_err() {
            twin.copy_again(&self.disk, offset, len).await;
        }
        done
    }

    /// Forgets a range that is claimed.
    pub(crate) async fn discard(
        &self,
        offset: u64,
        len: u64,
        how: Attributes,
    ) -> Result<(), Errno> {
        self.note(offset, len)?;
        let discarded = self.disk.discard(offset, len, how).await;
        // Only this disk has the content now, also if the discard failed.
        if let Some(twin) = self.twin().filter(|_| discarded != Err(Errno::OPNOTSUPP)) {
            twin.copy_again(&self.disk, offset, len).await;
        }
        discarded
    }

    /// Does `work`, which changes the disk, and makes that durable if `fua`. The result reports no loss of earlier
    /// writes: the next flush does, also if they were lost here.
    pub(crate) async fn changing(
        &self,
        fua: bool,
        work: impl Future<Output = Result<(), Errno>>,
    ) -> Result<(), Failed> {
        let lost = &self.terms.lost;
        let writing = lost.write();
        let error = match work.await {
            // The flush that made it durable may have come after one that lost a part of it, which another request
            // has reported.
            Ok(()) => match lost.since(&writing).filter(|_| fua) {
                Some(error) => return Err(Failed::for_good(of_earlier(error))),
                None => {
                    lost.acknowledge(writing);
                    return Ok(());
                }
            },
            Err(error) => error,
        };
        Err(match error {
            // These errors are of the work alone, see `Attributes::fua`.
            Errno::NOSPC | Errno::DQUOT | Errno::OPNOTSUPP => Failed::alone(error),
            _ if self.is_lost_lease(error) => Failed::alone(error),
            _ if fua => {
                lost.add(error);
                self.leave_kernel_out(error).await;
                Failed::for_good(error)
            }
            _ => Failed::alone(error),
        })
    }

    /// Makes all writes durable, for one of the writers.
    pub(crate) async fn flush(&self, by: &SeenErrors) -> Result<(), Failed> {
        let lost = &self.terms.lost;
        let flushing = lost.begin(by);
        // Also where an error is owed: the driver may owe one of its own, and this flush reports both.
        let done = match self.terms.read_only {
            true => Ok(()),
            false => self.disk.flush().await,
        };
        // The storage refuses the lease's holder of before, which loses nothing.
        if let Err(error) = done {
            if self.is_lost_lease(error) {
                return Err(Failed::alone(error));
            }
        }
        let told = lost.end(by, flushing, done);
        if let Err(error) = done {
            self.leave_kernel_out(error).await;
        }
        told.map_err(Failed::for_good)
    }

    /// Stops passthrough after a loss that this request reports to the guest. So the kernel flushes nothing any more,
    /// and the writes that it has executed until now may be lost as well.
    async fn leave_kernel_out(&self, error: Errno) {
        let direct = &self.terms.direct;
        if error == Errno::OPNOTSUPP || !direct.is_used() {
            return;
        }
        // A later pause of the disk tries once more, and reports the failure.
        if let Err(failure) = direct.end().await {
            diskio::say!("tapdisk: the kernel keeps serving the disk: {failure}");
        }
        self.terms.lost.add(error);
    }

    fn count(&self, request: &Request, result: Result<(), Errno>) {
        let mut stats = self.stats.borrow_mut();
        let (held, held_ns) = self.terms.throttle.take_held();
        stats.held += held;
        stats.held_ns = stats.held_ns.saturating_add(held_ns);
        stats.replayed += u64::from(request.replay);
        let counter: &mut Counter = match request.kind {
            Kind::Read => &mut stats.read,
            Kind::Write => &mut stats.write,
            Kind::Flush => &mut stats.flush,
            Kind::Discard { .. } => &mut stats.discard,
            Kind::WriteZeroes => &mut stats.zeroes,
        };
        counter.requests += 1;
        match result {
            Ok(()) => counter.bytes += request.len,
            Err(_) => counter.errors += 1,
        }
        counter
            .latency
            .add(now_ns().saturating_sub(request.arrived_ns));
    }
}

/// Returns the bytes that a request counts in the rate limits; nothing if it never waits for them.
fn cost(kind: Kind, len: u64) -> Option<u64> {
    match kind {
        // The limit has admitted the writes that a flush makes durable.
        Kind::Flush => None,
        // Storage without a command for zeroes writes them.
        Kind::Read | Kind::Write | Kind::WriteZeroes => Some(len),
        Kind::Discard { .. } => {
            let units = len.div_ceil(DISCARD_UNIT);
            Some(units.saturating_mul(DISCARD_COST))
        }
    }
}

/// A request of the guest that the trace records.
fn asked(request: &Request) -> TracedRequest {
    let (operation, writes) = match request.kind {
        Kind::Read => (Operation::Read, false),
        Kind::Write => (Operation::Write, true),
        Kind::Flush => (Operation::Flush, false),
        Kind::Discard { .. } => (Operation::Discard, false),
        Kind::WriteZeroes => (Operation::Zeroes, false),
    };
    TracedRequest {
        operation,
        offset: request.offset,
        len: request.len,
        flags: Flags {
            fua: request.fua,
            preflush: request.preflush,
            replay: request.replay,
            client: false,
        },
        data: request.data.clone().filter(|_| writes).map(Bytes::from),
    }
}

/// A request that is executed.
#[derive(Debug)]
pub(crate) struct Hold(Rc<Server>);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.in_flight.set(self.0.in_flight.get() - 1);
    }
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub(crate) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // CAST: neither is negative.
    (now.tv_sec as u64)
        .wrapping_mul(1_000_000_000)
        .wrapping_add(now.tv_nsec as u64)
}

#[cfg(test)]
mod tests {
    use super::cost;
    use tapdev::Kind;

    #[test]
    fn discards_and_zeroes_cost_something() {
        let discard = Kind::Discard { secure: false };
        assert_eq!(cost(Kind::Flush, 0), None);
        assert_eq!(cost(Kind::Write, 512), Some(512));
        assert_eq!(cost(Kind::WriteZeroes, 1 << 30), Some(1 << 30));
        assert_eq!(cost(discard, 512), Some(4096));
        assert_eq!(cost(discard, (4 << 20) + 512), Some(8192));
        assert_eq!(cost(discard, 1 << 40), Some(1 << 30));
        assert!(cost(discard, u64::MAX).is_some_and(|cost| cost < u64::MAX / 1000));
    }
}
