// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disks in the lists of fake supervisors.

use control::supervisor::{Mode, Row};
use control::tapdisk::{Disk, Engine, State};
use control::Target;

/// Returns the row of a disk that a process serves for writing, and of which nothing else is known.
pub(crate) fn served(minor: u32, vbd: &str, target: Target) -> Row {
    Row {
        minor: Some(minor),
        pid: Some(1),
        state: Some(State::Running),
        kernel: None,
        target: Some(target),
        mode: Some(Mode::Write),
        vbd: Some(vbd.into()),
        disk: None,
        restarts: 0,
        doing: None,
        unknown: None,
        stopped: None,
        state_bytes: 0,
        binary: None,
    }
}

/// Returns the properties of a disk of so many bytes.
pub(crate) fn disk_of(size: u64) -> Disk {
    Disk {
        size,
        logical_block: 512,
        physical_block: 512,
        read_only: false,
        discard: true,
        engine: Engine::Auto,
    }
}
