// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl status`: how every disk of the host is, why, and what to do.

#[cfg(test)]
pub(crate) mod fake;
mod format;
mod phy;
mod tap;
pub(crate) mod verdict;

use crate::disks::{self, TypedLine};
use crate::host::xenstore::GuestNames;
use crate::host::{Host, Unread};
use crate::sample::{look, HostSample, Kind, SampledDisk, Supervisor};
use crate::sample_delta::Figures;
use crate::{cli, print, Cli, Error};
use control::stats::Direct;
use control::{Code, ExitStatus, Failure};
use serde::Serialize;
use std::cmp::Reverse;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use verdict::{Limits, Surroundings, Verdict};

pub(crate) use format::named;

/// Facts that no counter shows, so that users do not look for them in the verdicts.
const NOT_KNOWN: [&str; 1] = [
    "how long requests wait in the ring before the driver takes them, or in the guest for room there: nothing says since when, so no disk is called slow for it; how full its rings were is counted",
];

/// A disk and its verdict.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Line {
    /// The guest's number.
    pub(crate) guest: Option<u32>,
    /// The guest's name, if xenstore tells it.
    pub(crate) guest_name: Option<String>,
    /// The word by which a command line names the guest.
    #[serde(skip)]
    pub(crate) guest_word: Option<String>,
    /// Its name in the guest.
    pub(crate) vdev: Option<String>,
    /// Its server.
    pub(crate) kind: Kind,
    /// The number of its node.
    pub(crate) minor: Option<u32>,
    /// The process that serves it.
    pub(crate) pid: Option<u32>,
    /// The image or device from which it is served.
    pub(crate) image: Option<String>,
    /// Its verdict.
    #[serde(flatten)]
    pub(crate) verdict: Verdict,
    /// How bad that is.
    pub(crate) severity: u8,
    /// Work of the kernel for it, beside the process (passthrough).
    pub(crate) direct: Option<Direct>,
    /// Its figures of the time in which it was watched.
    pub(crate) figures: Option<Figures>,
}

/// Verdicts on all disks.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    /// The worst of all severities: 0, 1 or 2, with which the exit code is 0, 1 or 7.
    pub(crate) severity: u8,
    /// One for each disk, the worst first.
    pub(crate) disks: Vec<Line>,
    /// Number of disks that are well and left out.
    #[serde(skip)]
    pub(crate) hidden: usize,
    /// Severity of what is missing for all disks.
    #[serde(skip)]
    pub(crate) of_host: u8,
    /// Why blktapctrl does not answer, if it does not.
    pub(crate) supervisor: Option<String>,
    /// Files that could not be read.
    pub(crate) unread: Vec<Unread>,
    /// Facts that no counter shows.
    pub(crate) not_known: [&'static str; 1],
}

/// Where to look, and for how long.
pub(crate) struct Watch {
    host: Host,
    socket: PathBuf,
    interval: Duration,
    limits: Limits,
}

impl Watch {
    /// Takes the options of the command line.
    pub(crate) fn new(cli: &Cli, watch: &cli::Watch) -> Watch {
        Watch {
            host: Host::at(&cli.root),
            socket: cli.socket.clone(),
            interval: Duration::from_secs(watch.interval.into()),
            limits: Limits {
                slow: Duration::from_millis(watch.slow.into()),
                hung: Duration::from_secs(watch.hung_after.into()),
            },
        }
    }

    /// Looks twice. Where something answers nothing, it looks on until that may be called hung.
    pub(crate) fn looks(&self) -> (HostSample, HostSample) {
        let before = look(&self.host, &self.socket);
        loop {
            std::thread::sleep(self.interval);
            let now = look(&self.host, &self.socket);
            let elapsed = now.at.saturating_duration_since(before.at);
            if elapsed >= self.limits.hung || !is_suspect(&before, &now, self.limits.hung) {
                return (before, now);
            }
        }
    }

    /// Returns the verdicts on all disks from two looks at them.
    pub(crate) fn report(&self, before: &HostSample, now: &HostSample) -> Report {
        report(before, now, self.limits)
    }
}

/// A disk may be hung, and was not watched for long enough to say so.
fn is_suspect(before: &HostSample, now: &HostSample, hung: Duration) -> bool {
    now.disks.iter().any(|disk| {
        let before = disk.among(&before.disks);
        before.is_some_and(|before| match disk.kind {
            Kind::Phy => phy::oldest(disk, hung).is_none() && phy::stall(before, disk).is_some(),
            Kind::Tap => tap::takes_nothing(before, disk),
        })
    })
}

/// Returns the verdicts on all disks.
pub(crate) fn report(before: &HostSample, now: &HostSample, limits: Limits) -> Report {
    let mut disks: Vec<Line> = now
        .disks
        .iter()
        .map(|disk| line(disk, before, now, limits))
        .collect();
    // Those that are as bad stay in the order of guests.
    disks.sort_by_key(|line| Reverse(line.severity));
    let worst = worst(&disks);
    let unread: Vec<Unread> = now.unread.clone();
    let supervisor = match &now.supervisor {
        Supervisor::Silent(why) => Some(why.clone()),
        Supervisor::Answers => None,
    };
    let is_missed = supervisor.is_some() && now.is_supervised;
    let of_host = u8::from(is_missed || !unread.is_empty());
    Report {
        severity: worst.max(of_host),
        hidden: 0,
        of_host,
        disks,
        supervisor,
        unread,
        not_known: NOT_KNOWN,
    }
}

fn worst(disks: &[Line]) -> u8 {
    disks.iter().map(|line| line.severity).max().unwrap_or(0)
}

impl Report {
    /// Leaves the disks that a command line names. The severity is theirs then; disks that are well and left out count.
    ///
    /// # Errors
    /// There are none of that name, or several guests have it.
    fn choose(&mut self, asked: &cli::Status, line: &TypedLine) -> Result<(), Failure> {
        if let Some(name) = &asked.guest {
            let named = self.disks.iter();
            let named = named.filter_map(|disk| Some((disk.guest?, disk.guest_name.clone()?)));
            let names = GuestNames::of(named);
            let guests: Vec<u32> = self.disks.iter().filter_map(|disk| disk.guest).collect();
            let guest = disks::guest(name, &guests, &names, line);
            let guest = guest.map_err(|failure| self.without_supervisor(failure))?;
            self.disks.retain(|disk| disk.guest == Some(guest));
        }
        if let (Some(vdev), Some(name)) = (&asked.vdev, &asked.guest) {
            // A number becomes the name, as the disks have it.
            let wanted = vdev.parse().map_or_else(|_| vdev.clone(), control::vdev);
            let is_its = |disk: &Line| disk.vdev.as_deref() == Some(wanted.as_str());
            if !self.disks.iter().any(is_its) {
                let why = format!("guest {name} has no disk {vdev}: see `tap-ctl status {name}`");
                return Err(Failure::new(Code::NotFound, why));
            }
            self.disks.retain(is_its);
        }
        self.severity = worst(&self.disks).max(self.of_host);
        if asked.sick {
            let all = self.disks.len();
            self.disks.retain(|disk| disk.severity > 0);
            self.hidden = all - self.disks.len();
        }
        Ok(())
    }

    /// Adds to a failure that not all disks are known, if that is so.
    fn without_supervisor(&self, failure: Failure) -> Failure {
        let Some(why) = &self.supervisor else {
            return failure;
        };
        let message =
            format!("{failure} blktapctrl does not answer, so tap disks are not known: {why}");
        Failure { message, ..failure }
    }
}

/// Returns the verdict on a disk of the second look.
pub(crate) fn line(
    disk: &SampledDisk,
    before: &HostSample,
    now: &HostSample,
    limits: Limits,
) -> Line {
    let old = disk.among(&before.disks).unwrap_or(disk);
    let elapsed = now.at.saturating_duration_since(before.at);
    let around = Surroundings {
        elapsed,
        limits,
        stolen: now.processors.stolen_since(&before.processors),
        memory: now.memory,
        guest_kib: guest_kib(now, disk),
    };
    let verdict = match disk.kind {
        Kind::Phy => phy::judge(old, disk, &around),
        Kind::Tap => tap::judge(old, disk, &around, &now.supervisor),
    };
    let row = disk.tap.as_ref().map(|tap| &tap.row);
    let target = row.and_then(|row| row.target.as_ref().map(ToString::to_string));
    Line {
        guest: disk.guest(),
        guest_name: disk.guest_name.clone(),
        guest_word: disk.guest_word.clone(),
        vdev: disk.vdev(),
        kind: disk.kind,
        minor: disk.minor(),
        pid: row.and_then(|row| row.pid),
        image: target.or_else(|| disk.block.as_ref().map(|block| block.label())),
        severity: verdict.state.severity(),
        verdict,
        direct: row.and_then(|row| row.kernel.as_ref()?.by_itself()),
        figures: Figures::between(old, disk, elapsed),
    }
}

/// The memory of all disks of a disk's guest.
fn guest_kib(look: &HostSample, disk: &SampledDisk) -> u64 {
    let guest = disk.guest();
    let its = look.disks.iter().filter(|other| other.guest() == guest);
    its.filter_map(|other| Some(other.vbd.as_ref()?.counter("memory_kib")))
        .sum()
}

/// Says how all disks are.
pub(crate) fn run(cli: &Cli, asked: &cli::Status) -> Result<ExitCode, Error> {
    let watch = Watch::new(cli, &asked.watch);
    let (before, now) = watch.looks();
    let mut report = watch.report(&before, &now);
    report.choose(asked, &TypedLine::own())?;
    if cli.json {
        print(&report)?;
    } else {
        crate::say(&format::text(&report, asked.extended))?;
    }
    Ok(ExitStatus::of_severity(report.severity).into())
}

#[cfg(test)]
mod tests;
