// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The memory that disks take: little while they are idle, bounded while they are busy, and enough
//! for every request whatever happens to the rest.

use super::basic::{attach_own, compare, detach_own, verify_job, FIO};
use super::faults::{endless_load, wait_load};
use super::lifecycle::detach_used;
use super::self_attach::{self, OwnDisks};
use super::{Case, Context, SharedGuest};
use crate::guest::AttachedVbd;
use crate::hotplug;
use crate::{sh, xs};
use anyhow::{ensure, Context as _, Result};
use std::time::Duration;

/// Memory that an idle disk may use for each of its queues, in KiB.
const IDLE_KIB: u64 = 256;
/// Time in which a disk that becomes idle must have given back the rest.
const GIVES_BACK: Duration = Duration::from_secs(30);
const PARAMETERS: &str = "/sys/module/xen_blkback_rs/parameters";

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    use SharedGuest::{Nothing, Pv};
    let case = |name: &str, about: &str, needs, run: fn(&mut Context) -> Result<()>| Case {
        ours: true,
        ..Case::new(name, about, needs, run)
    };
    vec![
        case(
            "memory.idle",
            "an idle disk takes little, before its first load and after it",
            Pv,
            idle,
        ),
        case(
            "memory.many_disks",
            "24 disks of one guest connect and work",
            Nothing,
            |context| many(context, 24),
        )
        .nightly()
        .no_leaks(),
        case(
            "memory.255_disks",
            "255 disks of one guest connect and work",
            Nothing,
            |context| {
                // dom0 has the frontends as well, and one with persistent grants takes 4 MiB of pages for each disk: 1
                // GiB, which this machine does not have. The case `memory.many_disks` covers the driver's own memory
                // for such a frontend.
                let _unkept = Parameter::set("feature_persistent", "N")?;
                many(context, 255)
            },
        )
        .no_leaks()
        .nightly(),
        case(
            "memory.bounds",
            "bounds are changed below a load, down to nothing",
            Pv,
            bounds,
        ),
        case(
            "memory.pressure",
            "the kernel takes memory back again and again below a load",
            Pv,
            pressure,
        )
        .nightly(),
        case(
            "memory.kept",
            "pages of a guest stay mapped while it uses them, and not for long when it is idle",
            Pv,
            kept,
        )
        .nightly(),
        case(
            "memory.kept_stable",
            "a device that needs stable pages gets copies: nothing of its guest stays mapped",
            Pv,
            stable,
        )
        .nightly(),
        case(
            "memory.refused",
            "a disk for which there is no memory says so, waits, and connects as soon as there is some",
            Nothing,
            refused,
        )
        .no_leaks(),
    ]
}

fn held(vbd: &AttachedVbd) -> Result<u64> {
    vbd.statistic("memory_kib")
}

/// Queues of a connected disk.
fn queues(vbd: &AttachedVbd) -> Result<u64> {
    match xs::read(&format!("{}/multi-queue-num-queues", vbd.frontend))? {
        Some(text) => Ok(text.parse()?),
        None => Ok(1),
    }
}

fn wait_idle(vbd: &AttachedVbd) -> Result<()> {
    let most = IDLE_KIB * queues(vbd)?;
    let mut now = 0;
    sh::wait_for("the return of an idle disk's memory", GIVES_BACK, || {
        now = held(vbd)?;
        Ok(now <= most)
    })
    .with_context(|| format!("it takes {now} KiB, and may take {most}"))
}

fn idle(context: &mut Context) -> Result<()> {
    // Copied requests need memory.
    let _copies = Parameter::set("feature_persistent", "N")?;
    let device = context.null_blk(16, &[])?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    wait_idle(&vbd)?;
    let load = guest.start(&endless_load("/dev/xvda"))?;
    wait_load(&vbd)?;
    let most = IDLE_KIB * queues(&vbd)?;
    let mut busy = 0;
    sh::wait_for(
        "memory for 32 requests of 16 KiB in flight",
        GIVES_BACK,
        || {
            busy = held(&vbd)?;
            Ok(busy > most)
        },
    )
    .with_context(|| format!("it takes {busy} KiB, and {most} idle"))?;
    let all: u64 = sh::get(format!("{PARAMETERS}/memory_kib"))?.parse()?;
    ensure!(all >= busy, "all disks take {all} KiB, one of them {busy}");
    guest.run("killall fio")?;
    let _ended = guest.wait(load, Duration::from_secs(60))?;
    wait_idle(&vbd)?;
    let now = held(&vbd)?;
    context.note(&format!("{busy} KiB busy, {now} KiB idle"))?;
    let guest = context.pv()?;
    guest.detach(&vbd)
}

/// Time after which unused pages must be unmapped.
const LETS_GO: Duration = Duration::from_secs(60);

fn kept(context: &mut Context) -> Result<()> {
    let device = context.null_blk(16, &[])?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    let load = guest.start(&endless_load("/dev/xvda"))?;
    wait_load(&vbd)?;
    let mut pages = 0;
    sh::wait_for("pages that stay mapped", GIVES_BACK, || {
        pages = vbd.statistic("kept_pages")?;
        Ok(pages >= 32)
    })
    .with_context(|| format!("they are {pages}"))?;
    // A request that is not copied borrows no memory.
    wait_idle(&vbd)?;
    guest.run("killall fio")?;
    let _ended = guest.wait(load, Duration::from_secs(60))?;
    sh::wait_for("the end of all mappings", LETS_GO, || {
        Ok(vbd.statistic("kept_pages")? == 0)
    })?;
    guest.run_for(&verify_job("/dev/xvda", 8, 120, 512), FIO)?;
    compare(guest, "xvda", &device.path(), 8)?;
    let guest = context.pv()?;
    guest.detach(&vbd)
}

fn stable(context: &mut Context) -> Result<()> {
    let device = context.null_blk(16, &[])?;
    // As Ceph and others say it of themselves.
    sh::put(
        format!("/sys/block/{}/queue/stable_writes", device.name()),
        "1",
    )?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    guest.run_for(&verify_job("/dev/xvda", 8, 120, 512), FIO)?;
    let kept = vbd.statistic("kept_pages")?;
    ensure!(kept == 0, "{kept} pages of the guest stay mapped");
    let key = format!("{}/feature-persistent", vbd.backend);
    let told = xs::read(&key)?.unwrap_or_default();
    ensure!(told != "1", "the guest is told that its pages stay mapped");
    compare(guest, "xvda", &device.path(), 8)?;
    let guest = context.pv()?;
    guest.detach(&vbd)
}

/// A parameter of the module that has another value until this is dropped.
pub(super) struct Parameter {
    path: String,
    before: String,
}

impl Parameter {
    pub(super) fn set(name: &str, value: &str) -> Result<Parameter> {
        let path = format!("{PARAMETERS}/{name}");
        let before = sh::get(&path)?;
        sh::put(&path, value)?;
        Ok(Parameter { path, before })
    }
}

impl Drop for Parameter {
    fn drop(&mut self) {
        if let Err(error) = sh::put(&self.path, &self.before) {
            eprintln!("{} keeps its value: {error:#}", self.path);
        }
    }
}

fn bounds(context: &mut Context) -> Result<()> {
    // Copied requests need memory.
    let _copies = Parameter::set("feature_persistent", "N")?;
    let device = context.null_blk(32, &[])?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    let always = held(&vbd)?;
    let of_queue = always / queues(&vbd)?;
    let load = guest.start(&endless_load("/dev/xvda"))?;
    wait_load(&vbd)?;
    let borrows = || Ok(held(&vbd)? > always);
    sh::wait_for("memory that the load borrows", GIVES_BACK, borrows)?;
    for name in ["domain_memory_mib", "host_memory_mib"] {
        // This is less than the disk has already: it keeps its minimum, and works with that.
        let bound = if name.starts_with("host") { "1" } else { "0" };
        let most = if bound == "1" {
            always.max(1024)
        } else {
            always
        };
        let parameter = Parameter::set(name, bound)?;
        let mut now = 0;
        sh::wait_for(&format!("what {name} = {bound} allows"), GIVES_BACK, || {
            now = held(&vbd)?;
            Ok(now <= most)
        })
        .with_context(|| format!("it takes {now} KiB, always {always}"))?;
        wait_load(&vbd)?;
        drop(parameter);
        // Not more than `most`: the load may need less than the larger one of the bounds.
        sh::wait_for("more memory for the load", GIVES_BACK, borrows)?;
    }
    detach_used(guest, &vbd, load)?;
    // Requests of up to 1 MiB fit into the minimum that a disk always has. A guest with so little memory is offered fewer
    // queues.
    let _parameter = Parameter::set("domain_memory_mib", "1")?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    let parameter = Parameter::set("domain_memory_mib", "0")?;
    guest.run_for(&verify_job("/dev/xvda", 8, 120, 512), FIO)?;
    let (now, most) = (held(&vbd)?, of_queue * queues(&vbd)?);
    ensure!(
        now == most,
        "the disk has {now} KiB, and its queues need {most}"
    );
    drop(parameter);
    compare(guest, "xvda", &device.path(), 8)?;
    guest.detach(&vbd)
}

fn pressure(context: &mut Context) -> Result<()> {
    // Copied requests need memory.
    let _copies = Parameter::set("feature_persistent", "N")?;
    let device = context.null_blk(32, &[])?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    let load = guest.start(&endless_load("/dev/xvda"))?;
    wait_load(&vbd)?;
    for _ in 0..20 {
        // Calls every shrinker.
        sh::put("/proc/sys/vm/drop_caches", "2")?;
    }
    wait_load(&vbd)?;
    detach_used(guest, &vbd, load)?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    let job = guest.start(&verify_job("/dev/xvda", 8, 200, 512))?;
    // More than is free, in a file system of memory: reclaim runs until it fails.
    let hog = "mkdir -p /tmp/vmtest-hog && mount -t tmpfs -o size=100% none /tmp/vmtest-hog && \
        { dd if=/dev/zero of=/tmp/vmtest-hog/fill bs=1M count=$(($(awk '/MemAvailable/ {print $2}' /proc/meminfo) / 1024 - 96)) \
        status=none; umount /tmp/vmtest-hog; }";
    let hogged = sh::shell(hog);
    let done = guest.wait(job, FIO)?;
    hogged?;
    ensure!(done.rc == 0, "{}", sh::tail(&done.text, 400));
    compare(guest, "xvda", &device.path(), 8)?;
    guest.detach(&vbd)
}

fn many(context: &mut Context, count: u32) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let device = context.null_blk(16, &[])?;
    let disks = OwnDisks::connect(&device.path(), count)?;
    let works = all_work(&disks);
    disks.disconnect()?;
    let (most, sum) = works?;
    context.note(&format!(
        "{count} disks take {sum} KiB, one of them {most} at most"
    ))
}

/// All disks connect, the last one works, and all take little when they are idle.
fn all_work(disks: &OwnDisks) -> Result<(u64, u64)> {
    disks.wait("4")?;
    dom0::udev::settle()?;
    for id in disks.0.first().into_iter().chain(disks.0.last()) {
        self_attach::write(id, 8)?;
    }
    let (mut most, mut sum) = (0, 0);
    sh::wait_for("little memory of all disks", GIVES_BACK, || {
        (most, sum) = (0, 0);
        for id in &disks.0 {
            let now: u64 =
                sh::get(format!("{}/statistics/memory_kib", self_attach::sysfs(id)))?.parse()?;
            (most, sum) = (most.max(now), sum + now);
        }
        Ok(most > 0 && most <= IDLE_KIB * 2)
    })
    .with_context(|| format!("one takes {most} KiB"))?;
    Ok((most, sum))
}

fn refused(context: &mut Context) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let device = context.null_blk(16, &[])?;
    let parameter = Parameter::set("domain_memory_mib", "0")?;
    let disks = OwnDisks::connect(&device.path(), 2)?;
    let waits = wait_short(&disks);
    drop(parameter);
    let served = waits.and_then(|()| {
        disks.wait("4")?;
        dom0::udev::settle()?;
        for id in &disks.0 {
            let said = xs::read(&error_of(id))?;
            ensure!(said.is_none(), "a disk that connected still says {said:?}");
            self_attach::write(id, 4)?;
        }
        Ok(())
    });
    disks.disconnect()?;
    served?;
    // A disk that waits can be taken away.
    let parameter = Parameter::set("domain_memory_mib", "0")?;
    let disks = OwnDisks::connect(&device.path(), 1)?;
    let waits = wait_short(&disks);
    disks.disconnect()?;
    drop(parameter);
    waits?;
    let vbd = attach_own(context, &device.path(), "xvdk")?;
    sh::shell("dd if=/dev/zero of=/dev/xvdk bs=1M count=4 oflag=direct status=none")?;
    detach_own(&vbd)
}

fn error_of(id: &str) -> String {
    format!("/local/domain/0/error/backend/vbd/0/{id}/error")
}

/// Waits until the error nodes of all disks name the parameter that is too small, which must not close them: many
/// frontends do not survive that.
fn wait_short(disks: &OwnDisks) -> Result<()> {
    for id in &disks.0 {
        let error = error_of(id);
        sh::wait_for(
            "an error that names the parameter",
            Duration::from_secs(30),
            || Ok(xs::read(&error)?.is_some_and(|text| text.contains("domain_memory_mib"))),
        )?;
        let state = xs::must_read(&format!("/local/domain/0/backend/vbd/0/{id}/state"))?;
        ensure!(
            state == "2",
            "a disk that waits for memory is in state {state}"
        );
    }
    Ok(())
}
