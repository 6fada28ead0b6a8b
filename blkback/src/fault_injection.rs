// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Faults in a build that is never shipped (`--cfg planted_faults`): the tests must find each of them.
//!
//! `tests/vm/src/cases/planted.rs` names the tests. Another fault is in the engine, which is also a crate of its own:
//! it unmaps pages late (`engine/copy_out.rs`).

/// True if this build has the faults.
const PLANTED: bool = cfg!(planted_faults);

/// A flush is answered without the device.
pub(crate) const EARLY_FLUSH: bool = PLANTED;

/// Requests that a new process of a tap disk gets do not wait for the I/O of the process that died.
pub(crate) const NO_FENCE: bool = PLANTED;

/// Reports whether a write that begins at this sector (512 bytes) is answered without the device. The first sectors of
/// a disk are spared, so that a disk can be attached.
pub(crate) const fn is_lost(sector: u64) -> bool {
    PLANTED && sector % 7 == 6
}
