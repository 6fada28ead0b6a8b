// SPDX-License-Identifier: MIT OR Apache-2.0
//! The daemon of sanlock, asked over its socket. Each question has a connection of its own.

use super::state::DaemonState;
use super::wire::{self, Lockspace, MessageHeader, Resource, SanlkDisk, SanlkHost, SanlockCommand};
use control::{Code, Failure, SanlockResource};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;
use zerocopy::{FromBytes, IntoBytes};

/// Where the daemon listens, if `SANLOCK_RUN_DIR` says nothing else, as for libsanlock.
const FOLDER: &str = "/run/sanlock";
/// How long the daemon may take for what is in its memory.
const SOON: Duration = Duration::from_secs(10);
/// How long it may take for what is on storage.
const STORAGE: Duration = Duration::from_secs(25);
/// Bytes of the longest answer that is read.
const MOST: u64 = 16 << 20;
/// Hosts that may have one resource: more than a lockspace has.
const HOSTS: i32 = 4096;

/// Why there is no good answer.
#[derive(Debug)]
pub(super) enum Trouble {
    /// The request to the daemon failed.
    Failed(Failure),
    /// sanlock has answered with this number: that of an error of the system, or of `sanlock_rv.h`, below zero.
    Refused(i32),
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Trouble {
        Trouble::Failed(failure)
    }
}

/// Hosts that have a resource, as the storage says.
#[derive(Debug)]
pub(super) struct ResourceOwners {
    /// How often it was taken.
    pub(super) version: u64,
    /// One, unless it is shared.
    pub(super) hosts: Vec<SanlkHost>,
}

/// A daemon.
#[derive(Clone, Debug)]
pub(super) struct Daemon {
    pub(super) socket: PathBuf,
}

impl Daemon {
    /// This host's.
    pub(super) fn here() -> Daemon {
        let folder = std::env::var_os("SANLOCK_RUN_DIR").map_or(FOLDER.into(), PathBuf::from);
        Daemon {
            socket: folder.join("sanlock.sock"),
        }
    }

    /// All that it has in memory, without any I/O of its own.
    pub(super) fn state(&self) -> Result<DaemonState, Failure> {
        let mut connection = self.connect(SOON)?;
        let header = MessageHeader {
            // The most that there is to say.
            data: 0,
            ..MessageHeader::new(SanlockCommand::Status, 0, 0)
        };
        connection.send(&[header.as_bytes()])?;
        connection.header(SanlockCommand::Status)?;
        let told = connection.rest()?;
        DaemonState::read(&told).map_err(|why| self.strange(why))
    }

    /// Takes a resource for this host, or finds that the host has it. It stays the host's when the connection ends,
    /// which it does at once.
    pub(super) fn acquire(&self, of: &SanlockResource) -> Result<(), Trouble> {
        let mut connection = self.registered()?;
        connection.acquire(of)
    }

    /// Gives a resource of this host up, which is on storage when this returns.
    pub(super) fn release(&self, of: &SanlockResource) -> Result<(), Trouble> {
        let mut connection = self.registered()?;
        // A resource that the host has without a process becomes this connection's.
        connection.acquire(of)?;
        let (resource, _) = Resource::new(of, 0);
        let header = MessageHeader::new(SanlockCommand::Release, 0, size_of::<Resource>());
        let header = MessageHeader { data: 1, ..header };
        connection.send(&[header.as_bytes(), resource.as_bytes()])?;
        connection.result(SanlockCommand::Release).map(drop)
    }

    /// The host has a resource no longer, whatever its storage does. True if it had it.
    pub(super) fn let_go(&self, of: &SanlockResource) -> Result<bool, Trouble> {
        let mut connection = self.registered()?;
        let (resource, _) = Resource::new(of, 0);
        let flags = wire::RELEASE_ORPHAN;
        let header = MessageHeader::new(SanlockCommand::Release, flags, size_of::<Resource>());
        let header = MessageHeader { data: 1, ..header };
        connection.send(&[header.as_bytes(), resource.as_bytes()])?;
        connection
            .result(SanlockCommand::Release)
            .map(|released| released.data > 0)
    }

    /// From now on the host does not leave a lockspace while it has a resource there.
    pub(super) fn stay(&self, lockspace: &str) -> Result<(), Trouble> {
        let mut connection = self.connect(SOON)?;
        let header = MessageHeader::new(SanlockCommand::SetConfig, 0, size_of::<Lockspace>());
        let header = MessageHeader {
            // CAST: it is small.
            data: wire::USED_BY_ORPHANS as i32,
            ..header
        };
        let lockspace = Lockspace::new(lockspace, 0);
        connection.send(&[header.as_bytes(), lockspace.as_bytes()])?;
        connection.result(SanlockCommand::SetConfig).map(drop)
    }

    /// Reads from storage who has a resource.
    pub(super) fn owners(&self, of: &SanlockResource) -> Result<ResourceOwners, Trouble> {
        let mut connection = self.connect(STORAGE)?;
        let (resource, disk) = Resource::new(of, 0);
        let behind = size_of::<Resource>() + size_of::<SanlkDisk>();
        let header = MessageHeader::new(SanlockCommand::ReadOwners, 0, behind);
        connection.send(&[header.as_bytes(), resource.as_bytes(), disk.as_bytes()])?;
        let count = connection.result(SanlockCommand::ReadOwners)?.data2;
        let resource: Resource = connection.read()?;
        let hosts = connection.hosts(count)?;
        Ok(ResourceOwners {
            version: resource.version,
            hosts,
        })
    }

    /// Returns the daemon's information about a host of a lockspace; nothing if it was not seen, or this host has not
    /// joined.
    pub(super) fn host(&self, lockspace: &str, host_id: u64) -> Result<Option<SanlkHost>, Failure> {
        let mut connection = self.connect(SOON)?;
        let header = MessageHeader::new(SanlockCommand::GetHosts, 0, size_of::<Lockspace>());
        let lockspace = Lockspace::new(lockspace, host_id);
        connection.send(&[header.as_bytes(), lockspace.as_bytes()])?;
        match connection.result(SanlockCommand::GetHosts) {
            Ok(header) => Ok(connection.hosts(header.data2)?.first().copied()),
            Err(Trouble::Refused(_)) => Ok(None),
            Err(Trouble::Failed(failure)) => Err(failure),
        }
    }

    /// The name that a host of a lockspace has given itself.
    pub(super) fn name(&self, lockspace: &str, host_id: u64) -> Result<Option<String>, Failure> {
        let mut connection = self.connect(SOON)?;
        let header = MessageHeader::new(SanlockCommand::HostStatus, 0, size_of::<Lockspace>());
        let lockspace = Lockspace::new(lockspace, 0);
        connection.send(&[header.as_bytes(), lockspace.as_bytes()])?;
        match connection.result(SanlockCommand::HostStatus) {
            Ok(_) => {
                let told = connection.rest()?;
                DaemonState::host_name(&told, host_id).map_err(|why| self.strange(why))
            }
            Err(Trouble::Refused(_)) => Ok(None),
            Err(Trouble::Failed(failure)) => Err(failure),
        }
    }

    /// A connection that may have resources. Should their lockspace be lost in the moment in which it has one, sanlock
    /// asks this process to end, and does not kill it.
    fn registered(&self) -> Result<DaemonConnection<'_>, Trouble> {
        let mut connection = self.connect(STORAGE)?;
        let register = MessageHeader::new(SanlockCommand::Register, 0, 0);
        let restrict = MessageHeader::new(SanlockCommand::Restrict, wire::NO_SIGKILL, 0);
        connection.send(&[register.as_bytes(), restrict.as_bytes()])?;
        connection.result(SanlockCommand::Restrict)?;
        Ok(connection)
    }

    fn connect(&self, limit: Duration) -> Result<DaemonConnection<'_>, Failure> {
        let connect = || {
            let stream = UnixStream::connect(&self.socket)?;
            stream.set_read_timeout(Some(limit))?;
            stream.set_write_timeout(Some(limit))?;
            Ok(stream)
        };
        let stream = connect().map_err(|error: io::Error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Failure::new(
                Code::System,
                format!(
                    "sanlock does not run: no process listens at {}: start it (systemctl start wdmd sanlock) and have this \
                     host join its lockspace",
                    self.socket.display()
                ),
            ),
            _ => self.failed("connect to", &error),
        })?;
        Ok(DaemonConnection {
            daemon: self,
            stream,
        })
    }

    /// Never says that the lease is gone: what the daemon does not say is not known.
    fn failed(&self, what: &str, error: &io::Error) -> Failure {
        Failure {
            code: Code::System,
            ..Failure::system(
                format!("cannot {what} sanlock at {}", self.socket.display()),
                error,
            )
        }
    }

    fn strange(&self, why: impl Into<String>) -> Failure {
        let socket = self.socket.display();
        let why = why.into();
        Failure::unsupported(format!(
            "the process at {socket} does not speak the protocol of sanlock 3.8: {why}"
        ))
    }
}

struct DaemonConnection<'d> {
    daemon: &'d Daemon,
    stream: UnixStream,
}

impl DaemonConnection<'_> {
    fn send(&mut self, parts: &[&[u8]]) -> Result<(), Failure> {
        self.stream
            .write_all(&parts.concat())
            .map_err(|error| self.daemon.failed("ask", &error))
    }

    fn read<T: FromBytes + IntoBytes>(&mut self) -> Result<T, Failure> {
        let mut value = T::new_zeroed();
        self.stream
            .read_exact(value.as_mut_bytes())
            .map_err(|error| self.daemon.failed("hear from", &error))?;
        Ok(value)
    }

    /// All until it closes the connection.
    fn rest(&mut self) -> Result<Vec<u8>, Failure> {
        let mut told = Vec::new();
        let mut bounded = (&self.stream).take(MOST);
        bounded
            .read_to_end(&mut told)
            .map_err(|error| self.daemon.failed("hear from", &error))?;
        Ok(told)
    }

    fn header(&mut self, of: SanlockCommand) -> Result<MessageHeader, Failure> {
        let header: MessageHeader = self.read()?;
        // CAST: the numbers are those of the daemon.
        if header.magic != wire::MAGIC || header.command != of as u32 {
            return Err(self
                .daemon
                .strange(format!("its answer to {of:?} is another one's")));
        }
        Ok(header)
    }

    fn result(&mut self, of: SanlockCommand) -> Result<MessageHeader, Trouble> {
        let header = self.header(of)?;
        match header.data {
            refused if refused < 0 => Err(Trouble::Refused(refused)),
            _ => Ok(header),
        }
    }

    fn hosts(&mut self, count: i32) -> Result<Vec<SanlkHost>, Failure> {
        if !(0..=HOSTS).contains(&count) {
            let why = format!("it knows {count} hosts");
            return Err(self.daemon.strange(why));
        }
        (0..count).map(|_| self.read()).collect()
    }

    fn acquire(&mut self, of: &SanlockResource) -> Result<(), Trouble> {
        let (resource, disk) = Resource::new(of, wire::PERSISTENT);
        let options = wire::no_options();
        let parts = [resource.as_bytes(), disk.as_bytes(), options.as_bytes()];
        let behind = parts.iter().map(|part| part.len()).sum();
        let flags = wire::ORPHAN | wire::NO_WAIT;
        let header = MessageHeader {
            data: 1,
            ..MessageHeader::new(SanlockCommand::Acquire, flags, behind)
        };
        self.send(&[header.as_bytes(), parts[0], parts[1], parts[2]])?;
        self.result(SanlockCommand::Acquire).map(drop)
    }
}
