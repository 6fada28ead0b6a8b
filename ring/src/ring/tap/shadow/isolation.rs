// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Which request is it of which processes die?
//!
//! Each request counts the processes that died while they had it. With one death less than the
//! limit it is *isolated*: while there are such requests, a process has one request at a time. So
//! at the next death it is known which one it was. That one fails alone, if it had the limit of
//! deaths; the others were delivered beside it by chance, and go on.
//!
//! A program that dies of everything (a broken one was installed) must not become errors of the
//! guest, one request after the other. So a request fails only if one of the processes that died
//! with it had answered another one, and if something was answered since the last request failed.
//! What is not decided for that reason is delivered after all others, which gives the process the
//! chance to answer them.
//!
//! Deaths are counted when the next process starts the disk. Until then whoever opened it may say
//! that the last one was no fault of any request ([`Shadow::excuse`]).

use core::ops::DerefMut;

use super::direct::Places;
use super::{Failed, Phase, Shadow};
use crate::ring::numbers::DiskTag;
use crate::ring::tap::abi;
use crate::ring::tap::table::{next, Entry, Suspicion};

/// The death of a process that had requests, which are not counted yet.
#[derive(Clone, Copy, Debug)]
struct Death {
    /// It had one.
    alone: bool,
    /// It had answered others.
    answered: bool,
}

/// What a request was that failed for the deaths at it.
#[derive(Clone, Copy, Debug)]
struct Poison {
    op: u8,
    sector: u64,
    sectors: u64,
}

/// What is known beside the entries.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Isolation {
    /// Deaths at which a request fails; 0 for never.
    limit: u8,
    /// Requests without a result that are isolated.
    isolated: u32,
    death: Option<Death>,
    /// The process has answered a request.
    answered: bool,
    /// The process was started already: the death before it is counted, and what waits is arranged.
    judged: bool,
    /// Nothing was answered since a request failed.
    unproven: bool,
    /// Requests that failed, and the last of them.
    poisoned: u32,
    last: Option<Poison>,
}

impl Isolation {
    /// A process is gone that had so many requests.
    pub(super) fn died(&mut self, held: u32) {
        if held > 0 {
            self.death = Some(Death {
                alone: held == 1,
                answered: self.answered,
            });
        }
    }

    /// Another process has opened the disk.
    pub(super) fn opened(&mut self) {
        self.answered = false;
        self.judged = false;
    }

    /// A process has answered a request.
    pub(super) fn answered(&mut self) {
        self.answered = true;
        self.unproven = false;
    }

    /// A request has a result, or is dropped.
    pub(super) fn forget(&mut self, isolated: bool) {
        self.isolated = self.isolated.wrapping_sub(u32::from(isolated));
    }

    /// Fills what is known of it in an [`abi::Info`].
    pub(super) fn describe(&self, info: &mut abi::Info) {
        info.isolated = self.isolated;
        info.poisoned = self.poisoned;
        if let Some(last) = self.last {
            info.poison_op = last.op.into();
            info.poison_sector = last.sector;
            info.poison_sectors = last.sectors;
        }
    }

    /// Counts the last death for a request that the process had. True if the request is the reason.
    fn count(&mut self, suspicion: &mut Suspicion, death: Death) -> bool {
        if !core::mem::replace(&mut suspicion.in_last, false) || self.limit == 0 {
            return false;
        }
        suspicion.deaths = suspicion.deaths.saturating_add(1);
        suspicion.proven |= death.answered;
        death.alone && suspicion.proven && !self.unproven && suspicion.deaths >= self.limit
    }

    /// The place of a request in the order of delivery.
    fn class(&self, suspicion: &Suspicion) -> Class {
        let deaths = suspicion.deaths;
        match deaths.checked_add(1) {
            Some(next) if self.limit == 0 || next < self.limit => Class::Trusted,
            _ if deaths < self.limit => Class::Suspect,
            _ => Class::Undecided,
        }
    }
}

/// How much a request is to be feared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// No more than others.
    Trusted,
    /// With the next death it has the limit.
    Suspect,
    /// It has the limit, and it is not known whether the process or the request is the reason.
    Undecided,
}

impl<S: DerefMut<Target = [Entry]>, M: Places> Shadow<S, M> {
    /// A request fails when so many processes have died of it; 0 is for never, and 1 counts as 2:
    /// of several that a process had nobody knows which one it was.
    pub fn set_death_limit(&mut self, limit: u8) {
        self.isolation.limit = if limit == 1 { 2 } else { limit };
    }

    /// The end of the last process is no fault of the requests that it had, says the one who has
    /// opened the disk and not started it. `false` if that is somebody else.
    #[must_use]
    pub fn excuse(&mut self, epoch: u64) -> bool {
        let may = self.phase == Phase::Open && epoch == self.epoch;
        if may && self.isolation.death.take().is_some() {
            self.each_undone(|_, entry| entry.suspicion.in_last = false);
        }
        may
    }

    /// False if the process must answer what it has first.
    pub(super) fn may_deliver(&self) -> bool {
        self.isolation.isolated == 0 || self.held == 0
    }

    /// Counts the last death, fails the request that is the reason for it, if that is known, and
    /// isolates those that may become one. Once for each process: it looks at every request, and a process
    /// may start as often as it likes.
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

    /// Puts what waits in an order in which a process answers as much as it can before it meets
    /// what it may die of.
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

    /// Does something to each request without a result, the oldest first.
    fn each_undone(&mut self, mut each: impl FnMut(DiskTag, &mut Entry)) {
        let mut at = self.order.first();
        while let Some(node) = at {
            at = next(&self.entries, node);
            if let Some(entry) = self.get_mut(node.tag()) {
                each(node.tag(), entry);
            }
        }
    }
}
