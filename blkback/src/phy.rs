// SPDX-License-Identifier: GPL-2.0-only

//! `phy:` disks: a block device as a medium, and the engine's backend over bios.

use crate::connection::{ConnectError, Connection};
use crate::engine::blocks::BLOCK;
use crate::engine::{Backend, Group, Io, IoKind, SegmentEntry, Slice, Slot, Tag};
use crate::medium::{Limits, Medium, Needs, Part, Peer, Queues};
use crate::memory::Lease;
use crate::params::{self, PoolSizes};
use crate::planted;
use crate::ring::abi::PAGE_SIZE;
use crate::ring::response::Status;
use crate::xen::bdev::BlockDevice;
use crate::xen::bio::{self, Bio, Disk, Inflight, Operation};
use crate::xen::block::{Block, Effort};
use crate::xen::data::{Backing, DataPages};
use crate::xen::grant::GuestGrants;
use core::pin::Pin;
use kernel::prelude::*;
use kernel::sync::Arc;

impl Medium for BlockDevice {
    fn limits(&self) -> Limits {
        BlockDevice::limits(self)
    }

    fn sectors(&self) -> u64 {
        BlockDevice::sectors(self)
    }

    fn is_writable(&self) -> bool {
        BlockDevice::is_writable(self)
    }

    fn number(&self) -> u32 {
        BlockDevice::number(self)
    }

    fn prepare(&self) -> Result<(), ConnectError> {
        // What this domain's page cache holds may be older than what the guest writes.
        self.drop_cache().map_err(|error| {
            ConnectError::Step("the page cache of the disk cannot be written back", error)
        })
    }

    fn connect(self: Arc<Self>, peer: &Peer<'_>) -> Result<Arc<Connection>, ConnectError> {
        Connection::new(&self, peer)
    }
}

impl Queues for BlockDevice {
    type Backend = Phy;

    fn max_segments(&self, _queues: u32) -> u16 {
        // A queue can do the largest request with what it always has.
        u16::MAX
    }

    fn queue(self: &Arc<Self>, needs: &Needs<'_>) -> Result<Part<Phy>, ConnectError> {
        let mut sizes = params::pool_sizes(needs.depth.into());
        let mut lease = Lease::new(needs.domain, bytes(&sizes, needs.depth))?;
        // Mappings are a matter of speed: without room for them everything is copied.
        if !lease.reserve_mappings(sizes.map.into(), params::domain_mappings()) {
            sizes.map = 0;
        }
        let no_memory =
            |error| ConnectError::Step("there is not enough memory for the queues", error);
        let memory = Memory::new(lease, &sizes).map_err(no_memory)?;
        let pages = memory.backing.table().clone();
        let disk = Disk::new(
            self.clone(),
            pages.clone(),
            needs.parker.clone(),
            needs.depth,
        )
        .map_err(no_memory)?;
        Ok(Part {
            backend: Phy { disk, memory },
            pages,
            own_pages: sizes.own,
            rest: sizes.rest,
            memory_kib: (bytes(&sizes, needs.depth) / 1024) as u64,
            depth: needs.depth,
        })
    }

    fn patience(&self) -> Option<u64> {
        None
    }
}

/// Bytes that a queue takes whether it is busy or not.
fn bytes(sizes: &PoolSizes, depth: u16) -> usize {
    let slots = usize::from(depth).saturating_mul(size_of::<Slot>());
    let entries = sizes.entries().saturating_mul(size_of::<SegmentEntry>());
    let groups = Group::needed(sizes.copy).saturating_mul(size_of::<Group>());
    usize::from(sizes.own)
        .saturating_mul(PAGE_SIZE)
        .saturating_add(slots)
        .saturating_add(entries)
        .saturating_add(groups)
        .saturating_add(DataPages::bytes(sizes.copy))
        .saturating_add(Disk::bytes(depth))
        .saturating_add(GuestGrants::bytes(sizes.map))
}

/// The memory of a queue's data pages, its own and what it has borrowed.
struct Memory {
    // The pages go before their share of what there is is given back.
    backing: Backing,
    lease: Lease,
}

impl Memory {
    /// The pages that the queue has for ever. May sleep.
    fn new(lease: Lease, sizes: &PoolSizes) -> Result<Self> {
        let mut backing = Backing::new(lease.domain(), sizes.copy, sizes.map)?;
        for index in 0..sizes.own / BLOCK {
            let block = Block::new(Effort::Full)?;
            backing.attach(index, block).map_err(|_| EINVAL)?;
        }
        Ok(Self { backing, lease })
    }
}

/// A block device as the backend of one queue.
pub(crate) struct Phy {
    // First: it waits for the last bios, which use the memory.
    disk: Pin<KBox<Disk>>,
    memory: Memory,
}

impl Backend for Phy {
    fn submit<'b>(&mut self, batch: impl Iterator<Item = Io<'b>>) {
        bio::plugged(|| {
            for io in batch {
                if let Some(inflight) = self.disk.begin(io.tag) {
                    start(&inflight, &io);
                }
            }
        });
    }

    fn reap(&mut self, mut done: impl FnMut(Tag, Status)) {
        self.disk.reap(|tag, status| {
            done(
                tag,
                match status {
                    0 => Status::Okay,
                    bio::NOT_SUPPORTED => Status::NotSupported,
                    _ => Status::Error,
                },
            );
        });
    }

    fn attach(&mut self, block: u16) -> bool {
        let Memory { backing, lease } = &mut self.memory;
        let Some(memory) = lease.borrow() else {
            return false;
        };
        match backing.attach(block, memory) {
            Ok(()) => true,
            Err(memory) => {
                lease.give_back(memory);
                false
            }
        }
    }

    fn detach(&mut self, block: u16) {
        if let Some(memory) = self.memory.backing.detach(block) {
            self.memory.lease.give_back(memory);
        }
    }

    fn owed(&mut self, thorough: bool) -> u16 {
        // More than that it does not have.
        u16::try_from(self.memory.lease.owed(thorough)).unwrap_or(u16::MAX - BLOCK)
    }

    fn is_content(&mut self) {
        self.memory.lease.is_content();
    }
}

fn start(inflight: &Inflight<'_>, io: &Io<'_>) {
    match io.kind {
        // An I/O to which nothing is submitted is done at once.
        IoKind::Flush if planted::EARLY_FLUSH => {}
        IoKind::Write if planted::is_lost(io.sector) => {}
        IoKind::Read => transfer(inflight, io, Operation::Read),
        IoKind::Write => transfer(inflight, io, write(false, false)),
        IoKind::PreFlushWrite => transfer(inflight, io, write(true, false)),
        IoKind::BarrierWrite if io.count() == 0 => without_data(inflight, Operation::Flush, io),
        IoKind::BarrierWrite => transfer(inflight, io, write(true, true)),
        IoKind::Flush => without_data(inflight, Operation::Flush, io),
        IoKind::Discard { secure: false } => without_data(inflight, Operation::Discard, io),
        IoKind::Discard { secure: true } => without_data(inflight, Operation::SecureErase, io),
    }
}

fn write(preflush: bool, fua: bool) -> Operation {
    Operation::Write { preflush, fua }
}

/// Memory of an I/O without a gap: a piece of a page, and what lies behind it.
struct Run {
    first: Slice,
    last: u16,
    len: u32,
}

impl Run {
    fn new(first: Slice) -> Self {
        Self {
            first,
            last: first.page,
            len: first.len.into(),
        }
    }

    /// Goes on with `next` if that lies directly behind.
    fn join(&mut self, inflight: &Inflight<'_>, next: &Slice) -> bool {
        let end = self.len.wrapping_add(self.first.offset.into());
        let joined = end % PAGE_SIZE as u32 == 0
            && next.offset == 0
            && inflight.adjoin(self.last, next.page);
        if joined {
            self.last = next.page;
            self.len = self.len.wrapping_add(next.len.into());
        }
        joined
    }
}

/// Puts the memory into as few pieces, and these into as few bios, as the device takes them in.
fn transfer(inflight: &Inflight<'_>, io: &Io<'_>, operation: Operation) {
    let mut left = io.count();
    let mut bios = Bios {
        inflight,
        operation,
        sector: io.sector,
        bio: inflight.bio(operation, io.sector, left),
    };
    let mut run: Option<Run> = None;
    for slice in io.slices() {
        if run.as_mut().is_some_and(|run| run.join(inflight, &slice)) {
            left = left.wrapping_sub(1);
            continue;
        }
        let before = run.replace(Run::new(slice));
        if !before.is_none_or(|run| bios.add(&run, left.wrapping_add(1))) {
            return;
        }
        left = left.wrapping_sub(1);
    }
    if run.is_none_or(|run| bios.add(&run, 1)) {
        bios.bio.submit();
    }
}

/// The bios of an I/O, of which the last one is being built.
struct Bios<'a> {
    inflight: &'a Inflight<'a>,
    operation: Operation,
    /// Where the next run goes.
    sector: u64,
    bio: Bio<'a>,
}

impl Bios<'_> {
    /// Adds a run, which is one of at most `left` pieces that are left. False if that cannot be
    /// done.
    fn add(&mut self, run: &Run, left: u16) -> bool {
        let (page, offset) = (run.first.page, run.first.offset);
        if !self.bio.add(page, offset, run.len) {
            // In this order: the next one may have to wait for this one.
            self.bio.submit();
            self.bio = self.inflight.bio(self.operation, self.sector, left);
            if !self.bio.add(page, offset, run.len) {
                // The device does not even take one piece; the rest is lost, the request fails.
                self.inflight.fail();
                return false;
            }
        }
        self.sector = self.sector.wrapping_add(u64::from(run.len / 512));
        true
    }
}

fn without_data(inflight: &Inflight<'_>, operation: Operation, io: &Io<'_>) {
    let sector = match operation {
        Operation::Flush => 0,
        _ => io.sector,
    };
    let mut bio = inflight.bio(operation, sector, 0);
    if operation != Operation::Flush {
        // The engine gives out at most 1 GiB at once.
        bio.set_sectors(u32::try_from(io.sectors).unwrap_or(u32::MAX / 512));
    }
    bio.submit();
}
