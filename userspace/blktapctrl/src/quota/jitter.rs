// SPDX-License-Identifier: MIT OR Apache-2.0
//! Numbers that look like chance, the same each time.

use std::time::Duration;

pub(super) struct QuotaRng(pub(super) u64);

impl QuotaRng {
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    pub(super) fn ms(&mut self, limit: u64) -> Duration {
        Duration::from_millis(self.below(limit))
    }
}
