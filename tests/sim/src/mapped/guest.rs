// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Requests of the guest, and the results that it must get.

use std::collections::BTreeMap;

use ring::numbers::DiskTag;
use ring::response::ResponseStatus;
use ring::tap::shadow::{Op, PostedRequest};

use super::image::{SimImage, CLUSTER, SECTORS};
use super::{MappedScene, ABLE, CALM, UNABLE};
use crate::history::{value, DiskHistory, ZERO};

/// A request without an answer.
#[derive(Clone, Debug)]
pub(super) struct Posted {
    pub(super) request: PostedRequest,
    /// Data of a write, or data that a read has returned: a value for each sector.
    pub(super) data: Vec<u64>,
    /// The data is in pages of the guest, which no process can access.
    pub(super) is_mapped: bool,
    /// The number of a modifying request.
    number: u32,
    /// When the guest asked for it.
    issued: u64,
}

/// The guest, and its history of the disk.
#[derive(Debug)]
pub(super) struct MappedGuest {
    /// Requests that it has not made yet.
    pub(super) left: u32,
    pub(super) posted: BTreeMap<u16, Posted>,
    /// Requests with mapped data that could not be executed, or failed: they are posted anew.
    given_back: Vec<(u16, Posted)>,
    changes: u32,
    /// Counts requests and answers.
    clock: u64,
    history: DiskHistory,
    /// History without reads, because data that a read returned need not be durable.
    changed: DiskHistory,
}

impl MappedGuest {
    pub(super) fn new(image: &SimImage, requests: u32) -> Self {
        let mut guest = Self {
            left: requests,
            posted: BTreeMap::new(),
            given_back: Vec::new(),
            changes: 0,
            clock: 2,
            history: DiskHistory::default(),
            changed: DiskHistory::default(),
        };
        for history in [&mut guest.history, &mut guest.changed] {
            for sector in (0..SECTORS).filter(|sector| image.sector(*sector) != ZERO) {
                // CAST: the upper half.
                let number = (image.sector(sector) >> 32) as u32;
                history.write(number, 0, sector, 1, false);
                history.answered(number, 1, true);
            }
        }
        guest
    }

    /// Returns true if all of its requests are answered.
    pub(super) fn is_content(&self) -> bool {
        self.left == 0 && self.posted.is_empty() && self.given_back.is_empty()
    }

    pub(super) fn unanswered(&self) -> impl std::fmt::Debug + '_ {
        (&self.posted, &self.given_back)
    }

    fn uses(&self, tag: u16) -> bool {
        self.posted.contains_key(&tag) || self.given_back.iter().any(|(its, _)| *its == tag)
    }

    /// Makes a request. Each write has values of its own.
    fn issue(&mut self, request: &PostedRequest, is_mapped: bool) -> Posted {
        let (start, sectors) = (request.sector, request.sectors);
        self.clock += 1;
        self.changes += u32::from(matches!(request.op, Op::Write | Op::Discard));
        let (number, issued) = (self.changes, self.clock);
        for history in [&mut self.history, &mut self.changed] {
            match request.op {
                Op::Write => history.write(number, issued, start, sectors, false),
                Op::Discard => history.discard(number, issued, start, sectors),
                _ => {}
            }
        }
        let of = |sector| match request.op {
            Op::Write => value(number, sector),
            _ => ZERO,
        };
        Posted {
            request: *request,
            data: (start..start + sectors).map(of).collect(),
            is_mapped,
            number,
            issued,
        }
    }

    /// Records a finished request. Returns the violation, if there is one.
    fn note(&mut self, posted: &Posted) -> Result<(), String> {
        let (request, issued) = (&posted.request, posted.issued);
        self.clock += 1;
        match request.op {
            Op::Read => (request.sector..)
                .zip(&posted.data)
                .try_for_each(|(sector, found)| {
                    self.history.read(sector, Some(*found), issued, self.clock)
                })?,
            Op::Flush => {}
            _ => {
                for history in [&mut self.history, &mut self.changed] {
                    history.answered(posted.number, self.clock, true);
                }
            }
        }
        Ok(())
    }

    /// Returns the reason that a sector cannot have its content after all requests were executed.
    pub(super) fn look(&self, sector: u64, found: u64) -> Result<(), String> {
        let (now, then) = (self.clock + 1, self.clock + 2);
        let explained = self.history.explain(sector, Some(found), now, then);
        explained.map(|_| ())
    }
}

impl MappedScene {
    /// Posts a request, if the guest has a free tag for it.
    pub(super) fn post(&mut self) {
        let is_calm = self.plan.calm > 0 && self.rng.percent(self.plan.calm);
        let queue = u16::from(!is_calm && self.rng.percent(25));
        let mut tags = if queue == 0 { ABLE } else { UNABLE };
        let free = tags.find(|tag| !self.guest.uses(*tag));
        let Some(tag) = free.filter(|_| self.guest.left > 0) else {
            return;
        };
        self.guest.left -= 1;
        let request = match is_calm {
            true => self.calm_request(),
            false => self.request(),
        };
        let plain = matches!(request.op, Op::Read | Op::Write);
        let is_mapped = queue == 0 && plain && self.rng.percent(self.plan.mapped);
        let posted = self.guest.issue(&request, is_mapped);
        self.arrive(tag, queue, posted);
    }

    /// Posts a request anew that was given back, with its data in the arena. Only the queue that executes requests has
    /// such.
    pub(super) fn post_anew(&mut self) {
        let given_back = &mut self.guest.given_back;
        if given_back.is_empty() {
            return;
        }
        let at = self.rng.index(given_back.len());
        let (tag, posted) = given_back.swap_remove(at);
        let in_arena = Posted {
            is_mapped: false,
            ..posted
        };
        self.arrive(tag, 0, in_arena);
    }

    fn arrive(&mut self, tag: u16, queue: u16, posted: Posted) {
        let (request, is_mapped) = (posted.request, posted.is_mapped);
        self.guest.posted.insert(tag, posted);
        if is_mapped && self.begin_in_express(tag, &request) {
            return;
        }
        if !self.begin_beside(tag, queue, &request) {
            let taken = self.shadow.post(DiskTag::new(tag), queue, &request, 0);
            assert_eq!(taken, Ok(()), "tag {tag}");
            match is_mapped {
                true => self.begin_mapped(tag),
                false => self.begin(tag),
            }
        }
        self.announce();
    }

    /// Takes back a request that was just posted and could not be begun, or that failed with its data mapped: it is
    /// posted anew. For the guest it is still one request.
    pub(super) fn give_back(&mut self, tag: u16) {
        match self.guest.posted.remove(&tag) {
            Some(posted) => self.guest.given_back.push((tag, posted)),
            None => self.problem(format!("tag {tag} is given back and has no request")),
        }
    }

    /// Returns a request that needs no process as soon as its cluster is mapped.
    fn calm_request(&mut self) -> PostedRequest {
        let sector = self.rng.below(CALM * CLUSTER);
        PostedRequest {
            op: self.rng.pick(&[Op::Read, Op::Write]),
            preflush: false,
            fua: false,
            sector,
            sectors: self.rng.pick(&[1, 1, 2]).min(CALM * CLUSTER - sector),
            segments: 1,
        }
    }

    fn request(&mut self) -> PostedRequest {
        let op = match self.rng.below(20) {
            0..9 => Op::Write,
            9..16 => Op::Read,
            16..18 => Op::Discard,
            _ => Op::Flush,
        };
        let mut sector = self.cluster() * CLUSTER + self.rng.below(CLUSTER);
        let mut sectors = self.rng.pick(&[1, 1, 2, 4, 4, 9]);
        if op == Op::Discard && self.rng.percent(80) {
            sector -= sector % CLUSTER;
            sectors = CLUSTER * self.rng.pick(&[1, 1, 2]);
        }
        PostedRequest {
            op,
            preflush: false,
            fua: false,
            sector,
            sectors: if op == Op::Flush {
                0
            } else {
                sectors.min(SECTORS - sector)
            },
            segments: 1,
        }
    }

    /// Records the result of a request.
    pub(super) fn answer(&mut self, tag: u16, status: ResponseStatus) {
        let Some(posted) = self.guest.posted.remove(&tag) else {
            return self.problem(format!("tag {tag} has a result and no request"));
        };
        if self.plan.lies > 0 {
            return;
        }
        let request = posted.request;
        if status != ResponseStatus::Okay {
            return self.problem(format!("{request:?} has failed"));
        }
        if let Err(what) = self.guest.note(&posted) {
            return self.problem(what);
        }
        if request.op == Op::Flush {
            self.look_behind_a_power_cut(posted.issued);
        }
    }

    /// Checks that a flush made everything durable that was answered before it, unless later requests changed it.
    fn look_behind_a_power_cut(&mut self, issued: u64) {
        for sector in 0..SECTORS {
            let (left, now) = (self.image.durable(sector), self.guest.clock + 1);
            let changed = &self.guest.changed;
            if let Err(what) = changed.explain(sector, Some(left), issued, now) {
                return self.problem(format!("after a power cut {what}"));
            }
        }
    }

    /// Takes the results of requests that processes have executed.
    pub(super) fn reap(&mut self) {
        for queue in [0, 1] {
            let mut results = Vec::new();
            let each = |tag: DiskTag, status| results.push((tag.number(), status));
            self.shadow.reap(queue, usize::MAX, each);
            for (tag, status) in results {
                self.answer(tag, status);
            }
        }
    }
}
