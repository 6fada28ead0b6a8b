// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Disks and guests come and go, in order and out of order.

use super::basic::{attach_own, compare, detach_own, verify_job, FIO};
use super::faults::{endless_load, wait_load};
use super::memory::Parameter;
use super::{load_driver, start_driver, Case, Context, SharedGuest};
use crate::backing::{linear, Dm};
use crate::console::GuestJob;
use crate::guest::{AttachedVbd, Config, Guest, GuestKind, SavedGuest, COMMAND, RUN_DIR};
use crate::hotplug;
use crate::leaks::Leaks;
use crate::{sh, xs, TestedDriver};
use anyhow::{bail, ensure, Context as _, Result};
use dom0::memory;
use std::fs;
use std::path::Path;
use std::time::Duration;

const CYCLES: u32 = 50;

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    use SharedGuest::{Nothing, Pv};
    vec![
        Case::new(
            "lifecycle.detach_under_load",
            "a disk is detached while a job works on it",
            Pv,
            detach_under_load,
        )
        .nightly()
        .no_leaks(),
        Case::new(
            "lifecycle.save_restore",
            "a guest is saved and restored while fio verifies",
            Pv,
            save_restore,
        ),
        Case::new(
            "lifecycle.suspend_test",
            "dom0 freezes its processes for a suspend, in the kernel's test mode, below a verified load",
            Pv,
            suspend_test,
        ),
        Case::new(
            "lifecycle.checkpoint",
            "a guest goes on after a checkpoint, over the same rings",
            Pv,
            checkpoint,
        ).nightly(),
        Case::new(
            "lifecycle.rebind",
            "the driver leaves a live disk and comes back, and its guest finds mapped what it was told",
            Pv,
            rebind,
        )
        .nightly(),
        Case::new(
            "lifecycle.rebind_smaller",
            "the driver leaves a live disk, and one that offers less comes: the guest keeps what it was told",
            Pv,
            rebind_smaller,
        )
        .nightly(),
        Case::new(
            "lifecycle.no_online",
            "a device without the key online connects, as with the C driver",
            Nothing,
            no_online,
        )
        .no_leaks(),
        Case::new(
            "lifecycle.destroy_under_load",
            "a guest is destroyed with a deep queue in flight",
            Nothing,
            destroy_under_load,
        )
        .no_leaks(),
        Case::new(
            "lifecycle.destroy_hung_device",
            "a guest is destroyed while its device hangs",
            Nothing,
            destroy_hung,
        ).nightly()
        .no_leaks(),
        Case::new(
            "lifecycle.rmmod_in_use",
            "the module cannot be removed below a disk",
            Nothing,
            rmmod_in_use,
        )
        .no_leaks(),
        Case {
            ours: true,
            ..Case::new(
                "lifecycle.falls_back",
                "whoever asks for the C driver gets this one, and the C driver where the module is missing",
                Nothing,
                falls_back,
            )
        },
        Case::new(
            "lifecycle.reload",
            "the module is removed and loaded again, and serves",
            Nothing,
            reload,
        ),
        Case::new(
            "lifecycle.cycles",
            "50 times attach, write, detach",
            Nothing,
            cycles,
        )
        .no_leaks()
        .nightly(),
    ]
}

fn detach_under_load(context: &mut Context) -> Result<()> {
    let device = context.null_blk(16, &[])?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    let load = guest.start(&endless_load("/dev/xvda"))?;
    wait_load(&vbd)?;
    detach_used(guest, &vbd, load)?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    guest.run_for(&verify_job("/dev/xvda", 2, 60, 512), FIO)?;
    compare(guest, "xvda", &device.path(), 2)?;
    guest.detach(&vbd)
}

/// Number of attempts at an orderly detach: xl waits for ten seconds each time, in which a guest on a slow machine may
/// not have closed its disk.
const DETACHES: u32 = 6;

/// Takes a disk away on which a job works, in the orderly way, and waits for the end of both.
pub(super) fn detach_used(guest: &Guest, vbd: &AttachedVbd, load: GuestJob) -> Result<()> {
    let id = guest.domid.to_string();
    let mut said = String::new();
    for _ in 0..DETACHES {
        let asked = sh::status(&["xl", "block-detach", &id, &vbd.vdev], COMMAND)?;
        if asked.rc == 0 {
            vbd.wait_gone()?;
            let done = guest.wait(load, COMMAND)?;
            ensure!(
                done.rc != 0,
                "the load did not notice that its disk was taken away"
            );
            return Ok(());
        }
        said = asked.text;
    }
    bail!(
        "the guest and the backend did not close {} in {DETACHES} orderly detaches: {}",
        vbd.backend,
        sh::tail(&said, 400)
    )
}

/// A file for a saved guest, which goes with the case.
fn saved_file(context: &mut Context, name: &str) -> String {
    let file = format!("{RUN_DIR}/{name}");
    let theirs = file.clone();
    context.at_end("remove the saved guest", move || {
        match std::fs::remove_file(theirs) {
            // An earlier clean-up may have removed a file of that name.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            done => Ok(done?),
        }
    });
    file
}

/// Saves the shared PV guest to a file that the case removes; there is room for one.
pub(super) fn save(context: &mut Context, name: &str) -> Result<SavedGuest> {
    let file = saved_file(context, &format!("{name}.save"));
    context.take_pv()?.save(&file)
}

/// Returns a load that verifies the disk again and again until it is [stopped](end_job): a load that ends on its own
/// may do so while its guest is saved, when no reader is on its console.
pub(super) fn long_job(mib: u32) -> String {
    let job = verify_job("/dev/xvda", mib, 200, 512);
    format!("rm -f /tmp/stop; while [ ! -e /tmp/stop ]; do {job} || exit 1; done")
}

/// Checks that the load of a guest that was saved, or of a disk that changed its driver, continues, and ends it, which
/// must give no error.
pub(super) fn end_job(guest: &Guest, vbd: &AttachedVbd, job: GuestJob) -> Result<()> {
    wait_load(vbd).with_context(|| vbd.describe())?;
    guest.run("touch /tmp/stop")?;
    wait_saved(guest, job)
}

/// Waits for a job that was running when its guest was saved.
pub(crate) fn wait_saved(guest: &Guest, job: GuestJob) -> Result<()> {
    let done = guest.wait(job, FIO).with_context(|| {
        let vbd = AttachedVbd::of(guest.domid, "xvda");
        vbd.map_or_else(|error| format!("{error:#}"), |vbd| vbd.describe())
    })?;
    done.succeeded("fio failed across what was done to its guest")?;
    Ok(())
}

fn save_restore(context: &mut Context) -> Result<()> {
    let device = context.null_blk(32, &[])?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    let job = guest.start(&long_job(8))?;
    wait_load(&vbd)?;
    let saved = save(context, "pv")?;
    vbd.wait_gone()?;
    let guest = saved.restore(&[job])?;
    let vbd = AttachedVbd::of(guest.domid, "xvda")?;
    let ended = end_job(&guest, &vbd, job);
    context.give_pv(guest);
    ended?;
    context.check_driver(&vbd)?;
    let guest = context.pv()?;
    compare(guest, "xvda", &device.path(), 8)?;
    guest.detach(&vbd)
}

/// The kernel's test of suspend: how far it goes before it turns back after five seconds.
struct SuspendTest;

impl SuspendTest {
    const LEVEL: &str = "/sys/power/pm_test";

    /// Suspends up to this level and resumes.
    fn run(level: &str) -> Result<()> {
        let _reset = SuspendTest;
        fs::write(SuspendTest::LEVEL, level).context("the kernel has no tests of suspend")?;
        fs::write("/sys/power/state", "freeze")
            .with_context(|| format!("the suspend test {level} failed"))
    }
}

impl Drop for SuspendTest {
    fn drop(&mut self) {
        if let Err(error) = fs::write(SuspendTest::LEVEL, "none") {
            eprintln!("cannot end the tests of suspend: {error}");
        }
    }
}

fn suspend_test(context: &mut Context) -> Result<()> {
    let device = context.null_blk(32, &[])?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    let job = guest.start(&long_job(8))?;
    wait_load(&vbd)?;
    let before = vbd.statistic("rd_req")? + vbd.statistic("wr_req")?;
    // The level "devices" suspends the console, too, over which this machine reports.
    SuspendTest::run("freezer")?;
    // Connected to the same rings, and not one request lost.
    let after = vbd.statistic("rd_req")? + vbd.statistic("wr_req")?;
    ensure!(after > before, "no request was served since the suspend");
    let guest = context.pv()?;
    end_job(guest, &vbd, job)?;
    compare(guest, "xvda", &device.path(), 8)?;
    guest.detach(&vbd)
}

fn checkpoint(context: &mut Context) -> Result<()> {
    let device = context.null_blk(16, &[])?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    let job = guest.start(&long_job(4))?;
    wait_load(&vbd)?;
    let file = saved_file(context, "pv.checkpoint");
    let guest = context.pv()?;
    let id = guest.domid.to_string();
    sh::run_for(&["xl", "save", "-c", &id, &file], Duration::from_secs(240))?;
    end_job(guest, &vbd, job)?;
    compare(guest, "xvda", &device.path(), 4)?;
    guest.detach(&vbd)
}

fn rebind(context: &mut Context) -> Result<()> {
    let device = context.null_blk(16, &[])?;
    let path = device.path();
    // A guest that connects to a driver that copies does not expect that the next one keeps its pages.
    let copies = Parameter::set("feature_persistent", "N")?;
    let vbd = context.pv()?.attach(&hotplug::disk(&path, "xvda", "w")?)?;
    drop(copies);
    rebind_told(context, &vbd, "0")?;
    ensure!(vbd.statistic("mapped")? == 0, "pages were mapped");
    compare(context.pv()?, "xvda", &path, 4)?;
    context.pv()?.detach(&vbd)?;
    let vbd = context.pv()?.attach(&hotplug::disk(&path, "xvda", "w")?)?;
    rebind_told(context, &vbd, "1")?;
    ensure!(vbd.statistic("mapped")? > 0, "no pages were mapped");
    compare(context.pv()?, "xvda", &path, 4)?;
    context.pv()?.detach(&vbd)
}

/// Unbinds the driver from a disk that has offered `persistent` to its guest, and binds it again.
fn rebind_told(context: &mut Context, vbd: &AttachedVbd, persistent: &str) -> Result<()> {
    let key = format!("{}/feature-persistent", vbd.backend);
    let guest = context.pv()?;
    guest.run_for(&verify_job("/dev/xvda", 4, 60, 512), FIO)?;
    let directory = format!("/sys/bus/xen-backend/drivers/{}", context.driver.bus_name());
    let name = vbd
        .sysfs()
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    for _ in 0..2 {
        sh::put(format!("{directory}/unbind"), &name)?;
        sh::put(format!("{directory}/bind"), &name)?;
        xs::wait_value(
            &format!("{}/state", vbd.backend),
            "4",
            Duration::from_secs(30),
        )?;
        let told = xs::read(&key)?.unwrap_or_else(|| "0".to_owned());
        ensure!(told == persistent, "{key} became `{told}`");
        let guest = context.pv()?;
        guest.run_for(&verify_job("/dev/xvda", 4, 60, 512), FIO)?;
    }
    Ok(())
}

/// Sizes that the driver offers to a frontend.
const SIZES: [&str; 3] = [
    "multi-queue-max-queues",
    "max-ring-page-order",
    "feature-max-indirect-segments",
];

fn rebind_smaller(context: &mut Context) -> Result<()> {
    let device = context.null_blk(16, &[])?;
    let path = device.path();
    let driver = context.driver;
    let vbd = context.pv()?.attach(&hotplug::disk(&path, "xvda", "w")?)?;
    let told = || {
        SIZES
            .iter()
            .map(|key| xs::must_read(&format!("{}/{key}", vbd.backend)))
            .collect::<Result<Vec<_>>>()
    };
    let before = told()?;
    let job = verify_job("/dev/xvda", 4, 60, 512);
    context.pv()?.run_for(&job, FIO)?;
    let name = vbd.sysfs();
    let name = name.file_name().unwrap_or_default().to_string_lossy();
    let directory = format!("/sys/bus/xen-backend/drivers/{}", driver.bus_name());
    sh::put(format!("{directory}/unbind"), &name)?;
    sh::wait_for("the end of the driver", Duration::from_secs(20), || {
        Ok(sh::run(&["rmmod", driver.sys_module()]).is_ok())
    })?;
    let less = [
        "max_queues=1",
        "max_ring_page_order=0",
        "max_indirect_segments=8",
    ];
    start_driver(driver, &less)?;
    xs::wait_value(
        &format!("{}/state", vbd.backend),
        "4",
        Duration::from_secs(30),
    )?;
    let after = told()?;
    ensure!(
        before == after,
        "{SIZES:?} were {before:?} and became {after:?}"
    );
    context.pv()?.run_for(&job, FIO)?;
    compare(context.pv()?, "xvda", &path, 4)?;
    context.pv()?.detach(&vbd)?;
    load_driver(driver)
}

fn no_online(context: &mut Context) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let device = context.null_blk(16, &[])?;
    let vbd = attach_own(context, &device.path(), "xvdk")?;
    let name = vbd.sysfs();
    let name = name.file_name().unwrap_or_default().to_string_lossy();
    let directory = format!("/sys/bus/xen-backend/drivers/{}", context.driver.bus_name());
    sh::put(format!("{directory}/unbind"), &name)?;
    xs::remove(&format!("{}/online", vbd.backend))?;
    sh::put(format!("{directory}/bind"), &name)?;
    xs::wait_value(
        &format!("{}/state", vbd.backend),
        "4",
        Duration::from_secs(30),
    )?;
    sh::shell("dd if=/dev/zero of=/dev/xvdk bs=64k count=4 oflag=direct status=none")?;
    detach_own(&vbd)
}

/// A guest of the case's own, with these disks.
pub(super) fn own_guest(vcpus: u32, disks: Vec<String>) -> Result<Guest> {
    let mut config = Config::new("victim", GuestKind::Pv, vcpus);
    config.disks = disks;
    Guest::create(config)
}

fn destroy_under_load(context: &mut Context) -> Result<()> {
    // Each request takes 50 ms, so that the queue is full at any moment.
    let device = context.null_blk(
        16,
        &[
            ("irqmode", "2"),
            ("completion_nsec", "50000000"),
            ("hw_queue_depth", "128"),
        ],
    )?;
    let guest = own_guest(2, vec![hotplug::disk(&device.path(), "xvda", "w")?])?;
    let vbd = AttachedVbd::of(guest.domid, "xvda")?;
    context.check_driver(&vbd)?;
    guest.start(&endless_load("/dev/xvda"))?;
    wait_load(&vbd)?;
    guest.destroy()?;
    vbd.wait_gone()
}

fn destroy_hung(context: &mut Context) -> Result<()> {
    let below = context.null_blk(16, &[])?;
    let disk = Dm::create("vmtest-hung", &linear(&below.path(), 32768))?;
    let theirs = disk.clone();
    context.at_end("remove the mapped device", move || theirs.remove());
    let guest = own_guest(2, vec![hotplug::disk(&disk.path(), "xvda", "w")?])?;
    let vbd = AttachedVbd::of(guest.domid, "xvda")?;
    guest.start(&endless_load("/dev/xvda"))?;
    wait_load(&vbd)?;
    disk.suspend()?;
    let (theirs, id) = (disk.clone(), guest.domid.to_string());
    // The domain cannot vanish before its pages come back from the device, but xl must not hang.
    let destroyed = sh::run_for(&["xl", "destroy", &id], Duration::from_secs(60));
    theirs.resume()?;
    destroyed?;
    guest.destroy()?;
    vbd.wait_gone()
}

fn cycles(context: &mut Context) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let device = context.null_blk(16, &[])?;
    let path = device.path();
    let mut cycle = || -> Result<()> {
        let vbd = attach_own(context, &path, "xvdk")?;
        sh::shell("dd if=/dev/zero of=/dev/xvdk bs=64k count=4 oflag=direct status=none")?;
        detach_own(&vbd)
    };
    keeps_memory(10, CYCLES, &mut cycle)
}

/// Runs cycles; the first few fill caches that stay, and later ones must not cost memory.
pub(super) fn keeps_memory(
    warm: u32,
    cycles: u32,
    mut cycle: impl FnMut() -> Result<()>,
) -> Result<()> {
    for _ in 0..warm {
        cycle()?;
    }
    let before = kernel_memory()?;
    for _ in warm..cycles {
        cycle()?;
    }
    // Memory that is freed with a delay comes back; leaked memory does not.
    let (mut lost, counted) = (0, cycles - warm);
    sh::wait_for(
        &format!("the return of the memory of the last {counted} cycles"),
        Duration::from_secs(30),
        || {
            lost = kernel_memory()?.saturating_sub(before);
            Ok(lost < 8 * 1024)
        },
    )
    .with_context(|| format!("{lost} KiB were lost in the last {counted} of {cycles} cycles"))
}

/// Memory in KiB that the kernel itself holds: not that of programs or files, such as xenstored's
/// heap and the logs, which grow with every cycle.
fn kernel_memory() -> Result<u64> {
    dom0::udev::settle()?;
    sh::put("/proc/sys/vm/drop_caches", "3")?;
    let mut held = memory::field("MemTotal:")?;
    for other in ["MemFree:", "Buffers:", "Cached:", "AnonPages:"] {
        held = held.saturating_sub(memory::field(other)?);
    }
    Ok(held)
}

/// The module cannot be removed while a disk is used.
pub(super) fn refuses_to_go(context: &Context) -> Result<()> {
    let refused = sh::status(
        &["rmmod", context.driver.sys_module()],
        Duration::from_secs(30),
    )?;
    ensure!(
        refused.rc != 0,
        "rmmod removed the module below a disk in use"
    );
    Ok(())
}

fn rmmod_in_use(context: &mut Context) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let device = context.null_blk(16, &[])?;
    let vbd = attach_own(context, &device.path(), "xvdk")?;
    refuses_to_go(context)?;
    sh::shell("dd if=/dev/zero of=/dev/xvdk bs=64k count=4 oflag=direct status=none")?;
    detach_own(&vbd)
}

/// A module that is not where it should be.
struct HiddenModule {
    file: String,
    driver: TestedDriver,
}

impl HiddenModule {
    fn new(driver: TestedDriver) -> Result<HiddenModule> {
        let file = sh::run(&["modinfo", "-n", driver.module()])?
            .trim()
            .to_string();
        sh::run(&["mv", &file, &format!("{file}.hidden")])?;
        Ok(HiddenModule { file, driver })
    }
}

impl Drop for HiddenModule {
    fn drop(&mut self) {
        let back = sh::run(&["mv", &format!("{}.hidden", self.file), &self.file])
            .and_then(|_| load_driver(self.driver));
        if let Err(error) = back {
            eprintln!("the driver is not back: {error:#}");
        }
    }
}

fn falls_back(context: &mut Context) -> Result<()> {
    let driver = context.driver;
    sh::run(&["rmmod", driver.sys_module()])?;
    let hidden = HiddenModule::new(driver)?;
    sh::modprobe(driver.other().module(), &[])?;
    ensure!(driver.other().is_loaded(), "there is no driver at all");
    ensure!(!driver.is_loaded(), "the module was found after all");
    sh::run(&["rmmod", driver.other().sys_module()])?;
    drop(hidden);
    // By its name, as Xen's scripts ask, and by that of a device, as the kernel does.
    for name in [driver.other().module(), "xen-backend:vbd"] {
        sh::run(&["rmmod", driver.sys_module()])?;
        sh::modprobe(name, &[])?;
        ensure!(driver.is_loaded(), "{name} does not bring this driver");
        ensure!(
            !driver.other().is_loaded(),
            "{name} brings the C driver too"
        );
    }
    load_driver(driver)
}

fn reload(context: &mut Context) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let device = context.null_blk(16, &[])?;
    let driver = context.driver;
    for _ in 0..3 {
        if driver == TestedDriver::Rs {
            // Disks that a process has served and left: they go with the module.
            sh::run(&["/t/hostile", "tap-leave"])?;
            sh::run(&["/t/hostile", "tap-leave"])?;
        }
        sh::run(&["rmmod", driver.sys_module()])?;
        let left = Path::new("/dev/xentap").exists();
        ensure!(!left, "the module has left its nodes behind");
        load_driver(driver)?;
    }
    let before = Leaks::now(driver)?;
    let vbd = attach_own(context, &device.path(), "xvdk")?;
    sh::shell("dd if=/dev/zero of=/dev/xvdk bs=64k count=4 oflag=direct status=none")?;
    detach_own(&vbd)?;
    before.wait_same(driver, Duration::from_secs(15))
}
