// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The guest's memory on its way to another host. It is copied while the guest runs, in passes: each one copies the
//! pages of which was written down since the last one that they have changed. The last one is made when the guest is
//! suspended.
//!
//! What writes a change down is what does so in Xen: a write of the guest's own processors, a copy to a granted page
//! when it is made, and the end of a mapping that may be written. What is written through a mapping is not seen
//! before that end.

use std::collections::BTreeSet;

use crate::frontend::{gref_of, FREE};
use crate::machine::{page, Machine, Page};

/// Copies of the guest's pages, and what is known of them.
#[derive(Debug, Default)]
pub(crate) struct Passes {
    /// The pages as the other host has them.
    there: Vec<Page>,
    /// Pages that have changed since the pass began.
    dirty: BTreeSet<usize>,
    /// Pages that this pass has yet to copy.
    todo: Vec<usize>,
    /// This is the last one.
    last: bool,
}

impl Passes {
    /// A page has changed.
    pub(crate) fn mark(&mut self, page: usize) {
        self.dirty.insert(page);
    }

    /// True if a page is to be copied.
    pub(crate) fn is_copying(&self) -> bool {
        !self.todo.is_empty() || (!self.last && !self.dirty.is_empty())
    }

    /// The guest is suspended: what has changed is copied, and nothing that changes later.
    pub(crate) fn finish(&mut self) {
        self.last = true;
        self.todo.extend(std::mem::take(&mut self.dirty));
    }

    fn copy(&mut self, at: usize, pages: &[Page]) {
        while self.there.len() < pages.len() {
            self.there.push(page(FREE));
        }
        self.there[at].copy_from_slice(&pages[at][..]);
    }

    /// The page as the other host has it.
    pub(crate) fn page(&self, at: usize) -> Page {
        self.there.get(at).cloned().unwrap_or_else(|| page(FREE))
    }
}

impl Machine {
    /// The first pass begins.
    pub(crate) fn begin_passes(&mut self) {
        self.front.passes = Some(Passes {
            todo: (0..self.front.pages.len()).collect(),
            ..Passes::default()
        });
    }

    /// True if a page is to be copied to another host.
    pub(crate) fn is_copying(&self) -> bool {
        self.front.passes.as_ref().is_some_and(Passes::is_copying)
    }

    /// Some pages are copied. Returns how many.
    pub(crate) fn copy_some(&mut self) -> u64 {
        let most = self.rng.range(1, 16);
        let front = &mut self.front;
        let Some(passes) = &mut front.passes else {
            return 0;
        };
        if passes.todo.is_empty() && !passes.last {
            passes.todo.extend(std::mem::take(&mut passes.dirty));
        }
        for copied in 0..most {
            let Some(at) = passes.todo.pop() else {
                return copied;
            };
            passes.copy(at, &front.pages);
        }
        most
    }

    /// A pass comes by just now and copies this page.
    pub(crate) fn pass_by(&mut self, at: usize) {
        let front = &mut self.front;
        if let Some(passes) = front.passes.as_mut().filter(|passes| !passes.last) {
            passes.dirty.remove(&at);
            passes.copy(at, &front.pages);
        }
    }

    /// When nothing is under way here any more, what the guest has is on the other host as it is here: all but the
    /// pages of requests of which it has heard nothing, for which it asks again.
    pub(crate) fn check_passes(&mut self) {
        let front = &self.front;
        let Some(passes) = &front.passes else {
            return;
        };
        let unheard = front
            .unheard
            .iter()
            .flat_map(|unheard| &unheard.pending.pages);
        let unheard: BTreeSet<usize> = unheard.copied().collect();
        let differs = |at: &usize| {
            let own = front.lent(gref_of(*at)) == 0 && !unheard.contains(at);
            own && passes.page(*at) != front.pages[*at]
        };
        let missed: Vec<usize> = (0..front.pages.len()).filter(differs).collect();
        if !missed.is_empty() {
            // Whatever else is wrong.
            self.problems.push(format!(
                "the other host has other data in pages {missed:?} than the guest has read here"
            ));
        }
    }
}
