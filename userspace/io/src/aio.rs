// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reads, writes and flushes by Linux AIO (`io_submit`); the rest as in [`sync`](crate::sync).
//!
//! The kernel reads control blocks only when they are submitted. Their vectors and memory belong to the operation,
//! which stays in the table until its event has been taken.

use crate::sync;
use crate::table::SlotTable;
use crate::Op;
use rustix::event::{eventfd, EventfdFlags};
use static_assertions::{assert_not_impl_any, const_assert_eq};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// Operations that are under way at once; more wait in the table.
const DEPTH: usize = 256;

/// `struct iocb` of the kernel, little endian.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct IoControlBlock {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    eventfd: u32,
}

/// `struct io_event` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct IoEvent {
    data: u64,
    block: u64,
    result: i64,
    result2: i64,
}

// The kernel reads and writes arrays of them.
const_assert_eq!(size_of::<IoControlBlock>(), 64);
const_assert_eq!(size_of::<IoEvent>(), 32);
// Dropping it waits until the kernel has finished with this thread's memory.
assert_not_impl_any!(Aio: Clone);

const FDSYNC: u16 = 3;
const PREADV: u16 = 7;
const PWRITEV: u16 = 8;
const FLAG_EVENTFD: u32 = 1;

pub(crate) struct Aio {
    context: libc::c_ulong,
    /// Tells that events are there, beside other descriptors.
    ready: OwnedFd,
    blocks: Vec<IoControlBlock>,
    slots: Vec<usize>,
    events: Vec<IoEvent>,
    under_way: usize,
}

impl std::fmt::Debug for Aio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Aio")
            .field("under_way", &self.under_way)
            .finish_non_exhaustive()
    }
}

impl Aio {
    pub(crate) fn new() -> io::Result<Self> {
        let ready = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let mut context: libc::c_ulong = 0;
        // SAFETY: the call writes one number to `context`, which is 0 as it asks for.
        let result = unsafe { libc::syscall(libc::SYS_io_setup, DEPTH, &raw mut context) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            context,
            ready,
            blocks: Vec::with_capacity(DEPTH),
            slots: Vec::with_capacity(DEPTH),
            events: vec![IoEvent::default(); DEPTH],
            under_way: 0,
        })
    }

    /// Returns the number of system calls.
    pub(crate) fn enter(&mut self, table: &mut SlotTable, wait: bool) -> io::Result<u64> {
        let before = table.finished();
        sync::cancel(table);
        let mut calls = self.gather(table);
        if !self.blocks.is_empty() {
            calls += 1;
            self.submit(table)?;
        }
        let ready = (self.under_way > 0).then_some(self.ready.as_fd());
        let wait = wait && table.finished() == before;
        calls += sync::look(table, ready, wait)?;
        if self.under_way > 0 {
            calls += self.reap(table)?;
        }
        Ok(calls)
    }

    /// Makes control blocks of queued operations, and executes those that AIO cannot do. Returns the number of system
    /// calls.
    fn gather(&mut self, table: &mut SlotTable) -> u64 {
        let mut calls = 0;
        self.blocks.clear();
        self.slots.clear();
        while self.under_way + self.blocks.len() < DEPTH {
            let Some(index) = table.next_queued() else {
                break;
            };
            let Some((op, vector)) = table.start(index) else {
                continue;
            };
            let transfer = match op {
                Op::Read { file, offset, .. } => Some((PREADV, file, *offset, 0)),
                Op::Write {
                    file,
                    offset,
                    durable,
                    ..
                } => Some((PWRITEV, file, *offset, sync::write_flags(*durable))),
                Op::Sync { file } => Some((FDSYNC, file, 0, 0)),
                _ => None,
            };
            if let Some((opcode, file, offset, flags)) = transfer {
                self.blocks.push(IoControlBlock {
                    data: index as u64,
                    opcode,
                    // CAST: the bits are those of the kernel.
                    rw_flags: flags as u32,
                    // CAST: an open descriptor is not negative.
                    fd: file.as_raw_fd() as u32,
                    buffer: vector.as_ptr() as u64,
                    bytes: vector.len() as u64,
                    // CAST: offsets of files are below 2^63.
                    offset: offset as i64,
                    flags: FLAG_EVENTFD,
                    eventfd: self.ready.as_raw_fd() as u32,
                    ..IoControlBlock::default()
                });
                if opcode == FDSYNC {
                    let last = self.blocks.len() - 1;
                    self.blocks[last].buffer = 0;
                }
                self.slots.push(index);
            } else if let Some(result) = sync::execute(op, vector) {
                calls += 1;
                table.finish(index, result);
            }
        }
        calls
    }

    /// Submits the blocks; those for which the kernel has no room stay queued.
    fn submit(&mut self, table: &mut SlotTable) -> io::Result<()> {
        let mut from = 0;
        while from < self.blocks.len() {
            let pointers: Vec<*const IoControlBlock> =
                self.blocks[from..].iter().map(std::ptr::from_ref).collect();
            // SAFETY: each pointer names a block that is filled in; its vector and memory belong to
            // an operation that the table keeps until its event is taken.
            let result = unsafe {
                libc::syscall(
                    libc::SYS_io_submit,
                    self.context,
                    pointers.len(),
                    pointers.as_ptr(),
                )
            };
            if result > 0 {
                // CAST: at most the number of blocks.
                from += result as usize;
                self.under_way += result as usize;
                continue;
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EAGAIN) if self.under_way > 0 => {
                    for index in self.slots[from..].iter().rev() {
                        table.unqueue(*index);
                    }
                    break;
                }
                // The kernel has refused the first block.
                Some(code) => {
                    table.finish(self.slots[from], -code);
                    from += 1;
                }
                None => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes the events that are there.
    fn reap(&mut self, table: &mut SlotTable) -> io::Result<u64> {
        let mut counter = [0; 8];
        match rustix::io::read(&self.ready, &mut counter) {
            Ok(_) => {}
            // Nothing has happened.
            Err(rustix::io::Errno::AGAIN) => return Ok(1),
            Err(error) => return Err(error.into()),
        }
        let none = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the kernel writes at most as many events as there is room for.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                0,
                self.events.len(),
                self.events.as_mut_ptr(),
                &raw const none,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        // CAST: at most the number of events there is room for, which is all that are under way.
        let count = result as usize;
        self.under_way -= count.min(self.under_way);
        for event in &self.events[..count] {
            let result = i32::try_from(event.result).unwrap_or(-libc::EIO);
            // CAST: it was made from an index.
            table.finish(event.data as usize, result);
        }
        Ok(2)
    }
}

impl Drop for Aio {
    fn drop(&mut self) {
        // SAFETY: this struct owns the context, and the call waits for its operations.
        let result = unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
        debug_assert!(result == 0);
    }
}
