// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! When a failed connect is tried again: arithmetic without a clock, a kernel or xenstore.
//!
//! A *refusal* has a cause that only the frontend can remove, so the frontend has to move first, and a frontend that
//! is refused again and again has to wait longer each time. A *shortage* passes without the frontend, so the driver
//! tries again while the frontend waits.

/// Longest pause after a refusal.
const REFUSAL_MS: u64 = 30_000;
/// Pause after the first shortage. Doubles with each further shortage.
const FIRST_SHORTAGE_MS: u64 = 100;
/// Longest pause after a shortage, and so the longest delay after the shortage has passed.
const SHORTAGE_MS: u64 = 5_000;
/// Time after which one refusal is forgotten. A successful connect forgets none, because a frontend can cause any
/// number of those.
const FORGET_NS: u64 = 30_000_000_000;
const NS_IN_MS: u64 = 1_000_000;

/// Reports whether an error number (positive, as in Linux) stands for a shortage in this domain that may pass.
///
/// EDQUOT is this driver's own limit on memory. EBUSY and EAGAIN also come from xenstore, and ENOSPC from Xen if this
/// domain has no free event channel or no room for more mappings.
#[must_use]
pub fn is_shortage(errno: i32) -> bool {
    const EINTR: i32 = 4;
    const EAGAIN: i32 = 11;
    const ENOMEM: i32 = 12;
    const EBUSY: i32 = 16;
    const ENOSPC: i32 = 28;
    const EDQUOT: i32 = 122;
    matches!(errno, EINTR | EAGAIN | ENOMEM | EBUSY | ENOSPC | EDQUOT)
}

/// Reports whether an error number (positive) of a write to xenstore may go away while the frontend waits.
///
/// xenstored has many names for its quotas, and Linux reads those that it does not know as EINVAL, so only a directory
/// that is gone is final.
#[must_use]
pub fn store_recovers(errno: i32) -> bool {
    const ENOENT: i32 = 2;
    errno != ENOENT
}

/// Failed connects of one device, which decide when the next attempt is allowed.
#[derive(Debug, Default)]
pub struct ConnectRetry {
    refusals: u32,
    shortages: u32,
    refused_at: u64,
    /// Time before which nothing is tried.
    next_at: u64,
}

impl ConnectRetry {
    /// A device that never failed.
    pub const NEW: Self = Self {
        refusals: 0,
        shortages: 0,
        refused_at: 0,
        next_at: 0,
    };

    /// Records a refusal.
    pub fn refused(&mut self, now_ns: u64) {
        let forgotten = now_ns
            .saturating_sub(self.refused_at)
            .checked_div(FORGET_NS);
        let forgotten = u32::try_from(forgotten.unwrap_or(0)).unwrap_or(u32::MAX);
        self.refusals = self.refusals.saturating_sub(forgotten).saturating_add(1);
        self.shortages = 0;
        self.refused_at = now_ns;
        self.pause(now_ns, 1, self.refusals, REFUSAL_MS);
    }

    /// Records a shortage.
    pub fn ran_short(&mut self, now_ns: u64) {
        self.pause(now_ns, FIRST_SHORTAGE_MS, self.shortages, SHORTAGE_MS);
        self.shortages = self.shortages.saturating_add(1);
    }

    /// Records a connect that worked.
    pub fn connected(&mut self) {
        self.shortages = 0;
    }

    /// Returns the milliseconds that the next attempt has to wait; 0 if it may be made now.
    #[must_use]
    pub fn left_ms(&self, now_ns: u64) -> u32 {
        let left = self.next_at.saturating_sub(now_ns).div_ceil(NS_IN_MS);
        u32::try_from(left).unwrap_or(u32::MAX)
    }

    fn pause(&mut self, now_ns: u64, first_ms: u64, doublings: u32, most_ms: u64) {
        let ms = first_ms.saturating_mul(1u64.checked_shl(doublings.min(15)).unwrap_or(1));
        let until = now_ns.saturating_add(ms.min(most_ms).saturating_mul(NS_IN_MS));
        self.next_at = self.next_at.max(until);
    }
}
