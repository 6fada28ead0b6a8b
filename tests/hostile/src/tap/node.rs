// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The node of a tap disk as its process sees it.

use super::FileMapping;
use anyhow::{ensure, Context, Result};
use ring::tap::abi::{
    ioctl, Buffer, Claims, Completion, Desc, DiscardLimits, Exchange, Geometry, Info, ParamHead,
    TapSegment, FEATURES, FENCE_LOCAL, MMAP_ARENA, MMAP_DESCRIPTORS, OPERATIONS, PARAM_DISCARD,
    PARAM_GEOMETRY,
};
use std::fs::File;
use std::io::{self, Read};
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::AtomicU8;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Claims of an honest process.
pub(crate) const CLAIMS: Claims = Claims {
    size: size_of::<Claims>() as u32,
    fence: FENCE_LOCAL,
    operations: OPERATIONS,
    features: FEATURES,
    settle_ms: 0,
    reserved: 0,
};

/// Maximum number of tags that one exchange of these helpers takes.
const BATCH: usize = 64;

/// Sends an ioctl whose argument is a structure of the size that its number says.
pub(crate) fn call<T: FromBytes + IntoBytes>(
    file: &File,
    number: u32,
    argument: &mut T,
) -> io::Result<i32> {
    assert_eq!((number >> 16) & 0x3fff, size_of::<T>() as u32);
    // SAFETY: The kernel reads and writes as many bytes as the number says, and any are valid.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), number.into(), argument) };
    checked(result)
}

fn checked(result: i32) -> io::Result<i32> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// Sends an ioctl whose argument is at an invalid address.
pub(crate) fn call_nowhere(file: &File, number: u32, place: UnmappedAddresses) -> io::Result<i32> {
    // SAFETY: This program has no memory at these places.
    checked(unsafe { libc::ioctl(file.as_raw_fd(), number.into(), place.address()) })
}

/// Checks that a call fails with one of these errors, or succeeds if 0 is among them.
pub(crate) fn expect(what: &str, result: io::Result<impl Sized>, wanted: &[i32]) -> Result<()> {
    let got = result.err().and_then(|error| error.raw_os_error());
    let got = got.unwrap_or(0);
    ensure!(
        wanted.contains(&got),
        "{what}: error {got} instead of {wanted:?}"
    );
    Ok(())
}

/// An address at which the kernel may read and write.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Address<'a>(u64, PhantomData<&'a AtomicU8>);

impl<'a> Address<'a> {
    /// Returns the address of these bytes. A write of the kernel behind them must not reach other memory.
    pub(super) fn of(bytes: &'a [AtomicU8]) -> Address<'a> {
        Address(bytes.as_ptr() as u64, PhantomData)
    }
}

impl From<UnmappedAddresses> for Address<'_> {
    fn from(place: UnmappedAddresses) -> Self {
        Address(place.address(), PhantomData)
    }
}

/// Addresses at which this process has no memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UnmappedAddresses {
    /// The first page is never mapped.
    Null,
    /// A non-canonical part of the address space.
    NonCanonical,
    /// The address space of the kernel.
    Kernel,
    /// An array that begins here wraps around.
    End,
}

impl UnmappedAddresses {
    pub(crate) const ALL: [UnmappedAddresses; 4] = [
        UnmappedAddresses::Null,
        UnmappedAddresses::NonCanonical,
        UnmappedAddresses::Kernel,
        UnmappedAddresses::End,
    ];

    pub(crate) fn address(self) -> u64 {
        match self {
            UnmappedAddresses::Null => 0x10,
            UnmappedAddresses::NonCanonical => 0x8000_0000_0000_0000,
            UnmappedAddresses::Kernel => 0xffff_8880_0000_0000,
            UnmappedAddresses::End => u64::MAX - 7,
        }
    }
}

/// Returns the records that describe a disk of this size, with `GEOMETRY_*`.
pub(crate) fn records(sectors: u64, flags: u32) -> Vec<u8> {
    let geometry = Geometry {
        sectors,
        logical_block: 512,
        physical_block: 4096,
        flags,
        reserved: 0,
    };
    let discard = DiscardLimits {
        granularity: 4096,
        alignment: 0,
        secure: 0,
        reserved: 0,
    };
    let record = |kind, body: &[u8]| {
        let head = ParamHead {
            kind,
            len: body.len() as u32,
        };
        [head.as_bytes(), body].concat()
    };
    let records = [
        record(PARAM_GEOMETRY, geometry.as_bytes()),
        record(PARAM_DISCARD, discard.as_bytes()),
    ];
    records.concat()
}

/// An open node.
pub(crate) struct TapNode {
    pub(crate) file: File,
    pub(crate) info: Info,
    descriptors: FileMapping,
    arena: FileMapping,
}

impl TapNode {
    /// Opens a node and maps its areas.
    pub(crate) fn open(path: &Path) -> Result<TapNode> {
        TapNode::of(TapNode::file(path, 0)?)
    }

    /// Maps the areas of an open node.
    pub(crate) fn of(file: File) -> Result<TapNode> {
        let mut info = Info::default();
        call(&file, ioctl::INFO, &mut info).context("a node says nothing of itself")?;
        let (descriptors, arena) = (info.descriptors_len as usize, info.arena_len as usize);
        let both = libc::PROT_READ | libc::PROT_WRITE;
        let shared = libc::MAP_SHARED;
        let map =
            |offset, len, protection| FileMapping::new(&file, offset, len, protection, shared);
        Ok(TapNode {
            descriptors: map(MMAP_DESCRIPTORS, descriptors, libc::PROT_READ)
                .context("the descriptors cannot be mapped")?,
            arena: map(MMAP_ARENA, arena, both).context("the arena cannot be mapped")?,
            info,
            file,
        })
    }

    /// Only opens it, with these `O_*` flags in addition.
    pub(crate) fn file(path: &Path, flags: i32) -> io::Result<File> {
        let mut options = File::options();
        options
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)
    }

    /// Describes a disk of this size, with `GEOMETRY_*`.
    pub(crate) fn describe(&self, sectors: u64, flags: u32) -> io::Result<()> {
        self.set_params(&records(sectors, flags))
    }

    /// Describes the disk with any bytes.
    pub(crate) fn set_params(&self, records: &[u8]) -> io::Result<()> {
        self.set_params_at(records.as_ptr() as u64, records.len() as u32)
    }

    /// Describes the disk with an argument that may point anywhere, because the kernel only reads there.
    pub(crate) fn set_params_at(&self, addr: u64, len: u32) -> io::Result<()> {
        let mut buffer = Buffer {
            addr,
            len,
            reserved: 0,
        };
        call(&self.file, ioctl::SET_PARAMS, &mut buffer).map(drop)
    }

    /// Sends an ioctl whose argument is at an invalid address.
    pub(crate) fn call_nowhere(&self, number: u32, place: UnmappedAddresses) -> io::Result<i32> {
        call_nowhere(&self.file, number, place)
    }

    /// Sends claims of any bytes that begin with their size, beyond which the kernel does not read.
    pub(crate) fn claim_bytes(&self, bytes: &[u8]) -> io::Result<()> {
        let size = bytes.first_chunk().map(|size| u32::from_ne_bytes(*size));
        assert_eq!(size, u32::try_from(bytes.len()).ok());
        // SAFETY: The kernel reads as many bytes as the first four give.
        let result =
            unsafe { libc::ioctl(self.file.as_raw_fd(), ioctl::CLAIM.into(), bytes.as_ptr()) };
        checked(result).map(drop)
    }

    /// Sends the claims.
    pub(crate) fn claim(&self, claims: &Claims) -> io::Result<()> {
        self.claim_bytes(claims.as_bytes())
    }

    /// Claims as an honest process does, and starts delivery.
    pub(crate) fn start(&self) -> io::Result<()> {
        self.claim(&CLAIMS)?;
        self.start_unclaimed()
    }

    /// Starts delivery without a claim.
    pub(crate) fn start_unclaimed(&self) -> io::Result<()> {
        self.call_nowhere(ioctl::START, UnmappedAddresses::Null)
            .map(drop)
    }

    /// Returns its current state.
    pub(crate) fn ask(&self) -> io::Result<Info> {
        let mut info = Info::default();
        call(&self.file, ioctl::INFO, &mut info)?;
        Ok(info)
    }

    /// Commits, then fetches waiting requests.
    pub(crate) fn exchange(&self, commits: &[Completion]) -> io::Result<Vec<u16>> {
        let mut tags = [0u16; BATCH];
        let mut exchange = Exchange {
            commits: Buffer {
                addr: commits.as_ptr() as u64,
                len: commits.len() as u32,
                reserved: 0,
            },
            tags: Buffer {
                addr: tags.as_mut_ptr() as u64,
                len: BATCH as u32,
                reserved: 0,
            },
        };
        let count = call(&self.file, ioctl::EXCHANGE, &mut exchange)?;
        Ok(tags[..count as usize].to_vec())
    }

    /// Commits without fetching.
    pub(crate) fn commit(&self, commits: &[Completion]) -> io::Result<()> {
        let mut exchange = Exchange {
            commits: Buffer {
                addr: commits.as_ptr() as u64,
                len: commits.len() as u32,
                reserved: 0,
            },
            tags: Buffer::default(),
        };
        call(&self.file, ioctl::EXCHANGE, &mut exchange).map(drop)
    }

    /// Makes an exchange with arrays at an invalid address or at an edge, with any length.
    pub(crate) fn exchange_at<'a>(
        &self,
        commits: (impl Into<Address<'a>>, u32),
        tags: (impl Into<Address<'a>>, u32),
    ) -> io::Result<i32> {
        let buffer = |address: Address<'_>, len| Buffer {
            addr: address.0,
            len,
            reserved: 0,
        };
        let mut exchange = Exchange {
            commits: buffer(commits.0.into(), commits.1),
            tags: buffer(tags.0.into(), tags.1),
        };
        call(&self.file, ioctl::EXCHANGE, &mut exchange)
    }

    /// Sleeps until there are tags, and reads them.
    pub(crate) fn read(&self) -> io::Result<Vec<u16>> {
        self.read_into(&mut [0u8; 2 * BATCH])
    }

    /// Reads tags into this memory.
    pub(crate) fn read_into(&self, bytes: &mut [u8]) -> io::Result<Vec<u16>> {
        let count = (&self.file).read(bytes)?;
        let tags = bytes[..count].chunks_exact(2);
        Ok(tags
            .map(|tag| u16::from_ne_bytes([tag[0], tag[1]]))
            .collect())
    }

    /// Returns the descriptor of a tag.
    pub(crate) fn desc(&self, tag: u16) -> Result<Desc> {
        self.entry(usize::from(tag) * size_of::<Desc>())
    }

    /// Returns the pieces of the arena of a request.
    pub(crate) fn segments(&self, desc: &Desc) -> Result<Vec<TapSegment>> {
        let stride = self.info.max_segments as usize * size_of::<TapSegment>();
        let start = self.info.segments_offset as usize + usize::from(desc.tag) * stride;
        let at = |index| start + usize::from(index) * size_of::<TapSegment>();
        (0..desc.segments)
            .map(|index| self.entry(at(index)))
            .collect()
    }

    fn entry<T: FromBytes + IntoBytes + Immutable>(&self, offset: usize) -> Result<T> {
        let mut value = T::new_zeroed();
        self.descriptors.read(offset, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Returns the arena.
    pub(crate) fn arena(&self) -> &FileMapping {
        &self.arena
    }

    /// Returns the descriptor area.
    pub(crate) fn descriptors(&self) -> &FileMapping {
        &self.descriptors
    }
}
