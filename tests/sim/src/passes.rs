// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Copy of the guest's memory to another host. It is made while the guest runs, in passes: each one copies the pages
//! that were marked as changed since the last one. The last pass runs when the guest is suspended.
//!
//! Changes are marked as in Xen: by a write of the guest's own processors, by a copy to a granted page when it is made,
//! and by the end of a writable mapping. Writes through a mapping are not marked before that end.

use std::collections::BTreeSet;

use crate::frontend::{gref_of, FREE};
use crate::machine::{page, Machine, Page};

/// Copies of the guest's pages, and their state.
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
    /// Marks a page as changed.
    pub(crate) fn mark(&mut self, page: usize) {
        self.dirty.insert(page);
    }

    /// Returns true if a page remains to be copied.
    pub(crate) fn is_copying(&self) -> bool {
        !self.todo.is_empty() || (!self.last && !self.dirty.is_empty())
    }

    /// The guest is suspended: marked pages are copied in a last pass, and later changes are lost.
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

    /// Returns the page as the other host has it.
    pub(crate) fn page(&self, at: usize) -> Page {
        self.there.get(at).cloned().unwrap_or_else(|| page(FREE))
    }
}

impl Machine {
    /// Begins the first pass.
    pub(crate) fn begin_passes(&mut self) {
        self.front.passes = Some(Passes {
            todo: (0..self.front.pages.len()).collect(),
            ..Passes::default()
        });
    }

    /// Returns true if a page remains to be copied to another host.
    pub(crate) fn is_copying(&self) -> bool {
        self.front.passes.as_ref().is_some_and(Passes::is_copying)
    }

    /// Copies some pages. Returns their number.
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

    /// Copies this page now, as if a pass came to it.
    pub(crate) fn pass_by(&mut self, at: usize) {
        let front = &mut self.front;
        if let Some(passes) = front.passes.as_mut().filter(|passes| !passes.last) {
            passes.dirty.remove(&at);
            passes.copy(at, &front.pages);
        }
    }

    /// Checks, when nothing is in flight here any more, that the other host has the guest's memory as it is here:
    /// except for pages of requests without a seen answer, which the guest repeats.
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
            // This is wrong independently of other violations.
            self.problems.push(format!(
                "the other host has other data in pages {missed:?} than the guest has read here"
            ));
        }
    }
}
