// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Checks of the guest on each response, at the moment at which the guest can see it.

use std::collections::BTreeMap;

use ring::abi::{OP_DISCARD, OP_FLUSH_DISKCACHE, OP_READ, OP_WRITE_BARRIER};

use crate::frontend::{gref_of, GuestAnswer, Pending};
use crate::heard::Unheard;
use crate::history::{decode, SECTOR};
use crate::machine::{Machine, MachineFault, Page};
use crate::spec::{Expect, Gref};

impl Machine {
    /// Checks the responses up to `new` at the moment at which the guest can see them.
    pub fn published(&mut self, new: u32) {
        if new.wrapping_sub(self.front.published) > self.ring.size() {
            self.problem(format!(
                "rsp_prod went from {} to {new}",
                self.front.published
            ));
            return;
        }
        while self.front.published != new {
            let index = self.front.published;
            self.front.published = index.wrapping_add(1);
            let slot = self.ring.slot(index);
            let answer = GuestAnswer {
                id: u64::from_le_bytes(slot[..8].try_into().expect("8 bytes")),
                operation: slot[8],
                status: i16::from_le_bytes([slot[10], slot[11]]),
            };
            let padding = slot[9] != 0 || slot[12..16].iter().any(|b| *b != 0);
            if padding {
                self.problem(format!("padding of the response to {:#x}", answer.id));
            }
            self.answered(answer);
        }
    }

    fn answered(&mut self, mut answer: GuestAnswer) {
        if self.commit(MachineFault::WrongId) {
            answer.id ^= 1;
        }
        self.front.answers.push(answer);
        let queue = self.front.pending.get_mut(&answer.id);
        let found = queue.and_then(|queue| {
            // If several requests have one identifier, the answer may belong to any with this operation.
            let at = queue
                .iter()
                .position(|p| p.spec.operation == answer.operation)?;
            queue.remove(at)
        });
        let Some(mut pending) = found else {
            if !self.hosed {
                self.problem(format!(
                    "answer to {:#x}, operation {}, that nobody waits for",
                    answer.id, answer.operation
                ));
            }
            return;
        };
        self.front.outstanding -= 1;
        let time = self.tick();
        self.check_status(&pending, answer.status);
        self.check_wait(&pending);
        let okay = answer.status == 0;
        self.is_answered(pending.number, time, okay);
        if !self.hosed {
            self.check_pages(&pending, okay, time);
        }
        let flushed = [OP_FLUSH_DISKCACHE, OP_WRITE_BARRIER].contains(&pending.spec.operation);
        if okay && flushed {
            self.check_durable(pending.issued);
        }
        if okay && pending.spec.operation == OP_WRITE_BARRIER && !pending.spec.wild {
            // The data that the request wrote, or later writes over it.
            let end = pending.spec.sector.saturating_add(pending.spec.sectors());
            let sectors = self.history.sectors();
            let own = sectors.into_iter();
            let own = own.filter(|s| (pending.spec.sector..end).contains(s));
            self.check_durable_at(own.collect(), time + 1);
        }
        self.give_back(&mut pending);
        self.front.unheard.push_back(Unheard {
            id: answer.id,
            okay,
            pending,
        });
    }

    /// Checks that no request waits for ever if the disk is fair. A discard has at most five pieces. Each of them waits
    /// behind a full ring of requests, and the engine may do as much work before it notices that a piece has ended; and
    /// a request may find a full ring before it is taken.
    fn check_wait(&mut self, pending: &Pending) {
        const RINGS: usize = 2 * 5 + 1;
        let others = self.front.answers.len() - pending.earlier;
        if self.setup.fifo && others > RINGS * self.ring.size() as usize {
            self.problem(format!(
                "request {} was overtaken by {others} others: {:?}",
                pending.number, pending.spec
            ));
        }
    }

    fn check_status(&mut self, pending: &Pending, status: i16) {
        let spec = &pending.spec;
        let bad = &self.setup.bad_sectors;
        let end = spec.sector.saturating_add(spec.sectors().max(spec.discard));
        let touches_bad = spec.sector.max(bad.start) < end.min(bad.end);
        let allowed: &[i16] = match spec.expect {
            Expect::Okay if touches_bad => &[-1],
            Expect::Okay if self.closing && spec.operation == OP_DISCARD => &[0, -1],
            Expect::Okay if self.tap.may_fail() => &[0, -1],
            Expect::Okay => &[0],
            Expect::Error => &[-1],
            Expect::NotSupported => &[-2],
            Expect::Any => &[0, -1, -2],
        };
        if !allowed.contains(&status) {
            let what = format!(
                "request {} (operation {}, {} segments at {}) was answered {status}",
                pending.number,
                spec.operation,
                spec.segments.len(),
                spec.sector
            );
            self.problem(what);
        }
    }

    /// Checks the effect of the request on the guest's pages, at the moment of its answer.
    fn check_pages(&mut self, pending: &Pending, okay: bool, time: u64) {
        let (spec, read) = (&pending.spec, pending.spec.operation == OP_READ);
        let mut expected: BTreeMap<usize, Page> = BTreeMap::new();
        for (index, before) in pending.pages.iter().zip(&pending.before) {
            expected.insert(*index, before.clone());
        }
        let mut sector = spec.sector;
        let mut wrong = Vec::new();
        // A request that fails for a grant may have filled its other pages.
        let granted = |(gref, _, _): &(Gref, u8, u8)| matches!(gref, Gref::Fresh | Gref::Same(_));
        let invalid = matches!(spec.expect, Expect::Error | Expect::NotSupported)
            && spec.segments.iter().all(granted);
        for (index, first, last) in &pending.segments {
            for at in *first..=(*last).min(7) {
                let here = sector;
                sector = sector.wrapping_add(1);
                let Some(index) = index else { continue };
                let range = usize::from(at) * SECTOR..(usize::from(at) + 1) * SECTOR;
                let bytes = &self.front.pages[*index][range.clone()];
                if !read || invalid {
                    continue;
                }
                if okay && !spec.wild {
                    let found = decode(bytes);
                    let explained = self.history.read(here, found, pending.issued, time);
                    wrong.extend(explained.err());
                }
                if let Some(page) = expected.get_mut(index) {
                    page[range].copy_from_slice(bytes);
                }
            }
        }
        // A guest that changes descriptors while the backend reads them has changed them itself.
        let scribbled = spec.indirect && self.setup.scribble;
        for (index, page) in &expected {
            if scribbled && pending.pages.first() == Some(index) {
                continue;
            }
            if self.front.pages[*index] != *page {
                wrong.push(format!(
                    "request {} changed page {index} outside of its segments: {spec:?}",
                    pending.number
                ));
            }
        }
        for what in wrong {
            self.problem(what);
        }
    }

    /// Gives the pages back to the guest, which reads them when it sees the answer.
    fn give_back(&mut self, pending: &mut Pending) {
        for (index, data) in pending.pages.iter().zip(&mut pending.before) {
            let gref = gref_of(*index);
            let left = self.front.lent(gref).saturating_sub(1);
            self.front.by_gref.insert(gref, left);
            if left == 0 && !self.setup.keeps_grants && self.host.mapped(gref) > 0 {
                self.problem(format!("grant {gref} is mapped although all is answered"));
            }
            data.copy_from_slice(&self.front.pages[*index][..]);
        }
    }
}
