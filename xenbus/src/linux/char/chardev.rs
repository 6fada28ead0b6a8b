// SPDX-License-Identifier: GPL-2.0-only

//! Character devices of a module that can be unloaded.
//!
//! All nodes of a kind share one [`Region`] of minor numbers, whose operations name this module as their owner. So an
//! open file keeps the module in memory, and a file cannot be opened while the module is being unloaded.
//! (`kernel::miscdevice` sets no owner.) The object of a minor number is looked up when it is opened, so no part of a
//! node is freed under an opener.
//!
//! Facts about the kernel: `chrdev_open` (fs/char_dev.c) takes a reference to the owner before it
//! calls `open`; `release` is called once, after every other operation of that file has returned,
//! when no mapping of it and no io_uring command on it is left (each holds a reference).
//!
//! Wraps `__register_chrdev`, `stream_open` (include/linux/fs.h), `class_create` and `device_create`
//! (include/linux/device/class.h, include/linux/device.h).

use super::uring;
use crate::linux::sys;
use crate::linux::versions::this_module;
use core::marker::PhantomData;
use core::ptr::NonNull;
use kernel::bindings;
use kernel::error::{from_err_ptr, to_result};
use kernel::ffi::{c_int, c_long, c_uint, c_ulong, c_void};
use kernel::fs::file::{flags, File};
use kernel::mm::virt::VmaNew;
use kernel::prelude::*;
use kernel::sync::poll::PollTable;
use kernel::sync::{Arc, ArcBorrow};
use kernel::types::ForeignOwnable;
use kernel::uaccess::{UserPtr, UserSlice, UserSliceWriter};

/// Result of `poll`: there is something to read.
pub(crate) const READABLE: u32 = bindings::POLLIN | bindings::POLLRDNORM;

/// Operations of one opener of a character device. All of it may be called by several threads at once, and may sleep.
pub(crate) trait CharDevice: Sized + Send + Sync + 'static {
    /// Opens a minor number; what this returns belongs to the file.
    fn open(minor: u32, nonblocking: bool) -> Result<Arc<Self>>;

    /// Ends the use of the file, after every copy of its descriptor and every mapping is gone.
    fn release(&self);

    /// Answers an ioctl. `argument` is whatever the caller passed.
    fn ioctl(&self, command: u32, argument: usize) -> Result<c_int>;

    /// Reads into `to` and returns how many bytes.
    fn read(&self, _nonblocking: bool, _to: &mut UserSliceWriter) -> Result<usize> {
        Err(EINVAL)
    }

    /// Returns the events for which the file is ready, after it has registered its wait queue with `waiter`.
    fn poll(&self, _waiter: &Waiter<'_>) -> u32 {
        0
    }

    /// Maps something into a process.
    fn mmap(&self, _area: &NewMapping<'_>) -> Result {
        Err(ENODEV)
    }

    /// Takes a command of io_uring.
    fn uring_command(&self, _command: uring::IssuedCommand<'_>) -> uring::CommandOutcome {
        uring::CommandOutcome::refused()
    }

    /// Handles a parked command that was woken. Runs in the command's task.
    fn uring_woken(&self, command: uring::Woken) {
        command.cancel();
    }

    /// Gives up the parked command that `wanted` names; `None` if the waker has it already.
    fn uring_cancel(&self, _wanted: &uring::Identity) -> Option<uring::Parked> {
        None
    }
}

/// A caller that waits until a file becomes ready.
pub(crate) struct Waiter<'a> {
    file: &'a File,
    table: PollTable<'a>,
}

impl Waiter<'_> {
    /// Registers the poller, which is then woken when `queue` is notified.
    pub(crate) fn register(&self, queue: &kernel::sync::poll::PollCondVar) {
        self.table.register_wait(self.file, queue);
    }
}

/// A mapping that is being made.
pub(crate) struct NewMapping<'a>(&'a VmaNew);

impl NewMapping<'_> {
    /// Returns the byte offset in the file.
    pub(crate) fn offset(&self) -> u64 {
        // SAFETY: By the invariant of `VmaNew` the area is valid, and no other code changes it yet.
        let page = unsafe { (*self.0.as_ptr()).vm_pgoff } as u64;
        page.wrapping_mul(4096)
    }

    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        self.0.end().wrapping_sub(self.0.start())
    }

    /// Returns true if writes of the process change the pages.
    pub(crate) fn is_shared(&self) -> bool {
        self.0.flags() & kernel::mm::virt::flags::SHARED != 0
    }

    /// Returns the area, for the wrappers that put pages into it.
    pub(in crate::linux) fn area(&self) -> &VmaNew {
        self.0
    }
}

/// A range of minor numbers and the operations of their nodes.
///
/// # Invariants
///
/// The range is registered under `major`.
pub(crate) struct Region {
    major: u32,
    minors: u32,
    name: &'static CStr,
}

impl Region {
    /// Registers the minor numbers from 0 to `minors`, with `T` as the type of their openers. A process may open a node
    /// from then on. May sleep.
    pub(crate) fn register<T: CharDevice>(name: &'static CStr, minors: u32) -> Result<Self> {
        // SAFETY: The operations and the name live as long as the module, which cannot be unloaded
        // before this is dropped.
        let major = unsafe {
            bindings::__register_chrdev(0, 0, minors, name.as_char_ptr(), Operations::<T>::table())
        };
        to_result(major.min(0))?;
        // INVARIANT: Just registered.
        Ok(Self {
            major: major.unsigned_abs(),
            minors,
            name,
        })
    }

    /// Returns the `dev_t` of a minor number.
    pub(crate) fn number(&self, minor: u32) -> u32 {
        // SAFETY: Plain arithmetic.
        unsafe { sys::xbr_mkdev(self.major, minor) }
    }

    /// Makes the node `/dev/NAME` of a minor number. A `!` in the name stands for a folder. May
    /// sleep.
    pub(crate) fn add_node(
        &self,
        class: &Arc<Class>,
        minor: u32,
        name: &CStr,
    ) -> Result<DeviceNode> {
        let number = self.number(minor);
        // SAFETY: The class is valid, and the format takes one string, which is given.
        from_err_ptr(unsafe {
            bindings::device_create(
                class.0.as_ptr(),
                core::ptr::null_mut(),
                number,
                core::ptr::null_mut(),
                c"%s".as_char_ptr(),
                name.as_char_ptr(),
            )
        })?;
        // INVARIANT: Just created.
        Ok(DeviceNode {
            class: class.clone(),
            number,
        })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the range is registered.
        unsafe {
            bindings::__unregister_chrdev(self.major, 0, self.minors, self.name.as_char_ptr())
        };
    }
}

/// A class of devices, as in `/sys/class`.
///
/// # Invariants
///
/// The pointer is a class that we created.
pub(crate) struct Class(NonNull<bindings::class>);

// SAFETY: A class may be used from any thread.
unsafe impl Send for Class {}
// SAFETY: As above.
unsafe impl Sync for Class {}

impl Class {
    /// Makes a class. May sleep.
    pub(crate) fn new(name: &'static CStr) -> Result<Arc<Self>> {
        // SAFETY: The name lives as long as the module.
        let class = from_err_ptr(unsafe { bindings::class_create(name.as_char_ptr()) })?;
        // INVARIANT: Just created.
        Ok(Arc::new(
            Self(NonNull::new(class).ok_or(ENOMEM)?),
            GFP_KERNEL,
        )?)
    }
}

impl Drop for Class {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the class is ours; every node of it held a reference to
        // this object, so none is left.
        unsafe { bindings::class_destroy(self.0.as_ptr()) };
    }
}

/// A node in `/dev`; dropping it removes the node. Files that are open stay open.
///
/// # Invariants
///
/// The class has a device of this number.
pub(crate) struct DeviceNode {
    class: Arc<Class>,
    number: u32,
}

impl Drop for DeviceNode {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the device exists.
        unsafe { bindings::device_destroy(self.class.0.as_ptr(), self.number) };
    }
}

/// Returns true if the caller may administer the system.
pub(crate) fn may_administer() -> bool {
    // SAFETY: Looks at the current task.
    unsafe { bindings::capable(bindings::CAP_SYS_ADMIN as c_int) }
}

/// Returns the number of the current process, in its own name space.
pub(crate) fn current_process() -> u32 {
    // SAFETY: Looks at the current task.
    unsafe { sys::xbr_current_tgid() }
}

/// Returns `len` bytes of the current process' memory at `address`, which need not be valid.
pub(crate) fn user_memory(address: u64, len: usize) -> UserSlice {
    // CAST: kernels with this module have 64-bit addresses. Any value may be passed: the copy
    // checks it.
    UserSlice::new(UserPtr::from_addr(address as usize), len)
}

fn outcome(result: Result<c_int>) -> c_int {
    result.unwrap_or_else(Error::to_errno)
}

/// The operations of `T`, in the form of the kernel's table.
struct Operations<T>(PhantomData<T>);

impl<T: CharDevice> Operations<T> {
    const TABLE: bindings::file_operations = bindings::file_operations {
        owner: this_module(),
        open: Some(Self::open),
        release: Some(Self::release),
        read: Some(Self::read),
        poll: Some(Self::poll),
        unlocked_ioctl: Some(Self::ioctl),
        // The arguments have the same layout for 32-bit processes.
        #[cfg(CONFIG_COMPAT)]
        compat_ioctl: bindings::compat_ptr_ioctl,
        mmap: Some(Self::mmap),
        uring_cmd: Some(Self::uring_cmd),
        ..pin_init::zeroed()
    };

    const fn table() -> &'static bindings::file_operations {
        &Self::TABLE
    }

    /// Returns the value that `open` returned for this file.
    ///
    /// # Safety
    ///
    /// `file` is a file of this region, opened and not yet released, for as long as `'a`.
    unsafe fn data<'a>(file: *mut bindings::file) -> ArcBorrow<'a, T> {
        // SAFETY: The file is valid; no code changes this field after `open`.
        let data = unsafe { (*file).private_data };
        // SAFETY: `open` has stored it with `into_foreign`, and only `release` takes it back.
        unsafe { Arc::borrow(data) }
    }

    /// # Safety
    ///
    /// `file` is valid for as long as `'a`.
    unsafe fn file<'a>(file: *mut bindings::file) -> &'a File {
        // SAFETY: The file is valid, and the kernel holds no position of it: `open` made it a
        // stream.
        unsafe { File::from_raw_file(file) }
    }

    /// # Safety
    ///
    /// For the kernel alone, as `open` of files of this region.
    unsafe extern "C" fn open(inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
        // SAFETY: Both are those of a file that is being opened.
        let stream = unsafe { bindings::stream_open(inode, file) };
        if stream != 0 {
            return stream;
        }
        // SAFETY: The file is being opened.
        let nonblocking = unsafe { Self::file(file) }.flags() & flags::O_NONBLOCK != 0;
        // SAFETY: The inode is valid.
        let minor = unsafe { sys::xbr_iminor(inode) };
        match T::open(minor, nonblocking) {
            Ok(data) => {
                // SAFETY: While a file is being opened this field is ours.
                unsafe { (*file).private_data = data.into_foreign() };
                0
            }
            Err(error) => error.to_errno(),
        }
    }

    /// # Safety
    ///
    /// For the kernel alone, as `release` of files of this region.
    unsafe extern "C" fn release(_: *mut bindings::inode, file: *mut bindings::file) -> c_int {
        // SAFETY: The file is being released, so no other code reads the field.
        let data = unsafe { (*file).private_data };
        // SAFETY: Stored by `open`, and taken back only here.
        let data = unsafe { <Arc<T> as ForeignOwnable>::from_foreign(data) };
        data.release();
        0
    }

    /// # Safety
    ///
    /// For the kernel alone, as `read` of files of this region.
    unsafe extern "C" fn read(
        file: *mut bindings::file,
        to: *mut u8,
        len: usize,
        _position: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The kernel calls this for an open file.
        let data = unsafe { Self::data(file) };
        // SAFETY: As above.
        let nonblocking = unsafe { Self::file(file) }.flags() & flags::O_NONBLOCK != 0;
        let mut to = user_memory(to as u64, len).writer();
        match data.read(nonblocking, &mut to) {
            // CAST: a read is never longer than `isize::MAX`.
            Ok(len) => len as isize,
            Err(error) => error.to_errno() as isize,
        }
    }

    /// # Safety
    ///
    /// For the kernel alone, as `poll` of files of this region.
    unsafe extern "C" fn poll(
        file: *mut bindings::file,
        table: *mut bindings::poll_table_struct,
    ) -> bindings::__poll_t {
        // SAFETY: The kernel calls this for an open file.
        let data = unsafe { Self::data(file) };
        data.poll(&Waiter {
            // SAFETY: As above.
            file: unsafe { Self::file(file) },
            // SAFETY: The table is null or valid during this call.
            table: unsafe { PollTable::from_raw(table) },
        })
    }

    /// # Safety
    ///
    /// For the kernel alone, as `unlocked_ioctl` of files of this region.
    unsafe extern "C" fn ioctl(
        file: *mut bindings::file,
        command: c_uint,
        argument: c_ulong,
    ) -> c_long {
        // SAFETY: The kernel calls this for an open file.
        let data = unsafe { Self::data(file) };
        outcome(data.ioctl(command, argument)) as c_long
    }

    /// # Safety
    ///
    /// For the kernel alone, as `mmap` of files of this region.
    unsafe extern "C" fn mmap(
        file: *mut bindings::file,
        area: *mut bindings::vm_area_struct,
    ) -> c_int {
        // SAFETY: The kernel calls this for an open file.
        let data = unsafe { Self::data(file) };
        // SAFETY: The area is being set up by this call.
        let area = NewMapping(unsafe { VmaNew::from_raw(area) });
        outcome(data.mmap(&area).map(|()| 0))
    }

    /// # Safety
    ///
    /// For the kernel alone, as `uring_cmd` of files of this region.
    unsafe extern "C" fn uring_cmd(
        command: *mut bindings::io_uring_cmd,
        issue_flags: c_uint,
    ) -> c_int {
        let command = command.cast::<sys::UringCmd>();
        // SAFETY: The kernel passes a valid command, which holds a reference to its file.
        let file = unsafe { (*command).file };
        // SAFETY: The file is open as long as a command holds it.
        let data = unsafe { Self::data(file) };
        // SAFETY: The command is valid and has not completed, `woken` suits its file, and the flags
        // are those of this call.
        match unsafe { uring::Call::new(command, issue_flags, woken::<T>) } {
            Some(uring::Call::Issue(issued)) => data.uring_command(issued).number(),
            Some(uring::Call::Cancel(cancelled)) => {
                if let Some(parked) = data.uring_cancel(cancelled.identity()) {
                    cancelled.end(parked);
                }
                0
            }
            None => EINVAL.to_errno(),
        }
    }
}

/// Runs as the kernel's task work for a woken command of `T`.
///
/// # Safety
///
/// `request` is a command that was parked by a file of `T`, and `wake` scheduled this call.
unsafe extern "C" fn woken<T: CharDevice>(request: *mut c_void, state: sys::TaskWork) {
    let command = request.cast::<sys::UringCmd>();
    // SAFETY: A command that has not completed is valid, and so is the file that it holds.
    let file = unsafe { (*command).file };
    // SAFETY: By the requirement on this function.
    let data = unsafe { Operations::<T>::data(file) };
    // SAFETY: The command is ours until it completes or is parked again.
    data.uring_woken(unsafe { uring::Woken::new(command, state, woken::<T>) });
}
