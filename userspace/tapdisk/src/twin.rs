// SPDX-License-Identifier: MIT OR Apache-2.0
//! Another image that becomes what the disk is, and stays so: what is written to the disk is written there, too, as
//! far as it has been copied.
//!
//! Who writes has claimed its range, and so has who copies: no range is copied while it is written.
//!
//! The guest waits for the other image only so long. One that does not answer, because its server is away or its storage
//! hangs, is given up: it is a copy, and another one can be made.

use crate::direct::Ban;
use crate::troubles::wait;
use control::stats::{Mirror, Mirroring};
use diskio::{Bytes, Data, Errno, Io};
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
/// How long is waited for an answer of the other image.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often is looked whether one is late.
const LOOK: Duration = Duration::from_secs(5);

/// The other image, as long as there is one, and how far it is.
#[derive(Debug)]
pub(crate) struct Twin {
    disk: RefCell<Option<Disk>>,
    /// Bytes that it has; the disk has no more.
    size: u64,
    /// The disk goes on from it: what the disk's image has not itself is there already.
    is_below: bool,
    /// What is before this is the same on both.
    position: Cell<u64>,
    told: RefCell<Mirror>,
    /// Since when is waited for each answer.
    asked: RefCell<BTreeMap<u64, Instant>>,
    /// Numbers what is asked.
    questions: Cell<u64>,
    /// Who waits for answers.
    waiting: RefCell<Vec<Waker>>,
    /// Nobody waits any more for something that may still be done there.
    is_left: Cell<bool>,
    /// The kernel would write one of the two only.
    ban: RefCell<Option<Ban>>,
}

impl Twin {
    pub(crate) fn new(disk: Disk, size: u64, is_below: bool, ban: Ban) -> Self {
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
        }
    }

    /// How far it is.
    pub(crate) fn told(&self) -> Mirror {
        self.told.borrow().clone()
    }

    /// The disk goes on from it.
    pub(crate) fn is_below(&self) -> bool {
        self.is_below
    }

    /// What is at the beginning of a range of the disk.
    pub(crate) async fn look(&self, disk: &Disk, at: u64, len: u64) -> Result<Extent, Errno> {
        look(self.is_below, disk, at, len).await
    }

    /// It is still to become what the disk is, or to stay so.
    pub(crate) fn is_active(&self) -> bool {
        self.disk.borrow().is_some()
    }

    /// All of it is what the disk is.
    pub(crate) fn is_same(&self) {
        if self.is_active() {
            self.told.borrow_mut().state = Mirroring::Same;
        }
    }

    fn active(&self) -> Option<Disk> {
        self.disk.borrow().clone()
    }

    /// It is of no use any more. The guest goes on as if there were none.
    pub(crate) fn end(&self, state: Mirroring) {
        if self.disk.take().is_some() {
            self.told.borrow_mut().state = state;
        }
        self.ban.take();
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

    /// What was asked there may be executed yet, where nobody sees it.
    pub(crate) fn is_unsure(&self) -> bool {
        self.is_left.get() || matches!(self.told.borrow().state, Mirroring::Failed { .. })
    }

    /// What the other image answers, or [`Errno::CANCELED`] if it is of no use any more before that.
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

    /// Does there what is done to a range of the disk. If that fails, it is of no use any more.
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

    /// Writes what is written to the disk.
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

    /// Copies a range that nobody writes, behind what is the same; says how many bytes that were. From now on it
    /// is the same.
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

    /// Bytes from a place on that hold no data there either, of a range that is a hole of the disk. Of them nothing is
    /// to be done, and more can be looked at once.
    pub(crate) async fn hole(&self, at: u64, len: u64) -> u64 {
        let Some(disk) = self.active() else {
            return 0;
        };
        match first(self.answer(disk.extents(at, len)).await) {
            Ok(there) if there.content == Content::Hole => there.len,
            // Who copies finds out.
            _ => 0,
        }
    }

    /// What is behind the disk's end is zeroes: the guest sees it when it is served from here.
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

    /// Makes durable what is there by now.
    pub(crate) async fn flush(&self) {
        if let Some(disk) = self.active() {
            if let Err(error) = self.answer(disk.flush()).await {
                self.failed("flush", 0, error);
            }
        }
    }

    /// Nothing is done to the disk any more: the other one is let go of, and is what the disk is if it was before.
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

    /// Makes a range of `to`, from which `from` goes on if it is below, read as that of `from`; says how many bytes were
    /// written.
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

/// The other image is asked something, as long as this is there.
struct Question<'a> {
    twin: &'a Twin,
    number: u64,
}

impl<'a> Question<'a> {
    fn new(twin: &'a Twin) -> Self {
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

/// What is at the beginning of a range of `from`; of one that goes on from another image, what it has itself.
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
