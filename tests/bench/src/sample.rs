// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! One measurement: a job run short and long, with the counters of both.

use crate::guest::Guest;
use crate::jobs::Job;
use crate::mark::Marks;
use crate::sh;
use anyhow::{Context, Result};
use serde_json::{json, Value};

/// What is printed before and after each run, where the load is.
const COUNTERS: &str = "grep -E 'blkif|blkback|evtchn:' /proc/interrupts; grep ctxt /proc/stat";

/// Interrupts of disks, and context switches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counters {
    events: u64,
    switches: u64,
}

impl Counters {
    fn parse(text: &str) -> Counters {
        let mut found = Counters::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let first = words.next().unwrap_or_default();
            let numbers = words
                .map_while(|word| word.parse::<u64>().ok())
                .sum::<u64>();
            if first == "ctxt" {
                found.switches += numbers;
            } else {
                found.events += numbers;
            }
        }
        found
    }

    fn since(self, before: Counters) -> Counters {
        Counters {
            events: self.events.saturating_sub(before.events),
            switches: self.switches.saturating_sub(before.switches),
        }
    }

    fn json(self) -> Value {
        json!({"events": self.events, "switches": self.switches})
    }
}

/// Where a job runs.
pub(crate) enum Place<'a> {
    /// In the guest.
    Guest(&'a mut Guest),
    /// In dom0, on this device.
    Dom0(&'a str),
}

impl Place<'_> {
    /// Runs `count` I/Os a process and returns what was printed.
    pub(crate) fn run(&mut self, job: &Job, count: u32) -> Result<String> {
        let (device, guest) = match self {
            Place::Guest(guest) => ("/dev/xvda", Some(guest)),
            Place::Dom0(device) => (*device, None),
        };
        let command = format!("{COUNTERS}; {}; {COUNTERS}", job.command(device, count));
        match guest {
            Some(guest) => guest.run(&command),
            None => sh::shell(&command),
        }
    }
}

/// One run and its counters as JSON.
fn run(place: &mut Place<'_>, job: &Job, count: u32, marks: &mut Marks) -> Result<Value> {
    let before = Counters::parse(&sh::shell(COUNTERS)?);
    let first = marks.set();
    let text = place.run(job, count)?;
    let last = marks.set();
    let dom0 = Counters::parse(&sh::shell(COUNTERS)?).since(before);
    let (early, line, late) =
        split(&text).with_context(|| format!("fio printed no result for {}: {text}", job.name))?;
    let guest = Counters::parse(late).since(Counters::parse(early));
    let result = Fio::parse(line).with_context(|| format!("fio printed a broken line: {line}"))?;
    Ok(json!({
        "ios": job.total(count), "marks": [first, last], "iops": result.iops, "latency_us": result.latency,
        "dom0": dom0.json(), "guest": guest.json(),
    }))
}

/// The measurement: the short run, then the long one.
pub(crate) fn take(place: &mut Place<'_>, job: &Job, marks: &mut Marks) -> Result<Value> {
    let short = run(place, job, job.short(), marks)?;
    let long = run(place, job, job.count, marks)?;
    Ok(json!({"short": short, "long": long}))
}

/// A run that nobody looks at: who comes first must not pay for what is cold.
pub(crate) fn warm_up(place: &mut Place<'_>, job: &Job) -> Result<()> {
    place.run(job, job.short()).map(drop)
}

/// What comes before fio's line, the line, and what comes after.
fn split(text: &str) -> Option<(&str, &str, &str)> {
    let start = text.find("3;fio-")?;
    let end = text[start..].find('\n').map_or(text.len(), |at| start + at);
    Some((&text[..start], &text[start..end], &text[end..]))
}

/// A result of fio.
#[derive(Debug, PartialEq)]
struct Fio {
    iops: f64,
    latency: f64,
}

impl Fio {
    /// Reads a line of fio's terse format, version 3.
    fn parse(line: &str) -> Option<Fio> {
        let fields: Vec<&str> = line.trim().split(';').collect();
        let number = |index: usize| fields.get(index)?.parse::<f64>().ok();
        let (reads, writes) = (number(7)?, number(48)?);
        let (read_latency, write_latency) = (number(39)?, number(80)?);
        let iops = reads + writes;
        (iops > 0.0).then(|| Fio {
            iops,
            latency: (reads * read_latency + writes * write_latency) / iops,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{split, Counters, Fio};

    #[test]
    fn counters_are_summed() {
        let text = " 70:  5  7 xen-dyn -event blkif-backend\n71: 1 1 xen-dyn blkif\nctxt 900\n";
        let found = Counters::parse(text);
        assert_eq!(
            found,
            Counters {
                events: 14,
                switches: 900
            }
        );
    }

    #[test]
    fn line_of_fio() {
        let mut fields = vec!["0"; 130];
        (fields[0], fields[1]) = ("3", "fio-3.39");
        (fields[7], fields[48], fields[39], fields[80]) = ("300", "100", "10", "30");
        let line = fields.join(";");
        let text = format!("ctxt 1\n{line}\nctxt 2\n");
        let (early, found, late) = split(&text).unwrap();
        assert_eq!((early, late.trim()), ("ctxt 1\n", "ctxt 2"));
        assert_eq!(
            Fio::parse(found).unwrap(),
            Fio {
                iops: 400.0,
                latency: 15.0
            }
        );
        assert_eq!(Fio::parse("3;fio-3.39;bench"), None);
    }
}
