// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Storage that hangs, and recovers: it may stop its own disk and nothing else, whatever operations on that disk
//! follow.

use super::basic::{compare, detach_own, verify_job, FIO};
use super::faults::{endless, endless_load, wait_load};
use super::lifecycle::own_guest;
use super::memory::Parameter;
use super::self_attach::{self, OwnDisks};
use super::{Case, Context, SharedGuest};
use crate::backing::{linear, Dm};
use crate::guest::{AttachedVbd, Guest};
use crate::{hotplug, sh, xs};
use anyhow::{bail, ensure, Context as _, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    use DiskStep::{Bind, Destroy, Return, Unbind};
    use SharedGuest::{Nothing, Pv};
    let ordered = |name: &str, about: &str, steps: &'static [DiskStep], pages| {
        Case::new(name, about, Nothing, move |context| {
            in_order(context, steps, pages)
        })
        .nightly()
        .no_leaks()
    };
    let order = |name: &str, about: &str, steps| ordered(name, about, steps, Pages::Copied);
    vec![
        order(
            "hung.destroy",
            "the guest of a hung disk is destroyed, then the disk comes back",
            &[Destroy, Return],
        )
        .nightly(),
        order(
            "hung.unbind_destroy",
            "a hung disk is unbound, its guest destroyed, then the disk comes back",
            &[Unbind, Destroy, Return],
        ),
        order(
            "hung.unbind_bind_destroy",
            "a hung disk is unbound and bound, its guest destroyed, then the disk comes back",
            &[Unbind, Bind, Destroy, Return],
        )
        .nightly(),
        order(
            "hung.unbind_return_destroy",
            "a hung disk is unbound and comes back, then its guest is destroyed",
            &[Unbind, Return, Destroy],
        )
        .nightly(),
        ordered(
            "hung.kept",
            "the same with pages of the guest that stay mapped: until the disk comes back, and no longer",
            &[Unbind, Destroy, Return],
            Pages::Kept,
        ),
        Case::new(
            "hung.rebind_verified",
            "a hung disk is unbound and bound, and comes back before or after that: nothing is lost or done twice",
            Pv,
            rebind_verified,
        )
        .nightly()
        .no_leaks(),
        Case::new(
            "hung.no_tags",
            "a guest is destroyed while its queues sleep in the block layer for want of tags",
            Nothing,
            no_tags,
        )
        .nightly()
        .no_leaks(),
        Case::new(
            "hung.no_tags_kept",
            "the same in the middle of large requests from pages that stay mapped: until the disk comes back",
            Nothing,
            no_tags_kept,
        )
        .nightly()
        .no_leaks(),
        Case::new(
            "hung.kept_swept",
            "pages that nobody uses are unmapped while a disk hangs, and those of what hangs are not",
            Pv,
            kept_swept,
        )
        .nightly()
        .no_leaks(),
        Case::new(
            "hung.write_back",
            "a disk is attached whose dirty pages in dom0 cannot be written, and unbound before they can",
            Nothing,
            write_back,
        )
        .no_leaks(),
    ]
}

/// Operation on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DiskStep {
    Unbind,
    Bind,
    Destroy,
    Return,
}

/// Location of the guest's data during the I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pages {
    /// Nothing of the guest is in the hands of the device.
    Copied,
    /// The device has them as long as it has the I/O.
    Kept,
}

/// Time limit in an emulated machine for actions that must not wait for the hanging storage.
pub(super) const QUICK: Duration = Duration::from_secs(60);

/// A device of device mapper over null_blk that can be hung.
pub(super) fn hangable(context: &mut Context) -> Result<Dm> {
    let below = context.null_blk(16, &[])?;
    let disk = Dm::create("vmtest-hung", &linear(&below.path(), 32768))?;
    let theirs = disk.clone();
    // This also runs after a failure: a device that hangs cannot be removed.
    context.at_end("remove the mapped device", move || {
        theirs.resume()?;
        theirs.remove()
    });
    Ok(disk)
}

/// Runs what must not wait, and does not wait for it either: it may hang for ever.
fn quickly(what: &str, argv: &[&str]) -> Result<i32> {
    let mut child = std::process::Command::new(argv[0])
        .args(&argv[1..])
        .stdout(std::process::Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start `{}`", argv.join(" ")))?;
    let mut code = None;
    sh::wait_for(&format!("the end of `{what}`"), QUICK, || {
        let status = child.try_wait().context("cannot ask for a process")?;
        code = status.map(|status| status.code().unwrap_or(-1));
        Ok(status.is_some())
    })?;
    Ok(code.unwrap_or(-1))
}

/// Has the driver take or leave a device.
pub(super) fn bus(context: &Context, vbd: &AttachedVbd, file: &str) -> Result<()> {
    let driver = context.driver.bus_name();
    let name = vbd.sysfs();
    let name = name.file_name().unwrap_or_default().to_string_lossy();
    let line = format!("echo {name} > /sys/bus/xen-backend/drivers/{driver}/{file}");
    let code = quickly(&line, &["sh", "-c", &line])?;
    ensure!(code == 0, "`{line}` failed with status {code}");
    Ok(())
}

/// The thread that serves every backend of the host works: a disk comes and goes. The module says that
/// it is in use, and does not hang.
pub(super) fn host_is_well(context: &mut Context, after: &str) -> Result<()> {
    others_are_served(context, after)?;
    // 1 is rmmod's word for a refusal.
    let refused = quickly("rmmod", &["rmmod", context.driver.sys_module()])?;
    ensure!(
        refused == 1,
        "rmmod ended with status {refused} after {after}"
    );
    Ok(())
}

/// A disk comes and goes.
pub(super) fn others_are_served(context: &mut Context, after: &str) -> Result<()> {
    let look = |context: &mut Context| -> Result<()> {
        let other = context.null_blk(16, &[])?;
        let started = Instant::now();
        let disks = OwnDisks::connect(&other.path(), 1)?;
        disks.wait("4")?;
        self_attach::write(&disks.0[0], 1)?;
        disks.disconnect()?;
        let took = started.elapsed();
        ensure!(
            took < QUICK,
            "another disk took {} s to come and go",
            took.as_secs()
        );
        Ok(())
    };
    look(context).with_context(|| format!("after {after}"))
}

fn in_order(context: &mut Context, steps: &[DiskStep], pages: Pages) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let copies = || Parameter::set("feature_persistent", "N");
    let _copies = (pages == Pages::Copied).then(copies).transpose()?;
    let disk = hangable(context)?;
    let guest = own_guest(2, vec![hotplug::disk(&disk.path(), "xvda", "w")?])?;
    let vbd = AttachedVbd::of(guest.domid, "xvda")?;
    guest.start(&endless_load("/dev/xvda"))?;
    wait_load(&vbd)?;
    disk.suspend()?;
    let mut guest = Some(guest);
    for (at, step) in steps.iter().enumerate() {
        match step {
            DiskStep::Unbind => bus(context, &vbd, "unbind")?,
            DiskStep::Bind => bus(context, &vbd, "bind")?,
            DiskStep::Destroy => match (guest.take(), pages) {
                (None, _) => bail!("the guest is destroyed twice"),
                // The domain vanishes, pages and all, although the device still has its I/O.
                (Some(guest), Pages::Copied) => guest.destroy()?,
                (Some(its), Pages::Kept) => {
                    destroy_quickly(&its)?;
                    guest = Some(its);
                }
            },
            DiskStep::Return => disk.resume()?,
        }
        let so_far = &steps[..=at];
        let after = format!("{so_far:?}");
        if at + 1 == steps.len() {
            others_are_served(context, &after)?;
        } else if so_far == [DiskStep::Unbind, DiskStep::Return] {
            // It was unbound, and its I/O is over: the module may be removed.
            others_are_served(context, &after)?;
        } else {
            host_is_well(context, &after)?;
        }
    }
    if let Some(guest) = guest {
        wait_vanished(guest)?;
    }
    vbd.wait_gone()
}

/// Destroys a guest whose pages a device still has: the domain stays until they come back.
pub(super) fn destroy_quickly(guest: &Guest) -> Result<()> {
    let id = guest.domid.to_string();
    let code = quickly("xl destroy", &["xl", "destroy", &id])?;
    ensure!(code == 0, "`xl destroy` ended with status {code}");
    Ok(())
}

/// Its pages have come back with the device.
pub(super) fn wait_vanished(guest: Guest) -> Result<()> {
    guest.wait_gone(QUICK)?;
    guest.give_up()
}

fn rebind_verified(context: &mut Context) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let disk = hangable(context)?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&disk.path(), "xvda", "w")?)?;
    let state = format!("{}/state", vbd.backend);
    for returns_first in [false, true] {
        disk.suspend()?;
        let before = vbd.statistic("wr_req")?;
        let job = context.pv()?.start(&verify_job("/dev/xvda", 8, 100, 512))?;
        sh::wait_for("writes that hang", QUICK, || {
            Ok(vbd.statistic("wr_req")? > before)
        })?;
        bus(context, &vbd, "unbind")?;
        host_is_well(context, "a hung disk was unbound")?;
        if returns_first {
            disk.resume()?;
            bus(context, &vbd, "bind")?;
        } else {
            bus(context, &vbd, "bind")?;
            // The disk offers itself, and must not use rings from which earlier requests are in flight.
            xs::wait_value(&state, "2", QUICK)?;
            host_is_well(context, "a hung disk was bound again")?;
            ensure!(
                xs::must_read(&state)? == "2",
                "the disk was connected while requests of its life before were in flight"
            );
            disk.resume()?;
        }
        xs::wait_value(&state, "4", QUICK)?;
        let guest = context.pv()?;
        let done = guest.wait(job, FIO)?;
        done.succeeded("fio failed over a disk that was unbound and bound")?;
        compare(guest, "xvda", &disk.path(), 8)?;
    }
    context.pv()?.detach(&vbd)
}

/// A loop device over `below`, with so few requests in flight that a queue soon waits for one of them.
pub(super) fn narrow_loop(context: &mut Context, below: &str) -> Result<String> {
    let path = loop_device(context, below, &["--direct-io=on"])?;
    let name = path.trim_start_matches("/dev/");
    sh::put(format!("/sys/block/{name}/queue/scheduler"), "none")?;
    sh::put(format!("/sys/block/{name}/queue/nr_requests"), "4")?;
    Ok(path)
}

/// A loop device over `below` for the time of the case.
pub(super) fn loop_device(context: &mut Context, below: &str, options: &[&str]) -> Result<String> {
    sh::modprobe("loop", &[])?;
    let loops = [&["losetup", "--find", "--show", below], options].concat();
    let path = sh::run(&loops)?.trim().to_owned();
    let theirs = path.clone();
    context.at_end(format!("remove {path}"), move || {
        sh::run(&["losetup", "--detach", &theirs]).map(drop)
    });
    Ok(path)
}

/// Waits until a queue of a disk sleeps in the block layer because it gets no tag.
pub(super) fn wait_for_sleeper(vbd: &AttachedVbd) -> Result<()> {
    let domain = vbd.backend.split('/').nth_back(1).unwrap_or_default();
    let thread = format!("{domain}.{}-", vbd.vdev);
    let line = format!("for t in $(pgrep '^{thread}'); do cat /proc/$t/stack; done");
    sh::wait_for("a queue without a tag", Duration::from_secs(60), || {
        Ok(sh::shell(&line)?.contains("blk_mq_get_tag"))
    })
}

fn no_tags(context: &mut Context) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let _copies = Parameter::set("feature_persistent", "N")?;
    let disk = hangable(context)?;
    let path = narrow_loop(context, &disk.path())?;
    let guest = own_guest(2, vec![hotplug::disk(&path, "xvda", "w")?])?;
    let vbd = AttachedVbd::of(guest.domid, "xvda")?;
    guest.start(&endless_load("/dev/xvda"))?;
    wait_load(&vbd)?;
    disk.suspend()?;
    wait_for_sleeper(&vbd)?;
    // This ends only when the hypervisor has released the domain: not while a page of it is mapped.
    guest.destroy()?;
    host_is_well(context, "a guest was destroyed whose queue sleeps")?;
    disk.resume()?;
    vbd.wait_gone()
}

/// Large requests, each with a page of descriptors, that end at the first error only.
fn large_load(device: &str) -> String {
    endless(device, "1m", 8)
}

fn no_tags_kept(context: &mut Context) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let disk = hangable(context)?;
    let path = narrow_loop(context, &disk.path())?;
    let guest = own_guest(2, vec![hotplug::disk(&path, "xvda", "w")?])?;
    let vbd = AttachedVbd::of(guest.domid, "xvda")?;
    guest.start(&large_load("/dev/xvda"))?;
    wait_load(&vbd)?;
    let kept = vbd.statistic("kept_pages")?;
    ensure!(kept >= 256, "only {kept} pages stay mapped");
    disk.suspend()?;
    wait_for_sleeper(&vbd)?;
    destroy_quickly(&guest)?;
    host_is_well(context, "a guest was destroyed whose queue sleeps")?;
    disk.resume()?;
    wait_vanished(guest)?;
    vbd.wait_gone()
}

fn kept_swept(context: &mut Context) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let disk = hangable(context)?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&disk.path(), "xvda", "w")?)?;
    let load = guest.start(&large_load("/dev/xvda"))?;
    wait_load(&vbd)?;
    guest.run("killall fio")?;
    let _ended = guest.wait(load, QUICK)?;
    let many = vbd.statistic("kept_pages")?;
    let before = vbd.statistic("wr_req")?;
    // Few pages, of those that are mapped already.
    let job = guest.start(
        "fio --name=few --filename=/dev/xvda --size=4m --direct=1 --ioengine=libaio --iodepth=4 --rw=randwrite --bs=4k \
         --number_ios=2000 --verify=crc32c --verify_fatal=1 --do_verify=1 --output-format=terse",
    )?;
    sh::wait_for("writes", QUICK, || {
        Ok(vbd.statistic("wr_req")? > before + 100)
    })?;
    disk.suspend()?;
    let mut kept = many;
    let swept = sh::wait_for("a sweep of what nobody uses", 2 * QUICK, || {
        kept = vbd.statistic("kept_pages")?;
        Ok(kept * 4 < many)
    });
    disk.resume()?;
    swept.with_context(|| format!("{kept} of {many} pages are mapped"))?;
    ensure!(kept > 0, "what hangs has no page any more");
    let done = context.pv()?.wait(job, FIO)?;
    done.succeeded("fio failed over a disk that hung")?;
    let guest = context.pv()?;
    compare(guest, "xvda", &disk.path(), 4)?;
    guest.detach(&vbd)
}

fn write_back(context: &mut Context) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let disk = hangable(context)?;
    // Open, because closing writes it back.
    let dirty = File::options().write(true).open(disk.path())?;
    dirty.write_all_at(&[7; 4096], 0)?;
    disk.suspend()?;
    sh::run(&[
        "xl",
        "block-attach",
        "0",
        &hotplug::disk(&disk.path(), "xvdj", "w")?,
    ])?;
    let vbd = AttachedVbd::of(0, "xvdj")?;
    // The frontend waits for us, and we for the device.
    xs::wait_value(&format!("{}/state", vbd.frontend), "3", QUICK)?;
    host_is_well(context, "a disk that cannot be got ready")?;
    ensure!(
        xs::must_read(&format!("{}/state", vbd.backend))? == "2",
        "a disk was connected before dom0's own writes to it were through"
    );
    bus(context, &vbd, "unbind")?;
    host_is_well(context, "its being unbound")?;
    disk.resume()?;
    drop(dirty);
    bus(context, &vbd, "bind")?;
    xs::wait_value(&format!("{}/state", vbd.backend), "4", QUICK)?;
    detach_own(&vbd)
}
