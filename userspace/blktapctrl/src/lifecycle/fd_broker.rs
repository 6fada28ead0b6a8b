// SPDX-License-Identifier: MIT OR Apache-2.0
//! Processes ask for what they cannot open themselves; what is decided is sent back.

use super::io_errors::{until_end, EventRate};
use super::{key, server, Lifecycle};
use crate::blocking_io::{blocking_io, LIMIT};
use crate::disk::Disk;
use crate::image::Opened;
use crate::process::Process;
use crate::record::PartRole;
use crate::registry::Registry;
use crate::rpc_client::{unexpected, RpcClient, EVER};
use crate::state::{DiskState, StateOwner};
use control::supervisor::What;
use control::tapdisk::{FdGrant, Reply, Request, RequestedFile};
use control::{Code, Failure, Target, TlsFile};
use std::convert::Infallible;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

/// Answers of a process, and to it, that do not wait.
const BURST: u64 = 256;
/// Time between any more, so that a process that asks all the time does not keep the supervisor busy.
const STEP: Duration = Duration::from_millis(10);

/// Answers the needs of a process until it ends.
pub(super) async fn watch(lifecycle: Rc<Lifecycle>, process: Rc<Process>) {
    let mut heard = OutputCounters::new();
    let listen = async || listen(&lifecycle, &process, &mut heard).await;
    until_end(&lifecycle, &process, "say what it needs", listen).await;
}

/// Counters of a process, over all connections to it.
struct OutputCounters {
    messages: u64,
    refused: EventRate,
    reconnected: EventRate,
    /// The process has a connection to the server of its disk.
    is_connected: bool,
}

impl OutputCounters {
    fn new() -> OutputCounters {
        OutputCounters {
            messages: 0,
            refused: EventRate::new(),
            reconnected: EventRate::new(),
            is_connected: false,
        }
    }

    /// There was one more message. A process that sends many messages waits between them, whatever they contain.
    async fn count(&mut self) {
        self.messages = self.messages.saturating_add(1);
        if self.messages > BURST {
            tokio::time::sleep(STEP).await;
        }
    }

    /// Reports an answer as an event, at a limited rate.
    fn tell(
        &mut self,
        registry: &Registry,
        process: &Process,
        answer: &Result<(Given, FdGrant), Failure>,
    ) {
        let (rate, what) = match answer {
            Err(failure) => {
                let why = failure.message.clone();
                (&mut self.refused, What::Refused { why })
            }
            Ok((
                Given::Server {
                    again: Some(path), ..
                },
                _,
            )) => {
                let path = path.clone();
                (&mut self.reconnected, What::Reconnected { path })
            }
            Ok((Given::Export { place, .. }, _)) => {
                if !std::mem::replace(&mut self.is_connected, true) {
                    return;
                }
                let path = place.clone();
                (&mut self.reconnected, What::Reconnected { path })
            }
            Ok(_) => return,
        };
        if rate.is_due() {
            rate.told();
            let minor = registry.of_process(process).map(|disk| disk.minor);
            registry.events.add(minor, what);
        }
    }
}

async fn listen(
    lifecycle: &Lifecycle,
    process: &Process,
    heard: &mut OutputCounters,
) -> Result<Infallible, Failure> {
    let mut link = process.another_link().await?;
    // Needs that an earlier connection reported and that have no answer are reported again.
    let mut known = 0;
    loop {
        let question = Request::Needs { after: known };
        let needs = match link.ask(&question, &[], EVER).await? {
            Reply::Needs { needs } => needs,
            reply => return Err(unexpected(&reply)),
        };
        heard.count().await;
        for need in needs {
            known = known.max(need.number);
            let mut answer = lifecycle.provide(process, &need.what).await;
            // The decision may have been undone while a file was opened.
            if answer.is_ok() {
                answer = lifecycle.still(process, &need.what).and(answer);
            }
            heard.tell(&lifecycle.registry, process, &answer);
            send(&mut link, need.number, answer).await?;
            heard.count().await;
        }
    }
}

/// Descriptor that an answer carries.
enum Given {
    File(Opened),
    /// A file below the image, and the number by which the kernel knows it.
    Parent(Opened, Option<u16>),
    /// A connection. Closing it does not block.
    Server {
        stream: OwnedFd,
        /// Not the first one to this socket.
        again: Option<PathBuf>,
    },
    /// A connection to the server of an export.
    Export {
        stream: OwnedFd,
        place: PathBuf,
    },
    /// Memory.
    State(OwnedFd),
    /// Nothing: the answer says all.
    Nothing,
}

impl Given {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Given::File(opened) | Given::Parent(opened, _) => opened.fd(),
            Given::Server { stream: fd, .. }
            | Given::Export { stream: fd, .. }
            | Given::State(fd) => Some(fd.as_fd()),
            Given::Nothing => None,
        }
    }
}

async fn send(
    link: &mut RpcClient,
    number: u64,
    answer: Result<(Given, FdGrant), Failure>,
) -> Result<(), Failure> {
    let (given, provided) = match answer {
        Ok((given, provided)) => (Some(given), provided),
        Err(failure) => (None, FdGrant::Refused(failure)),
    };
    let fds: Vec<_> = given.iter().filter_map(Given::fd).collect();
    let backing = match &given {
        Some(Given::Parent(_, backing)) => *backing,
        _ => None,
    };
    let question = Request::Provide {
        number,
        provided,
        backing,
    };
    // However long that takes: who does not hear the answer waits for it.
    link.ask(&question, &fds, EVER).await.map(drop)
}

impl Lifecycle {
    /// Decides about what a process needs.
    async fn provide(
        &self,
        process: &Process,
        what: &RequestedFile,
    ) -> Result<(Given, FdGrant), Failure> {
        let disk = self.registry.of_process(process).ok_or_else(|| {
            Failure::new(Code::State, "a process without a disk is given nothing")
        })?;
        match what {
            RequestedFile::State { size } => state(&disk, process, *size),
            RequestedFile::Notes => self.notes(&disk),
            RequestedFile::Marks => Ok((Given::Nothing, FdGrant::Marks(self.marks(&disk)))),
            RequestedFile::Changed { mark, size, from } => {
                let changed = self.changed_of(&disk, *mark, *size, *from).await?;
                Ok((Given::Nothing, FdGrant::Changed(changed)))
            }
            RequestedFile::Trace => {
                let file = self.open_trace(&disk).await?;
                Ok((Given::File(file), FdGrant::Shared))
            }
            RequestedFile::Parent { path } => self.file(&disk, PartRole::Parent, path).await,
            RequestedFile::Extent { path } => self.file(&disk, PartRole::Extent, path).await,
            RequestedFile::Socket { path } => self.connect(&disk, path).await,
            RequestedFile::Server { target } => self.server(&disk, target).await,
            RequestedFile::Credential { target, file } => credential(&disk, target, *file).await,
            RequestedFile::Key { target } => the_key(&disk, target).await,
            RequestedFile::Other => Err(Failure::unsupported(
                "this blktapctrl does not know the request of the tapdisk: install the blktapctrl of its version",
            )),
        }
    }

    /// The process still is that of a disk, on whose record is what it is to be given.
    fn still(&self, process: &Process, what: &RequestedFile) -> Result<(), Failure> {
        let role = match what {
            RequestedFile::Parent { .. } => Some(PartRole::Parent),
            RequestedFile::Extent { .. } => Some(PartRole::Extent),
            RequestedFile::Socket { .. } => Some(PartRole::Socket),
            RequestedFile::Server { .. }
            | RequestedFile::Credential { .. }
            | RequestedFile::Key { .. }
            | RequestedFile::State { .. }
            | RequestedFile::Notes
            | RequestedFile::Marks
            | RequestedFile::Changed { .. }
            | RequestedFile::Trace
            | RequestedFile::Other => None,
        };
        let disk = self.registry.of_process(process);
        let is_its = disk.is_some_and(|disk| match (role, what.path(), what) {
            (Some(role), Some(path), _) => self.admission.known(&disk, role, path).is_some(),
            (
                _,
                _,
                RequestedFile::Server { target }
                | RequestedFile::Credential { target, .. }
                | RequestedFile::Key { target },
            ) => serves(&disk, target),
            (_, _, RequestedFile::Changed { mark, .. }) => self.has_mark(&disk, *mark),
            _ => true,
        });
        match is_its && !process.is_dismissed() {
            true => Ok(()),
            false => Err(Failure::new(
                Code::State,
                "the requested file is not the disk's any more",
            )),
        }
    }

    async fn file(
        &self,
        disk: &Disk,
        role: PartRole,
        path: &Path,
    ) -> Result<(Given, FdGrant), Failure> {
        let (file, part) = self.admission.file(disk, role, path).await?;
        let open = self.leads_to(disk)?;
        let direct = match role {
            PartRole::Parent => !open.target.caches_below(),
            _ => open.target.driver().is_direct(),
        };
        let write = !part.mode.is_read_only();
        let again = file.clone();
        let opened = blocking_io(path, LIMIT, move || again.open(write, direct)).await?;
        let provided = match part.locked {
            true => FdGrant::Locked,
            false => FdGrant::Shared,
        };
        let given = match role {
            PartRole::Parent => Given::Parent(opened, self.lend(disk, &open, &part, &file).await),
            _ => Given::File(opened),
        };
        Ok((given, provided))
    }

    /// Where the process notes what it writes.
    fn notes(&self, disk: &Disk) -> Result<(Given, FdGrant), Failure> {
        let map = self.open_notes(disk)?;
        Ok((Given::State(map), FdGrant::Shared))
    }

    /// A connection to the server of an export, which whoever made the disk has named.
    async fn server(&self, disk: &Disk, target: &Target) -> Result<(Given, FdGrant), Failure> {
        let export = target.export().filter(|_| serves(disk, target));
        let export = export.ok_or_else(|| not_its(disk, target))?;
        let place = PathBuf::from(export.to_string());
        let stream = server::connect(export.clone(), self.registry.folder.root()).await?;
        Ok((Given::Export { stream, place }, FdGrant::Shared))
    }

    async fn connect(&self, disk: &Disk, path: &Path) -> Result<(Given, FdGrant), Failure> {
        let (socket, again) = self.admission.socket(disk, path).await?;
        let stream = server::connect_to(socket, path).await?;
        let again = again.then(|| path.to_path_buf());
        Ok((Given::Server { stream, again }, FdGrant::Shared))
    }
}

/// A file that proves who is at one end of that connection.
async fn credential(
    disk: &Disk,
    target: &Target,
    file: TlsFile,
) -> Result<(Given, FdGrant), Failure> {
    if !serves(disk, target) {
        return Err(not_its(disk, target));
    }
    let opened = server::credential(target, file).await?;
    Ok((Given::File(opened), FdGrant::Shared))
}

/// The file with the key of an image, which whoever made the disk has named.
async fn the_key(disk: &Disk, target: &Target) -> Result<(Given, FdGrant), Failure> {
    if !serves(disk, target) {
        return Err(not_its(disk, target));
    }
    let opened = key::open(target).await?;
    Ok((Given::File(opened), FdGrant::Shared))
}

fn not_its(disk: &Disk, target: &Target) -> Failure {
    Failure::new(
        Code::Denied,
        format!("disk {} is not served from {target}", disk.minor),
    )
}

/// Whether a disk is served from a target, is about to be, or is copied to it.
fn serves(disk: &Disk, target: &Target) -> bool {
    let record = disk.record.borrow();
    let next = record.next.as_ref().map(|next| &next.open);
    let copy = record.mirror.as_ref().map(|mirror| &mirror.open);
    let mut all = record.open.iter().chain(next).chain(copy);
    all.any(|open| open.target == *target)
}

/// The state that is the disk's, or a new one.
fn state(disk: &Disk, process: &Process, size: u64) -> Result<(Given, FdGrant), Failure> {
    let record = disk.record.borrow();
    let (place, whose) = match &record.next {
        Some(next) => (&disk.next_state, StateOwner::next(disk.minor, next)),
        None => (&disk.state, StateOwner::served(&record)),
    };
    let fd = DiskState::give(&mut place.borrow_mut(), whose, size, process.known())?;
    Ok((Given::State(fd), FdGrant::Shared))
}
