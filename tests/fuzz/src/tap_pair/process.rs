// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Start, service and end of a process.

use ring::response::ResponseStatus;
use ring::tap::abi;
use ring::tap::checked::{Claimed, Fence};

use super::Pair;
use crate::tap_model::{ProcessClaim, Stage};

impl Pair {
    pub(super) fn open(&mut self) {
        let may = [abi::STATE_IDLE, abi::STATE_RECOVERING].contains(&self.model.state);
        assert_eq!(self.shadow.opened().is_ok(), may, "{self:?}");
        if may {
            self.model.epoch += 1;
            self.model.state = abi::STATE_OPEN;
            self.model.answered = false;
            self.model.claimed = ProcessClaim::default();
            self.model.claims.clear();
            self.model.quiet = None;
            self.model.started = false;
        }
    }

    pub(super) fn claim(&mut self, fence: Fence, ago: u64) {
        let is_live = self.model.state == abi::STATE_LIVE;
        let widens = is_live && fence > self.model.claimed.0;
        let rests = match self.model.state {
            abi::STATE_OPEN => true,
            abi::STATE_LIVE => widens || self.model.count(Stage::Delivered) == 0,
            _ => false,
        };
        let may = rests && ago == 0;
        let epoch = self.model.epoch.wrapping_sub(ago);
        let claimed = Claimed {
            fence,
            ..Claimed::BEFORE
        };
        assert_eq!(self.shadow.claim(epoch, claimed), may, "{self:?}");
        if !may {
            return;
        }
        if !widens {
            self.model.state = abi::STATE_OPEN;
        }
        self.model.claimed = ProcessClaim(fence);
        match fence {
            Fence::Local => self.model.claims.clear(),
            Fence::Session { .. } | Fence::None => self.model.claims.push(fence),
        }
        self.seen.claimed_again += u64::from(is_live && !widens);
        self.seen.widened += u64::from(widens);
    }

    pub(super) fn excuse(&mut self, ago: u64) {
        let may = self.model.state == abi::STATE_OPEN && ago == 0;
        let epoch = self.model.epoch.wrapping_sub(ago);
        assert_eq!(self.shadow.excuse(epoch), may, "{self:?}");
        if may {
            self.model.death = None;
            let undone = self.model.undone.values_mut();
            undone.for_each(|request| request.in_last = false);
        }
    }

    pub(super) fn start(&mut self, ago: u64) {
        let may = self.model.state == abi::STATE_OPEN && ago == 0;
        let epoch = self.model.epoch.wrapping_sub(ago);
        let started = self.shadow.started(epoch);
        assert_eq!(started.is_ok(), may, "{self:?}");
        let Ok(failed) = started else {
            return;
        };
        self.model.state = abi::STATE_LIVE;
        if let Some(map) = &mut self.model.mappings.0 {
            map.clear();
        }
        let queues = self.model.judge().map(|sequence| {
            let request = &self.model.undone[&sequence];
            let (queue, what) = (request.queue, (request.request.op, request.range()));
            self.model.poisoned.push(what);
            self.model.unproven = true;
            self.model.finish(sequence, ResponseStatus::Error);
            self.seen.poisoned += 1;
            1 << queue
        });
        let expected = (usize::from(queues.is_some()), queues.unwrap_or(0), false);
        let failed = (failed.count, failed.queues, failed.more);
        assert_eq!(failed, expected, "{self:?}");
        let again = std::mem::replace(&mut self.model.started, true);
        if !again && self.model.isolates() {
            // Waiting requests are delivered in another order, including those that a queue was to begin.
            self.model.unsort();
        }
    }

    pub(super) fn close(&mut self) {
        self.shadow.closed();
        if [abi::STATE_OPEN, abi::STATE_LIVE].contains(&self.model.state) {
            self.model.state = abi::STATE_FENCING;
        }
    }

    pub(super) fn quiet(&mut self) {
        let now = self.model.clock * 1_000_000;
        if self.model.state != abi::STATE_FENCING {
            let nothing = self.shadow.quiet(now).map(|failed| failed.count);
            return assert_eq!(nothing, Some(0), "{self:?}");
        }
        self.model.quiet.get_or_insert(self.model.clock);
        if !self.model.is_over() {
            self.seen.unsettled += 1;
            return assert_eq!(self.shadow.quiet(now), None, "{self:?}");
        }
        let failed = self.shadow.quiet(now).map(|f| (f.count, f.queues, f.more));
        self.seen.deaths += 1;
        let held = self.model.count(Stage::Delivered);
        if held > 0 {
            self.model.death = Some((held, self.model.answered));
        }
        let left = self.model.undone.iter();
        let left = left.filter(|(_, r)| r.stage == Stage::Delivered);
        for sequence in left.map(|(sequence, _)| *sequence).collect::<Vec<_>>() {
            self.model.changes(sequence);
        }
        let undone = &mut self.model.undone;
        undone.retain(|_, r| !(r.orphan && r.stage == Stage::Delivered));
        let lost = self.lose();
        assert_eq!(failed, Some((lost.0, lost.1, false)), "{self:?}");
        self.model.unsort();
        for request in self.model.undone.values_mut() {
            request.ordered = true;
            if request.stage == Stage::Delivered {
                request.stage = Stage::Waiting;
                request.replay = true;
                request.in_last = true;
            }
        }
        self.model.state = match self.model.undone.is_empty() {
            true => abi::STATE_IDLE,
            false => abi::STATE_RECOVERING,
        };
    }

    /// Fails modifying requests instead of replaying them, if the end of their first execution cannot be known.
    fn lose(&mut self) -> (usize, u64) {
        if self.model.claimed.0 != Fence::None {
            return (0, 0);
        }
        let undone = self.model.undone.iter();
        let lost = undone.filter(|(_, r)| r.stage == Stage::Delivered && r.writes());
        let lost: Vec<u64> = lost.map(|(sequence, _)| *sequence).collect();
        let mut queues = 0;
        for sequence in &lost {
            queues |= 1 << self.model.undone[sequence].queue;
            self.model.finish(*sequence, ResponseStatus::Error);
        }
        self.seen.lost += lost.len() as u64;
        (lost.len(), queues)
    }
}
