// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Looks at the clock, at most two in a pass: when I/O ends, and when I/O is begun. A pass that finds ended I/O
//! once more, after it has begun some, would need a third one; it goes by the second, which is wrong by no more
//! than the time that beginning took.

use crate::engine::backend::Backend;

/// The clock as the passes see it, one after the other.
#[derive(Debug, Default)]
pub(in crate::engine) struct PassClock {
    now: u64,
    looks: u8,
}

impl PassClock {
    /// Begins a pass.
    pub(in crate::engine) fn begin(&mut self) {
        self.looks = 0;
    }

    /// Returns the time in nanoseconds: reads the clock for the first two looks of a pass, then repeats the second.
    #[inline]
    pub(in crate::engine) fn look(&mut self, backend: &impl Backend) -> u64 {
        if self.looks < 2 {
            self.looks = self.looks.wrapping_add(1);
            self.now = backend.now();
        }
        self.now
    }

    /// Returns the time of this pass's last look, or reads the clock if there was none.
    pub(in crate::engine) fn last(&mut self, backend: &impl Backend) -> u64 {
        match self.looks {
            0 => self.look(backend),
            _ => self.now,
        }
    }
}
