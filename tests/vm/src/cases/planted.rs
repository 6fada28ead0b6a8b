// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Faults that are planted so that what judges the other cases is seen to find them. A case of this
//! file holds if it fails for the reason that it names.
//!
//! Some are made here; the others are in a build of the module that is never shipped
//! (`blkback/src/fault_injection.rs`), under cases that the shipped one passes.

use super::basic::{attach_own, fio_verify, flush};
use super::death::{s05_late_write, NOT_FENCED};
use super::migrate::mapped_reads;
use super::{detach_own_disks, insert, load_driver, Case, Context, SharedGuest, QUEUES};
use crate::backing::NullBlk;
use crate::guest::{Config, Guest, GuestKind};
use crate::{sh, TestedDriver};
use anyhow::Result;
use std::time::Duration;

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    use SharedGuest::{Nothing, Pv, Pvh};
    vec![
        Case::new(
            "planted.dom0_log",
            "a warning of dom0's kernel is found, in its log and on the console",
            Nothing,
            dom0_log,
        )
        .finds(&["dom0: WARNING: planted"]),
        Case::new(
            "planted.guest_log",
            "a complaint in the log of a guest is found",
            Pv,
            guest_log,
        )
        .nightly()
        .finds(&["BUG: planted"]),
        Case::new(
            "planted.guest_panic",
            "the panic of a guest that a case made for itself is found",
            Nothing,
            guest_panic,
        )
        .finds(&["Kernel panic", "Call Trace:"]),
        Case::new(
            "planted.leak",
            "a disk that is left behind moves each counter, and so does memory",
            Nothing,
            leak,
        )
        .no_leaks()
        .finds(&[
            "grants of guests mapped by dom0",
            "event channels of dom0",
            "lines of /proc/interrupts",
            "kernel threads of the backend",
            "backend keys in xenstore",
            "backend devices in sysfs",
            "KiB less memory available",
        ]),
        Case::new(
            "planted.wrong_driver",
            "a disk that the C driver serves is not taken for one of ours",
            Nothing,
            wrong_driver,
        )
        .nightly()
        .finds(&["the driver `vbd` serves"]),
        Case::new(
            "planted.early_flush",
            "a module that answers flushes itself is found",
            Pv,
            flush,
        )
        .faulty()
        .finds(&["flushes reached the device"]),
        Case::new(
            "planted.lost_write",
            "a module that loses a write in seven is found by fio's verification",
            Pv,
            |context| fio_verify(context, Pv),
        )
        .faulty()
        .finds(&["verify"]),
        Case::new(
            "planted.no_fence",
            "a module that does not wait for a dead process is found",
            Pv,
            s05_late_write,
        )
        .tap()
        .faulty()
        .finds(&[NOT_FENCED]),
        Case::new(
            "planted.late_unmap",
            "a module that answers before it unmaps is found, by the guest",
            Pvh,
            mapped_reads,
        )
        .nightly()
        .faulty()
        .finds(&["has not unmapped grant"]),
    ]
}

fn dom0_log(_: &mut Context) -> Result<()> {
    // The kernel does not show a line without its end.
    sh::put("/dev/kmsg", "<1>WARNING: planted\n")
}

fn guest_log(context: &mut Context) -> Result<()> {
    // Too quiet for the console.
    let guest = context.pv()?;
    guest.run("echo '<7>BUG: planted' >/dev/kmsg").map(drop)
}

fn guest_panic(_: &mut Context) -> Result<()> {
    let guest = Guest::create(Config::new("panics", GuestKind::Pv, 1))?;
    guest.start("echo c >/proc/sysrq-trigger")?;
    sh::wait_for("the guest's end", Duration::from_secs(60), || {
        Ok(guest.console.is_closed())
    })?;
    guest.destroy()
}

/// Four times the change of memory by other reasons: memory of earlier cases may come back, and hides as much.
const LOST_MIB: u32 = 96;

fn leak(context: &mut Context) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let device = NullBlk::create(128, &[])?;
    let theirs = device.clone();
    context.after_verdict("remove what was planted", move || {
        detach_own_disks()?;
        sh::wait_for("the end of the disk", Duration::from_secs(30), || {
            Ok(theirs.remove().is_ok())
        })
    });
    attach_own(context, &device.path(), "xvdk")?;
    sh::shell(&format!(
        "dd if=/dev/zero of=/dev/xvdk bs=1M count={LOST_MIB} oflag=direct status=none"
    ))
    .map(drop)
}

fn wrong_driver(context: &mut Context) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let device = context.null_blk(16, &[])?;
    context.supervise(false)?;
    let driver = context.driver;
    context.at_end("load the driver again", move || load_driver(driver));
    sh::run(&["rmmod", driver.sys_module()])?;
    // modprobe would load ours under this name.
    let file = sh::run(&["modinfo", "-n", TestedDriver::C.module()])?;
    insert(TestedDriver::C, file.trim(), &[QUEUES])?;
    attach_own(context, &device.path(), "xvdk").map(drop)
}
