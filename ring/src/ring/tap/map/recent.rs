// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Ranges that changed recently, so that the map refuses lookups from before the change.

use crate::ring::tap::extent::Sectors;

/// Number of changes that are remembered. A lookup with an older generation is refused.
pub const REMEMBERED: usize = 64;

/// The last changes. Each has a generation, one more than the change before; generations wrap.
#[derive(Clone, Debug)]
pub(super) struct Recent {
    generation: u32,
    /// The change of generation `g` is at `g % REMEMBERED`.
    ranges: [Sectors; REMEMBERED],
}

impl Recent {
    /// Before the first change, generation 0.
    pub(super) const NONE: Self = Self {
        generation: 0,
        // These generations never existed, so a process that names one is wrong.
        ranges: [Sectors::ALL; REMEMBERED],
    };

    /// Returns the generation of the last change.
    pub(super) fn generation(&self) -> u32 {
        self.generation
    }

    /// Records the change of a range.
    pub(super) fn note(&mut self, range: Sectors) {
        self.generation = self.generation.wrapping_add(1);
        if let Some(place) = self.ranges.get_mut(Self::place(self.generation)) {
            *place = range;
        }
    }

    /// Returns true if no part of a range has changed since generation `since`.
    pub(super) fn is_unchanged(&self, range: &Sectors, since: u32) -> bool {
        let age = self.generation.wrapping_sub(since);
        let later = (0..age).map(|back| Self::place(self.generation.wrapping_sub(back)));
        let remembered = usize::try_from(age).is_ok_and(|age| age <= REMEMBERED);
        remembered
            && later
                .filter_map(|place| self.ranges.get(place))
                .all(|changed| changed.common(range).is_none())
    }

    fn place(generation: u32) -> usize {
        // CAST: a `usize` has 32 bits at least.
        generation as usize % REMEMBERED
    }
}
