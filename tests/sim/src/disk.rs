// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The disk: sectors in memory behind a volatile cache, served in any order.

use std::collections::{BTreeMap, BTreeSet};

use blkback::engine::segments::Slice;
use blkback::engine::{Io, IoKind};
use ring::numbers::QueueTag;
use ring::response::ResponseStatus;

use crate::frontend::GrantTarget;
use crate::history::{decode, encode, SECTOR};
use crate::machine::{Machine, MachineFault};

type SectorBytes = [u8; SECTOR];

#[derive(Debug)]
pub(crate) struct RunningIo {
    pub(crate) tag: QueueTag,
    pub(crate) kind: IoKind,
    sector: u64,
    sectors: u64,
    slices: Vec<Slice>,
    /// Sectors that a flush must make durable: those in the cache when it was submitted.
    flushes: Vec<u64>,
    /// The disk finds out during the I/O that it cannot do it with pages of the guest.
    pub(crate) is_given_back: bool,
}

/// State of the disk for one queue.
#[derive(Debug, Default)]
pub(crate) struct Lane {
    running: Vec<RunningIo>,
    done: Vec<(QueueTag, ResponseStatus)>,
    back: Vec<QueueTag>,
    pages: BTreeMap<QueueTag, Vec<u16>>,
    again: Option<QueueTag>,
    wake: bool,
}

/// The disk.
#[derive(Debug, Default)]
pub struct SimDisk {
    /// Content as reads see it; absent sectors are zero.
    content: BTreeMap<u64, SectorBytes>,
    /// Content after a power cut.
    durable: BTreeMap<u64, SectorBytes>,
    dirty: BTreeSet<u64>,
    pub(crate) running: Vec<RunningIo>,
    pub(crate) done: Vec<(QueueTag, ResponseStatus)>,
    /// I/Os that the engine must take back.
    pub(crate) back: Vec<QueueTag>,
    /// Pages of I/Os that the engine has neither reaped nor taken back.
    pages: BTreeMap<QueueTag, Vec<u16>>,
    pub(crate) again: Option<QueueTag>,
    /// Writes that a host left running, and that end at some time.
    strays: Vec<(u64, SectorBytes)>,
    /// Completions came and the worker was woken.
    pub wake: bool,
    /// I/Os completed.
    pub completed: u64,
    /// Batches submitted.
    pub batches: u64,
    /// Flushes, barriers and discards executed.
    pub special: u64,
    /// I/Os given back at submission, and later.
    pub given_back: (u64, u64),
    /// Sectors of reads and of writes that were completed, well or not.
    pub sectors_moved: (u64, u64),
}

impl SimDisk {
    /// I/Os that are submitted and not completed.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Returns true if completions wait to be reaped, or I/Os to be taken back.
    pub fn has_completions(&self) -> bool {
        !self.done.is_empty() || !self.back.is_empty()
    }

    /// True if an I/O owns a data page.
    pub fn uses_page(&self, page: u16) -> bool {
        let running = self.running.iter().flat_map(|io| &io.slices);
        self.pages.values().flatten().any(|p| *p == page)
            || running.into_iter().any(|slice| slice.page.number() == page)
    }

    /// Switches to another queue.
    pub(crate) fn exchange(&mut self, lane: &mut Lane) {
        std::mem::swap(&mut self.running, &mut lane.running);
        std::mem::swap(&mut self.done, &mut lane.done);
        std::mem::swap(&mut self.back, &mut lane.back);
        std::mem::swap(&mut self.pages, &mut lane.pages);
        std::mem::swap(&mut self.again, &mut lane.again);
        std::mem::swap(&mut self.wake, &mut lane.wake);
    }

    /// Drops all running I/O without completing it.
    pub(crate) fn give_up(&mut self) {
        self.running.clear();
    }

    /// Returns true if a host has left writes running.
    pub(crate) fn has_strays(&self) -> bool {
        !self.strays.is_empty()
    }

    /// Returns the current content.
    pub(crate) fn image(&self) -> BTreeMap<u64, SectorBytes> {
        self.content.clone()
    }

    fn uses_tag(&self, tag: QueueTag) -> bool {
        self.pages.contains_key(&tag) || self.running.iter().any(|io| io.tag == tag)
    }

    pub(crate) fn put(&mut self, sector: u64, bytes: SectorBytes, volatile: bool) {
        self.content.insert(sector, bytes);
        self.dirty.insert(sector);
        if !volatile {
            self.flush(&[sector]);
        }
    }

    pub(crate) fn flush(&mut self, sectors: &[u64]) {
        for sector in sectors {
            if self.dirty.remove(sector) {
                match self.content.get(sector) {
                    Some(bytes) => self.durable.insert(*sector, *bytes),
                    None => self.durable.remove(sector),
                };
            }
        }
    }

    /// Returns the sectors that are only in the cache.
    pub(crate) fn dirty(&self) -> Vec<u64> {
        self.dirty.iter().copied().collect()
    }

    /// Returns the bytes that a read sees; `None` if they are zero.
    pub(crate) fn bytes(&self, sector: u64) -> Option<SectorBytes> {
        self.content.get(&sector).copied()
    }

    /// Discards a sector.
    pub(crate) fn forget(&mut self, sector: u64, volatile: bool) {
        if self.content.remove(&sector).is_some() {
            self.dirty.insert(sector);
            if !volatile {
                self.flush(&[sector]);
            }
        }
    }

    /// Returns the sectors that are not zero.
    pub(crate) fn sectors(&self) -> impl Iterator<Item = u64> + '_ {
        self.content.keys().copied()
    }

    /// Releases the pages of all I/Os, because the engine is gone.
    pub(crate) fn release_all(&mut self) {
        self.pages.clear();
    }

    /// Releases the pages of an I/O that the engine has reaped or taken back.
    pub(crate) fn release(&mut self, tag: QueueTag) {
        self.pages.remove(&tag);
    }

    /// Returns the value of a sector as a read sees it.
    pub fn sector(&self, sector: u64) -> Option<u64> {
        self.content.get(&sector).map_or(Some(0), |b| decode(b))
    }
}

impl Machine {
    /// Stores a value that is on the disk before the guest starts.
    pub fn install(&mut self, number: u32, start: u64, sectors: u64) {
        for sector in start..start + sectors {
            let mut bytes = [0; SECTOR];
            encode(crate::history::value(number, sector), &mut bytes);
            self.disk.put(sector, bytes, false);
            if let Some(image) = &mut self.tap.ordered {
                image.insert(sector, bytes);
            }
        }
        self.history.write(number, 0, start, sectors, false);
        self.history.answered(number, 1, true);
    }

    /// Executes one of the running I/Os and completes it.
    pub fn disk_step(&mut self) {
        if self.disk.running.is_empty() {
            return;
        }
        let others = self.disk.running.len() > 1;
        let io = if self.setup.fifo {
            let starve = others && self.commit(MachineFault::StarveFirst);
            self.disk.running.remove(usize::from(starve))
        } else {
            let at = self.rng.index(self.disk.running.len());
            self.disk.running.swap_remove(at)
        };
        self.execute(io);
        if !self.commit(MachineFault::SwallowWake) {
            self.disk.wake = true;
        }
    }

    /// Storage lets go of a page now and then, while the worker sleeps for a moment.
    pub(crate) fn storage_lets_go(&mut self) {
        if self.rng.percent(30) {
            self.host.held.pop_first();
        }
    }

    pub(crate) fn execute(&mut self, io: RunningIo) {
        if io.is_given_back {
            return self.give_back_late(&io);
        }
        if self.setup.holds > 0 && self.rng.percent(self.setup.holds) {
            let pages = io.slices.iter().map(|slice| slice.page.number());
            self.host.held.extend(pages);
        }
        let bad = self.setup.bad_sectors.clone();
        let end = io.sector.saturating_add(io.sectors);
        let fails = io.sector.max(bad.start) < end.min(bad.end) && io.kind != IoKind::Flush;
        self.disk.completed += 1;
        self.count_sectors(&io);
        let volatile = self.setup.limits.flush;
        match io.kind {
            IoKind::Read => self.read(&io, fails),
            IoKind::Write => self.write(&io, fails, volatile),
            IoKind::PreFlushWrite => {
                self.flush(&io);
                self.write(&io, fails, volatile);
            }
            IoKind::BarrierWrite => {
                self.flush(&io);
                self.write(&io, fails, false);
            }
            IoKind::Flush => self.flush(&io),
            IoKind::Discard { .. } if fails => {}
            IoKind::Discard { .. } => self.discard(&io, volatile),
        }
        if !matches!(io.kind, IoKind::Read | IoKind::Write) {
            self.disk.special += 1;
        }
        let status = if fails {
            ResponseStatus::Error
        } else {
            ResponseStatus::Okay
        };
        if self.commit(MachineFault::LoseCompletion) {
            return;
        }
        if self.commit(MachineFault::DoubleCompletion) {
            self.disk.again = Some(io.tag);
        }
        self.disk.done.push((io.tag, status));
        if self.commit(MachineFault::RepeatCompletion) {
            self.disk.done.push((io.tag, status));
        }
    }

    fn count_sectors(&mut self, io: &RunningIo) {
        let (reads, writes) = &mut self.disk.sectors_moved;
        match io.kind {
            IoKind::Read => *reads += io.sectors,
            IoKind::Discard { .. } => {}
            _ => *writes += io.sectors,
        }
    }

    fn flush(&mut self, io: &RunningIo) {
        if !self.commit(MachineFault::IgnoreFlush) {
            self.disk.flush(&io.flushes);
        }
    }

    /// Returns the memory of a slice: a page of the backend, or the guest's page that is mapped there.
    fn memory(&mut self, slice: &Slice, write: bool) -> Option<&mut [u8]> {
        let page = slice.page.number();
        if self.host.absent.contains(&page) {
            self.problem(format!("I/O to a page that has no memory: {slice:?}"));
            return None;
        }
        if page < self.setup.copy_pages {
            return self
                .host
                .pages
                .get_mut(usize::from(page))
                .map(|p| &mut p[..]);
        }
        let mapping = self.host.mappings.get(&page).copied();
        let Some(mapping) = mapping else {
            self.problem(format!("I/O to a page that is not mapped: {slice:?}"));
            return None;
        };
        if mapping.gref != slice.gref || (write && mapping.read_only) {
            self.problem(format!("I/O to the wrong mapping: {slice:?}, {mapping:?}"));
            return None;
        }
        if let GrantTarget::Page(_) = mapping.target {
            if self.front.lent(mapping.gref) == 0 {
                self.problem(format!("I/O to a page that no request lends: {slice:?}"));
            }
        }
        self.target(mapping.target)
    }

    /// Records that the host is gone with running I/O. Its writes arrive later.
    pub(crate) fn leave_running(&mut self) {
        for io in std::mem::take(&mut self.disk.running) {
            if matches!(
                io.kind,
                IoKind::Write | IoKind::PreFlushWrite | IoKind::BarrierWrite
            ) {
                let data = self.data(&io);
                self.disk.strays.extend(data);
            }
        }
    }

    /// Executes one of the writes that a host left running.
    pub(crate) fn land_stray(&mut self) {
        if self.disk.has_strays() && self.rng.percent(20) {
            let at = self.rng.index(self.disk.strays.len());
            let (sector, bytes) = self.disk.strays.swap_remove(at);
            self.disk.put(sector, bytes, self.setup.limits.flush);
        }
    }

    /// Returns the data that an I/O writes.
    fn data(&mut self, io: &RunningIo) -> Vec<(u64, SectorBytes)> {
        let mut data: Vec<(u64, SectorBytes)> = Vec::new();
        for slice in &io.slices {
            for at in 0..usize::from(slice.len) / SECTOR {
                let start = usize::from(slice.offset) + at * SECTOR;
                if let Some(memory) = self.memory(slice, false) {
                    let bytes = memory[start..start + SECTOR].try_into().expect("a sector");
                    data.push((io.sector + data.len() as u64, bytes));
                }
            }
        }
        data
    }

    /// Returns true if data reaches a mapped page only after the answer, without a mark of the page as changed.
    fn delays(&mut self, slice: &Slice, start: usize, bytes: &SectorBytes) -> bool {
        let mapping = self.host.mappings.get(&slice.page.number()).copied();
        match mapping {
            Some(mapping) if self.commit(MachineFault::CopyLater) => {
                self.host.delay(mapping.target, start, bytes, false);
                true
            }
            _ => false,
        }
    }

    pub(crate) fn read(&mut self, io: &RunningIo, fails: bool) {
        let mut sector = io.sector;
        let mut tear = self.commit(MachineFault::TearRead);
        for slice in &io.slices {
            for at in 0..usize::from(slice.len) / SECTOR {
                let bytes = self
                    .disk
                    .content
                    .get(&sector)
                    .copied()
                    .unwrap_or([0; SECTOR]);
                // A failed I/O may have moved any part of its data.
                if fails && self.rng.percent(50) {
                    return;
                }
                let start = usize::from(slice.offset) + at * SECTOR;
                sector += 1;
                if self.delays(slice, start, &bytes) {
                    continue;
                }
                let len = if tear { SECTOR / 2 } else { SECTOR };
                if let Some(memory) = self.memory(slice, true) {
                    memory[start..start + len].copy_from_slice(&bytes[..len]);
                    if tear {
                        memory[start + len..start + SECTOR].fill(0x77);
                    }
                }
                tear = false;
            }
        }
    }

    fn write(&mut self, io: &RunningIo, fails: bool, volatile: bool) {
        let mut data = self.data(io);
        if fails {
            let keep = self.rng.below(data.len() as u64 + 1) as usize;
            data.truncate(keep);
        }
        if data.len() > 1 && self.commit(MachineFault::SwapSectors) {
            let (first, last) = (data[0].1, data[data.len() - 1].1);
            let end = data.len() - 1;
            data[0].1 = last;
            data[end].1 = first;
        }
        if self.commit(MachineFault::MisdirectWrite) {
            data.iter_mut().for_each(|(sector, _)| *sector += 1);
        }
        if self.commit(MachineFault::DropWrite) {
            return;
        }
        for (sector, bytes) in data {
            self.disk.put(sector, bytes, volatile);
        }
    }

    fn discard(&mut self, io: &RunningIo, volatile: bool) {
        let range = io.sector..io.sector + io.sectors;
        let gone: Vec<u64> = self.disk.content.range(range).map(|(s, _)| *s).collect();
        for sector in gone {
            self.disk.forget(sector, volatile);
        }
    }

    /// Checks that a power cut now would lose nothing that was answered before `since`.
    pub fn check_durable(&mut self, since: u64) {
        let since = if self.setup.limits.flush {
            since
        } else {
            self.clock
        };
        self.check_durable_at(self.history.sectors(), since);
    }

    /// Checks some sectors as [`check_durable`](Self::check_durable) does.
    pub(crate) fn check_durable_at(&mut self, sectors: Vec<u64>, since: u64) {
        for sector in sectors {
            let found = self
                .disk
                .durable
                .get(&sector)
                .map_or(Some(0), |b| decode(b));
            if let Err(why) = self.history.explain(sector, found, since, self.clock + 1) {
                self.problem(format!("after a power cut: {why}"));
            }
        }
    }

    /// Accepts an I/O from the engine.
    pub(crate) fn accept(&mut self, io: &Io<'_>) -> RunningIo {
        let running = RunningIo {
            tag: io.tag,
            kind: io.kind,
            sector: io.sector,
            sectors: io.sectors,
            slices: io.slices().collect(),
            flushes: self.disk.dirty(),
            is_given_back: false,
        };
        self.check_io(&running, io.count());
        let pages = running.slices.iter().map(|s| s.page.number()).collect();
        self.disk.pages.insert(io.tag, pages);
        running
    }

    /// Checks an I/O as the engine submits it.
    fn check_io(&mut self, io: &RunningIo, count: u16) {
        let limits = self.setup.limits;
        let bytes: u64 = io.slices.iter().map(|s| u64::from(s.len)).sum();
        let data = !matches!(io.kind, IoKind::Flush | IoKind::Discard { .. });
        let changes = !matches!(io.kind, IoKind::Read | IoKind::Flush);
        let mut bad = Vec::new();
        let mut rule = |holds: bool, what: &str| {
            if !holds {
                bad.push(format!("{what}: {io:?}"));
            }
        };
        rule(usize::from(count) == io.slices.len(), "pieces are missing");
        rule(
            !data || bytes == io.sectors * 512,
            "the pieces do not add up",
        );
        rule(data || io.slices.is_empty(), "data where there is none");
        let end = io.sector.checked_add(io.sectors);
        let inside = end.is_some_and(|end| end <= limits.sectors) || io.sectors == 0;
        rule(io.kind == IoKind::Flush || inside, "beyond the disk");
        rule(!changes || !limits.read_only, "the disk is read-only");
        rule(io.kind != IoKind::Flush || limits.flush, "nothing to flush");
        rule(
            io.kind != IoKind::Discard { secure: true } || limits.secure_discard,
            "secure discard is not offered",
        );
        rule(
            io.sectors == 0 || io.sector % u64::from(limits.block_sectors) == 0,
            "not at a block",
        );
        for slice in &io.slices {
            let block = limits.block_sectors * 512;
            rule(
                u32::from(slice.len) % block == 0 && slice.offset % 512 == 0,
                "not whole blocks",
            );
        }
        let barrier = |kind: &IoKind| *kind == IoKind::BarrierWrite;
        rule(
            !barrier(&io.kind) || self.disk.pages.is_empty(),
            "a barrier overtakes something",
        );
        rule(
            !self.disk.running.iter().any(|r| barrier(&r.kind)),
            "overtakes a barrier",
        );
        rule(!self.disk.uses_tag(io.tag), "the tag is in use");
        for slice in &io.slices {
            let page = slice.page.number();
            // If a guest names one of its pages twice and the backend keeps mappings, the page is mapped once.
            let named = self.setup.keeps_grants
                && self
                    .host
                    .mappings
                    .get(&page)
                    .is_some_and(|m| m.gref == slice.gref);
            rule(named || !self.disk.uses_page(page), "a page is in use");
        }
        for what in bad {
            self.problem(what);
        }
    }
}
