// SPDX-License-Identifier: MIT OR Apache-2.0
//! All disks: their records, the kernel's information about them, and the processes that wait for one.

mod list;
mod named_memory;
mod nodes;
pub mod unreadable_records;

use crate::disk::{Disk, DiskFate, DiskTable};
use crate::events::Events;
use crate::folder::Folder;
use crate::kernel::{self, Kernel};
use crate::log::{tell, tell_left_out, LineLimit, LogContext};
use crate::process::Process;
use crate::record::{Record, Records};
use crate::store::{relative, Store};
use control::supervisor::{Counted, Mode, PendingOperation, What, Which};
use control::tapdisk::Open;
use control::{Code, Failure};
use named_memory::NamedMemories;
pub use named_memory::PinnedMemory;
pub(crate) use nodes::unmade;
use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use unreadable_records::IgnoredDisk;

/// The disks of this host.
pub struct Registry {
    /// Where sockets and records are.
    pub folder: Folder,
    /// Records of the disks.
    pub records: Box<dyn Records>,
    /// The nodes.
    pub kernel: Box<dyn Kernel>,
    /// Events.
    pub events: Events,
    /// Limit of the log.
    pub limit: OnceCell<Arc<LineLimit>>,
    store: RefCell<Option<Rc<dyn Store>>>,
    disks: Rc<DiskTable>,
    unknown: RefCell<BTreeMap<u32, IgnoredDisk>>,
    /// Processes without a disk.
    idle: RefCell<BTreeMap<u32, Rc<Process>>>,
    memories: NamedMemories,
}

impl Registry {
    /// A registry without disks.
    #[must_use]
    pub fn new(folder: Folder, records: Box<dyn Records>, kernel: Box<dyn Kernel>) -> Rc<Registry> {
        let disks = Rc::<DiskTable>::default();
        Rc::new(Registry {
            events: Events::new(disks.clone(), Some(&folder.events())),
            folder,
            records,
            kernel,
            limit: OnceCell::new(),
            store: RefCell::default(),
            disks,
            unknown: RefCell::default(),
            idle: RefCell::default(),
            memories: NamedMemories::default(),
        })
    }

    /// There is a connection to xenstore from now on, or none any more.
    pub fn use_store(&self, store: Option<Rc<dyn Store>>) {
        self.store.replace(store);
    }

    /// Xenstore, if there is a connection.
    pub fn store(&self) -> Option<Rc<dyn Store>> {
        self.store.borrow().clone()
    }

    /// All disks.
    pub fn all(&self) -> Vec<Rc<Disk>> {
        self.disks.borrow().values().cloned().collect()
    }

    /// A disk by its number.
    pub fn get(&self, minor: u32) -> Option<Rc<Disk>> {
        self.disks.borrow().get(&minor).cloned()
    }

    /// The disk that a process serves, or is about to take over.
    pub fn of_process(&self, process: &Process) -> Option<Rc<Disk>> {
        let serves = |disk: &Rc<Disk>| matches!(&*disk.process.borrow(), Some(its) if std::ptr::eq(&**its, process));
        let is_its = |disk: &Rc<Disk>| serves(disk) || disk.is_successor(process);
        self.all().into_iter().find(is_its)
    }

    /// Returns the log context of a process: its disk, too, if it has or had one.
    pub fn about(&self, process: &Process) -> LogContext {
        let about = process.about();
        let its = self.of_process(process);
        match its.or_else(|| about.minor.and_then(|minor| self.get(minor))) {
            Some(disk) => disk.about().of(process.pid()),
            None => about,
        }
    }

    /// Returns the supervisor's counters of itself.
    pub fn counts(&self) -> Counted {
        Counted {
            events_lost: self.events.lost(),
            traces_failed: self.events.untraced(),
            lines_suppressed: self.limit.get().map_or(0, |limit| limit.suppressed()),
        }
    }

    /// Adds a disk that has a record already.
    pub fn add(&self, disk: &Rc<Disk>) {
        self.disks.borrow_mut().insert(disk.minor, disk.clone());
    }

    /// Nothing is left of a disk.
    pub fn remove(&self, disk: &Disk) {
        if let Err(error) = self.records.remove(disk.minor) {
            tell!(
                error,
                disk.about().because(&error),
                "cannot remove the record of disk {}: {error}",
                disk.minor
            );
        }
        disk.advance(DiskFate::Gone);
        // It says which one it was.
        self.events.add(Some(disk.minor), What::Destroyed);
        self.disks.borrow_mut().remove(&disk.minor);
        self.give_memory_back();
        let left_out = self.limit.get().map_or(0, |limit| limit.gone(disk.minor));
        if left_out > 0 {
            tell_left_out(disk.about(), left_out);
        }
    }

    /// A process waits for a disk.
    pub fn add_idle(&self, process: &Rc<Process>) {
        let mut idle = self.idle.borrow_mut();
        idle.insert(process.pid(), process.clone());
    }

    /// A process that waits for a disk.
    pub fn idle(&self, pid: u32) -> Option<Rc<Process>> {
        self.idle.borrow().get(&pid).cloned()
    }

    /// A process does not wait for a disk any more. True if it did.
    pub fn remove_idle(&self, pid: u32) -> bool {
        self.idle.borrow_mut().remove(&pid).is_some()
    }

    /// The disk that is named.
    ///
    /// # Errors
    /// There is none.
    pub fn find(&self, which: &Which) -> Result<Rc<Disk>, Failure> {
        let vbd = which.vbd.as_deref().map(relative);
        let fits = |disk: &Rc<Disk>| {
            let pid = disk.process.borrow().as_ref().map(|process| process.pid());
            // A caller that names both may name a process that was replaced since.
            which.minor.map_or_else(
                || which.pid.is_none_or(|wanted| pid == Some(wanted)),
                |minor| minor == disk.minor,
            ) && vbd.is_none_or(|vbd| disk.record.borrow().vbd.as_deref() == Some(vbd))
        };
        if which.minor.is_none() && which.pid.is_none() && vbd.is_none() {
            return Err(Failure::invalid(
                "no disk is named: say its minor number, its process or its backend directory",
            ));
        }
        self.all().into_iter().find(fits).ok_or_else(|| {
            let number =
                |name: &str, value: Option<u32>| value.map(|value| format!("{name} {value}"));
            let named = [
                number("the minor number", which.minor),
                number("the process", which.pid),
                vbd.map(|vbd| format!("the directory {vbd}")),
            ];
            let named: Vec<String> = named.into_iter().flatten().collect();
            Failure::new(
                Code::NotFound,
                format!(
                    "there is no disk with {}: see `tap-ctl list`",
                    named.join(" and ")
                ),
            )
        })
    }

    /// Updates the record of a disk. A failure is an event only: the disk continues, and the next supervisor finds out
    /// by its process.
    pub fn note(&self, disk: &Disk) {
        if disk.fate() == DiskFate::Gone {
            return;
        }
        let written = self.records.write(&disk.record.borrow());
        if let Err(error) = written {
            let why = format!("{}", unwritten(disk.minor, &error));
            self.events.add(Some(disk.minor), What::Unknown { why });
        }
    }

    /// Changes the record of a disk; if that fails, nothing is changed.
    ///
    /// # Errors
    /// The record cannot be stored, or the disk is gone.
    pub fn change(&self, disk: &Disk, change: impl FnOnce(&mut Record)) -> Result<(), Failure> {
        if disk.fate() == DiskFate::Gone {
            let message = format!("disk {} is gone", disk.minor);
            return Err(Failure::new(Code::NotFound, message));
        }
        let mut record = disk.record.borrow().clone();
        change(&mut record);
        if disk.fate() != DiskFate::Stays {
            // The next supervisor continues its end, whatever verb has begun.
            record.doing = Some(PendingOperation::Destroy);
        }
        self.records
            .write(&record)
            .map_err(|error| unwritten(disk.minor, &error))?;
        disk.record.replace(record);
        Ok(())
    }

    /// Requests of a disk that processes ever answered; none if the kernel does not say.
    pub fn answered(&self, disk: &Disk) -> u64 {
        self.counted(disk).committed
    }

    /// Returns the number of answered requests, with those that the kernel has executed without the process: those that
    /// its guest knows to be done.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn executed(&self, disk: &Disk) -> Result<u64, Failure> {
        let status = self.status(disk).ok_or_else(|| {
            let why = format!(
                "the kernel does not say what of disk {} is done",
                disk.minor
            );
            Failure::new(Code::System, why)
        })?;
        Ok(status.committed.saturating_add(status.direct))
    }

    /// Returns the kernel's counters of a disk; zeroes if the kernel does not give them.
    pub fn counted(&self, disk: &Disk) -> control::supervisor::Kernel {
        self.status(disk).unwrap_or_default()
    }

    /// Returns the kernel's status of a disk, if it has a node; a failure to read it is logged.
    pub fn status(&self, disk: &Disk) -> Option<control::supervisor::Kernel> {
        match kernel::node(&*self.kernel, disk.minor) {
            Ok(node) => Some(node?.status),
            Err(error) => {
                tell!(
                    warn,
                    disk.about().because(&error),
                    "cannot ask the kernel about disk {}: {error}",
                    disk.minor
                );
                None
            }
        }
    }

    /// Returns the disk of a directory, if it is the requested one, for a caller that repeats the request because the
    /// answer was lost.
    pub fn made_before(&self, vbd: Option<&str>, open: &Open, mode: Mode) -> Option<Rc<Disk>> {
        let vbd = vbd?;
        let mut stay = self
            .all()
            .into_iter()
            .filter(|disk| disk.fate() == DiskFate::Stays);
        stay.find(|disk| {
            let record = disk.record.borrow();
            let same = record.open.as_ref().map(|open| &open.target) == Some(&open.target);
            same && record.mode == mode && record.vbd.as_deref() == Some(vbd)
        })
    }
}

fn unwritten(minor: u32, error: &io::Error) -> Failure {
    Failure::system(
        format!("cannot write down what disk {minor} is (is /run full?)"),
        error,
    )
}
