// SPDX-License-Identifier: MIT OR Apache-2.0
//! Another image that becomes what the disk is, and stays so: what is written to the disk is written there, too, as
//! far as it has been copied.
//!
//! Who writes has claimed its range, and so has who copies: no range is copied while it is written.

use crate::direct::Ban;
use control::stats::{Mirror, Mirroring};
use diskio::{Bytes, Data, Errno};
use drivers::{Attributes, Content, Disk, Extent};
use std::cell::{Cell, RefCell};
use std::future::Future;

/// Bytes that are copied at once.
pub(crate) const PIECE: u64 = 1 << 20;

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
    }

    fn failed(&self, what: &str, at: u64, error: Errno) {
        let error = std::io::Error::from(error);
        let why = format!("cannot {what} the other image at {at} of the disk: {error}");
        eprintln!("tapdisk: the mirror is ended: {why}");
        self.end(Mirroring::Failed { why });
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
        let work = async move |disk: Disk| disk.write(at, data, how).await;
        self.follow("write", at, work).await;
    }

    /// Makes zeroes of what becomes zeroes.
    pub(crate) async fn write_zeroes(&self, at: u64, len: u64) {
        let how = Attributes::default();
        let work = async move |disk: Disk| disk.write_zeroes(at, len, how).await;
        self.follow("zero", at, work).await;
    }

    /// A range of the disk reads as something else now.
    pub(crate) async fn copy_again(&self, from: &Disk, at: u64, len: u64) {
        let work = async |to: Disk| {
            // CAST: it is small.
            let buffer = Data::zeroed(PIECE as usize)?;
            let copied = copy(self.is_below, from, &to, &buffer, at, len).await;
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
        match copy(self.is_below, from, &to, buffer, at, len).await {
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
        match first(disk.extents(at, len).await) {
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
                if let Err(error) = disk.write_zeroes(at, len, how).await {
                    self.failed("zero", at, error);
                }
            }
            at += if there == 0 { len } else { there };
        }
    }

    /// Makes durable what is there by now.
    pub(crate) async fn flush(&self) {
        if let Some(disk) = self.active() {
            if let Err(error) = disk.flush().await {
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
        let durable = disk.inactivate().await;
        match durable.and(disk.close().await) {
            Err(error) => self.failed("close", 0, error),
            Ok(()) if is_same => self.end(Mirroring::Complete),
            Ok(()) => self.end(Mirroring::Ended),
        }
    }
}

/// What is at the beginning of a range of `from`; of one that goes on from another image, what it has itself.
async fn look(is_below: bool, from: &Disk, at: u64, len: u64) -> Result<Extent, Errno> {
    first(match is_below {
        true => from.layer(at, len).await,
        false => from.extents(at, len).await,
    })
}

/// Makes a range of `to`, from which `from` goes on if it `is_below`, read as that of `from`; says how many bytes were
/// written.
async fn copy(
    is_below: bool,
    from: &Disk,
    to: &Disk,
    buffer: &Data,
    at: u64,
    len: u64,
) -> Result<u64, Errno> {
    let (mut done, mut copied) = (0, 0);
    while done < len {
        let place = at + done;
        let here = look(is_below, from, place, len - done).await?;
        if is_below && here.content == Content::Below {
            done += here.len;
            continue;
        }
        if here.content == Content::Hole {
            let there = first(to.extents(place, here.len).await)?;
            if there.content != Content::Hole {
                to.write_zeroes(place, there.len, Attributes::default())
                    .await?;
                copied += there.len;
            }
            done += there.len;
            continue;
        }
        let count = here.len.min(buffer.len() as u64);
        // CAST: it is inside of the buffer.
        let part = buffer.part(0, count as usize);
        from.read(place, part.clone()).await?;
        to.write(place, part, Attributes::default()).await?;
        (done, copied) = (done + count, copied + count);
    }
    Ok(copied)
}

/// The first of the extents that were found.
pub(crate) fn first(found: Result<Vec<Extent>, Errno>) -> Result<Extent, Errno> {
    found?.first().copied().ok_or(Errno::IO)
}
