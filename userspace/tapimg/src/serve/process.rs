// SPDX-License-Identifier: MIT OR Apache-2.0
//! The process that serves: this program once more, in the sandbox of tapdisk, with a connection for orders as its
//! standard input and one for its questions as its standard output.

use super::broker::FileBroker;
use control::tapdisk::{Reply, Request};
use control::wire::{Envelope, Outcome};
use control::{Channel, Code, Failure};
use diskio::Runtime;
use rustix::event::{poll, PollFd, PollFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::rc::Rc;
use std::thread;
use tapdev::{GuestlessNode, Tap};
use tapdisk::sandbox::{self, User};
use tapdisk::Session;

/// Threads beside the one that serves requests.
const HELPERS: usize = 1;
/// The verb by which this program starts itself.
const VERB: &str = "serve-confined";

/// A process that serves. It ends with this.
#[derive(Debug)]
pub(super) struct ServingProcess {
    child: Child,
    channel: Channel,
    /// Readable if this process is to end.
    signals: OwnedFd,
    last_id: u64,
    /// Clients may have written something.
    is_serving: bool,
}

impl ServingProcess {
    /// Starts it, and a thread that opens files for it.
    pub(super) fn start(
        signals: OwnedFd,
        user: Option<&str>,
        broker: FileBroker,
    ) -> Result<Self, Failure> {
        let failed = |error| Failure::system("cannot start the process that serves", &error);
        let (orders, its_orders) = UnixStream::pair().map_err(failed)?;
        let (questions, its_questions) = UnixStream::pair().map_err(failed)?;
        // By this name it is the same program also if its file was replaced. Signals of the terminal are for this
        // process, which ends the other one in order: so that has a group of its own.
        let mut command = Command::new("/proc/self/exe");
        command.arg(VERB).arg0("tapimg").process_group(0);
        if let Some(user) = user {
            command.args(["--user", user]);
        }
        command.stdin(OwnedFd::from(its_orders));
        command.stdout(OwnedFd::from(its_questions));
        let child = command.spawn().map_err(failed)?;
        // Its copies of the descriptors are the only ones from now on, so their end is that of the process.
        drop(command);
        let process = Self {
            child,
            channel: Channel::new(orders),
            signals,
            last_id: 0,
            is_serving: false,
        };
        let answer = move || {
            if let Err(failure) = broker.answer(Channel::new(questions)) {
                diskio::say!("tapimg: the process that serves gets no more answers: {failure}");
            }
        };
        thread::Builder::new().spawn(answer).map_err(failed)?;
        Ok(process)
    }

    /// Returns its number.
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Asks and waits for the answer.
    ///
    /// # Errors
    /// Those of the process; or it has ended, or this one is to end. The process is killed then.
    pub(super) fn ask(
        &mut self,
        question: Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Reply, Failure> {
        self.last_id += 1;
        let sent = Envelope::new(self.last_id, fds.len(), question);
        if let Err(failure) = self.channel.send(&sent, fds) {
            return Err(self.died(failure));
        }
        if self.wait()? {
            self.kill()?;
            return Err(Failure::new(
                Code::Other,
                match self.is_serving {
                    false => "ended by a signal before it could serve".to_owned(),
                    true => format!(
                        "process {} is killed, because of a second signal: what clients have written and not flushed \
                         may be lost",
                        self.child.id()
                    ),
                },
            ));
        }
        let gone = || Failure::new(Code::Gone, "no answer came");
        match self.channel.receive::<Outcome<Reply>>() {
            Ok(Some((answer, _))) => answer.body.into(),
            Ok(None) => Err(self.died(gone())),
            Err(failure) => Err(self.died(failure)),
        }
    }

    /// Waits until the process sends something or ends, or this one is to end: true if only that.
    pub(super) fn wait(&self) -> Result<bool, Failure> {
        let mut fds = [
            PollFd::new(&self.signals, PollFlags::IN),
            PollFd::new(&self.channel, PollFlags::IN),
        ];
        loop {
            match poll(&mut fds, None) {
                Err(Errno::INTR) => {}
                Err(error) => return Err(Failure::system("cannot wait", &error.into())),
                Ok(_) => return Ok(fds[1].revents().is_empty()),
            }
        }
    }

    /// From now on clients may connect.
    pub(super) fn serves(&mut self) {
        self.is_serving = true;
    }

    /// Makes all writes durable, and ends the process. A second signal kills it.
    pub(super) fn end(mut self) -> Result<(), Failure> {
        // The first signal was enough to come here.
        let mut taken = [0; 1024];
        match rustix::io::read(&self.signals, &mut taken) {
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(error) => return Err(Failure::system("cannot read a signal", &error.into())),
        }
        let closed = self.ask(Request::Close, &[]);
        let closed = closed.map(drop);
        if closed.is_ok() {
            self.ask(Request::Exit, &[])?;
        }
        closed
    }

    fn kill(&mut self) -> Result<(), Failure> {
        let killed = self.child.kill().and_then(|()| self.child.wait());
        killed
            .map(drop)
            .map_err(|error| Failure::system("cannot end the process that serves", &error))
    }

    /// The failure for a process that has closed its connection, which it does when it ends.
    fn died(&mut self, how: Failure) -> Failure {
        match self.child.wait() {
            Ok(status) => Failure::new(
                Code::Gone,
                format!(
                    "the process that serves has ended ({status}): {}",
                    how.message
                ),
            ),
            Err(error) => Failure::system("the process that serves cannot be waited for", &error),
        }
    }
}

impl Drop for ServingProcess {
    fn drop(&mut self) {
        // After an order to end it does; otherwise nothing was served, or nothing can be done for it any more.
        let ended = match self.child.try_wait() {
            Ok(Some(_)) => Ok(()),
            _ => self.kill(),
        };
        if let Err(failure) = ended {
            diskio::say!("tapimg: {failure}");
        }
    }
}

pub(super) fn unexpected(reply: &Reply) -> Failure {
    Failure::new(
        Code::Other,
        format!("the process that serves gives an answer to something else: {reply:?}"),
    )
}

/// Is the process that serves, until it gets the order to end or the process that started it is gone.
pub(crate) fn confined(user: Option<&str>) -> Result<(), Failure> {
    let failed = |what: &'static str| move |error: io::Error| Failure::system(what, &error);
    let user = user.map(User::find).transpose();
    let user = user.map_err(failed("cannot become another user"))?;
    // They end this process only if the other one does not.
    let signals = diskio::signals(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP]);
    let signals = Rc::new(signals.map_err(failed("cannot wait for signals"))?);
    let runtime = Runtime::new();
    let session = Session::new(&runtime);
    // A ring cannot be made later, in the sandbox. If none is allowed, Linux AIO is used, which the session reports.
    let _is_possible = runtime.io.prepare_uring();
    let node = GuestlessNode::new().and_then(Tap::open);
    session.attach(node.map_err(failed("cannot prepare to serve"))?)?;
    let sockets = [
        io::stdin().as_fd().try_clone_to_owned(),
        io::stdout().as_fd().try_clone_to_owned(),
    ];
    for socket in sockets {
        let socket = socket.map_err(failed("cannot use the connection to the other process"))?;
        rustix::io::ioctl_fionbio(&socket, true).map_err(|error| {
            Failure::system(
                "cannot use the connection to the other process",
                &error.into(),
            )
        })?;
        let session = session.clone();
        runtime.tasks.spawn(async move {
            tapdisk::listen::until_end(&session, socket).await;
            end(&session).await;
        });
    }
    let (io, ending) = (runtime.io.clone(), session.clone());
    runtime.tasks.spawn(async move {
        if let Err(error) = io.readable(&signals).await {
            diskio::say!("tapimg: cannot wait for signals: {error}");
        }
        end(&ending).await;
    });
    confine(&runtime, user).map_err(failed("cannot enter the sandbox"))?;
    session
        .run()
        .map_err(failed("the disk cannot be served any longer"))
}

/// Enters the sandbox, with all threads.
fn confine(runtime: &Runtime, user: Option<User>) -> io::Result<()> {
    sandbox::forbid_dumps()?;
    runtime.io.start_helpers(HELPERS)?;
    runtime
        .io
        .on_helpers(move || sandbox::confine(user).map(drop))?;
    if let Some(note) = sandbox::confine(user)? {
        diskio::say!("tapimg: {note}");
    }
    Ok(())
}

/// Makes all writes durable and ends, if that was not done by an order already.
async fn end(session: &Rc<Session>) {
    if let Err(failure) = session.handle(Request::Close, Vec::new()).await {
        diskio::say!("tapimg: {failure}");
    }
    session.end();
}
