// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Guests with tap disks are saved, restored and destroyed, and disks go, while they are used.

use super::basic::{verify_job, FIO};
use super::faults::{endless_load, wait_load};
use super::lifecycle::{detach_used, own_guest, refuses_to_go, save, wait_saved};
use super::tap::{image, same, wait_progress, DEVICE, VDEV};
use super::{compare, start_driver, Case, Context, SharedGuest, QUEUES};
use crate::console::GuestJob;
use crate::guest::{AttachedVbd, Config, Guest, GuestKind};
use crate::hotplug;
use crate::tap::{self, ServedDisk};
use crate::{leaks, sh, xs};
use anyhow::{ensure, Result};
use std::time::Duration;

/// Disks of a guest that has many.
const MANY: usize = 16;

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    use SharedGuest::{Nothing, Pv};
    let case = |name, about, needs, run: fn(&mut Context) -> Result<()>| {
        Case::new(name, about, needs, run).supervised()
    };
    vec![
        case(
            "tap.save_restore",
            "one phy and two tap disks: saved and restored while all of them are verified",
            Pv,
            save_restore,
        )
        .nightly(),
        case(
            "tap.s28_other_host",
            "saved and restored where the driver has one queue and small rings, and back, with large requests, while all is verified",
            SharedGuest::Nothing,
            other_host,
        )
        .nightly(),
        case(
            "tap.detach_under_load",
            "a disk is detached while a job works on it",
            Pv,
            detach_under_load,
        )
        .no_leaks(),
        case(
            "tap.destroy_under_load",
            "a guest is destroyed with a deep queue in flight",
            Nothing,
            destroy_under_load,
        )
        .nightly()
        .no_leaks(),
        case(
            "tap.disks_16",
            "a guest starts with sixteen tap disks at once, each with its own data",
            Nothing,
            many_disks,
        )
        .nightly()
        .no_leaks(),
        case(
            "tap.rmmod_in_use",
            "the module cannot be removed below a tap disk",
            Pv,
            rmmod_in_use,
        ).nightly()
        .no_leaks(),
    ]
}

/// Starts a load that verifies again and again until it is stopped.
fn endless_verify(guest: &Guest, device: &str) -> Result<GuestJob> {
    let job = verify_job(device, 4, 100, 512);
    guest.start(&format!(
        "while [ ! -e /tmp/stop ]; do {job} || exit 1; done"
    ))
}

fn save_restore(context: &mut Context) -> Result<()> {
    saved_and_restored(context, &[None])
}

/// Features that a driver of another host may lack: several queues, and rings of several pages. A driver must have
/// indirect requests, of no fewer segments: Linux's own driver stops its guest (`BUG_ON` in `blkif_queue_rw_req`, seen
/// with 7.3) if it has a larger request in a queue when it arrives.
const LITTLE: &[&str] = &["max_queues=1", "max_ring_page_order=0"];

fn other_host(context: &mut Context) -> Result<()> {
    // With a CPU for each of several queues, which then share what one queue has alone on the other host.
    let mut config = Config::new("wider", GuestKind::Pv, 4);
    config.cmdline = "xen_blkfront.max_indirect_segments=256".to_owned();
    context.give_pv(Guest::create(config)?);
    saved_and_restored(context, &[Some(LITTLE), Some(&[QUEUES])])?;
    // Other cases get one of their own.
    context.take_pv().map(drop)
}

/// Saves and restores a guest several times, each time perhaps to a driver that is reloaded.
fn saved_and_restored(context: &mut Context, hosts: &[Option<&[&str]>]) -> Result<()> {
    let device = context.null_blk(16, &[])?;
    let images = [image(context, "a.img", 8)?, image(context, "b.img", 8)?];
    let guest = context.pv()?;
    guest.run("rm -f /tmp/stop")?;
    guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    for (vdev, image) in TAPS.into_iter().zip(&images) {
        ServedDisk::attach(guest, &tap::disk(&format!("aio:{image}"), vdev, "w"))?;
    }
    let devices = ["/dev/xvda", DEVICE, "/dev/xvdc"];
    let jobs = devices.map(|device| endless_verify(guest, device));
    let jobs = jobs.into_iter().collect::<Result<Vec<GuestJob>>>()?;
    let before = segments(context.pv()?)?;
    for host in hosts {
        progress(context.pv()?)?;
        move_to(context, *host, &jobs)?;
        let now = segments(context.pv()?)?;
        ensure!(
            now == before,
            "requests of {before:?} segments were offered, now {now:?}"
        );
    }
    let guest = context.pv()?;
    progress(guest)?;
    guest.run("touch /tmp/stop")?;
    jobs.iter().try_for_each(|&job| wait_saved(guest, job))?;
    compare(guest, "xvda", &device.path(), 4)?;
    for (vdev, image) in TAPS.into_iter().zip(&images) {
        compare(guest, vdev, image, 4)?;
        ServedDisk::of(AttachedVbd::of(guest.domid, vdev)?)?.detach(guest)?;
    }
    guest.detach(&AttachedVbd::of(guest.domid, "xvda")?)
}

/// The limit for a disk of a restored guest to connect.
const CONNECTS: Duration = Duration::from_secs(60);

/// The tap disks of that guest.
const TAPS: [&str; 2] = [VDEV, "xvdc"];

/// Returns the segments of an indirect request that its tap disks offer. Before a disk is connected, its driver offers
/// as many as the host allows.
fn segments(guest: &Guest) -> Result<Vec<String>> {
    let told = |vdev| {
        let backend = AttachedVbd::of(guest.domid, vdev)?.backend;
        xs::wait_value(&format!("{backend}/state"), "4", CONNECTS)?;
        xs::must_read(&format!("{backend}/feature-max-indirect-segments"))
    };
    TAPS.into_iter().map(told).collect()
}

/// Waits until its jobs have made progress.
fn progress(guest: &Guest) -> Result<()> {
    TAPS.into_iter().try_for_each(|vdev| {
        wait_progress(&ServedDisk::of(AttachedVbd::of(guest.domid, vdev)?)?, 50)
    })
}

/// Saves the guest, reloads the driver if there are parameters for it, and restores the guest.
fn move_to(context: &mut Context, parameters: Option<&[&str]>, jobs: &[GuestJob]) -> Result<()> {
    let domid = context.pv()?.domid;
    let disks = TAPS.map(|vdev| ServedDisk::of(AttachedVbd::of(domid, vdev)?));
    let saved = save(context, "tap")?;
    for disk in disks {
        disk?.wait_gone()?;
    }
    ensure!(
        leaks::processes("tapdisk")? == 0,
        "a process serves a guest that was saved"
    );
    if let Some(parameters) = parameters {
        let driver = context.driver;
        context.supervise(false)?;
        sh::run(&["rmmod", driver.module()])?;
        start_driver(driver, parameters)?;
        context.supervise(true)?;
    }
    let guest = saved.restore(jobs)?;
    context.give_pv(guest);
    Ok(())
}

fn detach_under_load(context: &mut Context) -> Result<()> {
    let image = image(context, "a.img", 16)?;
    let specification = tap::disk(&format!("aio:{image}"), VDEV, "w");
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &specification)?;
    let load = guest.start(&endless_load(DEVICE))?;
    wait_load(&disk.vbd)?;
    detach_used(guest, &disk.vbd, load)?;
    disk.wait_gone()?;
    let disk = ServedDisk::attach(guest, &specification)?;
    guest.run_for(&verify_job(DEVICE, 2, 60, 512), FIO)?;
    same(guest, &image, 2)?;
    disk.detach(guest)
}

fn destroy_under_load(context: &mut Context) -> Result<()> {
    let image = image(context, "a.img", 16)?;
    let guest = own_guest(1, vec![tap::disk(&format!("aio:{image}"), VDEV, "w")])?;
    let disk = ServedDisk::of(AttachedVbd::of(guest.domid, VDEV)?)?;
    context.check_driver(&disk.vbd)?;
    guest.start(&endless_load(DEVICE))?;
    wait_load(&disk.vbd)?;
    guest.destroy()?;
    disk.vbd.wait_gone()?;
    disk.wait_gone()
}

fn many_disks(context: &mut Context) -> Result<()> {
    let names: Vec<String> = ('a'..).take(MANY).map(|c| format!("xvd{c}")).collect();
    let mut images = Vec::new();
    for name in &names {
        images.push(image(context, &format!("{name}.img"), 4)?);
    }
    let disk = |(name, image): (&String, &String)| tap::disk(&format!("aio:{image}"), name, "w");
    let guest = own_guest(1, names.iter().zip(&images).map(disk).collect())?;
    let disks = names
        .iter()
        .map(|name| ServedDisk::of(AttachedVbd::of(guest.domid, name)?));
    let disks = disks.collect::<Result<Vec<ServedDisk>>>()?;
    ensure!(
        leaks::processes("tapdisk")? == MANY as u64,
        "there is not one process for each disk"
    );
    for name in &names {
        guest.run(&format!(
            "yes {name} | dd of=/dev/{name} bs=64k count=8 iflag=fullblock oflag=direct 2>/dev/null"
        ))?;
    }
    for (name, image) in names.iter().zip(&images) {
        compare(&guest, name, image, 1)?;
        let first = sh::run(&["head", "-c", "5", image])?;
        ensure!(
            first.trim() == name,
            "the disk {name} has the data of {first}"
        );
    }
    guest.destroy()?;
    disks.iter().try_for_each(ServedDisk::wait_gone)
}

fn rmmod_in_use(context: &mut Context) -> Result<()> {
    let image = image(context, "a.img", 8)?;
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk(&format!("aio:{image}"), VDEV, "w"))?;
    refuses_to_go(context)?;
    let guest = context.pv()?;
    guest.run_for(&verify_job(DEVICE, 2, 60, 512), FIO)?;
    same(guest, &image, 2)?;
    disk.detach(guest)
}
