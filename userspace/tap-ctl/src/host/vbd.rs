// SPDX-License-Identifier: MIT OR Apache-2.0
//! The disks of guests, as the bus of Xen's backends shows them, whoever serves them.

use super::{link_name, Host};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// Where the devices of the bus are.
const DEVICES: &str = "/sys/bus/xen-backend/devices";
/// Kinds of devices that are disks: what the drivers of the kernel serve, and blktap's.
const KINDS: [&str; 2] = ["vbd", "vbd3"];

/// Operation of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Operation {
    /// Read.
    Read,
    /// Write.
    Write,
    /// Flush, and what flushes before it writes.
    Flush,
    /// Discard.
    Discard,
}

impl Operation {
    /// All of them.
    pub(crate) const ALL: [Operation; 4] = [
        Operation::Read,
        Operation::Write,
        Operation::Flush,
        Operation::Discard,
    ];

    /// Of several.
    pub(crate) fn plural(self) -> &'static str {
        match self {
            Operation::Read => "reads",
            Operation::Write => "writes",
            Operation::Flush => "flushes",
            Operation::Discard => "discards",
        }
    }

    /// Returns the word that tap-ctl prints for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Flush => "flush",
            Operation::Discard => "discard",
        }
    }
}

/// Major and minor number of a device's node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Number(pub(crate) u32, pub(crate) u32);

/// A guest's disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Vbd {
    /// Its backend's directory in xenstore, as `backend/vbd/3/51712`.
    pub(crate) path: String,
    /// The guest's number.
    pub(crate) guest: u32,
    /// The disk's name in the guest.
    pub(crate) vdev: String,
    /// The driver that serves it.
    pub(crate) driver: Option<String>,
    /// State of the backend, as the guest sees it, such as `Connected`.
    pub(crate) state: Option<String>,
    /// The node of what it is served from: a block device, or one of a process.
    pub(crate) device: Option<Number>,
    /// The driver's counters, by the names of the files.
    pub(crate) counters: BTreeMap<String, u64>,
}

impl Vbd {
    /// A counter; 0 if the driver has none of this name.
    pub(crate) fn counter(&self, name: &str) -> u64 {
        self.counters.get(name).copied().unwrap_or(0)
    }

    /// A counter that only newer drivers have.
    pub(crate) fn counted(&self, name: &str) -> Option<u64> {
        self.counters.get(name).copied()
    }

    /// Requests that it has now, if the driver counts them.
    pub(crate) fn in_flight(&self) -> Option<u64> {
        self.counted("in_flight")
    }

    /// For how long its storage has had the oldest request, if the driver counts that.
    pub(crate) fn oldest(&self) -> Option<Duration> {
        self.counted("oldest_ns").map(Duration::from_nanos)
    }

    /// For how long its queues have kept requests waiting for pages, if the driver counts that.
    pub(crate) fn page_wait(&self) -> Option<Duration> {
        self.counted("page_wait_ns").map(Duration::from_nanos)
    }

    /// How many I/Os of an operation have ended, and what they took, if the driver counts that.
    pub(crate) fn took(&self, operation: Operation) -> Option<(u64, Duration)> {
        let (done, ns) = match operation {
            Operation::Read => ("rd_done", "rd_ns"),
            Operation::Write => ("wr_done", "wr_ns"),
            Operation::Flush => ("f_done", "f_ns"),
            Operation::Discard => ("ds_done", "ds_ns"),
        };
        Some((self.counted(done)?, Duration::from_nanos(self.counted(ns)?)))
    }

    /// Requests of all kinds that were begun.
    pub(crate) fn requests(&self) -> u64 {
        let kinds = ["rd_req", "wr_req", "f_req", "ds_req"];
        kinds.iter().map(|name| self.counter(name)).sum()
    }

    /// True if the guest uses it.
    pub(crate) fn is_connected(&self) -> bool {
        self.state.as_deref() == Some("Connected")
    }
}

/// All of them, in the order of guests and disks.
pub(crate) fn all(host: &Host) -> Vec<Vbd> {
    let folder = host.path(DEVICES);
    let names = host.names(&folder);
    let mut vbds: Vec<(u32, u32, Vbd)> = names
        .iter()
        .filter_map(|name| {
            let (kind, guest, devid) = parts(name)?;
            Some((
                guest,
                devid,
                read(host, &folder.join(name), kind, guest, devid)?,
            ))
        })
        .collect();
    vbds.sort_by_key(|(guest, devid, _)| (*guest, *devid));
    vbds.into_iter().map(|(_, _, vbd)| vbd).collect()
}

/// Kind, guest and number of the disk of `vbd-3-51712`.
fn parts(name: &str) -> Option<(&str, u32, u32)> {
    let mut words = name.split('-');
    let kind = words.next().filter(|kind| KINDS.contains(kind))?;
    let mut number = || words.next()?.parse().ok();
    Some((kind, number()?, number()?))
}

fn read(host: &Host, device: &Path, kind: &str, guest: u32, devid: u32) -> Option<Vbd> {
    let driver = link_name(&device.join("driver"));
    let (number, counters) = match driver {
        Some(_) => (number(host, device), counters(host, device)),
        // The files are the driver's.
        None => (None, BTreeMap::new()),
    };
    let vbd = Vbd {
        path: format!("backend/{kind}/{guest}/{devid}"),
        guest,
        vdev: control::vdev(devid),
        driver,
        state: host.text(&device.join("state")),
        device: number,
        counters,
    };
    if !device.exists() {
        // It was detached meanwhile, so that its files are not there is no trouble.
        host.forget(device);
        return None;
    }
    Some(vbd)
}

fn number(host: &Host, device: &Path) -> Option<Number> {
    let path = device.join("physical_device");
    let text = host.text(&path)?;
    let parts = text.split_once(':').and_then(|(major, minor)| {
        let hex = |text| u32::from_str_radix(text, 16).ok();
        Some(Number(hex(major)?, hex(minor)?))
    });
    match parts {
        // It has not been opened yet.
        Some(Number(0, 0)) => None,
        Some(number) => Some(number),
        None => {
            host.note(&path, format!("`{text}` is not MAJOR:MINOR"));
            None
        }
    }
}

fn counters(host: &Host, device: &Path) -> BTreeMap<String, u64> {
    let folder = device.join("statistics");
    let names = host.names(&folder).into_iter();
    names
        .filter_map(|name| {
            let number = host.number(&folder.join(&name))?;
            Some((name, number))
        })
        .collect()
}

/// The numbers of the nodes that processes serve.
pub(crate) fn process_nodes(host: &Host) -> Vec<Number> {
    let folder = host.path("/sys/class/xentap");
    let names = host.names(&folder).into_iter();
    names
        .filter(|name| name != "xentap!control")
        .filter_map(|name| {
            let text = host.optional(&folder.join(name).join("dev"))?;
            let (major, minor) = text.split_once(':')?;
            Some(Number(major.parse().ok()?, minor.parse().ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::made::{phy, Made};
    use super::{all, process_nodes, Number};

    #[test]
    fn disks_are_read_whoever_serves_them() {
        let made = Made::new();
        phy(&made, "vbd-10-51712", "fd:3");
        phy(&made, "vbd-2-51728", "0:0");
        made.file(
            "/sys/bus/xen-backend/devices/vbd3-2-51712/state",
            "InitWait\n",
        );
        made.file("/sys/bus/xen-backend/devices/vif-2-0/state", "Connected\n");
        let wr_req = "/sys/bus/xen-backend/devices/vbd-10-51712/statistics/wr_req";
        made.file(wr_req, "7\n");
        let host = made.host();
        let vbds = all(&host);
        let paths: Vec<&str> = vbds.iter().map(|vbd| vbd.path.as_str()).collect();
        assert_eq!(
            paths,
            [
                "backend/vbd3/2/51712",
                "backend/vbd/2/51728",
                "backend/vbd/10/51712"
            ]
        );
        assert_eq!(vbds[0].driver, None);
        assert_eq!(vbds[1].device, None);
        assert_eq!(vbds[2].device, Some(Number(253, 3)));
        assert_eq!((vbds[2].counter("wr_req"), vbds[2].requests()), (7, 7));
        assert_eq!(vbds[2].driver.as_deref(), Some("xen-blkback-rs"));
        assert_eq!(host.take_unread(), []);
    }

    #[test]
    fn a_file_that_cannot_be_read_costs_that_number_alone() {
        let made = Made::new();
        phy(&made, "vbd-1-51712", "what");
        let device = "/sys/bus/xen-backend/devices/vbd-1-51712";
        made.unreadable(&format!("{device}/statistics/rd_req"));
        made.file(&format!("{device}/statistics/wr_req"), "5");
        let host = made.host();
        let vbds = all(&host);
        assert_eq!((vbds[0].device, vbds[0].requests()), (None, 5));
        assert_eq!(host.take_unread().len(), 2);
    }

    #[test]
    fn nodes_of_processes_are_known_by_their_class() {
        let made = Made::new();
        made.file("/sys/class/xentap/xentap!0/dev", "240:1\n");
        made.file("/sys/class/xentap/xentap!control/dev", "240:0\n");
        assert_eq!(process_nodes(&made.host()), [Number(240, 1)]);
    }
}
