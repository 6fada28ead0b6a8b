// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A guest that writes and verifies while the packages change below it.

use crate::backing::NullBlk;
use crate::cases::{load, verify_job};
use crate::console::GuestJob;
use crate::guest::{AttachedVbd, Config, Guest, GuestKind};
use crate::tap::{self, ServedDisk};
use crate::TestedDriver;
use anyhow::{ensure, Context, Result};
use std::fs;

/// The sizes of the phy disk and of the tap disk's image.
const DEVICE_MIB: u32 = 32;
const IMAGE_MIB: u32 = 16;
/// MiB of each disk that the load uses.
const WRITTEN_MIB: u32 = 8;
/// Microseconds of rest after two I/Os: the host has other things to do, and is emulated.
const REST_US: u32 = 40_000;
/// The file in the guest that ends its work.
const STOP: &str = "/tmp/stop";

/// Writes at random and verifies, again and again.
fn work(vdev: &str) -> String {
    let job = verify_job(&format!("/dev/{vdev}"), WRITTEN_MIB, 200, 512);
    format!("while [ ! -e {STOP} ]; do {job} --thinktime={REST_US} --thinktime_blocks=2 || exit 1; done")
}

/// A tap disk, its image, and what writes there.
struct WorkingTap {
    disk: ServedDisk,
    image: String,
    job: GuestJob,
}

/// The guest, its disks, and its loads.
pub(super) struct WorkingGuest {
    pub(super) guest: Guest,
    device: NullBlk,
    phy: AttachedVbd,
    job: GuestJob,
    tap: Option<WorkingTap>,
}

impl WorkingGuest {
    /// Starts a guest that works on a phy disk.
    pub(super) fn begin() -> Result<WorkingGuest> {
        let device = NullBlk::create(DEVICE_MIB, &[])?;
        let guest = Guest::create(Config::new("life", GuestKind::Pv, 1))?;
        let phy = guest.attach(&format!("phy:{},xvda,w", device.path()))?;
        guest.run(&format!("rm -f {STOP}"))?;
        let job = guest.start(&work("xvda"))?;
        let working = WorkingGuest {
            guest,
            device,
            phy,
            job,
            tap: None,
        };
        working.goes_on()?;
        Ok(working)
    }

    /// Gives it a tap disk to work on, too.
    pub(super) fn add_tap(&mut self) -> Result<()> {
        let image = tap::image("life.img", IMAGE_MIB)?;
        let disk = ServedDisk::attach(
            &self.guest,
            &tap::disk(&format!("aio:{image}"), load::VDEV, "w"),
        )?;
        let job = self.guest.start(&work(load::VDEV))?;
        self.tap = Some(WorkingTap { disk, image, job });
        self.goes_on()
    }

    /// Waits until all of its loads have made progress.
    pub(super) fn goes_on(&self) -> Result<()> {
        load::wait_load(&self.phy)?;
        match &self.tap {
            Some(tap) => load::wait_progress(&tap.disk, 40),
            None => Ok(()),
        }
    }

    /// Its phy disk is served by this driver.
    pub(super) fn is_served_by(&self, driver: TestedDriver) -> Result<()> {
        let serving = self.phy.driver()?;
        ensure!(
            serving == driver.bus_name(),
            "the disk is served by {serving}, not by {}",
            driver.bus_name()
        );
        Ok(())
    }

    /// Its tap disk.
    pub(super) fn disk(&self) -> Result<&ServedDisk> {
        let tap = self.tap.as_ref().context("the guest has no tap disk")?;
        Ok(&tap.disk)
    }

    /// The number of the block device behind its phy disk, as `MAJOR:MINOR`.
    pub(super) fn device(&self) -> Result<String> {
        self.device.number()
    }

    /// More disks come and go, as `phy:` and as `tap:`.
    pub(super) fn attaches_both_ways(&self) -> Result<()> {
        let device = NullBlk::create(DEVICE_MIB, &[])?;
        let image = tap::image("both.img", IMAGE_MIB)?;
        let disks = [
            format!("phy:{},xvdc,w", device.path()),
            format!("tap:aio:{image},xvdc,w"),
        ];
        for disk in disks {
            let vbd = self.guest.attach(&disk).with_context(|| disk.clone())?;
            self.guest
                .run("dd if=/dev/zero of=/dev/xvdc bs=1M count=1 oflag=direct")?;
            self.guest.detach(&vbd)?;
        }
        fs::remove_file(&image)?;
        device.remove()
    }

    /// Ends its loads, which must not have failed, and the guest.
    pub(super) fn end(self) -> Result<()> {
        let guest = self.guest;
        // Both jobs end with that.
        guest.run(&format!("touch {STOP}"))?;
        load::wait_ended(&guest, self.job)?;
        load::compare(&guest, "xvda", &self.device.path(), WRITTEN_MIB)?;
        if let Some(tap) = self.tap {
            load::wait_ended(&guest, tap.job)?;
            load::compare(&guest, load::VDEV, &tap.image, WRITTEN_MIB)?;
            tap.disk.detach(&guest)?;
            fs::remove_file(&tap.image)?;
        }
        guest.detach(&self.phy)?;
        guest.destroy()?;
        self.device.remove()
    }
}
