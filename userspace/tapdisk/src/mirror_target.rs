// SPDX-License-Identifier: MIT OR Apache-2.0
//! Mirror: another image that becomes a copy of the disk, and stays one: writes to the disk go there as well, in the
//! range that is copied already.
//!
//! A writer claims its range, and so does the copying job: no range is copied during a write to it.
//!
//! The guest waits for the other image only for a limited time. If its server is away or its storage hangs, the mirror
//! fails, because an administrator can make another copy.

use crate::io_errors::wait;
use crate::passthrough::PassthroughBan;
use control::stats::{Mirror, Mirroring};
use diskio::{Bytes, Data, Errno, File, Io, LockKind};
use drivers::{Attributes, Content, Disk, Extent};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::{poll_fn, Future};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

/// Bytes that are copied at once.
pub(crate) const PIECE: u64 = 1 << 20;
/// Time limit for an answer of the other image.
const PATIENCE: Duration = Duration::from_secs(30);
/// Time between two checks for late answers.
const LOOK: Duration = Duration::from_secs(5);

/// The other image, as long as there is one, and how far it is.
#[derive(Debug)]
pub(crate) struct MirrorTarget {
    disk: RefCell<Option<Disk>>,
    /// Bytes that it has; the disk has no more.
    size: u64,
    /// True if it is the disk's backing image, which has the clusters that the disk's image lacks.
    is_below: bool,
    /// Offset in bytes before which both are the same.
    position: Cell<u64>,
    told: RefCell<Mirror>,
    /// Since when is waited for each answer.
    asked: RefCell<BTreeMap<u64, Instant>>,
    /// Number of the last request to the other image.
    questions: Cell<u64>,
    /// Tasks that wait for its answers.
    waiting: RefCell<Vec<Waker>>,
    /// True if a request that the other image may still execute was abandoned.
    is_left: Cell<bool>,
    /// The kernel would write one of the two only.
    ban: RefCell<Option<PassthroughBan>>,
    /// Lock of the backing image, for writing instead of reading, if the other image is that.
    lock: RefCell<Option<WriteLock>>,
}

impl MirrorTarget {
    pub(crate) fn new(
        disk: Disk,
        size: u64,
        lock: Option<WriteLock>,
        is_below: bool,
        ban: PassthroughBan,
    ) -> Self {
        Self {
            disk: RefCell::new(Some(disk)),
            size,
            is_below,
            position: Cell::new(0),
            told: RefCell::default(),
            asked: RefCell::default(),
            questions: Cell::default(),
            waiting: RefCell::default(),
            is_left: Cell::new(false),
            ban: RefCell::new(Some(ban)),
            lock: RefCell::new(lock),
        }
    }

    /// Returns its progress.
    pub(crate) fn told(&self) -> Mirror {
        self.told.borrow().clone()
    }

    /// Returns true if it is the disk's backing image.
    pub(crate) fn is_below(&self) -> bool {
        self.is_below
    }

    /// Returns the content at the beginning of a range of the disk.
    pub(crate) async fn look(&self, disk: &Disk, at: u64, len: u64) -> Result<Extent, Errno> {
        look(self.is_below, disk, at, len).await
    }

    /// Returns true if the mirror has not ended.
    pub(crate) fn is_active(&self) -> bool {
        self.disk.borrow().is_some()
    }

    /// DirtyBitmap that all of it equals the disk.
    pub(crate) fn is_same(&self) {
        if self.is_active() {
            self.told.borrow_mut().state = Mirroring::Same;
        }
    }

    fn active(&self) -> Option<Disk> {
        self.disk.borrow().clone()
    }

    /// Ends the mirror. The guest continues without it.
    pub(crate) fn end(&self, state: Mirroring) {
        if self.disk.take().is_some() {
            self.told.borrow_mut().state = state;
        }
        self.ban.take();
        self.lock.take();
        self.waiting.take().into_iter().for_each(Waker::wake);
    }

    fn failed(&self, what: &str, at: u64, error: Errno) {
        let error = std::io::Error::from(error);
        self.give_up(format!(
            "cannot {what} the other image at {at} of the disk: {error}"
        ));
    }

    fn give_up(&self, why: String) {
        if self.is_active() {
            diskio::say!("tapdisk: the mirror is ended: {why}");
            self.end(Mirroring::Failed { why });
        }
    }

    /// Returns true if the other image may still execute requests whose answers are lost.
    pub(crate) fn is_unsure(&self) -> bool {
        self.is_left.get() || matches!(self.told.borrow().state, Mirroring::Failed { .. })
    }

    /// Returns the answer of the other image, or [`Errno::CANCELED`] if the mirror ends before that.
    async fn answer<T>(&self, work: impl Future<Output = Result<T, Errno>>) -> Result<T, Errno> {
        let _asked = Question::new(self);
        let mut work = pin!(work);
        poll_fn(|cx| {
            if let done @ Poll::Ready(_) = work.as_mut().poll(cx) {
                return done;
            }
            if self.is_active() {
                wait(&mut self.waiting.borrow_mut(), cx.waker());
                return Poll::Pending;
            }
            self.is_left.set(true);
            Poll::Ready(Err(Errno::CANCELED))
        })
        .await
    }

    /// Gives the other image up if it does not answer.
    pub(crate) async fn watch(self: Rc<Self>, io: Io) {
        while self.is_active() {
            if io.sleep(LOOK).await.is_err() {
                return self.give_up("there is no clock to wait for the other image with".into());
            }
            let oldest = self.asked.borrow().values().min().copied();
            if oldest.is_some_and(|since| since.elapsed() >= PATIENCE) {
                self.give_up(format!(
                    "the other image has not answered for {} s",
                    PATIENCE.as_secs()
                ));
            }
        }
    }

    /// Repeats there a change of a range of the disk. If that fails, the mirror ends.
    async fn follow<W: Future<Output = Result<(), Errno>>>(
        &self,
        what: &str,
        at: u64,
        work: impl FnOnce(Disk) -> W,
    ) {
        let Some(disk) = self.active().filter(|_| at < self.position.get()) else {
            return;
        };
        if let Err(error) = work(disk).await {
            self.failed(what, at, error);
        }
    }

    /// Repeats a write of the disk there.
    pub(crate) async fn write(&self, at: u64, data: Bytes) {
        let how = Attributes::default();
        let work = async move |disk: Disk| self.answer(disk.write(at, data, how)).await;
        self.follow("write", at, work).await;
    }

    /// Makes zeroes of what becomes zeroes.
    pub(crate) async fn write_zeroes(&self, at: u64, len: u64) {
        let how = Attributes::default();
        let work = async move |disk: Disk| self.answer(disk.write_zeroes(at, len, how)).await;
        self.follow("zero", at, work).await;
    }

    /// A range of the disk reads as something else now.
    pub(crate) async fn copy_again(&self, from: &Disk, at: u64, len: u64) {
        let work = async |to: Disk| {
            // CAST: it is small.
            let buffer = Data::zeroed(PIECE as usize)?;
            let copied = self.transfer(from, &to, &buffer, at, len).await;
            copied.map(drop)
        };
        self.follow("copy to", at, work).await;
    }

    /// Copies a range without writers behind the copied part, and returns the number of copied bytes. The copied part
    /// then includes the range.
    pub(crate) async fn copy(&self, from: &Disk, buffer: &Data, at: u64, len: u64) -> u64 {
        let Some(to) = self.active() else {
            return 0;
        };
        match self.transfer(from, &to, buffer, at, len).await {
            Ok(copied) => {
                self.position.set(at + len);
                let mut told = self.told.borrow_mut();
                told.offset = at + len;
                told.copied += copied;
                copied
            }
            Err(error) => {
                self.failed("copy to", at, error);
                0
            }
        }
    }

    /// Returns how many bytes from a place on hold no data there either, of a range that is a hole of the disk. They
    /// need no copy, and more can be checked at once.
    pub(crate) async fn hole(&self, at: u64, len: u64) -> u64 {
        let Some(disk) = self.active() else {
            return 0;
        };
        match first(self.answer(disk.extents(at, len)).await) {
            Ok(there) if there.content == Content::Hole => there.len,
            // The copy itself meets the error.
            _ => 0,
        }
    }

    /// Clears the other image behind the disk's end, because the guest sees that part when the disk is served from
    /// there.
    pub(crate) async fn clear_rest(&self, from: u64) {
        let mut at = from;
        while let Some(disk) = self.active().filter(|_| at < self.size) {
            let len = (self.size - at).min(PIECE);
            let there = self.hole(at, len).await;
            if there == 0 {
                let how = Attributes::default();
                if let Err(error) = self.answer(disk.write_zeroes(at, len, how)).await {
                    self.failed("zero", at, error);
                }
            }
            at += if there == 0 { len } else { there };
        }
    }

    /// Makes all copied data durable.
    pub(crate) async fn flush(&self) {
        if let Some(disk) = self.active() {
            if let Err(error) = self.answer(disk.flush()).await {
                self.failed("flush", 0, error);
            }
        }
    }

    /// Closes the other image after the last change of the disk: it is a complete copy if it was equal before.
    pub(crate) async fn close(&self) {
        let Some(disk) = self.active() else {
            return;
        };
        let is_same = self.told.borrow().state == Mirroring::Same;
        let let_go = async { disk.inactivate().await.and(disk.close().await) };
        match self.answer(let_go).await {
            Err(error) => self.failed("close", 0, error),
            Ok(()) if is_same => self.end(Mirroring::Complete),
            Ok(()) => self.end(Mirroring::Ended),
        }
    }

    /// Makes a range of `to` read like that of `from`, whose backing image `to` is if it is below, and returns the
    /// number of changed bytes.
    async fn transfer(
        &self,
        from: &Disk,
        to: &Disk,
        buffer: &Data,
        at: u64,
        len: u64,
    ) -> Result<u64, Errno> {
        let (mut done, mut copied) = (0, 0);
        while done < len {
            let place = at + done;
            let here = look(self.is_below, from, place, len - done).await?;
            if self.is_below && here.content == Content::Below {
                done += here.len;
                continue;
            }
            if here.content == Content::Hole {
                let there = first(self.answer(to.extents(place, here.len)).await)?;
                if there.content != Content::Hole {
                    let how = Attributes::default();
                    self.answer(to.write_zeroes(place, there.len, how)).await?;
                    copied += there.len;
                }
                done += there.len;
                continue;
            }
            let count = here.len.min(buffer.len() as u64);
            // CAST: it is inside of the buffer.
            let part = buffer.part(0, count as usize);
            from.read(place, part.clone()).await?;
            self.answer(to.write(place, part, Attributes::default()))
                .await?;
            (done, copied) = (done + count, copied + count);
        }
        Ok(copied)
    }
}

/// The write lock of the disk's backing image. Its end gives the process that reads the image its read lock back, because
/// the disk still needs it as it is.
#[derive(Debug)]
pub(crate) struct WriteLock {
    file: File,
    view: File,
}

impl WriteLock {
    /// Makes the guard of the lock that was taken on `file`; the reader of the image has it open as `view`.
    pub(crate) fn new(file: &File, view: &File) -> Self {
        Self {
            file: file.clone(),
            view: view.clone(),
        }
    }
}

impl Drop for WriteLock {
    fn drop(&mut self) {
        // First of the writer, so that no other process can lock it for writing between the two.
        let read = self.file.lock(LockKind::Read);
        if let Err(error) = read.and_then(|()| self.view.lock(LockKind::Read)) {
            diskio::say!(
                "tapdisk: the image below is not locked any more, others may write it: {error}"
            );
        }
    }
}

/// Request to the other image that is under way as long as this exists.
struct Question<'a> {
    twin: &'a MirrorTarget,
    number: u64,
}

impl<'a> Question<'a> {
    fn new(twin: &'a MirrorTarget) -> Self {
        let number = twin.questions.get();
        twin.questions.set(number + 1);
        twin.asked.borrow_mut().insert(number, Instant::now());
        Self { twin, number }
    }
}

impl Drop for Question<'_> {
    fn drop(&mut self) {
        self.twin.asked.borrow_mut().remove(&self.number);
    }
}

/// Returns the content at the beginning of a range of `from`; if `is_below`, of its own image alone.
async fn look(is_below: bool, from: &Disk, at: u64, len: u64) -> Result<Extent, Errno> {
    first(match is_below {
        true => from.layer(at, len).await,
        false => from.extents(at, len).await,
    })
}

/// The first of the extents that were found.
pub(crate) fn first(found: Result<Vec<Extent>, Errno>) -> Result<Extent, Errno> {
    found?.first().copied().ok_or(Errno::IO)
}
