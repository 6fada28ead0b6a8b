// SPDX-License-Identifier: MIT OR Apache-2.0
//! The node of a disk: the calls that the kernel has for it.

use diskio::{MappingAccess, Region};
use ring::tap::abi::{ioctl as numbers, Buffer, Claims, Completion, Exchange, Info, MapOp, Maps};
use ring::tap::abi::{MMAP_ARENA, MMAP_DESCRIPTORS};
use rustix::ioctl::{ioctl, Getter, Ioctl, IoctlOutput, NoArg, Opcode, Setter, Updater};
use static_assertions::{assert_impl_all, assert_not_impl_any};
use std::ffi::c_void;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

/// Interface of a node for a process. The kernel's is [`KernelNode`]; tests have one of their own.
pub trait Node: std::fmt::Debug {
    /// Returns the node's properties and the places of its areas.
    fn info(&self) -> io::Result<Info>;

    /// Maps the descriptor area (read only) and the arena.
    fn map(&self, info: &Info) -> io::Result<(Region, Region)>;

    /// Describes the disk by records of `SET_PARAMS`.
    fn set_params(&self, records: &[u8]) -> io::Result<()>;

    /// Says what the process can do; only if [`FEATURE_CLAIM`](ring::tap::abi::FEATURE_CLAIM) is there.
    fn claim(&self, claims: &Claims) -> io::Result<()>;

    /// Asks for requests from now on.
    fn start(&self) -> io::Result<()>;

    /// Commits, then fetches at most as many tags as there is room for, without waiting. Returns
    /// how many it fetched.
    fn exchange(&self, commits: &[Completion], tags: &mut [u16]) -> io::Result<usize>;

    /// Changes the mappings of the disk in this order, and says how they are then; only if
    /// [`FEATURE_MAPS`](ring::tap::abi::FEATURE_MAPS) was claimed, and after the start. A recall waits.
    fn maps(&self, ops: &[MapOp]) -> io::Result<Maps> {
        self.mapper()?.maps(ops)
    }

    /// Returns the mappings' interface for another thread, which can wait. As long as it is there the node is not given
    /// back.
    fn mapper(&self) -> io::Result<Arc<dyn Mapper>>;

    /// Can be read while there is something to fetch.
    fn fd(&self) -> &Rc<OwnedFd>;
}

/// Changes the mappings of a disk, in whatever thread.
pub trait Mapper: std::fmt::Debug + Send + Sync {
    /// See [`Node::maps`].
    fn maps(&self, ops: &[MapOp]) -> io::Result<Maps>;
}

/// A node of the kernel, open. When the last copy of its descriptor is closed, this process is gone
/// in the eyes of the kernel.
#[derive(Debug)]
pub struct KernelNode {
    fd: Rc<OwnedFd>,
}

impl KernelNode {
    /// The node behind `fd`, opened for reading and writing by whoever may.
    pub fn new(fd: OwnedFd) -> Self {
        Self { fd: Rc::new(fd) }
    }
}

impl Node for KernelNode {
    fn info(&self) -> io::Result<Info> {
        // SAFETY: INFO writes an `Info`, as its number encodes, and nothing else; every pattern of
        // bytes is one.
        let argument = unsafe { Getter::<{ numbers::INFO }, Info>::new() };
        // SAFETY: whatever file this is, the argument is memory of the size that the number encodes.
        Ok(unsafe { ioctl(&self.fd, argument) }?)
    }

    fn map(&self, info: &Info) -> io::Result<(Region, Region)> {
        let len = |bytes: u64| usize::try_from(bytes).map_err(|_| io::ErrorKind::OutOfMemory);
        let map = |offset, bytes, access| Region::map(self.fd.as_fd(), offset, bytes, access);
        let descriptors = map(
            MMAP_DESCRIPTORS,
            len(info.descriptors_len)?,
            MappingAccess::Read,
        )?;
        let arena = map(MMAP_ARENA, len(info.arena_len)?, MappingAccess::Write)?;
        Ok((descriptors, arena))
    }

    fn set_params(&self, records: &[u8]) -> io::Result<()> {
        let buffer = buffer(records.as_ptr() as u64, records.len())?;
        // SAFETY: SET_PARAMS reads a `Buffer`, as its number encodes, and the bytes that it names,
        // which `records` has; it writes nothing.
        let argument = unsafe { Setter::<{ numbers::SET_PARAMS }, _>::new(buffer) };
        // SAFETY: whatever file this is, the argument is memory of the size that the number encodes.
        Ok(unsafe { ioctl(&self.fd, argument) }?)
    }

    fn claim(&self, claims: &Claims) -> io::Result<()> {
        let claims = Claims {
            // CAST: it is small.
            size: size_of::<Claims>() as u32,
            ..*claims
        };
        // SAFETY: CLAIM reads as many bytes as `size` says, which are those of the structure, and
        // writes nothing.
        let argument = unsafe { Setter::<{ numbers::CLAIM }, _>::new(claims) };
        // SAFETY: whatever file this is, it gets readable memory of this process that is not used afterwards.
        Ok(unsafe { ioctl(&self.fd, argument) }?)
    }

    fn start(&self) -> io::Result<()> {
        // SAFETY: START has no argument.
        let argument = unsafe { NoArg::<{ numbers::START }>::new() };
        // SAFETY: whatever file this is, there is no argument.
        Ok(unsafe { ioctl(&self.fd, argument) }?)
    }

    fn exchange(&self, commits: &[Completion], tags: &mut [u16]) -> io::Result<usize> {
        let argument = Exchanging::new(commits, tags)?;
        // SAFETY: whatever file this is, the argument is memory of the size that the number encodes.
        Ok(unsafe { ioctl(&self.fd, argument) }?)
    }

    fn mapper(&self) -> io::Result<Arc<dyn Mapper>> {
        let fd = self.fd.try_clone()?;
        Ok(Arc::new(KernelMapper { fd }))
    }

    fn fd(&self) -> &Rc<OwnedFd> {
        &self.fd
    }
}

/// The mappings of a disk of the kernel.
#[derive(Debug)]
struct KernelMapper {
    fd: OwnedFd,
}

impl Mapper for KernelMapper {
    fn maps(&self, ops: &[MapOp]) -> io::Result<Maps> {
        let mut maps = Maps {
            ops: buffer(ops.as_ptr() as u64, ops.len())?,
            ..Maps::default()
        };
        // SAFETY: MAP reads and writes a `Maps`, as its number encodes, and reads the operations that it
        // names, which `ops` has; every pattern of bytes is a `Maps`.
        let argument = unsafe { Updater::<{ numbers::MAP }, _>::new(&mut maps) };
        // SAFETY: whatever file this is, the argument is memory of the size that the number encodes.
        unsafe { ioctl(&self.fd, argument) }?;
        Ok(maps)
    }
}

/// An array for the kernel: where it is, and how many entries or bytes it has.
fn buffer(addr: u64, len: usize) -> io::Result<Buffer> {
    Ok(Buffer {
        addr,
        len: u32::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?,
        reserved: 0,
    })
}

// When its last copy is closed the node is given back: all copies belong to one thread. Mappings are changed by another.
assert_not_impl_any!(KernelNode: Send, Sync);
assert_impl_all!(KernelMapper: Send, Sync);

/// The arguments of an exchange, and the memory that they name.
struct Exchanging<'a> {
    exchange: Exchange,
    memory: PhantomData<(&'a [Completion], &'a mut [u16])>,
}

impl<'a> Exchanging<'a> {
    fn new(commits: &'a [Completion], tags: &'a mut [u16]) -> io::Result<Self> {
        Ok(Self {
            exchange: Exchange {
                commits: buffer(commits.as_ptr() as u64, commits.len())?,
                tags: buffer(tags.as_mut_ptr() as u64, tags.len())?,
            },
            memory: PhantomData,
        })
    }
}

// SAFETY: EXCHANGE reads an `Exchange`, which `as_ptr` points to, and the completions that it names, and writes at most
// as many tags as it names; both belong to the borrows that this type holds. The result is the kernel's number.
unsafe impl Ioctl for Exchanging<'_> {
    type Output = usize;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        numbers::EXCHANGE
    }

    fn as_ptr(&mut self) -> *mut c_void {
        (&raw mut self.exchange).cast()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<usize> {
        usize::try_from(out).map_err(|_| rustix::io::Errno::RANGE)
    }
}
