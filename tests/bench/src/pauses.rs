// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Pauses of a guest's disk when its server changes: another process, another driver, another domain. The result is the
//! longest time without an answer, in virtual time.

use crate::guest::RunningGuest;
use crate::jobs::{BenchJob, JobWork};
use crate::mark::Marks;
use crate::reads::{Reads, ERRORS};
use crate::sample::{self, JobPlace};
use crate::sh;
use anyhow::{bail, ensure, Context, Result};
use serde_json::{json, Map, Value};
use std::collections::BTreeMap;
use std::process::{Command, Output};

/// The drivers to which a disk moves and returns.
const THERE_AND_BACK: [&str; 2] = ["xen-blkback", "xen-blkback-rs"];

/// One change: the seconds without an answer, and other reported times in milliseconds.
struct Pause {
    guest: f64,
    more: Vec<(&'static str, f64)>,
}

/// Measures the job's number of changes, while the guest reads.
pub(crate) fn measure(
    place: &mut JobPlace<'_>,
    number: u32,
    job: &BenchJob,
    marks: &mut Marks,
) -> Result<Map<String, Value>> {
    let JobPlace::Guest(guest) = place else {
        bail!("only a guest waits for who serves its disk");
    };
    let mut pauses = Vec::new();
    let run = sample::around(guest, marks, |guest| {
        pauses = changes(guest, number, job)?;
        Ok(())
    })?;
    let longest = pauses.iter().map(|pause| pause.guest).fold(0.0, f64::max);
    let mut figures = BTreeMap::from([("ms, longest", longest * 1e3)]);
    for (what, value) in pauses.iter().flat_map(|pause| &pause.more) {
        let most = figures.entry(what).or_default();
        *most = most.max(*value);
    }
    let units = job.total(job.count);
    let mut value = Map::new();
    let whole = run.json(units, 1.0 / longest, longest * 1e6);
    value.insert("long".into(), whole);
    value.insert("figures".into(), json!(figures));
    Ok(value)
}

fn changes(guest: &mut RunningGuest, number: u32, job: &BenchJob) -> Result<Vec<Pause>> {
    let reads = Reads::start(guest, number)?;
    if job.work == JobWork::Takeover {
        sh::run(&["modprobe", "xen-blkback", "feature_persistent=1"])?;
    }
    let mut pauses = Vec::new();
    for _ in 0..job.count {
        match job.work {
            JobWork::Handoff => pauses.push(handoff(&reads)?),
            JobWork::Takeover => {
                for driver in THERE_AND_BACK {
                    pauses.push(takeover(&reads, guest.domid(), driver)?);
                }
            }
            JobWork::Move => pauses.push(moved(&reads, guest)?),
            _ => bail!("{} changes nothing", job.name),
        }
    }
    if job.work == JobWork::Takeover {
        sh::run(&["rmmod", "xen_blkback"])?;
    }
    reads.end(guest)?;
    Ok(pauses)
}

/// Hands the disk to a new process. The supervisor reports for how long no process served it.
fn handoff(reads: &Reads) -> Result<Pause> {
    reads.wait(100)?;
    let (guest, output) =
        reads.longest_silence(Command::new("tap-ctl").args(["--json", "handoff", "0"]))?;
    let told = told(&output, "the disk was not handed over")?;
    let unserved = told["pause_us"].as_f64();
    let unserved = unserved.with_context(|| format!("no pause in {told}"))? / 1e3;
    Ok(Pause {
        guest,
        more: vec![("ms, nobody serves", unserved)],
    })
}

/// Moves the disk to another driver, to which its frontend reconnects.
fn takeover(reads: &Reads, domid: &str, to: &str) -> Result<Pause> {
    reads.wait(100)?;
    let program = "xen-blkback-takeover";
    let command = ["--json", "--to", to, "--domain", domid];
    let (guest, output) = reads.longest_silence(Command::new(program).args(command))?;
    told(&output, "the disk was not taken over")?;
    Ok(Pause {
        guest,
        more: Vec::new(),
    })
}

/// Moves the guest to another domain of this host, as to another host.
fn moved(reads: &Reads, guest: &mut RunningGuest) -> Result<Pause> {
    reads.wait(100)?;
    let command = ["migrate", "-s", "", guest.domid(), "xl migrate-receive"];
    let (pause, output) = reads.longest_silence_of_move(Command::new("xl").args(command))?;
    ensure!(
        output.status.success(),
        "the guest was not moved: {}",
        sh::get(ERRORS)?
    );
    guest.follow()?;
    Ok(Pause {
        guest: pause,
        more: Vec::new(),
    })
}

/// Returns the line of JSON that a successful program printed.
fn told(output: &Output, complaint: &str) -> Result<Value> {
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = sh::get(ERRORS)?;
    ensure!(output.status.success(), "{complaint}: {text}{errors}");
    let line = text.lines().find(|line| line.starts_with('{'));
    let line = line.with_context(|| format!("no JSON in {text}"))?;
    serde_json::from_str(line).with_context(|| format!("bad JSON: {line}"))
}
