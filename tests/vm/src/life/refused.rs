// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The kernel demands that modules are signed, and ours is not.

use super::working::WorkingGuest;
use super::{host, Chapter, LifeStory};
use crate::{sh, TestedDriver};
use anyhow::{ensure, Result};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);

pub(super) fn chapters() -> Vec<Chapter> {
    vec![Chapter {
        name: "life.refused",
        about: "ours is decided for and is refused: the C driver serves, and each program says why",
        tell: refused,
    }]
}

fn refused(_: &mut LifeStory) -> Result<()> {
    host::is_up()?;
    let working = WorkingGuest::begin()?;
    working.is_served_by(TestedDriver::C)?;
    ensure!(!TestedDriver::Rs.is_loaded(), "our module is loaded");
    let decided = sh::run(&["xen-blkback-rs", "status"])?;
    ensure!(
        decided.contains("refused, because it is not signed"),
        "it is not said why ours does not serve: {decided}"
    );
    let doctor = sh::status(&["tap-ctl", "doctor"], LIMIT)?;
    ensure!(
        doctor.rc != 0 && doctor.text.contains("module.sig_enforce"),
        "the doctor finds nothing: {} {}",
        doctor.rc,
        doctor.text
    );
    let takeover = sh::status(&["xen-blkback-rs", "takeover"], LIMIT)?;
    ensure!(takeover.rc != 0, "a disk was taken over: {}", takeover.text);
    working.is_served_by(TestedDriver::C)?;
    working.goes_on()?;
    working.end()
}
