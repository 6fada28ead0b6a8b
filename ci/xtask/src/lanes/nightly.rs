// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! What takes too long for each change.

use crate::tally::Tally;
use anyhow::Result;

pub(super) fn tests(tally: &mut Tally) -> Result<()> {
    super::e2e::fuzz(tally)?;
    super::e2e::deaths(tally)?;
    super::e2e::fault(tally)
}
