// SPDX-License-Identifier: MIT OR Apache-2.0
//! Shares of a group that its disks were given.
//!
//! A process obeys the last share that it got, and the supervisor does not know whether the latest one has arrived. So
//! a disk counts with the largest share that its process may still obey, and no other disk gets more than the rest: in
//! sum the disks never do more than the group may, whatever gets lost or is late.
//!
//! No process can keep what it has by not answering. A share is valid for a [while](TERM). Then the process has an
//! equal part, as all have when the supervisor is not there; if that is more than what it had, a [moment](GRACE) later.
//! A process that has not answered for long counts for nothing: it answers and serves in one thread, so it does not
//! serve either. If it resumes, it does so with an equal part, and the others make way for that at their next look: for
//! so long the group may do more than it should, by that part.

use super::divide::{divide, ALL};
use control::supervisor;
use control::{GroupName, GroupRate, Limits, RateShare, ShareUsage, MILLI};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// How long a process obeys a share without a new one.
const TERM: Duration = Duration::from_secs(2);
/// Then it has an equal part if that is less, and for so long no more: others make way meanwhile, or their shares end.
const GRACE: Duration = Duration::from_secs(1);
/// Age after which every process has an equal part again, whatever share it got before.
pub(super) const SETTLED: Duration = TERM.saturating_add(GRACE);
/// A process that has not answered counts for nothing this long after its share began to count.
const SILENT: Duration = Duration::from_secs(3);
/// Window of a disk's recent use, which shows its demand.
const RECENT: Duration = Duration::from_secs(1);
/// Age after which a disk's report shows nothing any more: its process may hang, and has no demand.
const LATE: Duration = Duration::from_millis(1500);
/// Time without requests after which no disk of a group needs a look.
const QUIET: Duration = Duration::from_secs(2);
/// Time between two looks at a disk.
pub(super) const STEP: Duration = Duration::from_millis(250);
/// Pause between two looks at a disk that waits for others to make way.
const SOON: Duration = Duration::from_millis(50);

/// A limited quantity.
#[derive(Clone, Copy)]
enum LimitedQuantity {
    Bytes,
    Requests,
}

impl LimitedQuantity {
    const BOTH: [LimitedQuantity; 2] = [LimitedQuantity::Bytes, LimitedQuantity::Requests];

    fn of(self, pace: &GroupRate) -> Option<u64> {
        match self {
            LimitedQuantity::Bytes => pace.bytes,
            LimitedQuantity::Requests => pace.milli_requests,
        }
    }

    fn put(self, pace: &mut GroupRate, value: Option<u64>) {
        match self {
            LimitedQuantity::Bytes => pace.bytes = value,
            LimitedQuantity::Requests => pace.milli_requests = value,
        }
    }
}

/// A share that a process was given.
#[derive(Clone, Copy, Debug)]
struct SharePromise {
    pid: u32,
    number: u64,
    pace: GroupRate,
    until: Duration,
    from: Duration,
    /// Nothing if an earlier supervisor has told it: an equal part.
    after: Option<GroupRate>,
    /// The process has heard it.
    is_heard: bool,
}

/// How much a disk had done by then.
#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Duration,
    used: ShareUsage,
}

#[derive(Debug, Default)]
struct Member {
    /// Its own limits.
    own: Limits,
    promises: Vec<SharePromise>,
    /// Of the process that told them, the oldest first.
    samples: VecDeque<Sample>,
    of: Option<u32>,
    /// Time of its last request.
    active: Option<Duration>,
}

impl Member {
    /// The most that its process may believe to have from now on.
    fn held(&self, thing: LimitedQuantity, now: Duration, equal: u64) -> u64 {
        let believed = |promise: &SharePromise| {
            let after = promise.after.map_or(Some(equal), |after| thing.of(&after));
            let has = match now < promise.until {
                true => thing.of(&promise.pace),
                false => after,
            };
            has.unwrap_or(0)
        };
        let is_late = |promise: &SharePromise| !promise.is_heard && now >= promise.from + SILENT;
        let is_silent = |pid: u32| {
            let mut its = self.promises.iter().filter(|promise| promise.pid == pid);
            its.any(is_late)
        };
        let counts = self
            .promises
            .iter()
            .filter(|promise| !is_silent(promise.pid));
        counts.map(believed).max().unwrap_or(0)
    }

    /// Returns its recent use in a second; zero if it has not reported that.
    fn pace(&self, now: Duration) -> GroupRate {
        let (Some(first), Some(last)) = (self.samples.front(), self.samples.back()) else {
            return GroupRate::default();
        };
        if last.at + LATE < now {
            return GroupRate::default();
        }
        let time = last.at.saturating_sub(first.at).max(RECENT).as_millis();
        let in_a_second = |amount: u64| {
            let amount = u128::from(amount) * 1000 / time;
            u64::try_from(amount).unwrap_or(u64::MAX)
        };
        let (first, last) = (first.used, last.used);
        let requests = last.requests.saturating_sub(first.requests);
        GroupRate {
            bytes: Some(in_a_second(last.bytes.saturating_sub(first.bytes))),
            milli_requests: Some(in_a_second(requests.saturating_mul(MILLI))),
        }
    }

    fn lacks(&self, thing: LimitedQuantity, now: Duration) -> bool {
        let last = self.samples.iter().rev().take(2);
        let mut recent = last.filter(|sample| now <= sample.at + LATE);
        recent.any(|sample| match thing {
            LimitedQuantity::Bytes => sample.used.lacks_bytes,
            LimitedQuantity::Requests => sample.used.lacks_requests,
        })
    }

    /// Returns its demand in a second.
    fn wants(&self, thing: LimitedQuantity, now: Duration) -> u64 {
        let own = thing.of(&GroupRate::of(&self.own)).unwrap_or(ALL);
        if self.lacks(thing, now) {
            return own;
        }
        // A little more than what it does: else it could not do more.
        let does = thing.of(&self.pace(now)).unwrap_or(0);
        does.saturating_add(does / 4).min(own)
    }

    fn told(&mut self, pid: u32, used: ShareUsage, now: Duration) -> ShareUsage {
        if self.of != Some(pid) {
            self.of = Some(pid);
            self.samples.clear();
        }
        // Work before this is unknown: perhaps an earlier supervisor has counted it.
        let before = self.samples.back().map_or(used, |last| last.used);
        if used.came > before.came || used.lacks_bytes || used.lacks_requests {
            self.active = Some(now);
        }
        self.samples.push_back(Sample { at: now, used });
        while self.samples.len() > 1
            && self
                .samples
                .front()
                .is_some_and(|first| first.at + RECENT < now)
        {
            self.samples.pop_front();
        }
        ShareUsage {
            came: used.came.saturating_sub(before.came),
            requests: used.requests.saturating_sub(before.requests),
            bytes: used.bytes.saturating_sub(before.bytes),
            ..used
        }
    }
}

/// The limits of a group, and who has which part of them.
#[derive(Debug)]
pub struct Ledger {
    limits: Limits,
    members: BTreeMap<u32, Member>,
    last: u64,
    bytes: u64,
    requests: u64,
}

impl Ledger {
    /// Of a group without disks.
    #[must_use]
    pub fn new(limits: Limits) -> Ledger {
        Ledger {
            limits,
            members: BTreeMap::new(),
            last: 0,
            bytes: 0,
            requests: 0,
        }
    }

    /// Returns the limits of all disks together.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// From now on these hold.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Sets the disks of the group, with their own limits. Returns true if a disk was added or removed.
    pub fn keep(&mut self, disks: &[(u32, Limits)]) -> bool {
        let before = self.members.len();
        self.members
            .retain(|minor, _| disks.iter().any(|(known, _)| known == minor));
        let mut is_new = self.members.len() != before;
        for (minor, own) in disks {
            is_new |= !self.members.contains_key(minor);
            self.members.entry(*minor).or_default().own = *own;
        }
        is_new
    }

    /// An earlier supervisor may have told a process anything, until then.
    pub fn adopt(&mut self, minor: u32, pid: u32, until: Duration) {
        let all = GroupRate::of(&self.limits);
        if let Some(member) = self.members.get_mut(&minor) {
            member.promises.push(SharePromise {
                pid,
                number: 0,
                pace: all,
                until,
                from: until,
                after: None,
                is_heard: false,
            });
        }
    }

    /// An equal part.
    fn equal(&self) -> GroupRate {
        let all = GroupRate::of(&self.limits);
        let count = self.members.len().max(1) as u64;
        GroupRate {
            bytes: all.bytes.map(|bytes| bytes / count),
            milli_requests: all.milli_requests.map(|requests| requests / count),
        }
    }

    /// Returns the part that a disk should have.
    fn target(&self, minor: u32, thing: LimitedQuantity, now: Duration) -> Option<u64> {
        let all = thing.of(&GroupRate::of(&self.limits))?;
        let wants: Vec<u64> = self
            .members
            .values()
            .map(|its| its.wants(thing, now))
            .collect();
        let parts = divide(all, &wants);
        let mut parts = self.members.keys().zip(parts);
        parts
            .find(|(known, _)| **known == minor)
            .map(|(_, part)| part)
    }

    /// Returns the part that the others leave now.
    fn left(&self, minor: u32, thing: LimitedQuantity, now: Duration) -> u64 {
        let all = thing.of(&GroupRate::of(&self.limits)).unwrap_or(0);
        let equal = thing.of(&self.equal()).unwrap_or(0);
        let others = self.members.iter().filter(|(known, _)| **known != minor);
        let held = others.map(|(_, member)| member.held(thing, now, equal));
        all.saturating_sub(held.fold(0, u64::saturating_add))
    }

    /// Returns the next share of a process, and the number by which it is [answered](Self::answered).
    pub fn share(&mut self, minor: u32, pid: u32, now: Duration) -> (u64, RateShare) {
        let mut pace = GroupRate::default();
        for thing in LimitedQuantity::BOTH {
            let target = self.target(minor, thing, now);
            let part = target.map(|target| target.min(self.left(minor, thing, now)));
            thing.put(&mut pace, part);
        }
        let after = self.equal();
        self.last += 1;
        let number = self.last;
        let until = now + TERM;
        let promise = SharePromise {
            pid,
            number,
            pace,
            until,
            from: until + GRACE,
            after: Some(after),
            is_heard: false,
        };
        if let Some(member) = self.members.get_mut(&minor) {
            member.promises.push(promise);
        }
        let share = RateShare {
            pace,
            until,
            after,
            from: until + GRACE,
            burst_s: self.limits.burst_s,
        };
        (number, share)
    }

    /// Records that a process has taken the share of this number, and its reported use.
    pub fn answered(&mut self, minor: u32, pid: u32, number: u64, used: ShareUsage, now: Duration) {
        let Some(member) = self.members.get_mut(&minor) else {
            return;
        };
        member
            .promises
            .retain(|promise| promise.pid != pid || promise.number >= number);
        for promise in &mut member.promises {
            promise.is_heard |= promise.pid == pid && promise.number == number;
        }
        let more = member.told(pid, used, now);
        self.bytes = self.bytes.saturating_add(more.bytes);
        self.requests = self.requests.saturating_add(more.requests);
    }

    /// Records that a process has not taken the share of this number.
    pub fn refused(&mut self, minor: u32, number: u64) {
        if let Some(member) = self.members.get_mut(&minor) {
            member.promises.retain(|promise| promise.number != number);
        }
    }

    /// Records that a disk has requests.
    pub fn is_busy(&mut self, minor: u32, now: Duration) {
        if let Some(member) = self.members.get_mut(&minor) {
            member.active = Some(now);
        }
    }

    /// A process has ended: it believes nothing any more.
    pub fn gone(&mut self, pid: u32) {
        for member in self.members.values_mut() {
            member.promises.retain(|promise| promise.pid != pid);
        }
    }

    /// When to look at a disk again.
    #[must_use]
    pub fn pause(&self, minor: u32, now: Duration) -> Duration {
        let has = |thing: LimitedQuantity| {
            let promise = self.members.get(&minor)?.promises.last()?;
            thing.of(&promise.pace)
        };
        let waits = |thing: &LimitedQuantity| match (has(*thing), self.target(minor, *thing, now)) {
            (Some(has), Some(target)) => has < target - target / 16,
            _ => false,
        };
        match LimitedQuantity::BOTH.iter().any(waits) {
            true => SOON,
            false => STEP,
        }
    }

    /// Whether no disk has requests, and none has more than it keeps without further messages.
    #[must_use]
    pub fn is_quiet(&self, now: Duration) -> bool {
        let equal = self.equal();
        self.members.values().all(|member| {
            let rests = member.active.is_none_or(|active| active + QUIET < now);
            let has_no_more = member.promises.iter().all(|promise| {
                promise.after == Some(equal)
                    && LimitedQuantity::BOTH
                        .iter()
                        .all(|thing| thing.of(&promise.pace) <= thing.of(&equal))
            });
            rests && has_no_more
        })
    }

    /// Returns the state of the group, for answers.
    #[must_use]
    pub fn tell(&self, name: &GroupName, now: Duration) -> supervisor::Group {
        let member = |(minor, member): (&u32, &Member)| {
            let does = member.pace(now);
            let pace = member.promises.last().map(|last| match now < last.until {
                true => last.pace,
                false => last.after.unwrap_or(self.equal()),
            });
            supervisor::Member {
                minor: *minor,
                pace,
                bytes: does.bytes.unwrap_or(0),
                milli_requests: does.milli_requests.unwrap_or(0),
                lacks: LimitedQuantity::BOTH
                    .iter()
                    .any(|thing| member.lacks(*thing, now)),
            }
        };
        supervisor::Group {
            name: name.clone(),
            limits: self.limits,
            members: self.members.iter().map(member).collect(),
            bytes: self.bytes,
            requests: self.requests,
        }
    }
}

#[cfg(test)]
mod tests;
