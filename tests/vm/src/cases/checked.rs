// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Checks that need a kernel with its own checks (`ci/recipes/kernel-checked.config`): nothing is lost or left behind
//! when the module gets no memory, and all memory that it has allocated is still reachable.

use super::basic::{attach_own, detach_own, verify_job, FIO};
use super::direct::{attach_scattered, hits_all, mapped, scattered, PLACES};
use super::hung::loop_device;
use super::self_attach::{self, OwnDisks};
use super::tap::{image, DEVICE, VDEV};
use super::{Case, Context, SharedGuest};
use crate::console::GuestJob;
use crate::guest::{AttachedVbd, Guest};
use crate::tap::{self, ServedDisk};
use crate::{hotplug, seed, sh, xs};
use anyhow::{ensure, Context as _, Result};
use sim::rng::Rng;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Time in which a disk must connect, or report why not.
const SETTLED: Duration = Duration::from_secs(60);
/// Disks that are connected while an allocation fails.
const ATTEMPTS: usize = 40;

/// Parts of the messages of a disk that tries again.
const ASKED_AGAIN: &[&str] = &[
    "cannot be read",
    "cannot be claimed",
    "cannot be opened",
    "the offer cannot be published",
];

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    use SharedGuest::{Nothing, Pv};
    let case = |name: &str, about: &str, needs, run: fn(&mut Context) -> Result<()>| Case {
        ours: true,
        checked: true,
        ..Case::new(name, about, needs, run)
    };
    vec![
        case(
            "checked.connect",
            "a disk connects or says why not when an allocation fails, and leaves nothing",
            Nothing,
            connect,
        )
        .no_leaks(),
        case(
            "checked.reconnect",
            "a tap disk whose guest reconnects while an allocation fails can be connected after it",
            Pv,
            reconnect,
        )
        .supervised(),
        case(
            "checked.load",
            "under load every third allocation of the module fails, and no request does",
            Pv,
            load,
        ),
        case(
            "checked.tap",
            "the same of a tap disk whose process dies meanwhile",
            Pv,
            tap_load,
        )
        .supervised(),
        case(
            "checked.map",
            "the map of a disk goes on with what it has while it gets no memory, and grows when it does",
            Pv,
            map,
        )
        .supervised(),
        // After all others.
        case(
            "checked.no_lost_memory",
            "the kernel finds a way to all memory that the module has taken",
            Nothing,
            no_lost_memory,
        ),
    ]
}

/// Disks that got no driver, because that had no memory to begin with.
static UNBOUND: AtomicUsize = AtomicUsize::new(0);

/// Makes allocations of the module, and of functions that it calls, fail until this is dropped.
struct FailingAllocations {
    /// Maximum number of failures of each kind.
    times: i32,
}

/// More failures than there will be.
const MANY: i32 = 1 << 30;
/// Allocations that the kernel can make fail: objects, and pages.
const OBJECTS: &str = "/sys/kernel/debug/failslab";
const PAGES: &str = "/sys/kernel/debug/fail_page_alloc";
const KINDS: [&str; 2] = [OBJECTS, PAGES];

impl FailingAllocations {
    /// Makes `percent` % of the allocations fail, at most `times` of each kind.
    fn begin(percent: u32, times: i32) -> Result<FailingAllocations> {
        let (start, end) = code("the module", |name| name.ends_with("[xen_blkback_rs]"))?;
        let spared = code(SPARED, |name| name == SPARED)?;
        let failing = FailingAllocations { times };
        for kind in KINDS {
            for (name, value) in [
                ("verbose", "0".into()),
                ("ignore-gfp-wait", "N".into()),
                ("stacktrace-depth", "32".into()),
                ("require-start", format!("{start:#x}")),
                ("require-end", format!("{end:#x}")),
                ("reject-start", format!("{:#x}", spared.0)),
                ("reject-end", format!("{:#x}", spared.1)),
                ("times", times.to_string()),
                ("probability", percent.to_string()),
            ] {
                sh::put(format!("{kind}/{name}"), &value)?;
            }
        }
        sh::put(format!("{PAGES}/min-order"), "0")?;
        sh::put(format!("{PAGES}/ignore-gfp-highmem"), "N")?;
        Ok(failing)
    }

    /// Returns the number of failures.
    fn count(&self) -> Result<i32> {
        let left = |kind| Ok(sh::get(format!("{kind}/times"))?.parse::<i32>()?);
        let left = KINDS.map(left).into_iter().collect::<Result<Vec<_>>>()?;
        Ok(left.iter().map(|left| self.times - left).sum())
    }

    /// Lets allocations succeed again; returns whether one had failed. Without a failure, a disk must have connected.
    fn end(self, connected: bool) -> Result<bool> {
        let happened = self.count()? > 0;
        ensure!(
            connected || happened,
            "a disk did not connect, and no allocation failed"
        );
        Ok(happened)
    }
}

impl Drop for FailingAllocations {
    fn drop(&mut self) {
        for kind in KINDS {
            if let Err(error) = sh::put(format!("{kind}/probability"), "0") {
                eprintln!("allocations go on to fail: {error:#}");
            }
        }
    }
}

/// Linux does not notice that it could not make a file of /proc for an interrupt, and warns when it removes it.
const SPARED: &str = "__proc_create";

/// Returns the functions of the kernel, with addresses.
fn functions(kallsyms: &str) -> impl Iterator<Item = (u64, &str)> + Clone {
    kallsyms.lines().filter_map(|line| {
        let (address, rest) = line.split_once(' ')?;
        let (kind, name) = rest.split_once(' ')?;
        let address = u64::from_str_radix(address, 16).ok()?;
        kind.eq_ignore_ascii_case("t").then_some((address, name))
    })
}

/// Returns the range of the functions that `ours` selects: from the first one to the function behind the last one.
fn code(what: &str, ours: impl Fn(&str) -> bool) -> Result<(u64, u64)> {
    let text = sh::get("/proc/kallsyms")?;
    let all = functions(&text);
    let found = all.clone().filter(|(_, name)| ours(name));
    let (start, last) = found.fold((u64::MAX, 0), |(start, last), (at, _)| {
        (start.min(at), last.max(at))
    });
    ensure!(
        0 < start && start <= last,
        "/proc/kallsyms does not say where {what} is"
    );
    let behind = all.map(|(at, _)| at).filter(|at| *at > last).min();
    // Behind the last function of all there are no others.
    Ok((start, behind.unwrap_or(u64::MAX)))
}

fn connect(context: &mut Context) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let device = context.null_blk(16, &[])?;
    let mut rng = Rng::new(seed::get());
    let (mut failed, mut refused, mut again) = (0, 0, 0);
    for _ in 0..ATTEMPTS {
        let percent = rng.pick(&[1, 2, 3, 5, 10, 30, 100]);
        let failing = FailingAllocations::begin(percent, 1)?;
        let disks = OwnDisks::connect(&device.path(), 1)?;
        let id = &disks.0[0];
        let backend = format!("/local/domain/0/backend/vbd/0/{id}");
        let connected = settled(&backend).with_context(|| {
            let bound = Path::new(&self_attach::sysfs(id)).join("driver").exists();
            format!("{percent} %; bound: {bound}")
        })?;
        let happened = failing.end(connected)?;
        failed += u32::from(happened);
        refused += u32::from(!connected);
        let said = xs::read(&error_of(&backend))?;
        // If the bus reports the error, the disk has no driver, or will lose it in a moment.
        let bound = !said
            .as_ref()
            .is_some_and(|said| said.contains("xenbus_dev_probe"));
        if !bound {
            UNBOUND.fetch_add(1, Ordering::Relaxed);
        }
        // The driver repeats a question that xenstore did not answer.
        let asked_again = |said: &String| ASKED_AGAIN.iter().any(|what| said.contains(what));
        if said.as_ref().is_some_and(asked_again) {
            again += 1;
            disks.wait("4")?;
        }
        match bound {
            true => disks
                .disconnect()
                .with_context(|| format!("it said {said:?}"))?,
            // It has no driver, which could close it.
            false => disks.forget()?,
        }
    }
    let unbound = UNBOUND.load(Ordering::Relaxed);
    context.note(&format!(
        "of {ATTEMPTS} disks an allocation failed for {failed}, {refused} said so, of which {unbound} got no driver and {again} connected later"
    ))?;
    ensure!(failed >= 10, "an allocation failed for {failed} disks only");
    ensure!(refused >= 3, "{refused} disks did not connect");
    let vbd = attach_own(context, &device.path(), "xvdk")?;
    sh::shell("dd if=/dev/zero of=/dev/xvdk bs=1M count=4 oflag=direct status=none")?;
    detach_own(&vbd)
}

/// Returns the path of a backend's error message.
fn error_of(backend: &str) -> String {
    let error = backend.replace("/backend/", "/error/backend/");
    format!("{error}/error")
}

/// Waits until a disk has connected (true), or has said why it has not.
fn settled(backend: &str) -> Result<bool> {
    let (state, error) = (format!("{backend}/state"), error_of(backend));
    let mut connected = false;
    sh::wait_for("a disk or a reason", SETTLED, || {
        connected = xs::read(&state)?.is_some_and(|state| state == "4");
        Ok(connected || xs::read(&error)?.is_some())
    })
    .with_context(|| format!("state {:?}", xs::read(&state)))?;
    Ok(connected)
}

/// Times that a guest reconnects to a tap disk.
const RECONNECTS: usize = 30;

fn reconnect(context: &mut Context) -> Result<()> {
    let path = image(context, "checked.img", 16)?;
    let specification = tap::disk(&format!("aio:{path}"), VDEV, "w");
    let disk = ServedDisk::attach(context.pv()?, &specification)?;
    let vbd = &disk.vbd;
    let mut rng = Rng::new(seed::get());
    let (mut failed, mut refused) = (0, 0);
    for _ in 0..RECONNECTS {
        let guest = context.pv()?;
        close(guest, vbd)?;
        offer_again(guest, vbd)?;
        let failing = FailingAllocations::begin(rng.pick(&[3, 10, 30, 100]), 1)?;
        probe(guest, vbd)?;
        let connected = settled(&vbd.backend).with_context(|| vbd.describe())?;
        failed += u32::from(failing.end(connected)?);
        if connected {
            continue;
        }
        refused += 1;
        let state = || xs::must_read(&format!("{}/state", vbd.backend));
        sh::wait_for("a disk that is connected or closed", SETTLED, || {
            Ok(["4", "6"].contains(&&*state()?))
        })
        .with_context(|| vbd.describe())?;
        if state()? == "6" {
            offer_again(guest, vbd)?;
            probe(guest, vbd)?;
            xs::wait_value(&format!("{}/state", vbd.backend), "4", SETTLED).with_context(|| {
                format!(
                    "{}: {:?}",
                    vbd.describe(),
                    xs::read(&error_of(&vbd.backend))
                )
            })?;
        }
    }
    context.note(&format!(
        "of {RECONNECTS} connections an allocation failed for {failed}, {refused} said so"
    ))?;
    ensure!(failed >= 10, "an allocation failed {failed} times only");
    ensure!(refused >= 3, "{refused} connections failed");
    let guest = context.pv()?;
    guest.run("echo 1 >/sys/bus/xen/drivers_autoprobe")?;
    guest.run_for(&verify_job(DEVICE, 4, 60, 512), FIO)?;
    disk.detach(guest)
}

/// The guest's name of a disk on its bus.
fn on_bus(vbd: &AttachedVbd) -> String {
    let number = vbd.frontend.rsplit('/').next().unwrap_or_default();
    format!("vbd-{number}")
}

/// Lets the guest close a disk.
fn close(guest: &Guest, vbd: &AttachedVbd) -> Result<()> {
    let name = on_bus(vbd);
    guest.run(&format!("echo {name} >/sys/bus/xen/drivers/vbd/unbind"))?;
    xs::wait_value(&format!("{}/state", vbd.backend), "6", SETTLED)
}

/// Offers the disk again to a guest that has closed it: Linux makes its device again when a toolstack has reset its
/// state. Its driver cannot be bound again to one that is closed, and must not find the backend closed.
fn offer_again(guest: &Guest, vbd: &AttachedVbd) -> Result<()> {
    let name = on_bus(vbd);
    xs::remove(&error_of(&vbd.backend))?;
    guest.run("echo 0 >/sys/bus/xen/drivers_autoprobe")?;
    let number = format!("stat -c %i /sys/bus/xen/devices/{name}/");
    let before = guest.run(&number)?;
    xs::write(&[(&format!("{}/state", vbd.frontend), "1")])?;
    xs::wait_value(&format!("{}/state", vbd.backend), "2", SETTLED)?;
    sh::wait_for("a new device in the guest", SETTLED, || {
        Ok(guest.run(&format!("{number} 2>/dev/null || true"))? != before)
    })
}

/// The guest's driver takes a disk that is offered.
fn probe(guest: &Guest, vbd: &AttachedVbd) -> Result<()> {
    let name = on_bus(vbd);
    guest.run(&format!("echo {name} >/sys/bus/xen/drivers_probe"))?;
    Ok(())
}

fn load(context: &mut Context) -> Result<()> {
    // Not a null_blk: that asks for memory for each write, in the same call.
    let file = image(context, "checked.img", 32)?;
    let device = loop_device(context, &file, &[])?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&device, "xvda", "w")?)?;
    // Before it borrows the memory for its first requests.
    let failing = FailingAllocations::begin(33, MANY)?;
    let job = guest.start(&verify_job("/dev/xvda", 16, 400, 512))?;
    goes_on(context, job, failing)?;
    context.pv()?.detach(&vbd)
}

fn tap_load(context: &mut Context) -> Result<()> {
    let path = image(context, "checked.img", 16)?;
    let specification = tap::disk(&format!("aio:{path}"), VDEV, "w");
    let disk = ServedDisk::attach(context.pv()?, &specification)?;
    let job = context.pv()?.start(&verify_job(DEVICE, 16, 400, 512))?;
    let pid = disk.pid()?;
    // So few that a process comes through in the end.
    let failing = FailingAllocations::begin(33, 20)?;
    disk.signal(pid, libc::SIGKILL)?;
    goes_on(context, job, failing)?;
    disk.detach(context.pv()?)
}

/// Ends a guest's load, which must not have had an error although allocations failed.
fn goes_on(context: &mut Context, job: GuestJob, failing: FailingAllocations) -> Result<()> {
    let done = context.pv()?.wait(job, FIO)?;
    let failed = failing.count()?;
    drop(failing);
    ensure!(done.rc == 0, "{}", sh::tail(&done.text, 400));
    context.note(&format!("{failed} allocations failed"))?;
    ensure!(failed > 0, "no allocation failed");
    Ok(())
}

fn map(context: &mut Context) -> Result<()> {
    let disk = attach_scattered(context)?;
    let room = |disk: &ServedDisk| mapped(disk)?["room"].as_u64().context("no room is told");
    let before = room(&disk)?;
    let guest = context.pv()?;
    let failing = FailingAllocations::begin(100, MANY)?;
    let written = guest.run_for(&scattered("--rw=randwrite"), FIO);
    let read = guest.run_for(&scattered("--rw=read"), FIO);
    drop(failing);
    written.and(read)?;
    let (same, mapped) = (room(&disk)?, mapped(&disk)?);
    ensure!(same == before && before < PLACES, "{before}, and {mapped}");
    let evicted = mapped["evicted"].as_u64();
    ensure!(evicted > Some(0), "nothing was forgotten: {mapped}");
    // It grows step by step, when the process sends more mappings.
    for _ in 0..3 {
        context.pv()?.run_for(&scattered("--rw=read"), FIO)?;
    }
    hits_all(context, &disk)?;
    ensure!(room(&disk)? >= PLACES, "the map has not grown");
    disk.detach(context.pv()?)
}

const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";
/// kmemleak reports no memory that is younger than five seconds, because its address may still be in a register.
const AGE: Duration = Duration::from_secs(6);

fn no_lost_memory(context: &mut Context) -> Result<()> {
    // A leak counts only if it is found twice.
    for _ in 0..3 {
        std::thread::sleep(AGE);
        sh::put(KMEMLEAK, "scan")?;
    }
    let text = sh::get(KMEMLEAK)?;
    let (of_xenbus, lost) = lost(&text);
    for record in &lost {
        context.note(&record.replace('\n', " | "))?;
    }
    ensure!(lost.is_empty(), "{} objects are lost", lost.len());
    // Linux leaks the name of the other end of each disk whose driver refuses it.
    let unbound = UNBOUND.load(Ordering::Relaxed);
    ensure!(
        of_xenbus <= unbound,
        "{of_xenbus} names of other ends are lost, and {unbound} disks got no driver"
    );
    Ok(())
}

/// Returns the number of kmemleak's records that are names of other ends that xenbus has read, and the other records.
fn lost(text: &str) -> (usize, Vec<&str>) {
    // The first line of a dump has 16 bytes.
    let is_name =
        |record: &&str| record.contains("xenbus_thread") && record.contains("  /local/domain/");
    let records = text.split("unreferenced object").skip(1).map(str::trim);
    let (names, others): (Vec<&str>, Vec<&str>) = records.partition(is_name);
    (names.len(), others)
}

#[cfg(test)]
mod tests {
    use super::lost;

    #[test]
    fn all_but_names_of_other_ends_is_judged() {
        let one = "unreferenced object 0xffff888003a3d0c0 (size 192):\n  backtrace (crc 3):\n    f+0x2/0x4\n";
        let name = "unreferenced object 0xffff88810f807240 (size 64):\n  hex dump (first 32 bytes):\n    \
            2f 6c 6f 63 61 6c 2f 64 6f 6d 61 69 6e 2f 30 2f  /local/domain/0/\n  backtrace (crc 4b40a279):\n    \
            __kmalloc_noprof+0x5bd/0x7f0\n    xenbus_thread+0xab/0x9f0\n";
        assert_eq!(lost(""), (0, vec![]));
        let all = format!("{one}{name}{one}{name}");
        let (names, others) = lost(&all);
        assert_eq!((names, others.len()), (2, 2));
        assert!(others[0].starts_with("0xffff888003a3d0c0"));
        let other = name.replace("/local/domain/0/", "1234567890123456");
        assert_eq!(lost(&other).1.len(), 1, "another answer of xenstore");
    }
}
