// SPDX-License-Identifier: MIT OR Apache-2.0
//! Until when a holder may do I/O, by its own clock.

use rustix::time::{clock_gettime, ClockId};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Duration;

/// The time since this host was booted, those included in which it was suspended. All processes of a host
/// see the same; that of another host means nothing here.
#[must_use]
pub fn now() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    // Neither is negative since the boot.
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanoseconds = u32::try_from(now.tv_nsec).unwrap_or(0);
    Duration::new(seconds, nanoseconds)
}

/// Until when the holder of a lease may do I/O. Copies are the same term.
#[derive(Clone, Debug, Default)]
pub struct Term {
    /// Nanoseconds of [`now`]; 0 when it was never held, the largest number when it has no end.
    until: Arc<AtomicU64>,
}

impl Term {
    /// A term that ends at a time of [`now`].
    #[must_use]
    pub fn new(until: Duration) -> Term {
        let term = Term::default();
        term.set(until);
        term
    }

    /// When it ends, in the time of [`now`], as things are. A heartbeat makes it longer.
    #[must_use]
    pub fn until(&self) -> Duration {
        Duration::from_nanos(self.until.load(Ordering::Acquire))
    }

    /// No I/O from now on, unless a heartbeat makes it longer.
    #[must_use]
    pub fn is_over(&self) -> bool {
        now() >= self.until()
    }

    pub(crate) fn set(&self, until: Duration) {
        let nanoseconds = u64::try_from(until.as_nanos()).unwrap_or(u64::MAX);
        self.until.store(nanoseconds, Ordering::Release);
    }

    pub(crate) fn end(&self) {
        self.until.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::{now, Term};
    use std::time::Duration;

    #[test]
    fn a_term_ends_by_itself_and_for_all_who_know_it() {
        assert!(Term::default().is_over());
        let term = Term::new(now() + Duration::from_secs(3600));
        let copy = term.clone();
        assert!(!copy.is_over());
        term.set(now());
        assert!(copy.is_over());
        term.set(Duration::MAX);
        assert!(!copy.is_over());
        term.end();
        assert!(copy.is_over());
    }
}
