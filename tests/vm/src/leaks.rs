// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Counters that must return to where they were once a disk is gone.

use crate::guest::KINDS;
use crate::node::ControlNode;
use crate::{sh, xs, TestedDriver};
use anyhow::{bail, Context, Result};
use dom0::{memory, xen};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// A reading of the counters.
#[derive(Clone)]
pub(crate) struct Leaks {
    exact: BTreeMap<&'static str, u64>,
    available_kib: u64,
}

impl Leaks {
    /// Reads the counters.
    pub(crate) fn now(driver: TestedDriver) -> Result<Leaks> {
        let mut exact = BTreeMap::new();
        exact.insert("grants of guests mapped by dom0", xen::mapped_grants()?);
        let channels = sh::run(&["/usr/lib/xen-4.20/bin/lsevtchn", "0"])
            .or_else(|_| sh::run(&["lsevtchn", "0"]))?;
        exact.insert("event channels of dom0", lines(&channels));
        exact.insert(
            "lines of /proc/interrupts",
            lines(&sh::get("/proc/interrupts")?),
        );
        exact.insert("kernel threads of the backend", backend_threads()?);
        exact.insert(
            "users of the module",
            sh::get(format!("/sys/module/{}/refcnt", driver.sys_module()))?.parse()?,
        );
        exact.insert("backend keys in xenstore", backend_keys()?);
        exact.insert(
            "backend devices in sysfs",
            entries("/sys/bus/xen-backend/devices", "vbd")?,
        );
        if driver == TestedDriver::Rs {
            let nodes = ControlNode::open()?.all()?.len();
            exact.insert("nodes of tap disks", nodes as u64);
            exact.insert("files of tap disks", tap_files()?);
            exact.insert("processes of tap disks", processes("tapdisk")?);
        }
        exact.insert("loop devices in use", lines(&sh::run(&["losetup", "-a"])?));
        exact.insert("device mapper devices", entries("/sys/block", "dm-")?);
        Ok(Leaks {
            exact,
            available_kib: memory::field("MemAvailable:")?,
        })
    }

    /// Waits until the counters read the same again.
    pub(crate) fn wait_same(&self, driver: TestedDriver, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let differences = self.differences(&Leaks::now(driver)?);
            if differences.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                bail!("left behind after the case: {}", differences.join("; "));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn differences(&self, now: &Leaks) -> Vec<String> {
        let mut found: Vec<String> = Vec::new();
        for (what, before) in &self.exact {
            let after = now.exact.get(what).copied().unwrap_or_default();
            if after != *before {
                found.push(format!("{what}: {before} before, {after} now"));
            }
        }
        let lost = self.available_kib.saturating_sub(now.available_kib);
        if lost > memory::SLACK_KIB {
            found.push(format!("{lost} KiB less memory available"));
        }
        found
    }
}

/// Keys of disks. The directory of a domain may stay behind empty, which is xl's affair.
fn backend_keys() -> Result<u64> {
    let one = |kind: &str| {
        let base = format!("/local/domain/0/backend/{kind}");
        Ok((xs::count(&base)? - xs::list(&base)?.len()) as u64)
    };
    KINDS.into_iter().map(one).sum()
}

/// Everything of disks that is left below the run-time folder of the tap: sockets and records.
fn tap_files() -> Result<u64> {
    let mut count = 0;
    for folder in ["tapdisk", "nbd", "disks", "notes"] {
        match std::fs::read_dir(format!("/run/xentap/{folder}")) {
            Ok(entries) => count += entries.count() as u64,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => (),
            Err(error) => return Err(error).context("cannot list /run/xentap"),
        }
    }
    Ok(count)
}

/// Threads of a backend's own. A pooled worker bears the name of the work that it did last, which means nothing.
fn backend_threads() -> Result<u64> {
    let names = sh::shell("cat /proc/[0-9]*/comm 2>/dev/null || true")?;
    let own = |name: &&str| {
        !name.starts_with("kworker/") && (name.contains("blkback") || name.contains("xvd"))
    };
    Ok(names.lines().filter(own).count() as u64)
}

/// Programs of this name.
pub(crate) fn processes(name: &str) -> Result<u64> {
    let names = sh::shell("cat /proc/[0-9]*/comm 2>/dev/null || true")?;
    Ok(names.lines().filter(|line| *line == name).count() as u64)
}

fn entries(dir: &str, prefix: &str) -> Result<u64> {
    let entries = std::fs::read_dir(dir).with_context(|| format!("cannot list {dir}"))?;
    let names = entries.filter_map(|entry| entry.ok().map(|entry| entry.file_name()));
    Ok(names
        .filter(|name| name.to_string_lossy().starts_with(prefix))
        .count() as u64)
}

fn lines(text: &str) -> u64 {
    text.lines().filter(|line| !line.trim().is_empty()).count() as u64
}
