// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A disk whose storage refuses the writes of all hosts but one: `lease=reservation`.

use super::lease::alpha;
use super::tap::{end_load, same, start_load_with, wait_progress, VDEV};
use super::{Case, Context, Needs};
use crate::reserved::Reserved;
use crate::tap::{self, EventLog, Served};
use crate::{backing, sh};
use ::lease::Kind;
use anyhow::{ensure, Context as _, Result};
use std::path::Path;
use std::time::Duration;

/// Megabytes of the disk.
const MIB: u32 = 16;
/// How long a command may take.
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
        case("lease.reservation_facts", "what the kernel and its targets do", facts),
        case(
            "lease.reservation_scsi",
            "a SCSI disk is reserved: others' writes are refused, a break stops the disk, and nothing lands afterwards",
            |context| reserved(context, Reserved::scsi(MIB)?),
        ),
        case(
            "lease.reservation_nvme",
            "the same of an NVMe namespace",
            |context| reserved(context, Reserved::nvme(MIB)?),
        ),
    ]
}

/// The key that has a disk reserved, if one has.
fn key(disk: &str) -> Result<Option<String>> {
    let view = tap::ctl_json(&["lease", "show", &format!("lease=reservation,aio:{disk}")])?;
    Ok(view["key"].as_str().map(str::to_owned))
}

/// Writes zeroes to a block of a disk, past the page cache; says what came of it.
fn zero(disk: &str) -> Result<sh::Output> {
    let to = format!("of={disk}");
    let line = ["dd", "if=/dev/zero", &to, "bs=4k", "count=1", "oflag=direct"];
    sh::status(&line, LONG)
}

/// Copies a whole disk, past the page cache.
fn copy(from: &str, to: &str) -> Result<()> {
    let (from, to) = (format!("if={from}"), format!("of={to}"));
    let count = format!("count={MIB}");
    let flags = ["iflag=fullblock", "oflag=direct", "conv=notrunc"];
    let line = ["dd", &from, &to, "bs=1M", &count];
    sh::run(&[&line[..], &flags[..]].concat()).map(drop)
}

fn reserved(context: &mut Context, storage: Reserved) -> Result<()> {
    let [own, other] = storage.disks.clone();
    let medium = storage.medium.path();
    context.at_end(format!("take {own} and {other} down"), move || storage.remove());
    let target = format!("lease=reservation,aio:{own}");
    let guest = context.pv()?;
    let disk = Served::attach(guest, &tap::disk(&target, VDEV, "w"))?;
    let load = start_load_with(guest, "")?;
    wait_progress(&disk, 50)?;
    let held = key(&own)?.context("nothing is reserved")?;
    disk.replace()?;
    wait_progress(&disk, 50)?;
    ensure!(key(&other)? == Some(held.clone()), "another process has another key");
    refused(&other)?;

    let events = EventLog::follow()?;
    let broken = sh::status(&["tap-ctl", "lease", "break", &other, "--holder-is-dead", &held], LONG)?;
    ensure!(
        broken.rc == 0 && broken.text.contains("state=free was=host="),
        "the reservation was not broken: {}",
        broken.text
    );
    let mut theirs = ::lease::open(&Kind::Reservation, Path::new(&other), alpha()?)?;
    theirs.take(Duration::ZERO)?;
    while_another_has_it(&disk, &events, &medium, &other)?;

    let minor = disk.minor.to_string();
    let busy = sh::status(&["tap-ctl", "unpause", "-m", &minor], LONG)?;
    ensure!(
        busy.rc != 0 && busy.text.contains("is reserved by host id-"),
        "a disk that another host has reserved was served: {}",
        busy.text
    );
    theirs.give_up()?;
    tap::ctl(&["unpause", "-m", &minor])?;
    wait_progress(&disk, 50)?;
    ensure!(key(&own)?.is_some_and(|key| key != held), "the key is that of before");
    let guest = context.pv()?;
    let told = end_load(guest, load)?;
    same(guest, &medium, MIB)?;
    disk.detach(guest)?;
    ensure!(key(&own)?.is_none(), "what is reserved outlives the disk");
    context.note(&told)
}

/// The storage lets nobody else write, and everybody read.
fn refused(other: &str) -> Result<()> {
    let write = zero(other)?;
    ensure!(
        write.rc != 0 && write.text.contains("Invalid exchange"),
        "the storage took what another host wrote: {}",
        write.text
    );
    backing::sha256(other, 1).map(drop)
}

/// What the guest asked for waits, and nothing of it lands on what the other host writes meanwhile.
fn while_another_has_it(
    disk: &Served,
    events: &EventLog,
    medium: &str,
    other: &str,
) -> Result<()> {
    let saved = "/srv/vmtest/reserved.saved";
    std::fs::create_dir_all("/srv/vmtest")?;
    sh::run(&["dd", &format!("if={medium}"), &format!("of={saved}"), "bs=1M", "iflag=direct"])?;
    copy("/dev/zero", other)?;
    events.wait_for("paused", disk.minor, LONG)?;
    sh::wait_for("requests that wait", LONG, || Ok(disk.info()?.waiting > 0))?;
    sh::run(&["cmp", "-n", &format!("{}", u64::from(MIB) << 20), medium, "/dev/zero"])
        .context("something landed after another host had the disk")?;
    copy(saved, other)?;
    std::fs::remove_file(saved)?;
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
        say("b preempts wrong", format!("{:?}", pr::preempt_and_abort(b, 0xb1, 0xdead, kind)))?;
        say("b preempts", format!("{:?}", pr::preempt_and_abort(b, 0xb1, 0xa3, kind)))?;
        say("reservation", format!("{:?} {:?}", pr::reservation(a), pr::keys(a)))?;
        say("a writes", dd(&storage.disks[0])?)?;
        say("a flush", sh::status(&["dd", "if=/dev/null", &format!("of={}", storage.disks[0]), "count=0", "conv=notrunc,fsync"], LONG)?.text)?;
        say("a unregisters", format!("{:?}", pr::register(a, 0xa3, 0)))?;
        let gone = |fd, key| if nvme { pr::unregister_from_nvme(fd, key) } else { pr::register(fd, key, 0) };
        say("b unregisters holding", format!("{:?}", gone(b, 0xb1)))?;
        say("left", format!("{:?} {:?}", pr::reservation(a), pr::keys(a)))?;
        // Write exclusive, registrants only.
        let kind = pr::ReservationKind::WriteExclusiveRegistrants;
        say("wero", format!("{:?} {:?} {:?}", pr::register(a, 0, 0xa1), pr::reserve(a, 0xa1, kind), pr::reservation(b)))?;
        say("b writes", dd(&storage.disks[1])?)?;
        say("b registers", format!("{:?}", pr::register(b, 0, 0xb1)))?;
        say("b writes registered", dd(&storage.disks[1])?)?;
        say("b preempts", format!("{:?} {:?} {:?}", pr::preempt_and_abort(b, 0xb1, 0xa1, kind), pr::reservation(a), pr::keys(a)))?;
        say("b unregisters holding", format!("{:?} {:?} {:?}", gone(b, 0xb1), pr::reservation(a), pr::keys(a)))?;
        let removed = storage.remove();
        context.note(&format!("removed: {removed:?}"))?;
    }
    let _ = sh::shell("dmesg | grep -i -e resv -e pr_ -e reserv -e target -e nvme | tail -40").map(|t| context.note(&t));
    Ok(())
}
