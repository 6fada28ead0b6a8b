// SPDX-License-Identifier: MIT OR Apache-2.0
//! Room for new blocks.

use super::footer::{self, Footer};
use crate::barrier::Barrier;
use crate::Storage;
use diskio::{Bytes, Errno, Gate};
use std::cell::{Cell, RefCell};

/// What the bytes of a block begin at multiples of, and what the image is made longer by.
pub(crate) const PAGE: u64 = 4096;
/// Blocks that room is made for at once.
const BLOCKS: u64 = 16;
/// Gaps that are made ready at once.
const GAPS: usize = 16;

/// Where blocks may go. Whatever is handed out reads as zeroes, also after the loss of power.
#[derive(Debug)]
pub(crate) struct Room<S> {
    /// Bytes of a bitmap, and of a block with it.
    bitmap: u64,
    len: u64,
    /// Behind the last block: where the next one goes, and where what is zero ends.
    next: Cell<u64>,
    limit: Cell<u64>,
    /// Places that are free and zero.
    free: RefCell<Vec<u64>>,
    /// Places that were given up, and the flush that each waits for: the table in the image may still say
    /// otherwise.
    given_up: RefCell<Vec<(u64, u64)>>,
    /// All flushes: an error is told to one of several at the same time, and concerns them all.
    durable: Barrier<S>,
    /// Places that nothing points to, with anything in them.
    gaps: RefCell<Vec<u64>>,
    /// One makes room, for all who want some.
    gate: Gate,
}

impl<S: Storage> Room<S> {
    pub(crate) fn new(
        storage: &S,
        (bitmap, block): (u64, u64),
        end: u64,
        gaps: &[(u64, u64)],
    ) -> Self {
        let len = bitmap.saturating_add(block);
        let room = Self {
            bitmap,
            len,
            next: Cell::new(0),
            limit: Cell::new(0),
            free: RefCell::default(),
            given_up: RefCell::default(),
            durable: Barrier::new(vec![storage.clone()]),
            gaps: RefCell::default(),
            gate: Gate::default(),
        };
        let mut places = Vec::new();
        for (from, to) in gaps {
            let mut place = room.align(*from);
            while place.saturating_add(len) <= *to {
                places.push(place);
                place = room.align(place.saturating_add(len));
            }
        }
        room.gaps.replace(places);
        room.next.set(room.align(end));
        room.limit.set(room.next.get());
        room
    }

    /// The first place from `at` on whose bytes are aligned.
    fn align(&self, at: u64) -> u64 {
        let data = at.saturating_add(self.bitmap);
        let aligned = data.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
        aligned - self.bitmap
    }

    /// A place for a block, in sectors.
    pub(crate) async fn take(&self, storage: &impl Storage, footer: &Footer) -> Result<u32, Errno> {
        if let Some(sector) = self.ready()? {
            return Ok(sector);
        }
        let _pass = self.gate.alone().await;
        loop {
            // Somebody else may have made some meanwhile.
            if let Some(sector) = self.ready()? {
                return Ok(sector);
            }
            if storage.is_fixed() && self.gaps.borrow().is_empty() {
                self.go_on(storage)?;
            }
            // The borrow must not last.
            let has_gaps = !self.gaps.borrow().is_empty();
            match has_gaps {
                true => self.clean(storage).await?,
                false => self.extend(storage, footer).await?,
            }
        }
    }

    /// A place that is there without I/O.
    fn ready(&self) -> Result<Option<u32>, Errno> {
        let free = self.free.borrow_mut().pop();
        let place = match free {
            Some(place) => place,
            None => {
                let place = self.next.get();
                let end = place.checked_add(self.len).ok_or(Errno::FBIG)?;
                if end > self.limit.get() {
                    return Ok(None);
                }
                self.next.set(self.align(end));
                place
            }
        };
        let sector = u32::try_from(place / 512).ok();
        let sector = sector.filter(|sector| *sector != super::blocks::UNUSED);
        // The table has no larger numbers.
        sector.map(Some).ok_or(Errno::FBIG)
    }

    /// A device is as long as it is: what is behind the last block is gaps of any content.
    fn go_on(&self, storage: &impl Storage) -> Result<(), Errno> {
        let end = storage.size()?.saturating_sub(footer::LEN as u64);
        let mut gaps = self.gaps.borrow_mut();
        let mut place = self.next.get();
        while gaps.len() < GAPS && place.saturating_add(self.len) <= end {
            gaps.push(place);
            place = self.align(place.saturating_add(self.len));
        }
        self.next.set(place);
        self.limit.set(place);
        match gaps.is_empty() {
            true => Err(Errno::NOSPC),
            false => Ok(()),
        }
    }

    /// Makes gaps readable as zeroes.
    async fn clean(&self, storage: &impl Storage) -> Result<(), Errno> {
        let some: Vec<u64> = {
            let gaps = self.gaps.borrow();
            gaps.iter().rev().take(GAPS).copied().collect()
        };
        for place in &some {
            storage.write_zeroes(*place, self.len).await?;
        }
        self.flush().await?;
        let mut gaps = self.gaps.borrow_mut();
        let left = gaps.len().saturating_sub(some.len());
        gaps.truncate(left);
        self.free.borrow_mut().extend(some);
        Ok(())
    }

    /// Makes the image longer: the footer first, so that there is one at the end at any time.
    async fn extend(&self, storage: &impl Storage, footer: &Footer) -> Result<(), Errno> {
        let begin = self.next.get();
        let more = self.len.saturating_add(PAGE).saturating_mul(BLOCKS);
        let old = storage.size()?;
        let end = begin.checked_add(more).ok_or(Errno::FBIG)?.max(old);
        let end = end.checked_next_multiple_of(PAGE).ok_or(Errno::FBIG)?;
        let end = end.checked_add(PAGE).ok_or(Errno::FBIG)?;
        let last = end - footer::LEN as u64;
        storage.write(last, Bytes::copied(footer.bytes())?).await?;
        if old > begin {
            storage.write_zeroes(begin, old - begin).await?;
        }
        self.flush().await?;
        self.limit.set(end - PAGE);
        Ok(())
    }

    /// The place of a block that is no more, whose bytes are a hole.
    pub(crate) fn give_up(&self, place: u64) {
        let flush = self.durable.next();
        self.given_up.borrow_mut().push((flush, place));
    }

    /// Makes everything durable; what was given up before can be used then.
    pub(crate) async fn flush(&self) -> Result<(), Errno> {
        let flushed = self.durable.settle().await;
        self.settle();
        flushed
    }

    /// The same for those whom the disk serves: it tells them of each flush that has failed.
    pub(crate) async fn flush_and_tell(&self) -> Result<(), Errno> {
        let flushed = self.durable.flush().await;
        self.settle();
        flushed
    }

    /// A flush has failed, and they were not told.
    pub(crate) fn owes(&self) -> bool {
        self.durable.owes()
    }

    /// Frees what is durably given up. A flush that failed may have lost the change of the table, and no later
    /// one makes up for that: such a place is not used again.
    fn settle(&self) {
        let (lost, done) = (self.durable.lost(), self.durable.done());
        let mut free = self.free.borrow_mut();
        self.given_up.borrow_mut().retain(|(flush, place)| {
            if *flush > lost && *flush <= done {
                free.push(*place);
            }
            *flush > lost.max(done)
        });
    }

    /// Ends the image behind the last block, with a footer.
    pub(crate) async fn trim(&self, storage: &impl Storage, footer: &Footer) -> Result<(), Errno> {
        let (next, len) = (self.next.get(), footer::LEN as u64);
        let Some(end) = next.saturating_add(len).checked_next_multiple_of(PAGE) else {
            return Ok(());
        };
        if storage.is_fixed() || end > self.limit.get() || end >= storage.size()? {
            return Ok(());
        }
        // Nobody may take what is not zero any more.
        self.limit.set(next);
        storage
            .write(end - len, Bytes::copied(footer.bytes())?)
            .await?;
        // The footer that is at the end now goes away, so the new one must be there for good.
        self.flush().await?;
        storage.set_size(end).await
    }

    /// Bytes that blocks may go to without more room.
    pub(crate) fn left(&self) -> u64 {
        let tail = self.limit.get().saturating_sub(self.next.get());
        let free = self.free.borrow().len() as u64;
        tail.saturating_add(free.saturating_mul(self.len))
    }
}
