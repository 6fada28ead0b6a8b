// SPDX-License-Identifier: GPL-2.0-only

//! `phy:` disks: the engine's backend over bios.

use crate::engine::{Backend, Io, IoKind, Tag};
use crate::ring::response::Status;
use crate::xen::bio::{self, Disk, Inflight, Operation};
use core::pin::Pin;
use kernel::prelude::*;

/// A block device as the backend of one queue.
pub(crate) struct Phy {
    disk: Pin<KBox<Disk>>,
}

impl Phy {
    /// Serves a queue from a block device.
    pub(crate) fn new(disk: Pin<KBox<Disk>>) -> Self {
        Self { disk }
    }
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
