// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The dom0 end of a guest's console: sends commands to the agent, keeps everything that the guest says.

use crate::sh;
use anyhow::{bail, ensure, Context, Result};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A command that was started in the guest.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct GuestJob(u64);

/// Result of a command of the guest.
pub(crate) struct CommandResult {
    /// Its status.
    pub(crate) rc: i32,
    /// Its standard output and standard error.
    pub(crate) text: String,
}

impl CommandResult {
    /// Fails with `what` unless the command has succeeded.
    pub(crate) fn succeeded(&self, what: &str) -> Result<()> {
        ensure!(self.rc == 0, "{what}: {}", sh::tail(&self.text, 400));
        Ok(())
    }
}

#[derive(Default)]
struct Progress {
    text: String,
    rc: Option<i32>,
}

#[derive(Default)]
struct ConsoleState {
    pong: Option<u64>,
    closed: bool,
    jobs: HashMap<u64, Progress>,
    /// Lines that are no answer: kernel messages.
    kernel: Vec<String>,
}

#[derive(Default)]
struct SharedConsole {
    state: Mutex<ConsoleState>,
    changed: Condvar,
}

impl SharedConsole {
    fn lock(&self) -> MutexGuard<'_, ConsoleState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An open console.
pub(crate) struct Console {
    shared: Arc<SharedConsole>,
    tty: File,
    next: AtomicU64,
}

impl Console {
    /// Opens the terminal of the guest; `log` receives every byte. `known` carries the answers of commands
    /// that were started over an earlier console of the same guest (before it was saved).
    pub(crate) fn open(tty: &str, log: &Path, first_job: u64) -> Result<Console> {
        let file = OpenOptions::new().read(true).write(true).open(tty);
        let file = file.with_context(|| format!("cannot open the guest's console {tty}"))?;
        Console::over(file, log, first_job)
    }

    /// Uses a file that leads to the guest's terminal.
    pub(crate) fn over(file: File, log: &Path, first_job: u64) -> Result<Console> {
        let log = OpenOptions::new().append(true).create(true).open(log);
        let log = log.context("cannot open the log of the guest's console")?;
        let shared = Arc::new(SharedConsole::default());
        let (theirs, input) = (
            Arc::clone(&shared),
            file.try_clone().context("cannot duplicate the console")?,
        );
        std::thread::spawn(move || listen(&theirs, input, log));
        Ok(Console {
            shared,
            tty: file,
            next: AtomicU64::new(first_job),
        })
    }

    /// Returns the number of the next command: a console after a restore continues from here.
    pub(crate) fn next_job(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// Waits until the agent answers.
    pub(crate) fn wait_agent(&self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        for number in 1.. {
            self.send(&format!("PING {number}"))?;
            let pause = (Instant::now() + Duration::from_secs(1)).min(deadline);
            if self
                .wait_until(pause, |state| state.pong.map(drop))?
                .is_some()
            {
                return Ok(());
            }
            if Instant::now() >= deadline {
                break;
            }
        }
        let last = self
            .shared
            .lock()
            .kernel
            .iter()
            .rev()
            .take(5)
            .cloned()
            .collect::<Vec<_>>();
        bail!(
            "the guest's agent did not answer within {} s; last console lines: {last:?}",
            limit.as_secs()
        )
    }

    /// Starts a command and returns at once.
    pub(crate) fn start(&self, command: &str) -> Result<GuestJob> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.shared.lock().jobs.insert(id, Progress::default());
        self.send(&format!("RUN {id} {}", command.replace('\n', " ")))?;
        Ok(GuestJob(id))
    }

    /// Runs a command that must succeed and returns its output.
    pub(crate) fn run(&self, command: &str, limit: Duration) -> Result<String> {
        let done = self.wait(self.start(command)?, limit)?;
        done.succeeded(command)?;
        Ok(done.text)
    }

    /// Expects the answer to a command that was started over an earlier console.
    pub(crate) fn adopt(&self, job: GuestJob) {
        self.shared.lock().jobs.entry(job.0).or_default();
    }

    /// Waits for the end of a command.
    pub(crate) fn wait(&self, job: GuestJob, limit: Duration) -> Result<CommandResult> {
        let done = self.wait_until(Instant::now() + limit, |state| {
            let rc = state.jobs.get(&job.0)?.rc?;
            state.jobs.remove(&job.0).map(|progress| CommandResult {
                rc,
                text: progress.text,
            })
        })?;
        match done {
            Some(done) => Ok(done),
            None => {
                let so_far = self
                    .shared
                    .lock()
                    .jobs
                    .get(&job.0)
                    .map(|p| sh::tail(&p.text, 300))
                    .unwrap_or_default();
                bail!(
                    "a command in the guest did not end within {} s; so far it said: {so_far}",
                    limit.as_secs()
                )
            }
        }
    }

    /// Kernel messages that the console showed since the last call.
    pub(crate) fn take_kernel_lines(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.lock().kernel)
    }

    /// Returns whether the guest is gone.
    pub(crate) fn is_closed(&self) -> bool {
        self.shared.lock().closed
    }

    fn send(&self, line: &str) -> Result<()> {
        (&self.tty)
            .write_all(format!("{line}\n").as_bytes())
            .context("cannot write to the guest's console: is the guest gone?")
    }

    /// The first answer of `pick`, or nothing at the deadline; an error when the guest goes away.
    fn wait_until<T>(
        &self,
        deadline: Instant,
        mut pick: impl FnMut(&mut ConsoleState) -> Option<T>,
    ) -> Result<Option<T>> {
        let mut state = self.shared.lock();
        loop {
            if let Some(found) = pick(&mut state) {
                return Ok(Some(found));
            }
            if state.closed {
                bail!(
                    "the guest went away; last console lines: {:?}",
                    state.kernel.iter().rev().take(5).collect::<Vec<_>>()
                );
            }
            let now = Instant::now();
            if now >= deadline {
                return Ok(None);
            }
            state = self
                .shared
                .changed
                .wait_timeout(state, deadline - now)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// Reads until the terminal closes, which is what happens when the domain ends.
fn listen(shared: &SharedConsole, mut tty: File, mut log: File) {
    let mut pending = Vec::new();
    let mut buffer = [0u8; 4096];
    while let Ok(count @ 1..) = tty.read(&mut buffer) {
        if let Err(error) = log.write_all(&buffer[..count]) {
            eprintln!("vmtest: cannot write the log of a guest's console: {error}");
        }
        pending.extend_from_slice(&buffer[..count]);
        while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            take_line(
                &mut shared.lock(),
                String::from_utf8_lossy(&line).trim_end(),
            );
            shared.changed.notify_all();
        }
    }
    shared.lock().closed = true;
    shared.changed.notify_all();
}

fn take_line(state: &mut ConsoleState, line: &str) {
    let mut words = line.splitn(3, ' ');
    let (verb, id, rest) = (
        words.next().unwrap_or(""),
        words.next().and_then(|word| word.parse::<u64>().ok()),
        words.next(),
    );
    match (verb, id) {
        ("PONG", Some(number)) => state.pong = Some(number),
        ("OUT", Some(id)) => {
            let progress = state.jobs.entry(id).or_default();
            progress.text.push_str(rest.unwrap_or(""));
            progress.text.push('\n');
        }
        ("DONE", Some(id)) => {
            state.jobs.entry(id).or_default().rc =
                Some(rest.and_then(|word| word.parse().ok()).unwrap_or(255));
        }
        _ if line.is_empty() => (),
        _ => state.kernel.push(line.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::{take_line, ConsoleState};

    #[test]
    fn answers_and_kernel_lines_are_told_apart() {
        let mut state = ConsoleState::default();
        for line in [
            "PONG 3",
            "OUT 7 a  b",
            "OUT 7",
            "[    1.0] BUG: something",
            "DONE 7 5",
        ] {
            take_line(&mut state, line);
        }
        assert_eq!(state.pong, Some(3));
        assert_eq!(state.jobs[&7].text, "a  b\n\n");
        assert_eq!(state.jobs[&7].rc, Some(5));
        assert_eq!(state.kernel, ["[    1.0] BUG: something"]);
    }
}
