// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Guests that restart with their disks. The frontends of a crashed guest close nothing: xl removes the devices while
//! no frontend answers, and makes them anew, for a new domain, or in a soft reset for the old one with its memory
//! unchanged, of which another kernel makes a dump.

use super::basic::{compare, verify_job, FIO};
use super::tap::{image, wait_progress};
use super::{Case, Context, SharedGuest};
use crate::guest::{newest_domain, AttachedVbd, Config, Guest, GuestKind, CMDLINE, PAYLOAD};
use crate::tap::{self, ServedDisk};
use crate::{backing, hotplug, sh};
use anyhow::{ensure, Context as _, Result};
use std::fs;
use std::time::Duration;

const NAME: &str = "restarts";
/// A word of the command line that only the second kernel has.
const MARK: &str = "vmtest.crash=yes";
/// Sizes in MiB of the dump, and of the disks.
const DUMP: u32 = 8;
const SIZE: u32 = 16;
/// An HVM guest also has emulated disks with the names `xvda` to `xvdd`.
const TAP: &str = "xvde";
const PHY: &str = "xvdf";
const KERNELS: &str = "xvdg";
/// MiB that the guest fills before it restarts.
const USED: u32 = 4;
/// A kernel starts in emulation, and QEMU perhaps before that.
const LIMIT: Duration = Duration::from_secs(300);

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let case = |name, about, run: fn(&mut Context) -> Result<()>| {
        Case::new(name, about, SharedGuest::Nothing, run)
            .supervised()
            .no_leaks()
            .nightly()
    };
    const PANIC: &[&str] = &["Kernel panic", "Call Trace:"];
    vec![
        case(
            "lifecycle.reboot",
            "xl reboot: a new domain has the phy and tap disks at once, as they were",
            |context| starts_again(context, reboot),
        ),
        case(
            "lifecycle.crash",
            "the same after a crash under load, with on_crash=restart",
            |context| starts_again(context, crash),
        )
        .finds(PANIC),
        case(
            "lifecycle.crash_dump",
            "a guest crashes under load, and a kernel that starts then writes the dump on its phy and tap disks",
            crash_dump,
        )
        .finds(PANIC),
    ]
}

/// A guest that is started again, with a phy and a tap disk, and their storage.
struct RestartHarness {
    config: Config,
    storage: [(&'static str, String); 2],
}

impl RestartHarness {
    fn new(context: &mut Context, kind: GuestKind) -> Result<Self> {
        let file = image(context, "a.img", SIZE)?;
        let device = context.null_blk(SIZE, &[])?;
        let mut config = Config::new(NAME, kind, 1);
        config.starts_again = true;
        config.disks = vec![
            tap::disk(&format!("aio:{file}"), TAP, "w"),
            hotplug::disk(&device.path(), PHY, "w")?,
        ];
        let storage = [(TAP, file), (PHY, device.path())];
        Ok(Self { config, storage })
    }

    /// Starts loads on all disks of the guest, which ends during them, so that its last writes are unknown.
    fn load(&self, guest: &Guest) -> Result<()> {
        for (vdev, _) in &self.storage {
            guest.start(&verify_job(&format!("/dev/{vdev}"), SIZE, 100_000, 512))?;
        }
        wait_progress(&ServedDisk::of(AttachedVbd::of(guest.domid, TAP)?)?, 50)
    }
}

fn reboot(guest: &Guest) -> Result<()> {
    sh::run(&["xl", "reboot", &guest.domid.to_string()]).map(drop)
}

fn crash(guest: &Guest) -> Result<()> {
    guest.start("echo c >/proc/sysrq-trigger").map(drop)
}

/// Ends a guest with `end`, and lets another domain continue with its disks.
fn starts_again(context: &mut Context, end: fn(&Guest) -> Result<()>) -> Result<()> {
    let bed = RestartHarness::new(context, GuestKind::Pvh)?;
    let guest = Guest::create(bed.config.clone())?;
    for (vdev, _) in &bed.storage {
        guest.wait_disk(vdev)?;
        guest.run_for(&verify_job(&format!("/dev/{vdev}"), USED, 40, 512), FIO)?;
    }
    let first = ServedDisk::of(AttachedVbd::of(guest.domid, TAP)?)?;
    bed.load(&guest)?;
    end(&guest)?;
    let before = guest.domid;
    sh::wait_for("the next domain", LIMIT, || Ok(newest_domain()? > before))?;
    let (config, next) = guest.left();
    let guest = Guest::arrived(config, next, &[])?;
    first.vbd.wait_gone()?;
    for (vdev, storage) in &bed.storage {
        guest.wait_disk(vdev)?;
        context.check_driver(&AttachedVbd::of(guest.domid, vdev)?)?;
        compare(&guest, vdev, storage, SIZE)?;
        guest.run_for(&verify_job(&format!("/dev/{vdev}"), USED, 40, 512), FIO)?;
    }
    let disk = ServedDisk::of(AttachedVbd::of(guest.domid, TAP)?)?;
    disk.goes_with(guest)
}

/// A file with the kernel of guests and its initramfs behind that, each from a MiB on; how many bytes they have.
fn kernels(context: &mut Context) -> Result<(String, u64, u64)> {
    let path = image(context, "kernels.img", 1)?;
    let len = |name: &str| {
        let path = format!("{PAYLOAD}/{name}");
        let found = fs::metadata(&path).with_context(|| format!("cannot look at {path}"));
        found.map(|found| found.len())
    };
    let (kernel, initramfs) = (len("vmlinuz")?, len("guest.cpio.gz")?);
    let second = kernel.div_ceil(1 << 20);
    let all = second + initramfs.div_ceil(1 << 20);
    sh::shell(&format!(
        "set -e; dd if={PAYLOAD}/vmlinuz of={path} bs=1M conv=notrunc status=none; \
         dd if={PAYLOAD}/guest.cpio.gz of={path} bs=1M seek={second} conv=notrunc status=none; truncate -s {all}M {path}"
    ))?;
    Ok((path, kernel, initramfs))
}

/// Loads the second kernel from that disk.
fn load(guest: &Guest, kernel: u64, initramfs: u64) -> Result<()> {
    let second = kernel.div_ceil(1 << 20);
    guest.run(&format!(
        "set -e; dd if=/dev/{KERNELS} of=/kernel bs=1M count={second} 2>/dev/null; truncate -s {kernel} /kernel; \
         dd if=/dev/{KERNELS} of=/initramfs bs=1M skip={second} 2>/dev/null; truncate -s {initramfs} /initramfs; \
         /agent crash-kernel /kernel /initramfs {CMDLINE} no_timer_check nr_cpus=1 reset_devices {MARK}"
    ))
    .map(drop)
}

/// The guest crashes, and its second kernel answers on the console, which stays.
fn crash_into_second(guest: &Guest) -> Result<()> {
    crash(guest)?;
    sh::wait_for("an answer of the second kernel", LIMIT, || {
        // There is no answer between the end of one kernel and the start of the other one.
        let answer = guest.status_for("cat /proc/cmdline", Duration::from_secs(10));
        Ok(answer.is_ok_and(|done| done.text.contains(MARK)))
    })
}

/// Writes the beginning of the dump on a disk, which dom0 sees in `storage`.
fn dump(guest: &Guest, vdev: &str, storage: &str) -> Result<()> {
    guest.wait_disk(vdev)?;
    let text = guest.run_for(
        &format!(
            "set -e; dd if=/proc/vmcore of=/dump bs=1M count={DUMP} 2>/dev/null; \
             dd if=/dump of=/dev/{vdev} bs=1M oflag=direct 2>/dev/null; sync; sha256sum </dump"
        ),
        LIMIT,
    )?;
    let seen = text.split_whitespace().next().unwrap_or_default();
    let found = backing::sha256(storage, DUMP)?;
    ensure!(
        seen == found,
        "the dump has {seen}, and {found} is in {storage}"
    );
    let head = sh::shell(&format!("head -c 4 {storage} | tail -c 3"))?;
    ensure!(head == "ELF", "what was written is no dump: {head:?}");
    Ok(())
}

fn crash_dump(context: &mut Context) -> Result<()> {
    let (kernels, kernel, initramfs) = kernels(context)?;
    let mut bed = RestartHarness::new(context, GuestKind::Hvm)?;
    bed.config.memory = 768;
    bed.config.cmdline = "crashkernel=256M no_timer_check".into();
    let third = tap::disk(&format!("aio:{kernels}"), KERNELS, "r");
    bed.config.disks.push(third);
    let guest = Guest::create(bed.config.clone())?;
    [TAP, PHY, KERNELS]
        .iter()
        .try_for_each(|vdev| guest.wait_disk(vdev))?;
    load(&guest, kernel, initramfs)?;
    bed.load(&guest)?;
    crash_into_second(&guest)?;
    for (vdev, storage) in &bed.storage {
        dump(&guest, vdev, storage)?;
        context.check_driver(&AttachedVbd::of(guest.domid, vdev)?)?;
    }
    let disk = ServedDisk::of(AttachedVbd::of(guest.domid, TAP)?)?;
    disk.goes_with(guest)
}
