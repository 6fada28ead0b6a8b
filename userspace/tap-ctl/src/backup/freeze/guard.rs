// SPDX-License-Identifier: MIT OR Apache-2.0
//! The process that freezes a guest's file systems, and thaws them whatever becomes of the process that started it.
//!
//! Its standard input is a pipe of which only the other process has the other end: when that is closed, by will or by
//! death, it thaws. Signals do not end it.

use super::agent::AgentLink;
use super::{program, FreezeBy, FreezeMeans};
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use serde::{Deserialize, Serialize};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Time that a thaw may take beyond the limit, because the answer to a freeze that came too late may be in front of it.
const MORE: Duration = Duration::from_secs(10);
/// Time between two attempts to thaw.
const PAUSE: Duration = Duration::from_millis(500);

/// A step of the guard, as a line of JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum GuardReport {
    /// The file systems are frozen.
    Frozen,
    /// The file systems were frozen until just now, and are not any more.
    Thawed,
    /// The file systems were not frozen, or not long enough. Nothing follows.
    Failed {
        why: String,
        /// True if the file systems are not frozen now, as far as is known.
        is_thawed: bool,
    },
}

/// A failed freeze or thaw.
#[derive(Debug)]
pub(super) struct FreezeError {
    pub(super) why: String,
    /// The guest may have frozen some file systems, or may do so later.
    pub(super) has_begun: bool,
}

/// Freezes and thaws.
#[derive(Debug)]
pub(super) struct GuestFreezer<'m> {
    means: &'m FreezeMeans,
    limit: Duration,
    /// Connection to the agent, which may take no other one at the same time.
    link: Option<AgentLink>,
}

impl<'m> GuestFreezer<'m> {
    pub(super) fn new(means: &'m FreezeMeans, limit: Duration) -> Self {
        Self {
            means,
            limit,
            link: None,
        }
    }

    /// Freezes; the end of `stop` ends the wait for that.
    fn freeze(&mut self, stop: BorrowedFd<'_>) -> Result<(), FreezeError> {
        let limit = Instant::now() + self.limit;
        match &self.means.by {
            FreezeBy::Program(path) => {
                program::call(path, "freeze", &self.means.guest, limit, Some(stop))
            }
            FreezeBy::Agent(socket) => {
                let not_begun = |why| FreezeError {
                    why,
                    has_begun: false,
                };
                let mut link = AgentLink::connect(socket, limit).map_err(not_begun)?;
                link.sync(limit, Some(stop)).map_err(not_begun)?;
                let frozen = link.freeze(limit, Some(stop));
                self.link = Some(link);
                frozen.map_err(|why| FreezeError {
                    why,
                    has_begun: true,
                })
            }
        }
    }

    /// Thaws, in several attempts if there is time. Returns false if nothing was frozen any more.
    pub(super) fn thaw(&mut self) -> Result<bool, String> {
        let limit = Instant::now() + self.limit + MORE;
        loop {
            match self.try_thaw(limit) {
                Err(why) if Instant::now() + PAUSE >= limit => return Err(why),
                Err(_) => thread::sleep(PAUSE),
                Ok(was_frozen) => return Ok(was_frozen),
            }
        }
    }

    fn try_thaw(&mut self, limit: Instant) -> Result<bool, String> {
        match &self.means.by {
            FreezeBy::Program(path) => {
                let done = program::call(path, "thaw", &self.means.guest, limit, None);
                done.map(|()| true).map_err(|error| error.why)
            }
            FreezeBy::Agent(socket) => {
                let mut link = match self.link.take() {
                    Some(link) => link,
                    None => AgentLink::connect(socket, limit)?,
                };
                link.thaw(limit).map(|count| count > 0)
            }
        }
    }
}

/// The process: freezes, reports that, and thaws when its standard input ends.
pub(crate) fn run(means: &str, seconds: u64) -> ExitCode {
    let done = ignore_signals()
        .map_err(|error| format!("cannot ignore signals: {error}"))
        .and_then(|()| {
            let means: FreezeMeans =
                serde_json::from_str(means).map_err(|error| format!("cannot read it: {error}"))?;
            freeze_and_thaw(&means, Duration::from_secs(seconds));
            Ok(())
        });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            report(&GuardReport::Failed {
                why,
                is_thawed: true,
            });
            control::ExitStatus::Failed.into()
        }
    }
}

fn freeze_and_thaw(means: &FreezeMeans, limit: Duration) {
    let stdin = io::stdin();
    let mut freezer = GuestFreezer::new(means, limit);
    if let Err(FreezeError { why, has_begun }) = freezer.freeze(stdin.as_fd()) {
        let thawed = match has_begun {
            true => freezer.thaw().map(drop),
            false => Ok(()),
        };
        report(&GuardReport::Failed {
            is_thawed: thawed.is_ok(),
            why: match thawed {
                Ok(()) => why,
                Err(then) => format!("{why}; then the thaw failed: {then}"),
            },
        });
        return;
    }
    let end = Instant::now() + limit;
    report(&GuardReport::Frozen);
    let is_in_time = is_ready(stdin.as_fd(), PollFlags::IN, end);
    report(&match (freezer.thaw(), is_in_time) {
        (Ok(true), true) => GuardReport::Thawed,
        (Ok(false), true) => GuardReport::Failed {
            why: "they were thawed by something else before the snapshot had been taken".into(),
            is_thawed: true,
        },
        (Ok(_), false) => GuardReport::Failed {
            why: format!(
                "the snapshot took more than {} seconds, after which they were thawed (--freeze-limit)",
                limit.as_secs()
            ),
            is_thawed: true,
        },
        (Err(why), _) => GuardReport::Failed {
            why,
            is_thawed: false,
        },
    });
}

/// Prints a report. If no process reads it any more, that changes nothing.
fn report(report: &GuardReport) {
    if let Ok(line) = serde_json::to_string(report) {
        let mut out = io::stdout();
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}

fn ignore_signals() -> io::Result<()> {
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))?;
    }
    Ok(())
}

/// Waits until a file is ready or closed; false if it is not before the limit.
pub(super) fn is_ready(file: BorrowedFd<'_>, flags: PollFlags, limit: Instant) -> bool {
    wait(&mut [PollFd::from_borrowed_fd(file, flags)], limit)
}

/// Waits for the first of some files; false if none is ready before the limit.
pub(super) fn wait(files: &mut [PollFd<'_>], limit: Instant) -> bool {
    loop {
        let left = limit.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).ok();
        match poll(files, left.as_ref()) {
            Ok(0) if Instant::now() >= limit => return false,
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return true,
            // The file cannot be waited for, so what follows is done at once.
            Err(_) => return true,
        }
    }
}
