// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The lines that the measuring program reports, put together with the counters of the plugin.

use super::counts::{self, Counters, Modules, Places};
use super::result::{Figure, Named, Results, Row, VERSION};
use anyhow::{bail, ensure, Context, Result};
use serde::Deserialize;
use std::collections::BTreeMap;

/// The version of the lines that this file understands.
const FORMAT: u32 = 1;

#[derive(Debug, Deserialize)]
struct Plan {
    format: u32,
    rounds: u32,
    backends: Vec<Named>,
    jobs: Vec<Named>,
}

/// Interrupts of disks and context switches in one domain.
#[derive(Debug, Deserialize)]
struct Domain {
    events: u64,
    switches: u64,
}

/// One run of a job.
#[derive(Debug, Deserialize)]
struct Run {
    ios: u64,
    marks: [usize; 2],
    iops: f64,
    latency_us: f64,
    dom0: Domain,
    guest: Domain,
}

#[derive(Debug, Deserialize)]
struct Sample {
    backend: String,
    job: String,
    short: Run,
    long: Run,
    #[serde(default)]
    hypercalls: BTreeMap<String, f64>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Line {
    Plan(Plan),
    Modules { modules: Vec<(String, String)> },
    Sample { sample: Sample },
    Failed { failed: String },
    Done { done: bool },
}

/// Takes the lines as they come.
#[derive(Debug, Default)]
pub(crate) struct Collector {
    plan: Option<Plan>,
    modules: Modules,
    samples: Vec<(Sample, Modules)>,
    failed: Option<String>,
    done: bool,
    news: Option<String>,
}

impl Collector {
    /// Takes one line.
    pub(crate) fn line(&mut self, line: &str) {
        match serde_json::from_str(line) {
            Ok(Line::Plan(plan)) => self.plan = Some(plan),
            Ok(Line::Modules { modules }) => self.modules = addresses(&modules),
            Ok(Line::Sample { sample }) => {
                self.news = Some(format!(
                    "{:10} {:12} {:8.0} IOPS",
                    sample.backend, sample.job, sample.long.iops
                ));
                self.samples.push((sample, self.modules.clone()));
            }
            Ok(Line::Failed { failed }) => self.failed = Some(failed),
            Ok(Line::Done { done }) => self.done = done,
            Err(error) => self.failed = Some(format!("no line of a report ({error}): `{line}`")),
        }
    }

    /// What the last line told, once.
    pub(crate) fn progress(&mut self) -> Option<String> {
        self.news.take()
    }

    /// Puts it all together.
    pub(crate) fn results(self, marks: &[Counters]) -> Result<Results> {
        if let Some(reason) = self.failed {
            bail!("the measuring broke off: {reason}");
        }
        let plan = self.plan.context("the machine reported nothing")?;
        ensure!(
            plan.format == FORMAT,
            "the measuring program speaks format {}, not {FORMAT}: build both from one checkout",
            plan.format
        );
        ensure!(self.done, "the measuring ended before it was done");
        let mut rows = Vec::new();
        for job in &plan.jobs {
            for backend in &plan.backends {
                let samples: Vec<&(Sample, Modules)> = self
                    .samples
                    .iter()
                    .filter(|(sample, _)| sample.job == job.name && sample.backend == backend.name)
                    .collect();
                rows.push(row(backend, job, &samples, marks)?);
            }
        }
        Ok(Results {
            version: VERSION,
            quick: false,
            rounds: plan.rounds,
            backends: plan.backends,
            jobs: plan.jobs,
            rows,
        })
    }
}

fn addresses(modules: &[(String, String)]) -> Modules {
    modules
        .iter()
        .filter_map(|(name, address)| Some((u64::from_str_radix(address, 16).ok()?, name.clone())))
        .collect()
}

fn row(
    backend: &Named,
    job: &Named,
    samples: &[&(Sample, Modules)],
    marks: &[Counters],
) -> Result<Row> {
    let mut instructions: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let mut per_io: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (sample, modules) in samples {
        for (name, value) in instructions_per_io(sample, modules, marks)? {
            instructions.entry(name).or_default().push(value);
        }
        for (name, value) in others_per_io(sample) {
            per_io.entry(name.to_string()).or_default().push(value);
        }
    }
    let of_long = |pick: fn(&Run) -> f64| {
        let values: Vec<f64> = samples
            .iter()
            .map(|(sample, _)| pick(&sample.long))
            .collect();
        Figure::of(&values)
            .with_context(|| format!("{} was never measured on {}", job.name, backend.name))
    };
    let figures = |map: BTreeMap<String, Vec<f64>>| {
        map.into_iter()
            .filter_map(|(name, values)| Some((name, Figure::of(&values)?)))
            .collect()
    };
    Ok(Row {
        backend: backend.name.clone(),
        job: job.name.clone(),
        iops: of_long(|run| run.iops)?,
        latency_us: of_long(|run| run.latency_us)?,
        instructions: figures(instructions),
        per_io: figures(per_io),
        hypercalls: samples
            .iter()
            .flat_map(|(sample, _)| sample.hypercalls.clone())
            .collect(),
    })
}

/// The long run less the short one: what starting and ending costs falls out.
fn instructions_per_io(sample: &Sample, modules: &Modules, marks: &[Counters]) -> Result<Places> {
    let of = |run: &Run| -> Result<Places> {
        let mark = |index: usize| {
            marks.get(index).with_context(|| {
                format!(
                    "QEMU's plugin saw {} marks, mark {index} is missing",
                    marks.len()
                )
            })
        };
        Ok(counts::between(
            mark(run.marks[0])?,
            mark(run.marks[1])?,
            modules,
        ))
    };
    let (short, mut long) = (of(&sample.short)?, of(&sample.long)?);
    let ios = more_ios(sample);
    for (name, value) in &mut long {
        *value = (*value - short.get(name).unwrap_or(&0.0)) / ios;
    }
    let total = long.values().sum();
    long.insert("total".into(), total);
    Ok(long)
}

fn others_per_io(sample: &Sample) -> [(&'static str, f64); 4] {
    let (long, short, ios) = (&sample.long, &sample.short, more_ios(sample));
    let each = |pick: fn(&Run) -> u64| (pick(long) as f64 - pick(short) as f64) / ios;
    [
        ("events to dom0", each(|run| run.dom0.events)),
        ("events to the guest", each(|run| run.guest.events)),
        ("context switches of dom0", each(|run| run.dom0.switches)),
        (
            "context switches of the guest",
            each(|run| run.guest.switches),
        ),
    ]
}

fn more_ios(sample: &Sample) -> f64 {
    sample.long.ios.saturating_sub(sample.short.ios).max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: &str = r#"{"format":1,"rounds":1,"backends":[{"name":"phy","title":"p"}],"jobs":[{"name":"j","title":"J"}]}"#;
    const SAMPLE: &str = r#"{"sample":{"backend":"phy","job":"j","round":0,
        "short":{"ios":10,"marks":[0,1],"iops":1.0,"latency_us":2.0,"dom0":{"events":1,"switches":0},"guest":{"events":1,"switches":0}},
        "long":{"ios":30,"marks":[1,2],"iops":4.0,"latency_us":2.0,"dom0":{"events":11,"switches":0},"guest":{"events":1,"switches":0}}}}"#;

    fn marks() -> Vec<Counters> {
        counts::parse("mark 0\n0 xen 0\nmark 1\n0 xen 100\nmark 2\n0 xen 400\n").unwrap()
    }

    #[test]
    fn samples_become_rows() {
        let mut collector = Collector::default();
        for line in [
            PLAN,
            r#"{"modules":[["a","ffffffffc0000000"]]}"#,
            SAMPLE,
            r#"{"done":true}"#,
        ] {
            collector.line(line);
        }
        let results = collector.results(&marks()).unwrap();
        let row = &results.rows[0];
        assert_eq!(row.iops.median, 4.0);
        assert_eq!(row.instructions["Xen"].median, 10.0);
        assert_eq!(row.instructions["total"].median, 10.0);
        assert_eq!(row.per_io["events to dom0"].median, 0.5);
    }

    #[test]
    fn run_that_broke_off_has_no_results() {
        for end in [r#"{"failed":"no disk"}"#, "garbage", ""] {
            let mut collector = Collector::default();
            collector.line(PLAN);
            collector.line(SAMPLE);
            if !end.is_empty() {
                collector.line(end);
            }
            assert!(collector.results(&marks()).is_err());
        }
    }

    #[test]
    fn missing_mark_is_an_error() {
        let mut collector = Collector::default();
        for line in [PLAN, SAMPLE, r#"{"done":true}"#] {
            collector.line(line);
        }
        assert!(collector.results(&marks()[..2]).is_err());
    }
}
