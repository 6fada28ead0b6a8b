// SPDX-License-Identifier: MIT OR Apache-2.0
//! Operations by plain calls, and `poll` for what waits for a descriptor.

#[cfg(feature = "fake")]
use crate::op::{Decide, OperationFate};
use crate::table::SlotTable;
use crate::Op;
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Bits of `fallocate`.
pub(crate) fn zero_mode(hole: bool) -> i32 {
    libc::FALLOC_FL_KEEP_SIZE
        | match hole {
            true => libc::FALLOC_FL_PUNCH_HOLE,
            false => libc::FALLOC_FL_ZERO_RANGE,
        }
}

/// Flags of a write.
pub(crate) fn write_flags(durable: bool) -> i32 {
    match durable {
        true => libc::RWF_DSYNC,
        false => 0,
    }
}

/// Executes queued operations; with `wait`, waits for a descriptor if there were none. Returns the number of system
/// calls.
pub(crate) fn enter(
    table: &mut SlotTable,
    wait: bool,
    #[cfg(feature = "fake")] decide: Option<&Decide>,
) -> io::Result<u64> {
    let before = table.finished();
    cancel(table);
    let mut calls = 0;
    #[cfg(feature = "fake")]
    let mut later = Vec::new();
    while let Some(index) = table.next_queued() {
        let Some((op, vector)) = table.start(index) else {
            continue;
        };
        #[cfg(feature = "fake")]
        match decided(decide, op) {
            OperationFate::Execute => {}
            OperationFate::Fail(error) => {
                table.finish(index, -error.raw_os_error());
                continue;
            }
            OperationFate::Later => {
                later.push(index);
                continue;
            }
        }
        if let Some(result) = execute(op, vector) {
            calls += 1;
            table.finish(index, result);
        }
    }
    #[cfg(feature = "fake")]
    let wait = wait && later.is_empty();
    #[cfg(feature = "fake")]
    for index in later.into_iter().rev() {
        table.unqueue(index);
    }
    let wait = wait && table.finished() == before;
    Ok(calls + look(table, None, wait)?)
}

#[cfg(feature = "fake")]
fn decided(decide: Option<&Decide>, op: &Op) -> OperationFate {
    match (decide, op) {
        (None, _) | (_, Op::Ready { .. } | Op::Command { .. }) => OperationFate::Execute,
        (Some(decide), op) => decide(op),
    }
}

/// Ends waits for descriptors, which this engine can do at once.
pub(crate) fn cancel(table: &mut SlotTable) {
    for index in table.take_cancels() {
        if table.waiting().any(|(waiting, _, _)| waiting == index) {
            table.finish(index, -libc::ECANCELED);
        }
    }
}

/// Looks at the descriptors that something waits for, and at `also`; with `wait`, until one of
/// them is ready. Returns the number of system calls.
pub(crate) fn look(
    table: &mut SlotTable,
    also: Option<BorrowedFd<'_>>,
    wait: bool,
) -> io::Result<u64> {
    let (waiting, mut fds): (Vec<usize>, Vec<PollFd<'_>>) = table
        .waiting()
        .map(|(index, fd, write)| {
            let events = if write { PollFlags::OUT } else { PollFlags::IN };
            (index, PollFd::from_borrowed_fd(fd, events))
        })
        .unzip();
    fds.extend(also.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
    if fds.is_empty() {
        return Ok(0);
    }
    let none = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    match poll(&mut fds, (!wait).then_some(&none)) {
        Ok(_) => {}
        Err(rustix::io::Errno::INTR) => return Ok(1),
        Err(error) => return Err(error.into()),
    }
    let ready: Vec<(usize, i32)> = waiting
        .into_iter()
        .zip(&fds)
        .filter(|(_, fd)| !fd.revents().is_empty())
        .map(|(index, fd)| (index, i32::from(fd.revents().bits())))
        .collect();
    for (index, events) in ready {
        table.finish(index, events);
    }
    Ok(1)
}

/// The result of an operation; `None` if it waits for a descriptor.
pub(crate) fn execute(op: &Op, vector: &[libc::iovec]) -> Option<i32> {
    let result = match op {
        Op::Read { file, offset, .. } => {
            // CAST: data has at most a few hundred pieces; offsets of files are below 2^63.
            let (count, offset) = (vector.len() as i32, *offset as i64);
            // SAFETY: the vector names memory that the operation owns, and it is writable: reads
            // into a region that is not would fail with EFAULT.
            unsafe { libc::preadv(file.as_raw_fd(), vector.as_ptr(), count, offset) }
        }
        Op::Write {
            file,
            offset,
            durable,
            ..
        } => {
            // CAST: as above.
            let (count, offset) = (vector.len() as i32, *offset as i64);
            let flags = write_flags(*durable);
            // SAFETY: the vector names memory that the operation owns.
            unsafe { libc::pwritev2(file.as_raw_fd(), vector.as_ptr(), count, offset, flags) }
        }
        Op::Sync { file } => return Some(code(rustix::fs::fdatasync(file))),
        Op::Zero {
            file,
            offset,
            len,
            hole,
        } => {
            // CAST: the bits are those of the kernel.
            let mode = rustix::fs::FallocateFlags::from_bits_retain(zero_mode(*hole) as u32);
            return Some(code(rustix::fs::fallocate(file, mode, *offset, *len)));
        }
        Op::Discard { file, offset, len } => {
            let range = [*offset, *len];
            // SAFETY: the ioctl reads two numbers of 64 bits, which `range` has.
            let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
            // CAST: it is 0 or -1.
            result as isize
        }
        Op::Ready { .. } => return None,
        Op::Command { .. } => return Some(-libc::EOPNOTSUPP),
    };
    if result < 0 {
        let error = io::Error::last_os_error().raw_os_error();
        return Some(-error.unwrap_or(libc::EIO));
    }
    // CAST: the kernel transfers less than 2^31 bytes at once.
    Some(result as i32)
}

/// `_IO(0x12, 119)`.
const BLKDISCARD: libc::Ioctl = 0x1277;

fn code(result: rustix::io::Result<()>) -> i32 {
    result.map_or_else(|error| -error.raw_os_error(), |()| 0)
}
