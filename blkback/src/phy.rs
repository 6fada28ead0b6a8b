// SPDX-License-Identifier: GPL-2.0-only

//! `phy:` disks: a block device as a medium, and the engine's backend over bios.

use crate::connection::{ConnectError, Connection};
use crate::engine::{Backend, Io, IoKind, Tag};
use crate::medium::{Limits, Medium, Needs, Part, Peer, Queues};
use crate::params::{self, PoolSizes};
use crate::ring::response::Status;
use crate::xen::bdev::BlockDevice;
use crate::xen::bio::{self, Disk, Inflight, Operation};
use crate::xen::pages::Pages;
use crate::xen::quota::{Kind, Reservation};
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
        // A queue has pages of its own for the largest request.
        u16::MAX
    }

    fn queue(self: &Arc<Self>, needs: &Needs<'_>) -> Result<Part<Phy>, ConnectError> {
        let (sizes, reservation) = reserve(needs.domain, needs.depth.into())?;
        let no_memory =
            |error| ConnectError::Step("there is not enough memory for the queues", error);
        let pages = Pages::new(sizes.copy, sizes.map)
            .and_then(|pages| Ok(Arc::new(pages, GFP_KERNEL)?))
            .map_err(no_memory)?;
        let disk = Disk::new(
            self.clone(),
            pages.clone(),
            needs.parker.clone(),
            needs.depth,
        )
        .map_err(no_memory)?;
        Ok(Part {
            backend: Phy {
                disk,
                _reservation: reservation,
            },
            pages,
            depth: needs.depth,
        })
    }

    fn patience(&self) -> Option<u64> {
        None
    }
}

/// Memory of a queue, and its mappings if there is room for them.
type Reserved = (Reservation, Option<Reservation>);

/// Reserves what a queue needs of its guest's quotas, or less if there is not enough: a queue
/// with few pages has fewer large requests in flight. Mappings are a matter of speed: without room
/// for them everything is copied.
fn reserve(domain: u16, slots: u32) -> Result<(PoolSizes, Reserved), ConnectError> {
    let mut sizes = params::pool_sizes(slots);
    let memory = loop {
        let limit = params::domain_pages();
        match Reservation::new(Kind::Memory, domain, sizes.copy.into(), limit) {
            Ok(memory) => break memory,
            Err(_) if sizes.copy > sizes.least => sizes.copy = (sizes.copy / 2).max(sizes.least),
            Err(error) => {
                let what = "the guest's quota (domain_memory_mib) is used up";
                return Err(ConnectError::Step(what, error));
            }
        }
    };
    if sizes.map == 0 {
        return Ok((sizes, (memory, None)));
    }
    let limit = params::domain_mappings();
    let maps = Reservation::new(Kind::Mappings, domain, sizes.map.into(), limit).ok();
    if maps.is_none() {
        sizes.map = 0;
    }
    Ok((sizes, (memory, maps)))
}

/// A block device as the backend of one queue.
pub(crate) struct Phy {
    // The pages go before their share of the quota is given back.
    disk: Pin<KBox<Disk>>,
    _reservation: Reserved,
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
}

fn start(inflight: &Inflight<'_>, io: &Io<'_>) {
    match io.kind {
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

/// Splits the pages over as few bios as the device takes them in.
fn transfer(inflight: &Inflight<'_>, io: &Io<'_>, operation: Operation) {
    let mut sector = io.sector;
    let mut left = io.count();
    let mut bio = inflight.bio(operation, sector, left);
    for slice in io.slices() {
        if !bio.add(slice.page, slice.offset, slice.len) {
            bio.submit();
            bio = inflight.bio(operation, sector, left);
            if !bio.add(slice.page, slice.offset, slice.len) {
                // The device does not even take one piece; the rest is lost, the request fails.
                inflight.fail();
                return;
            }
        }
        sector = sector.wrapping_add(u64::from(slice.len / 512));
        left = left.wrapping_sub(1);
    }
    bio.submit();
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
