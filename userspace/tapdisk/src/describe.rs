// SPDX-License-Identifier: MIT OR Apache-2.0
//! Descriptions of a disk for the kernel and the supervisor, and reasons for the kernel's refusal.

use control::tapdisk::{self, Engine, Open};
use control::{Code, Failure};
use drivers::DiskInfo;
use std::io;
use tapdev::{Discard, Params};

/// Reasons why an image cannot be served in place of another one.
const UNFIT: &str = "its blocks are larger, it is smaller (`unpause --shrink` allows that), only one of the two is read-only, or only the new one has a volatile cache";

/// An image may take the place of the one that the guest knows, if it knows one.
pub(crate) fn succeeds(open: &Open, known: Option<Params>, params: &Params) -> Result<(), Failure> {
    match known.is_some_and(|known| known.succeeded_by(params).is_err()) {
        false => Ok(()),
        true => Err(Failure::new(
            Code::Image,
            format!(
                "{} cannot take the place of the image that the guest knows: {UNFIT}",
                open.target
            ),
        )),
    }
}

/// Returns the reason for the kernel's refusal of an image.
pub(crate) fn described(open: &Open, error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::InvalidInput => Failure::new(
            Code::Image,
            format!("the kernel refuses {}: {UNFIT}", open.target),
        ),
        // The kernel says ERANGE.
        _ if error.raw_os_error() == Some(diskio::Errno::RANGE.raw_os_error()) => Failure::new(
            Code::Image,
            format!(
                "{} is smaller than the disk that the guest knows: make it larger, or pause the disk and unpause it with --shrink",
                open.target
            ),
        ),
        _ => Failure::system(format!("the kernel refuses {}", open.target), error),
    }
}

/// A node, for the supervisor.
pub(crate) fn node(info: &tapdev::abi::Info) -> tapdisk::Node {
    tapdisk::Node {
        minor: info.minor,
        tags: info.tags,
        arena: info.arena_len,
        epoch: info.epoch,
    }
}

/// Returns the end of this process's I/O in the terms of the kernel's interface.
pub(crate) fn fence(fence: drivers::Fence) -> tapdev::Fence {
    match fence {
        drivers::Fence::Local => tapdev::Fence::Local,
        drivers::Fence::Session { settle_ms } => tapdev::Fence::Session { settle_ms },
        drivers::Fence::None => tapdev::Fence::None,
    }
}

/// A disk, for the kernel.
pub(crate) fn params(shape: &DiskInfo, open: &Open) -> Params {
    Params {
        sectors: shape.size >> 9,
        logical_block: shape.logical_block,
        physical_block: shape.physical_block,
        read_only: open.read_only,
        write_cache: shape.write_cache && !open.read_only,
        discard: shape.discard.map(|granularity| Discard {
            granularity,
            alignment: 0,
            secure: false,
        }),
        may_shrink: open.may_shrink,
    }
}

/// A disk, for the supervisor.
pub(crate) fn describe(shape: &DiskInfo, open: &Open, engine: Engine) -> tapdisk::Disk {
    tapdisk::Disk {
        size: shape.size,
        logical_block: shape.logical_block,
        physical_block: shape.physical_block,
        read_only: open.read_only,
        discard: shape.discard.is_some(),
        engine,
    }
}
