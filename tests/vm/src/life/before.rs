// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The host has Xen's own driver, and gets ours.

use super::working::WorkingGuest;
use super::{host, Chapter, LifeStory};
use crate::{sh, TestedDriver};
use anyhow::{ensure, Context, Result};

/// Highest exposure that systemd may report for each unit, in tenths: a little more than it reports, because other
/// versions judge differently. The supervisor's unit has to see the host's file systems and devices.
const EXPOSED: [(&str, u32); 3] = [
    ("blktapctrl.service", 57),
    ("xentap-guests.service", 15),
    ("xentap-metrics.service", 17),
];

pub(super) fn chapters() -> Vec<Chapter> {
    vec![
        Chapter {
            name: "life.before",
            about: "a guest works on a disk of the C driver",
            tell: before,
        },
        Chapter {
            name: "life.installed",
            about: "the packages are installed, and the guest goes on with the C driver",
            tell: installed,
        },
        Chapter {
            name: "life.decided_for",
            about: "ours is decided for, takes the disk over, and serves a tap disk at once",
            tell: decided_for,
        },
    ]
}

fn before(story: &mut LifeStory) -> Result<()> {
    host::is_up()?;
    let working = WorkingGuest::begin()?;
    working.is_served_by(TestedDriver::C)?;
    story.working = Some(working);
    Ok(())
}

fn installed(story: &mut LifeStory) -> Result<()> {
    let [version, _] = host::versions()?;
    host::apt_does(&["update"])?;
    let [programs, module] = host::both(&version)?;
    host::apt_does(&["install", &programs, &module])?;
    let working = story.working()?;
    working.is_served_by(TestedDriver::C)?;
    working.goes_on()?;
    ensure!(
        !TestedDriver::Rs.is_loaded(),
        "installing has loaded our module"
    );
    ensure!(
        !host::is_active("blktapctrl.service")?,
        "installing has started a supervisor on a host that has not decided for it"
    );
    for (unit, most) in EXPOSED {
        host::is_hardened(unit, most)?;
    }
    host::nothing_failed()
}

fn decided_for(story: &mut LifeStory) -> Result<()> {
    let said = sh::run(&["xen-blkback-rs", "enable"])?;
    ensure!(
        said.contains("xen-blkback-rs takeover"),
        "it is not said how to change at once: {said}"
    );
    sh::run(&["xen-blkback-rs", "takeover"])?;
    let working = story.working()?;
    working.is_served_by(TestedDriver::Rs)?;
    working.goes_on()?;
    working.add_tap()?;
    host::nothing_failed()?;
    let working = story.working.take().context("nobody works")?;
    working.end()
}
