// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Time at which a delayed look is due.

/// Time at which a look is due, in nanoseconds. A time that has passed is ignored, because that look has run or is
/// about to. The timer may also fire before its time, by a tick of the kernel's clock.
#[derive(Clone, Copy, Debug)]
pub struct DueTime(u64);

impl DueTime {
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

    /// Notes that the timer has fired, before the look. A look that is too early by a tick asks again, and the time
    /// for which the timer was set, which has not passed yet, must not keep it from that.
    pub fn fired(&mut self) {
        *self = Self::NEVER;
    }
}
