// SPDX-License-Identifier: GPL-2.0-only

//! Commands that a process sends to a character device through io_uring.
//!
//! A command is a value that is passed on: [`IssuedCommand`] when the process has just sent it, [`Parked`] while it waits for
//! something, [`Woken`] when that has come. Each of these values is consumed by an answer or turned into the next one,
//! so that no command is answered twice.
//!
//! Facts about the kernel (io_uring/uring_cmd.c, io_uring/tw.c):
//! - A command is valid until it completes, and holds a reference to its file.
//! - After `io_uring_cmd_mark_cancelable` the kernel calls the file with `IO_URING_F_CANCEL` when the task or the ring
//!   goes away, again and again until the command completes. Marked commands must end with `__io_uring_cmd_done`, which
//!   removes the mark.
//! - `__io_uring_cmd_do_in_task` is callable from any task. The kernel runs the callback once, with the ring locked: in
//!   the task that issued the command, or elsewhere with `cancel` set if that task is gone.
//!
//! Wraps `io_uring_cmd_mark_cancelable`, `__io_uring_cmd_do_in_task` and `__io_uring_cmd_done`
//! (include/linux/io_uring/cmd.h).

use crate::linux::sys;
use core::marker::PhantomData;
use core::ptr::NonNull;
use kernel::bindings;
use kernel::ffi::{c_int, c_uint};
use kernel::prelude::*;

// CAST: both are small.
const CANCELLED: c_int = -(bindings::ECANCELED as c_int);
const NOT_SUPPORTED: c_int = -(bindings::EOPNOTSUPP as c_int);

/// Data of a driver in a parked command.
pub(crate) type CommandNote = [u64; 2];

/// Kind of the kernel's call with a command.
pub(in crate::linux) enum Call<'a> {
    /// The process has just sent it.
    Issue(IssuedCommand<'a>),
    /// The command must end.
    Cancel(Cancelled<'a>),
}

impl Call<'_> {
    /// Reads the kernel's call of a file's operation; `None` without a command.
    ///
    /// # Safety
    ///
    /// `command` is valid during `'_` and has not completed, and `flags` are those that the kernel
    /// passed for it. `woken` may be called as the task work of a command that is parked.
    pub(in crate::linux) unsafe fn new(
        command: *mut sys::UringCmd,
        flags: c_uint,
        woken: sys::TaskWorkFn,
    ) -> Option<Self> {
        let command = NonNull::new(command)?;
        if flags & sys::IO_URING_F_CANCEL != 0 {
            return Some(Self::Cancel(Cancelled {
                wanted: Identity { command },
                flags,
                _call: PhantomData,
            }));
        }
        Some(Self::Issue(IssuedCommand {
            command,
            flags,
            woken,
            _call: PhantomData,
        }))
    }
}

/// A command that the process has just sent.
pub(crate) struct IssuedCommand<'a> {
    command: NonNull<sys::UringCmd>,
    flags: c_uint,
    woken: sys::TaskWorkFn,
    _call: PhantomData<(&'a (), *mut ())>,
}

/// A command that is to end, if it is parked.
pub(in crate::linux) struct Cancelled<'a> {
    wanted: Identity,
    flags: c_uint,
    _call: PhantomData<(&'a (), *mut ())>,
}

impl Cancelled<'_> {
    /// Returns which command it is.
    pub(in crate::linux) fn identity(&self) -> &Identity {
        &self.wanted
    }

    /// Ends the command.
    pub(in crate::linux) fn end(self, parked: Parked) {
        let command = parked.command.as_ptr();
        // SAFETY: By the invariant of `Parked` it has not completed; the flags are those of this
        // call.
        unsafe { sys::__io_uring_cmd_done(command, CANCELLED, 0, self.flags, false) };
    }
}

/// Result of handling an [`IssuedCommand`] command.
#[must_use]
pub(crate) struct CommandOutcome(c_int);

impl CommandOutcome {
    /// Makes the outcome of a command that is not known.
    pub(crate) fn refused() -> Self {
        Self(NOT_SUPPORTED)
    }

    /// Returns the number that the kernel expects.
    pub(in crate::linux) fn number(self) -> c_int {
        self.0
    }
}

impl IssuedCommand<'_> {
    /// Returns the number of the command.
    pub(crate) fn number(&self) -> u32 {
        // SAFETY: The command is valid, and this field does not change.
        unsafe { (*self.command.as_ptr()).cmd_op }
    }

    /// Returns the driver's 16 bytes of the submission queue entry. They are read once, because the process may be
    /// writing there.
    pub(crate) fn payload(&self) -> [u64; 2] {
        // SAFETY: The command is valid and its entry readable until it has been handled.
        let entry = unsafe { (*self.command.as_ptr()).sqe };
        // SAFETY: The field has 16 bytes there, aligned to 8 (asserted in shim.c).
        let words = unsafe { entry.byte_add(sys::SQE_CMD) }.cast::<u64>();
        // SAFETY: As above.
        let first = unsafe { words.read_volatile() };
        // SAFETY: As above.
        let second = unsafe { words.add(1).read_volatile() };
        [first, second]
    }

    /// Answers the command.
    pub(crate) fn complete(self, result: Result<c_int>) -> CommandOutcome {
        CommandOutcome(match result {
            // The kernel would issue the command again, or leave it without an answer.
            Err(error) if error == EAGAIN || error == EIOCBQUEUED => EINVAL.to_errno(),
            Err(error) => error.to_errno(),
            Ok(result) => result,
        })
    }

    /// Turns the command into one that can wait, and returns it together with the outcome.
    ///
    /// From here on it can be cancelled; a cancellation that does not find it parked is repeated.
    pub(crate) fn park(self, note: CommandNote) -> (Parked, CommandOutcome) {
        let command = self.command.as_ptr();
        // SAFETY: The command is valid, and these bytes are the driver's.
        unsafe { (*command).pdu = note };
        // SAFETY: The command is valid and has not completed; the flags are those of this call.
        unsafe { sys::io_uring_cmd_mark_cancelable(command, self.flags) };
        let parked = Parked {
            command: self.command,
            woken: self.woken,
        };
        (parked, CommandOutcome(EIOCBQUEUED.to_errno()))
    }
}

/// A command that waits. It must not be dropped, because the process would wait without end.
///
/// # Invariants
///
/// The command has not completed, and no other code will complete it. `woken` may be called as its task work.
#[must_use]
pub(crate) struct Parked {
    command: NonNull<sys::UringCmd>,
    woken: sys::TaskWorkFn,
}

// SAFETY: A command may be woken and completed from any task.
unsafe impl Send for Parked {}

impl Parked {
    /// Schedules the command's handling in its task, as [`Woken`]. Callable under a spinlock.
    pub(crate) fn wake(self) {
        // SAFETY: By the type invariant.
        unsafe { sys::__io_uring_cmd_do_in_task(self.command.as_ptr(), self.woken, 0) };
    }

    /// Returns true if `wanted` is this command.
    pub(crate) fn is(&self, wanted: &Identity) -> bool {
        self.command == wanted.command
    }
}

/// Identity of a command that is to be cancelled.
pub(crate) struct Identity {
    command: NonNull<sys::UringCmd>,
}

/// A command that was parked, in the task that sent it.
///
/// # Invariants
///
/// As for [`Parked`]; the ring is locked.
#[must_use]
pub(crate) struct Woken {
    command: NonNull<sys::UringCmd>,
    cancel: bool,
    woken: sys::TaskWorkFn,
}

impl Woken {
    /// # Safety
    ///
    /// `command` is parked and was woken, and this is called from its task work, which is `woken`.
    pub(in crate::linux) unsafe fn new(
        command: *mut sys::UringCmd,
        state: sys::TaskWork,
        woken: sys::TaskWorkFn,
    ) -> Self {
        Self {
            // SAFETY: A command is never at address 0.
            command: unsafe { NonNull::new_unchecked(command) },
            cancel: state.cancel,
            woken,
        }
    }

    /// Returns true if the command's task is going away, so that its memory cannot be reached any more.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancel
    }

    /// Returns the driver's data of the parked command.
    pub(crate) fn note(&self) -> CommandNote {
        // SAFETY: The command is valid, and these bytes are the driver's.
        unsafe { (*self.command.as_ptr()).pdu }
    }

    /// Answers the command.
    pub(crate) fn complete(self, result: c_int) {
        // SAFETY: By the invariant it has not completed. This is task work, in which the ring is
        // locked and completions are flushed afterwards.
        unsafe {
            sys::__io_uring_cmd_done(
                self.command.as_ptr(),
                result,
                0,
                sys::IO_URING_F_COMPLETE_DEFER,
                false,
            )
        };
    }

    /// Ends the command because its task is going away.
    pub(crate) fn cancel(self) {
        self.complete(CANCELLED);
    }

    /// Lets the command wait once more.
    pub(crate) fn park(self) -> Parked {
        // INVARIANT: Passed on; it is still marked as one that can be cancelled.
        Parked {
            command: self.command,
            woken: self.woken,
        }
    }
}
