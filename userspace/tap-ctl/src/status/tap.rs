// SPDX-License-Identifier: MIT OR Apache-2.0
//! Verdict on a disk that a process serves.

use super::phy;
use super::verdict::{well, Cause, OldestRequest, State, Surroundings, Verdict};
use crate::host::task::Task;
use crate::sample::{SampledDisk, Supervisor};
use crate::sample_delta::Figures;
use control::supervisor::{Kernel, PendingOperation, TopRow};
use control::{tapdisk, Limits};
use std::time::Duration;

/// Judges a disk by two looks at it.
pub(crate) fn judge(
    before: &SampledDisk,
    now: &SampledDisk,
    around: &Surroundings,
    supervisor: &Supervisor,
) -> Verdict {
    if let Some(vbd) = now.vbd.as_ref().filter(|vbd| vbd.driver.is_none()) {
        return phy::without_driver(vbd);
    }
    let Some(tap) = &now.tap else {
        return hung_untold(now, around).unwrap_or_else(|| untold(supervisor));
    };
    if let Some(why) = &tap.row.unknown {
        let minor = tap
            .row
            .minor
            .map_or("MINOR".into(), |minor| minor.to_string());
        let left = Verdict::new(State::Unknown, format!("blktapctrl leaves it alone: {why}"));
        return left.remedy(format!("`tap-ctl adopt -m {minor}`"));
    }
    let kernel = tap.row.kernel.clone().unwrap_or_default();
    match tap.row.state {
        None => without_process(tap, &kernel),
        Some(tapdisk::State::Paused) => paused(now, tap, &kernel),
        Some(tapdisk::State::Inactive) => inactive(&kernel),
        Some(tapdisk::State::Idle | tapdisk::State::Attached) => closed(now, &kernel),
        Some(tapdisk::State::Running) => running(before, now, tap, &kernel, around),
    }
}

/// Of which blktapctrl says nothing, and the driver that it hangs.
fn hung_untold(now: &SampledDisk, around: &Surroundings) -> Option<Verdict> {
    let oldest = phy::oldest(now, around.limits.hung)?;
    let why =
        "its process or the storage of that does not answer, and blktapctrl says nothing of it";
    let hung = Verdict::new(State::Hung, why).because(Cause::Process);
    let hung = hung.since(OldestRequest::Seconds(oldest.as_secs_f64()));
    Some(hung.remedy("systemctl start blktapctrl: it replaces a process that has died"))
}

/// Of which blktapctrl says nothing.
fn untold(supervisor: &Supervisor) -> Verdict {
    match supervisor {
        Supervisor::Silent(why) => {
            let why = format!("blktapctrl does not answer: {why}");
            Verdict::new(State::Unknown, why).remedy("systemctl start blktapctrl")
        }
        Supervisor::Answers => Verdict::new(State::Unknown, "blktapctrl does not know it")
            .remedy("another program or none serves it: see `tap-ctl events --after 0`"),
    }
}

fn without_process(tap: &TopRow, kernel: &Kernel) -> Verdict {
    if kernel.state == "fencing" {
        let why =
            "its process has ended, and I/O of that is still running: the next one waits for it";
        return Verdict::new(State::Fencing, why)
            .because(Cause::Storage)
            .remedy("see to the storage of its image");
    }
    if tap.row.doing == Some(PendingOperation::Park) {
        let why = "the kernel's module is being exchanged, and it has no node until then";
        return Verdict::new(State::Paused, why)
            .because(Cause::Administrator)
            .remedy("`tap-ctl unpark`, if that exchange has ended");
    }
    if tap.row.target.is_none() && kernel.waiting == 0 {
        let closed = Verdict::new(State::Closed, "a node without a process");
        return match tap.row.minor {
            Some(minor) => closed.remedy(format!("`tap-ctl free -m {minor}`, if it is not needed")),
            None => closed,
        };
    }
    let why = format!("no process serves it, {} requests wait", kernel.waiting);
    Verdict::new(State::DeadProcess, why)
        .because(Cause::Process)
        .remedy("`tap-ctl events --after 0` says why the last one failed; the next attempt follows within 30 s")
}

fn paused(disk: &SampledDisk, tap: &TopRow, kernel: &Kernel) -> Verdict {
    let disk = disk.words();
    let why = format!("{} requests wait", kernel.waiting);
    if let Some(error) = &tap.row.stopped {
        let why = format!("an error of its image has stopped it ({error}), and {why}");
        return Verdict::new(State::Paused, why)
            .because(Cause::Storage)
            .remedy(format!(
                "see to the storage of {}, then `tap-ctl unpause {disk}`",
                image(tap)
            ));
    }
    Verdict::new(State::Paused, why)
        .because(Cause::Administrator)
        .remedy(format!(
            "`tap-ctl events --after 0` says since when; then `tap-ctl unpause {disk}`"
        ))
}

fn inactive(kernel: &Kernel) -> Verdict {
    if kernel.waiting == 0 {
        return Verdict::new(
            State::Inactive,
            "its guest is suspended, and its image is free",
        );
    }
    let why = format!(
        "{} requests wait, and its image cannot be had",
        kernel.waiting
    );
    Verdict::new(State::Held, why)
        .because(Cause::Storage)
        .remedy("`tap-ctl events --after 0` says who has the image, and what to do")
}

fn closed(disk: &SampledDisk, kernel: &Kernel) -> Verdict {
    let disk = disk.words();
    match kernel.waiting {
        0 => Verdict::new(State::Closed, "no image is open"),
        waiting => Verdict::new(
            State::Paused,
            format!("no image is open, {waiting} requests wait"),
        )
        .because(Cause::Administrator)
        .remedy(format!("`tap-ctl open {disk} -a TARGET`")),
    }
}

fn running(
    before: &SampledDisk,
    now: &SampledDisk,
    tap: &TopRow,
    kernel: &Kernel,
    around: &Surroundings,
) -> Verdict {
    let figures = Figures::between(before, now, around.elapsed).unwrap_or_default();
    hung(before, now, tap, kernel, around)
        .or_else(|| kernel_hangs(now, tap, kernel, around))
        .or_else(|| poisoned(kernel))
        .or_else(|| phy::failing(&figures))
        .or_else(|| slow(before, now, &figures, around))
        .or_else(|| around.starved(&figures))
        .or_else(|| around.short_of_pages(&figures))
        .unwrap_or_else(|| at_rest(now, &figures))
}

fn hung(
    before: &SampledDisk,
    now: &SampledDisk,
    tap: &TopRow,
    kernel: &Kernel,
    around: &Surroundings,
) -> Option<Verdict> {
    let oldest = Duration::from_nanos(kernel.oldest_ns);
    // A request that waits for a limit may be old, though others are answered.
    let is_held = limits(now).is_some() && goes_on(before, kernel);
    if kernel.delivered > 0 && oldest >= around.limits.hung && !is_held {
        let verdict = who_hangs(now, tap, kernel);
        return Some(verdict.since(OldestRequest::Seconds(oldest.as_secs_f64())));
    }
    let is_stuck = takes_nothing(before, now) && around.elapsed >= around.limits.hung;
    is_stuck.then(|| {
        let why = format!(
            "{} requests wait, and its process takes none",
            kernel.waiting
        );
        let seconds = around.elapsed.as_secs_f64();
        let hung = Verdict::new(State::Hung, why).because(Cause::Process);
        hung.since(OldestRequest::AtLeast(seconds))
            .remedy(replace(tap))
    })
}

/// Returns the verdict on a disk whose requests hang in the kernel (passthrough).
fn kernel_hangs(
    now: &SampledDisk,
    tap: &TopRow,
    kernel: &Kernel,
    around: &Surroundings,
) -> Option<Verdict> {
    let direct = kernel.by_itself().filter(|direct| direct.executing > 0)?;
    let oldest = phy::oldest(now, around.limits.hung)?;
    let image = image(tap);
    let why = format!(
        "the kernel itself has {} requests under way on {image}",
        direct.executing
    );
    let hung = Verdict::new(State::Hung, why).because(Cause::Storage);
    let hung = hung.since(OldestRequest::Seconds(oldest.as_secs_f64()));
    Some(hung.remedy(format!("see to the storage of {image}")))
}

/// Returns the target of a disk, for a sentence.
fn image(tap: &TopRow) -> String {
    let target = tap.row.target.as_ref();
    target.map_or("its image".into(), ToString::to_string)
}

/// Requests wait at both looks, and the process of the disk took none between them.
pub(super) fn takes_nothing(before: &SampledDisk, now: &SampledDisk) -> bool {
    let kernel = |disk: &SampledDisk| {
        let row = &disk.tap.as_ref()?.row;
        let is_running = row.state == Some(tapdisk::State::Running);
        row.kernel.clone().filter(|_| is_running)
    };
    let (Some(old), Some(new)) = (kernel(before), kernel(now)) else {
        return false;
    };
    let waits = |kernel: &Kernel| kernel.waiting > 0 && kernel.delivered == 0;
    waits(&old) && waits(&new) && old.committed == new.committed
}

/// Whether the process itself hangs, or what it waits for.
fn who_hangs(now: &SampledDisk, tap: &TopRow, kernel: &Kernel) -> Verdict {
    let hung = |cause, why: String, remedy: String| {
        Verdict::new(State::Hung, why).because(cause).remedy(remedy)
    };
    let has = kernel.delivered;
    let image = image(tap);
    match (now.process.first(), &tap.stats) {
        (
            Some(Task {
                state: 'T' | 't',
                pid,
                ..
            }),
            _,
        ) => hung(
            Cause::Process,
            format!(
                "its process {pid} has {has} requests and was stopped by a signal or a debugger"
            ),
            format!("kill -CONT {pid}"),
        ),
        (
            Some(Task {
                state: 'D',
                pid,
                sleeps_in,
                ..
            }),
            _,
        ) => {
            let place = sleeps_in.as_deref().unwrap_or("the kernel");
            hung(
                Cause::Storage,
                format!("its process {pid} has {has} requests and waits in {place} for {image}"),
                format!("see to the storage of {image}: no signal ends such a process"),
            )
        }
        (_, Some(stats)) if stats.in_flight > 0 => hung(
            Cause::Storage,
            format!(
                "its process answers, and {} requests are under way on {image}",
                stats.in_flight
            ),
            format!("see to the storage of {image}"),
        ),
        _ => hung(
            Cause::Process,
            format!("its process has {has} requests and does not answer"),
            replace(tap),
        ),
    }
}

fn replace(tap: &TopRow) -> String {
    let pid = tap.row.pid.map_or("PID".into(), |pid| pid.to_string());
    format!("`kill -9 {pid}`: blktapctrl replaces it, and nothing is lost (hung=kill, in front of its target does that without you)")
}

fn poisoned(kernel: &Kernel) -> Option<Verdict> {
    let what = kernel
        .poison
        .as_ref()
        .map(|poison| format!(", the last one a {poison}"));
    let what = what.unwrap_or_default();
    let why = match (kernel.isolated, kernel.poisoned) {
        (0, 0) => return None,
        (0, count) => format!("{count} requests failed because processes died of them{what}"),
        _ => "requests are given out one at a time, to find the one of which processes die".into(),
    };
    let failing = Verdict::new(State::Failing, why).because(Cause::Process);
    Some(failing.remedy("`tap-ctl events --after 0`, and the log of blktapctrl"))
}

/// How much its guest may do.
fn limits(disk: &SampledDisk) -> Option<Limits> {
    disk.tap.as_ref()?.stats.as_ref()?.limits
}

/// Requests that waited for that.
fn held(disk: &SampledDisk) -> u64 {
    let stats = disk.tap.as_ref().and_then(|tap| tap.stats.as_ref());
    stats.map_or(0, |stats| stats.held)
}

/// Something was answered since.
fn goes_on(before: &SampledDisk, now: &Kernel) -> bool {
    let old = before.tap.as_ref().and_then(|tap| tap.row.kernel.as_ref());
    old.is_some_and(|old| old.committed != now.committed)
}

fn slow(
    before: &SampledDisk,
    now: &SampledDisk,
    figures: &Figures,
    around: &Surroundings,
) -> Option<Verdict> {
    let half = Duration::from_micros(figures.half_above_us?);
    if half < around.limits.slow {
        return None;
    }
    if let Some(limits) = limits(now).filter(|_| held(now) > held(before)) {
        let why = format!("its guest asks for more than it may have: {limits}");
        let (slow, disk) = (Verdict::new(State::Slow, why), now.words());
        let slow = slow.because(Cause::Administrator);
        return Some(slow.remedy(format!(
            "`tap-ctl set {disk} --bps 0 --iops 0`, if it may have more"
        )));
    }
    // One thread serves a disk, and others do what takes long. Their lack of processor time matters less.
    let is_busy = figures.process_ran > 0.9 && figures.starved < 0.5;
    if let Some(starved) = around.starved(figures).filter(|_| !is_busy) {
        return Some(starved);
    }
    let why = format!(
        "half of its requests took longer than {} ms",
        half.as_millis()
    );
    let slow = |cause, more: &str| Verdict::new(State::Slow, format!("{why}{more}")).because(cause);
    if is_busy {
        let whole = format!(
            ", and its process uses {:.1} processors",
            figures.process_ran
        );
        let slow = slow(Cause::Process, &whole);
        return Some(slow.remedy(
            "that is as fast as it gets: spread the load over several disks, or use a raw image",
        ));
    }
    let image = image(now.tap.as_ref()?);
    let slow = slow(Cause::Storage, ", and its process has time left");
    Some(slow.remedy(format!("see with iostat -x to the storage of {image}")))
}

fn at_rest(now: &SampledDisk, figures: &Figures) -> Verdict {
    match &now.vbd {
        Some(vbd) if !vbd.is_connected() => {
            let state = vbd.state.as_deref().unwrap_or("not known");
            Verdict::new(State::NotConnected, format!("its state is {state}"))
        }
        _ => well(figures),
    }
}
