// SPDX-License-Identifier: GPL-2.0-only

//! `phy:` disks: a block device as a backing disk, and the engine's backend over bios.

use crate::backing::{BackingDisk, BlockLimits, Drain, QueueBackends, QueueNeeds, QueuePart};
use crate::connect_error::ConnectError;
use crate::engine::blocks::BLOCK;
use crate::engine::{Backend, Io, IoKind, ReapContext, Slice};
use crate::fault_injection;
use crate::linux::block::bdev::BlockDevice;
use crate::linux::block::bio::{self, BioDisk, Inflight, Operation, PagePiece};
use crate::linux::memory::data::PageBacking;
use crate::linux::memory::page_blocks::{AllocEffort, PageBlock};
use crate::linux::monotonic_ns;
use crate::memory::{queue_bytes, Lease};
use crate::params::{self, PoolSizes};
use crate::ring::numbers::QueueTag;
use crate::ring::response::ResponseStatus;
use core::pin::Pin;
use kernel::prelude::*;
use kernel::sync::Arc;

impl BackingDisk for BlockDevice {
    fn limits(&self) -> BlockLimits {
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

    fn keeps_grants(&self) -> bool {
        params::keeps_grants() && !self.wants_stable_pages()
    }

    fn offered_segments(&self) -> u16 {
        u16::MAX
    }

    fn prepare(&self) -> Result<(), ConnectError> {
        // Pages in this domain's page cache may be older than the guest's last writes.
        self.drop_cache().map_err(|error| {
            ConnectError::Step("writing back the page cache of the disk failed", error)
        })
    }
}

impl QueueBackends for BlockDevice {
    type Backend = Phy;

    fn max_segments(&self, _queues: u32) -> u16 {
        // A queue can execute the largest request with the memory that it always has.
        u16::MAX
    }

    fn queue(self: &Arc<Self>, needs: &QueueNeeds<'_>) -> Result<QueuePart<Phy>, ConnectError> {
        let mut sizes = params::pool_sizes(needs.depth.into(), needs.keeps_grants, needs.segments);
        let bytes = queue_bytes(&sizes, needs.depth);
        let mut lease = Lease::new(needs.domain, bytes, needs.reservation)?;
        // A guest can change its pages while the device has them. Where that is more than its own loss, because a wrong
        // checksum ends a connection that other disks use, too, everything is copied. Mappings are a matter of speed:
        // without room for them everything is copied as well.
        if self.wants_stable_pages()
            || !lease.reserve_mappings(sizes.map.into(), params::domain_mappings())
        {
            sizes.map = 0;
        }
        let no_memory =
            |error| ConnectError::Step("there is not enough memory for the queues", error);
        let memory = QueueMemory::new(lease, &sizes).map_err(no_memory)?;
        let pages = memory.backing.table().clone();
        let device = Some(self.clone());
        let bios = BioDisk::new(pages.clone(), needs.wake_event.clone(), device, needs.depth)
            .map_err(no_memory)?;
        Ok(QueuePart {
            backend: Phy { bios, memory },
            pages,
            own_pages: sizes.own,
            rest: sizes.rest,
            memory_kib: (queue_bytes(&sizes, needs.depth) / 1024) as u64,
            depth: needs.depth,
        })
    }

    fn drain(&self) -> Drain {
        Drain::MustFinish
    }
}

/// The memory of a queue's data pages, its own and what it has borrowed.
struct QueueMemory {
    // The pages go before their share of what there is is given back.
    backing: PageBacking,
    lease: Lease,
}

impl QueueMemory {
    /// The pages that the queue has for ever. May sleep.
    fn new(lease: Lease, sizes: &PoolSizes) -> Result<Self> {
        let mut backing = PageBacking::new(lease.domain(), sizes.copy, sizes.map)?;
        for index in 0..sizes.own / BLOCK {
            let block = PageBlock::new(AllocEffort::Full)?;
            backing.attach(index, block).map_err(|_| EINVAL)?;
        }
        Ok(Self { backing, lease })
    }
}

/// A block device as the backend of one queue.
pub(crate) struct Phy {
    // First: it waits for the last bios, which use the memory.
    bios: Pin<KBox<BioDisk>>,
    memory: QueueMemory,
}

impl Backend for Phy {
    fn submit<'b>(&mut self, count: u16, batch: impl Iterator<Item = Io<'b>>) {
        bio::plugged(count, || {
            for io in batch {
                if let Some(inflight) = self.bios.begin(io.tag, None) {
                    start(&inflight, &io);
                }
            }
        });
    }

    fn forget_wake_ups(&mut self) {
        self.bios.forget_wake_ups();
    }

    // Its bios name no storage that would have to be released.
    fn reap_context(&self) -> ReapContext {
        ReapContext::Any
    }

    fn reap(&mut self, mut done: impl FnMut(QueueTag, ResponseStatus)) {
        self.bios.reap(|tag, status, _| {
            done(
                tag,
                match status {
                    0 => ResponseStatus::Okay,
                    bio::NOT_SUPPORTED => ResponseStatus::NotSupported,
                    _ => ResponseStatus::Error,
                },
            );
        });
    }

    fn now(&self) -> u64 {
        monotonic_ns()
    }

    fn attach(&mut self, block: u16) -> bool {
        let QueueMemory { backing, lease } = &mut self.memory;
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
        IoKind::Flush if fault_injection::EARLY_FLUSH => {}
        IoKind::Write if fault_injection::is_lost(io.sector) => {}
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

fn transfer(inflight: &Inflight<'_>, io: &Io<'_>, operation: Operation) {
    let pieces = io.slices().map(PagePiece::from);
    if io.is_mapped() {
        return inflight.scatter(operation, io.sector, io.count(), pieces);
    }
    let place = bio::DeviceTarget {
        sector: Some(io.sector),
        bytes: io.sectors.saturating_mul(512),
    };
    inflight.transfer(operation, core::iter::once(place), io.count(), pieces);
}

impl From<Slice> for PagePiece {
    fn from(slice: Slice) -> Self {
        Self {
            page: slice.page,
            offset: slice.offset,
            len: slice.len.into(),
        }
    }
}

fn without_data(inflight: &Inflight<'_>, operation: Operation, io: &Io<'_>) {
    match operation {
        Operation::Flush => inflight.without_data(operation, 0, 0),
        _ => {
            // The engine gives out at most 1 GiB at once.
            let sectors = u32::try_from(io.sectors).unwrap_or(u32::MAX / 512);
            inflight.without_data(operation, io.sector, sectors);
        }
    }
}
