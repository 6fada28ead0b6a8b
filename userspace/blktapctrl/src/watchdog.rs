// SPDX-License-Identifier: MIT OR Apache-2.0
//! Looks now and then whether processes answer, and at what the kernel did without them.

use crate::disk::Disk;
use crate::lifecycle::trouble;
use crate::record::Want;
use crate::registry::Registry;
use control::supervisor::{Hung, Kernel, What};
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
    }
}

/// For how long requests have waited while none was answered: a process that is stopped does not even
/// fetch them. With limits it holds back those that it has fetched.
fn idle_with_work(disk: &Disk, status: &Kernel, has_limits: bool) -> Duration {
    let (answered, since) = disk.progress.get();
    let works = {
        let record = disk.record.borrow();
        // Without its image it answers nobody.
        let waits = status.waiting > 0 || (has_limits && status.delivered > 0);
        record.want == Want::Served && record.inactive.is_none() && waits
    };
    if works && answered == status.committed {
        return since.elapsed();
    }
    disk.progress.set((status.committed, Instant::now()));
    Duration::ZERO
}

/// Looks at one disk.
pub fn look(registry: &Registry, disk: &Disk) {
    // Of a disk that nobody serves, too: the kernel writes by itself.
    let Some(status) = registry.status(disk) else {
        return;
    };
    trouble::tell_of_kernel(registry, disk, &status);
    let policy = disk.record.borrow().policy.clone();
    let Ok(process) = disk.serving() else {
        return;
    };
    if policy.hung_after_s == 0 || disk.waits_for_others.get() {
        return;
    }
    let has_limits = policy.limits.any();
    let idle = idle_with_work(disk, &status, has_limits);
    let since = match has_limits {
        // The oldest one may wait for its turn for long.
        true => idle,
        false => idle.max(Duration::from_nanos(status.oldest_ns)),
    };
    if since < Duration::from_secs(policy.hung_after_s.into()) {
        disk.hung.set(false);
    } else if !disk.hung.replace(true) {
        let killed = policy.hung == Hung::Kill;
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
