// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Time at which a delayed look is due.

/// Time at which a look is due, in nanoseconds. A time that has passed is ignored, because that look has run or is
/// about to.
#[derive(Clone, Copy, Debug)]
pub struct Due(u64);

impl Due {
    /// No look is due.
    pub const NEVER: Self = Self(0);

    /// Asks for a look at `wanted`. Returns true if no look is due before that, and the caller must set the timer to
    /// `wanted`.
    pub fn wants(&mut self, now: u64, wanted: u64) -> bool {
        let is_sooner = self.0 <= now || wanted < self.0;
        if is_sooner {
            self.0 = wanted;
        }
        is_sooner
    }
}
