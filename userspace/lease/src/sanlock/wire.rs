// SPDX-License-Identifier: MIT OR Apache-2.0
//! Messages on the socket of sanlock's daemon: structures of C, in the byte order of the host.
//!
//! The structures are those of `sanlock_sock.h`, `sanlock.h` and `sanlock_resource.h`, which libsanlock and the daemon
//! share. The daemon refuses another magic number and a later protocol.

use control::SanlockResource;
use zerocopy::FromZeros;
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `SM_MAGIC`.
pub(super) const MAGIC: u32 = 0x0428_2010;
/// `SM_PROTO`; the upper half must not be later than the daemon's.
pub(super) const PROTOCOL: u32 = 1;
/// Bytes of a name; a zero behind it is not needed.
const NAME: usize = 48;
/// Bytes of a path with the zero behind it.
const PATH: usize = 1024;

/// `SM_CMD_REGISTER` and its like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum SanlockCommand {
    Register = 1,
    Status = 5,
    Acquire = 7,
    Release = 8,
    Restrict = 10,
    HostStatus = 15,
    GetHosts = 23,
    ReadOwners = 24,
    SetConfig = 33,
}

/// `SANLK_RES_PERSISTENT`: of a resource, that it stays the host's when its process ends.
pub(super) const PERSISTENT: u32 = 8;
/// `SANLK_ACQUIRE_ORPHAN`: also if the host has it, and no process.
pub(super) const ORPHAN: u32 = 2;
/// `SANLK_ACQUIRE_OWNER_NOWAIT`: say at once that its host may be dead.
pub(super) const NO_WAIT: u32 = 8;
/// `SANLK_REL_ORPHAN`: what the host has, and no process.
pub(super) const RELEASE_ORPHAN: u32 = 4;
/// `SANLK_RESTRICT_SIGKILL`: who is registered gets SIGTERM in its place.
pub(super) const NO_SIGKILL: u32 = 2;
/// `SANLK_CONFIG_USED_BY_ORPHANS`: the host does not leave the lockspace while it has a resource.
pub(super) const USED_BY_ORPHANS: u32 = 4;

/// `struct sm_header`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct MessageHeader {
    pub(super) magic: u32,
    pub(super) version: u32,
    pub(super) command: u32,
    pub(super) flags: u32,
    /// Bytes, this header included.
    pub(super) length: u32,
    pub(super) sequence: u32,
    /// Of an answer the result.
    pub(super) data: i32,
    /// Of an answer a count; of a question which process is meant, and -1 for who asks.
    pub(super) data2: i32,
}

/// `struct sanlk_disk`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct SanlkDisk {
    path: [u8; PATH],
    pub(super) offset: u64,
    pad: [u32; 2],
}

/// `struct sanlk_resource`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Resource {
    lockspace: [u8; NAME],
    name: [u8; NAME],
    /// How often it was taken.
    pub(super) version: u64,
    data64: u64,
    data32: u32,
    unused: u32,
    pub(super) flags: u32,
    /// How many [`SanlkDisk`]s follow.
    pub(super) disks: u32,
}

/// `struct sanlk_options`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Options {
    owner: [u8; NAME],
    flags: u32,
    length: u32,
}

/// `struct sanlk_lockspace`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Lockspace {
    name: [u8; NAME],
    pub(super) host_id: u64,
    flags: u32,
    pad: u32,
    disk: SanlkDisk,
}

/// `struct sanlk_host`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct SanlkHost {
    pub(super) host_id: u64,
    pub(super) generation: u64,
    /// Seconds of its own clock.
    pub(super) timestamp: u64,
    pub(super) io_timeout: u32,
    pub(super) flags: u32,
}

/// `struct sanlk_state`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct SanlkState {
    pub(super) kind: u32,
    flags: u32,
    pub(super) number: u32,
    pad: u32,
    pub(super) long: u64,
    name: [u8; NAME],
    /// Bytes of the words that follow.
    pub(super) length: u32,
    pad2: u32,
}

/// Kinds of a [`SanlkState`], as `SANLK_STATE_DAEMON` and its like.
pub(super) const OF_DAEMON: u32 = 1;
pub(super) const OF_LOCKSPACE: u32 = 3;
pub(super) const OF_RESOURCE: u32 = 4;
pub(super) const OF_HOST: u32 = 5;

impl MessageHeader {
    /// A question with so many bytes behind it.
    pub(super) fn new(command: SanlockCommand, flags: u32, behind: usize) -> MessageHeader {
        MessageHeader {
            magic: MAGIC,
            version: PROTOCOL,
            // CAST: the numbers are those of the daemon.
            command: command as u32,
            flags,
            length: u32::try_from(size_of::<MessageHeader>() + behind).unwrap_or(u32::MAX),
            sequence: 0,
            data: 0,
            data2: -1,
        }
    }
}

impl Resource {
    /// The resource, and where it is.
    pub(super) fn new(of: &SanlockResource, flags: u32) -> (Resource, SanlkDisk) {
        let mut disk = SanlkDisk::new_zeroed();
        disk.offset = of.offset;
        let path = of.path.as_os_str().as_encoded_bytes();
        // One byte stays, for the zero.
        let (room, bytes) = (PATH - 1, path.len());
        disk.path[..bytes.min(room)].copy_from_slice(&path[..bytes.min(room)]);
        let resource = Resource {
            lockspace: named(&of.lockspace),
            name: named(&of.name),
            flags,
            disks: 1,
            ..Resource::new_zeroed()
        };
        (resource, disk)
    }

    /// Returns true if the resource has these names.
    pub(super) fn is(&self, of: &SanlockResource) -> bool {
        (self.lockspace, self.name) == (named(&of.lockspace), named(&of.name))
    }
}

impl Lockspace {
    /// A lockspace, and one of its hosts or all.
    pub(super) fn new(name: &str, host_id: u64) -> Lockspace {
        Lockspace {
            name: named(name),
            host_id,
            ..Lockspace::new_zeroed()
        }
    }
}

impl SanlkState {
    /// Returns the name of the object whose state this is.
    pub(super) fn name(&self) -> String {
        let end = self.name.iter().position(|byte| *byte == 0);
        String::from_utf8_lossy(&self.name[..end.unwrap_or(NAME)]).into_owned()
    }
}

/// A name as it stands in a structure. The reader of a name has checked its length.
fn named(name: &str) -> [u8; NAME] {
    let mut bytes = [0; NAME];
    let length = name.len().min(NAME);
    bytes[..length].copy_from_slice(&name.as_bytes()[..length]);
    bytes
}

/// All options at their defaults.
pub(super) fn no_options() -> Options {
    Options::new_zeroed()
}

#[cfg(any(test, feature = "fake"))]
impl Resource {
    /// Returns the resource with the number of times that it was taken.
    pub(super) fn taken(self, version: u64) -> Resource {
        Resource { version, ..self }
    }

    /// Its names.
    pub(super) fn names(&self) -> ([u8; NAME], [u8; NAME]) {
        (self.lockspace, self.name)
    }
}

#[cfg(any(test, feature = "fake"))]
impl SanlkState {
    /// Makes the state of an object, as a daemon sends it.
    pub(super) fn new(kind: u32, name: &str, long: u64, number: u32, length: u32) -> SanlkState {
        SanlkState {
            kind,
            number,
            long,
            name: named(name),
            length,
            ..SanlkState::new_zeroed()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Lockspace, MessageHeader, Options, Resource, SanlkDisk, SanlkHost, SanlkState};

    #[test]
    fn structures_are_as_large_as_those_of_c() {
        assert_eq!(size_of::<MessageHeader>(), 32);
        assert_eq!(size_of::<SanlkDisk>(), 1040);
        assert_eq!(size_of::<Resource>(), 128);
        assert_eq!(size_of::<Options>(), 56);
        assert_eq!(size_of::<Lockspace>(), 1104);
        assert_eq!(size_of::<SanlkHost>(), 32);
        assert_eq!(size_of::<SanlkState>(), 80);
    }
}
