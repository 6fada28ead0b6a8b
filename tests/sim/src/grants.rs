// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The grant table: copies, maps and unmaps, and the checks of their contract.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use blkback::engine::Grants;
use ring::abi::{RawSegment, PAGE_SIZE};
use ring::grants::{Buffer, Copy, CopyDirection, MapOutcome};
use ring::numbers::{PageIndex, QueueTag};
use zerocopy::FromBytes;

use crate::frontend::GrantTarget;
use crate::machine::{page, Machine, MachineFault, MachineSetup, Page, SharedMachine};

/// A guest's page mapped at a page of the backend.
#[derive(Clone, Copy, Debug)]
pub struct Mapping {
    /// Handle.
    pub handle: u32,
    /// Grant reference.
    pub gref: u32,
    /// Page that the reference names.
    pub target: GrantTarget,
    /// The backend must not write it.
    pub read_only: bool,
    /// An unmap of it failed.
    pub lost: bool,
}

/// The host's side of the grant table.
#[derive(Debug)]
pub struct GrantHost {
    /// Pages with memory.
    pub pages: Vec<Page>,
    /// Pages that could have memory and have none.
    pub absent: BTreeSet<u16>,
    /// Pages that are lent, and their limit.
    pub lent: u16,
    pub(crate) lendable: u16,
    /// Mappings by data page.
    pub mappings: BTreeMap<u16, Mapping>,
    /// Data pages with another user, such as the connection of network storage.
    pub held: BTreeSet<u16>,
    next_handle: u32,
    late: Option<(GrantTarget, usize)>,
    /// Data that reaches the guest's pages later than it should.
    later: Vec<Late>,
}

impl GrantHost {
    /// Returns the host of a setup.
    pub fn new(setup: &MachineSetup) -> Self {
        Self {
            pages: (0..setup.copy_pages).map(|_| page(0xbb)).collect(),
            absent: (setup.own_pages..setup.copy_pages).collect(),
            lent: 0,
            lendable: setup.lendable,
            mappings: BTreeMap::new(),
            held: BTreeSet::new(),
            next_handle: 7,
            late: None,
            later: Vec::new(),
        }
    }

    /// Returns true if some data has not reached its page yet.
    pub(crate) fn is_late(&self) -> bool {
        !self.later.is_empty()
    }

    /// Delays data for a page of the guest.
    pub(crate) fn delay(
        &mut self,
        target: GrantTarget,
        start: usize,
        data: &[u8],
        is_marked: bool,
    ) {
        self.later.push(Late {
            target,
            start,
            data: data.to_vec(),
            is_marked,
        });
    }

    /// Returns the number of mappings of a grant.
    pub fn mapped(&self, gref: u32) -> usize {
        let here = |m: &&Mapping| m.gref == gref && !m.lost;
        self.mappings.values().filter(here).count()
    }

    /// Returns the number of pages from which a guest's page could not be unmapped.
    pub fn lost(&self) -> u16 {
        self.mappings.values().filter(|m| m.lost).count() as u16
    }
}

#[derive(Debug)]
struct Late {
    target: GrantTarget,
    start: usize,
    data: Vec<u8>,
    /// The page is marked as changed only then.
    is_marked: bool,
}

/// The engine's port to the grant table.
#[derive(Debug)]
pub struct FakeGrants {
    machine: SharedMachine,
    descriptors: Vec<Vec<RawSegment>>,
    copies: Vec<Copy>,
    maps: Vec<(QueueTag, PageIndex, u32, bool)>,
    unmaps: Vec<(PageIndex, u32)>,
    batch: usize,
}

impl FakeGrants {
    /// Returns a port to the machine's grant table.
    pub fn new(machine: SharedMachine) -> Self {
        let (buffers, batch) = {
            let setup = &machine.borrow().setup;
            (setup.descriptor_buffers, setup.batch)
        };
        let blank = RawSegment::read_from_bytes(&[0xff; 8]).expect("8 bytes");
        Self {
            machine,
            descriptors: vec![vec![blank; 512]; usize::from(buffers)],
            copies: Vec::new(),
            maps: Vec::new(),
            unmaps: Vec::new(),
            batch,
        }
    }

    fn copy(&mut self, m: &mut Machine, copy: &Copy) -> bool {
        let (offset, len) = (usize::from(copy.offset), usize::from(copy.len));
        if len == 0 || offset + len > PAGE_SIZE {
            m.problem(format!("copy out of bounds: {copy:?}"));
            return false;
        }
        let write = copy.direction == CopyDirection::ToGuest;
        let Some(target) = m.front.resolve(copy.gref, write) else {
            return false;
        };
        if matches!(target, GrantTarget::Page(_)) && m.front.lent(copy.gref) == 0 {
            m.problem(format!("copy of a page that no request lends: {copy:?}"));
        }
        match copy.buffer {
            Buffer::Descriptor(buffer) => self.copy_descriptor(m, copy, buffer, target),
            Buffer::Page(page) => copy_page(m, copy, page.number(), target),
        }
    }

    fn copy_descriptor(
        &mut self,
        m: &mut Machine,
        c: &Copy,
        buffer: u8,
        target: GrantTarget,
    ) -> bool {
        let Some(to) = self.descriptors.get_mut(usize::from(buffer)) else {
            m.problem(format!("there is no descriptor buffer: {c:?}"));
            return false;
        };
        if c.direction == CopyDirection::ToGuest || c.offset != 0 || c.len % 8 != 0 {
            m.problem(format!("not a copy of descriptors: {c:?}"));
            return false;
        }
        take_descriptors(m, to, usize::from(c.len), target)
    }
}

fn take_descriptors(
    m: &mut Machine,
    to: &mut [RawSegment],
    len: usize,
    target: GrantTarget,
) -> bool {
    let scribble = m.setup.scribble;
    let Some(from) = m.target(target) else {
        return false;
    };
    let from = &mut from[..len];
    for (to, raw) in to.iter_mut().zip(from.chunks_exact(8)) {
        *to = RawSegment::read_from_bytes(raw).expect("8 bytes");
    }
    if scribble {
        // Another CPU of the guest changes the descriptors right after the copy.
        from.iter_mut().for_each(|b| *b = !*b);
    }
    true
}

fn copy_page(m: &mut Machine, c: &Copy, page: u16, target: GrantTarget) -> bool {
    let beyond = m.commit(MachineFault::CopyBeyond);
    if m.commit(MachineFault::SkipCopy) {
        return true;
    }
    let absent = m.host.absent.contains(&page);
    let local = m.host.pages.get(usize::from(page)).cloned();
    let Some(mut local) = local.filter(|_| !absent) else {
        m.problem(format!("no memory behind the page: {c:?}"));
        return false;
    };
    let mut range = usize::from(c.offset)..usize::from(c.offset) + usize::from(c.len);
    if beyond {
        range = range.start.saturating_sub(8)..(range.end + 8).min(PAGE_SIZE);
    }
    let late = c.direction == CopyDirection::ToGuest && m.commit(MachineFault::LateCopy);
    let Some(guest) = m.target(target) else {
        return false;
    };
    match c.direction {
        CopyDirection::ToGuest => m.copy_out(target, range.clone(), &local[range.clone()]),
        CopyDirection::FromGuest => {
            local[range.clone()].copy_from_slice(&guest[range.clone()]);
            m.host.pages[usize::from(page)] = local;
        }
    }
    if late {
        m.host.late = Some((target, range.start));
    }
    true
}

impl Machine {
    /// Copies data into a page of the guest, and marks it as changed.
    fn copy_out(&mut self, target: GrantTarget, range: Range<usize>, data: &[u8]) {
        if self.commit(MachineFault::CopyLater) {
            return self.host.delay(target, range.start, data, true);
        }
        let early = self.commit(MachineFault::MarkEarly);
        if let (true, GrantTarget::Page(page)) = (early, target) {
            self.pass_by(page);
        }
        if let Some(guest) = self.target(target) {
            guest[range].copy_from_slice(data);
        }
        if let (false, GrantTarget::Page(page)) = (early, target) {
            self.front.mark(page);
        }
    }

    /// Copies delayed data to its page.
    pub(crate) fn copy_later(&mut self) {
        for late in std::mem::take(&mut self.host.later) {
            if let Some(guest) = self.target(late.target) {
                guest[late.start..late.start + late.data.len()].copy_from_slice(&late.data);
            }
            if let (true, GrantTarget::Page(page)) = (late.is_marked, late.target) {
                self.front.mark(page);
            }
        }
    }

    /// Faults of the grant table that happen without a call: nothing unless one is planted.
    pub fn late_copy(&mut self) {
        if let Some((target, at)) = self.host.late.take() {
            if let Some(bytes) = self.target(target) {
                bytes[at] ^= 0xff;
            }
        }
    }

    /// Lends memory for a block of eight pages, if the host has some to lend.
    pub(crate) fn lend(&mut self, block: u16) -> bool {
        if self.rng.percent(self.setup.fickle) {
            self.host.lendable = self.rng.below(u64::from(self.setup.lendable) + 1) as u16;
        }
        if self.host.lent + 8 > self.host.lendable {
            return false;
        }
        let nothing = self.commit(MachineFault::LendNothing);
        for page in block * 8..block * 8 + 8 {
            let absent = self.host.absent.contains(&page);
            if !absent {
                self.problem(format!("memory for page {page}, which has some"));
            }
            if !nothing {
                self.host.absent.remove(&page);
            }
        }
        self.host.lent += 8;
        true
    }

    /// Takes back the memory of a block.
    pub(crate) fn take_back(&mut self, block: u16) {
        for page in block * 8..block * 8 + 8 {
            if self.disk.uses_page(page) {
                self.problem(format!("page {page} is given back during its I/O"));
            }
            if page < self.setup.own_pages || !self.host.absent.insert(page) {
                self.problem(format!("page {page} is given back and was not lent"));
            }
            self.host.pages[usize::from(page)].fill(0xdd);
        }
        self.host.lent -= 8;
    }

    /// Checks that nothing is mapped when the queue is idle.
    pub fn check_mappings(&mut self) {
        let mappings = self.host.mappings.values();
        let mapped: Vec<_> = mappings.filter(|m| !m.lost).copied().collect();
        if !mapped.is_empty() {
            self.problem(format!("left mapped: {mapped:?}"));
        }
    }

    fn map(&mut self, page: u16, gref: u32, read_only: bool) -> MapOutcome {
        self.accesses.maps += 1;
        let usable = self.setup.copy_pages..self.setup.copy_pages + self.setup.map_pages;
        if !usable.contains(&page) {
            self.problem(format!("map at page {page}, which has memory of its own"));
            return MapOutcome::Refused;
        }
        let Some(target) = self.front.resolve(gref, !read_only) else {
            return MapOutcome::Refused;
        };
        if matches!(target, GrantTarget::Page(_)) && self.front.lent(gref) == 0 {
            self.problem(format!("map of grant {gref}, which no request lends"));
        }
        let full = self.host.mappings.len() >= self.setup.maptrack;
        if full || self.rng.percent(self.setup.no_space) {
            return MapOutcome::NoSpace;
        }
        let handle = self.host.next_handle;
        self.host.next_handle += 1;
        let mapping = Mapping {
            handle,
            gref,
            target,
            read_only,
            lost: false,
        };
        if let Some(old) = self.host.mappings.insert(page, mapping) {
            self.problem(format!("page {page} was mapped over {old:?}"));
        }
        if self.commit(MachineFault::LeakMapping) {
            return MapOutcome::Refused;
        }
        MapOutcome::Mapped(handle)
    }

    /// Unmaps a page. Returns false if it stays mapped.
    fn unmap(&mut self, page: u16, handle: u32) -> bool {
        if self.disk.uses_page(page) {
            self.problem(format!("page {page} was unmapped during its I/O"));
        }
        if self.host.held.contains(&page) && !self.gone {
            self.problem(format!("the queue waits for who holds page {page}"));
        }
        if self.commit(MachineFault::ForgetUnmap) {
            return true;
        }
        let stays = self.rng.percent(self.setup.stuck);
        let mapping = self.host.mappings.get(&page).copied();
        if let Some(Mapping {
            target: GrantTarget::Page(page),
            read_only: false,
            ..
        }) = mapping
        {
            // The end of a writable mapping marks the page as changed.
            if !stays && !self.commit(MachineFault::LateUnmap) {
                self.front.mark(page);
            }
        }
        match self.host.mappings.remove(&page) {
            Some(mapping) if mapping.handle == handle && !mapping.lost => {
                if stays {
                    let lost = Mapping {
                        lost: true,
                        ..mapping
                    };
                    self.host.mappings.insert(page, lost);
                }
            }
            other => self.problem(format!("unmap of page {page}, handle {handle}: {other:?}")),
        }
        !stays
    }
}

impl Grants for FakeGrants {
    fn descriptor_buffers(&self) -> u8 {
        self.descriptors.len() as u8
    }

    fn descriptor(&self, buffer: u8) -> &[RawSegment] {
        self.descriptors
            .get(usize::from(buffer))
            .map_or(&[], |d| &d[..])
    }

    fn queue_copy(&mut self, copy: &Copy) -> bool {
        let fits = self.copies.len() < self.batch;
        if fits {
            self.copies.push(*copy);
        }
        fits
    }

    fn run_copies(&mut self, mut failed: impl FnMut(QueueTag)) {
        let shared = self.machine.clone();
        let mut m = shared.borrow_mut();
        m.accesses.copies += 1;
        for copy in std::mem::take(&mut self.copies) {
            if !self.copy(&mut m, &copy) {
                failed(copy.tag);
            }
        }
    }

    fn queue_map(&mut self, tag: QueueTag, page: PageIndex, gref: u32, read_only: bool) -> bool {
        let fits = self.maps.len() < self.batch;
        if fits {
            self.maps.push((tag, page, gref, read_only));
        }
        fits
    }

    fn run_maps(&mut self, mut outcome: impl FnMut(QueueTag, PageIndex, MapOutcome)) {
        let mut m = self.machine.borrow_mut();
        for (tag, page, gref, read_only) in std::mem::take(&mut self.maps) {
            let result = m.map(page.number(), gref, read_only);
            outcome(tag, page, result);
        }
    }

    fn read_mapped(&mut self, page: PageIndex, buffer: u8, len: u16) -> bool {
        let mut m = self.machine.borrow_mut();
        let to = self.descriptors.get_mut(usize::from(buffer));
        let mapping = m.host.mappings.get(&page.number()).copied();
        let (Some(to), Some(mapping)) = (to, mapping.filter(|mapping| !mapping.lost)) else {
            m.problem(format!("nothing to read at {page:?} for buffer {buffer}"));
            return false;
        };
        take_descriptors(&mut m, to, usize::from(len), mapping.target)
    }

    fn is_held(&self, page: PageIndex) -> bool {
        self.machine.borrow().host.held.contains(&page.number())
    }

    fn queue_unmap(&mut self, page: PageIndex, handle: u32) -> bool {
        let fits = self.unmaps.len() < self.batch;
        if fits {
            self.unmaps.push((page, handle));
        }
        fits
    }

    fn run_unmaps(&mut self, mut lost: impl FnMut(PageIndex)) {
        let mut m = self.machine.borrow_mut();
        for (page, handle) in std::mem::take(&mut self.unmaps) {
            if !m.unmap(page.number(), handle) && !m.commit(MachineFault::ForgetLost) {
                lost(page);
            }
        }
    }
}
