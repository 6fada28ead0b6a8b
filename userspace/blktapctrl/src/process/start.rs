// SPDX-License-Identifier: MIT OR Apache-2.0
//! How there comes to be one: it is started by us, or an earlier supervisor has started it and it is found.

use super::system::{is_gone, minor_of, open_pid, started};
use super::{output, starter, tidy, Output, Process};
use crate::folder::{self, Folder};
use crate::log::{tell, LogContext};
use crate::record::KnownProcess;
use crate::rpc_client::{unexpected, RpcClient};
use control::tapdisk::{Reply, Request};
use control::{Code, Failure};
use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tokio::net::unix::pipe;
use tokio::sync::Mutex;

/// How tapdisks are started.
#[derive(Clone, Debug)]
pub struct Program {
    /// The program.
    pub path: PathBuf,
    /// The name of the user that it runs as; ours if not said.
    pub user: Option<String>,
}

impl Process {
    /// Starts one that listens at `socket`.
    ///
    /// # Errors
    /// Says what is missing.
    pub async fn spawn(program: &Program, socket: &Path) -> Result<Process, Failure> {
        let unstarted = |error: io::Error| {
            let what = format!("cannot start {}", program.path.display());
            Failure::system(what, &error)
        };
        let (reader, writer) = output::pipe().map_err(unstarted)?;
        let output = Output::of(&reader).map_err(unstarted)?;
        let listener = listen(socket)?;
        let mut command = Command::new(&program.path);
        command
            .args(["--control-fd", "0"])
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stdout(Stdio::from(reader))
            .stderr(Stdio::from(writer))
            // It has a session of its own as soon as it runs: no process group here, a leader of
            // which cannot have one.
            .current_dir("/");
        let mut left = LeftSocket(Some(socket));
        let mut child = starter::start(program, command).await?;
        match Process::meet_child(child.id(), socket) {
            Ok(process) => {
                left.0 = None;
                process.child.replace(Some(child));
                process.output.replace(Some(output));
                Ok(process)
            }
            Err(failure) => {
                // It is our child and was not waited for, so the number is still its own.
                if let Err(error) = child.kill().and_then(|()| child.wait().map(drop)) {
                    tell!(
                        warn,
                        LogContext::process(child.id()).because(&error),
                        "cannot end tapdisk {}: {error}",
                        child.id()
                    );
                }
                Err(failure)
            }
        }
    }

    /// Finds the one that an earlier supervisor started. Nothing if it is gone for certain.
    ///
    /// # Errors
    /// It is not known whether it is gone.
    pub fn adopt(known: KnownProcess, socket: &Path) -> Result<Option<Process>, Failure> {
        let pidfd = match open_pid(known.pid) {
            Ok(pidfd) => pidfd,
            Err(error) if is_gone(&error) => return Ok(None),
            Err(error) => return Err(unwatched(known.pid, &error)),
        };
        // The number could be another process' by now. While the descriptor is held it cannot
        // change hands again, and the time of its start tells.
        match started(known.pid) {
            Ok(started) if started == known.started => {
                Process::meet(known, pidfd, socket).map(Some)
            }
            Ok(_) => Ok(None),
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) => Err(unwatched(known.pid, &error)),
        }
    }

    /// Finds the one that listens at a socket, whoever it is. Nothing if none does.
    ///
    /// # Errors
    /// A process listens and does not say who it is, or says that it is another one.
    pub async fn find(socket: &Path, limit: Duration) -> Result<Option<Process>, Failure> {
        let Some(mut link) = connect(socket).await? else {
            return Ok(None);
        };
        let pid = match introduced(&mut link, limit).await {
            Ok(pid) => pid,
            // If no process listens any more, it was about to end.
            Err(failure) if failure.code == Code::Gone && connect(socket).await?.is_none() => {
                return Ok(None);
            }
            Err(failure) => return Err(failure),
        };
        let pidfd = open_pid(pid).map_err(|error| unwatched(pid, &error))?;
        let started = started(pid).map_err(|error| unwatched(pid, &error))?;
        // It lives: its number has not become another process' since.
        introduced(&mut link, limit).await?;
        let process = Process::meet(KnownProcess { pid, started }, pidfd, socket)?;
        *process.link.lock().await = Some(link);
        Ok(Some(process))
    }

    fn meet(known: KnownProcess, pidfd: OwnedFd, socket: &Path) -> Result<Process, Failure> {
        let pidfd = pipe::Receiver::from_owned_fd_unchecked(pidfd)
            .map_err(|error| unwatched(known.pid, &error))?;
        Ok(Process {
            known,
            since: Instant::now(),
            pidfd,
            child: RefCell::new(None),
            socket: RefCell::new(Some(socket.into())),
            minor: Cell::new(minor_of(socket)),
            link: Mutex::new(None),
            dismissed: Cell::new(false),
            version: RefCell::default(),
            output: RefCell::default(),
        })
    }

    /// A child of ours that was just started: its number cannot be another process'.
    fn meet_child(pid: u32, socket: &Path) -> Result<Process, Failure> {
        let pidfd = open_pid(pid).map_err(|error| unwatched(pid, &error))?;
        let started = started(pid).map_err(|error| unwatched(pid, &error))?;
        Process::meet(KnownProcess { pid, started }, pidfd, socket)
    }
}

/// The number of the process that answers. Only the kernel's word counts: a tapdisk that a guest has taken over would
/// have root end any process.
async fn introduced(link: &mut RpcClient, limit: Duration) -> Result<u32, Failure> {
    let says = match link.ask(&Request::Ping, &[], limit).await? {
        Reply::Process(process) => process.pid,
        reply => return Err(unexpected(&reply)),
    };
    match link.sender() {
        Some(pid) if pid == says => Ok(pid),
        pid => Err(Failure::invalid(format!(
            "process {} answers and says that it is process {says}",
            pid.unwrap_or(0)
        ))),
    }
}

/// The socket of a process that may not come to be: its start fails, or its caller waits no more.
struct LeftSocket<'a>(Option<&'a Path>);

impl Drop for LeftSocket<'_> {
    fn drop(&mut self) {
        if let Some(socket) = self.0 {
            tidy(socket);
        }
    }
}

/// A name for the socket of a process that has no node yet.
pub fn unnamed(folder: &Folder) -> PathBuf {
    use std::sync::atomic::{AtomicU64, Ordering};
    static LAST: AtomicU64 = AtomicU64::new(0);
    let number = LAST.fetch_add(1, Ordering::Relaxed);
    folder
        .tapdisks()
        .join(format!("new-{}-{number}.sock", std::process::id()))
}

fn listen(socket: &Path) -> Result<UnixListener, Failure> {
    let refused = |error| Failure::system(format!("cannot listen at {}", socket.display()), &error);
    folder::remove(socket).map_err(refused)?;
    UnixListener::bind(socket).map_err(refused)
}

/// A connection to who listens. Nothing if no process listens.
async fn connect(socket: &Path) -> Result<Option<RpcClient>, Failure> {
    match RpcClient::connect(socket).await {
        Ok(link) => Ok(Some(link)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(Failure::system(
            format!("cannot connect to {}", socket.display()),
            &error,
        )),
    }
}

fn unwatched(pid: u32, error: &io::Error) -> Failure {
    Failure::system(format!("cannot watch tapdisk {pid}"), error)
}

#[cfg(test)]
mod tests {
    use super::{started, Process};
    use crate::record::KnownProcess;
    use std::path::Path;

    #[test]
    fn another_process_with_the_same_number_is_not_taken_over() {
        let pid = std::process::id();
        let adopt = |pid, started| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            let _inside = runtime.enter();
            let socket = Path::new("/nonexistent/socket");
            Process::adopt(KnownProcess { pid, started }, socket).expect("it can be said")
        };
        let ours = started(pid).expect("we run");
        assert!(adopt(pid, ours - 1).is_none());
        assert!(adopt(u32::MAX >> 1, ours).is_none());
        // A socket without a listener does not mean that the process is gone.
        assert!(adopt(pid, ours).is_some());
    }
}
