// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! What a guest does when it hears of an answer: it looks at its pages, keeps what it has read for a while, and uses
//! the pages for something else.

use std::collections::BTreeMap;

use ring::abi::OP_READ;

use crate::frontend::{gref_of, Frontend, Pending, FREE};
use crate::machine::{page, Machine, Page};

/// A request whose answer is in the ring, and of which the guest has not heard.
#[derive(Clone, Debug)]
pub(crate) struct Unheard {
    pub(crate) id: u64,
    pub(crate) okay: bool,
    pub(crate) pending: Pending,
}

/// Pages with what was read, and what that was.
pub(crate) type Kept = Vec<(usize, Page)>;

impl Frontend {
    /// Pages in which is what the guest has read, and what that is.
    fn with_data(&self) -> BTreeMap<usize, &Page> {
        let unheard = self.unheard.iter().map(|unheard| &unheard.pending);
        let unheard =
            unheard.flat_map(|pending| pending.pages.iter().copied().zip(&pending.before));
        let kept = self.kept.iter().flatten().map(|(page, data)| (*page, data));
        unheard.chain(kept).collect()
    }
}

impl Machine {
    /// The guest hears of an answer, and looks at what it has read.
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
                    // A page that stays granted is for the next request, too.
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

    /// A page of its own, not granted to anybody, to which the guest copies what it has read.
    fn bounce(&mut self, data: &Page) -> usize {
        self.choose_unmapped();
        let own = self.front.take_page();
        self.front.grants[own].valid = false;
        self.front.pages[own].copy_from_slice(&data[..]);
        self.front.mark(own);
        own
    }

    /// The guest needs what is in a page no longer.
    fn let_go(&mut self, index: usize) {
        self.front.pages[index].fill(FREE);
        self.front.mark(index);
        self.front.free.push(index);
    }

    /// What must hold when the engine has gone: what no request lends is as the guest has left it.
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
