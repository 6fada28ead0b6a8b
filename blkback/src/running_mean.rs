// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! A running mean of times, in whole numbers.

/// Approximate number of values that the mean covers.
pub const VALUES: u64 = 8;

/// Returns the running mean after one more value. The caller bounds the value, so that one long time does not outweigh many
/// short ones.
pub fn running_mean(before: u64, now: u64) -> u64 {
    before
        .saturating_sub(before / VALUES)
        .saturating_add(now / VALUES)
}
