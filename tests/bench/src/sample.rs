// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! One measurement: the work, and the counters during it.
//!
//! Where there are a short and a long run, both are reported, because their difference contains neither start nor end.

use crate::guest::RunningGuest;
use crate::jobs::BenchJob;
use crate::mark::Marks;
use crate::sh;
use anyhow::{Context, Result};
use serde_json::{json, Map, Value};
use std::collections::BTreeMap;
use std::time::Instant;

/// Command that prints the counters before and after each run, where the load is.
const COUNTERS: &str = "grep -E 'blkif|blkback|evtchn:' /proc/interrupts; grep ctxt /proc/stat";

/// Makes a complete file system: a later initialisation would disturb a measurement.
pub(crate) const MKFS: &str = "mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0";

/// Interrupts of disks, and context switches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    events: u64,
    switches: u64,
}

impl Counters {
    /// Reads those of dom0.
    pub(crate) fn of_dom0() -> Result<Counters> {
        Ok(Counters::parse(&sh::shell(COUNTERS)?))
    }

    /// Reads those of the guest.
    pub(crate) fn of_guest(guest: &mut RunningGuest) -> Result<Counters> {
        Ok(Counters::parse(&guest.run(COUNTERS)?))
    }

    fn parse(text: &str) -> Counters {
        let mut found = Counters::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let first = words.next().unwrap_or_default();
            let numbers: Vec<u64> = words.map_while(|word| word.parse().ok()).collect();
            match first {
                "ctxt" => found.switches += numbers.iter().sum::<u64>(),
                _ => found.events += numbers.iter().sum::<u64>(),
            }
        }
        found
    }

    pub(crate) fn since(self, before: Counters) -> Counters {
        Counters {
            events: self.events.saturating_sub(before.events),
            switches: self.switches.saturating_sub(before.switches),
        }
    }

    fn json(self) -> Value {
        json!({"events": self.events, "switches": self.switches})
    }
}

/// Place where a job runs.
pub(crate) enum JobPlace<'a> {
    /// In the guest.
    Guest(&'a mut RunningGuest),
    /// In dom0.
    Dom0,
}

impl JobPlace<'_> {
    /// Runs a command with the counters around it, and returns all output.
    pub(crate) fn run(&mut self, command: &str) -> Result<String> {
        let command = format!("{COUNTERS}; {command}; {COUNTERS}");
        match self {
            JobPlace::Guest(guest) => guest.run(&command),
            JobPlace::Dom0 => sh::shell(&command),
        }
    }
}

/// Counters of a run in the machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RunCounters {
    /// The numbers of the marks before and after it.
    pub(crate) marks: [u64; 2],
    /// Duration in seconds.
    pub(crate) seconds: f64,
    /// Counters of dom0 and of the guest.
    pub(crate) dom0: Counters,
    pub(crate) guest: Counters,
}

impl RunCounters {
    /// Returns it as a line of the report.
    pub(crate) fn json(&self, units: u64, per_second: f64, latency_us: f64) -> Value {
        json!({
            "ios": units, "marks": self.marks, "iops": per_second, "latency_us": latency_us,
            "dom0": self.dom0.json(), "guest": self.guest.json(),
        })
    }

    /// Returns a run of which only the whole time is known as a line of the report.
    pub(crate) fn whole(&self, units: u64) -> Value {
        let rate = if self.seconds > 0.0 {
            units as f64 / self.seconds
        } else {
            0.0
        };
        let each = if units > 0 {
            self.seconds * 1e6 / units as f64
        } else {
            0.0
        };
        self.json(units, rate, each)
    }
}

/// Runs a program such as fio that prints a line with its result; the output before and after that line has the
/// counters.
pub(crate) fn printed(
    place: &mut JobPlace<'_>,
    command: &str,
    line_begins: &str,
    marks: &mut Marks,
) -> Result<(RunCounters, String)> {
    let before = Counters::of_dom0()?;
    let (start, first) = (Instant::now(), marks.set());
    let text = place.run(command)?;
    let last = marks.set();
    let seconds = start.elapsed().as_secs_f64();
    let dom0 = Counters::of_dom0()?.since(before);
    let (early, line, late) = split(&text, line_begins)
        .with_context(|| format!("no result was printed by `{command}`: {text}"))?;
    let guest = Counters::parse(late).since(Counters::parse(early));
    let run = RunCounters {
        marks: [first, last],
        seconds,
        dom0,
        guest,
    };
    Ok((run, line.to_owned()))
}

/// Counts during `what`, which may use the guest.
pub(crate) fn around(
    guest: &mut RunningGuest,
    marks: &mut Marks,
    what: impl FnOnce(&mut RunningGuest) -> Result<()>,
) -> Result<RunCounters> {
    let before = (Counters::of_dom0()?, Counters::of_guest(guest)?);
    let (start, first) = (Instant::now(), marks.set());
    what(guest)?;
    let last = marks.set();
    let seconds = start.elapsed().as_secs_f64();
    let guest = Counters::of_guest(guest)?.since(before.1);
    let dom0 = Counters::of_dom0()?.since(before.0);
    Ok(RunCounters {
        marks: [first, last],
        seconds,
        dom0,
        guest,
    })
}

/// Measures with fio: the short run, unless one of this job on this backend exists, then the long one. A first run is
/// not counted.
pub(crate) fn fio(
    place: &mut JobPlace<'_>,
    job: &BenchJob,
    devices: &[String],
    marks: &mut Marks,
    short: Option<Value>,
) -> Result<Map<String, Value>> {
    place.run(&job.warm_up(devices))?;
    let mut measure = |count: u32| -> Result<Value> {
        let (run, line) = printed(place, &job.fio(devices, count), FIO, marks)?;
        let result =
            Fio::parse(&line).with_context(|| format!("fio printed a broken line: {line}"))?;
        let mut value = run.json(job.total(count), result.iops, result.latency);
        value["percentiles"] = json!(result.percentiles);
        Ok(value)
    };
    let short = match short {
        Some(short) => short,
        None => measure(job.short())?,
    };
    let long = measure(job.count)?;
    let runs = [("short".to_owned(), short), ("long".to_owned(), long)];
    Ok(runs.into_iter().collect())
}

/// Start of fio's line.
pub(crate) const FIO: &str = "3;fio-";

/// Splits a text into the part before the line with this start, the line, and the part after it. An error may have
/// these words further on in its line, which is not a result.
fn split<'a>(text: &'a str, begins: &str) -> Option<(&'a str, &'a str, &'a str)> {
    let start = if text.starts_with(begins) {
        0
    } else {
        text.find(&format!("\n{begins}"))? + 1
    };
    let end = text[start..].find('\n').map_or(text.len(), |at| start + at);
    Some((&text[..start], &text[start..end], &text[end..]))
}

/// A result of fio.
#[derive(Debug, PartialEq)]
struct Fio {
    iops: f64,
    latency: f64,
    /// Latency in microseconds that this percentage of the I/Os did not exceed; the slower of reads and writes.
    percentiles: BTreeMap<&'static str, f64>,
}

/// The reported percentiles, as fio writes them.
const PERCENTILES: [(&str, &str); 3] = [
    ("p50", "50.000000%"),
    ("p99", "99.000000%"),
    ("p99.9", "99.900000%"),
];

impl Fio {
    /// Reads a line of fio's terse format, version 3.
    fn parse(line: &str) -> Option<Fio> {
        let fields: Vec<&str> = line.trim().split(';').collect();
        let number = |index: usize| fields.get(index)?.parse::<f64>().ok();
        let (reads, writes) = (number(7)?, number(48)?);
        let (read_latency, write_latency) = (number(39)?, number(80)?);
        let iops = reads + writes;
        let percentile = |wanted: &str| {
            let of = |part: std::ops::Range<usize>| {
                let mut pairs = fields.get(part)?.iter().filter_map(|f| f.split_once('='));
                pairs.find(|(name, _)| *name == wanted)?.1.parse().ok()
            };
            Some(f64::max(of(17..37)?, of(58..78).unwrap_or(0.0)))
        };
        let percentiles = PERCENTILES
            .iter()
            .filter_map(|(name, wanted)| Some((*name, percentile(wanted)?)));
        (iops > 0.0).then(|| Fio {
            iops,
            latency: (reads * read_latency + writes * write_latency) / iops,
            percentiles: percentiles.collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{split, Counters, Fio, FIO};

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
    fn an_error_that_has_the_word_of_a_result_is_none() {
        let text = "ctxt 1\ncp: error writing '/tmp/copied/from'\nctxt 2\n";
        assert_eq!(split(text, "copied"), None);
        let found = split("copied\nctxt 2\n", "copied").unwrap();
        assert_eq!(found, ("", "copied", "\nctxt 2\n"));
    }

    #[test]
    fn line_of_fio() {
        let mut fields = vec!["0"; 130];
        (fields[0], fields[1]) = ("3", "fio-3.39");
        (fields[7], fields[48], fields[39], fields[80]) = ("300", "100", "10", "30");
        (fields[17 + 6], fields[58 + 6]) = ("50.000000%=8", "50.000000%=28");
        (fields[17 + 12], fields[58 + 12]) = ("99.000000%=90", "99.000000%=50");
        let line = fields.join(";");
        let text = format!("ctxt 1\n{line}\nctxt 2\n");
        let (early, found, late) = split(&text, FIO).unwrap();
        assert_eq!((early, late.trim()), ("ctxt 1\n", "ctxt 2"));
        assert_eq!(
            Fio::parse(found).unwrap(),
            Fio {
                iops: 400.0,
                latency: 15.0,
                percentiles: [("p50", 28.0), ("p99", 90.0)].into(),
            }
        );
        assert_eq!(Fio::parse("3;fio-3.39;bench"), None);
    }
}
