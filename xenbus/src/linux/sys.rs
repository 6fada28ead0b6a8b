// SPDX-License-Identifier: GPL-2.0-only

//! Raw declarations: the parts of Xen that the kernel's own Rust bindings lack, and the shims.
//!
//! Layouts are asserted here and, with the same numbers, in `xenbus/shim/shim.c`.

use kernel::bindings;
use kernel::ffi::{c_char, c_int, c_uint, c_ulong, c_ushort, c_void};

/// `struct xenbus_device`; only ever behind a pointer.
#[repr(C)]
pub(super) struct XenbusDevice {
    _opaque: [u8; 0],
}

/// `struct xenbus_device_id`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct XenbusDeviceId {
    pub(super) devicetype: [u8; 32],
}

/// `struct xenbus_transaction`, passed by value.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct XenbusTransaction {
    pub(super) id: u32,
}

pub(super) type WatchCallback =
    unsafe extern "C" fn(*mut XenbusWatch, *const c_char, *const c_char);

/// `struct xenbus_watch`.
#[repr(C)]
pub(super) struct XenbusWatch {
    pub(super) list: bindings::list_head,
    pub(super) node: *const c_char,
    pub(super) nr_pending: c_uint,
    pub(super) will_handle:
        Option<unsafe extern "C" fn(*mut XenbusWatch, *const c_char, *const c_char) -> bool>,
    pub(super) callback: Option<WatchCallback>,
}

/// `struct xenbus_driver`.
#[repr(C)]
#[derive(Default)]
pub(crate) struct XenbusDriver {
    pub(super) name: Pointer<c_char>,
    pub(super) ids: Pointer<XenbusDeviceId>,
    pub(super) allow_rebind: bool,
    pub(super) not_essential: bool,
    pub(super) probe:
        Option<unsafe extern "C" fn(*mut XenbusDevice, *const XenbusDeviceId) -> c_int>,
    pub(super) otherend_changed: Option<unsafe extern "C" fn(*mut XenbusDevice, c_uint)>,
    pub(super) remove: Option<unsafe extern "C" fn(*mut XenbusDevice)>,
    pub(super) unused: [usize; 3],
    pub(super) driver: bindings::device_driver,
    pub(super) unused2: [usize; 3],
}

/// Pointer whose default is null.
#[repr(transparent)]
pub(crate) struct Pointer<T>(pub(super) *const T);

impl<T> Default for Pointer<T> {
    fn default() -> Self {
        Self(core::ptr::null())
    }
}

/// One side of `struct gnttab_copy`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct GnttabCopyPtr {
    /// A grant reference (the low 32 bits) or a frame number.
    pub(super) u: u64,
    pub(super) domid: u16,
    pub(super) offset: u16,
}

/// `struct gnttab_copy`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct GnttabCopy {
    pub(super) source: GnttabCopyPtr,
    pub(super) dest: GnttabCopyPtr,
    pub(super) len: u16,
    pub(super) flags: u16,
    pub(super) status: i16,
}

/// `struct gnttab_map_grant_ref`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct GnttabMap {
    pub(super) host_addr: u64,
    pub(super) flags: u32,
    pub(super) gref: u32,
    pub(super) dom: u16,
    pub(super) status: i16,
    pub(super) handle: u32,
    pub(super) dev_bus_addr: u64,
}

/// `struct gnttab_unmap_grant_ref`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct GnttabUnmap {
    pub(super) host_addr: u64,
    pub(super) dev_bus_addr: u64,
    pub(super) handle: u32,
    pub(super) status: i16,
}

/// `struct gntab_unmap_queue_data`, which is no larger (`XBR_UNMAP_DATA`).
#[repr(C, align(8))]
pub(super) struct UnmapData([u8; 512]);

/// `struct xbr_bdev_limits`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct BdevLimits {
    pub(super) sectors: u64,
    pub(super) logical_block: u32,
    pub(super) physical_block: u32,
    pub(super) discard_sectors: u32,
    pub(super) discard_granularity: u32,
    pub(super) discard_alignment: u32,
    pub(super) secure_erase_sectors: u32,
    pub(super) read_only: u8,
    pub(super) removable: u8,
    pub(super) cdrom: u8,
    pub(super) pad: [u8; 5],
}

/// `struct xbr_file_limits`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct FileLimits {
    pub(super) block: u32,
    pub(super) sectors: u32,
    pub(super) segments: u16,
    pub(super) regular: u8,
    pub(super) readable: u8,
    pub(super) writable: u8,
    pub(super) direct: u8,
    pub(super) nowait: u8,
    pub(super) local: u8,
}

/// `struct io_uring_cmd`, without its end.
#[repr(C)]
pub(super) struct UringCmd {
    pub(super) file: *mut bindings::file,
    pub(super) sqe: *const c_void,
    pub(super) cmd_op: u32,
    pub(super) flags: u32,
    pub(super) pdu: [u64; 2],
}

/// `struct io_tw_state`, passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct TaskWork {
    pub(super) cancel: bool,
}

/// `io_req_tw_func_t`. Its first argument is a structure of one pointer, which is passed like the
/// pointer; the request there begins with its `struct io_uring_cmd`.
pub(super) type TaskWorkFn = unsafe extern "C" fn(*mut c_void, TaskWork);

const _: () = {
    use core::mem::{offset_of, size_of};
    assert!(size_of::<XenbusWatch>() == 48);
    assert!(offset_of!(XenbusWatch, node) == 16);
    assert!(offset_of!(XenbusWatch, will_handle) == 32);
    assert!(offset_of!(XenbusWatch, callback) == 40);
    assert!(offset_of!(XenbusDriver, probe) == 24);
    assert!(offset_of!(XenbusDriver, driver) == 72);
    assert!(size_of::<XenbusDriver>() == 72 + size_of::<bindings::device_driver>() + 24);
    assert!(size_of::<XenbusDeviceId>() == 32);
    assert!(size_of::<XenbusTransaction>() == 4);
    assert!(size_of::<GnttabCopy>() == 40);
    assert!(offset_of!(GnttabCopy, dest) == 16);
    assert!(offset_of!(GnttabCopy, len) == 32);
    assert!(offset_of!(GnttabCopy, status) == 36);
    assert!(size_of::<GnttabMap>() == 32);
    assert!(offset_of!(GnttabMap, status) == 18);
    assert!(offset_of!(GnttabMap, handle) == 20);
    assert!(size_of::<GnttabUnmap>() == 24);
    assert!(offset_of!(GnttabUnmap, handle) == 16);
    assert!(size_of::<BdevLimits>() == 40);
    assert!(size_of::<FileLimits>() == 16);
    assert!(offset_of!(UringCmd, sqe) == 8);
    assert!(offset_of!(UringCmd, cmd_op) == 16);
    assert!(offset_of!(UringCmd, pdu) == 24);
    assert!(size_of::<TaskWork>() == 1);
};

/// `GNTCOPY_source_gref`.
pub(super) const GNTCOPY_SOURCE_GREF: u16 = 1;
/// `GNTCOPY_dest_gref`.
pub(super) const GNTCOPY_DEST_GREF: u16 = 2;
/// `GNTMAP_host_map`.
pub(super) const GNTMAP_HOST_MAP: u32 = 2;
/// `GNTMAP_readonly`.
pub(super) const GNTMAP_READONLY: u32 = 4;
/// `GNTST_okay`.
pub(super) const GNTST_OKAY: i16 = 0;
/// `GNTST_general_error`.
pub(super) const GNTST_GENERAL_ERROR: i16 = -1;
/// `GNTST_no_device_space`.
pub(super) const GNTST_NO_DEVICE_SPACE: i16 = -7;
/// `DOMID_SELF`.
pub(super) const DOMID_SELF: u16 = 0x7ff0;
/// `XEN_EOI_FLAG_SPURIOUS`.
pub(super) const EOI_SPURIOUS: c_uint = 1;
/// `TASK_IDLE`: sleeps without counting as load and without a hung-task report.
pub(super) const TASK_IDLE: c_uint = 0x402;
/// `BLK_OPEN_READ`.
pub(super) const BLK_OPEN_READ: c_uint = 1;
/// `BLK_OPEN_WRITE`.
pub(super) const BLK_OPEN_WRITE: c_uint = 2;
/// `IOCB_NOWAIT`.
pub(super) const IOCB_NOWAIT: c_int = 8;
/// `IO_URING_F_COMPLETE_DEFER`.
pub(super) const IO_URING_F_COMPLETE_DEFER: c_uint = 1;
/// `IO_URING_F_CANCEL`.
pub(super) const IO_URING_F_CANCEL: c_uint = 1 << 11;
/// Offset of `cmd` in `struct io_uring_sqe`.
pub(super) const SQE_CMD: usize = 48;
/// `XBR_ATTR_DEVICE`.
pub(super) const ATTR_DEVICE: c_uint = 100;
/// `XBR_ATTR_MODE`.
pub(super) const ATTR_MODE: c_uint = 101;

pub(super) type IrqHandler = unsafe extern "C" fn(c_int, *mut c_void) -> c_uint;
#[allow(improper_ctypes_definitions)]
pub(super) type AttrFn = unsafe extern "C" fn(*mut bindings::device, c_uint) -> u64;

// The types of the kernel's bindings that have no fields in this configuration are only pointed to.
#[allow(improper_ctypes)]
unsafe extern "C" {
    // The trace points of xenbus/shim/trace.h.
    pub(super) static __tracepoint_xbr_submit: bindings::tracepoint;
    pub(super) static __tracepoint_xbr_complete: bindings::tracepoint;
    pub(super) static __tracepoint_xbr_pass: bindings::tracepoint;
    pub(super) fn rust_do_trace_xbr_submit(
        domain: c_uint,
        device: c_uint,
        queue: c_uint,
        tag: c_uint,
        operation: c_uint,
        sector: u64,
        sectors: u64,
    );
    pub(super) fn rust_do_trace_xbr_complete(
        domain: c_uint,
        device: c_uint,
        queue: c_uint,
        tag: c_uint,
        status: c_int,
    );
    pub(super) fn rust_do_trace_xbr_pass(
        domain: c_uint,
        device: c_uint,
        queue: c_uint,
        taken: c_uint,
        answered: c_uint,
        notify: bool,
    );

    pub(super) fn __xenbus_register_backend(
        driver: *mut XenbusDriver,
        owner: *mut bindings::module,
        mod_name: *const c_char,
    ) -> c_int;
    pub(super) fn xenbus_unregister_driver(driver: *mut XenbusDriver);
    pub(super) fn xenbus_read(
        transaction: XenbusTransaction,
        dir: *const c_char,
        node: *const c_char,
        len: *mut c_uint,
    ) -> *mut c_void;
    pub(super) fn xenbus_write(
        transaction: XenbusTransaction,
        dir: *const c_char,
        node: *const c_char,
        value: *const c_char,
    ) -> c_int;
    pub(super) fn xenbus_directory(
        transaction: XenbusTransaction,
        dir: *const c_char,
        node: *const c_char,
        count: *mut c_uint,
    ) -> *mut *mut c_char;
    pub(super) fn xenbus_rm(
        transaction: XenbusTransaction,
        dir: *const c_char,
        node: *const c_char,
    ) -> c_int;
    pub(super) fn xenbus_transaction_start(transaction: *mut XenbusTransaction) -> c_int;
    pub(super) fn xenbus_transaction_end(transaction: XenbusTransaction, abort: bool) -> c_int;
    pub(super) fn register_xenbus_watch(watch: *mut XenbusWatch) -> c_int;
    pub(super) fn unregister_xenbus_watch(watch: *mut XenbusWatch);
    pub(super) fn xenbus_map_ring_valloc(
        dev: *mut XenbusDevice,
        refs: *mut u32,
        count: c_uint,
        vaddr: *mut *mut c_void,
    ) -> c_int;
    pub(super) fn xenbus_unmap_ring_vfree(dev: *mut XenbusDevice, vaddr: *mut c_void) -> c_int;
    pub(super) fn bind_interdomain_evtchn_to_irqhandler_lateeoi(
        dev: *mut XenbusDevice,
        remote_port: c_uint,
        handler: IrqHandler,
        flags: c_ulong,
        name: *const c_char,
        cookie: *mut c_void,
    ) -> c_int;
    pub(super) fn unbind_from_irqhandler(irq: c_uint, cookie: *mut c_void);
    pub(super) fn xen_irq_lateeoi(irq: c_uint, flags: c_uint);
    pub(super) fn notify_remote_via_irq(irq: c_int);
    pub(super) fn gnttab_batch_copy(ops: *mut GnttabCopy, count: c_uint);
    pub(super) fn gnttab_map_refs(
        ops: *mut GnttabMap,
        kmap_ops: *mut GnttabMap,
        pages: *mut *mut bindings::page,
        count: c_uint,
    ) -> c_int;
    pub(super) fn gnttab_alloc_pages(count: c_int, pages: *mut *mut bindings::page) -> c_int;
    pub(super) fn gnttab_free_pages(count: c_int, pages: *mut *mut bindings::page);

    pub(super) fn xbr_xen_domain() -> c_int;
    pub(super) fn xbr_xen_pv_domain() -> c_int;
    pub(super) fn xbr_dev_device(dev: *mut XenbusDevice) -> *mut bindings::device;
    pub(super) fn xbr_dev_nodename(dev: *const XenbusDevice) -> *const c_char;
    pub(super) fn xbr_dev_otherend(dev: *const XenbusDevice) -> *const c_char;
    pub(super) fn xbr_dev_otherend_id(dev: *const XenbusDevice) -> c_int;
    pub(super) fn xbr_dev_set_state(dev: *mut XenbusDevice, state: c_uint);
    pub(super) fn xbr_dev_vanished(dev: *const XenbusDevice) -> c_int;
    pub(super) fn xbr_page_gfn(page: *mut bindings::page) -> c_ulong;
    pub(super) fn xbr_set_map_op(
        op: *mut GnttabMap,
        page: *mut bindings::page,
        flags: c_uint,
        gref: c_uint,
        domid: c_ushort,
    );
    pub(super) fn xbr_set_unmap_op(op: *mut GnttabUnmap, page: *mut bindings::page, handle: c_uint);
    pub(super) fn xbr_unmap_refs_sync(
        data: *mut UnmapData,
        ops: *mut GnttabUnmap,
        pages: *mut *mut bindings::page,
        count: c_uint,
    ) -> c_int;
    pub(super) fn xbr_bio_alloc(
        bdev: *mut bindings::block_device,
        vecs: c_ushort,
        opf: c_uint,
        set: *mut bindings::bio_set,
    ) -> *mut bindings::bio;
    pub(super) fn xbr_bdev_nr_sectors(bdev: *mut bindings::block_device) -> u64;
    pub(super) fn xbr_bdev_limits(bdev: *mut bindings::block_device, limits: *mut BdevLimits);
    pub(super) fn xbr_bdev_stable_writes(bdev: *mut bindings::block_device) -> c_int;
    pub(super) fn xbr_bdev_invalidate(bdev: *mut bindings::block_device) -> c_int;
    pub(super) fn xbr_file_limits(file: *const bindings::file, limits: *mut FileLimits);
    pub(super) fn xbr_file_stable_writes(file: *const bindings::file) -> c_int;
    pub(super) fn xbr_file_size(file: *const bindings::file) -> i64;
    pub(super) fn xbr_file_try_start_write(file: *const bindings::file) -> c_int;
    pub(super) fn xbr_file_start_write(file: *const bindings::file);
    pub(super) fn xbr_kiocb_started_write(iocb: *mut bindings::kiocb);
    pub(super) fn xbr_kiocb_end_write(iocb: *mut bindings::kiocb);
    pub(super) fn xbr_noio_save() -> c_uint;
    pub(super) fn xbr_noio_restore(flags: c_uint);
    // Elsewhere an inline function that reads this clock: all processors have one there.
    #[cfg_attr(not(target_arch = "x86_64"), link_name = "sched_clock")]
    pub(super) fn local_clock() -> u64;
    pub(super) fn single_task_running() -> bool;
    pub(super) fn xbr_need_resched() -> c_int;
    pub(super) fn xbr_yield_processor();
    pub(super) fn xbr_timer_setup(
        timer: *mut bindings::timer_list,
        function: extern "C" fn(*mut bindings::timer_list),
    );
    pub(super) fn xbr_timer_start(timer: *mut bindings::timer_list, ticks: usize);
    pub(super) fn xbr_pin() -> c_uint;
    pub(super) fn xbr_unpin();
    pub(super) fn xbr_halt_while(state: *const u32, halted: u32);
    pub(super) fn xbr_end_halt(cpu: c_uint);
    pub(super) fn xbr_total_ram_pages() -> c_ulong;
    pub(super) fn xbr_num_online_cpus() -> c_uint;
    pub(super) fn xbr_virt_rmb();
    pub(super) fn xbr_virt_wmb();
    pub(super) fn xbr_virt_mb();
    pub(super) fn xbr_domain_memory_mib() -> c_uint;
    pub(super) fn xbr_host_memory_mib() -> c_uint;
    pub(super) fn xbr_feature_persistent() -> c_uint;
    pub(super) fn xbr_set_memory_kib(kib: c_uint);
    pub(super) fn xbr_cond_resched();
    pub(super) fn xbr_dev_err_ratelimited(dev: *mut bindings::device, text: *const c_char);
    pub(super) fn xbr_dev_warn_ratelimited(dev: *mut bindings::device, text: *const c_char);
    pub(super) fn xbr_dev_info_ratelimited(dev: *mut bindings::device, text: *const c_char);
    pub(super) fn xbr_set_attr_fn(callback: AttrFn);
    pub(super) fn xbr_attr_groups() -> *mut *const bindings::attribute_group;
    pub(super) fn xbr_mkdev(major: u32, minor: u32) -> u32;
    pub(super) fn xbr_iminor(inode: *const bindings::inode) -> u32;
    pub(super) fn xbr_current_tgid() -> u32;
    pub(super) fn xbr_page_count(page: *const bindings::page) -> c_int;
    pub(super) fn __io_uring_cmd_done(
        cmd: *mut UringCmd,
        ret: c_int,
        res2: u64,
        issue_flags: c_uint,
        is_cqe32: bool,
    );
    pub(super) fn __io_uring_cmd_do_in_task(
        cmd: *mut UringCmd,
        callback: TaskWorkFn,
        flags: c_uint,
    );
    pub(super) fn io_uring_cmd_mark_cancelable(cmd: *mut UringCmd, issue_flags: c_uint);
    pub(super) fn xbr_page_address(page: *mut bindings::page) -> *mut c_void;
}
