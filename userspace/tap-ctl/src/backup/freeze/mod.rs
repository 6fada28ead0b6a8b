// SPDX-License-Identifier: MIT OR Apache-2.0
//! File systems of a guest that agree with a backup: frozen around the snapshot by an agent in the guest or by a program of
//! the administrator.
//!
//! A [guard](guard), which is a process of its own, freezes them. It thaws them when this process wants that, when this
//! process ends in any way, and after a time limit, so that no guest stays frozen.

mod agent;
mod guard;
mod program;

use super::tool::CopyTool;
use crate::cli::Backup;
use crate::complain;
use control::{Code, Failure};
pub(crate) use guard::run as guard;
use guard::{GuardReport, GuestFreezer};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// Folder of the sockets of agents, each with the name of its guest.
const AGENTS: &str = "/run/xentap/agent";
/// Time between two looks whether a signal has ended the work.
const STEP: Duration = Duration::from_millis(20);
/// Time that the guard gets beyond the limits of what it waits for.
const GRACE: Duration = Duration::from_secs(20);
/// Time limit for the thaw after a backup that was killed, whose guard has normally done that.
const AFTER_KILL: Duration = Duration::from_secs(3);

/// A guest, and the means by which its file systems are frozen and thawed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FreezeMeans {
    /// Name of the guest, or its number if it has no name of its own.
    guest: String,
    by: FreezeBy,
}

/// The component that freezes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum FreezeBy {
    /// QEMU's guest agent behind a socket.
    Agent(PathBuf),
    /// A program, called with `freeze` or `thaw` and the guest.
    Program(PathBuf),
}

impl FreezeMeans {
    /// Returns the means that the command line names, if it wants a freeze.
    ///
    /// # Errors
    /// The guest's name is none of a file.
    pub(super) fn of(asked: &Backup, guest: &str) -> Result<Option<Self>, Failure> {
        let by = match (&asked.freeze, &asked.freeze_by) {
            (None, None) => return Ok(None),
            (_, Some(program)) => FreezeBy::Program(absolute(program)?),
            (Some(Some(socket)), None) => FreezeBy::Agent(absolute(socket)?),
            (Some(None), None) if guest.contains('/') || guest.starts_with('.') => {
                return Err(Failure::invalid(format!(
                    "no socket is named after the guest {guest:?}: name the one of its agent, as in --freeze=/run/a.agent"
                )))
            }
            (Some(None), None) => FreezeBy::Agent(Path::new(AGENTS).join(guest)),
        };
        let guest = guest.to_owned();
        Ok(Some(Self { guest, by }))
    }

    fn refused(&self, why: &str) -> Failure {
        let text = format!(
            "the file systems of {} were not frozen, so no backup was taken: {why}. Without --freeze a backup is as after a \
             power cut",
            self.guest
        );
        Failure::new(Code::State, text)
    }

    fn warn(&self, why: &str) {
        complain(&format!(
            "the file systems of {0} may still be frozen: {why}. `xl sysrq {0} j` thaws them if kernel.sysrq of the guest is 1 or \
             includes 64",
            self.guest
        ));
    }
}

/// Returns a path that stays valid in another folder; a name without a slash is looked up by the system.
fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    match path.components().count() {
        1 if path.is_relative() => Ok(path.to_owned()),
        _ => std::path::absolute(path)
            .map_err(|error| Failure::system(format!("cannot find {}", path.display()), &error)),
    }
}

/// Thaws the file systems for a backup that was killed. A guest that is gone, or was started again, needs nothing.
pub(super) fn thaw_after_kill(means: &FreezeMeans) {
    if let Err(why) = GuestFreezer::new(means, AFTER_KILL).thaw() {
        means.warn(&why);
    }
}

/// A guest whose file systems are frozen, and the guard that thaws them as soon as this is dropped.
#[derive(Debug)]
pub(super) struct FrozenGuest {
    means: FreezeMeans,
    limit: Duration,
    guard: Child,
    reports: Receiver<GuardReport>,
}

impl FrozenGuest {
    /// Freezes the file systems for at most `limit`.
    ///
    /// # Errors
    /// They are not frozen, and as they were before, or a signal has ended the work.
    pub(super) fn freeze(
        means: &FreezeMeans,
        limit: Duration,
        tool: &CopyTool,
    ) -> Result<Self, Failure> {
        let mut guest = Self::start(means, limit)?;
        match guest.report(limit * 2 + GRACE, Some(tool)) {
            Ok(GuardReport::Frozen) => Ok(guest),
            Ok(GuardReport::Thawed) => Err(means.refused("they were thawed at once")),
            Ok(GuardReport::Failed { why, is_thawed }) => {
                if !is_thawed {
                    means.warn(&why);
                }
                Err(means.refused(&why))
            }
            Err(failure) => {
                guest.abandon();
                Err(failure)
            }
        }
    }

    /// Thaws the file systems.
    ///
    /// # Errors
    /// They may still be frozen, or were thawed before this call.
    pub(super) fn thaw(mut self) -> Result<(), Failure> {
        drop(self.guard.stdin.take());
        let why = match self.report(self.limit + GRACE, None)? {
            GuardReport::Thawed => return Ok(()),
            GuardReport::Frozen => "the guard has lost its place".to_owned(),
            GuardReport::Failed { why, is_thawed } => {
                if !is_thawed {
                    self.means.warn(&why);
                }
                why
            }
        };
        Err(self.means.refused(&why))
    }

    /// Has the guard thaw what it has frozen, and waits for that.
    fn abandon(&mut self) {
        drop(self.guard.stdin.take());
        let limit = self.limit * 2 + GRACE;
        while let Ok(report) = self.report(limit, None) {
            match report {
                GuardReport::Frozen => {}
                GuardReport::Thawed => return,
                GuardReport::Failed { why, is_thawed } => {
                    if !is_thawed {
                        self.means.warn(&why);
                    }
                    return;
                }
            }
        }
        self.means.warn("the process that thaws them has ended");
    }

    fn start(means: &FreezeMeans, limit: Duration) -> Result<Self, Failure> {
        let failed = |error| Failure::system("cannot run the process that thaws", &error);
        let words = serde_json::to_string(means)
            .map_err(|error| Failure::invalid(format!("--freeze: {error}")))?;
        let mut guard = Command::new(std::env::current_exe().map_err(failed)?)
            .args(["freeze-guard", &words, &limit.as_secs().to_string()])
            // A signal of the terminal must not end it.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let (to, reports) = mpsc::channel();
        if let Some(pipe) = guard.stdout.take() {
            thread::spawn(move || {
                for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                    // The end of the channel says that the guard is gone or speaks another language.
                    let Ok(report) = serde_json::from_str(&line) else {
                        return;
                    };
                    if to.send(report).is_err() {
                        return;
                    }
                }
            });
        }
        Ok(Self {
            means: means.clone(),
            limit,
            guard,
            reports,
        })
    }

    /// Waits for the guard's next report.
    fn report(&self, limit: Duration, tool: Option<&CopyTool>) -> Result<GuardReport, Failure> {
        let end = Instant::now() + limit;
        loop {
            match self.reports.recv_timeout(STEP) {
                Ok(report) => return Ok(report),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(self.means.refused("the process that thaws them has ended"))
                }
                Err(RecvTimeoutError::Timeout) if Instant::now() >= end => {
                    return Err(self.means.refused("the process that thaws them hangs"))
                }
                Err(RecvTimeoutError::Timeout) => tool.map_or(Ok(()), CopyTool::check)?,
            }
        }
    }
}
