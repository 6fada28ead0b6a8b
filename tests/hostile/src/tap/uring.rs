// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Commands of io_uring to a node, right and wrong ones.

use super::TapNode;
use anyhow::{Context, Result};
use io_uring::{opcode, squeue, types, IoUring};
use ring::tap::abi::{ioctl, Buffer, Completion, Exchange};
use std::os::fd::AsRawFd;
use std::time::Duration;
use zerocopy::IntoBytes;

/// Room for tags in a command.
pub(crate) const ROOM: usize = 64;

/// The memory of a command. It is never freed, because the kernel may write there until the command has completed, and
/// the end of a ring does not wait for that.
pub(crate) struct CommandMemory {
    exchange: &'static Exchange,
    tags: *const [u16; ROOM],
}

impl CommandMemory {
    /// Returns the memory of a command that commits these and fetches.
    pub(crate) fn new(commits: &[Completion]) -> CommandMemory {
        let commits: &'static [Completion] = Vec::leak(commits.to_vec());
        let tags: *mut [u16; ROOM] = Box::into_raw(Box::new([0; ROOM]));
        let buffer = |addr, len: usize| Buffer {
            addr,
            len: len as u32,
            reserved: 0,
        };
        CommandMemory {
            exchange: Box::leak(Box::new(Exchange {
                commits: buffer(commits.as_ptr() as u64, commits.len()),
                tags: buffer(tags as u64, ROOM),
            })),
            tags,
        }
    }

    /// Returns the memory of a command that fetches at most `room` tags.
    pub(crate) fn with_room(room: u32) -> CommandMemory {
        assert!(room as usize <= ROOM);
        let mut memory = CommandMemory::new(&[]);
        memory.exchange = Box::leak(Box::new(Exchange {
            tags: Buffer {
                len: room,
                ..memory.exchange.tags
            },
            ..*memory.exchange
        }));
        memory
    }

    /// Returns the memory of a command whose tags go to an address of other memory.
    pub(crate) fn with_tags_at(address: u64) -> CommandMemory {
        let mut memory = CommandMemory::new(&[]);
        memory.exchange = Box::leak(Box::new(Exchange {
            tags: Buffer {
                addr: address,
                ..memory.exchange.tags
            },
            ..*memory.exchange
        }));
        memory
    }

    /// Returns the bytes for the submission queue entry.
    pub(crate) fn payload(&self) -> Buffer {
        Buffer {
            addr: std::ptr::from_ref(self.exchange) as u64,
            len: 1,
            reserved: 0,
        }
    }

    /// Returns the tags of a command that has completed with this result.
    pub(crate) fn tags(&self, result: i32) -> Result<Vec<u16>> {
        let count = usize::try_from(result).context("a command failed")?;
        // SAFETY: It was allocated by `new` and is never freed; the command has completed, so
        // that the kernel writes there no more.
        let tags = unsafe { self.tags.read_volatile() };
        Ok(tags[..count].to_vec())
    }
}

/// A ring of this thread.
pub(crate) struct Ring(IoUring);

impl Ring {
    pub(crate) fn new() -> Result<Ring> {
        Ok(Ring(IoUring::new(8).context("no io_uring")?))
    }

    /// Pins the whole arena for as long as the ring lives.
    pub(crate) fn register(&mut self, node: &TapNode) -> Result<()> {
        let bytes = node.arena().bytes();
        let piece = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        // SAFETY: The kernel holds the pages themselves, mapped here or not; no command uses them by their index.
        let registered = unsafe { self.0.submitter().register_buffers(&[piece]) };
        registered.context("the arena cannot be registered")
    }

    /// Sends an exchange.
    pub(crate) fn exchange(
        &mut self,
        node: &TapNode,
        memory: &CommandMemory,
        id: u64,
    ) -> Result<()> {
        self.command(node, ioctl::EXCHANGE, memory.payload(), id, false)
    }

    /// Sends any command; with `elsewhere` a thread of the kernel issues it.
    pub(crate) fn command(
        &mut self,
        node: &TapNode,
        number: u32,
        payload: Buffer,
        id: u64,
        elsewhere: bool,
    ) -> Result<()> {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(payload.as_bytes());
        let fd = types::Fd(node.file.as_raw_fd());
        let entry = opcode::UringCmd16::new(fd, number).cmd(bytes).build();
        let entry = entry.user_data(id);
        self.push(if elsewhere {
            entry.flags(squeue::Flags::ASYNC)
        } else {
            entry
        })
    }

    /// Tries to cancel a command.
    pub(crate) fn cancel(&mut self, target: u64, id: u64) -> Result<()> {
        self.push(opcode::AsyncCancel::new(target).build().user_data(id))
    }

    fn push(&mut self, entry: squeue::Entry) -> Result<()> {
        // SAFETY: What the entry points to is leaked memory, or nowhere.
        unsafe { self.0.submission().push(&entry) }.context("the ring is full")?;
        self.0.submit().context("cannot submit")?;
        Ok(())
    }

    /// Returns the next completion within a time: its identifier, and its result.
    pub(crate) fn next(&mut self, limit: Duration) -> Result<Option<(u64, i32)>> {
        if let Some(entry) = self.0.completion().next() {
            return Ok(Some((entry.user_data(), entry.result())));
        }
        let time = types::Timespec::from(limit);
        let arguments = types::SubmitArgs::new().timespec(&time);
        match self.0.submitter().submit_with_args(1, &arguments) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ETIME) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            Err(error) => return Err(error).context("cannot wait for a completion"),
        }
        let entry = self.0.completion().next();
        Ok(entry.map(|entry| (entry.user_data(), entry.result())))
    }
}
