// SPDX-License-Identifier: MIT OR Apache-2.0
//! New nodes, and their numbers.

use super::Registry;
use crate::disk::Disk;
use crate::kernel::{self, Make};
use crate::log::{tell, LogContext};
use crate::ram_files;
use crate::record::Record;
use control::{Code, Failure};
use std::io;
use std::rc::Rc;

impl Registry {
    /// Makes a node and the disk on it. Its record comes first, because an unknown node would stay.
    pub fn make_node(
        &self,
        mut record: Record,
        minor: Option<u32>,
        arena_kib: u32,
    ) -> Result<Rc<Disk>, Failure> {
        let mut from = 0;
        loop {
            record.minor = match minor {
                Some(minor) => minor,
                None => self.free_minor(from)?,
            };
            self.check_unknown(record.minor)?;
            if self.get(record.minor).is_some() {
                let message = format!("there is a disk {} already", record.minor);
                return Err(Failure::new(Code::Exists, message));
            }
            // Memory that an earlier disk of that number may have left is not for this one.
            if let Err(error) = ram_files::remove(&self.folder, record.minor) {
                tell!(
                    error,
                    LogContext::disk(record.minor).because(&error),
                    "cannot remove the memory of disk {}: {error}",
                    record.minor
                );
            }
            record.arena_kib = arena_kib;
            let disk = Disk::new(record.clone());
            self.change(&disk, |_| {})?;
            let make = Make {
                minor: Some(record.minor),
                arena_kib,
                fail_after_s: record.policy.fail_after_s,
                max_deaths: record.policy.max_deaths,
            };
            let error = match self.kernel.create(make) {
                Ok(_) => {
                    self.add(&disk);
                    return Ok(disk);
                }
                Err(error) => error,
            };
            if let Err(error) = self.records.remove(record.minor) {
                tell!(
                    error,
                    LogContext::disk(record.minor).because(&error),
                    "cannot remove the record of disk {}: {error}",
                    record.minor
                );
            }
            // Other programs make nodes, too.
            if minor.is_some() || error.kind() != io::ErrorKind::AlreadyExists {
                return Err(unmade(record.minor, &error));
            }
            from = record.minor.saturating_add(1);
        }
    }

    /// Returns a number for a new disk: of no node, no disk, and no record.
    fn free_minor(&self, mut from: u32) -> Result<u32, Failure> {
        loop {
            let minor = kernel::free_minor(&*self.kernel, from).map_err(|error| {
                Failure::system("cannot ask the kernel for its tap disks", &error)
            })?;
            let ours = self.disks.borrow().contains_key(&minor);
            if !ours && !self.unknown.borrow().contains_key(&minor) {
                return Ok(minor);
            }
            from = minor.saturating_add(1);
        }
    }
}

/// Why a node was not made.
pub(crate) fn unmade(minor: u32, error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::NotFound => Failure::new(
            Code::System,
            "the driver is not loaded, or is an old one: modprobe xen-blkback-rs",
        ),
        _ => Failure::system(format!("cannot make the tap disk {minor}"), error),
    }
}
