// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Reaction of a guest to an answer: it checks its pages, keeps the data that it read for a while, and reuses the
//! pages.

use std::collections::BTreeMap;

use ring::abi::OP_READ;

use crate::frontend::{gref_of, Frontend, Pending, FREE};
use crate::machine::{page, Machine, Page};

/// A request whose answer is in the ring, and that the guest has not seen.
#[derive(Clone, Debug)]
pub(crate) struct Unheard {
    pub(crate) id: u64,
    pub(crate) okay: bool,
    pub(crate) pending: Pending,
}

/// Pages with data that was read, and that data.
pub(crate) type Kept = Vec<(usize, Page)>;

impl Frontend {
    /// Returns the pages with data that the guest has read, and that data.
    fn with_data(&self) -> BTreeMap<usize, &Page> {
        let unheard = self.unheard.iter().map(|unheard| &unheard.pending);
        let unheard =
            unheard.flat_map(|pending| pending.pages.iter().copied().zip(&pending.before));
        let kept = self.kept.iter().flatten().map(|(page, data)| (*page, data));
        unheard.chain(kept).collect()
    }
}

impl Machine {
    /// The guest sees an answer, and checks the data that it has read.
    pub(crate) fn hear(&mut self, heard: Unheard) {
        let Unheard { okay, pending, .. } = heard;
        for (index, data) in pending.pages.iter().zip(&pending.before) {
            if self.front.pages[*index] != *data && !self.hosed {
                self.problem(format!("guest page {index} was changed after the answer"));
            }
        }
        self.is_heard(pending.number);
        let keeps = pending.spec.operation == OP_READ && okay && self.habits.keeps_data > 0;
        let pages = pending.pages.into_iter().zip(pending.before);
        let mut kept = Kept::new();
        for (index, data) in pages {
            match keeps {
                true if self.setup.keeps_grants && self.habits.bounces => {
                    // A page that stays granted is reused by the next request.
                    let own = self.bounce(&data);
                    kept.push((own, data));
                    self.let_go(index);
                }
                true => kept.push((index, data)),
                false => self.let_go(index),
            }
        }
        if !kept.is_empty() {
            self.front.kept.push_back(kept);
        }
        while self.front.kept.len() > self.habits.keeps_data {
            for (index, _) in self.front.kept.pop_front().into_iter().flatten() {
                self.let_go(index);
            }
        }
    }

    /// Copies data that was read to a page that is not granted.
    fn bounce(&mut self, data: &Page) -> usize {
        self.choose_unmapped();
        let own = self.front.take_page();
        self.front.grants[own].valid = false;
        self.front.pages[own].copy_from_slice(&data[..]);
        self.front.mark(own);
        own
    }

    /// Frees a page whose data the guest does not need any longer.
    fn let_go(&mut self, index: usize) {
        self.front.pages[index].fill(FREE);
        self.front.mark(index);
        self.front.free.push(index);
    }

    /// Checks, after the engine is gone, that pages which no request lends are as the guest has left them.
    pub fn check_free_pages(&mut self) {
        if self.hosed {
            return;
        }
        let free = page(FREE);
        let data = self.front.with_data();
        let changed = |index: &usize| {
            let own = self.front.lent(gref_of(*index)) == 0;
            own && self.front.pages[*index] != **data.get(index).unwrap_or(&&free)
        };
        let changed: Vec<usize> = (0..self.front.pages.len()).filter(changed).collect();
        for index in changed {
            self.problem(format!("guest page {index} was changed after the answer"));
        }
    }
}
