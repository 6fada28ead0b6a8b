// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images with tables of their own by their names: the crate `formats`, which is above this one, opens and makes them.

use crate::Disk;
use control::tapdisk::Open;
use control::Failure;
use diskio::{Errno, File};

/// Refuses to open an image of a format that this crate does not know.
pub(crate) fn open(open: &Open, _: Option<File>) -> Result<Disk, Failure> {
    Err(Failure::unsupported(format!(
        "this program does not know the format {}: use tapdisk",
        open.target.driver()
    )))
}

/// Makes nothing: `formats` makes such images.
pub(crate) async fn create(_: &File, _: u64) -> Result<(), Errno> {
    Err(Errno::OPNOTSUPP)
}
