// SPDX-License-Identifier: MIT OR Apache-2.0
//! The end of a tapdisk: on its own, or because the supervisor ends it.

use super::system::{how, is_crash};
use super::Process;
use crate::log::tell;
use control::tapdisk::Request;
use control::{Code, Failure};
use rustix::io::Errno;
use rustix::process::{pidfd_send_signal, Signal};
use std::time::Duration;

impl Process {
    /// From now on its end is no death.
    pub fn dismiss(&self) {
        self.dismissed.set(true);
    }

    /// Its end is our wish.
    #[must_use]
    pub fn is_dismissed(&self) -> bool {
        self.dismissed.get()
    }

    /// Waits until it has ended, and says how in words that follow its name. May be waited for by
    /// several at once.
    pub async fn ended(&self) -> String {
        let mut complained = false;
        while let Err(error) = self.pidfd.readable().await {
            // It has not ended by that.
            if self.has_ended() {
                break;
            }
            if !std::mem::replace(&mut complained, true) {
                tell!(
                    error,
                    self.about().because(&error),
                    "tapdisk {} is looked at now and then: {error}",
                    self.pid()
                );
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let status = match &mut *self.child.borrow_mut() {
            // Waiting does not block any more, and gives the same answer each time.
            Some(child) => child.wait(),
            None => return "ended".into(),
        };
        status.map_or_else(|error| format!("ended in a way unknown: {error}"), how)
    }

    /// True if it has crashed, as far as is known; a process that a user, or the system for want of memory, has killed
    /// died of no request.
    #[must_use]
    pub fn has_crashed(&self) -> bool {
        let status = match &mut *self.child.borrow_mut() {
            Some(child) => child.try_wait().ok().flatten(),
            None => None,
        };
        !self.is_dismissed() && status.is_some_and(is_crash)
    }

    /// True if it has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        use rustix::event::{poll, PollFd, PollFlags, Timespec};
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// Whether it has ended, which explains a failed request. The kernel closes its connections a moment before it
    /// counts as ended.
    pub async fn has_died(&self, failure: &Failure) -> bool {
        if failure.code == Code::Gone {
            let moment = Duration::from_secs(1);
            return tokio::time::timeout(moment, self.ended()).await.is_ok();
        }
        self.has_ended()
    }

    /// Kills it. It has not ended when this returns.
    pub fn kill(&self) {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => tell!(
                error,
                self.about().because(&error.into()),
                "cannot kill tapdisk {}: {error}",
                self.pid()
            ),
        }
    }

    /// Ends it: it may finish what it has, for at most `patience`; then it is killed. Returns when
    /// it has ended, or with [`Code::Timeout`] if it does not end even then.
    ///
    /// # Errors
    /// It cannot be killed because the kernel waits for its storage.
    pub async fn end(&self, patience: Duration) -> Result<(), Failure> {
        self.dismiss();
        if !patience.is_zero() && !self.has_ended() {
            // The answer does not matter: only its end counts.
            if let Err(failure) = self.ask(&Request::Exit, &[], patience).await {
                if failure.code != Code::Gone {
                    tell!(
                        warn,
                        self.about().failed(&failure),
                        "tapdisk {} does not leave: {failure}",
                        self.pid()
                    );
                }
            } else if tokio::time::timeout(patience, self.ended()).await.is_ok() {
                return Ok(());
            }
        }
        self.kill();
        let limit = Duration::from_secs(5);
        match tokio::time::timeout(limit, self.ended()).await {
            Ok(_) => Ok(()),
            Err(_) => {
                // No caller waits for that any more, so the task that sees its end later has to act on it.
                self.dismissed.set(false);
                Err(Failure::new(
                    Code::Timeout,
                    format!(
                        "tapdisk {} was killed and does not end: its storage does not answer the kernel",
                        self.pid()
                    ),
                ))
            }
        }
    }
}
