// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Isolation of a request that makes processes die.
//!
//! Each request counts the processes that died while they had it. With one death less than the limit it is *isolated*:
//! while there are such requests, a process has one request at a time. So the next death identifies the request. It
//! fails alone, if it has reached the limit of deaths; the others were delivered beside it by chance, and continue.
//!
//! A broken program that dies of every request must not cause errors for the guest, one request after the other. So a
//! request fails only if one of the processes that died with it had answered another one, and if something was answered
//! since the last request failed. Requests that stay undecided for that reason are delivered after all others, which
//! gives the process the chance to answer them.
//!
//! Deaths are counted when the next process starts the disk. Until then the process that has opened it may declare that
//! no request caused the last death ([`Shadow::excuse`]).

use core::ops::DerefMut;

use super::passthrough::MapLookup;
use super::{Failed, Phase, Shadow};
use crate::ring::numbers::DiskTag;
use crate::ring::tap::abi;
use crate::ring::tap::table::{next, Suspicion, TagEntry};

/// The death of a process that had requests. It is not counted yet.
#[derive(Clone, Copy, Debug)]
struct Death {
    /// The process had one request.
    alone: bool,
    /// The process had answered others.
    answered: bool,
}

/// The last request that failed because processes died of it.
#[derive(Clone, Copy, Debug)]
struct Poison {
    op: u8,
    sector: u64,
    sectors: u64,
}

/// State of the isolation that is not in the entries.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Isolation {
    /// Deaths at which a request fails; 0 for never.
    limit: u8,
    /// Requests without a result that are isolated.
    isolated: u32,
    death: Option<Death>,
    /// The process has answered a request.
    answered: bool,
    /// The process was started already: the death before it is counted, and waiting requests are arranged.
    judged: bool,
    /// No request was answered since one failed.
    unproven: bool,
    /// Number of requests that failed, and the last of them.
    poisoned: u32,
    last: Option<Poison>,
}

impl Isolation {
    /// Records the death of a process that had `held` requests.
    pub(super) fn died(&mut self, held: u32) {
        if held > 0 {
            self.death = Some(Death {
                alone: held == 1,
                answered: self.answered,
            });
        }
    }

    /// Records that another process has opened the disk.
    pub(super) fn opened(&mut self) {
        self.answered = false;
        self.judged = false;
    }

    /// Records that a process has answered a request.
    pub(super) fn answered(&mut self) {
        self.answered = true;
        self.unproven = false;
    }

    /// Forgets a request that has a result or is dropped.
    pub(super) fn forget(&mut self, isolated: bool) {
        self.isolated = self.isolated.wrapping_sub(u32::from(isolated));
    }

    /// Fills the isolation's part of an [`abi::Info`].
    pub(super) fn describe(&self, info: &mut abi::Info) {
        info.isolated = self.isolated;
        info.poisoned = self.poisoned;
        if let Some(last) = self.last {
            info.poison_op = last.op.into();
            info.poison_sector = last.sector;
            info.poison_sectors = last.sectors;
        }
    }

    /// Counts the last death for a request that the process had. Returns true if the request is the reason.
    fn count(&mut self, suspicion: &mut Suspicion, death: Death) -> bool {
        if !core::mem::replace(&mut suspicion.in_last, false) || self.limit == 0 {
            return false;
        }
        suspicion.deaths = suspicion.deaths.saturating_add(1);
        suspicion.proven |= death.answered;
        death.alone && suspicion.proven && !self.unproven && suspicion.deaths >= self.limit
    }

    /// Returns the class of a request in the order of delivery.
    fn class(&self, suspicion: &Suspicion) -> Class {
        let deaths = suspicion.deaths;
        match deaths.checked_add(1) {
            Some(next) if self.limit == 0 || next < self.limit => Class::Trusted,
            _ if deaths < self.limit => Class::Suspect,
            _ => Class::Undecided,
        }
    }
}

/// How suspicious a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// Not more than others.
    Trusted,
    /// The next death makes it reach the limit.
    Suspect,
    /// The request has reached the limit, and it is undecided whether the process or the request is the reason.
    Undecided,
}

impl<S: DerefMut<Target = [TagEntry]>, M: MapLookup> Shadow<S, M> {
    /// Sets the number of deaths at which a request fails; 0 is for never. 1 counts as 2, because one death of a
    /// process with several requests does not identify one.
    pub fn set_death_limit(&mut self, limit: u8) {
        self.isolation.limit = if limit == 1 { 2 } else { limit };
    }

    /// Declares that the requests of the last process did not cause its end. Returns `false` unless the caller has
    /// opened the disk and not started it.
    #[must_use]
    pub fn excuse(&mut self, epoch: u64) -> bool {
        let may = self.phase == Phase::Open && epoch == self.epoch;
        if may && self.isolation.death.take().is_some() {
            self.each_undone(|_, entry| entry.suspicion.in_last = false);
        }
        may
    }

    /// Returns false if the process must first answer the request that it has, or while a queue may be executing some of
    /// which the shadow does not know.
    pub(super) fn may_deliver(&self) -> bool {
        !self.has_express() && (self.isolation.isolated == 0 || self.held == 0)
    }

    /// Counts the last death, fails the request that is the reason for it if that is known, and isolates those that may
    /// become one. Acts once for each process, because it looks at every request and a process may start as often as it
    /// likes.
    pub(super) fn judge(&mut self) -> Failed {
        let mut failed = Failed::default();
        if core::mem::replace(&mut self.isolation.judged, true) {
            return failed;
        }
        if let Some(death) = self.isolation.death.take() {
            if let Some(tag) = self.count(death) {
                self.poison(tag, &mut failed);
            }
        }
        if self.isolation.isolated > 0 {
            self.arrange();
        }
        failed
    }

    /// Counts a death. Returns the request that is the reason.
    fn count(&mut self, death: Death) -> Option<DiskTag> {
        let mut isolation = self.isolation;
        let mut reason = None;
        isolation.isolated = 0;
        self.each_undone(|tag, entry| {
            if isolation.count(&mut entry.suspicion, death) {
                reason = Some(tag);
            }
            entry.suspicion.isolated = isolation.class(&entry.suspicion) != Class::Trusted;
            let more = u32::from(entry.suspicion.isolated);
            isolation.isolated = isolation.isolated.wrapping_add(more);
        });
        self.isolation = isolation;
        reason
    }

    fn poison(&mut self, tag: DiskTag, failed: &mut Failed) {
        let Some(entry) = self.get(tag) else {
            return;
        };
        self.isolation.last = Some(Poison {
            op: entry.op,
            sector: entry.sector,
            sectors: entry.end.wrapping_sub(entry.sector),
        });
        self.isolation.poisoned = self.isolation.poisoned.wrapping_add(1);
        self.isolation.unproven = true;
        self.fail_for(tag, failed);
    }

    /// Arranges waiting requests so that a process answers as many as it can before it gets those of which it may die.
    fn arrange(&mut self) {
        for class in [Class::Trusted, Class::Suspect, Class::Undecided] {
            let mut at = self.order.first();
            while let Some(node) = at {
                at = next(&self.entries, node);
                let fits = self.is_waiting(node.tag(), |entry| {
                    self.isolation.class(&entry.suspicion) == class
                });
                if fits {
                    self.unlist(node.tag());
                    self.wait(node.tag(), None);
                }
            }
        }
    }

    /// Calls `each` for each request without a result, the oldest first.
    fn each_undone(&mut self, mut each: impl FnMut(DiskTag, &mut TagEntry)) {
        let mut at = self.order.first();
        while let Some(node) = at {
            at = next(&self.entries, node);
            if let Some(entry) = self.get_mut(node.tag()) {
                each(node.tag(), entry);
            }
        }
    }
}
