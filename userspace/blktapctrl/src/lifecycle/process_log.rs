// SPDX-License-Identifier: MIT OR Apache-2.0
//! Logs the work of a process for its disk when it leaves the disk.

use super::Lifecycle;
use crate::disk::Disk;
use crate::log::tell;
use crate::process_stats::KernelTotals;

impl Lifecycle {
    /// The process of a disk serves it: from now on it is counted what it does.
    pub(crate) fn count(&self, disk: &Disk) {
        let pid = disk.process.borrow().as_ref().map(|process| process.pid());
        if let Some(pid) = pid {
            disk.tally.begin(pid, &self.registry.counted(disk));
        }
    }

    /// Says what a process of a disk has done that leaves it, while the kernel still knows. Of who never served there is
    /// nothing to say.
    pub(super) fn tell_totals(&self, disk: &Disk, pid: u32) {
        if !disk.tally.is_of(pid) {
            return;
        }
        let now = self.registry.status(disk);
        let Some(totals) = now.and_then(|now| disk.tally.end(pid, &now)) else {
            return;
        };
        let KernelTotals {
            lasted,
            answered,
            direct,
            replayed,
        } = totals;
        tell!(
            info,
            disk.about().of(pid),
            seconds = lasted.as_secs(),
            answered = answered,
            direct = direct,
            replayed = replayed,
            "disk {}: tapdisk {pid} has left it after {} s: {answered} requests answered, {direct} executed by the kernel beside it, {replayed} taken over from an earlier process",
            disk.minor,
            lasted.as_secs()
        );
    }
}
