// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! What the guest asks for, and what it must get.

use std::collections::BTreeMap;

use ring::numbers::DiskTag;
use ring::response::Status;
use ring::tap::shadow::{Op, Request};

use super::image::{Image, CLUSTER, SECTORS};
use super::{Scene, ABLE, UNABLE};
use crate::history::value;

/// A request without an answer.
#[derive(Clone, Debug)]
pub(super) struct Posted {
    pub(super) request: Request,
    /// What a write brings, and what a read has found: a value for each sector.
    pub(super) data: Vec<u64>,
    /// The data is in pages of the guest, and not where a process can get it.
    pub(super) is_mapped: bool,
    /// What a read must find.
    expected: Vec<u64>,
    /// Of a flush: the last answered change of each sector when it was posted.
    covers: Vec<usize>,
    /// Of a change: its place among those of each of its sectors.
    places: Vec<usize>,
}

/// The guest, and the disk if everything is executed in arrival order.
#[derive(Clone, Debug)]
pub(super) struct Guest {
    /// Requests that it has not made yet.
    pub(super) left: u32,
    pub(super) posted: BTreeMap<u16, Posted>,
    /// What was to be executed with its data mapped and was not, or not well: it is posted anew.
    given_back: Vec<(u16, Posted)>,
    writes: u32,
    /// What each sector was, in arrival order.
    values: Vec<Vec<u64>>,
    /// The last of these that was answered.
    answered: Vec<usize>,
    /// Those before this are durable or have been replaced.
    durable: Vec<usize>,
}

impl Guest {
    pub(super) fn new(image: &Image, requests: u32) -> Self {
        let none = vec![0; SECTORS as usize];
        Self {
            left: requests,
            posted: BTreeMap::new(),
            given_back: Vec::new(),
            writes: 0,
            values: (0..SECTORS).map(|s| vec![image.sector(s)]).collect(),
            answered: none.clone(),
            durable: none,
        }
    }

    /// True if all that it asked for is answered.
    pub(super) fn is_content(&self) -> bool {
        self.left == 0 && self.posted.is_empty() && self.given_back.is_empty()
    }

    pub(super) fn unanswered(&self) -> impl std::fmt::Debug + '_ {
        (&self.posted, &self.given_back)
    }

    fn uses(&self, tag: u16) -> bool {
        self.posted.contains_key(&tag) || self.given_back.iter().any(|(its, _)| *its == tag)
    }

    /// What a request brings: each write has values of its own.
    fn data(&mut self, request: &Request) -> Vec<u64> {
        self.writes += u32::from(request.op == Op::Write);
        let of = |sector: usize| match request.op {
            Op::Write => value(self.writes, sector as u64),
            _ => 0,
        };
        sectors(request).map(of).collect()
    }

    /// What a sector is when all has been executed.
    pub(super) fn ordered(&self, sector: u64) -> u64 {
        *self.values[sector as usize]
            .last()
            .expect("there is a first")
    }
}

fn sectors(request: &Request) -> std::ops::Range<usize> {
    request.sector as usize..(request.sector + request.sectors) as usize
}

impl Scene {
    /// The guest makes a request, if it has a tag for it.
    pub(super) fn post(&mut self) {
        let queue = u16::from(self.rng.percent(25));
        let mut tags = if queue == 0 { ABLE } else { UNABLE };
        let free = tags.find(|tag| !self.guest.uses(*tag));
        let Some(tag) = free.filter(|_| self.guest.left > 0) else {
            return;
        };
        self.guest.left -= 1;
        let request = self.request();
        let data = self.guest.data(&request);
        let plain = matches!(request.op, Op::Read | Op::Write);
        let is_mapped = queue == 0 && plain && self.rng.percent(self.plan.mapped);
        self.arrive(tag, queue, &request, data, is_mapped);
    }

    /// Something that was given back comes with its data in the arena. Only the queue that executes something has such.
    pub(super) fn post_anew(&mut self) {
        let given_back = &mut self.guest.given_back;
        if given_back.is_empty() {
            return;
        }
        let at = self.rng.index(given_back.len());
        let (tag, posted) = given_back.swap_remove(at);
        self.arrive(tag, 0, &posted.request, posted.data, false);
    }

    fn arrive(&mut self, tag: u16, queue: u16, request: &Request, data: Vec<u64>, is_mapped: bool) {
        let posted = Posted {
            is_mapped,
            ..self.expect(request, data)
        };
        self.guest.posted.insert(tag, posted);
        if !self.begin_beside(tag, queue, request) {
            let taken = self.shadow.post(DiskTag::new(tag), queue, request, 0);
            assert_eq!(taken, Ok(()), "tag {tag}");
            match is_mapped {
                true => self.begin_mapped(tag),
                false => self.begin(tag),
            }
        }
        self.announce();
    }

    /// What was just posted is not begun: it is as if it had not come yet.
    pub(super) fn take_back(&mut self, tag: u16) {
        let guest = &mut self.guest;
        let posted = guest.posted.remove(&tag).expect("it was just posted");
        for (sector, place) in sectors(&posted.request).zip(&posted.places) {
            // Nothing has come since.
            guest.values[sector].truncate(*place);
        }
        guest.given_back.push((tag, posted));
    }

    /// A request has failed with its data mapped. What a write has done it has done in its turn, and comes to do once
    /// more: that is in the order twice.
    pub(super) fn give_back(&mut self, tag: u16) {
        match self.guest.posted.remove(&tag) {
            Some(posted) => self.guest.given_back.push((tag, posted)),
            None => self.problem(format!("tag {tag} is given back and has no request")),
        }
    }

    fn request(&mut self) -> Request {
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
        Request {
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

    /// Does to the disk in arrival order what the request does.
    fn expect(&mut self, request: &Request, data: Vec<u64>) -> Posted {
        let guest = &mut self.guest;
        let its = sectors(request);
        let mut posted = Posted {
            request: *request,
            data,
            is_mapped: false,
            expected: Vec::new(),
            covers: Vec::new(),
            places: Vec::new(),
        };
        match request.op {
            Op::Read => posted.expected = its.map(|s| guest.ordered(s as u64)).collect(),
            Op::Flush => posted.covers.clone_from(&guest.answered),
            _ => {
                for (sector, value) in its.zip(&posted.data) {
                    posted.places.push(guest.values[sector].len());
                    guest.values[sector].push(*value);
                }
            }
        }
        posted
    }

    /// A request has its result.
    pub(super) fn answer(&mut self, tag: u16, status: Status) {
        let Some(posted) = self.guest.posted.remove(&tag) else {
            return self.problem(format!("tag {tag} has a result and no request"));
        };
        if self.plan.lies > 0 {
            return;
        }
        let request = posted.request;
        if status != Status::Okay {
            return self.problem(format!("{request:?} has failed"));
        }
        let mut found = sectors(&request).zip(posted.data.iter().zip(&posted.expected));
        if let Some((sector, (found, expected))) = found.find(|(_, (found, e))| found != e) {
            return self.problem(format!(
                "sector {sector} read as {found:x}, in arrival order it is {expected:x}"
            ));
        }
        for (sector, place) in sectors(&request).zip(&posted.places) {
            let answered = &mut self.guest.answered[sector];
            *answered = (*answered).max(*place);
        }
        for (durable, covered) in self.guest.durable.iter_mut().zip(&posted.covers) {
            *durable = (*durable).max(*covered);
        }
        if request.op == Op::Flush {
            self.look_behind_a_power_cut();
        }
    }

    /// What was flushed is there, or what came after it.
    fn look_behind_a_power_cut(&mut self) {
        for sector in 0..SECTORS {
            let from = self.guest.durable[sector as usize];
            let left = self.image.durable(sector);
            let may = &self.guest.values[sector as usize][from..];
            if !may.contains(&left) {
                return self.problem(format!(
                    "a power cut leaves {left:x} in sector {sector}, flushed was {:x}",
                    may[0]
                ));
            }
        }
    }

    /// Takes the results of what processes have executed.
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
