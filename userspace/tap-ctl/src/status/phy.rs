// SPDX-License-Identifier: MIT OR Apache-2.0
//! Verdict on a disk that the kernel serves.
//!
//! The driver's counters of its requests show whether it is slow or hung; the block devices below, which others use as
//! well, show where the time goes. The driver publishes a queue's figures after each pass: a queue whose thread sleeps
//! in the block layer publishes no more, so the threads are watched. A driver that counts no times leaves the block
//! devices alone to judge by.

use super::verdict::{well, Cause, OldestRequest, State, Surroundings, Verdict};
use crate::host::block::Block;
use crate::host::vbd::{Number, Operation, Vbd};
use crate::sample::SampledDisk;
use crate::sample_delta::{milliseconds, EndedIo, Figures};
use std::time::Duration;

/// Judges a disk by two looks at it.
pub(crate) fn judge(before: &SampledDisk, now: &SampledDisk, around: &Surroundings) -> Verdict {
    let Some(vbd) = &now.vbd else {
        return Verdict::new(State::Unknown, "it is on no bus");
    };
    if vbd.driver.is_none() {
        return without_driver(vbd);
    }
    let figures = Figures::between(before, now, around.elapsed).unwrap_or_default();
    hung(before, now, around)
        .or_else(|| gone(now, &figures))
        .or_else(|| failing(&figures))
        .or_else(|| slow_storage(before, now, &figures, around))
        .or_else(|| around.starved(&figures))
        .or_else(|| slow_to_answer(&figures, around))
        .or_else(|| around.short_of_pages(&figures))
        .unwrap_or_else(|| at_rest(vbd, now, &figures))
}

/// A disk of a guest that no driver has.
pub(crate) fn without_driver(vbd: &Vbd) -> Verdict {
    let why = format!("no driver serves {}", vbd.path);
    Verdict::new(State::NoDriver, why).remedy("`tap-ctl doctor`, then `modprobe xen-blkback`")
}

/// A device or queue that has requests and answers none.
pub(crate) enum StalledPart {
    /// A mapped device that is suspended, by the name that dmsetup knows.
    Suspended { label: String, name: String },
    /// A device with this number of requests.
    Silent { device: Box<Block>, requests: u64 },
    /// A thread of a queue, which sleeps in this function of the kernel.
    Asleep { thread: String, place: String },
}

/// Returns the device or queue that answered nothing between two looks. The lowest device of those that stand on each
/// other is the one that has the requests.
pub(crate) fn stall(before: &SampledDisk, now: &SampledDisk) -> Option<StalledPart> {
    let of_block = || {
        let (old, new) = (before.block.as_ref()?.stack(), now.block.as_ref()?.stack());
        let pairs = new.into_iter().rev().filter_map(|block| {
            let old = old.iter().find(|old| old.name == block.name)?;
            stalled(old, block)
        });
        // A suspended device keeps the devices below it idle, and those above it waiting.
        let mut pairs: Vec<StalledPart> = pairs.collect();
        let suspended = pairs
            .iter()
            .position(|it| matches!(it, StalledPart::Suspended { .. }));
        let place = suspended.unwrap_or(0);
        (place < pairs.len()).then(|| pairs.swap_remove(place))
    };
    // Other users' requests on the device are not this guest's wait.
    let has_nothing = now.vbd.as_ref().and_then(Vbd::in_flight) == Some(0);
    let device = (!has_nothing).then(of_block).flatten();
    device.or_else(|| sleeper(before, now))
}

fn stalled(old: &Block, new: &Block) -> Option<StalledPart> {
    if old.is_suspended && new.is_suspended {
        let label = new.label();
        let name = new.alias.clone().unwrap_or_else(|| new.name.clone());
        return Some(StalledPart::Suspended { label, name });
    }
    let requests = old.in_flight.min(new.in_flight);
    let is_silent = requests > 0 && old.done == new.done;
    is_silent.then(|| StalledPart::Silent {
        device: Box::new(new.clone()),
        requests,
    })
}

/// A thread that has slept all the time where nothing but the end of I/O wakes it.
fn sleeper(before: &SampledDisk, now: &SampledDisk) -> Option<StalledPart> {
    now.queues.iter().find_map(|task| {
        let old = task.among(&before.queues)?;
        let has_slept = (old.state, task.state) == ('D', 'D') && old.turns == task.turns;
        has_slept.then(|| StalledPart::Asleep {
            thread: task.name.clone(),
            place: task
                .sleeps_in
                .clone()
                .unwrap_or_else(|| "the kernel".into()),
        })
    })
}

/// For how long the disk has answered nothing of what its storage has, if that is too long.
pub(crate) fn oldest(now: &SampledDisk, hung: Duration) -> Option<Duration> {
    let oldest = now.vbd.as_ref()?.oldest()?;
    (oldest >= hung).then_some(oldest)
}

fn hung(before: &SampledDisk, now: &SampledDisk, around: &Surroundings) -> Option<Verdict> {
    let stall = stall(before, now);
    if let Some(oldest) = oldest(now, around.limits.hung) {
        let hung = match &stall {
            Some(stall) => stalled_by(stall),
            None => unanswered(now),
        };
        return Some(hung.since(OldestRequest::Seconds(oldest.as_secs_f64())));
    }
    let watched = around.elapsed >= around.limits.hung;
    let hung = stalled_by(stall.as_ref().filter(|_| watched)?);
    Some(hung.since(OldestRequest::AtLeast(around.elapsed.as_secs_f64())))
}

/// A disk that has an old request, and others that are answered.
fn unanswered(now: &SampledDisk) -> Verdict {
    let requests = now.vbd.as_ref().and_then(Vbd::in_flight).unwrap_or(1);
    let (storage, remedy) = now.block.as_ref().map_or_else(
        || ("its device".into(), see_to("its device")),
        |block| storage_of(block, block.label()),
    );
    let why = format!("it has {requests} requests, and {storage} does not answer the oldest one");
    Verdict::new(State::Hung, why)
        .because(Cause::Storage)
        .remedy(remedy)
}

/// A disk whose device was taken away: the driver still has it open, and the kernel knows it no more. That it cannot be
/// read alone says nothing: its requests must fail as well.
fn gone(now: &SampledDisk, figures: &Figures) -> Option<Verdict> {
    let fails = figures.errors > 0;
    let vbd = now.vbd.as_ref().filter(|vbd| vbd.is_connected() && fails)?;
    let Number(major, minor) = vbd.device.filter(|_| now.block.is_none())?;
    let why = format!("its device {major}:{minor} is gone, so all requests fail");
    let gone = Verdict::new(State::Failing, why).because(Cause::Storage);
    Some(gone.remedy("bring the storage back, then detach the disk and attach it again"))
}

/// Returns what does not answer where `block` does not, and the remedy: a device of many hosts' storage only passes
/// requests on to its cluster. A device of another kind is called `name`.
fn storage_of(block: &Block, name: String) -> (String, String) {
    // What a volume stands on may be such a device.
    let image = block.stack().into_iter().find_map(|it| it.image.as_ref());
    let remedy = || see_to(&block.label());
    image.map_or_else(|| (name, remedy()), |image| image.when_silent())
}

fn see_to(label: &str) -> String {
    format!("see to the storage of {label}: its kernel messages (dmesg), its paths, its network")
}

/// Returns the verdict on a disk that waits for this.
fn stalled_by(stall: &StalledPart) -> Verdict {
    let (why, remedy) = match stall {
        StalledPart::Suspended { label, name } => (
            format!("the device {label} is suspended, so all of its requests wait"),
            format!("dmsetup resume {name}, unless another program is about to do that"),
        ),
        StalledPart::Silent { device, requests } => {
            let (storage, remedy) = storage_of(device, format!("the device {}", device.label()));
            let why = format!("{storage} has {requests} requests and answered none");
            (why, remedy)
        }
        StalledPart::Asleep { thread, place } => (
            format!("the thread {thread} sleeps in {place} until the storage answers"),
            "see to the storage: its kernel messages (dmesg), its paths, its network".into(),
        ),
    };
    Verdict::new(State::Hung, why)
        .because(Cause::Storage)
        .remedy(remedy)
}

/// Requests that ended in errors, or were none.
pub(crate) fn failing(figures: &Figures) -> Option<Verdict> {
    if figures.errors > 0 {
        let why = format!("{} requests ended in an error", figures.errors);
        let failing = Verdict::new(State::Failing, why).because(Cause::Storage);
        return Some(failing.remedy("see the kernel messages (dmesg) and the storage"));
    }
    if figures.refused > 0 {
        let why = format!("{} requests of the guest were malformed", figures.refused);
        let failing = Verdict::new(State::Failing, why).because(Cause::Guest);
        return Some(failing.remedy("look at the guest: its driver is faulty, or hostile"));
    }
    None
}

/// The slow part, in words, and its time in milliseconds.
struct SlowPart {
    what: String,
    ms: f64,
    /// The requests have ended, so that their device has counted them.
    ended: bool,
}

/// The slowest operation, if it is slow. A discard may take its time: it is as long as the guest makes it.
fn slowest(figures: &Figures, slow: Duration) -> Option<SlowPart> {
    let operations = [Operation::Read, Operation::Write, Operation::Flush];
    let awaits = operations.into_iter().filter_map(|it| figures.awaited(it));
    let slowest = awaits.max_by(|one, other| one.mean_ms.total_cmp(&other.mean_ms));
    let of_ended = |it: EndedIo| {
        let (done, operation, ms) = (it.done, it.operation.plural(), it.mean_ms);
        let what = format!("{operation} took {ms:.0} ms on average ({done} ended)");
        let ended = true;
        SlowPart { what, ms, ended }
    };
    // Where nothing ended, what is under way says how long it takes at least.
    let under_way = || {
        let ms = figures.oldest_ms.filter(|_| figures.awaits.is_empty())?;
        let what = format!("no request ended, and the oldest has taken {ms:.0} ms");
        let ended = false;
        Some(SlowPart { what, ms, ended })
    };
    let found = slowest.map(of_ended).or_else(under_way)?;
    (found.ms >= milliseconds(slow)).then_some(found)
}

/// The device itself, for a driver that counts no times.
fn slow_device(old: &Block, new: &Block, slow: Duration) -> Option<SlowPart> {
    let (ms, count) = new.mean_ms(old)?;
    let what = format!("requests took {ms:.0} ms on average ({count} ended)");
    let ended = true;
    (ms >= milliseconds(slow)).then_some(SlowPart { what, ms, ended })
}

/// The lowest device that takes most of this time, and in words how much.
fn place(old: &Block, new: &Block, slow: &SlowPart) -> Option<(String, String)> {
    let old = old.stack();
    new.stack().into_iter().rev().find_map(|block| {
        let old = old.iter().find(|old| old.name == block.name)?;
        let label = block.label();
        match block.mean_ms(old) {
            Some((its, _)) if its * 2.0 >= slow.ms => {
                Some((label, format!("{its:.0} ms of that on")))
            }
            None if block.in_flight > 0 && !slow.ended => Some((label, "it is on".into())),
            _ => None,
        }
    })
}

/// Requests are slow, and a device below has most of their time.
fn slow_storage(
    before: &SampledDisk,
    now: &SampledDisk,
    figures: &Figures,
    around: &Surroundings,
) -> Option<Verdict> {
    let (old, new) = (before.block.as_ref()?, now.block.as_ref()?);
    let slow = match figures.oldest_ms {
        Some(_) => slowest(figures, around.limits.slow)?,
        None => slow_device(old, new, around.limits.slow)?,
    };
    let (label, part) = place(old, new, &slow)?;
    let why = format!("{}, {part} {label}", slow.what);
    let slow = Verdict::new(State::Slow, why);
    Some(slow.because(Cause::Storage).remedy(format!(
        "see with iostat -x who else uses {label}, and to its storage"
    )))
}

/// Requests are slow, no device below counts so much time, and no processor is short.
fn slow_to_answer(figures: &Figures, around: &Surroundings) -> Option<Verdict> {
    let SlowPart { what, .. } = slowest(figures, around.limits.slow)?;
    let why = format!("{what}, which no block device below it counts");
    let slow = Verdict::new(State::Slow, why).because(Cause::Storage);
    Some(slow.remedy("see to its storage, and with `tap-ctl status -x` whether its thread runs"))
}

/// A disk with which nothing is wrong.
fn at_rest(vbd: &Vbd, now: &SampledDisk, figures: &Figures) -> Verdict {
    if !vbd.is_connected() {
        let state = vbd.state.as_deref().unwrap_or("not known");
        return Verdict::new(State::NotConnected, format!("its state is {state}"));
    }
    let is_judged = now.block.is_some();
    match is_judged {
        true => well(figures),
        false => Verdict::new(State::Unknown, "its block device cannot be read"),
    }
}
