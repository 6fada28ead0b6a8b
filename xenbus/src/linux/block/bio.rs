// SPDX-License-Identifier: GPL-2.0-only

//! Block I/O: bios, their completion in interrupt context, and plugging.
//!
//! I/O on a file is built in the same way. Where a bio would be submitted, the file system is called with the bio's
//! memory instead: `call.rs`.
//!
//! Wraps `bioset_init`, `bio_init`, `bio_alloc_bioset`, `bio_add_page`, `__bio_add_page` (include/linux/bio.h),
//! `submit_bio` and `blk_start_plug` (include/linux/blkdev.h). The kernel's own `kernel::block::mq` is for drivers that
//! make a block device; it has no bios for users of one.

mod call;
mod transfer;

use super::bdev::BlockDevice;
use super::file::TransferLimits;
use super::storage::DiskStorage;
use crate::linux::cond_resched;
use crate::linux::memory::data::DataPages;
use crate::linux::memory::vectors::push;
use crate::linux::sys;
use crate::linux::task::wake_event::WakeEvent;
use crate::ring::numbers::QueueTag;
use call::FramedBio;
use core::cell::{Cell, UnsafeCell};
use core::mem::offset_of;
use core::pin::Pin;
use core::ptr::NonNull;
use kernel::bindings;
use kernel::error::to_result;
use kernel::prelude::*;
use kernel::sync::atomic::{
    ordering::{Acquire, Full, Relaxed, Release},
    Atomic,
};
use kernel::sync::Arc;
use kernel::types::Opaque;

pub(crate) use transfer::{DeviceTarget, PagePiece};

/// Bios beyond the record's own that can be allocated while there is no memory: enough for progress. Each has room for
/// as many ranges as a bio can have.
const RESERVE: u32 = 2;
/// Requests that a plug allocates at once at most (`BLK_MAX_REQUEST_COUNT`).
const PLUGGED: u16 = 32;
/// Ranges of memory of one bio at most (`BIO_MAX_VECS`).
const MAX_VECS: u16 = 256;

/// Operation of a bio.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Read.
    Read,
    /// Write; `preflush` makes completed writes durable before, `fua` this one after.
    Write {
        /// Flush before.
        preflush: bool,
        /// Force unit access.
        fua: bool,
    },
    /// Make completed writes durable; no data.
    Flush,
    /// Forget a range; no data.
    Discard,
    /// Erase a range; no data.
    SecureErase,
}

impl IoRecord {
    fn first_bio(&self) -> *mut bindings::bio {
        // SAFETY: Only the address is taken.
        unsafe { core::ptr::addr_of_mut!((*self.first.get()).bio) }
    }

    /// Returns the target of the I/O; `None` for the disk's own device.
    ///
    /// # Safety
    ///
    /// The record is taken, and its I/O is not reaped as long as this is used.
    unsafe fn storage(&self) -> Option<&DiskStorage> {
        // SAFETY: Until then no code changes it.
        unsafe { (*self.storage.get()).as_ref() }
    }
}

impl Operation {
    fn flags(self) -> u32 {
        const SYNC_IDLE: u32 =
            1 << bindings::req_flag_bits___REQ_SYNC | 1 << bindings::req_flag_bits___REQ_IDLE;
        const PREFLUSH: u32 = 1 << bindings::req_flag_bits___REQ_PREFLUSH;
        const FUA: u32 = 1 << bindings::req_flag_bits___REQ_FUA;
        match self {
            Operation::Read => bindings::req_op_REQ_OP_READ,
            Operation::Write { preflush, fua } => {
                bindings::req_op_REQ_OP_WRITE
                    | SYNC_IDLE
                    | if preflush { PREFLUSH } else { 0 }
                    | if fua { FUA } else { 0 }
            }
            Operation::Flush => bindings::req_op_REQ_OP_WRITE | SYNC_IDLE | PREFLUSH,
            Operation::Discard => bindings::req_op_REQ_OP_DISCARD,
            Operation::SecureErase => bindings::req_op_REQ_OP_SECURE_ERASE,
        }
    }
}

/// Ranges of memory of the bio that each record has.
const FIRST_VECS: u16 = 8;

/// The part of an I/O that its bios share, and the first of them: most I/Os need no other.
struct IoRecord {
    /// Bios that have not completed, with the one that is not submitted yet, or one while the I/O is being built.
    pending: Atomic<i32>,
    /// The first error as `blk_status_t`, or 0; 0 between two I/Os.
    status: Atomic<u32>,
    /// Set from the beginning of an I/O until its completion is reaped. Only the thread that has the disk looks, or a
    /// borrower in its place. So it is for `is_own`.
    taken: Cell<bool>,
    /// The I/O goes to the disk's own device.
    is_own: Cell<bool>,
    tag: QueueTag,
    owner: *const BioDisk,
    /// Target of the I/O; `None` for the disk's own device. Belongs to the code that has taken the record, which does
    /// not change it until the completion is reaped.
    storage: UnsafeCell<Option<DiskStorage>>,
    /// Belongs to the code that builds the I/O, and from submission to completion to the block layer or the file
    /// system.
    first: Opaque<FramedBio>,
    vecs: Opaque<[bindings::bio_vec; FIRST_VECS as usize]>,
}

/// Resources for I/O on block devices and files.
///
/// # Invariants
///
/// - `records[n].tag == n` and its owner is this object, which is pinned.
/// - `busy` is the number of records that an [`Inflight`] or a bio can still touch.
/// - A record is `taken` from [`BioDisk::begin`] until its completion is reaped, so no other code touches it. All that
///   time its bios go to its storage, or without one to `device`.
/// - `own` is the number of records that are taken and whose I/O `is_own`: `device` changes only while it is 0.
#[pin_data(PinnedDrop)]
pub(crate) struct BioDisk {
    pages: Arc<DataPages>,
    wake_event: Arc<WakeEvent>,
    /// Destination of all I/O without another one.
    device: UnsafeCell<Option<Arc<BlockDevice>>>,
    own: Cell<u16>,
    #[pin]
    set: Opaque<bindings::bio_set>,
    records: KVVec<IoRecord>,
    /// One bit for each tag whose I/O is complete and not reaped.
    done: KVec<Atomic<u64>>,
    busy: Atomic<i32>,
}

// SAFETY: What completions touch on other processors is atomic: a record's `pending` and `status`, and `done`, `wake_event`
// and `busy`. All else of a record, `device` and `own` belong to the one thread that has the disk, or to whom it lends that
// while it waits, or to its bios. (It is not `Sync`: two threads could begin I/O of one tag.)
unsafe impl Send for BioDisk {}

impl BioDisk {
    /// Allocates the records of `tags` concurrent I/Os, which all go to `device` if there is one. Completions wake the
    /// thread of `wake_event`. May sleep.
    pub(crate) fn new(
        pages: Arc<DataPages>,
        wake_event: Arc<WakeEvent>,
        device: Option<Arc<BlockDevice>>,
        tags: u16,
    ) -> Result<Pin<KBox<Self>>> {
        let mut records = KVVec::with_capacity(usize::from(tags), GFP_KERNEL)?;
        for tag in (0..tags).map(QueueTag::new) {
            let record = IoRecord {
                pending: Atomic::new(0),
                status: Atomic::new(0),
                taken: Cell::new(false),
                is_own: Cell::new(false),
                tag,
                owner: core::ptr::null(),
                storage: UnsafeCell::new(None),
                first: Opaque::uninit(),
                vecs: Opaque::uninit(),
            };
            push(&mut records, record)?;
        }
        let words = usize::from(tags).div_ceil(64);
        let mut done = KVec::with_capacity(words, GFP_KERNEL)?;
        for _ in 0..words {
            push(&mut done, Atomic::new(0))?;
        }
        KBox::try_pin_init(
            try_pin_init!(&this in Self {
                pages,
                wake_event,
                device: UnsafeCell::new(device),
                own: Cell::new(0),
                set <- Opaque::try_ffi_init(|slot: *mut bindings::bio_set| {
                    // SAFETY: `slot` is valid for writes. `bioset_init` relies on zeroes for the
                    // fields that it does not need.
                    unsafe { slot.write_bytes(0, 1) };
                    // SAFETY: `slot` is valid for writes and stays pinned.
                    to_result(unsafe {
                        bindings::bioset_init(
                            slot,
                            RESERVE,
                            offset_of!(FramedBio, bio) as u32,
                            bindings::BIOSET_NEED_BVECS as i32,
                        )
                    })
                }),
                records: {
                    for record in records.iter_mut() {
                        // INVARIANT: The object stays where it is.
                        record.owner = this.as_ptr();
                    }
                    records
                },
                done,
                busy: Atomic::new(0),
            }? Error),
            GFP_KERNEL,
        )
    }

    /// Returns the bytes of memory for the I/O of `tags` tags, with the reserve.
    pub(crate) const fn bytes(tags: u16) -> usize {
        let records = (tags as usize).saturating_mul(size_of::<IoRecord>());
        let vecs = (MAX_VECS as usize).saturating_mul(size_of::<bindings::bio_vec>());
        let bio = vecs.saturating_add(size_of::<FramedBio>());
        records.saturating_add((RESERVE as usize).saturating_mul(bio))
    }

    /// Starts to build the I/O of a tag, on the disk's own device if no storage is named. `None` if there is no such
    /// tag or device, or if an earlier I/O of the tag has not been reaped.
    pub(crate) fn begin(
        &self,
        tag: QueueTag,
        storage: Option<DiskStorage>,
    ) -> Option<Inflight<'_>> {
        let (device, most) = match &storage {
            None => return self.begin_own(tag),
            Some(DiskStorage::Device(device)) => (device.as_raw(), None),
            Some(DiskStorage::File(file)) => (core::ptr::null_mut(), file.most()),
        };
        self.begin_at(tag, storage, device, most)
    }

    fn begin_own(&self, tag: QueueTag) -> Option<Inflight<'_>> {
        // SAFETY: The device changes in `set_device` only, by this thread or the one to which it has lent the disk.
        let device = unsafe { (*self.device.get()).as_ref() }?.as_raw();
        let inflight = self.begin_at(tag, None, device, None)?;
        inflight.record.is_own.set(true);
        // INVARIANT: The record is taken until `reap` takes it off.
        self.own.set(self.own.get().wrapping_add(1));
        Some(inflight)
    }

    /// Sets the device to which I/O goes that names no storage, and returns the last one. Fails with the new one while such I/O
    /// is in flight or not reaped.
    pub(crate) fn set_device(
        &self,
        device: Option<Arc<BlockDevice>>,
    ) -> Result<Option<Arc<BlockDevice>>, Option<Arc<BlockDevice>>> {
        if self.own.get() > 0 {
            return Err(device);
        }
        // SAFETY: No I/O uses it, and no other thread looks at it. No reference to it is kept.
        Ok(unsafe { core::mem::replace(&mut *self.device.get(), device) })
    }

    /// Begins an I/O without a target, because all of it reads as zeroes.
    pub(crate) fn begin_nowhere(&self, tag: QueueTag) -> Option<Inflight<'_>> {
        // A bio without a device is for the record's file; there is none, so the bio would fail.
        self.begin_at(tag, None, core::ptr::null_mut(), None)
    }

    fn begin_at(
        &self,
        tag: QueueTag,
        storage: Option<DiskStorage>,
        device: *mut bindings::block_device,
        most: Option<TransferLimits>,
    ) -> Option<Inflight<'_>> {
        let record = self.records.get(tag.index())?;
        if record.taken.replace(true) {
            return None;
        }
        // SAFETY: The record is ours, and no bio of it is left.
        unsafe { *record.storage.get() = storage };
        // INVARIANT: The record becomes busy here and stops to be so in `put`.
        record.pending.store(1, Relaxed);
        self.busy.fetch_add(1, Relaxed);
        // INVARIANT: The record has the storage, or it is the disk's own, or there is none.
        Some(Inflight {
            disk: self,
            record,
            device,
            most,
            first_taken: Cell::new(false),
            last: Cell::new(None),
        })
    }

    /// Forgets earlier wake-ups of the thread, which then [reaps](Self::reap).
    pub(crate) fn forget_wake_ups(&self) {
        self.wake_event.rearm();
    }

    /// Yields every I/O that has completed, once, with its status, and true if it went to the disk's own device. Callable in any
    /// context if all I/O does.
    pub(crate) fn reap(&self, mut done: impl FnMut(QueueTag, u32, bool)) {
        for (index, word) in self.done.iter().enumerate() {
            if word.load(Relaxed) == 0 {
                continue;
            }
            // Pairs with `fetch_add` in `put`: the status is visible with the bit.
            let mut bits = word.xchg(0, Full);
            while bits != 0 {
                let bit = bits.trailing_zeros() as usize;
                bits &= bits.wrapping_sub(1);
                let tag = index.wrapping_mul(64).wrapping_add(bit);
                if let Some(record) = self.records.get(tag) {
                    let status = record.status.load(Relaxed);
                    if status != 0 {
                        record.status.store(0, Relaxed);
                    }
                    // SAFETY: Its bit was set, and it is ours until it is given back below.
                    let storage = unsafe { (*record.storage.get()).take() };
                    // Its bios are gone, and the last of them has seen to its bit.
                    record.taken.set(false);
                    let is_own = record.is_own.replace(false);
                    self.own.set(self.own.get().wrapping_sub(is_own.into()));
                    drop(storage);
                    done(record.tag, status, is_own);
                }
            }
        }
    }
}

#[pinned_drop]
impl PinnedDrop for BioDisk {
    fn drop(self: Pin<&mut Self>) {
        // The owner of the object has reaped everything; only the last instructions of an interrupt handler on another
        // CPU can remain, and this waits for them. It would also wait for I/O that is still in flight.
        while self.busy.load(Acquire) != 0 {
            cond_resched();
        }
        // SAFETY: The set was initialised, and no bio of it is left.
        unsafe { bindings::bioset_exit(self.set.get()) };
    }
}

/// An I/O that is being built. Dropping it says that all its bios are submitted.
///
/// # Invariants
///
/// `device` is that of the record's storage, or null if that is a file. Without a storage it is the disk's own, or null
/// if the I/O goes nowhere.
pub(crate) struct Inflight<'a> {
    disk: &'a BioDisk,
    record: &'a IoRecord,
    device: *mut bindings::block_device,
    /// Limit of each of its bios, if that is less than a bio can have.
    most: Option<TransferLimits>,
    first_taken: Cell<bool>,
    /// The last bio until another one is made: only then is it known whether it is the last of the I/O. Most I/Os have no
    /// other, and then nothing is counted.
    last: Cell<Option<NonNull<bindings::bio>>>,
}

impl Inflight<'_> {
    /// Starts an operation without data on at most `u32::MAX / 512` sectors. May sleep.
    pub(crate) fn without_data(&self, operation: Operation, sector: u64, sectors: u32) {
        let mut bio = self.bio(operation, sector, 0);
        bio.set_sectors(sectors);
        bio.submit();
    }

    /// Makes a bio of this I/O with room for `vecs` ranges of memory. Sleeps when there is no memory until a bio
    /// of the reserve comes back; the first one of few ranges never does.
    fn bio(&self, operation: Operation, sector: u64, vecs: u16) -> Bio<'_> {
        // Before the next one is allocated, which may have to wait for it.
        self.submit_last_of_many();
        let raw = if vecs > FIRST_VECS || self.first_taken.replace(true) {
            // SAFETY: The device is valid while its record is taken, or there is none, and so is the set. An
            // allocation from a bio set that may sleep does not fail.
            unsafe {
                sys::xbr_bio_alloc(
                    self.device,
                    vecs.min(MAX_VECS),
                    operation.flags(),
                    self.disk.set.get(),
                )
            }
        } else {
            let first = self.record.first_bio();
            // SAFETY: The record's bio and its vectors are ours from `BioDisk::begin`, which has taken the record,
            // until submission; the device is valid for that time, or there is none.
            unsafe {
                bindings::bio_init(
                    first,
                    self.device,
                    self.record.vecs.get().cast(),
                    FIRST_VECS,
                    operation.flags(),
                )
            };
            first
        };
        if let Some(bio) = NonNull::new(raw) {
            // SAFETY: The bio is ours until it is submitted.
            unsafe {
                (*bio.as_ptr()).bi_iter.bi_sector = sector;
                (*bio.as_ptr()).bi_private = core::ptr::from_ref(self.record).cast_mut().cast();
                (*bio.as_ptr()).bi_end_io = Some(end_io);
            }
        }
        Bio {
            raw: NonNull::new(raw),
            inflight: self,
        }
    }

    /// Submits the last bio, behind which others follow. May sleep.
    fn submit_last_of_many(&self) {
        if let Some(last) = self.last.take() {
            self.record.pending.fetch_add(1, Relaxed);
            // SAFETY: The bio is complete, is one of this I/O, and is submitted once.
            unsafe { self.submit(last) };
        }
    }

    /// Submits a bio of this I/O. May sleep.
    ///
    /// # Safety
    ///
    /// The bio is complete, one of this I/O, and counted in its record. The caller does not use it any more.
    unsafe fn submit(&self, bio: NonNull<bindings::bio>) {
        if self.device.is_null() {
            // SAFETY: The bio is complete and one of this set, and from here on it belongs to the call, which
            // ends it if there is no file.
            unsafe { call::submit(bio.as_ptr()) };
        } else {
            // SAFETY: The bio is complete, and from here on it belongs to the block layer.
            unsafe { bindings::submit_bio(bio.as_ptr()) };
        }
    }

    /// Makes the whole I/O fail, whatever its bios do.
    fn fail(&self) {
        self.record.status.store(IO_ERROR, Relaxed);
    }
}

/// `BLK_STS_IOERR`.
const IO_ERROR: u32 = 10;
/// `BLK_STS_NOTSUPP`.
pub(crate) const NOT_SUPPORTED: u32 = 1;

impl Drop for Inflight<'_> {
    fn drop(&mut self) {
        match self.last.take() {
            // The share of the record that building had is that of the last bio from now on.
            // SAFETY: The bio is complete, is one of this I/O, and is submitted once.
            Some(last) => unsafe { self.submit(last) },
            None => put(self.record),
        }
    }
}

/// A bio that is being built.
struct Bio<'a> {
    raw: Option<NonNull<bindings::bio>>,
    inflight: &'a Inflight<'a>,
}

impl Bio<'_> {
    /// Sets the length of an operation without data, at most `u32::MAX / 512` sectors.
    fn set_sectors(&mut self, sectors: u32) {
        if let Some(raw) = self.raw {
            // SAFETY: The bio is ours until it is submitted.
            unsafe { (*raw.as_ptr()).bi_iter.bi_size = sectors.wrapping_mul(512) };
        }
    }

    /// Submits the bio, once, at the latest when the I/O is complete. May sleep.
    fn submit(&mut self) {
        if let Some(raw) = self.raw.take() {
            self.inflight.submit_last_of_many();
            self.inflight.last.set(Some(raw));
        }
    }
}

impl Drop for Bio<'_> {
    fn drop(&mut self) {
        if let Some(raw) = self.raw {
            // SAFETY: The bio was never submitted.
            unsafe { free(raw.as_ptr(), self.inflight.record) };
        }
    }
}

/// Ends a bio that the block layer has completed. Runs in any context, interrupts included.
extern "C" fn end_io(bio: *mut bindings::bio) {
    // SAFETY: The block layer passes the bio that completed; its record is busy, so valid.
    let (status, record) = unsafe { ((*bio).bi_status, &*(*bio).bi_private.cast::<IoRecord>()) };
    // SAFETY: The bio is complete, and no other code uses it.
    unsafe { end(bio, record, u32::from(status)) };
}

/// Ends a bio that is complete, with this `blk_status_t`.
///
/// # Safety
///
/// The bio is one of this record, and no longer in use.
unsafe fn end(bio: *mut bindings::bio, record: &IoRecord, status: u32) {
    // SAFETY: As the caller says.
    unsafe { free(bio, record) };
    if status != 0 {
        record.status.store(status, Relaxed);
    }
    put(record);
}

/// Frees a bio.
///
/// # Safety
///
/// The bio is one of this record, and no longer in use.
unsafe fn free(bio: *mut bindings::bio, record: &IoRecord) {
    if bio == record.first_bio() {
        // SAFETY: It was initialised, and no code uses it.
        unsafe { bindings::bio_uninit(bio) };
    } else {
        // SAFETY: It was allocated, and no code uses it.
        unsafe { bindings::bio_put(bio) };
    }
}

/// Gives back one share of a record; the last one reports the completion.
fn put(record: &IoRecord) {
    // No other thread can change the count while the only share is this one, so it need not be taken away.
    if record.pending.load(Acquire) != 1 && record.pending.fetch_sub(1, Full) != 1 {
        return;
    }
    // SAFETY: The record is busy, so its owner waits in its drop at the latest.
    let disk = unsafe { &*record.owner };
    let (word, bit) = (record.tag.index() / 64, record.tag.number() % 64);
    if let Some(word) = disk.done.get(word) {
        // The bit is clear: it was taken out before the record could be taken. So adding it is
        // setting it.
        word.fetch_add(1u64 << bit, Full);
    }
    disk.wake_event.wake_or_work();
    // INVARIANT: Nothing of the disk is touched after this.
    disk.busy.fetch_sub(1, Release);
}

/// Runs `body`, which submits about `count` bios, with the block layer's queue plugged: the device gets all of them
/// together, and the block layer allocates their requests at once. Requests that are not needed are given back at the
/// end, and before the thread sleeps.
pub(crate) fn plugged<R>(count: u16, body: impl FnOnce() -> R) -> R {
    let mut plug = bindings::blk_plug::default();
    // SAFETY: The plug stays on this stack frame, and is finished before it goes.
    unsafe { bindings::blk_start_plug(&mut plug) };
    // As `blk_start_plug_nr_ios`, which is not exported. A plug within another one is not looked at.
    plug.nr_ios = count.clamp(1, PLUGGED);
    let result = body();
    // SAFETY: Started above, by the same thread.
    unsafe { bindings::blk_finish_plug(&mut plug) };
    result
}
