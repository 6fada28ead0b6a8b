// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Hypercalls by kind, from a trace of the hypervisor.

use crate::jobs::Job;
use crate::sample::Place;
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

/// Hypercalls per I/O by domain and kind: a run less a shorter one, as with all other counts. Tracing
/// costs, so nothing else is measured meanwhile.
pub(crate) fn per_io(place: &mut Place<'_>, job: &Job) -> Result<Value> {
    let (few, many) = (job.short(), job.short() * 3);
    let short = traced(|| place.run(job, few))?;
    let long = traced(|| place.run(job, many))?;
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

fn traced(run: impl FnOnce() -> Result<String>) -> Result<Counts> {
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
    .and_then(|()| run());
    sh::shell(&format!("kill -INT {}", tracer.id()))?;
    tracer.wait()?;
    result?;
    let summary = sh::shell(&format!("xenalyze -s {FILE} 2>/dev/null"))?;
    std::fs::remove_file(FILE)?;
    Ok(parse(&summary))
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
