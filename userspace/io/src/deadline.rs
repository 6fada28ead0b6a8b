// SPDX-License-Identifier: MIT OR Apache-2.0
//! A time at which the kernel ends this process.

use static_assertions::assert_not_impl_any;
use std::io;
use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::time::Duration;

/// A timer of the kernel that kills this process, whatever it is doing then. If that time passes while the process is
/// stopped or waits, it executes nothing more afterwards.
#[derive(Debug)]
pub struct Deadline {
    timer: libc::timer_t,
}

// The timer is deleted once.
assert_not_impl_any!(Deadline: Clone);

impl Deadline {
    /// Makes a deadline that never comes.
    pub fn never() -> io::Result<Self> {
        // SAFETY: zeroes are valid in all fields.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_SIGNAL;
        event.sigev_signo = libc::SIGKILL;
        let mut timer = MaybeUninit::uninit();
        // SAFETY: the call reads the event, and fills in the timer if it succeeds.
        let result =
            unsafe { libc::timer_create(libc::CLOCK_BOOTTIME, &raw mut event, timer.as_mut_ptr()) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has filled it in.
        let timer = unsafe { timer.assume_init() };
        Ok(Self { timer })
    }

    /// The process ends at this time since the boot of the host, that of suspends included; at once if it is
    /// over, or never.
    pub fn set(&self, until: Option<Duration>) -> io::Result<()> {
        // A time of zero would be never.
        let until = until.map(|until| until.max(Duration::from_nanos(1)));
        let until = until.unwrap_or_default();
        // SAFETY: zeroes are valid in all fields.
        let mut spec: libc::itimerspec = unsafe { std::mem::zeroed() };
        spec.it_value.tv_sec = until.as_secs().try_into().unwrap_or(libc::time_t::MAX);
        spec.it_value.tv_nsec = until.subsec_nanos().into();
        // SAFETY: the timer is there until `self` is dropped; the call reads the structure, and the old time is
        // not asked for.
        let result = unsafe {
            libc::timer_settime(self.timer, libc::TIMER_ABSTIME, &raw const spec, null_mut())
        };
        match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        // SAFETY: the timer is there, and used no more.
        unsafe { libc::timer_delete(self.timer) };
    }
}

#[cfg(test)]
mod tests {
    use super::Deadline;
    use rustix::time::{clock_gettime, ClockId};
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;
    use std::time::Duration;

    /// Not a test: a process that waits for its end.
    #[test]
    #[ignore = "runs as a process of the other test"]
    fn waits_for_its_end() {
        let Ok(until) = std::env::var("DEADLINE_MS") else {
            return;
        };
        let now = clock_gettime(ClockId::Boottime);
        let now = Duration::new(
            now.tv_sec.try_into().unwrap(),
            now.tv_nsec.try_into().unwrap(),
        );
        let deadline = Deadline::never().unwrap();
        // The deadline changes from one hour to never, and then to its value.
        deadline.set(Some(now + Duration::from_secs(3600))).unwrap();
        deadline.set(None).unwrap();
        match until.parse() {
            Ok(ms) => deadline.set(Some(now + Duration::from_millis(ms))).unwrap(),
            Err(_) => return deadline.set(Some(Duration::ZERO)).unwrap(),
        }
        loop {
            std::thread::park();
        }
    }

    #[test]
    fn a_process_whose_time_is_over_is_killed() {
        for until in ["30", "0", "at once"] {
            let us = std::env::current_exe().unwrap();
            let status = Command::new(us)
                .args(["--exact", "deadline::tests::waits_for_its_end", "--ignored"])
                .env("DEADLINE_MS", until)
                .status();
            assert_eq!(status.unwrap().signal(), Some(libc::SIGKILL), "{until}");
        }
    }
}
