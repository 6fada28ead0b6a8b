// SPDX-License-Identifier: MIT OR Apache-2.0
//! Operations by `io_uring`.
//!
//! Validity of the entries: an operation owns its descriptors and its memory, and stays in the table, at its slot,
//! until its completion has been taken. The vectors of a slot do not change during that. The ring is dropped after all
//! operations were cancelled and are over.

use crate::entry::Entries;
use crate::table::SlotTable;
use crate::{Op, Region};
use io_uring::register::{Probe, Restriction};
use io_uring::{cqueue, opcode, squeue, types, IoUring};
use static_assertions::assert_not_impl_any;
use std::io;
use std::rc::Rc;

/// Entries of the submission queue; more operations wait in the table.
const ENTRIES: u32 = 256;
/// Completions of cancellations carry this: they name no slot.
const NOBODY: u64 = u64::MAX;

/// Operations that a ring accepts once it is enabled: none that opens, connects or executes, so that a ring cannot
/// bypass a sandbox.
const OPERATIONS: &[u8] = &[
    opcode::Nop::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::ReadFixed::CODE,
    opcode::WriteFixed::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
    opcode::AsyncCancel::CODE,
    opcode::UringCmd16::CODE,
];
/// `IORING_REGISTER_BUFFERS`, `IORING_UNREGISTER_BUFFERS`.
const REGISTRATIONS: &[u8] = &[0, 1];

pub(crate) struct Uring {
    ring: IoUring,
    entries: Entries,
    /// Number of submitted entries whose completion was not taken.
    entered: usize,
    /// Memory of the commands among them, by slot. The kernel cannot cancel a command of a device: it ends only with
    /// the ring or with the process.
    commands: Vec<(usize, Rc<Region>)>,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring")
            .field("entered", &self.entered)
            .finish_non_exhaustive()
    }
}

// The ring has regions, which belong to this thread, and a single submission queue.
assert_not_impl_any!(Uring: Send, Sync, Clone);

impl Uring {
    pub(crate) fn new() -> io::Result<Self> {
        // Completions are made when this thread asks for them, not in the middle of its work.
        let deferred = IoUring::builder()
            .dontfork()
            .setup_r_disabled()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_cqsize(4 * ENTRIES)
            .build(ENTRIES);
        let ring = match deferred {
            // Kernels before 6.1.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::builder()
                .dontfork()
                .setup_r_disabled()
                .setup_cqsize(4 * ENTRIES)
                .build(ENTRIES)?,
            other => other?,
        };
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        // Operations that the kernel does not know cannot be allowed. These exist since Linux 6.15.
        let vectors = probe.is_supported(opcode::ReadvFixed::CODE)
            && probe.is_supported(opcode::WritevFixed::CODE);
        let more: &[u8] = match vectors {
            true => &[opcode::ReadvFixed::CODE, opcode::WritevFixed::CODE],
            false => &[],
        };
        let operations = OPERATIONS
            .iter()
            .chain(more)
            .map(|code| Restriction::sqe_op(*code));
        let registrations = REGISTRATIONS
            .iter()
            .map(|code| Restriction::register_op(*code));
        let mut rules: Vec<Restriction> = operations.chain(registrations).collect();
        ring.submitter().register_restrictions(&mut rules)?;
        ring.submitter().register_enable_rings()?;
        if !ring.params().is_feature_nodrop() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self {
            ring,
            entries: Entries::new(vectors),
            entered: 0,
            commands: Vec::new(),
        })
    }

    /// Pins the pages of a region, so that single reads and writes need not.
    pub(crate) fn register(&mut self, region: Option<&Rc<Region>>) -> io::Result<bool> {
        if self.entries.registered.take().is_some() {
            self.ring.submitter().unregister_buffers()?;
        }
        let Some(region) = region else {
            return Ok(false);
        };
        let all = libc::iovec {
            iov_base: region.place(0, region.len()).cast(),
            iov_len: region.len(),
        };
        // SAFETY: the memory is a mapping that stays while it is registered: this object holds it
        // in `entries`, and the kernel has pages of its own pinned in any case.
        unsafe { self.ring.submitter().register_buffers(&[all]) }?;
        self.entries.registered = Some(region.clone());
        Ok(true)
    }

    /// Returns the number of system calls.
    pub(crate) fn enter(
        &mut self,
        table: &mut SlotTable,
        wait: bool,
        heeds_quick: bool,
    ) -> io::Result<u64> {
        let before = table.finished();
        self.cancel(table)?;
        let mut calls = 0;
        loop {
            let quick = self.push(table)?;
            let done = table.finished() != before || !self.ring.completion().is_empty();
            let more = table.has_queued();
            let want = match wait && !done && !more && !table.is_idle() {
                true if heeds_quick => 1,
                true => (1 + quick).min(self.entered),
                false => 0,
            };
            if want == 0 && !self.needs_call() {
                self.reap(table);
                return Ok(calls);
            }
            match self.ring.submitter().submit_and_wait(want) {
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // Completions have to be taken first.
                    Some(libc::EBUSY | libc::EAGAIN) if self.entered > 0 => {}
                    _ => return Err(error),
                },
            }
            calls += 1;
            self.reap(table);
            if !table.has_queued() {
                return Ok(calls);
            }
        }
    }

    /// Ends everything that is under way but commands: for a change of the engine. Commands that still wait are not
    /// reported, and they bring no result until the ring is entered again.
    pub(crate) fn cancel_all(&mut self, table: &mut SlotTable) -> io::Result<()> {
        let waiting: Vec<usize> = table.waiting().map(|(index, _, _)| index).collect();
        self.reap(table);
        for index in waiting {
            self.push_entry(cancellation(index))?;
        }
        while self.entered > self.commands.len() {
            match self.ring.submitter().submit_and_wait(1) {
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR | libc::EBUSY | libc::EAGAIN) => {}
                    _ => return Err(error),
                },
            }
            // Waits for descriptors are started again on the other engine, so their end is not reported.
            self.take(|index, result, is_command| {
                if is_command {
                    table.finish(index, result);
                }
            });
        }
        Ok(())
    }

    /// There is something that only the kernel can do.
    fn needs_call(&mut self) -> bool {
        let queue = self.ring.submission();
        !queue.is_empty() || queue.taskrun() || queue.cq_overflow()
    }

    fn cancel(&mut self, table: &mut SlotTable) -> io::Result<()> {
        for index in table.take_cancels() {
            self.push_entry(cancellation(index))?;
        }
        Ok(())
    }

    /// Puts entries into the queue while there is room. Returns how many of them are over as soon
    /// as they are handed over.
    fn push(&mut self, table: &mut SlotTable) -> io::Result<usize> {
        let mut quick = 0;
        while !self.ring.submission().is_full() {
            let Some(index) = table.next_queued() else {
                break;
            };
            if let Some((op, vector)) = table.start(index) {
                if let Op::Command {
                    quick: is_quick,
                    keep,
                    ..
                } = op
                {
                    quick += usize::from(*is_quick);
                    self.commands.push((index, keep.clone()));
                }
                let entry = self.entries.entry(op, vector);
                self.push_entry(entry.user_data(index as u64))?;
            }
        }
        Ok(quick)
    }

    fn push_entry(&mut self, entry: squeue::Entry) -> io::Result<()> {
        if self.ring.submission().is_full() {
            self.ring.submitter().submit()?;
        }
        // SAFETY: the operation owns the memory that the entry points to, and the table keeps the operation until its
        // completion is taken.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.map_err(|_| io::Error::from(io::ErrorKind::ResourceBusy))?;
        self.entered += 1;
        Ok(())
    }

    fn reap(&mut self, table: &mut SlotTable) {
        self.take(|index, result, _| table.finish(index, result));
    }

    /// Takes completions, and passes the slot, the result, and whether it was a command to `done`.
    fn take(&mut self, mut done: impl FnMut(usize, i32, bool)) {
        let (entered, commands) = (&mut self.entered, &mut self.commands);
        self.ring.completion().for_each(|entry: cqueue::Entry| {
            *entered = entered.saturating_sub(1);
            if entry.user_data() != NOBODY {
                // CAST: it was made from an index.
                let index = entry.user_data() as usize;
                let command = commands.iter().position(|(slot, _)| *slot == index);
                if let Some(at) = command {
                    commands.swap_remove(at);
                }
                done(index, entry.result(), command.is_some());
            }
        });
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // The kernel cancels operations when the ring is closed, but only some time later; their memory is freed when
        // this returns.
        let cancel = opcode::AsyncCancel2::new(types::CancelBuilder::any()).build();
        if self.entered > self.commands.len() && self.push_entry(cancel.user_data(NOBODY)).is_ok() {
            let mut left = self.entered;
            while left > self.commands.len() && self.ring.submitter().submit_and_wait(1).is_ok() {
                left = left.saturating_sub(self.ring.completion().count());
            }
        }
        // Commands may write until the kernel has ended them, which it does not report any more, so their memory is
        // never freed.
        for (_, memory) in self.commands.drain(..) {
            std::mem::forget(memory);
        }
    }
}

fn cancellation(index: usize) -> squeue::Entry {
    opcode::AsyncCancel::new(index as u64)
        .build()
        .user_data(NOBODY)
}

#[cfg(test)]
mod tests {
    use super::Uring;
    use io_uring::{opcode, types};

    /// A ring that a sandboxed process has may not be a way to open files.
    #[test]
    fn ring_refuses_to_open_a_file() {
        let mut uring = Uring::new().unwrap();
        let entry = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/dev/null".as_ptr()).build();
        uring.push_entry(entry).unwrap();
        uring.ring.submitter().submit_and_wait(1).unwrap();
        let result = uring.ring.completion().next().unwrap().result();
        uring.entered -= 1;
        assert_eq!(result, -libc::EACCES);
    }
}
