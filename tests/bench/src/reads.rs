// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A guest that reads one block after the other, and the time of its last answer.

use crate::guest::RunningGuest;
use crate::sh;
use anyhow::{bail, Context, Result};
use std::cell::Cell;
use std::fs::{self, File};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Interval between checks for an answer. The death of a process takes less than 20 ms in total.
pub(crate) const LOOK: Duration = Duration::from_micros(250);
/// File for the errors of a command.
pub(crate) const ERRORS: &str = "/tmp/bench.err";
const DEVICES: &str = "/sys/bus/xen-backend/devices";

/// The reads of one disk.
pub(crate) struct Reads {
    number: u32,
    /// The domain that makes them.
    domain: Cell<u32>,
}

/// Progress of the reads: the domain, and its driver's counter.
type Count = (u32, u64);

impl Reads {
    /// Makes the guest begin, on the disk of this number.
    pub(crate) fn start(guest: &mut RunningGuest, number: u32) -> Result<Reads> {
        guest.run(
            "fio --name=load --filename=/dev/xvda --direct=1 --rw=randread --bs=4k --ioengine=libaio \
             --iodepth=1 --time_based --runtime=3600 >/tmp/load 2>&1 & echo $! >/tmp/load.pid",
        )?;
        let domain = guest.domid().parse().context("a domain has a number")?;
        Ok(Reads {
            number,
            domain: Cell::new(domain),
        })
    }

    /// Stops them; the guest must not have seen an error.
    pub(crate) fn end(self, guest: &mut RunningGuest) -> Result<()> {
        // fio reports its number of errors when it is stopped.
        guest
            .run(
                "kill -TERM $(cat /tmp/load.pid); until grep -q 'err=' /tmp/load; do usleep 10000; done; \
                 grep -q 'err= 0' /tmp/load || { cat /tmp/load; false; }",
            )
            .context("the guest saw that another one serves its disk")?;
        Ok(())
    }

    /// Waits until `more` further reads were answered.
    pub(crate) fn wait(&self, more: u64) -> Result<()> {
        let mut wanted = None;
        sh::wait_every(LOOK, "answers to the guest", || {
            let Some((_, count)) = self.now()? else {
                return Ok(false);
            };
            Ok(count >= *wanted.get_or_insert(count + more))
        })
    }

    /// Returns the longest time without an answer from before a command until after it, in seconds, and its output.
    pub(crate) fn longest_silence(&self, command: &mut Command) -> Result<(f64, Output)> {
        self.silence(command, || Ok(()))
    }

    /// Returns the longest time without an answer for a command that moves the guest to another domain, and finds that
    /// domain.
    pub(crate) fn longest_silence_of_move(&self, command: &mut Command) -> Result<(f64, Output)> {
        self.silence(command, || self.find_domain())
    }

    fn silence(
        &self,
        command: &mut Command,
        follow: impl Fn() -> Result<()>,
    ) -> Result<(f64, Output)> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(ERRORS)?)
            .spawn()
            .with_context(|| format!("cannot start {command:?}: is it installed?"))?;
        let (mut last, mut longest) = (self.now()?, Duration::ZERO);
        let (begun, mut since) = (Instant::now(), Instant::now());
        loop {
            let ended = child.try_wait()?.is_some();
            follow()?;
            let now = self.now()?;
            let is_answered = now.is_some() && now != last;
            if is_answered {
                longest = longest.max(since.elapsed());
                (last, since) = (now, Instant::now());
            }
            if ended && is_answered {
                return Ok((longest.as_secs_f64(), child.wait_with_output()?));
            }
            if begun.elapsed() > sh::LIMIT {
                // An error here does not matter, because the missing answer is the failure.
                drop(child.kill());
                bail!("{command:?} did not end, or the guest got no answer after it");
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Continues with the newest domain that has the disk.
    fn find_domain(&self) -> Result<()> {
        for entry in fs::read_dir(DEVICES).context("the kernel has no backends")? {
            let name = entry?.file_name();
            let found = name.to_str().and_then(|name| self.domain_of(name));
            self.domain.set(self.domain.get().max(found.unwrap_or(0)));
        }
        Ok(())
    }

    /// Returns the driver's counter; `None` if no driver serves the disk. A new domain or driver has answered a read
    /// when the guest sends the second one.
    fn now(&self) -> Result<Option<Count>> {
        let domain = self.domain.get();
        let file = format!("{DEVICES}/vbd-{domain}-{}/statistics/rd_req", self.number);
        let Ok(text) = fs::read_to_string(&file) else {
            return Ok(None);
        };
        let count: u64 = text
            .trim()
            .parse()
            .with_context(|| format!("the driver counts `{text}` reads"))?;
        Ok((count >= 2).then_some((domain, count)))
    }

    /// Returns the domain of a device `vbd-DOMAIN-NUMBER`, if it is this disk.
    fn domain_of(&self, device: &str) -> Option<u32> {
        let (domain, number) = device.strip_prefix("vbd-")?.split_once('-')?;
        (number.parse() == Ok(self.number)).then(|| domain.parse().ok())?
    }
}
