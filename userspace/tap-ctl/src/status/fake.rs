// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disks that tests make.

use crate::host::vbd::{Number, Vbd};
use crate::sample::{Kind, SampledDisk};
use control::stats::Stats;
use control::supervisor::{Kernel, Mode, Row, TopRow};
use control::tapdisk::State;
use std::collections::BTreeMap;

/// A disk that a process serves, as blktapctrl tells of it.
pub(crate) fn row(minor: u32) -> TopRow {
    let row = Row {
        minor: Some(minor),
        pid: Some(312),
        state: Some(State::Running),
        kernel: Some(Kernel {
            state: "live".into(),
            ..Kernel::default()
        }),
        target: "aio:/srv/a.img".parse().ok(),
        mode: Some(Mode::Write),
        vbd: Some("backend/vbd/3/51728".into()),
        disk: None,
        restarts: 0,
        doing: None,
        unknown: None,
        stopped: None,
        state_bytes: 0,
        binary: None,
    };
    TopRow {
        row,
        stats: Some(Box::default()),
        resident: None,
    }
}

fn vbd(path: &str, vdev: &str) -> Vbd {
    Vbd {
        path: path.into(),
        guest: 3,
        vdev: vdev.into(),
        driver: Some("xen-blkback-rs".into()),
        state: Some("Connected".into()),
        device: Some(Number(8, 16)),
        counters: BTreeMap::new(),
    }
}

/// A guest's disk that a process serves, and that is well.
pub(crate) fn tap(minor: u32) -> SampledDisk {
    SampledDisk {
        kind: Kind::Tap,
        vbd: Some(vbd("backend/vbd/3/51728", "xvdb")),
        guest_name: None,
        guest_word: Some("3".into()),
        block: None,
        queues: Vec::new(),
        tap: Some(row(minor)),
        process: Vec::new(),
    }
}

/// A guest's disk that the kernel serves, and that is well.
pub(crate) fn phy() -> SampledDisk {
    SampledDisk {
        kind: Kind::Phy,
        vbd: Some(vbd("backend/vbd/3/51712", "xvda")),
        guest_name: None,
        guest_word: Some("3".into()),
        block: Some(Default::default()),
        queues: Vec::new(),
        tap: None,
        process: Vec::new(),
    }
}

/// Returns the counters of the disk's process.
pub(crate) fn stats(disk: &mut SampledDisk) -> &mut Stats {
    let tap = disk.tap.as_mut().expect("a tap disk");
    tap.stats.get_or_insert_default()
}

/// Returns the kernel's status of the disk.
pub(crate) fn kernel(disk: &mut SampledDisk) -> &mut Kernel {
    let tap = disk.tap.as_mut().expect("a tap disk");
    tap.row.kernel.get_or_insert_default()
}
