// SPDX-License-Identifier: MIT OR Apache-2.0
//! Work of a process for its disk, as the kernel counts it: logged when the process leaves.

use control::supervisor::Kernel;
use std::cell::Cell;
use std::time::{Duration, Instant};

/// The kernel's counts at the start of a process.
#[derive(Debug, Default)]
pub struct ProcessStats(Cell<Option<Began>>);

#[derive(Clone, Copy, Debug)]
struct Began {
    pid: u32,
    at: Instant,
    answered: u64,
    direct: u64,
    replayed: u64,
}

/// The kernel's counts of the time in which a process had the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KernelTotals {
    /// For how long it had it.
    pub(crate) lasted: Duration,
    /// Requests that it answered.
    pub(crate) answered: u64,
    /// Requests that the kernel executed beside it.
    pub(crate) direct: u64,
    /// Requests that it got because an earlier one had not answered them.
    pub(crate) replayed: u64,
}

impl ProcessStats {
    /// A process serves from now on, or does so already.
    pub(crate) fn begin(&self, pid: u32, now: &Kernel) {
        if !self.is_of(pid) {
            self.0.set(Some(Began {
                pid,
                at: Instant::now(),
                answered: now.committed,
                direct: now.direct,
                replayed: now.replayed,
            }));
        }
    }

    /// This process is counted.
    pub(crate) fn is_of(&self, pid: u32) -> bool {
        self.0.get().is_some_and(|began| began.pid == pid)
    }

    /// A process is about to leave, or has left: what it has done, once.
    pub(crate) fn end(&self, pid: u32, now: &Kernel) -> Option<KernelTotals> {
        let began = self.0.get().filter(|began| began.pid == pid)?;
        self.0.set(None);
        Some(KernelTotals {
            lasted: began.at.elapsed(),
            answered: now.committed.saturating_sub(began.answered),
            direct: now.direct.saturating_sub(began.direct),
            replayed: now.replayed.saturating_sub(began.replayed),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::ProcessStats;
    use control::supervisor::Kernel;

    #[test]
    fn each_process_is_told_of_once_and_of_its_own() {
        let at = |committed, direct| Kernel {
            committed,
            direct,
            ..Kernel::default()
        };
        let tally = ProcessStats::default();
        tally.begin(7, &at(100, 10));
        // A pause is no new beginning.
        tally.begin(7, &at(150, 10));
        assert!(tally.end(8, &at(160, 11)).is_none());
        let totals = tally.end(7, &at(160, 11)).expect("it served");
        assert_eq!(
            (totals.answered, totals.direct, totals.replayed),
            (60, 1, 0)
        );
        assert!(tally.end(7, &at(160, 11)).is_none());
    }
}
