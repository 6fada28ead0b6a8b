// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! An image that several hosts reach, with a record of the host that writes to it: `lease=record`.

use super::tap::{
    end_load, forget_refused, image, same, stand_in, start_load, start_load_with, wait_progress,
    VDEV,
};
use super::{Case, Context, SharedGuest};
use crate::sh;
use crate::tap::{self, ServedDisk};
use ::lease::{Kind, LeaseClaim, LeaseRenewer, LeaseView};
use anyhow::{ensure, Context as _, Result};
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

/// A term, and the heartbeat that was on its way when the last one came.
const TERM: Duration = Duration::from_secs(30);
/// Time limit for programs that find out whether a holder lives, or wait for it.
const LONG: Duration = Duration::from_secs(60);

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let case = |name, about, run: fn(&mut Context) -> Result<()>| {
        Case::new(name, about, SharedGuest::Pv, run)
            .supervised()
            .no_leaks()
            .nightly()
    };
    vec![
        case(
            "lease.kept",
            "a disk has its lease while process and supervisor are replaced; without heartbeats nothing is written",
            kept,
        ).nightly(),
        case(
            "lease.other_host",
            "another host's image is refused, taken away from a dead one only, and lost by who comes back",
            other_host,
        ),
        case(
            "lease.phy",
            "a disk that was phy: has the lease of its device, by Xen's script's own name",
            phy,
        ),
    ]
}

fn target(image: &str) -> String {
    format!("lease=record,aio:{image}")
}

/// The lease as `tap-ctl` shows it, which is held by this host, and its generation.
fn generation(image: &str) -> Result<u64> {
    let view = tap::ctl_json(&["lease", "show", image])?;
    ensure!(
        view["state"] == "held" && view["is_here"] == Value::Bool(true),
        "this host has not the lease of {image}: {view}"
    );
    let generation = view["generation"].as_u64();
    generation.with_context(|| format!("the lease has no generation: {view}"))
}

fn kept(context: &mut Context) -> Result<()> {
    let image = image(context, "a.img", 16)?;
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk(&target(&image), VDEV, "w"))?;
    let load = start_load(guest)?;
    wait_progress(&disk, 50)?;
    let first = generation(&image)?;
    disk.replace()?;
    wait_progress(&disk, 50)?;
    ensure!(
        generation(&image)? == first,
        "the lease was taken anew for another process of the same disk"
    );
    // Without a supervisor there are no heartbeats: the process ends with the term, and the guest waits.
    let pid = disk.pid()?;
    context.take_supervisor()?.kill()?;
    let begun = std::time::Instant::now();
    sh::wait_for("the end of a process without a lease", TERM, || {
        Ok(!Path::new(&format!("/proc/{pid}")).exists())
    })?;
    let ended = begun.elapsed();
    ensure!(
        generation(&image)? == first,
        "nobody gave the lease up, and it is another one"
    );
    context.supervise(true)?;
    disk.wait_replaced(pid)?;
    wait_progress(&disk, 50)?;
    let last = generation(&image)?;
    let guest = context.pv()?;
    let told = end_load(guest, load)?;
    same(guest, &image, 16)?;
    disk.detach(guest)?;
    let free = tap::ctl_json(&["lease", "show", &image])?;
    ensure!(free["state"] == "free", "the lease is not free: {free}");
    context.note(&format!(
        "generations {first} and {last}; the process ended {:.1} s after its supervisor; {told}",
        ended.as_secs_f64()
    ))
}

fn phy(context: &mut Context) -> Result<()> {
    let device = context.null_blk(16, &[])?;
    let record = image(context, "a.lease", 1)?;
    stand_in(context)?;
    let target = format!("lease=record:{record},phy:{}", device.path());
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &format!("script=block,vdev={VDEV},target={target}"))?;
    let load = start_load_with(guest, "")?;
    wait_progress(&disk, 50)?;
    let held = generation(&target)?;
    let second = sh::status(&["tap-ctl", "probe", "-a", &target], LONG)?;
    ensure!(
        second.rc == 3,
        "the device can be had twice: {}",
        second.text
    );
    let told = end_load(guest, load)?;
    same(guest, &device.path(), 16)?;
    disk.detach(guest)?;
    context.note(&format!("generation {held}; {told}"))
}

/// Has a lease broken, of an image or a target, by the generation or the key of its holder.
pub(super) fn break_lease(image: &str, holder: &str, limit: Duration) -> Result<sh::Output> {
    let line = [
        "tap-ctl",
        "lease",
        "break",
        image,
        "--holder-is-dead",
        holder,
    ];
    sh::status(&line, limit)
}

/// As another host asks for an image.
pub(super) fn alpha() -> Result<LeaseClaim> {
    let mut claim = LeaseClaim::new("guest 3, xvda")?;
    claim.host.name = "alpha".into();
    claim.host.machine = [0xa1; 16];
    claim.host.boot = [0xa2; 16];
    Ok(claim)
}

fn other_host(context: &mut Context) -> Result<()> {
    let image = image(context, "a.img", 4)?;
    let mut theirs = ::lease::open(&Kind::Record(None), Path::new(&image), alpha()?)?;
    // An emulated disk may take longer than a lease allows its storage.
    let mut grant = Err(anyhow::anyhow!("not tried"));
    sh::wait_for("the lease of the other host", LONG, || {
        grant = theirs.take(Duration::ZERO).map_err(Into::into);
        Ok(grant.is_ok())
    })?;
    let grant = grant?;
    let keeper = LeaseRenewer::start(theirs, &grant, drop)?;
    let specification = tap::disk(&target(&image), VDEV, "w");
    let domid = context.pv()?.domid.to_string();
    let refused = sh::status(&["xl", "block-attach", &domid, &specification], LONG)?;
    ensure!(
        refused.rc != 0 && refused.text.contains("alpha"),
        "an image of another host was not refused with its name: {}",
        sh::tail(&refused.text, 600)
    );
    forget_refused(&domid, VDEV)?;

    let named = grant.generation.to_string();
    let alive = break_lease(&image, &named, LONG)?;
    ensure!(
        alive.rc != 0 && alive.text.contains("alpha"),
        "the lease of a host that lives was broken: {}",
        alive.text
    );
    // The host dies without giving anything up.
    drop(keeper);
    let broken = break_lease(&image, &named, LONG)?;
    ensure!(
        broken.rc == 0 && broken.text.contains("state=free was=host=alpha"),
        "the lease of a dead host was not broken: {}",
        broken.text
    );
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &specification)?;
    ensure!(
        generation(&image)? > grant.generation,
        "the lease has the generation of the dead host"
    );
    guest.run("dd if=/dev/zero of=/dev/xvdb bs=64k count=4 oflag=direct")?;
    // The host was not dead, or comes back: it must learn that it has lost the lease.
    let mut back = ::lease::open(&Kind::Record(None), Path::new(&image), alpha()?)?;
    let late = back.resume(grant.generation);
    ensure!(
        late.is_err(),
        "a host that was taken for dead has its lease again: {late:?}"
    );
    disk.detach(guest)?;
    let free = back.inspect()?;
    ensure!(
        matches!(free, LeaseView::Free { .. }),
        "the lease is not free: {free:?}"
    );
    Ok(())
}
