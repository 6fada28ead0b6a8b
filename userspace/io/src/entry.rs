// SPDX-License-Identifier: MIT OR Apache-2.0
//! Operations as entries of the submission queue.

use crate::{Data, Op, Opened, Region};
use io_uring::squeue::Entry;
use io_uring::{opcode, types};
use std::os::fd::AsRawFd;
use std::rc::Rc;

/// `BLOCK_URING_CMD_DISCARD` of the kernel: `_IO(0x12, 0)`.
const DISCARD: u32 = 0x1200;
/// The largest piece that one fixed read or write may have.
const MAX_LEN: usize = 1 << 30;

/// Makes entries.
#[derive(Debug)]
pub(crate) struct Entries {
    /// Region whose pages the ring has pinned, as its buffer 0.
    pub(crate) registered: Option<Rc<Region>>,
    /// The kernel knows vectors of a registered buffer.
    vectors: bool,
}

/// Form in which data is passed to the kernel.
enum TransferForm {
    /// One piece of the registered region.
    Fixed { place: *mut u8, len: u32 },
    /// Several pieces of it.
    FixedVector,
    /// Any pieces.
    Vector,
}

impl Entries {
    pub(crate) fn new(vectors: bool) -> Self {
        Self {
            registered: None,
            vectors,
        }
    }

    /// The entry of an operation; `vector` says where its data is.
    pub(crate) fn entry(&self, op: &Op, vector: &[libc::iovec]) -> Entry {
        match op {
            Op::Read { file, offset, data } => self.read(file, *offset, data, vector),
            Op::Write {
                file,
                offset,
                data,
                durable,
            } => self.write(file, *offset, data.data(), *durable, vector),
            Op::Sync { file } => opcode::Fsync::new(types::Fd(file.as_raw_fd()))
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Op::Zero {
                file,
                offset,
                len,
                hole,
            } => opcode::Fallocate::new(types::Fd(file.as_raw_fd()), *len)
                .offset(*offset)
                .mode(crate::sync::zero_mode(*hole))
                .build(),
            Op::Discard { file, offset, len } => {
                let mut argument = [0; 16];
                argument[..8].copy_from_slice(&len.to_ne_bytes());
                opcode::UringCmd16::new(types::Fd(file.as_raw_fd()), DISCARD)
                    .addr(Some(*offset))
                    .cmd(argument)
                    .build()
            }
            Op::Ready { fd, write } => {
                let events = if *write { libc::POLLOUT } else { libc::POLLIN };
                // CAST: the constants are small.
                opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), events as u32).build()
            }
            Op::Command {
                fd,
                number,
                argument,
                ..
            } => opcode::UringCmd16::new(types::Fd(fd.as_raw_fd()), *number)
                .cmd(*argument)
                .build(),
        }
    }

    fn read(&self, file: &Opened, offset: u64, data: &Data, vector: &[libc::iovec]) -> Entry {
        let fd = types::Fd(file.as_raw_fd());
        // CAST: data has at most a few hundred pieces.
        let (pointer, count) = (vector.as_ptr(), vector.len() as u32);
        match self.way(data) {
            TransferForm::Fixed { place, len } => opcode::ReadFixed::new(fd, place, len, 0)
                .offset(offset)
                .build(),
            TransferForm::FixedVector => opcode::ReadvFixed::new(fd, pointer, count, 0)
                .offset(offset)
                .build(),
            TransferForm::Vector => opcode::Readv::new(fd, pointer, count)
                .offset(offset)
                .build(),
        }
    }

    fn write(
        &self,
        file: &Opened,
        offset: u64,
        data: &Data,
        durable: bool,
        vector: &[libc::iovec],
    ) -> Entry {
        let fd = types::Fd(file.as_raw_fd());
        let flags = crate::sync::write_flags(durable);
        // CAST: data has at most a few hundred pieces.
        let (pointer, count) = (vector.as_ptr(), vector.len() as u32);
        match self.way(data) {
            TransferForm::Fixed { place, len } => opcode::WriteFixed::new(fd, place, len, 0)
                .offset(offset)
                .rw_flags(flags)
                .build(),
            TransferForm::FixedVector => opcode::WritevFixed::new(fd, pointer, count, 0)
                .offset(offset)
                .rw_flags(flags)
                .build(),
            TransferForm::Vector => opcode::Writev::new(fd, pointer, count)
                .offset(offset)
                .rw_flags(flags)
                .build(),
        }
    }

    fn way(&self, data: &Data) -> TransferForm {
        let is_registered = |region| Rc::ptr_eq(region, data.region());
        if !self.registered.as_ref().is_some_and(is_registered) {
            return TransferForm::Vector;
        }
        match data.pieces() {
            [piece] if piece.len <= MAX_LEN => TransferForm::Fixed {
                place: data.region().place(piece.at, piece.len),
                // CAST: bounded above.
                len: piece.len as u32,
            },
            _ if self.vectors => TransferForm::FixedVector,
            _ => TransferForm::Vector,
        }
    }
}
