// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The packages are gone, and the host has booted since.

use super::working::WorkingGuest;
use super::{host, Chapter, LifeStory};
use crate::TestedDriver;
use anyhow::{ensure, Result};

pub(super) fn chapters() -> Vec<Chapter> {
    vec![Chapter {
        name: "life.after",
        about: "the C driver serves as if nothing had been",
        tell: after,
    }]
}

fn after(_: &mut LifeStory) -> Result<()> {
    host::is_up()?;
    let working = WorkingGuest::begin()?;
    working.is_served_by(TestedDriver::C)?;
    ensure!(!TestedDriver::Rs.is_loaded(), "our module is loaded");
    working.end()
}
