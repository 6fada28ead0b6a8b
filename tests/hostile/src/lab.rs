// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! What every case works with, and the oracle that looks at dom0 after it.

use crate::disk::{self, Disk};
use crate::leaks::Leaks;
use crate::session::{Session, Shape, KEEPS_GRANTS, WIDE};
use crate::tap::{self, TapDisk};
use crate::vbd::{Mode, Vbd};
use anyhow::{ensure, Context, Result};
use dom0::kmsg::{Kmsg, LOST};
use dom0::xen;
use std::cell::Cell;
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// The bystander's device number.
const BYSTANDER: u32 = 1;

/// Lines that one case may bring into dom0's log, and those for each second that it lasts: the
/// driver limits itself to 10 lines in 5 seconds, of errors and of what becomes of disks each, and the kernel adds
/// one that says how many it left out. A guest must not set the rate.
const LOG_LINES: usize = 40;
const LOG_LINES_A_SECOND: f64 = 4.4;

/// A file in memory, which nobody frees until it is removed.
const PLANTED_MEMORY: &str = "/run/hostile-planted";

/// Time in which a bystander gets its data, whatever a neighbour does.
const RESPONSIVE: Duration = Duration::from_secs(5);

/// The disks of a run.
pub(crate) struct Lab {
    /// A disk with blocks of 512 bytes.
    pub(crate) disk: Disk,
    /// One with blocks of 4096 bytes.
    pub(crate) coarse: Disk,
    /// One on which each I/O takes a while.
    pub(crate) slow: Disk,
    bystander: Session,
    planted: Vec<Session>,
    _other: Disk,
    kmsg: Kmsg,
    baseline: Leaks,
    begun: Instant,
    next: Cell<u32>,
    seed: Cell<u32>,
}

impl Lab {
    /// Makes the disks and connects the bystander. `device` replaces the disk that is attacked.
    pub(crate) fn new(device: Option<&PathBuf>, seed: u64) -> Result<Lab> {
        let make = |name, block, latency| {
            disk::Disk::make(&disk::Shape {
                name,
                block,
                latency,
            })
        };
        let disk = match device {
            Some(path) => Disk::existing(path)?,
            None => make("hostile-disk", 512, Duration::ZERO)?,
        };
        let coarse = make("hostile-coarse", 4096, Duration::ZERO)?;
        let slow = make("hostile-slow", 512, Duration::from_millis(20))?;
        let other = make("hostile-other", 512, Duration::ZERO)?;
        // Nothing of it is mapped while others are looked at.
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
            // The disks hold all that they ever will, so that no case seems to lose memory.
            baseline: Leaks::now()?,
            begun: Instant::now(),
            next: Cell::new(BYSTANDER + 1),
            // CAST: half of it is chance enough for the data of the tests of health.
            seed: Cell::new(seed as u32),
        })
    }

    /// A device number that was not used before.
    pub(crate) fn devid(&self) -> u32 {
        self.next.replace(self.next.get() + 1)
    }

    fn seed(&self) -> u32 {
        let next = self.seed.get().wrapping_mul(1_664_525).wrapping_add(1);
        self.seed.replace(next)
    }

    /// Attaches the disk without connecting.
    pub(crate) fn attach(&self) -> Result<Vbd> {
        Vbd::attach(self.devid(), &self.disk, Mode::ReadWrite)
    }

    /// Attaches a disk and connects.
    pub(crate) fn session_on(&self, disk: &Disk, mode: Mode, shape: Shape) -> Result<Session> {
        Session::start(self.devid(), disk, mode, shape)
    }

    /// Attaches a tap disk and connects.
    pub(crate) fn session_on_tap(&self, disk: &TapDisk, shape: Shape) -> Result<Session> {
        let vbd = Vbd::attach_named(self.devid(), disk.key(), Mode::ReadWrite)?;
        Session::connect(vbd, tap::SECTORS, shape, crate::session::queues(shape)?)
    }

    /// Attaches the disk and connects with two queues of one page.
    pub(crate) fn session(&self) -> Result<Session> {
        self.session_on(&self.disk, Mode::ReadWrite, WIDE)
    }

    /// The session still serves good requests; then it closes as it should.
    pub(crate) fn finish_healthy(&self, mut session: Session) -> Result<()> {
        session.exercise(64, self.seed()).context(
            "after the attack the same connection does not serve good requests any more",
        )?;
        session.finish()
    }

    /// The neighbour's data comes, right and soon.
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

    /// Keeps a connection open that nobody closes, to be found.
    pub(crate) fn plant_session(&mut self) -> Result<()> {
        self.planted.push(self.session()?);
        Ok(())
    }

    /// Keeps memory that nobody frees, to be found.
    pub(crate) fn plant_memory(&mut self) -> Result<()> {
        // More than what dom0 may have got back since the run began.
        std::fs::write(PLANTED_MEMORY, vec![1; 128 << 20])
            .with_context(|| format!("cannot fill {PLANTED_MEMORY}"))
    }

    /// Takes what was planted away.
    pub(crate) fn unplant(&mut self) -> Result<()> {
        match std::fs::remove_file(PLANTED_MEMORY) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let mut planted = self.planted.drain(..);
        planted.try_for_each(Session::finish)
    }

    /// Forgets what was logged before a case.
    pub(crate) fn begin(&mut self) -> Result<()> {
        self.begun = Instant::now();
        xen::take_log()?;
        self.kmsg.take().map(drop)
    }

    /// The oracle after each case: see the fields of this type and its constants.
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

    /// Ends the bystander.
    pub(crate) fn finish(self) -> Result<()> {
        self.bystander.finish()
    }
}
