// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Guests that are suspended: moved to another domain of this host, saved, or not moved after all. One disk at a time
//! uses the image, and no request of the guest is lost.

use super::death::holding;
use super::tap::{
    end_load, image, same, slowest, start_load, start_load_with, wait_progress, DEVICE, VDEV,
};
use super::{Case, Context, SharedGuest};
use crate::backing::HoldingDevice;
use crate::console::GuestJob;
use crate::guest::{AttachedVbd, Guest, RUN_DIR};
use crate::tap::{self, EventLog, ServedDisk};
use crate::{hotplug, sh};
use anyhow::{ensure, Context as _, Result};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Time in which xl must move a guest.
pub(super) const MOVE: Duration = Duration::from_secs(240);
/// Time in which a disk must close its image, or open it.
pub(super) const SOON: Duration = Duration::from_secs(60);

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    use SharedGuest::{Pv, Pvh};
    let case = |name, about, needs, run: fn(&mut Context) -> Result<()>| {
        Case::new(name, about, needs, run).supervised().no_leaks()
    };
    vec![
        case(
            "migrate.raw",
            "a PVH guest moves under verified load, its disk in a file: one side after the other has the image",
            Pvh,
            raw,
        )
        .nightly(),
        case(
            "migrate.s19_slow_writes",
            "a guest moves while its writes are on their way: they are over before the destination writes",
            Pvh,
            s19_slow_writes,
        )
        .nightly(),
        case(
            "migrate.s20_checkpoints",
            "checkpoint after checkpoint under load: the image is let go of and taken again, nothing is lost",
            Pv,
            s20_checkpoints,
        )
        .nightly(),
        case(
            "migrate.s27_qcow2",
            "the destination of a qcow2 image sees the last tables of the source",
            Pvh,
            s27_qcow2,
        )
        .nightly(),
        Case::new(
            "migrate.phy",
            "the same for a block device without a process",
            Pvh,
            phy,
        )
        .nightly(),
        Case {
            ours: true,
            ..Case::new(
                "migrate.s23_mapped_reads",
                "what was read into mapped pages just before the guest was suspended is there on the other side",
                Pvh,
                mapped_reads,
            )
            .nightly()
        },
    ]
}

/// Takes the shared guest, moves it, and gives back what arrived.
fn moved(context: &mut Context, needs: SharedGuest, jobs: &[GuestJob]) -> Result<()> {
    let guest = context.take(needs)?;
    let there = guest.migrate(jobs)?;
    context.give(needs, there);
    Ok(())
}

/// The guest moves under the load `jobs`, and reads afterwards what its image holds.
pub(super) fn moves_with(
    context: &mut Context,
    needs: SharedGuest,
    target: &str,
    options: &str,
) -> Result<(ServedDisk, String)> {
    let guest = context.guest(needs)?;
    let events = EventLog::follow()?;
    let source = ServedDisk::attach(guest, &tap::disk(target, VDEV, "w"))?;
    let load = start_load_with(guest, options)?;
    wait_progress(&source, 100)?;
    moved(context, needs, &load)?;
    let guest = context.guest(needs)?;
    let there = ServedDisk::of(AttachedVbd::of(guest.domid, VDEV)?)?;
    changes_sides(&events, &source, &there)?;
    source.wait_gone()?;
    wait_progress(&there, 100)?;
    let told = end_load(guest, load)?;
    Ok((there, told))
}

fn raw(context: &mut Context) -> Result<()> {
    let image = image(context, "a.img", 16)?;
    let target = format!("aio:{image}");
    let (disk, told) = moves_with(context, SharedGuest::Pvh, &target, "--discard")?;
    let guest = context.pvh()?;
    same(guest, &image, 16)?;
    disk.detach(guest)?;
    context.note(&told)
}

fn s27_qcow2(context: &mut Context) -> Result<()> {
    let path = image(context, "a.qcow2", 1)?;
    sh::run(&["qemu-img", "create", "-q", "-f", "qcow2", &path, "16M"])?;
    let (disk, told) = moves_with(context, SharedGuest::Pvh, &format!("qcow2:{path}"), "")?;
    disk.detach(context.pvh()?)?;
    sh::run(&["qemu-img", "check", "-f", "qcow2", &path])?;
    context.note(&told)
}

/// Writes of the guest, more than one request each way could hold.
const WRITES: &str = "fio --name=w --filename=/dev/xvdb --size=8m --bs=4k --direct=1 --ioengine=libaio --iodepth=64 \
     --rw=randwrite --verify=crc32c --verify_fatal=1 --do_verify=1 --serialize_overlap=1 --number_ios=256 \
     --output-format=terse";

/// A guest that moves while writes of it are on their way, which their storage holds.
pub(super) struct SlowMove {
    pub(super) slow: HoldingDevice,
    pub(super) events: EventLog,
    pub(super) source: ServedDisk,
    job: GuestJob,
    before: u32,
    mover: JoinHandle<Result<Guest>>,
}

impl SlowMove {
    /// Begins the move, with `words` before the target of its disk.
    pub(super) fn begin(context: &mut Context, words: &str) -> Result<SlowMove> {
        let slow = holding(context)?;
        let events = EventLog::follow()?;
        let guest = context.pvh()?;
        let target = format!("{words}aio:{}", slow.path());
        let source = ServedDisk::attach(guest, &tap::disk(&target, VDEV, "w"))?;
        let job = guest.start(WRITES)?;
        slow.wait_writes(32)?;
        let guest = context.take(SharedGuest::Pvh)?;
        Ok(SlowMove {
            slow,
            events,
            source,
            job,
            before: guest.domid,
            mover: thread::spawn(move || guest.migrate(&[job])),
        })
    }

    /// Waits until the guest has asked for something on the other side.
    pub(super) fn arrived(&self) -> Result<ServedDisk> {
        let mut found = None;
        sh::wait_for("requests of the guest that arrived", MOVE, || {
            let domain = crate::guest::newest_domain()?;
            if domain <= self.before {
                return Ok(false);
            }
            let Ok(disk) = AttachedVbd::of(domain, VDEV).and_then(ServedDisk::of) else {
                return Ok(false);
            };
            let waits = disk.minor != self.source.minor && disk.info()?.waiting > 0;
            found = waits.then_some(disk);
            Ok(waits)
        })?;
        found.context("the guest did not arrive")
    }

    /// Ends the move, with the guest served by `there`, if that is known; `check` runs before the load ends.
    pub(super) fn end(
        self,
        context: &mut Context,
        there: Result<ServedDisk>,
        check: impl FnOnce(&EventLog, &ServedDisk, &ServedDisk) -> Result<()>,
    ) -> Result<()> {
        let guest = self
            .mover
            .join()
            .map_err(|_| anyhow::anyhow!("the move panicked"))?;
        context.give(SharedGuest::Pvh, guest?);
        let there = there?;
        check(&self.events, &self.source, &there)?;
        let guest = context.pvh()?;
        let done = guest.wait(self.job, MOVE)?;
        done.succeeded("fio failed across the move of its guest")?;
        same(guest, &self.slow.path(), 8)?;
        there.detach(guest)
    }
}

fn s19_slow_writes(context: &mut Context) -> Result<()> {
    let moving = SlowMove::begin(context, "")?;
    // Requests of the destination wait while a write of the source is on its way.
    let waits = moving.arrived().and_then(|there| {
        let info = there.info()?;
        ensure!(
            info.committed == 0,
            "the destination answered {} requests while writes of the source were on their way",
            info.committed
        );
        Ok(there)
    });
    moving.slow.let_go()?;
    moving.end(context, waits, |events, source, there| {
        changes_sides(events, source, there)
    })
}

/// Waits until the source has let go of the image and the destination has taken it. The lock of the file orders the two;
/// the supervisor hears of each from another process, so their events come in any order.
fn changes_sides(events: &EventLog, source: &ServedDisk, there: &ServedDisk) -> Result<()> {
    let both = [("inactive", source.minor), ("active", there.minor)];
    events.wait_for_all(&both, SOON).map(drop)
}

/// Rounds of checkpoints.
const ROUNDS: u32 = 3;
/// Longest time of a request by the guest's clock, which stops with the guest: to get the image again, and its turn.
const LONGEST: Duration = Duration::from_secs(5);

fn s20_checkpoints(context: &mut Context) -> Result<()> {
    let image = image(context, "a.img", 16)?;
    let events = EventLog::follow()?;
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk(&format!("aio:{image}"), VDEV, "w"))?;
    let load = start_load(guest)?;
    let file = format!("{RUN_DIR}/checkpoint");
    let id = guest.domid.to_string();
    let before = disk.pid()?;
    let mut longest = Duration::ZERO;
    for _ in 0..ROUNDS {
        wait_progress(&disk, 50)?;
        let begun = Instant::now();
        sh::run_for(&["xl", "save", "-c", &id, &file], MOVE)?;
        longest = longest.max(begun.elapsed());
        std::fs::remove_file(&file)?;
        events.wait_for("inactive", disk.minor, SOON)?;
        events.wait_for("active", disk.minor, SOON)?;
    }
    wait_progress(&disk, 50)?;
    let told = end_load(guest, load)?;
    ensure!(disk.pid()? == before, "the disk has another process");
    let slowest = slowest(&told)?;
    ensure!(
        slowest <= LONGEST,
        "a request took {} ms",
        slowest.as_millis()
    );
    same(guest, &image, 16)?;
    disk.detach(guest)?;
    context.note(&format!(
        "{told}; the longest checkpoint took {} ms",
        longest.as_millis()
    ))
}

fn phy(context: &mut Context) -> Result<()> {
    let device = context.null_blk(16, &[])?;
    let guest = context.pvh()?;
    let disk = hotplug::disk(&device.path(), VDEV, "w")?;
    let vbd = guest.attach(&disk)?;
    let load = start_load_with(guest, "")?;
    let guest: Guest = context.take(SharedGuest::Pvh)?;
    let there = guest.migrate(&load)?;
    context.give(SharedGuest::Pvh, there);
    vbd.wait_gone()?;
    let guest = context.pvh()?;
    let told = end_load(guest, load)?;
    same(guest, &device.path(), 16)?;
    guest.detach(&AttachedVbd::of(guest.domid, VDEV)?)?;
    context.note(&told)
}

/// More than all places of `reread` get in a turn, so that each of them has held something else before.
const READS: u64 = 500;

/// A device writes into the guest's own pages, which are sent along if they are unmapped in time.
pub(super) fn mapped_reads(context: &mut Context) -> Result<()> {
    context.load_with(&["feature_persistent=0", "copy_max_segments=4"])?;
    let device = context.null_blk(16, &[])?;
    // Not by the guest: a build with planted faults loses writes, too.
    sh::run(&["/t/vmtest", "reread", &device.path(), "--fill"])?;
    let guest = context.pvh()?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), VDEV, "w")?)?;
    guest.run("rm -f /tmp/stop")?;
    let reads = guest.start(&format!("/agent reread {DEVICE} --until /tmp/stop"))?;
    let going = sh::wait_for("reads", SOON, || Ok(vbd.statistic("rd_req")? > READS));
    if let Err(error) = going {
        // Linux's frontend stops using a disk whose backend still has a page when it answers.
        let said = guest.run("dmesg | tail -n 6")?;
        return Err(error.context(format!("the guest says: {}", said.trim())));
    }
    let guest: Guest = context.take(SharedGuest::Pvh)?;
    let there = guest.migrate(&[reads])?;
    context.give(SharedGuest::Pvh, there);
    vbd.wait_gone()?;
    let guest = context.pvh()?;
    guest.run("touch /tmp/stop")?;
    let done = guest.wait(reads, MOVE)?;
    done.succeeded("what was read before the move")?;
    guest.detach(&AttachedVbd::of(guest.domid, VDEV)?)?;
    context.note(done.text.trim())
}
