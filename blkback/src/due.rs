// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! When a look that was put off is due.

/// A look that is due then, in nanoseconds. One that was due is forgotten: it has run, or is about to.
#[derive(Clone, Copy, Debug)]
pub struct Due(u64);

impl Due {
    /// None is.
    pub const NEVER: Self = Self(0);

    /// Takes in that a look is wanted at `wanted`. True if none is due before that: the timer is to be set to it.
    pub fn wants(&mut self, now: u64, wanted: u64) -> bool {
        let is_sooner = self.0 <= now || wanted < self.0;
        if is_sooner {
            self.0 = wanted;
        }
        is_sooner
    }
}
