// SPDX-License-Identifier: MIT OR Apache-2.0
//! Starts programs, each on a thread of its own: starting one waits for its file system, which may hang.

use super::system::user_in;
use super::Program;
use crate::blocking_io::LIMIT;
use control::{Code, Failure};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::mpsc;
use std::time::Duration;
use tokio::sync::oneshot;

/// The file of users.
const PASSWD: &str = "/etc/passwd";
/// Bytes of the stack of a thread.
const STACK: usize = 256 << 10;

type StartWork = Box<dyn FnOnce() -> Result<StartedChild, Failure> + Send>;

/// A program to be started.
struct StartJob {
    work: StartWork,
    answer: oneshot::Sender<Result<StartedChild, Failure>>,
}

thread_local! {
    /// The thread of each program. It lives as long as this one, as a process may die with the thread that started it.
    static THREADS: RefCell<BTreeMap<PathBuf, mpsc::Sender<StartJob>>> = const { RefCell::new(BTreeMap::new()) };
}

/// A child that is killed if it is not taken, because its caller waits no more.
#[derive(Debug)]
struct StartedChild(Option<Child>);

impl Drop for StartedChild {
    fn drop(&mut self) {
        let Some(mut child) = self.0.take() else {
            return;
        };
        // Our child was not waited for, so the number is still its own.
        if let Err(error) = child.kill().and_then(|()| child.wait().map(drop)) {
            tracing::warn!("cannot end tapdisk {}: {error}", child.id());
        }
    }
}

/// Starts `command`, which runs `program`.
///
/// # Errors
/// It cannot be started, or its file system does not answer.
pub(super) async fn start(program: &Program, command: Command) -> Result<Child, Failure> {
    let user = program.user.clone();
    let work = Box::new(move || start_now(command, user.as_deref()));
    let mut started = within(&program.path, LIMIT, work).await?;
    started.0.take().ok_or_else(|| late(&program.path))
}

/// Does the work on the thread of a program, and waits for it for at most `limit`.
async fn within(program: &Path, limit: Duration, work: StartWork) -> Result<StartedChild, Failure> {
    let (answer, started) = oneshot::channel();
    hand_over(program, StartJob { work, answer })?;
    match tokio::time::timeout(limit, started).await {
        Ok(Ok(started)) => started,
        // A thread that has panicked does not answer either.
        Ok(Err(_)) | Err(_) => Err(late(program)),
    }
}

fn late(program: &Path) -> Failure {
    let path = program.display();
    let message = format!(
        "cannot start {path}: its file system or that of {PASSWD} does not answer: see to its storage"
    );
    Failure::new(Code::Timeout, message)
}

/// Gives a job to the thread of its program.
fn hand_over(program: &Path, job: StartJob) -> Result<(), Failure> {
    THREADS.with_borrow_mut(|threads| {
        let mut job = job;
        if let Some(thread) = threads.get(program) {
            match thread.send(job) {
                Ok(()) => return Ok(()),
                // It has panicked.
                Err(mpsc::SendError(back)) => job = back,
            }
        }
        let (sender, jobs) = mpsc::channel();
        let thread = std::thread::Builder::new().stack_size(STACK);
        thread
            .spawn(move || start_all(&jobs))
            .map_err(|error| Failure::system("cannot start a thread", &error))?;
        if sender.send(job).is_err() {
            return Err(late(program));
        }
        threads.insert(program.into(), sender);
        Ok(())
    })
}

/// Starts one after another, as long as there may be more.
fn start_all(jobs: &mpsc::Receiver<StartJob>) {
    while let Ok(job) = jobs.recv() {
        // Its caller may wait no more.
        if !job.answer.is_closed() {
            // One that is not taken is killed.
            drop(job.answer.send((job.work)()));
        }
    }
}

fn start_now(mut command: Command, user: Option<&str>) -> Result<StartedChild, Failure> {
    if let Some(name) = user {
        let (uid, gid) = user_of(name)?;
        // It becomes that user by itself, after it has locked its memory.
        command.arg("--user").arg(format!("{uid}:{gid}"));
    }
    let child = command.spawn().map_err(|error| {
        let path = Path::new(command.get_program()).display();
        let what = format!("cannot start {path}: install it, or name it with --tapdisk");
        Failure::system(what, &error)
    })?;
    Ok(StartedChild(Some(child)))
}

/// User and group of the processes of disks.
///
/// # Errors
/// There is no such user, or it is root. May hang as the file system of the file of users does.
pub fn user_of(name: &str) -> Result<(u32, u32), Failure> {
    let passwd = std::fs::read_to_string(PASSWD)
        .map_err(|error| Failure::system(format!("cannot read {PASSWD}"), &error))?;
    match user_in(&passwd, name) {
        Some((0, _)) => Err(Failure::invalid(format!(
            "{name} is root: give the processes of disks a user without rights, with --user"
        ))),
        Some(user) => Ok(user),
        None => Err(Failure::new(
            Code::NotFound,
            format!(
                "there is no user {name} in {PASSWD}: run systemd-sysusers, or useradd --system {name}"
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::{user_of, within, StartedChild};
    use control::Code;
    use rustix::process::{pidfd_open, Pid, PidfdFlags};
    use std::path::Path;
    use std::process::Command;
    use std::sync::mpsc;
    use std::time::Duration;

    const PATIENCE: Duration = Duration::from_secs(10);

    #[test]
    fn a_program_whose_file_system_hangs_holds_no_other_up_and_leaves_no_process() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let dead = Path::new("/dead/tapdisk");
            let (answer, silence) = mpsc::channel::<()>();
            let (began, pidfd) = mpsc::channel();
            let hangs = Box::new(move || {
                let child = Command::new("sleep").arg("1000").spawn().expect("sleep");
                let pid = Pid::from_child(&child);
                let _ = began.send(pidfd_open(pid, PidfdFlags::empty()).expect("a pidfd"));
                let _ = silence.recv();
                Ok(StartedChild(Some(child)))
            });
            let short = Duration::from_millis(50);
            let failure = within(dead, short, hangs).await.expect_err("no answer");
            assert_eq!(failure.code, Code::Timeout);
            let fine = || Box::new(|| Ok(StartedChild(None)));
            let failure = within(dead, short, fine()).await.expect_err("it waits");
            assert!(failure.message.contains("/dead/tapdisk"), "{failure}");
            let other = Path::new("/well/tapdisk");
            within(other, PATIENCE, fine())
                .await
                .expect("another program");
            // It answers at last: nothing has waited for that process.
            drop(answer);
            let pidfd = pidfd.recv_timeout(PATIENCE).expect("it was started");
            let pidfd = tokio::net::unix::pipe::Receiver::from_owned_fd_unchecked(pidfd);
            let pidfd = pidfd.expect("a descriptor");
            let ended = tokio::time::timeout(PATIENCE, pidfd.readable()).await;
            ended.expect("it was killed").expect("a look at it");
            within(dead, PATIENCE, fine()).await.expect("it is usable");
        });
    }

    #[test]
    fn a_user_without_rights_is_needed() {
        let failure = user_of("root").expect_err("root");
        assert!(failure.message.contains("is root"), "{failure}");
        let failure = user_of("no such user").expect_err("none");
        assert_eq!(failure.code, Code::NotFound);
    }
}
