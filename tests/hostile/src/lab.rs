// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Environment of every case, and the oracle that checks dom0 after it.

use crate::disk::{self, BackingDevice};
use crate::leaks::Leaks;
use crate::session::{FrontendShape, Session, KEEPS_GRANTS, WIDE};
use crate::tap::{self, TapDisk};
use crate::vbd::{Mode, VirtualDisk};
use anyhow::{ensure, Context, Result};
use dom0::kmsg::{Kmsg, LOST};
use dom0::xen;
use std::cell::Cell;
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// The bystander's device number.
const BYSTANDER: u32 = 1;

/// Maximum number of lines that one case may add to dom0's log, without those for each second of its duration. The
/// driver limits itself to 10 lines in 5 seconds, separately for errors and for events of disks, and the kernel adds
/// one with the number of suppressed lines. A guest must not set the rate.
const LOG_LINES: usize = 40;
const LOG_LINES_A_SECOND: f64 = 4.4;

/// A file in memory, which stays allocated until it is removed.
const PLANTED_MEMORY: &str = "/run/hostile-planted";

/// Time in which a bystander must get its data, whatever its neighbour does.
const RESPONSIVE: Duration = Duration::from_secs(5);

/// The disks of a run.
pub(crate) struct Lab {
    /// A disk with blocks of 512 bytes.
    pub(crate) disk: BackingDevice,
    /// A disk with blocks of 4096 bytes.
    pub(crate) coarse: BackingDevice,
    /// A disk on which each I/O takes a while.
    pub(crate) slow: BackingDevice,
    bystander: Session,
    planted: Vec<Session>,
    _other: BackingDevice,
    kmsg: Kmsg,
    baseline: Leaks,
    begun: Instant,
    next: Cell<u32>,
    seed: Cell<u32>,
}

impl Lab {
    /// Makes the disks and connects the bystander. `device` replaces the attacked disk.
    pub(crate) fn new(device: Option<&PathBuf>, seed: u64) -> Result<Lab> {
        let make = |name, block, latency| {
            disk::BackingDevice::make(&disk::DiskShape {
                name,
                block,
                latency,
            })
        };
        let disk = match device {
            Some(path) => BackingDevice::existing(path)?,
            None => make("hostile-disk", 512, Duration::ZERO)?,
        };
        let coarse = make("hostile-coarse", 4096, Duration::ZERO)?;
        let slow = make("hostile-slow", 512, Duration::from_millis(20))?;
        let other = make("hostile-other", 512, Duration::ZERO)?;
        // None of its pages stay mapped while others are tested.
        let keeps = KEEPS_GRANTS.swap(false, Relaxed);
        let bystander = Session::start(BYSTANDER, &other, Mode::ReadWrite, WIDE)
            .context("an honest frontend cannot connect")?;
        KEEPS_GRANTS.store(keeps, Relaxed);
        Ok(Lab {
            disk,
            coarse,
            slow,
            bystander,
            planted: Vec::new(),
            _other: other,
            kmsg: Kmsg::from_now()?,
            // The disks have all of their memory now, so that no case seems to leak.
            baseline: Leaks::now()?,
            begun: Instant::now(),
            next: Cell::new(BYSTANDER + 1),
            // CAST: half of the bits are random enough for the data of the health tests.
            seed: Cell::new(seed as u32),
        })
    }

    /// Returns a device number that was not used before.
    pub(crate) fn devid(&self) -> u32 {
        self.next.replace(self.next.get() + 1)
    }

    fn seed(&self) -> u32 {
        let next = self.seed.get().wrapping_mul(1_664_525).wrapping_add(1);
        self.seed.replace(next)
    }

    /// Attaches the disk without connecting.
    pub(crate) fn attach(&self) -> Result<VirtualDisk> {
        VirtualDisk::attach(self.devid(), &self.disk, Mode::ReadWrite)
    }

    /// Attaches a disk and connects.
    pub(crate) fn session_on(
        &self,
        disk: &BackingDevice,
        mode: Mode,
        shape: FrontendShape,
    ) -> Result<Session> {
        Session::start(self.devid(), disk, mode, shape)
    }

    /// Attaches a tap disk and connects.
    pub(crate) fn session_on_tap(&self, disk: &TapDisk, shape: FrontendShape) -> Result<Session> {
        let vbd = VirtualDisk::attach_named(self.devid(), disk.key(), Mode::ReadWrite)?;
        Session::connect(vbd, tap::SECTORS, shape, crate::session::queues(shape)?)
    }

    /// Attaches the disk and connects with two queues of one page.
    pub(crate) fn session(&self) -> Result<Session> {
        self.session_on(&self.disk, Mode::ReadWrite, WIDE)
    }

    /// Checks that the session still serves good requests; then closes it.
    pub(crate) fn finish_healthy(&self, mut session: Session) -> Result<()> {
        session.exercise(64, self.seed()).context(
            "after the attack the same connection does not serve good requests any more",
        )?;
        session.finish()
    }

    /// Checks that the bystander gets the right data in time.
    pub(crate) fn bystander(&mut self) -> Result<()> {
        let start = Instant::now();
        let seed = self.seed();
        self.bystander
            .exercise(u64::from(seed % 1024), seed)
            .context("another disk of the same dom0 suffers")?;
        let took = start.elapsed();
        ensure!(
            took <= RESPONSIVE,
            "another disk of the same dom0 took {took:?} for three requests"
        );
        Ok(())
    }

    /// Plants an open connection that the oracle must find.
    pub(crate) fn plant_session(&mut self) -> Result<()> {
        self.planted.push(self.session()?);
        Ok(())
    }

    /// Plants allocated memory that the oracle must find.
    pub(crate) fn plant_memory(&mut self) -> Result<()> {
        // More than dom0 may have freed since the run began.
        std::fs::write(PLANTED_MEMORY, vec![1; 128 << 20])
            .with_context(|| format!("cannot fill {PLANTED_MEMORY}"))
    }

    /// Removes planted faults.
    pub(crate) fn unplant(&mut self) -> Result<()> {
        match std::fs::remove_file(PLANTED_MEMORY) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let mut planted = self.planted.drain(..);
        planted.try_for_each(Session::finish)
    }

    /// Skips log lines from before a case.
    pub(crate) fn begin(&mut self) -> Result<()> {
        self.begun = Instant::now();
        xen::take_log()?;
        self.kmsg.take().map(drop)
    }

    /// Runs the oracle after each case: see the fields of this type and its constants.
    pub(crate) fn check(&mut self) -> Result<()> {
        self.bystander()?;
        let mut session = self
            .session()
            .context("after the attack nobody can connect to the disk")?;
        session
            .exercise(128, self.seed())
            .context("after the attack a fresh connection gets no right data")?;
        session.finish()?;
        self.baseline.wait_same(Duration::from_secs(10))?;
        let lines = self.kmsg.take()?;
        let bad: Vec<&String> = lines
            .iter()
            .filter(|line| trouble::in_kernel(line))
            .collect();
        ensure!(bad.is_empty(), "dom0's kernel is in trouble: {bad:#?}");
        let log = xen::take_log()?;
        let log: Vec<&str> = log.iter().map(String::as_str).collect();
        let bad = trouble::in_xen(&log);
        ensure!(bad.is_empty(), "the hypervisor is in trouble: {bad:#?}");
        let seconds = self.begun.elapsed().as_secs_f64();
        let allowed = LOG_LINES + (seconds * LOG_LINES_A_SECOND) as usize;
        ensure!(
            lines.len() <= allowed && !lines.iter().any(|line| line == LOST),
            "the case made dom0 log {} lines, such as {:#?}",
            lines.len(),
            &lines[..lines.len().min(5)]
        );
        Ok(())
    }

    /// Closes the bystander.
    pub(crate) fn finish(self) -> Result<()> {
        self.bystander.finish()
    }
}
