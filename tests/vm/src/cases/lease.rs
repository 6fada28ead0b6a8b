// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! An image that several hosts reach, with a record of who writes it: `lease=record`.

use super::tap::{end_load, forget_refused, image, same, start_load, wait_progress, VDEV};
use super::{Case, Context, Needs};
use crate::sh;
use crate::tap::{self, Served};
use ::lease::{Claim, Keeper, Kind, View};
use anyhow::{ensure, Context as _, Result};
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

/// A term, and the heartbeat that was on its way when the last one came.
const TERM: Duration = Duration::from_secs(30);
/// What watches for so long whether a holder lives, or waits for him.
const LONG: Duration = Duration::from_secs(60);

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let case = |name, about, run: fn(&mut Context) -> Result<()>| {
        Case::new(name, about, Needs::Pv, run)
            .supervised()
            .no_leaks()
            .nightly()
    };
    vec![
        case(
            "lease.kept",
            "a disk has its lease while process and supervisor are replaced; without heartbeats nothing is written",
            kept,
        ),
        case(
            "lease.other_host",
            "another host's image is refused, taken away from a dead one only, and lost by who comes back",
            other_host,
        ),
        case("lease.reservation_facts", "what the kernel and its targets do", facts),
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
    let disk = Served::attach(guest, &tap::disk(&target(&image), VDEV, "w"))?;
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

/// As another host asks for an image.
fn alpha() -> Result<Claim> {
    let mut claim = Claim::new("guest 3, xvda")?;
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
    let keeper = Keeper::start(theirs, &grant, drop)?;
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
    let force = [
        "tap-ctl",
        "lease",
        "break",
        &image,
        "--holder-is-dead",
        &named,
    ];
    let alive = sh::status(&force, LONG)?;
    ensure!(
        alive.rc != 0 && alive.text.contains("alpha"),
        "the lease of a host that lives was broken: {}",
        alive.text
    );
    // The host dies: nobody gives anything up.
    drop(keeper);
    let broken = sh::status(&force, LONG)?;
    ensure!(
        broken.rc == 0 && broken.text.contains("state=free was=host=alpha"),
        "the lease of a dead host was not broken: {}",
        broken.text
    );
    let guest = context.pv()?;
    let disk = Served::attach(guest, &specification)?;
    ensure!(
        generation(&image)? > grant.generation,
        "the lease has the generation of the dead host"
    );
    guest.run("dd if=/dev/zero of=/dev/xvdb bs=64k count=4 oflag=direct")?;
    // It was not dead, or comes back: it learns that it has lost.
    let mut back = ::lease::open(&Kind::Record(None), Path::new(&image), alpha()?)?;
    let late = back.resume(grant.generation);
    ensure!(
        late.is_err(),
        "a host that was taken for dead has its lease again: {late:?}"
    );
    disk.detach(guest)?;
    let free = back.inspect()?;
    ensure!(
        matches!(free, View::Free { .. }),
        "the lease is not free: {free:?}"
    );
    Ok(())
}

fn facts(context: &mut Context) -> Result<()> {
    use crate::reserved::Reserved;
    use diskio::reservation as pr;
    use std::os::fd::AsFd;
    for nvme in [false, true] {
        let made = if nvme { Reserved::nvme(64) } else { Reserved::scsi(64) };
        let storage = match made {
            Ok(storage) => storage,
            Err(error) => {
                context.note(&format!("nvme {nvme}: cannot make it: {error:#}"))?;
                continue;
            }
        };
        context.note(&format!("disks {:?}", storage.disks))?;
        let open = |at: usize| std::fs::File::open(&storage.disks[at]);
        let (a, b) = (open(0)?, open(1)?);
        let (a, b) = (a.as_fd(), b.as_fd());
        let kind = pr::ReservationKind::WriteExclusive;
        let mut say = |what: &str, text: String| context.note(&format!("{what}: {text}"));
        say("sysfs", sh::shell(&format!("for d in {}; do n=${{d#/dev/}}; m=$(cat /sys/block/$n/dev); readlink -f /sys/dev/block/$m/device; readlink -f /sys/dev/block/$m/device/subsystem; cat /sys/dev/block/$m/device/type; done; true", storage.disks.join(" ")))?)?;
        say("keys", format!("{:?}", pr::keys(a)))?;
        say("reservation", format!("{:?}", pr::reservation(a)))?;
        say("a registers", format!("{:?}", pr::register(a, 0, 0xa1)))?;
        say("a registers again", format!("{:?}", pr::register(a, 0, 0xa2)))?;
        say("a registers same", format!("{:?}", pr::register(a, 0xa1, 0xa1)))?;
        say("a registers wrong old", format!("{:?}", pr::register(a, 0xa7, 0xa2)))?;
        say("b registers wrong old", format!("{:?}", pr::register(b, 0xa1, 0xb1)))?;
        say("b reserves unregistered", format!("{:?}", pr::reserve(b, 0xb1, kind)))?;
        say("a reserves", format!("{:?}", pr::reserve(a, 0xa1, kind)))?;
        say("a reserves again", format!("{:?}", pr::reserve(a, 0xa1, kind)))?;
        say("reservation by b", format!("{:?}", pr::reservation(b)))?;
        say("keys by b", format!("{:?}", pr::keys(b)))?;
        let dd = |disk: &str| sh::status(&["dd", "if=/dev/zero", &format!("of={disk}"), "bs=4096", "count=1", "oflag=direct", "conv=fsync"], LONG).map(|o| format!("{} {}", o.rc, o.text));
        say("a writes", dd(&storage.disks[0])?)?;
        say("b writes", dd(&storage.disks[1])?)?;
        say("b reads", sh::status(&["dd", &format!("if={}", storage.disks[1]), "of=/dev/null", "bs=4096", "count=1", "iflag=direct"], LONG)?.text)?;
        say("b registers", format!("{:?}", pr::register(b, 0, 0xb1)))?;
        say("b reserves", format!("{:?}", pr::reserve(b, 0xb1, kind)))?;
        say("b writes registered", dd(&storage.disks[1])?)?;
        say("a changes key while holding", format!("{:?} {:?}", pr::register(a, 0xa1, 0xa3), pr::reservation(a)))?;
        say("b releases a's", format!("{:?} {:?}", pr::release(b, 0xb1, kind), pr::reservation(a)))?;
        say("b preempts wrong", format!("{:?}", pr::preempt_and_abort(b, 0xdead, 0xb1, kind)))?;
        say("b preempts", format!("{:?}", pr::preempt_and_abort(b, 0xa3, 0xb1, kind)))?;
        say("reservation", format!("{:?} {:?}", pr::reservation(a), pr::keys(a)))?;
        say("a writes", dd(&storage.disks[0])?)?;
        say("a flush", sh::status(&["dd", "if=/dev/null", &format!("of={}", storage.disks[0]), "count=0", "conv=notrunc,fsync"], LONG)?.text)?;
        say("a releases", format!("{:?}", pr::release(a, 0xa3, kind)))?;
        say("a unregisters", format!("{:?}", pr::register(a, 0xa3, 0)))?;
        say("b releases", format!("{:?}", pr::release(b, 0xb1, kind)))?;
        say("b releases again", format!("{:?}", pr::release(b, 0xb1, kind)))?;
        say("b unregisters", format!("{:?}", pr::register(b, 0xb1, 0)))?;
        say("left", format!("{:?} {:?}", pr::reservation(a), pr::keys(a)))?;
        // Write exclusive, registrants only.
        let kind = pr::ReservationKind::WriteExclusiveRegistrants;
        say("wero", format!("{:?} {:?} {:?}", pr::register(a, 0, 0xa1), pr::reserve(a, 0xa1, kind), pr::reservation(b)))?;
        say("b writes", dd(&storage.disks[1])?)?;
        say("b registers", format!("{:?}", pr::register(b, 0, 0xb1)))?;
        say("b writes registered", dd(&storage.disks[1])?)?;
        say("b preempts", format!("{:?} {:?} {:?}", pr::preempt_and_abort(b, 0xa1, 0xb1, kind), pr::reservation(a), pr::keys(a)))?;
        say("b unregisters holding", format!("{:?} {:?} {:?}", pr::register(b, 0xb1, 0), pr::reservation(a), pr::keys(a)))?;
        let removed = storage.remove();
        context.note(&format!("removed: {removed:?}"))?;
    }
    let _ = sh::shell("dmesg | grep -i -e resv -e pr_ -e reserv -e target -e nvme | tail -40").map(|t| context.note(&t));
    Ok(())
}
