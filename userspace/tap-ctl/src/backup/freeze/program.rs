// SPDX-License-Identifier: MIT OR Apache-2.0
//! An administrator's program that freezes and thaws: `PROGRAM freeze GUEST` and `PROGRAM thaw GUEST`.

use super::guard::{is_ready, FreezeError};
use rustix::event::PollFlags;
use rustix::process::{kill_process_group, Pid, Signal};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Time between two looks whether it has ended.
const STEP: Duration = Duration::from_millis(20);

/// Calls the program, and kills it with its children at the limit or at the end of `stop`.
///
/// # Errors
/// The program did not end with the exit status 0.
pub(super) fn call(
    program: &Path,
    verb: &str,
    guest: &str,
    limit: Instant,
    stop: Option<BorrowedFd<'_>>,
) -> Result<(), FreezeError> {
    let name = format!("{} {verb} {guest}", program.display());
    let error = |why: String, has_begun: bool| FreezeError { why, has_begun };
    let failed = |cause: io::Error| error(format!("cannot run {name}: {cause}"), false);
    let lost = |cause: io::Error| error(format!("cannot wait for {name}: {cause}"), true);
    // The standard output is that of reports.
    let output = io::stderr().as_fd().try_clone_to_owned().map_err(failed)?;
    let mut child = Command::new(program)
        .args([verb, guest])
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(output)
        .spawn()
        .map_err(failed)?;
    let why = loop {
        match child.try_wait().map_err(lost)? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => return Err(error(format!("{name} has failed ({status})"), true)),
            None if Instant::now() >= limit => break format!("{name} did not come to an end"),
            None => {}
        }
        let next = limit.min(Instant::now() + STEP);
        match stop {
            Some(stop) if is_ready(stop, PollFlags::IN, next) => {
                break format!("{name} was ended by a signal")
            }
            Some(_) => {}
            None => thread::sleep(STEP),
        }
    };
    kill(&mut child).map_err(lost)?;
    Err(error(why, true))
}

fn kill(child: &mut Child) -> io::Result<()> {
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    match group.map(|group| kill_process_group(group, Signal::KILL)) {
        None => child.kill()?,
        Some(killed) => killed?,
    }
    child.wait().map(drop)
}
