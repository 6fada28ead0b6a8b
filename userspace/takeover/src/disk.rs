// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk of a guest as the bus and xenstore show it, and whether another driver may take it.

use crate::host::{BackendDriver, Host};
use std::io;

/// Queues at most that are looked at: more than any driver takes.
const QUEUES: u64 = 64;

/// States of XenBus that matter here.
pub(crate) const CONNECTED: u64 = 4;
const CLOSING: u64 = 5;

/// A device of the bus of backends.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BusDevice {
    /// The guest.
    pub domid: u16,
    /// Its name for the disk, as a number.
    pub handle: u32,
    /// As the bus has it, such as `vbd-3-51712`.
    pub name: String,
}

impl BusDevice {
    /// The device with a name of the bus, if it is a disk that both drivers could serve.
    #[must_use]
    pub fn named(name: &str) -> Option<BusDevice> {
        let (domid, handle) = name.strip_prefix("vbd-")?.split_once('-')?;
        Some(BusDevice {
            domid: domid.parse().ok()?,
            handle: handle.parse().ok()?,
            name: name.to_owned(),
        })
    }

    /// The directory of the backend.
    #[must_use]
    pub fn back(&self, key: &str) -> String {
        format!("backend/vbd/{}/{}/{key}", self.domid, self.handle)
    }
}

/// Keys of a disk in xenstore, of both ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiskKeys {
    front: String,
    /// Name of the disk in the guest, such as `xvda`.
    pub(crate) vdev: String,
    state: u64,
    front_state: u64,
    is_online: bool,
    pub(crate) is_tap: bool,
    queues: u64,
    ring_order: u64,
    segments: u64,
    /// The driver that served it when its guest connected uses persistent grants, and has announced that.
    pub(crate) keeps_grants: bool,
}

/// Why a disk stays with the driver that it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedDisk(pub String);

impl From<io::Error> for RefusedDisk {
    fn from(error: io::Error) -> Self {
        RefusedDisk(error.to_string())
    }
}

/// Returns a disk's name in its guest, or its number there if xenstore does not have the name or cannot be read.
pub(crate) fn vdev(host: &impl Host, device: &BusDevice) -> String {
    let dev = host.read(&device.back("dev")).ok().flatten();
    dev.unwrap_or_else(|| device.handle.to_string())
}

impl DiskKeys {
    pub(crate) fn read(host: &impl Host, device: &BusDevice) -> Result<DiskKeys, RefusedDisk> {
        let number = |path: &str, absent: u64| -> Result<u64, RefusedDisk> {
            let Some(text) = host.read(path)? else {
                return Ok(absent);
            };
            let parsed = text.trim().parse();
            parsed.map_err(|_| RefusedDisk(format!("{path} is `{text}`, which is no number")))
        };
        let back = |key: &str| device.back(key);
        let front = host.read(&back("frontend"))?;
        let front = front.ok_or_else(|| RefusedDisk(format!("{} is missing", back("frontend"))))?;
        let dev = host.read(&back("dev"))?;
        Ok(DiskKeys {
            vdev: dev.unwrap_or_else(|| device.handle.to_string()),
            state: number(&back("state"), 0)?,
            front_state: number(&format!("{front}/state"), 0)?,
            is_online: number(&back("online"), 1)? != 0,
            is_tap: host.read(&back("tap-minor"))?.is_some(),
            queues: number(&format!("{front}/multi-queue-num-queues"), 1)?,
            ring_order: number(&format!("{front}/ring-page-order"), 0)?,
            segments: number(&back("feature-max-indirect-segments"), 0)?,
            keeps_grants: number(&back("feature-persistent"), 0)? != 0,
            front,
        })
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.front_state == CONNECTED || self.state == CONNECTED
    }

    /// Returns true if the disk is being removed.
    pub(crate) fn is_going(&self) -> bool {
        !self.is_online || self.state == CLOSING || self.front_state == CLOSING
    }

    /// Checks that `to` may serve it, without a look at its rings.
    pub(crate) fn check(
        &self,
        limits: OfferedLimits,
        to: BackendDriver,
    ) -> Result<(), RefusedDisk> {
        let no = |why: String| Err(RefusedDisk(why));
        if self.is_tap && to == BackendDriver::C {
            return no("it is a tap disk, which only xen-blkback-rs can serve".into());
        }
        if self.is_going() {
            return no("it is being detached: ask again when that is over".into());
        }
        if !self.is_connected() {
            return Ok(());
        }
        if self.state != CONNECTED || self.front_state != CONNECTED {
            return no(format!(
                "it is neither connected nor not (states {} and {}): ask again",
                self.state, self.front_state
            ));
        }
        let used = [
            ("queues", self.queues, limits.queues),
            ("as order of a ring", self.ring_order, limits.ring_order),
            ("indirect segments", self.segments, limits.segments),
        ];
        for (what, has, may) in used {
            if may.is_some_and(|may| has > may) {
                return no(format!(
                    "its guest uses {has} {what}, and {} takes {}: load that with other parameters",
                    to.module(),
                    may.unwrap_or_default(),
                ));
            }
        }
        match self.queues > QUEUES {
            true => no(format!("its guest says that it has {} queues", self.queues)),
            false => Ok(()),
        }
    }

    /// The guest, which does not ask again, may send what it could send before.
    pub(crate) fn offers_as_much(&self, before: &DiskKeys) -> Result<(), RefusedDisk> {
        let (now, was) = (self.segments, before.segments);
        match !before.is_connected() || now >= was {
            true => Ok(()),
            false => Err(RefusedDisk(format!(
                "its guest may send {was} indirect segments, and the driver takes {now}: load that with other parameters"
            ))),
        }
    }

    /// The first page of each ring.
    pub(crate) fn rings(&self, host: &impl Host) -> Result<Vec<u32>, RefusedDisk> {
        let mut rings = Vec::new();
        for queue in 0..self.queues.min(QUEUES) {
            let dir = match self.queues {
                1 => self.front.clone(),
                _ => format!("{}/queue-{queue}", self.front),
            };
            let mut found = None;
            for key in ["ring-ref0", "ring-ref"] {
                found = found.or(host.read(&format!("{dir}/{key}"))?);
            }
            let found = found.and_then(|text| text.trim().parse().ok());
            rings.push(found.ok_or_else(|| RefusedDisk(format!("{dir} names no ring")))?);
        }
        Ok(rings)
    }

    /// Where the guest says whether it wants its pages kept mapped.
    pub(crate) fn persistent(&self) -> String {
        format!("{}/feature-persistent", self.front)
    }
}

/// Limits of a driver, from the information that it gives before it serves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OfferedLimits {
    /// Queues of a disk.
    pub queues: Option<u64>,
    /// Pages of a ring, as a power of two.
    pub ring_order: Option<u64>,
    /// Segments of an indirect request.
    pub segments: Option<u64>,
}
