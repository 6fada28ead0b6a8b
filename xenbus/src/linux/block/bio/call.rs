// SPDX-License-Identifier: GPL-2.0-only

//! I/O on a file: the file system is called with the memory of a bio that is not submitted.
//!
//! The thread that serves a queue must not wait for a file system, so the call has to refuse instead of waiting for a
//! lock, for the allocation of blocks, or for a file system that is frozen. A refused call is repeated on the file's
//! own work queue, where it may wait.
//!
//! Wraps `struct kiocb`, `iov_iter_bvec` (include/linux/uio.h), `sb_start_write` and `kiocb_end_write`
//! (include/linux/fs.h), `memalloc_noio_save` (include/linux/sched/mm.h).

use super::{end, IoRecord, IO_ERROR, NOT_SUPPORTED};
use crate::linux::block::file::ImageFile;
use crate::linux::block::storage::DiskStorage;
use crate::linux::sys;
use core::mem::offset_of;
use kernel::bindings;
use kernel::ffi::{c_int, c_long};
use kernel::prelude::*;
use kernel::types::Opaque;

/// Memory in front of each bio of a set.
#[repr(C)]
struct Call {
    iocb: Opaque<bindings::kiocb>,
    work: Opaque<bindings::work_struct>,
}

/// A bio with its call.
#[repr(C)]
pub(super) struct FramedBio {
    call: Call,
    pub(super) bio: bindings::bio,
}

/// Operation on a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CallKind {
    Read,
    Write,
    Flush,
}

/// A call that is under way.
///
/// # Invariants
///
/// Its bio was given to [`submit`] and has not ended: its I/O is not reaped, so the record and its storage,
/// which is a file if there is one, are valid.
#[derive(Clone, Copy)]
struct Started(*mut FramedBio);

/// Calls the file system of a bio's file instead of submitting it. The bio ends as if it had been submitted.
/// May sleep for memory.
///
/// # Safety
///
/// The bio is one of a set whose bios have a [`FramedBio`] around them, or a record's first one. It is complete, belongs
/// to the caller, and its record's storage is a file, or there is none: then the bio fails.
pub(super) unsafe fn submit(bio: *mut bindings::bio) {
    // SAFETY: By the requirement.
    let framed = unsafe { bio.byte_sub(offset_of!(FramedBio, bio)) }.cast::<FramedBio>();
    // INVARIANT: By the requirement.
    let started = Started(framed);
    let Some(file) = started.file() else {
        return started.end(IO_ERROR);
    };
    // SAFETY: The call is ours, as the bio is.
    unsafe {
        let call = &(*framed).call;
        call.iocb.get().write(bindings::kiocb::default());
        bindings::init_work_with_key(
            call.work.get(),
            Some(work),
            false,
            c"xen_blkback_rs file".as_char_ptr(),
            kernel::static_lock_class!().as_ptr(),
        );
    }
    match started.kind() {
        Some(CallKind::Read | CallKind::Write) if file.can_refuse_to_wait() => {
            started.call(sys::IOCB_NOWAIT);
        }
        Some(_) => started.later(),
        None => started.end(NOT_SUPPORTED),
    }
}

impl Started {
    fn bio(&self) -> *mut bindings::bio {
        // SAFETY: Only the address is taken.
        unsafe { core::ptr::addr_of_mut!((*self.0).bio) }
    }

    fn record(&self) -> &IoRecord {
        // SAFETY: By the invariant.
        unsafe { &*(*self.bio()).bi_private.cast::<IoRecord>() }
    }

    fn file(&self) -> Option<&ImageFile> {
        // SAFETY: By the invariant the record is not reaped.
        match unsafe { self.record().storage() } {
            Some(DiskStorage::File(file)) => Some(file),
            _ => None,
        }
    }

    /// Returns the bytes of the transfer.
    fn len(&self) -> u32 {
        // SAFETY: The bio is ours.
        unsafe { (*self.bio()).bi_iter.bi_size }
    }

    /// Returns the operation on the file; `None` for one that a file does not get in this way.
    fn kind(&self) -> Option<CallKind> {
        const REQ_OP: u32 = (1 << bindings::REQ_OP_BITS) - 1;
        const DURABLE: u32 =
            1 << bindings::req_flag_bits___REQ_PREFLUSH | 1 << bindings::req_flag_bits___REQ_FUA;
        // SAFETY: The bio is ours.
        let flags = unsafe { (*self.bio()).bi_opf };
        let is_plain = flags & DURABLE == 0;
        match flags & REQ_OP {
            bindings::req_op_REQ_OP_READ => Some(CallKind::Read),
            bindings::req_op_REQ_OP_WRITE if is_plain => Some(CallKind::Write),
            bindings::req_op_REQ_OP_WRITE if self.len() == 0 => Some(CallKind::Flush),
            _ => None,
        }
    }

    fn is_write(&self) -> bool {
        self.kind() == Some(CallKind::Write)
    }

    fn iocb(&self) -> *mut bindings::kiocb {
        // SAFETY: The call is initialised, and ours as the bio is.
        unsafe { (*self.0).call.iocb.get() }
    }

    /// Queues the call on the file's work queue, where it may wait; callable from any context.
    fn later(self) {
        match self.file() {
            // SAFETY: The work was initialised, and is not queued, because only the owner of the call queues it. The
            // work lives until the call has ended.
            Some(file) => unsafe { file.queue().enqueue((*self.0).call.work.get()) },
            None => self.end(IO_ERROR),
        }
    }

    /// Calls the file system. With `IOCB_NOWAIT` it does not wait.
    ///
    /// The file system uses the file until it returns, although the call may have ended before that. So the drop of the
    /// file must wait for the calling thread. That is the thread of the queue, which reaps, or a thread of the file's
    /// own work queue, which finishes its work before the file is released.
    fn call(self, flags: c_int) {
        let Some(file) = self.file() else {
            return self.end(IO_ERROR);
        };
        let raw = file.as_raw();
        // SAFETY: The file is open, and its operations do not change.
        let (operations, file_flags) = unsafe { (&*(*raw).f_op, (*raw).f_iocb_flags) };
        let (is_write, iocb) = (self.is_write(), self.iocb());
        let (transfer, write_flag) = match is_write {
            true => (operations.write_iter, bindings::IOCB_WRITE),
            false => (operations.read_iter, 0),
        };
        let Some(transfer) = transfer else {
            return self.end(IO_ERROR);
        };
        let mut iter = bindings::iov_iter::default();
        // SAFETY: The call is ours. The bio's vectors describe memory of `len` bytes, which stays where it is
        // until the I/O is reaped; their number and place are fields of the bio.
        unsafe {
            let bio = &*self.bio();
            (*iocb).ki_filp = raw;
            // CAST: the map of the disk has compared it with the size of the file, which fits.
            (*iocb).ki_pos = bio.bi_iter.bi_sector.wrapping_mul(512) as i64;
            (*iocb).ki_complete = Some(complete);
            // CAST: the same bits.
            (*iocb).ki_flags = (file_flags | write_flag) as c_int | flags;
            bindings::iov_iter_bvec(
                &mut iter,
                u32::from(is_write),
                bio.bi_io_vec,
                bio.bi_vcnt.into(),
                self.len() as usize,
            );
        }
        if is_write && !self.may_write(file, flags) {
            return self.later();
        }
        // SAFETY: A pair around the call, by the same thread. The operation is the file's own.
        let result = unsafe {
            let saved = sys::xbr_noio_save();
            let result = transfer(iocb, &mut iter);
            sys::xbr_noio_restore(saved);
            result
        };
        if result != EIOCBQUEUED.to_errno() as isize {
            self.returned(result);
        }
    }

    /// Keeps the file system from being frozen until the write has ended; false if that would have to wait.
    fn may_write(self, file: &ImageFile, flags: c_int) -> bool {
        // SAFETY: The file is open, and the call is one on it.
        unsafe {
            if flags & sys::IOCB_NOWAIT == 0 {
                sys::xbr_file_start_write(file.as_raw());
            } else if sys::xbr_file_try_start_write(file.as_raw()) == 0 {
                return false;
            }
            sys::xbr_kiocb_started_write(self.iocb());
        }
        true
    }

    /// Handles the result that the file system returned.
    fn returned(self, result: isize) {
        if self.is_write() {
            // SAFETY: It was started before the call.
            unsafe { sys::xbr_kiocb_end_write(self.iocb()) };
        }
        // SAFETY: The call is ours again.
        let could_not_wait = unsafe { (*self.iocb()).ki_flags } & sys::IOCB_NOWAIT != 0;
        match u32::try_from(result) {
            Ok(len) if len == self.len() => self.end(0),
            // A part of the transfer, or nothing, because the call would have had to wait: all of it is repeated.
            Ok(_) if could_not_wait => self.later(),
            Err(_) if could_not_wait && result == EAGAIN.to_errno() as isize => self.later(),
            // Behind the end of the file, or an error.
            _ => self.end(IO_ERROR),
        }
    }

    /// Ends the bio, with this `blk_status_t`.
    fn end(self, status: u32) {
        let (bio, record) = (self.bio(), core::ptr::from_ref(self.record()));
        // SAFETY: By the invariant; no code uses the bio any more, and the record is valid until it is put.
        unsafe { end(bio, &*record, status) };
    }
}

/// Ends a call that continued after it had returned. Runs in any context.
extern "C" fn complete(iocb: *mut bindings::kiocb, result: c_long) {
    // The first field of the first field.
    // INVARIANT: The file system has the pointer from `Started::call`, and calls this once.
    Started(iocb.cast()).returned(result);
}

/// Makes a call that may wait.
extern "C" fn work(work: *mut bindings::work_struct) {
    let at = offset_of!(FramedBio, call).wrapping_add(offset_of!(Call, work));
    // SAFETY: The work lies there in a call.
    let framed = unsafe { work.byte_sub(at) }.cast::<FramedBio>();
    // INVARIANT: It was queued by `Started::later`.
    let started = Started(framed);
    if started.kind() != Some(CallKind::Flush) {
        return started.call(0);
    }
    match started.file().map(ImageFile::sync) {
        Some(Ok(())) => started.end(0),
        _ => started.end(IO_ERROR),
    }
}
