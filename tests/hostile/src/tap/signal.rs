// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Signals to single threads, to end the call in which one waits.

use anyhow::{bail, Result};
use std::io;

/// A thread whose system call a signal interrupts, without another effect.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InterruptibleThread(libc::pid_t);

extern "C" fn nothing(_signal: i32) {}

impl InterruptibleThread {
    /// The calling thread.
    pub(crate) fn this() -> Result<InterruptibleThread> {
        // SAFETY: All zeroes are a valid set of actions, and the handler does nothing at all. Without `SA_RESTART` the
        // kernel does not begin the call again.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(i32) as libc::sighandler_t;
            libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut())
        };
        if result != 0 {
            bail!("a signal cannot be handled: {}", io::Error::last_os_error());
        }
        // SAFETY: It only returns a number.
        Ok(InterruptibleThread(unsafe { libc::gettid() }))
    }

    /// Sends it the signal, if it is still there.
    pub(crate) fn interrupt(self) -> Result<()> {
        // SAFETY: The number is that of a thread of this process, or of none, because the kernel checks the process.
        let result =
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.0, libc::SIGUSR1) };
        let error = io::Error::last_os_error();
        if result != 0 && error.raw_os_error() != Some(libc::ESRCH) {
            bail!("a thread cannot be interrupted: {error}");
        }
        Ok(())
    }
}
