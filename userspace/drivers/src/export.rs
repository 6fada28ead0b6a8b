// SPDX-License-Identifier: MIT OR Apache-2.0
//! `nbd` by its name: a disk that needs a connection, which only the holder of one can open as [`nbd::Nbd`].
//!
//! [`nbd::Nbd`]: crate::nbd::Nbd

use crate::Disk;
use control::tapdisk::Open;
use control::Failure;
use diskio::{Errno, File};

/// Refuses to open it without a connection.
pub(crate) fn open(_: &Open, _: Option<File>) -> Result<Disk, Failure> {
    Err(Failure::unsupported(
        "an export is opened by who has a connection to its server: use tapdisk",
    ))
}

/// Makes nothing, because a server has the image.
pub(crate) async fn create(_: &File, _: u64) -> Result<(), Errno> {
    Err(Errno::OPNOTSUPP)
}
