// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Random requests, repeated by a seed.

use anyhow::{bail, Result};
use std::path::PathBuf;

/// Runs so many batches.
pub(crate) fn run(_seed: u64, _cases: u32, _device: Option<&PathBuf>) -> Result<bool> {
    bail!("not here yet")
}
