// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The control group that a guest has under systemd without being asked for.

use super::working::WorkingGuest;
use super::{host, LifeStory};
use crate::{sh, tap};
use anyhow::{ensure, Context, Result};
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
/// The unit below which the groups are.
pub(super) const UNIT: &str = "xentap-guests.service";
/// Limit of the guest's reads from its phy disk in a second, which is higher than its speed.
const RATE: &str = "rbps=1073741824";

/// The group of the guest that works.
pub(super) struct GuestGroup {
    path: String,
    domid: u32,
    /// The block device of its phy disk, as `MAJOR:MINOR`.
    device: String,
}

impl GuestGroup {
    pub(super) fn of(working: &WorkingGuest) -> Result<GuestGroup> {
        let domid = working.guest.domid;
        Ok(GuestGroup {
            path: format!("/sys/fs/cgroup/system.slice/{UNIT}/guest-{domid}"),
            domid,
            device: working.device()?,
        })
    }

    fn file(&self, name: &str) -> Result<String> {
        sh::get(format!("{}/{name}", self.path))
    }

    /// Waits until the kernel's thread of the phy disk and this tapdisk are there.
    pub(super) fn has(&self, tapdisk: u32) -> Result<()> {
        let thread = format!("{}.", self.domid);
        sh::wait_for("who does the guest's I/O in its group", LIMIT, || {
            if !Path::new(&self.path).exists() {
                return Ok(false);
            }
            let pids = self.file("cgroup.procs")?;
            let pids: Vec<&str> = pids.lines().collect();
            // A process that has ended in between has no name any more.
            let names = pids
                .iter()
                .filter_map(|pid| std::fs::read_to_string(format!("/proc/{pid}/comm")).ok());
            let threads = names.filter(|name| name.starts_with(&thread)).count();
            Ok(threads > 0 && pids.contains(&tapdisk.to_string().as_str()))
        })
    }

    /// Waits until I/O of the guest on its phy disk was counted.
    fn counts(&self) -> Result<()> {
        sh::wait_for("I/O of the guest in its group", LIMIT, || {
            let counted = self.file("io.stat")?;
            let line = counted
                .lines()
                .find_map(|line| line.strip_prefix(&self.device)?.strip_prefix(' '));
            let written = line.and_then(|line| {
                let mut words = line.split(' ');
                words.find_map(|word| word.strip_prefix("wbytes="))
            });
            Ok(written.is_some_and(|bytes| bytes != "0"))
        })
    }

    fn limit(&self) -> Result<()> {
        sh::put(
            format!("{}/io.max", self.path),
            &format!("{} {RATE}", self.device),
        )
    }

    /// The limit that was set is still there.
    pub(super) fn is_limited(&self) -> Result<()> {
        let limits = self.file("io.max")?;
        let begin = format!("{} ", self.device);
        ensure!(
            limits
                .lines()
                .any(|line| line.starts_with(&begin) && line.contains(RATE)),
            "the limit of the guest's group is gone: it has `{limits}`"
        );
        Ok(())
    }

    /// Waits until it is gone.
    pub(super) fn is_gone(&self) -> Result<()> {
        sh::wait_for("the end of the guest's group", LIMIT, || {
            Ok(!Path::new(&self.path).exists())
        })
    }
}

/// The chapter.
pub(super) fn groups(story: &mut LifeStory) -> Result<()> {
    ensure!(host::is_active(UNIT)?, "{UNIT} is not active");
    let working = story.working()?;
    let group = GuestGroup::of(working)?;
    let process = working.disk()?.pid()?;
    group.has(process)?;
    group.counts()?;
    group.limit()?;
    sh::run_for(&["systemctl", "restart", "blktapctrl.service"], LIMIT)?;
    tap::wait_supervisor()?;
    kept(working, &group, process).context("when the supervisor was started anew")?;
    host::replace_supervisor()?;
    kept(working, &group, process).context("when the supervisor was killed")?;
    working.disk()?.replace()?;
    kept(working, &group, working.disk()?.pid()?).context("when the tapdisk was killed")?;
    host::nothing_failed()
}

/// Checks that the group has its processes and settings, and that the guest works.
fn kept(working: &WorkingGuest, group: &GuestGroup, process: u32) -> Result<()> {
    ensure!(
        working.disk()?.pid()? == process,
        "the disk has another process"
    );
    group.has(process)?;
    group.is_limited()?;
    group.counts()?;
    working.goes_on()
}
