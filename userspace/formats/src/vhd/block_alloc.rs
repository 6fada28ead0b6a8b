// SPDX-License-Identifier: MIT OR Apache-2.0
//! Room for new blocks.

use super::footer::{self, Footer};
use crate::barrier::Barrier;
use crate::metadata::Metadata;
use crate::Storage;
use diskio::{Bytes, Errno, Gate};
use std::cell::{Cell, RefCell};

/// Alignment in bytes of a block's data, and unit by which the image grows.
pub(crate) const PAGE: u64 = 4096;
/// Blocks that room is made for at once.
const BLOCKS: u64 = 16;
/// Gaps that are made ready at once.
const GAPS: usize = 16;

/// Allocator of places for blocks. All places that it hands out read as zeroes, also after a power cut.
#[derive(Debug)]
pub(crate) struct BlockAllocator<S> {
    /// Bytes of a bitmap, and of a block with it.
    bitmap: u64,
    len: u64,
    /// Offset of the next block behind the last one, and end of the zeroed space, in bytes.
    next: Cell<u64>,
    limit: Cell<u64>,
    /// Places that are free and zero.
    free: RefCell<Vec<u64>>,
    /// Places that were given up, and the flush that each waits for: the table in the image may still say
    /// otherwise.
    given_up: RefCell<Vec<(u64, u64)>>,
    /// Executes all flushes: if several run at once, the kernel reports an error to only one of them, and it concerns
    /// all.
    durable: Barrier<S>,
    /// Places that nothing points to, with anything in them.
    gaps: RefCell<Vec<u64>>,
    /// Serialises reservations of space.
    gate: Gate,
}

impl<S: Storage> BlockAllocator<S> {
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

    /// Returns the first place from `at` on whose data is aligned.
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
            // Another task may have reserved some.
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

    /// Returns a free place that needs no I/O.
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

    /// A device keeps its size: the space behind the last block is a gap with any content.
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
        let errors = self.errors();
        for place in &some {
            storage.write_zeroes(*place, self.len).await?;
        }
        self.flush(errors).await?;
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
        let errors = self.errors();
        storage.write(last, Bytes::copied(footer.bytes())?).await?;
        if old > begin {
            storage.write_zeroes(begin, old - begin).await?;
        }
        self.flush(errors).await?;
        self.limit.set(end - PAGE);
        Ok(())
    }

    /// Gives up the place of a block that was removed, whose bytes are a hole.
    pub(crate) fn give_up(&self, place: u64) {
        let flush = self.durable.next();
        self.given_up.borrow_mut().push((flush, place));
    }

    /// Returns the number of errors so far: see [`diskio::Barrier::errors`].
    pub(crate) fn errors(&self) -> u64 {
        self.durable.errors()
    }

    /// Flushes all writes since this number of errors; places that were given up before can then be used.
    pub(crate) async fn flush(&self, errors: u64) -> Result<(), Errno> {
        let flushed = self.durable.settle_since(errors).await;
        self.settle();
        flushed
    }

    /// Flushes like [`flush`](Self::flush), but for the disk's users, who get the error of each flush that has failed.
    pub(crate) async fn flush_and_tell(&self) -> Result<(), Errno> {
        let flushed = self.durable.flush().await;
        self.settle();
        flushed
    }

    /// Returns the metadata of the image in `storage`.
    pub(crate) fn metadata(&self, storage: &S) -> Metadata<S> {
        self.durable.metadata(storage)
    }

    /// Returns true if a flush has failed, and the disk's users have not got that error.
    pub(crate) fn owes(&self) -> bool {
        self.durable.owes()
    }

    /// Frees places that were given up, once that is durable. A flush that failed may have lost the change of the
    /// table, and a process that dies before it writes the change again leaves it so: such a place is not used again.
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
        // Space that does not read as zero any more must not be used.
        self.limit.set(next);
        let errors = self.errors();
        storage
            .write(end - len, Bytes::copied(footer.bytes())?)
            .await?;
        // The footer that is at the end now goes away, so the new one must be there for good.
        self.flush(errors).await?;
        storage.set_size(end).await
    }

    /// Bytes that blocks may go to without more room.
    pub(crate) fn left(&self) -> u64 {
        let tail = self.limit.get().saturating_sub(self.next.get());
        let free = self.free.borrow().len() as u64;
        tail.saturating_add(free.saturating_mul(self.len))
    }
}
