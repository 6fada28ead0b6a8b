// SPDX-License-Identifier: MIT OR Apache-2.0
//! Looks that tests make.

use crate::host::made::Made;
use crate::sample::{gather, HostSample, SampledDisk, Supervisor};
use std::time::Duration;

/// Returns a look so many seconds after another one.
pub(super) fn look(
    seconds: u64,
    before: Option<&HostSample>,
    disks: Vec<SampledDisk>,
) -> HostSample {
    let mut look = gather(&Made::new().host(), Vec::new(), Supervisor::Answers);
    look.unread.clear();
    if let Some(before) = before {
        look.at = before.at + Duration::from_secs(seconds);
    }
    HostSample { disks, ..look }
}

/// A disk of which the driver has counted so much.
pub(super) fn counted(mut disk: SampledDisk, name: &str, value: u64) -> SampledDisk {
    let vbd = disk.vbd.as_mut().expect("a guest's disk");
    vbd.counters.insert(name.into(), value);
    disk
}
