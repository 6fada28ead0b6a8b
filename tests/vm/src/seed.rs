// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The one source of chance of a run: another one each time, unless the command line names it.

use std::sync::OnceLock;

static SEED: OnceLock<u64> = OnceLock::new();

/// Begins with this seed, or with a new one.
pub(crate) fn begin(wanted: Option<u64>) -> u64 {
    *SEED.get_or_init(|| wanted.unwrap_or_else(seeds::fresh_seed))
}

/// The seed of this run.
pub(crate) fn get() -> u64 {
    begin(None)
}
