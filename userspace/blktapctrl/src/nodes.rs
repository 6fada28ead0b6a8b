// SPDX-License-Identifier: MIT OR Apache-2.0
//! The nodes of the running kernel.

use crate::kernel::{Kernel, Make, NodeInfo};
use control::stats::{Mapped, Missed};
use control::supervisor::{self, Poison};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use tapdev::abi::{self, CreateCommand, Info};
use tapdev::control::{excuse, open_node, Control};

/// The driver of this host. The control node is opened for each question, so that the driver can be
/// loaded and unloaded while the supervisor runs.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostDriver;

impl Kernel for HostDriver {
    fn create(&self, make: Make) -> io::Result<u32> {
        let create = CreateCommand {
            arena_kib: make.arena_kib,
            fail_after_s: make.fail_after_s,
            max_deaths: make.max_deaths,
            ..CreateCommand::default()
        };
        Control::open()?.create(make.minor, create)
    }

    fn destroy(&self, minor: u32) -> io::Result<()> {
        Control::open()?.destroy(minor)
    }

    fn query(&self, from: u32) -> io::Result<Option<NodeInfo>> {
        match Control::open() {
            Ok(control) => control
                .query(from)?
                .map(|info| node(&control, info))
                .transpose(),
            // Without the driver there are no nodes. With it there may be some, though their files are
            // not where they should be.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !is_loaded()? => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn open(&self, minor: u32) -> io::Result<OwnedFd> {
        open_node(minor)
    }

    fn excuse(&self, node: BorrowedFd<'_>) -> io::Result<()> {
        excuse(node)
    }

    fn add_backing(
        &self,
        minor: u32,
        number: u16,
        file: BorrowedFd<'_>,
        writable: bool,
    ) -> io::Result<()> {
        Control::open()?.add_backing(minor, number.into(), file, writable)
    }

    fn remove_backing(&self, minor: u32, number: u16) -> io::Result<()> {
        Control::open()?.remove_backing(minor, number.into())
    }
}

/// The last request that failed because processes died of it.
fn poison(info: &Info) -> Option<Poison> {
    let operation = match u8::try_from(info.poison_op) {
        Ok(abi::OP_READ) => "read",
        Ok(abi::OP_WRITE) => "write",
        Ok(abi::OP_FLUSH) => "flush",
        Ok(abi::OP_DISCARD | abi::OP_SECURE_DISCARD) => "discard",
        Ok(abi::OP_WRITE_ZEROES) => "write-zeroes",
        _ => "unknown",
    };
    (info.poisoned > 0).then(|| Poison {
        operation: operation.into(),
        sector: info.poison_sector,
        sectors: info.poison_sectors,
    })
}

fn is_loaded() -> io::Result<bool> {
    Path::new("/sys/module/xen_blkback_rs").try_exists()
}

fn node(control: &Control, info: Info) -> io::Result<NodeInfo> {
    let mapped = match info.backings {
        0 => None,
        _ => match control.mapped(info.minor) {
            // It went meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            other => other?.map(mapped),
        },
    };
    let state = match info.state {
        abi::STATE_IDLE => "idle",
        abi::STATE_OPEN => "open",
        abi::STATE_LIVE => "live",
        abi::STATE_FENCING => "fencing",
        abi::STATE_RECOVERING => "recovering",
        _ => "unknown",
    };
    Ok(NodeInfo {
        minor: info.minor,
        status: supervisor::Kernel {
            state: state.into(),
            waiting: info.waiting,
            delivered: info.delivered,
            committed: info.committed,
            replayed: info.replayed,
            refused: info.refused,
            oldest_ns: info.oldest_ns,
            isolated: info.isolated,
            poisoned: info.poisoned,
            poison: poison(&info),
            failed_flushes: info.failed_flushes,
            memory_kib: info.memory_kib,
            backings: info.backings.count_ones(),
            direct: info.direct,
            executing: info.executing,
            mapped,
        },
        bound: (info.domain != u32::MAX).then_some((info.domain, info.device)),
        has_maps: info.features & abi::FEATURE_MAPS != 0,
        backings: info.backings,
    })
}

fn mapped(mapped: abi::Mapped) -> Mapped {
    let missed = |reason: u8| mapped.missed.get(usize::from(reason)).copied().unwrap_or(0);
    Mapped {
        missed: Missed {
            unmapped: missed(abi::MISS_UNMAPPED),
            partial: missed(abi::MISS_PARTIAL),
            read_only: missed(abi::MISS_READ_ONLY),
            unaligned: missed(abi::MISS_UNALIGNED),
            pieces: missed(abi::MISS_PIECES),
            backings: missed(abi::MISS_BACKINGS),
            never: missed(abi::MISS_NEVER),
            queue: missed(abi::MISS_QUEUE),
        },
        room: mapped.room,
        evicted: mapped.evicted,
        refused: mapped.refused,
        recalled: mapped.recalled,
    }
}
