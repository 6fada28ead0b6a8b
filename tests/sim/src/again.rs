// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! A migrated guest repeats the requests whose answers it has not seen.
//!
//! A frontend of 2006 copies its whole table of requests into the new ring, as they were. A current frontend splits
//! them and builds new requests from the parts: as large as the new host accepts, in another order, over all queues.

use std::collections::BTreeMap;

use ring::abi::{OP_DISCARD, OP_READ, OP_WRITE, OP_WRITE_BARRIER};

use crate::frontend::{Pending, FREE};
use crate::machine::{page, Machine, MachineFault, Page};
use crate::spec::{Expect, Gref, Spec};

/// How a frontend repeats requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Age {
    /// Identical requests with identical identifiers, as they were in the ring.
    Old,
    /// Identical requests in the order of the frontend's table: by identifier.
    OldTable,
    /// New requests, built from the parts of the old ones.
    New,
}

/// A request that a guest repeats.
#[derive(Clone, Debug)]
pub(crate) struct Again {
    spec: Spec,
    /// Number of the request when the guest made it for the first time.
    number: u32,
    issued: u64,
    id: Option<u64>,
    /// The page of each segment.
    contents: Vec<Page>,
}

#[derive(Clone, Copy, Debug)]
struct RequestEntry {
    start: u64,
    end: u64,
    changes: bool,
    /// Parts of it that are not answered, or whose answers the guest has not seen.
    unanswered: u32,
    unheard: u32,
    okay: bool,
}

/// Requests of a guest whose answers it has not seen, by number.
#[derive(Debug, Default)]
pub(crate) struct UnansweredRequests(BTreeMap<u32, RequestEntry>);

impl UnansweredRequests {
    /// Adds a new request.
    pub(crate) fn add(&mut self, pending: &Pending) {
        let spec = &pending.spec;
        let sectors = spec.sectors().max(spec.discard);
        let entry = RequestEntry {
            start: spec.sector,
            end: spec.sector.saturating_add(sectors),
            changes: spec.operation != OP_READ,
            unanswered: 1,
            unheard: 1,
            okay: true,
        };
        self.0.insert(pending.number, entry);
    }

    /// Returns true if the request reads sectors that are being changed, or changes sectors that are being read. Writes
    /// may overlap.
    pub(crate) fn meets(&self, spec: &Spec) -> bool {
        let end = spec.sector.saturating_add(spec.sectors().max(spec.discard));
        let reads = spec.operation == OP_READ;
        let meets = |entry: &RequestEntry| entry.start < end && spec.sector < entry.end;
        self.0
            .values()
            .any(|entry| entry.changes == reads && meets(entry))
    }

    /// Returns the number of requests without a seen answer.
    pub(crate) fn left(&self) -> usize {
        self.0.len()
    }
}

impl Machine {
    /// Records the answer to a request, or to a part of one.
    pub(crate) fn is_answered(&mut self, number: u32, time: u64, okay: bool) {
        let all = match self.asked.0.get_mut(&number) {
            None => Some(okay),
            Some(entry) => {
                entry.unanswered = entry.unanswered.saturating_sub(1);
                entry.okay &= okay;
                (entry.unanswered == 0).then_some(entry.okay)
            }
        };
        if let Some(okay) = all {
            self.history.answered(number, time, okay);
        }
    }

    /// Records that the guest sees the answer to a request, or to a part of one.
    pub(crate) fn is_heard(&mut self, number: u32) {
        if let Some(entry) = self.asked.0.get_mut(&number) {
            entry.unheard = entry.unheard.saturating_sub(1);
            if entry.unheard == 0 {
                self.asked.0.remove(&number);
            }
        }
    }

    /// Records that the guest is gone before it saw an answer: for the guest there was none.
    fn is_unheard(&mut self, pending: &Pending) {
        if let Some(entry) = self.asked.0.get_mut(&pending.number) {
            entry.unanswered += 1;
        }
        let spec = &pending.spec;
        let read = match spec.operation {
            OP_READ => spec.sector..spec.sector.saturating_add(spec.sectors()),
            _ => 0..0,
        };
        self.history.unheard(pending.number, pending.issued, read);
    }

    /// Returns the requests of this queue whose answers the guest has not seen, in the order of the ring. Their data is
    /// the copy on the other host, if the memory was copied there.
    pub(crate) fn unheard_of(&mut self) -> Vec<Again> {
        let mut all: Vec<(u64, Pending)> = Vec::new();
        for unheard in std::mem::take(&mut self.front.unheard) {
            self.is_unheard(&unheard.pending);
            all.push((unheard.id, unheard.pending));
        }
        for (id, pending) in std::mem::take(&mut self.front.pending) {
            all.extend(pending.into_iter().map(|pending| (id, pending)));
        }
        let first = self.front.heard();
        all.sort_by_key(|(_, pending)| pending.index.wrapping_sub(first));
        let passes = self.front.passes.take();
        let data = |index: usize| match &passes {
            Some(passes) => passes.page(index),
            None => self.front.pages[index].clone(),
        };
        let again = all.into_iter().map(|(id, pending)| Again {
            contents: pending
                .segments
                .iter()
                .map(|(index, _, _)| index.map_or_else(|| page(FREE), data))
                .collect(),
            spec: pending.spec,
            number: pending.number,
            issued: pending.issued,
            id: Some(id),
        });
        again.collect()
    }

    /// Makes a migrated guest repeat its requests. Returns their number.
    pub(crate) fn ask_again(&mut self, mut all: Vec<Again>, age: Age) -> u64 {
        if age == Age::OldTable {
            all.sort_by_key(|again| again.id);
        }
        let mut requests = Vec::new();
        for again in all {
            if self.commit(MachineFault::ForgetReplay) {
                continue;
            }
            if !self.is_offered(&again.spec) {
                self.fails(&again);
            } else if age != Age::New && self.fits(&again.spec) {
                requests.push(again);
            } else {
                requests.extend(self.take_apart(again));
            }
        }
        if age == Age::New {
            for at in (1..requests.len()).rev() {
                let other = self.rng.index(at + 1);
                requests.swap(at, other);
            }
        }
        let count = requests.len() as u64;
        self.again = requests.into();
        count
    }

    /// Returns true if this host offers the request.
    fn is_offered(&self, spec: &Spec) -> bool {
        let limits = &self.setup.limits;
        let missing = match spec.operation {
            OP_DISCARD => !limits.discard,
            OP_WRITE_BARRIER => !limits.barrier,
            _ => false,
        };
        // A request that is expected to fail need not be repeated.
        !missing && spec.expect == Expect::Okay
    }

    /// Fails a request in the frontend, which does not repeat it and returns an error to its caller.
    fn fails(&mut self, again: &Again) {
        let time = self.tick();
        self.history.answered(again.number, time, false);
        self.asked.0.remove(&again.number);
    }

    fn fits(&self, spec: &Spec) -> bool {
        let most = self.setup.limits.max_indirect_segments;
        !spec.indirect || spec.segments.len() <= usize::from(most)
    }

    /// Splits a request into others with its segments.
    fn take_apart(&mut self, again: Again) -> Vec<Again> {
        let Spec { operation, .. } = again.spec;
        if operation != OP_READ && operation != OP_WRITE {
            return vec![Again { id: None, ..again }];
        }
        let indirect = usize::from(self.setup.limits.max_indirect_segments);
        let most = indirect.max(11);
        let target = match self.rng.percent(70) {
            true => self.rng.range(2, most as u64) as usize,
            false => most,
        };
        let mut parts: Vec<Again> = Vec::new();
        let (mut at, mut sector) = (0, again.spec.sector);
        while at < again.spec.segments.len() {
            let end = end_of_part(&again.spec.segments, at, target);
            let mut spec = Spec::new(operation, sector);
            spec.segments = part(&again.spec.segments, at, end);
            let chosen = spec.segments.len() <= indirect && self.rng.percent(40);
            spec.indirect = chosen || spec.segments.len() > 11;
            sector += spec.sectors();
            parts.push(Again {
                spec,
                number: again.number,
                issued: again.issued,
                id: None,
                contents: again.contents[at..end].to_vec(),
            });
            at = end;
        }
        if let Some(entry) = self.asked.0.get_mut(&again.number) {
            let more = (parts.len() as u32).saturating_sub(1);
            entry.unanswered += more;
            entry.unheard += more;
        }
        parts
    }

    /// Posts a request once more.
    pub(crate) fn post_again(&mut self, again: Again) {
        let time = self.tick();
        // Far away from the identifiers of requests that are made for the first time.
        let id = again.id.unwrap_or(u64::MAX - time);
        let pending = self.pending(&again.spec, again.number, again.issued);
        self.enter(pending, id, &again.contents);
    }
}

/// Returns where a part that begins at `at` ends: a page stays in one part.
fn end_of_part(segments: &[(Gref, u8, u8)], at: usize, target: usize) -> usize {
    let mut end = (at + target).min(segments.len());
    while end < segments.len() && end > at + 1 && matches!(segments[end].0, Gref::Same(_)) {
        end -= 1;
    }
    end
}

fn part(segments: &[(Gref, u8, u8)], at: usize, end: usize) -> Vec<(Gref, u8, u8)> {
    let here = |(gref, first, last): &(Gref, u8, u8)| match gref {
        Gref::Same(i) => (Gref::Same(i.saturating_sub(at)), *first, *last),
        gref => (*gref, *first, *last),
    };
    segments[at..end].iter().map(here).collect()
}
