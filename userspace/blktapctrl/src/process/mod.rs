// SPDX-License-Identifier: MIT OR Apache-2.0
//! A tapdisk: its start or discovery (`start`), requests to it (`ask`), and its end (`end`).

mod output;
mod requests;
mod shutdown;
mod start;
mod starter;
mod system;

use crate::folder;
use crate::log::{tell, LogContext};
use crate::record::KnownProcess;
use crate::rpc_client::RpcClient;
use control::supervisor::ProcessBinary;
use control::Failure;
pub use output::Output;
pub use start::{unnamed, Program};
pub use starter::user_of;
use std::cell::{Cell, RefCell};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};
use system::minor_of;
use tokio::net::unix::pipe;
use tokio::sync::Mutex;

/// How long a tapdisk may take to answer what needs no I/O.
pub(crate) const SOON: Duration = Duration::from_secs(10);
/// How long what a dead one has sent over a network is given to be over, as drivers claim it. An older
/// kernel does not wait for that, so the next process does before it serves.
const SETTLE: Duration = Duration::from_secs(60);
/// How long it may take to open an image.
pub(crate) const OPEN: Duration = Duration::from_secs(60).saturating_add(SETTLE);

/// A process.
#[derive(Debug)]
pub struct Process {
    known: KnownProcess,
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
    /// Nothing before the first request, and after the connection has ended.
    link: Mutex<Option<RpcClient>>,
    /// Its end is our wish.
    dismissed: Cell<bool>,
    /// The version that it says it has.
    version: RefCell<Option<String>>,
    /// Its output; nothing once a task reads that.
    output: RefCell<Option<Output>>,
}

impl Process {
    /// Its number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.known.pid
    }

    /// Returns the log context of the process: also the disk that its socket is or was named after.
    #[must_use]
    pub fn about(&self) -> LogContext {
        LogContext {
            minor: self.minor.get(),
            ..LogContext::process(self.pid())
        }
    }

    /// How to recognise it.
    #[must_use]
    pub fn known(&self) -> KnownProcess {
        self.known
    }

    /// We have started it.
    #[must_use]
    pub fn is_child(&self) -> bool {
        self.child.borrow().is_some()
    }

    /// Returns its output, to the first caller. That of a process which an earlier supervisor has started is found;
    /// nothing if it has none.
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

    /// Returns its program, from the system; nothing if it has ended.
    #[must_use]
    pub fn binary(&self) -> Option<ProcessBinary> {
        let link = format!("/proc/{}/exe", self.pid());
        let path = fs::read_link(link).ok()?;
        let text = path.as_os_str().as_bytes();
        let was = text.strip_suffix(b" (deleted)");
        Some(ProcessBinary {
            path: was.map_or_else(|| path.clone(), |was| OsStr::from_bytes(was).into()),
            replaced: was.is_some(),
            version: self.version.borrow().clone(),
        })
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

fn tidy(socket: &Path) {
    if let Err(error) = folder::remove(socket) {
        let about = LogContext {
            minor: minor_of(socket),
            errno: error.raw_os_error(),
            ..LogContext::default()
        };
        tell!(warn, about, "cannot remove {}: {error}", socket.display());
    }
}
