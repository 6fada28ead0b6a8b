// SPDX-License-Identifier: MIT OR Apache-2.0
//! Access to a host, behind a trait, so that tests need no Xen.

use crate::disk::{BusDevice, OfferedLimits};
use crate::module_exchange::Modules;
use crate::rings::RingHead;
use serde::{Deserialize, Serialize};
use std::io;
use std::time::Duration;

/// A driver that serves disks of guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BackendDriver {
    /// `xen-blkback-rs`.
    #[serde(rename = "xen-blkback-rs")]
    Rs,
    /// The C driver, `xen-blkback`.
    #[serde(rename = "xen-blkback")]
    C,
}

impl BackendDriver {
    /// Both.
    pub const ALL: [BackendDriver; 2] = [BackendDriver::Rs, BackendDriver::C];

    /// The name of its module.
    #[must_use]
    pub fn module(self) -> &'static str {
        match self {
            BackendDriver::Rs => "xen-blkback-rs",
            BackendDriver::C => "xen-blkback",
        }
    }

    /// Its name on the bus.
    #[must_use]
    pub fn bus_name(self) -> &'static str {
        match self {
            BackendDriver::Rs => "xen-blkback-rs",
            BackendDriver::C => "vbd",
        }
    }

    /// The other one.
    #[must_use]
    pub fn other(self) -> BackendDriver {
        match self {
            BackendDriver::Rs => BackendDriver::C,
            BackendDriver::C => BackendDriver::Rs,
        }
    }
}

/// An attempt that has begun, and that the next one has to put right if this one does not finish.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BegunAttempt {
    /// Guests. Each is paused once more than it was, or about to be.
    pub guests: Vec<u16>,
    /// Their disks, by their names on the bus.
    pub disks: Vec<String>,
    /// The driver that served them.
    pub from: BackendDriver,
    /// Its module is exchanged.
    #[serde(default)]
    pub exchange: bool,
}

/// The host.
pub trait Host {
    /// Returns all disks of guests, and their drivers: nothing if none of the two serves a disk.
    fn devices(&self) -> io::Result<Vec<(BusDevice, Option<BackendDriver>)>>;
    /// Returns the driver that serves a disk now.
    fn driver(&self, device: &BusDevice) -> io::Result<Option<BackendDriver>>;
    /// The value of a key of xenstore, relative to our domain or absolute; nothing if there is no such key.
    fn read(&self, key: &str) -> io::Result<Option<String>>;
    /// Writes a key of xenstore.
    fn write(&self, key: &str, value: &str) -> io::Result<()>;
    /// The state of a disk becomes one that says of no driver that it serves, unless the toolstack is taking the disk
    /// away: false then.
    fn renew(&self, device: &BusDevice) -> io::Result<bool>;
    /// Loads a driver's module, whatever the host's settings say of it.
    fn load(&self, driver: BackendDriver) -> io::Result<()>;
    /// Unloads a driver's module, which must serve no disk.
    fn unload(&self, driver: BackendDriver) -> io::Result<()>;
    /// A driver's module is loaded.
    fn is_loaded(&self, driver: BackendDriver) -> io::Result<bool>;
    /// Returns the installed and the loaded module.
    fn modules(&self) -> io::Result<Modules>;
    /// A copy was kept of another module than the one that is loaded.
    fn has_other_copy(&self) -> bool;
    /// Loads the copy of the module that was there before.
    fn load_back(&self) -> io::Result<()>;
    /// Sets whether the bus gives a driver that is loaded the devices that have none.
    fn set_autoprobe(&self, is_on: bool) -> io::Result<()>;
    /// The supervisor of tap disks answers, or there are none.
    fn ask_supervisor(&self) -> io::Result<()>;
    /// Has all tap disks let go of the module, if there are any.
    fn park(&self) -> io::Result<()>;
    /// Resumes the parked tap disks, if there are any.
    fn unpark(&self) -> io::Result<()>;
    /// Returns the limits of a driver.
    fn limits(&self, driver: BackendDriver) -> OfferedLimits;
    /// Stops the processors of a guest. Such calls add up; one that fails has done nothing.
    fn pause(&self, domid: u16) -> io::Result<()>;
    /// Takes one of those back, or has done nothing if it fails.
    fn unpause(&self, domid: u16) -> io::Result<()>;
    /// The head of a ring of a guest.
    fn ring(&self, domid: u16, reference: u32) -> io::Result<RingHead>;
    /// Takes a disk from its driver. It fails if that takes long; then it may happen later.
    fn unbind(&self, driver: BackendDriver, device: &BusDevice) -> io::Result<()>;
    /// Gives a disk that has no driver to one.
    fn bind(&self, driver: BackendDriver, device: &BusDevice) -> io::Result<()>;
    /// Remembers what has begun, in place of what it remembered before.
    fn remember(&self, begun: Option<&BegunAttempt>) -> io::Result<()>;
    /// Returns the remembered attempt, also of a process that has ended since.
    fn remembered(&self) -> io::Result<Option<BegunAttempt>>;
    /// Waits for a moment.
    fn sleep(&self, time: Duration);
    /// Time that only grows.
    fn now(&self) -> Duration;
    /// Whether the user wants to interrupt this.
    fn is_interrupted(&self) -> bool;
}
