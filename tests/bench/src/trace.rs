// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Hypercalls by kind, from a trace of the hypervisor, and threads that are woken.

use crate::jobs::Job;
use crate::mark::Marks;
use crate::sample::{self, Place};
use crate::sh;
use anyhow::{Context, Result};
use serde_json::{json, Value};
use std::collections::BTreeMap;
use std::process::{Command, Stdio};

const FILE: &str = "/tmp/bench.trace";
/// The classes of the scheduler and of hypercalls.
const EVENTS: &str = "0x0022f000";

/// Numbers by a domain and a kind.
type Counts = BTreeMap<String, u64>;

/// Hypercalls per I/O by domain and kind, and threads that were woken: a run less a shorter one, as
/// with all other counts. Tracing costs, so nothing else is measured meanwhile.
pub(crate) fn per_io(place: &mut Place<'_>, job: &Job, devices: &[String]) -> Result<Value> {
    let (few, many) = (job.short(), job.short() * 3);
    statistics(place, "1")?;
    let short = traced(place, &job.fio(devices, few))?;
    let long = traced(place, &job.fio(devices, many))?;
    statistics(place, "0")?;
    let ios = job.total(many - few) as f64;
    let each: BTreeMap<&String, f64> = long
        .iter()
        .map(|(name, count)| {
            let before = short.get(name).copied().unwrap_or(0);
            (name, (*count as f64 - before as f64) / ios)
        })
        .collect();
    Ok(json!(each))
}

/// Switches the statistics of the schedulers: without them nobody counts who is woken.
fn statistics(place: &mut Place<'_>, on: &str) -> Result<()> {
    let line = format!("echo {on} >/proc/sys/kernel/sched_schedstats");
    sh::shell(&line)?;
    place.run(&line).map(drop)
}

fn traced(place: &mut Place<'_>, command: &str) -> Result<Counts> {
    std::fs::write(FILE, "")?;
    let mut tracer = Command::new("xentrace")
        .args(["-D", "-S", "256", "-e", EVENTS, FILE])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start xentrace")?;
    let result = sh::wait_for("the first record of xentrace", || {
        Ok(std::fs::metadata(FILE)?.len() > 0)
    })
    .and_then(|()| sample::printed(place, command, sample::FIO, &mut Marks::ignored()));
    sh::shell(&format!("kill -INT {}", tracer.id()))?;
    tracer.wait()?;
    let (run, _) = result?;
    let summary = sh::shell(&format!("xenalyze -s {FILE} 2>/dev/null"))?;
    std::fs::remove_file(FILE)?;
    let mut counts = parse(&summary);
    for (name, counters) in [("dom0 wakeups", run.dom0), ("guest wakeups", run.guest)] {
        counts.insert(name.to_owned(), counters.wakeups());
    }
    Ok(counts)
}

/// The hypercalls of dom0 and of the guest in a summary of xenalyze.
fn parse(summary: &str) -> Counts {
    let mut counts = Counts::new();
    let mut domain = None;
    for line in summary.lines() {
        if let Some(rest) = line.strip_prefix("|-- Domain ") {
            domain = match rest.split_whitespace().next() {
                Some("0") => Some("dom0"),
                Some("32767" | "32768") | None => None,
                Some(_) => Some("guest"),
            };
        }
        // `    sched_op      [29]:    503`
        let found = line.strip_prefix("    ").and_then(|rest| {
            let (name, rest) = rest.split_once('[')?;
            let (_, count) = rest.split_once("]:")?;
            Some((name.trim(), count.trim().parse::<u64>().ok()?))
        });
        if let (Some(domain), Some((name, count))) = (domain, found) {
            if name.chars().all(|c| c.is_ascii_lowercase() || c == '_') && !name.is_empty() {
                *counts.entry(format!("{domain} {name}")).or_default() += count;
            }
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn hypercalls_by_domain_and_kind() {
        let text = "|-- Domain 0 --|\n cpu affinity: 1\n   [0]:       1 99 {99|99}\n  hypercall  9\n    \
                    sched_op                     [29]:    503\n|-- Domain 1 --|\n    iret     [23]: 7\n\
                    |-- Domain 32767 --|\n    iret     [23]: 8\n";
        let counts = parse(text);
        assert_eq!(counts.len(), 2, "{counts:?}");
        assert_eq!((counts["dom0 sched_op"], counts["guest iret"]), (503, 7));
    }
}
