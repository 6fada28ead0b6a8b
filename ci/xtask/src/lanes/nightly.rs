// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! What takes too long for each change.

use super::e2e;
use crate::tally::Tally;
use anyhow::{ensure, Result};

/// A part of the lane, each of which boots a machine of its own.
type Part = (&'static str, fn(&mut Tally, Option<u64>) -> Result<()>);

const PARTS: [Part; 7] = [
    ("fuzz", e2e::fuzz),
    ("fuzz-tap", e2e::fuzz_tap),
    ("deaths", e2e::deaths),
    ("mapped", e2e::mapped),
    ("many", e2e::many),
    ("moves", e2e::moves),
    ("leases", e2e::leases),
];

/// Runs the part that `only` names, or all parts.
pub(super) fn tests(tally: &mut Tally, only: &str, seed: Option<u64>) -> Result<()> {
    let wanted = |name| only == super::ALL || only == name;
    let parts: Vec<Part> = PARTS.into_iter().filter(|part| wanted(part.0)).collect();
    ensure!(
        !parts.is_empty(),
        "there is no part `{only}` of the lane nightly: choose from {}",
        PARTS.map(|(name, _)| name).join(", ")
    );
    parts.into_iter().try_for_each(|(_, run)| run(tally, seed))
}
