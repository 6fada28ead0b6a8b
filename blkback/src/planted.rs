// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Faults in a build that is never shipped (`--cfg planted_faults`): the tests must find each of them.
//!
//! `tests/vm/src/cases/planted.rs` names the tests. One more is in the engine, which is a crate of its own, too: pages that
//! are unmapped late (`engine/copy_out.rs`).

/// Whether this build has the faults.
const PLANTED: bool = cfg!(planted_faults);

/// A flush is answered without the device.
pub(crate) const EARLY_FLUSH: bool = PLANTED;

/// What is delivered to the process of a tap disk after the death of another one does not wait for
/// the I/O of that.
pub(crate) const NO_FENCE: bool = PLANTED;

/// Whether a write that begins at this sector is answered without the device. The first sectors of a
/// disk are spared, so that a disk can be attached.
pub(crate) const fn is_lost(sector: u64) -> bool {
    PLANTED && sector % 7 == 6
}
