// SPDX-License-Identifier: MIT OR Apache-2.0
//! A tapdisk: started by us, or by the supervisor before us.

mod output;
mod system;

use crate::folder::{self, Folder};
use crate::link::{unexpected, Link};
use crate::log::{tell, About};
use crate::record::Known;
use control::stats::Stats;
use control::supervisor::Binary;
use control::tapdisk::{self, Reply, Request, Status};
use control::{Code, Failure};
pub use output::Output;
use rustix::io::Errno;
use rustix::process::{pidfd_send_signal, Signal};
use std::cell::{Cell, RefCell};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
pub use system::user_in;
use system::{how, is_crash, is_gone, minor_of, open_pid, started};
use tokio::net::unix::pipe;
use tokio::sync::Mutex;

/// How long a tapdisk may take to answer what needs no I/O.
pub(crate) const SOON: Duration = Duration::from_secs(10);
/// How long what a dead one has sent over a network is given to be over, as drivers claim it. An older
/// kernel does not wait for that, so the next process does before it serves.
const SETTLE: Duration = Duration::from_secs(60);
/// How long it may take to open an image.
pub(crate) const OPEN: Duration = Duration::from_secs(60).saturating_add(SETTLE);

/// How tapdisks are started.
#[derive(Clone, Debug)]
pub struct Program {
    /// The program.
    pub path: PathBuf,
    /// User and group that it runs as; ours if not said.
    pub user: Option<(u32, u32)>,
}

/// A process.
#[derive(Debug)]
pub struct Process {
    known: Known,
    since: Instant,
    /// Readable when the process has ended. It is no pipe; what is used of that type is that it
    /// waits for a descriptor to be readable.
    pidfd: pipe::Receiver,
    /// Nothing if it is not our child.
    child: RefCell<Option<Child>>,
    /// Nothing once it was removed: another process' may be there by then.
    socket: RefCell<Option<PathBuf>>,
    /// The disk that its socket is or was named after.
    minor: Cell<Option<u32>>,
    /// Nothing until it is asked something, and after the connection has ended.
    link: Mutex<Option<Link>>,
    /// Its end is our wish.
    dismissed: Cell<bool>,
    /// The version that it says it has.
    version: RefCell<Option<String>>,
    /// What it says; nothing once somebody listens to it.
    output: RefCell<Option<Output>>,
}

impl Process {
    /// Starts one that listens at `socket`.
    ///
    /// # Errors
    /// Says what is missing.
    pub fn spawn(program: &Program, socket: &Path) -> Result<Process, Failure> {
        let unstarted = |error: &io::Error, remedy: &str| {
            let what = format!("cannot start {}{remedy}", program.path.display());
            Failure::system(what, error)
        };
        let (reader, writer) = output::pipe().map_err(|error| unstarted(&error, ""))?;
        let output = Output::of(&reader).map_err(|error| unstarted(&error, ""))?;
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
        if let Some((uid, gid)) = program.user {
            // It becomes that user by itself, after it has locked its memory.
            command.arg("--user").arg(format!("{uid}:{gid}"));
        }
        let result = command
            .spawn()
            .map_err(|error| unstarted(&error, ": install it, or name it with --tapdisk"));
        let mut child = match result {
            Ok(child) => child,
            Err(failure) => {
                tidy(socket);
                return Err(failure);
            }
        };
        match Process::meet_child(child.id(), socket) {
            Ok(process) => {
                process.child.replace(Some(child));
                process.output.replace(Some(output));
                Ok(process)
            }
            Err(failure) => {
                // It is our child and was not waited for, so the number is still its own.
                if let Err(error) = child.kill().and_then(|()| child.wait().map(drop)) {
                    tell!(
                        warn,
                        About::process(child.id()).because(&error),
                        "cannot end tapdisk {}: {error}",
                        child.id()
                    );
                }
                tidy(socket);
                Err(failure)
            }
        }
    }

    /// Finds the one that an earlier supervisor started. Nothing if it is gone for certain.
    ///
    /// # Errors
    /// It cannot be said whether it is gone.
    pub fn adopt(known: Known, socket: &Path) -> Result<Option<Process>, Failure> {
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

    /// Finds the one that listens at a socket, whoever it is. Nothing if nobody does.
    ///
    /// # Errors
    /// Somebody does, and does not say who.
    pub async fn find(socket: &Path, limit: Duration) -> Result<Option<Process>, Failure> {
        let Some(mut link) = connect(socket).await? else {
            return Ok(None);
        };
        let pid = match link.ask(&Request::Ping, &[], limit).await {
            Ok(Reply::Process(process)) => process.pid,
            Ok(reply) => return Err(unexpected(&reply)),
            // Where nobody listens any more, it was about to end.
            Err(failure) if failure.code == Code::Gone && connect(socket).await?.is_none() => {
                return Ok(None);
            }
            Err(failure) => return Err(failure),
        };
        let pidfd = open_pid(pid).map_err(|error| unwatched(pid, &error))?;
        let started = started(pid).map_err(|error| unwatched(pid, &error))?;
        let process = Process::meet(Known { pid, started }, pidfd, socket)?;
        *process.link.lock().await = Some(link);
        Ok(Some(process))
    }

    fn meet(known: Known, pidfd: OwnedFd, socket: &Path) -> Result<Process, Failure> {
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
        Process::meet(Known { pid, started }, pidfd, socket)
    }

    /// Its number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.known.pid
    }

    /// What a line about it is about: the disk that its socket is or was named after, too.
    #[must_use]
    pub fn about(&self) -> About {
        About {
            minor: self.minor.get(),
            ..About::process(self.pid())
        }
    }

    /// How to recognise it.
    #[must_use]
    pub fn known(&self) -> Known {
        self.known
    }

    /// We have started it.
    #[must_use]
    pub fn is_child(&self) -> bool {
        self.child.borrow().is_some()
    }

    /// One more connection to it, for questions whose answers take their time.
    ///
    /// # Errors
    /// It does not listen any more.
    pub async fn another_link(&self) -> Result<Link, Failure> {
        let socket = self.socket.borrow().clone().unwrap_or_default();
        Link::connect(&socket).await.map_err(|error| {
            let what = format!("cannot connect to {}", socket.display());
            match is_gone(&error) {
                true => Failure::new(Code::Gone, format!("{what}: {error}")),
                false => Failure::system(what, &error),
            }
        })
    }

    /// What it says, for the first who asks. That of a process which an earlier supervisor has started is found; nothing
    /// if it has none.
    ///
    /// # Errors
    /// The system does not say.
    pub fn output(&self) -> io::Result<Option<Output>> {
        if let Some(output) = self.output.take() {
            return Ok(Some(output));
        }
        match Output::find(self.pid()) {
            // Another process may have its number by now.
            _ if self.has_ended() => Ok(None),
            found => found,
        }
    }

    /// Since we know it.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.since.elapsed()
    }

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

    /// True if it has ended by itself and in no orderly way, as far as is known: who is killed by
    /// somebody, or by the system for want of memory, dies of nothing that it was asked to do.
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

    /// It has ended, which is why it could not be asked. The kernel closes its connections a moment
    /// before it counts as ended.
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

    /// Asks it, one question at a time.
    ///
    /// # Errors
    /// What it says, or that it does not say anything.
    pub async fn ask(
        &self,
        question: &Request,
        fds: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<Reply, Failure> {
        let late = || {
            Failure::new(
                Code::Timeout,
                format!(
                    "tapdisk {} has not answered an earlier question yet",
                    self.pid()
                ),
            )
        };
        let mut place = tokio::time::timeout(limit, self.link.lock())
            .await
            .map_err(|_| late())?;
        let mut link = match place.take() {
            Some(link) => link,
            None => {
                let socket = self.socket.borrow().clone().unwrap_or_default();
                Link::connect(&socket).await.map_err(|error| {
                    let what = format!("cannot ask tapdisk {}", self.pid());
                    Failure::new(Code::Gone, format!("{what}: {error}"))
                })?
            }
        };
        let answer = link.ask(question, fds, limit).await;
        if link.is_whole() {
            *place = Some(link);
        }
        answer
    }

    /// Which program it says it is.
    ///
    /// # Errors
    /// It says nothing, or speaks another version of the protocol.
    pub async fn introduce(&self, limit: Duration) -> Result<tapdisk::Process, Failure> {
        // On a connection of its own: who has just been started may take its time.
        let asked = async {
            let mut link = self.another_link().await?;
            link.ask(&Request::Ping, &[], limit).await
        };
        match asked.await? {
            Reply::Process(what) => {
                self.version.replace(Some(what.program.clone()));
                Ok(what)
            }
            reply => Err(unexpected(&reply)),
        }
    }

    /// What it runs, as the system says; nothing if it has ended.
    #[must_use]
    pub fn binary(&self) -> Option<Binary> {
        let link = format!("/proc/{}/exe", self.pid());
        let path = fs::read_link(link).ok()?;
        let text = path.as_os_str().as_bytes();
        let was = text.strip_suffix(b" (deleted)");
        Some(Binary {
            path: was.map_or_else(|| path.clone(), |was| OsStr::from_bytes(was).into()),
            replaced: was.is_some(),
            version: self.version.borrow().clone(),
        })
    }

    /// What it says that it does.
    ///
    /// # Errors
    /// It says nothing, or something else.
    pub async fn status(&self) -> Result<Status, Failure> {
        match self.ask(&Request::Status, &[], SOON).await? {
            Reply::Status(status) => Ok(*status),
            reply => Err(unexpected(&reply)),
        }
    }

    /// What it has counted.
    ///
    /// # Errors
    /// It says nothing, or something else.
    pub async fn stats(&self, limit: Duration) -> Result<Box<Stats>, Failure> {
        match self.ask(&Request::Stats, &[], limit).await? {
            Reply::Stats(stats) => Ok(stats),
            reply => Err(unexpected(&reply)),
        }
    }

    /// Has it read all data of its disk, at so many bytes in a second; 0 ends that.
    ///
    /// # Errors
    /// It says nothing, or it does not serve a disk.
    pub async fn scrub(&self, rate: u64) -> Result<(), Failure> {
        self.tell(&Request::Scrub { rate }, None, SOON).await
    }

    /// Has it do something, perhaps with a descriptor.
    ///
    /// # Errors
    /// It does not, or does not say so in time.
    pub async fn tell(
        &self,
        what: &Request,
        fd: Option<BorrowedFd<'_>>,
        limit: Duration,
    ) -> Result<(), Failure> {
        let fds: Vec<_> = fd.into_iter().collect();
        match self.ask(what, &fds, limit).await? {
            Reply::Done => Ok(()),
            reply => Err(unexpected(&reply)),
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
            // Whatever it says: what counts is that it ends.
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
                // Nobody waits for that any more, so whoever sees it later has to do something about it.
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

    /// Gives its socket another name.
    ///
    /// # Errors
    /// The system refuses to.
    pub fn rename_socket(&self, to: &Path) -> Result<(), Failure> {
        let mut socket = self.socket.borrow_mut();
        if let Some(from) = socket.as_deref().filter(|from| *from != to) {
            fs::rename(from, to).map_err(|error| {
                Failure::system(format!("cannot make {}", to.display()), &error)
            })?;
            *socket = Some(to.into());
            self.minor.set(minor_of(to));
        }
        Ok(())
    }

    /// Its socket has become another process', which has taken the name.
    pub fn forget_socket(&self) {
        self.socket.replace(None);
    }

    /// Removes its socket, once.
    pub fn tidy(&self) {
        if let Some(socket) = self.socket.take() {
            tidy(&socket);
        }
    }

    /// Bytes in memory that are its own: without the arena and the text of the program.
    #[must_use]
    pub fn resident(&self) -> Option<u64> {
        let text = fs::read_to_string(format!("/proc/{}/statm", self.pid())).ok()?;
        let mut pages = text.split_whitespace().skip(1).map(str::parse::<u64>);
        let (resident, shared) = (pages.next()?.ok()?, pages.next()?.ok()?);
        let size = u64::try_from(rustix::param::page_size()).ok()?;
        resident.saturating_sub(shared).checked_mul(size)
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

fn tidy(socket: &Path) {
    if let Err(error) = folder::remove(socket) {
        let about = About {
            minor: minor_of(socket),
            errno: error.raw_os_error(),
            ..About::default()
        };
        tell!(warn, about, "cannot remove {}: {error}", socket.display());
    }
}

/// A connection to who listens. Nothing if nobody does.
async fn connect(socket: &Path) -> Result<Option<Link>, Failure> {
    match Link::connect(socket).await {
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
    use crate::record::Known;
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
            Process::adopt(Known { pid, started }, socket).expect("it can be said")
        };
        let ours = started(pid).expect("we run");
        assert!(adopt(pid, ours - 1).is_none());
        assert!(adopt(u32::MAX >> 1, ours).is_none());
        // That nobody listens there does not mean that it is gone.
        assert!(adopt(pid, ours).is_some());
    }
}
