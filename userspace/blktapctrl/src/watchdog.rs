// SPDX-License-Identifier: MIT OR Apache-2.0
//! Looks now and then whether processes answer, and at what the kernel did without them.

use crate::disk::Disk;
use crate::lifecycle::io_errors;
use crate::log::{self, tell, LogContext};
use crate::record::DesiredState;
use crate::registry::Registry;
use crate::slow_request::News;
use control::supervisor::{HungAction, Kernel, What};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// How often it looks.
const PERIOD: Duration = Duration::from_secs(5);

/// Looks for ever.
pub async fn watch(registry: Rc<Registry>) {
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        for disk in registry.all() {
            look(&registry, &disk);
        }
        tell_left_out(&registry, false);
    }
}

/// For how long requests have waited while none was answered: a process that is stopped does not even
/// fetch them. With limits it holds back those that it has fetched.
fn idle_with_work(disk: &Disk, status: &Kernel, has_limits: bool) -> Duration {
    let (answered, since) = disk.progress.get();
    let works = {
        let record = disk.record.borrow();
        // Without its image it answers no request.
        let waits = status.waiting > 0 || (has_limits && status.delivered > 0);
        record.want == DesiredState::Served && record.inactive.is_none() && waits
    };
    if works && answered == status.committed {
        return since.elapsed();
    }
    disk.progress.set((status.committed, Instant::now()));
    Duration::ZERO
}

/// Requests may wait because they are too many: for the disk, or for its group.
fn has_limits(disk: &Disk) -> bool {
    let policy = &disk.record.borrow().policy;
    policy.limits.any() || policy.group.is_some()
}

/// Looks at one disk.
pub fn look(registry: &Registry, disk: &Disk) {
    // A disk without a process counts, too: the kernel writes without one.
    let Some(status) = registry.status(disk) else {
        return;
    };
    io_errors::tell_of_kernel(registry, disk, &status);
    tell_slow(disk, &status);
    let policy = disk.record.borrow().policy.clone();
    let Ok(process) = disk.serving() else {
        return;
    };
    if policy.hung_after_s == 0 || disk.waits_for_others.get() {
        return;
    }
    let has_limits = has_limits(disk);
    let idle = idle_with_work(disk, &status, has_limits);
    let since = match has_limits {
        // The oldest one may wait for its turn for long.
        true => idle,
        false => idle.max(Duration::from_nanos(status.oldest_ns)),
    };
    if since < Duration::from_secs(policy.hung_after_s.into()) {
        disk.hung.set(false);
    } else if !disk.hung.replace(true) {
        let killed = policy.hung == HungAction::Kill;
        let what = What::Hung {
            pid: process.pid(),
            for_ms: since.as_millis().try_into().unwrap_or(u64::MAX),
            killed,
        };
        registry.events.add(Some(disk.minor), what);
        if killed {
            // Its end is noticed as any other, and it is replaced.
            process.kill();
        }
    }
}

/// Says what is new of the oldest request of a disk.
fn tell_slow(disk: &Disk, status: &Kernel) {
    let pid = disk.process.borrow().as_ref().map(|process| process.pid());
    let minor = disk.minor;
    for news in disk.slow.look(pid, status) {
        match news {
            News::Takes { pid, age } => {
                let why = match has_limits(disk) {
                    true => "it may wait for the disk's limits or those of its group, or its storage does not answer",
                    false => "its storage may not answer: see `tap-ctl status`",
                };
                tell!(
                    warn,
                    disk.about().of(pid),
                    seconds = age.as_secs(),
                    "disk {minor}: tapdisk {pid} has had a request for {} s and has not answered it: {why}",
                    age.as_secs()
                );
            }
            News::Answered { pid, age } => tell!(
                info,
                disk.about().of(pid),
                seconds = age.as_secs(),
                "disk {minor}: the request that tapdisk {pid} has had for {} s or a little more is answered",
                age.as_secs()
            ),
            News::Returned { pid, age } => tell!(
                warn,
                disk.about().of(pid),
                seconds = age.as_secs(),
                "disk {minor}: tapdisk {pid} has given back or lost the request that it had for {} s: whoever serves the disk next gets it",
                age.as_secs()
            ),
        }
    }
}

/// Says how many lines about each disk were left out, where there is room for a line again; at the end, wherever any
/// were.
pub fn tell_left_out(registry: &Registry, is_end: bool) {
    let Some(limit) = registry.limit.get() else {
        return;
    };
    for (minor, count) in limit.left_out(Instant::now(), is_end) {
        let disk = minor.and_then(|minor| registry.get(minor));
        let about = match (disk, minor) {
            (Some(disk), _) => disk.about(),
            (None, Some(minor)) => LogContext::disk(minor),
            (None, None) => LogContext::default(),
        };
        log::tell_left_out(about, count);
    }
}
