// SPDX-License-Identifier: GPL-2.0-only

//! Waiting for the guest's next request without going to sleep.
//!
//! Going to sleep and being woken costs the guest an event, Xen two scheduling decisions and dom0
//! an interrupt and two task switches: more than serving a small request. A queue whose guest
//! comes back soon therefore looks at the ring for a while first, with the guest's events off.
//!
//! The time is bounded and adapts: it grows when a sleep turns out to have been short, shrinks when
//! looking was in vain, and nothing is waited for when anything else could run on this CPU.

use crate::params;
use crate::xen;
use kernel::processor::cpu_relax;

/// The first time that is tried.
const START: u64 = 5_000;
/// Looks between two looks at the clock.
const LOOKS: u32 = 8;

/// Nanoseconds since then; a clock that differs between CPUs may make it a very long time.
fn since(start: u64) -> u64 {
    xen::local_clock().wrapping_sub(start)
}

/// How long one queue looks before it sleeps, in nanoseconds.
#[derive(Debug)]
pub(crate) struct Poller {
    now: u64,
    most: u64,
}

impl Poller {
    /// A queue that has not waited yet.
    pub(crate) fn new() -> Self {
        Self {
            now: 0,
            most: params::poll_nanoseconds(),
        }
    }

    /// Looks until `ready`; returns whether it came to be in the time that is allowed now.
    pub(crate) fn wait(&mut self, mut ready: impl FnMut() -> bool) -> bool {
        if self.now == 0 {
            return false;
        }
        let start = xen::local_clock();
        loop {
            for _ in 0..LOOKS {
                if ready() {
                    return true;
                }
                cpu_relax();
            }
            if xen::cpu_is_wanted() || since(start) > self.now {
                break;
            }
        }
        self.now = self
            .now
            .checked_div(2)
            .filter(|now| *now >= START)
            .unwrap_or(0);
        false
    }

    /// Learns from a sleep that began at `start`.
    pub(crate) fn slept(&mut self, start: u64) {
        if since(start) <= self.most {
            self.now = self
                .now
                .saturating_mul(2)
                .clamp(START.min(self.most), self.most);
        }
    }
}
