// SPDX-License-Identifier: MIT OR Apache-2.0
//! Rows of a list of the disks.

use super::unreadable_records::IgnoredDisk;
use super::Registry;
use crate::kernel::NodeInfo;
use control::supervisor::{Filter, Row};
use control::tapdisk::State;
use control::Failure;
use std::collections::BTreeMap;

impl Registry {
    /// Returns the disks that a filter lets through, ignored ones, nodes without a disk, and processes without a disk.
    ///
    /// # Errors
    /// The kernel does not say which nodes there are.
    pub fn rows(&self, filter: &Filter) -> Result<Vec<Row>, Failure> {
        let mut rows = BTreeMap::new();
        let mut from = 0;
        while let Some(node) = self.node_from(from)? {
            let known = self.disks.borrow().get(&node.minor).map(|disk| disk.row());
            let unknown = || self.unknown.borrow().get(&node.minor).map(IgnoredDisk::row);
            let mut row = known.or_else(unknown).unwrap_or_else(|| Row {
                unknown: Some("it has no record".into()),
                ..empty_row(Some(node.minor), None)
            });
            row.kernel = Some(node.status);
            rows.insert(node.minor, row);
            let Some(next) = node.minor.checked_add(1) else {
                break;
            };
            from = next;
        }
        for disk in self.all() {
            rows.entry(disk.minor).or_insert_with(|| disk.row());
        }
        for (minor, disk) in &*self.unknown.borrow() {
            rows.entry(*minor).or_insert_with(|| disk.row());
        }
        let idle = self.idle.borrow();
        let idle = idle.keys().map(|pid| empty_row(None, Some(*pid)));
        let fits = |row: &Row| {
            let target = row.target.as_ref();
            filter.pid.is_none_or(|pid| row.pid == Some(pid))
                && filter.minor.is_none_or(|minor| row.minor == Some(minor))
                && filter
                    .driver
                    .is_none_or(|driver| target.is_some_and(|target| target.driver() == driver))
                && filter
                    .file
                    .as_deref()
                    .is_none_or(|file| target.is_some_and(|target| target.path() == Some(file)))
        };
        Ok(rows.into_values().chain(idle).filter(fits).collect())
    }

    fn node_from(&self, from: u32) -> Result<Option<NodeInfo>, Failure> {
        self.kernel
            .query(from)
            .map_err(|error| Failure::system("cannot ask the kernel for its tap disks", &error))
    }
}

fn empty_row(minor: Option<u32>, pid: Option<u32>) -> Row {
    Row {
        minor,
        pid,
        state: pid.map(|_| State::Idle),
        kernel: None,
        target: None,
        mode: None,
        vbd: None,
        disk: None,
        restarts: 0,
        doing: None,
        unknown: None,
        stopped: None,
        state_bytes: 0,
        binary: None,
    }
}
