// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Work that leaves its time to others: compilers beside a machine, whose guests notice when the host takes time away from
//! them.

use anyhow::{anyhow, Context, Result};
use rustix::process::nice;
use std::thread;

/// Added to the nice value, as `nice` does. The processors of a machine have 265 times the weight of such work. The
/// scheduler's class of idle work would leave them more, but gets nothing on a host with other load that is nice as well.
const NICER: i32 = 10;

/// Does `work` in a thread of its own. That thread, and the programs and threads that it starts, have low priority.
///
/// # Errors
/// The scheduler refuses, and nothing was done; or `work` panicked.
pub(crate) fn leave_time<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T> {
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            // In Linux that is the thread's own.
            nice(NICER).context("cannot lower the priority of a thread")?;
            Ok(work())
        });
        worker
            .join()
            .unwrap_or_else(|_| Err(anyhow!("the thread of low priority panicked")))
    })
}

#[cfg(test)]
mod tests {
    use super::{leave_time, NICER};
    use std::fs;
    use std::thread;

    /// Returns the nice value of this thread.
    fn nice_value() -> i32 {
        let text = fs::read_to_string("/proc/thread-self/stat").unwrap();
        // The 19th field (see proc_pid_stat(5)), and the second one may contain spaces.
        let (_, fields) = text.rsplit_once(") ").unwrap();
        fields.split(' ').nth(16).unwrap().parse().unwrap()
    }

    #[test]
    fn only_the_work_and_what_it_starts_have_low_priority() {
        let before = nice_value();
        let inside =
            leave_time(|| (nice_value(), thread::spawn(nice_value).join().unwrap())).unwrap();
        let lower = (before + NICER).min(19);
        assert_eq!(inside, (lower, lower));
        assert_eq!(nice_value(), before);
        assert!(leave_time(|| panic!("planted")).is_err());
    }
}
