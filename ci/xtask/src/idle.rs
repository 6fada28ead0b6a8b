// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Work that uses only the time that others leave: compilers beside a machine, whose guests notice when the host takes
//! time away from them.

use crate::run;
use anyhow::{anyhow, Context, Result};
use std::fs;
use std::process::Command;
use std::thread;

/// Does `work` in a thread of its own. That thread, and the programs and threads that it starts, run only while a
/// processor has nothing else to do.
///
/// # Errors
/// The scheduler refuses, and nothing was done; or `work` panicked.
pub(crate) fn leave_time<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T> {
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            become_idle()?;
            Ok(work())
        });
        worker
            .join()
            .unwrap_or_else(|_| Err(anyhow!("the idle thread panicked")))
    })
}

/// Changes the scheduler's class of this thread.
fn become_idle() -> Result<()> {
    let thread = fs::read_link("/proc/thread-self").context("cannot name this thread")?;
    let thread = thread.file_name().context("a thread without a number")?;
    run::shown(
        Command::new("chrt")
            .args(["--idle", "--pid", "0"])
            .arg(thread),
    )
}

#[cfg(test)]
mod tests {
    use super::leave_time;
    use std::fs;
    use std::thread;

    /// Class of idle threads, see sched(7).
    const IDLE: u32 = 5;

    /// Returns the number of this thread's class.
    fn class() -> u32 {
        let text = fs::read_to_string("/proc/thread-self/sched").unwrap();
        let line = text.lines().find(|line| line.starts_with("policy"));
        line.unwrap().rsplit(' ').next().unwrap().parse().unwrap()
    }

    #[test]
    fn only_the_work_and_what_it_starts_are_idle() {
        let before = class();
        let inside = leave_time(|| (class(), thread::spawn(class).join().unwrap())).unwrap();
        assert_eq!(inside, (IDLE, IDLE));
        assert_eq!(class(), before);
        assert!(leave_time(|| panic!("planted")).is_err());
    }
}
