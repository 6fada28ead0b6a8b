// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The process that serves a disk dies, hangs, or outlives its supervisor; the guest only waits.

use super::basic::{verify_job, FIO};
use super::tap::{end_load, image, same, start_load, wait_progress, DEVICE, VDEV};
use super::{Case, Context, SharedGuest};
use crate::backing::{linear, Dm, HoldingDevice};
use crate::guest::{Config, Guest, GuestKind, COMMAND};
use crate::hotplug;
use crate::node::{ControlNode, OpenNode};
use crate::tap::{self, EventLog, RunningSupervisor, ServedDisk};
use crate::{seed, sh, sys, xs};
use anyhow::{bail, ensure, Context as _, Result};
use control::installed::TAPDISK;
use ring::tap::abi::{STATE_FENCING, STATE_LIVE};
use sim::rng::Rng;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Deaths under load: in each run, and at night.
const KILLS: u32 = 15;
const MANY_KILLS: u32 = 100;

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    use SharedGuest::{Nothing, Pv};
    let case = |name, about, needs, run: fn(&mut Context) -> Result<()>| {
        Case::new(name, about, needs, run).supervised().no_leaks()
    };
    vec![
        case(
            "tap.s01_idle",
            "a process is killed while nothing is asked of it",
            Pv,
            s01_idle,
        ),
        Case::new(
            "tap.s05_late_write",
            "nothing is executed again while a write of the dead process is on its way",
            Pv,
            s05_late_write,
        )
        .tap()
        .no_leaks(),
        case(
            "tap.s05_stuck_storage",
            "a supervisor whose process cannot end waits for it and serves others",
            Pv,
            s05_stuck_storage,
        ),
        case(
            "tap.gone_means_fenced",
            "a disk is not gone, and its image not free, while I/O of its last process may come",
            Nothing,
            gone_means_fenced,
        ),
        case(
            "tap.s12_kills",
            "killed again and again at random under loads that verify",
            Pv,
            |context| s12_kills(context, KILLS),
        ),
        case(
            "tap.s12_hundred_kills",
            "the same, a hundred times",
            Pv,
            |context| s12_kills(context, MANY_KILLS),
        )
        .nightly(),
        case(
            "tap.s13_hung",
            "a process that hangs is reported, and killed only if the policy says so",
            Pv,
            s13_hung,
        ),
        case(
            "tap.s16_closing",
            "a frontend closes while nobody serves: Closed at once, and all grants are back",
            Nothing,
            s16_closing,
        )
        .nightly(),
        case(
            "tap.s17_destroyed",
            "a guest is destroyed while its process hangs with requests",
            Nothing,
            s17_destroyed,
        )
        .nightly(),
        case(
            "tap.supervisor_dies",
            "disks go on without their supervisor, and the next one takes them over",
            Pv,
            supervisor_dies,
        ),
    ]
}

fn s01_idle(context: &mut Context) -> Result<()> {
    let image = image(context, "a.img", 16)?;
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk(&format!("aio:{image}"), VDEV, "w"))?;
    guest.run_for(&verify_job(DEVICE, 4, 40, 512), FIO)?;
    let took = disk.replace()?;
    let status = format!("{}/tap-status", disk.vbd.backend);
    xs::wait_value(&status, "live", Duration::from_secs(10))?;
    guest.run_for(&verify_job(DEVICE, 4, 40, 512), FIO)?;
    same(guest, &image, 4)?;
    context.note(&format!(
        "the next process served after {} ms",
        took.as_millis()
    ))?;
    disk.detach(context.pv()?)
}

/// A tapdisk of the case's own, which no supervisor knows.
struct LoneTapdisk(Child);

impl Drop for LoneTapdisk {
    fn drop(&mut self) {
        // No process waits for it here: with a write under way it ends later.
        if let Err(error) = self.0.kill() {
            eprintln!("vmtest: cannot kill tapdisk {}: {error}", self.0.id());
        }
    }
}

impl LoneTapdisk {
    fn start(minor: u32, device: &str) -> Result<LoneTapdisk> {
        let log = tap::log_of("lone-tapdisk")?;
        let child = Command::new(TAPDISK)
            .args([
                "--node",
                &crate::node::path(minor),
                &format!("aio:{device}"),
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        Ok(LoneTapdisk(
            child.context("cannot start tapdisk: is it installed?")?,
        ))
    }

    /// Waits until it serves.
    fn wait_live(&mut self, minor: u32) -> Result<()> {
        let control = ControlNode::open()?;
        sh::wait_for("a process that serves", Duration::from_secs(30), || {
            if let Some(status) = self.0.try_wait()? {
                bail!(
                    "tapdisk ended ({status}): {}",
                    sh::tail(&sh::get(tap::path_of("lone-tapdisk"))?, 600)
                );
            }
            let info = control.query(minor)?;
            Ok(info.is_some_and(|info| info.state == STATE_LIVE))
        })
    }

    fn end(mut self, signal: libc::c_int) -> Result<()> {
        sys::kill(self.0.id(), signal).context("cannot end tapdisk")?;
        self.0.wait().context("cannot wait for tapdisk")?;
        Ok(())
    }
}

/// Returns a shell command that fills one block of the guest's disk with one letter.
fn write(block: u32, letter: char) -> String {
    format!("head -c 4096 /dev/zero | tr '\\000' {letter} | dd of={DEVICE} bs=4k count=1 seek={block} iflag=fullblock oflag=direct")
}

/// The size of a null_blk device of the cases of slow storage, in MiB and in sectors.
const SLOW_MIB: u32 = 16;
const SLOW_SECTORS: u64 = 32768;

/// Message of the case below if no fence is between a write of a dead process and the next process: there is damage, or
/// there is none yet, because the older write is still on its way.
pub(super) const NOT_FENCED: &str = "a write of a dead process is not fenced";

/// Makes storage that holds writes until a case releases them.
pub(super) fn holding(context: &mut Context) -> Result<HoldingDevice> {
    let below = context.null_blk(SLOW_MIB, &[])?;
    let slow = HoldingDevice::create("vmtest-slow", &below.path(), SLOW_SECTORS)?;
    let theirs = slow.clone();
    context.at_end("remove vmtest-slow", move || theirs.remove());
    // This also runs after a failure, because a process with a write under way does not end.
    let theirs = slow.clone();
    context.at_end("let the writes go", move || theirs.let_go());
    Ok(slow)
}

/// Two names of one device: the first one holds writes, as slow storage does. The next process uses the second one, so
/// that only the fence is between it and the late write.
pub(super) fn s05_late_write(context: &mut Context) -> Result<()> {
    let below = context.null_blk(SLOW_MIB, &[])?;
    let old = HoldingDevice::create("vmtest-old", &below.path(), SLOW_SECTORS)?;
    let theirs = old.clone();
    context.at_end("remove vmtest-old", move || theirs.remove());
    let new = Dm::create("vmtest-new", &linear(&below.path(), SLOW_SECTORS))?;
    let theirs = new.clone();
    context.at_end("remove vmtest-new", move || theirs.remove());
    let control = ControlNode::open()?;
    let minor = control.create(0)?;
    context.at_end("remove the tap disk", move || {
        sh::wait_for("the end of the disk", Duration::from_secs(20), || {
            Ok(control.destroy(minor).is_ok())
        })
    });
    // This also runs after a failure, because a process with a write under way does not end.
    let theirs = old.clone();
    context.at_end("let the late write go", move || theirs.let_go());
    let mut first = LoneTapdisk::start(minor, &old.path())?;
    first.wait_live(minor)?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::played(minor, VDEV)?)?;
    let mut late = late_write(guest, minor, &first, &old, &new)?;
    // A build without the fence serves too early: the case shows the consequences.
    if !late.fenced {
        newer_write(guest, minor, &mut late)?;
    }
    old.let_go()?;
    first.0.wait().context("cannot wait for tapdisk")?;
    if late.fenced {
        newer_write(guest, minor, &mut late)?;
    }
    let held = sh::shell(&format!(
        "dd if={} bs=4k skip=7 count=1 iflag=direct status=none | fold -w 1 | sort -u",
        below.path()
    ))?;
    ensure!(
        held.trim() == "b",
        "{NOT_FENCED}: the device holds `{}`, the older write came after the newer one",
        held.trim()
    );
    ensure!(
        late.fenced,
        "{NOT_FENCED}: the next process did not have to wait for it"
    );
    guest.detach(&vbd)?;
    late.second.end(libc::SIGTERM)
}

/// A write of a dead process is under way.
struct LateWrite {
    /// The next process.
    second: LoneTapdisk,
    /// True if it had to wait.
    fenced: bool,
    /// The write, as the guest sees it.
    job: Option<crate::console::GuestJob>,
}

/// Kills the process while a write of its is under way, and starts the next one.
fn late_write(
    guest: &Guest,
    minor: u32,
    first: &LoneTapdisk,
    old: &HoldingDevice,
    new: &Dm,
) -> Result<LateWrite> {
    let control = ControlNode::open()?;
    let job = guest.start(&write(7, 'a'))?;
    // Not only at the process: a process that dies before it has passed the write on leaves nothing.
    old.wait_write()?;
    sys::kill(first.0.id(), libc::SIGKILL).context("cannot kill tapdisk")?;
    let state = || -> Result<u32> {
        let info = control.query(minor)?.context("the disk is gone")?;
        Ok(info.state)
    };
    sh::wait_for("the end of the process", Duration::from_secs(20), || {
        Ok(state()? != STATE_LIVE)
    })?;
    let second = LoneTapdisk::start(minor, &new.path())?;
    // The disk must stay fenced while the write is under way, which the case checks for two seconds.
    let begun = Instant::now();
    let mut fenced = state()? == STATE_FENCING;
    while begun.elapsed() < Duration::from_secs(2) && fenced {
        let open = OpenNode::try_open(minor);
        ensure!(
            open.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY)),
            "the node can be opened although a write of the dead process is under way"
        );
        fenced = state()? == STATE_FENCING;
    }
    let job = Some(job);
    Ok(LateWrite {
        second,
        fenced,
        job,
    })
}

/// The write is answered, and the guest writes something newer to the same block. Then it writes to another block,
/// because the late write takes the content of its page when it happens, and the page may serve a third request by
/// then.
fn newer_write(guest: &Guest, minor: u32, late: &mut LateWrite) -> Result<()> {
    late.second.wait_live(minor)?;
    if let Some(job) = late.job.take() {
        let done = guest.wait(job, COMMAND)?;
        ensure!(
            done.rc == 0,
            "the write that waited failed: {}",
            sh::tail(&done.text, 300)
        );
    }
    guest.run(&write(7, 'b'))?;
    guest.run(&write(8, 'c')).map(drop)
}

fn s05_stuck_storage(context: &mut Context) -> Result<()> {
    let below = context.null_blk(SLOW_MIB, &[])?;
    let disk = HoldingDevice::create("vmtest-stuck", &below.path(), SLOW_SECTORS)?;
    let theirs = disk.clone();
    context.at_end("remove the mapped device", move || theirs.remove());
    let image = image(context, "b.img", 16)?;
    let guest = context.pv()?;
    let served = ServedDisk::attach(
        guest,
        &tap::disk(&format!("aio:{}", disk.path()), VDEV, "w"),
    )?;
    let other = ServedDisk::attach(guest, &tap::disk(&format!("aio:{image}"), "xvdc", "w"))?;
    let stuck = || -> Result<crate::console::GuestJob> {
        let job = guest.start(&write(7, 'a'))?;
        disk.wait_write()?;
        let old = served.kill()?;
        xs::wait_value(
            &format!("{}/tap-status", served.vbd.backend),
            "fencing",
            Duration::from_secs(20),
        )?;
        // The other disk is served, and its process replaced, as if nothing was.
        other.replace()?;
        guest.run("dd if=/dev/zero of=/dev/xvdc bs=64k count=4 oflag=direct")?;
        ensure!(
            served.info()?.state == STATE_FENCING,
            "the disk did not wait for the write of tapdisk {old}"
        );
        Ok(job)
    };
    let job = stuck();
    disk.let_go()?;
    let done = guest.wait(job?, COMMAND)?;
    ensure!(
        done.rc == 0,
        "the write that waited failed: {}",
        sh::tail(&done.text, 300)
    );
    served.wait_replaced(0)?;
    guest.run_for(&verify_job(DEVICE, 4, 40, 512), FIO)?;
    other.detach(guest)?;
    served.detach(guest)
}

/// The guest is destroyed while a write of its process, which was killed, hangs in the storage.
fn gone_means_fenced(context: &mut Context) -> Result<()> {
    let below = context.null_blk(SLOW_MIB, &[])?;
    let stuck = HoldingDevice::create("vmtest-stuck", &below.path(), SLOW_SECTORS)?;
    let theirs = stuck.clone();
    context.at_end("remove the mapped device", move || theirs.remove());
    let target = format!("aio:{}", stuck.path());
    let guest = Guest::create(Config::new("victim", GuestKind::Pv, 1))?;
    let served = ServedDisk::attach(&guest, &tap::disk(&target, VDEV, "w"))?;
    guest.start(&write(7, 'a'))?;
    stuck.wait_write()?;
    served.kill()?;
    xs::wait_value(
        &format!("{}/tap-status", served.vbd.backend),
        "fencing",
        Duration::from_secs(20),
    )?;
    // Its end waits for the hotplug script, and that for the write.
    std::thread::scope(|scope| {
        let end = scope.spawn(|| guest.destroy());
        let kept = image_is_kept(&served, &target);
        let freed = stuck.let_go();
        let ended = end
            .join()
            .map_err(|_| anyhow::anyhow!("a thread of the case panicked"))?;
        kept.and(freed).and(ended)
    })?;
    served.wait_gone()?;
    // Now it is free.
    let again = tap::ctl(&["create", "--minor-only", "-a", &target])?;
    tap::ctl(&["destroy", "-m", again.trim()]).map(drop)
}

/// Another disk cannot get the image of a disk that has lost its guest and is not fenced.
fn image_is_kept(served: &ServedDisk, target: &str) -> Result<()> {
    let (control, minor) = (ControlNode::open()?, served.minor);
    sh::wait_for("the end of the device", Duration::from_secs(30), || {
        let info = control.query(minor)?.context("the disk is gone")?;
        Ok(info.domain == u32::MAX)
    })?;
    let errno = control.destroy(minor).err().and_then(|e| e.raw_os_error());
    ensure!(
        errno == Some(libc::EBUSY),
        "the kernel let a disk go while I/O of its process may be running: {errno:?}"
    );
    let limit = Duration::from_secs(30);
    let other = sh::status(&["tap-ctl", "create", "-a", target], limit)?;
    ensure!(other.rc == 3, "another disk got the image: {}", other.text);
    let minor = minor.to_string();
    let waits = sh::status(
        &["tap-ctl", "destroy", "-m", &minor, "--timeout", "1"],
        limit,
    )?;
    ensure!(
        waits.rc == 3 && waits.text.contains("I/O of its last process"),
        "tap-ctl does not say what it waits for: {}: {}",
        waits.rc,
        waits.text
    );
    let listed = tap::ctl(&["list", "-m", &minor])?;
    ensure!(
        listed.contains("kernel=fencing"),
        "the list does not show the disk that waits: {listed}"
    );
    Ok(())
}

fn s12_kills(context: &mut Context, kills: u32) -> Result<()> {
    let seed = seed::get();
    let image = image(context, "a.img", 16)?;
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk(&format!("aio:{image}"), VDEV, "w"))?;
    let load = start_load(guest)?;
    wait_progress(&disk, 100)?;
    let mut rng = Rng::new(seed);
    let mut waits = Vec::new();
    for _ in 0..kills {
        // A death may happen after a few requests, or during a replay.
        let progress = rng.below(60).saturating_sub(15);
        let before = disk.info()?.committed;
        sh::wait_for(
            "requests that are answered",
            Duration::from_secs(60),
            || Ok(disk.info()?.committed >= before + progress),
        )?;
        waits.push(disk.replace()?);
    }
    let told = end_load(guest, load)?;
    same(guest, &image, 16)?;
    let info = disk.info()?;
    ensure!(
        info.replayed > 0,
        "in {kills} deaths no request was executed again"
    );
    waits.sort_unstable();
    context.note(&format!(
        "{kills} deaths (seed {seed}), {} requests executed again, half of the pauses below {} ms, all below {} ms",
        info.replayed,
        waits[waits.len() / 2].as_millis(),
        waits[waits.len() - 1].as_millis()
    ))?;
    context.note(&told)?;
    disk.detach(context.pv()?)
}

fn s13_hung(context: &mut Context) -> Result<()> {
    let image = image(context, "a.img", 16)?;
    let log = EventLog::follow()?;
    // Each disk has a new number, so that the events differ.
    for (wanted, kill) in [("71", false), ("72", true)] {
        let target = format!("aio:{image}");
        let mut arguments = vec!["create", "--minor-only", "--minor", wanted];
        arguments.extend(["--hung-after", "2", "-a", &target]);
        if kill {
            arguments.extend(["--hung", "kill"]);
        }
        let minor: u32 = tap::ctl(&arguments)?.trim().parse()?;
        let guest = context.pv()?;
        let disk = ServedDisk::attach(guest, &hotplug::played(minor, VDEV)?)?;
        // A machine that stands still for two seconds has a process killed already.
        let (pid, _) = disk.wait_replaced(0)?;
        disk.signal(pid, libc::SIGSTOP)?;
        let job = guest.start(&write(7, 'a'))?;
        let told = log.wait_for("hung", minor, Duration::from_secs(40))?;
        ensure!(
            told["killed"].as_bool() == Some(kill),
            "the event of a process that hangs is {told}"
        );
        if kill {
            disk.wait_replaced(pid)?;
        } else {
            ensure!(
                disk.pid()? == pid,
                "a process that hangs was replaced although the policy does not say so"
            );
            disk.signal(pid, libc::SIGCONT)?;
        }
        let done = guest.wait(job, COMMAND)?;
        ensure!(
            done.rc == 0,
            "the write that waited failed: {}",
            sh::tail(&done.text, 300)
        );
        guest.run_for(&verify_job(DEVICE, 4, 40, 512), FIO)?;
        guest.detach(&disk.vbd)?;
        tap::ctl(&["destroy", "-m", &minor.to_string()])?;
        disk.wait_gone()?;
    }
    Ok(())
}

/// A guest of the case's own with a tap disk, and a process of it that has requests and answers none.
fn hanging(context: &mut Context) -> Result<(Guest, ServedDisk, u32)> {
    let image = image(context, "a.img", 16)?;
    let guest = Guest::create(Config::new("victim", GuestKind::Pv, 1))?;
    let disk = ServedDisk::attach(&guest, &tap::disk(&format!("aio:{image}"), VDEV, "w"))?;
    guest.run_for(&verify_job(DEVICE, 2, 20, 512), FIO)?;
    let pid = disk.pid()?;
    disk.signal(pid, libc::SIGSTOP)?;
    guest.start("fio --name=l --filename=/dev/xvdb --size=4m --bs=16k --iodepth=32 --ioengine=libaio --direct=1 --rw=randrw --time_based --runtime=600")?;
    sh::wait_for("requests of the guest", Duration::from_secs(30), || {
        let info = disk.info()?;
        Ok(info.waiting + info.delivered >= 16)
    })?;
    Ok((guest, disk, pid))
}

fn s16_closing(context: &mut Context) -> Result<()> {
    let (guest, disk, pid) = hanging(context)?;
    // No supervisor replaces it. It stays stopped, because the end of its parent must not end it.
    context.supervise(false)?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let state = status.lines().find(|line| line.starts_with("State:"));
    ensure!(
        state.is_some_and(|state| state.contains("T (stopped)")),
        "a stopped tapdisk did not stay so when its supervisor ended: {state:?}"
    );
    disk.signal(pid, libc::SIGKILL)?;
    xs::wait_value(
        &format!("{}/tap-status", disk.vbd.backend),
        "recovering",
        Duration::from_secs(20),
    )?;
    // A frontend that lets go with requests on the way, which a Linux guest would not do.
    let begun = Instant::now();
    xs::write(&[(&format!("{}/state", disk.vbd.frontend), "5")])?;
    xs::wait_value(
        &format!("{}/state", disk.vbd.backend),
        "6",
        Duration::from_secs(10),
    )?;
    let took = begun.elapsed();
    guest.destroy()?;
    disk.vbd.wait_gone()?;
    context.supervise(true)?;
    disk.wait_gone()?;
    context.note(&format!("Closed after {} ms", took.as_millis()))
}

fn s17_destroyed(context: &mut Context) -> Result<()> {
    let (guest, disk, pid) = hanging(context)?;
    guest.destroy()?;
    disk.vbd.wait_gone()?;
    // Its supervisor ends a process that is no longer needed, also one that hangs.
    disk.wait_gone()?;
    ensure!(
        !std::path::Path::new(&format!("/proc/{pid}")).exists(),
        "tapdisk {pid} is still there after its disk is gone"
    );
    Ok(())
}

fn supervisor_dies(context: &mut Context) -> Result<()> {
    let image = image(context, "a.img", 16)?;
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk(&format!("aio:{image}"), VDEV, "w"))?;
    let load = start_load(guest)?;
    wait_progress(&disk, 50)?;
    let pid = disk.pid()?;
    let minor = disk.minor.to_string();
    let written = || -> Result<u64> {
        let stats = tap::ctl_json(&["stats", "-m", &minor])?;
        let requests = stats["write"]["requests"].as_u64();
        requests.with_context(|| format!("tap-ctl stats has no number of writes: {stats}"))
    };
    // The next process cannot reach this number before its first statistics.
    sh::wait_for("writes", Duration::from_secs(120), || Ok(written()? >= 500))?;
    let early = written()?;
    for crash in [true, false] {
        let supervisor: RunningSupervisor = context.take_supervisor()?;
        if crash {
            supervisor.kill()?;
        } else {
            supervisor.stop()?;
        }
        wait_progress(&disk, 50)?;
        context.supervise(true)?;
        ensure!(
            disk.pid()? == pid,
            "the disk's process was replaced when its supervisor was"
        );
        wait_progress(&disk, 50)?;
    }
    // The supervisor has taken it over, and not only left it alone: it replaces the process when that dies, and the
    // next process continues the counts of the first one, which the supervisor found at the process.
    disk.replace()?;
    let late = written()?;
    ensure!(
        late >= early,
        "{late} writes are counted, and there were {early} before the process died"
    );
    wait_progress(&disk, 50)?;
    // A process that dies without a supervisor is replaced by the next one.
    context.take_supervisor()?.kill()?;
    let old = disk.kill()?;
    context.supervise(true)?;
    disk.wait_replaced(old)?;
    let guest = context.pv()?;
    let told = end_load(guest, load)?;
    same(guest, &image, 16)?;
    context.note(&told)?;
    disk.detach(context.pv()?)
}
