// SPDX-License-Identifier: MIT OR Apache-2.0
//! What can be said of a disk that the kernel serves.
//!
//! The driver counts requests when they begin, not when they end: that they are not answered is seen on the
//! block device below, which counts both.

use super::verdict::{Cause, Oldest, State, Surroundings, Verdict};
use crate::figures::Figures;
use crate::host::block::Block;
use crate::host::vbd::Vbd;
use crate::look::Disk;

/// Judges a disk by two looks at it.
pub(crate) fn judge(before: &Disk, now: &Disk, around: &Surroundings) -> Verdict {
    let Some(vbd) = &now.vbd else {
        return Verdict::new(State::Unknown, "it is on no bus");
    };
    if vbd.driver.is_none() {
        return without_driver(vbd);
    }
    let figures = Figures::between(before, now, around.elapsed).unwrap_or_default();
    if around.elapsed >= around.limits.hung {
        if let Some(stall) = stall(before, now) {
            return hung(&stall, around);
        }
    }
    failing(&figures)
        .or_else(|| slow_storage(before, now, around))
        .or_else(|| around.starved(&figures))
        .or_else(|| around.short_of_pages(&figures))
        .unwrap_or_else(|| at_rest(vbd, now))
}

/// A disk of a guest that no driver has.
pub(crate) fn without_driver(vbd: &Vbd) -> Verdict {
    let why = format!("no driver serves {}", vbd.path);
    Verdict::new(State::NoDriver, why).remedy("tap-ctl doctor, then modprobe xen-blkback")
}

/// What has requests and answers none.
pub(crate) enum Stall {
    /// A mapped device that is suspended, by the name that dmsetup knows.
    Suspended { label: String, name: String },
    /// A device, with so many requests.
    Silent { label: String, requests: u64 },
    /// A thread of a queue, which sleeps in this function of the kernel.
    Asleep { thread: String, place: String },
}

/// What has answered nothing between two looks. The lowest device of those that stand on each other is the
/// one that has the requests.
pub(crate) fn stall(before: &Disk, now: &Disk) -> Option<Stall> {
    let of_block = || {
        let (old, new) = (before.block.as_ref()?.stack(), now.block.as_ref()?.stack());
        let pairs = new.into_iter().rev().filter_map(|block| {
            let old = old.iter().find(|old| old.name == block.name)?;
            stalled(old, block)
        });
        // What is suspended keeps what is below it idle, and what is above it waiting.
        let mut pairs: Vec<Stall> = pairs.collect();
        let suspended = pairs
            .iter()
            .position(|it| matches!(it, Stall::Suspended { .. }));
        let place = suspended.unwrap_or(0);
        (place < pairs.len()).then(|| pairs.swap_remove(place))
    };
    of_block().or_else(|| sleeper(before, now))
}

fn stalled(old: &Block, new: &Block) -> Option<Stall> {
    let label = new.label();
    if old.is_suspended && new.is_suspended {
        let name = new.alias.clone().unwrap_or_else(|| new.name.clone());
        return Some(Stall::Suspended { label, name });
    }
    let requests = old.in_flight.min(new.in_flight);
    let is_silent = requests > 0 && old.done == new.done;
    is_silent.then_some(Stall::Silent { label, requests })
}

/// A thread that has slept all the time where nothing but the end of I/O wakes it.
fn sleeper(before: &Disk, now: &Disk) -> Option<Stall> {
    now.queues.iter().find_map(|task| {
        let old = task.among(&before.queues)?;
        let has_slept = (old.state, task.state) == ('D', 'D') && old.turns == task.turns;
        has_slept.then(|| Stall::Asleep {
            thread: task.name.clone(),
            place: task
                .sleeps_in
                .clone()
                .unwrap_or_else(|| "the kernel".into()),
        })
    })
}

fn hung(stall: &Stall, around: &Surroundings) -> Verdict {
    let (why, remedy) = match stall {
        Stall::Suspended { label, name } => (
            format!("the device {label} is suspended, so all that is asked of it waits"),
            format!("dmsetup resume {name}, unless somebody is about to do that"),
        ),
        Stall::Silent { label, requests } => (
            format!("the device {label} has {requests} requests and answered none"),
            format!("see to the storage of {label}: its kernel messages (dmesg), its paths, its network"),
        ),
        Stall::Asleep { thread, place } => (
            format!("the thread {thread} sleeps in {place} until the storage answers"),
            "see to the storage: its kernel messages (dmesg), its paths, its network".into(),
        ),
    };
    Verdict::new(State::Hung, why)
        .because(Cause::Storage)
        .since(Oldest::AtLeast(around.elapsed.as_secs_f64()))
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

fn slow_storage(before: &Disk, now: &Disk, around: &Surroundings) -> Option<Verdict> {
    let (old, new) = (before.block.as_ref()?, now.block.as_ref()?);
    let (mean, count) = new.mean_ms(old)?;
    if mean < around.limits.slow.as_secs_f64() * 1000.0 {
        return None;
    }
    // The time is spent where the lowest device takes most of it.
    let old = old.stack();
    let below = new.stack().into_iter().rev().find_map(|block| {
        let old = old.iter().find(|old| old.name == block.name)?;
        let (its, _) = block.mean_ms(old)?;
        (its * 2.0 >= mean).then(|| (block.label(), its))
    });
    let (label, its) = below.unwrap_or_else(|| (new.label(), mean));
    let why = format!("{count} requests took {mean:.0} ms on average, {its:.0} of them on {label}");
    let slow = Verdict::new(State::Slow, why).because(Cause::Storage);
    Some(slow.remedy(format!(
        "see with iostat -x who else uses {label}, and to its storage"
    )))
}

/// A disk with which nothing is wrong.
pub(crate) fn at_rest(vbd: &Vbd, now: &Disk) -> Verdict {
    if !vbd.is_connected() {
        let state = vbd.state.as_deref().unwrap_or("not known");
        return Verdict::new(State::NotConnected, format!("its state is {state}"));
    }
    let is_judged = now.block.is_some();
    match is_judged {
        true => Verdict::new(State::Ok, ""),
        false => Verdict::new(State::Unknown, "its block device cannot be read"),
    }
}
