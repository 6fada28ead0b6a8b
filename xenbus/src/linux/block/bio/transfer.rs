// SPDX-License-Identifier: GPL-2.0-only

//! Builds the bios of a transfer: as few, with as few ranges of memory, as the device accepts.

use super::{Bio, BioDisk, Inflight, Operation, TransferLimits, FIRST_VECS};
use crate::linux::sys;
use crate::ring::abi::PAGE_SIZE;
use crate::ring::numbers::PageIndex;
use kernel::bindings;

impl Inflight<'_> {
    /// Reads into pieces of data pages, or writes from them, in at most `count` ranges of memory: starts as few bios
    /// with as few ranges as the device takes them in. Parts that read as zeroes are filled with them at once. All
    /// pieces together are as long as `places`, and neither is none. May sleep.
    pub(crate) fn transfer(
        &self,
        operation: Operation,
        mut places: impl Iterator<Item = DeviceTarget>,
        count: u16,
        pieces: impl Iterator<Item = PagePiece>,
    ) {
        let Some(first) = places.next() else {
            return self.fail();
        };
        let mut bios = Bios {
            operation,
            sector: first.sector,
            left: count,
            // Most transfers have no more ranges, because pages follow one another.
            bio: self.bio_in(operation, first.sector, count.min(FIRST_VECS)),
        };
        // Bytes of the place that no run has. A run has at most as many, so what joins it needs no look.
        let mut room = first.bytes;
        let mut run: Option<TransferRun> = None;
        for mut piece in pieces {
            if run.as_mut().is_some_and(|run| run.join(&piece)) {
                bios.left = bios.left.wrapping_sub(1);
                continue;
            }
            while piece.len > 0 {
                if let Some(run) = run.take() {
                    if !bios.add(&run) {
                        return self.fail();
                    }
                    room = room.wrapping_sub(run.len.into());
                }
                if room == 0 {
                    let Some(next) = places.next() else {
                        return self.fail();
                    };
                    bios.go_on(&next);
                    room = next.bytes;
                }
                run = TransferRun::take(self.disk, &mut piece, room);
                if run.is_none() {
                    return self.fail();
                }
            }
        }
        if run.is_none_or(|run| bios.add(&run)) {
            bios.bio.submit();
        } else {
            self.fail();
        }
    }

    /// Transfers `count` pieces of pages at which guest pages are mapped, which all go to one place, beginning at
    /// `sector`. The memory behind such a page is unknown, so each is a range of its own. May sleep.
    pub(crate) fn scatter(
        &self,
        operation: Operation,
        sector: u64,
        count: u16,
        pieces: impl Iterator<Item = PagePiece>,
    ) {
        let mut bios = Bios {
            operation,
            sector: Some(sector),
            left: count,
            bio: self.bio(operation, sector, count),
        };
        for piece in pieces {
            if !bios.add_mapped(&piece) {
                return self.fail();
            }
        }
        bios.bio.submit();
    }

    /// Makes a bio for the I/O that begins there; `None` if it reads as zeroes.
    fn bio_in(&self, operation: Operation, sector: Option<u64>, vecs: u16) -> Bio<'_> {
        match sector {
            Some(sector) => self.bio(operation, sector, vecs),
            None => Bio {
                raw: None,
                inflight: self,
            },
        }
    }
}

/// Destination of a part of a transfer on the device.
pub(crate) struct DeviceTarget {
    /// The first sector of 512 bytes; `None` if it is nowhere and reads as zeroes.
    pub(crate) sector: Option<u64>,
    /// Whole sectors.
    pub(crate) bytes: u64,
}

/// A piece of one data page, or of several that follow one another by their numbers.
pub(crate) struct PagePiece {
    /// The first page.
    pub(crate) page: PageIndex,
    /// Byte offset in that page.
    pub(crate) offset: u16,
    /// Bytes.
    pub(crate) len: u32,
}

impl PagePiece {
    /// Skips the first `len` bytes of the piece.
    fn skip(&mut self, len: u32) {
        const PAGE: u32 = PAGE_SIZE as u32;
        let end = len.wrapping_add(self.offset.into());
        // CAST: a piece ends in a page of the table, whose number is one of 16 bits.
        let page = self.page.number().wrapping_add((end / PAGE) as u16);
        self.page = PageIndex::new(page);
        // CAST: below a page.
        self.offset = (end % PAGE) as u16;
        self.len = self.len.wrapping_sub(len);
    }
}

/// Bytes of data pages without a gap between them, for one place.
///
/// # Invariants
///
/// From `page` on, `room` bytes of the disk's data pages lie one behind the other, and
/// `offset + len` is at most that.
struct TransferRun {
    page: *mut bindings::page,
    room: u32,
    /// The first page.
    first: PageIndex,
    offset: u16,
    len: u32,
}

impl TransferRun {
    /// Takes from the beginning of a piece what lies one behind the other. With what joins it, it has no more than
    /// `most` bytes. `None` if there is no such page.
    fn take(disk: &BioDisk, piece: &mut PagePiece, most: u64) -> Option<Self> {
        let (page, room) = disk.pages.run(piece.page)?;
        let there = room.checked_sub(piece.offset.into()).filter(|n| *n > 0)?;
        let there = u32::try_from(most).map_or(there, |most| most.min(there));
        let room = there.wrapping_add(piece.offset.into());
        let len = piece.len.min(there);
        // INVARIANT: The table of pages shows it for this piece and for the bytes behind it.
        let run = Self {
            page,
            room,
            first: piece.page,
            offset: piece.offset,
            len,
        };
        // Most are no longer than a page.
        match len == piece.len {
            true => piece.len = 0,
            false => piece.skip(len),
        }
        Some(run)
    }

    /// Extends the range with `next` if that lies directly behind it.
    fn join(&mut self, next: &PagePiece) -> bool {
        const PAGE: u32 = PAGE_SIZE as u32;
        let end = self.len.wrapping_add(self.offset.into());
        // First, because a mapped page is full with the bytes that it has.
        if end.wrapping_add(next.len) > self.room {
            return false;
        }
        let page = u32::from(self.first.number()).wrapping_add(end / PAGE);
        let joins = end % PAGE == 0 && next.offset == 0 && u32::from(next.page.number()) == page;
        if joins {
            // INVARIANT: Just compared.
            self.len = self.len.wrapping_add(next.len);
        }
        joins
    }

    /// Fills the run with zeroes.
    fn clear(&self) {
        // SAFETY: By the type invariant the bytes are in data pages that follow one another, so this kernel has them at
        // addresses that do, too. A page stays where it is while a request has it, which is to be filled now.
        unsafe {
            sys::xbr_page_address(self.page)
                .cast::<u8>()
                .add(self.offset.into())
                .write_bytes(0, self.len as usize);
        }
    }
}

/// The bios of an I/O; the last one is being built.
struct Bios<'a> {
    operation: Operation,
    /// Sector for the next run; `None` if it reads as zeroes.
    sector: Option<u64>,
    /// Ranges of memory that are left, at most.
    left: u16,
    bio: Bio<'a>,
}

impl Bios<'_> {
    /// Directs the following pieces to another place.
    fn go_on(&mut self, place: &DeviceTarget) {
        self.sector = place.sector;
        // Whole pages, and two that are not. A piece that needs more ranges gets another bio.
        let pages = (place.bytes / PAGE_SIZE as u64).saturating_add(2);
        let most = u16::try_from(pages).map_or(self.left, |pages| pages.min(self.left));
        self.submit(most);
    }

    /// Submits the bio that is being built, and begins the next one, with room for at most `most` ranges of memory.
    fn submit(&mut self, most: u16) {
        self.bio.submit();
        let inflight = self.bio.inflight;
        self.bio = inflight.bio_in(self.operation, self.sector, most);
    }

    /// Adds a run. Returns false if the device does not take it even alone in a bio.
    fn add(&mut self, run: &TransferRun) -> bool {
        let Some(sector) = self.sector else {
            let reads = self.operation == Operation::Read;
            if reads {
                run.clear();
            }
            return reads;
        };
        if self.bio.is_full(run.len) || !self.bio.add(run) {
            // In this order: the next one may have to wait for this one.
            self.submit(self.left);
            if !self.bio.add(run) {
                return false;
            }
        }
        self.left = self.left.wrapping_sub(1);
        self.sector = Some(sector.wrapping_add(u64::from(run.len / 512)));
        true
    }

    /// Adds a piece of a page at which a guest's page is mapped. False if there is no such page.
    #[inline]
    fn add_mapped(&mut self, piece: &PagePiece) -> bool {
        if self.bio.add_mapped(piece) {
            return true;
        }
        if !self.bio.is_full(piece.len) {
            return false;
        }
        self.sector = Some(self.bio.end());
        self.left = self.left.saturating_sub(self.bio.ranges());
        self.submit(self.left);
        self.bio.add_mapped(piece)
    }
}

impl Bio<'_> {
    /// Adds a run of the same I/O; returns `false` if the bio cannot take it.
    fn add(&mut self, run: &TransferRun) -> bool {
        let Some(raw) = self.raw else {
            return false;
        };
        // SAFETY: The bio is ours; by the type invariant the bytes are in data pages that follow
        // one another, and a page stays where it is while a request has it.
        let added =
            unsafe { bindings::bio_add_page(raw.as_ptr(), run.page, run.len, run.offset.into()) };
        u32::try_from(added) == Ok(run.len)
    }

    /// Reports whether there is no room for one more range of `len` bytes.
    // Inlined, because it is called for each page.
    #[inline(always)]
    fn is_full(&self, len: u32) -> bool {
        let Some(raw) = self.raw else {
            return false;
        };
        // SAFETY: The bio is ours.
        let (ranges, room, bytes) = unsafe {
            let bio = &*raw.as_ptr();
            (bio.bi_vcnt, bio.bi_max_vecs, bio.bi_iter.bi_size)
        };
        let is_enough = |most: &TransferLimits| {
            // Each bio takes at least one range.
            ranges > 0 && (ranges >= most.ranges || bytes.saturating_add(len) > most.bytes)
        };
        ranges >= room || self.inflight.most.as_ref().is_some_and(is_enough)
    }

    /// Returns the number of ranges of memory that the bio has.
    fn ranges(&self) -> u16 {
        // SAFETY: The bio is ours.
        self.raw.map_or(0, |raw| unsafe { (*raw.as_ptr()).bi_vcnt })
    }

    /// Returns the sector (512 bytes) behind the last one of the bio.
    fn end(&self) -> u64 {
        // SAFETY: The bio is ours.
        self.raw.map_or(0, |raw| unsafe {
            let iter = &(*raw.as_ptr()).bi_iter;
            iter.bi_sector.wrapping_add(u64::from(iter.bi_size / 512))
        })
    }

    /// Adds a piece of a page at which a guest's page is mapped, without a look whether it lies behind the last one,
    /// which such pages do not. False if there is no such page, or if it is full.
    #[inline(always)]
    fn add_mapped(&mut self, piece: &PagePiece) -> bool {
        let end = piece.len.saturating_add(piece.offset.into());
        let page = self.inflight.disk.pages.map_page(piece.page);
        let (Some(raw), Some(page), true) = (self.raw, page, end <= PAGE_SIZE as u32) else {
            return false;
        };
        if self.is_full(piece.len) {
            return false;
        }
        // SAFETY: The bio is ours, and has room for one more range. The bytes are in the page, which stays where it
        // is while a request has it.
        unsafe { bindings::__bio_add_page(raw.as_ptr(), page, piece.len, piece.offset.into()) };
        true
    }
}
