// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The lines that the measuring program reports, put together with the counters of the plugin.

use super::counts::{self, Counters, MachineAddresses, Modules, PlaceCounts};
use super::modelled::{self, MODELLED};
use super::result::{Figure, ResultRow, Results, TitledName, VERSION};
use anyhow::{bail, ensure, Context, Result};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Version of the lines that this file understands.
const FORMAT: u32 = 5;

#[derive(Debug, Deserialize)]
struct PlanLine {
    format: u32,
    versions: BTreeMap<String, String>,
    rounds: u32,
    dom0_processors: u32,
    backends: Vec<TitledName>,
    jobs: Vec<TitledName>,
}

/// Interrupts of disks and context switches in one domain.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
struct Domain {
    events: u64,
    switches: u64,
}

/// One run of a job.
#[derive(Debug, Deserialize)]
struct JobRun {
    ios: u64,
    marks: [usize; 2],
    iops: f64,
    latency_us: f64,
    dom0: Domain,
    guest: Domain,
    /// Latency in microseconds that this percentage of its I/Os did not exceed.
    #[serde(default)]
    percentiles: BTreeMap<String, f64>,
}

#[derive(Debug, Deserialize)]
struct Sample {
    backend: String,
    job: String,
    round: u32,
    /// dom0 and the guest had one processor.
    shared: bool,
    /// Run to subtract: without most or all of the I/Os.
    short: Option<JobRun>,
    long: JobRun,
    #[serde(default)]
    figures: BTreeMap<String, f64>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum ReportLine {
    Plan(PlanLine),
    Modules { modules: Vec<(String, String)> },
    Functions { functions: Vec<(String, String)> },
    Sample { sample: Sample },
    Failed { failed: String },
    Done { done: bool },
}

/// Takes the lines as they arrive.
#[derive(Debug, Default)]
pub(crate) struct Collector {
    plan: Option<PlanLine>,
    there: Rc<MachineAddresses>,
    samples: Vec<(Sample, Rc<MachineAddresses>)>,
    failed: Option<String>,
    done: bool,
    news: Option<String>,
}

impl Collector {
    /// Takes one line.
    pub(crate) fn line(&mut self, line: &str) {
        match serde_json::from_str(line) {
            Ok(ReportLine::Plan(plan)) => self.plan = Some(plan),
            Ok(ReportLine::Modules { modules }) => {
                self.there = Rc::new(MachineAddresses {
                    dom0_processors: self.plan.as_ref().map_or(1, |plan| plan.dom0_processors),
                    modules: addresses(&modules),
                    functions: Modules::new(),
                });
            }
            Ok(ReportLine::Functions { functions }) => {
                let there = (*self.there).clone();
                let functions = addresses(&functions);
                self.there = Rc::new(MachineAddresses { functions, ..there });
            }
            Ok(ReportLine::Sample { sample }) => {
                self.news = Some(format!(
                    "{:10} {:12} {:8.0} /s",
                    sample.backend, sample.job, sample.long.iops
                ));
                self.samples.push((sample, self.there.clone()));
            }
            Ok(ReportLine::Failed { failed }) => self.failed = Some(failed),
            Ok(ReportLine::Done { done }) => self.done = done,
            Err(error) => self.failed = Some(format!("no line of a report ({error}): `{line}`")),
        }
    }

    /// Records that the machine did not end normally.
    pub(crate) fn broke_off(&mut self, reason: &anyhow::Error) {
        // A message of the measuring program is nearer to the cause.
        let text = format!("{reason:#}");
        // The path of the log is useless to a reader of the results on another machine.
        let short = text.split("; the").next().unwrap_or_default().to_string();
        self.failed.get_or_insert(short);
    }

    /// Returns the progress that the last line reported, once.
    pub(crate) fn progress(&mut self) -> Option<String> {
        self.news.take()
    }

    /// Returns the results. A run that broke off has results, too, unless nothing was measured.
    pub(crate) fn results(self, marks: &[Counters]) -> Result<Results> {
        let mut failed = self.failed;
        if failed.is_none() && !self.done {
            failed = Some("the measuring ended before it was done".into());
        }
        if let (Some(reason), true) = (&failed, self.samples.is_empty()) {
            bail!("nothing was measured: {reason}");
        }
        let plan = self.plan.context("the machine reported nothing")?;
        ensure!(
            plan.format == FORMAT,
            "the measuring program speaks format {}, not {FORMAT}: build both from one checkout",
            plan.format
        );
        let mut rows = Vec::new();
        for job in &plan.jobs {
            for backend in &plan.backends {
                let samples: Vec<&(Sample, Rc<MachineAddresses>)> = self
                    .samples
                    .iter()
                    .filter(|(sample, _)| sample.job == job.name && sample.backend == backend.name)
                    .collect();
                // Some jobs do not run on every backend.
                if !samples.is_empty() {
                    rows.push(row(backend, job, &samples, marks)?);
                }
            }
        }
        Ok(Results {
            version: VERSION,
            quick: false,
            failed,
            versions: plan.versions,
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

/// The values of one figure. If a round has several, their mean counts, from three on without the lowest and the
/// highest, so that one disturbed value does not decide.
#[derive(Debug, Default)]
struct Values(BTreeMap<u32, Vec<f64>>);

impl Values {
    fn add(&mut self, round: u32, value: f64) {
        self.0.entry(round).or_default().push(value);
    }

    fn figure(&self) -> Option<Figure> {
        let of_rounds = self.0.values().map(|values| {
            let mut sorted = values.clone();
            sorted.sort_by(f64::total_cmp);
            let inner = match sorted.as_slice() {
                [_, inner @ .., _] if sorted.len() >= 3 => inner,
                all => all,
            };
            inner.iter().sum::<f64>() / inner.len() as f64
        });
        Figure::of(&of_rounds.collect::<Vec<f64>>())
    }
}

/// Values by the name of their figure.
#[derive(Debug, Default)]
struct Columns(BTreeMap<String, Values>);

impl Columns {
    fn add(&mut self, name: &str, round: u32, value: f64) {
        let values = self.0.entry(name.to_string()).or_default();
        values.add(round, value);
    }

    fn figures(&self) -> BTreeMap<String, Figure> {
        let figure = |(name, values): (&String, &Values)| Some((name.clone(), values.figure()?));
        self.0.iter().filter_map(figure).collect()
    }
}

fn row(
    backend: &TitledName,
    job: &TitledName,
    samples: &[&(Sample, Rc<MachineAddresses>)],
    marks: &[Counters],
) -> Result<ResultRow> {
    let (mut instructions, mut per_io) = (Columns::default(), Columns::default());
    let (mut iops, mut latency) = (Values::default(), Values::default());
    let (mut further, mut hypercalls) = (Columns::default(), Columns::default());
    let mut functions: BTreeMap<String, f64> = BTreeMap::new();
    for (sample, there) in samples {
        let round = sample.round;
        let between =
            |first: &Counters, last: &Counters| counts::between(first, last, there, sample.shared);
        let places = each(sample, marks, between)?;
        for (name, value) in counts::copied(&places) {
            per_io.add(&name, round, value);
        }
        let sums = counts::sums(&places);
        let all: PlaceCounts = places.into_iter().chain(sums).collect();
        let others = others_per_io(sample);
        let between = |first: &Counters, last: &Counters| {
            counts::turns_between(first, last, there, sample.shared)
        };
        let turns = each(sample, marks, between)?;
        let [.., (_, switches), _] = others;
        if let Some(nanoseconds) = modelled::nanoseconds(&all, &turns, switches)? {
            per_io.add(MODELLED, round, nanoseconds);
        }
        for (name, value) in all {
            instructions.add(&name, round, value);
        }
        for (name, value) in turns {
            let is_sleeps = name.starts_with("sleeps");
            let columns = if is_sleeps {
                &mut per_io
            } else {
                &mut hypercalls
            };
            columns.add(&name, round, value);
        }
        for (name, value) in &sample.long.percentiles {
            per_io.add(&format!("{name}, us"), round, *value);
        }
        let between =
            |first: &Counters, last: &Counters| counts::functions_between(first, last, there);
        for (name, value) in each(sample, marks, between)? {
            let name = format!("{:#}", rustc_demangle::demangle(&name));
            *functions.entry(name).or_default() += value / samples.len() as f64;
        }
        for (name, value) in others {
            per_io.add(name, round, value);
        }
        for (name, value) in &sample.figures {
            further.add(name, round, *value);
        }
        iops.add(round, sample.long.iops);
        latency.add(round, sample.long.latency_us);
    }
    let speed = |values: Values| {
        let figure = values.figure();
        figure.with_context(|| format!("{} was never measured on {}", job.name, backend.name))
    };
    let median = |(name, figure): (String, Figure)| (name, figure.median);
    Ok(ResultRow {
        backend: backend.name.clone(),
        job: job.name.clone(),
        iops: speed(iops)?,
        latency_us: speed(latency)?,
        instructions: instructions.figures(),
        per_io: per_io.figures(),
        hypercalls: hypercalls.figures().into_iter().map(median).collect(),
        figures: further.figures().into_iter().map(median).collect(),
        functions,
    })
}

/// Returns the counts of the long run minus those of the short one, which removes the costs of start and end.
fn each(
    sample: &Sample,
    marks: &[Counters],
    between: impl Fn(&Counters, &Counters) -> PlaceCounts,
) -> Result<PlaceCounts> {
    let of = |run: &JobRun| -> Result<PlaceCounts> {
        let mark = |index: usize| {
            marks.get(index).with_context(|| {
                format!(
                    "QEMU's plugin saw {} marks, mark {index} is missing",
                    marks.len()
                )
            })
        };
        Ok(between(mark(run.marks[0])?, mark(run.marks[1])?))
    };
    let mut long = of(&sample.long)?;
    let ios = more_ios(sample);
    let short = sample.short.as_ref().map(of).transpose()?;
    let short = short.unwrap_or_default();
    for (name, value) in &mut long {
        *value = (*value - short.get(name).unwrap_or(&0.0)) / ios;
    }
    Ok(long)
}

fn others_per_io(sample: &Sample) -> [(&'static str, f64); 4] {
    let ios = more_ios(sample);
    let each = |pick: fn(&JobRun) -> u64| {
        let short = sample.short.as_ref().map_or(0, pick);
        (pick(&sample.long) as f64 - short as f64) / ios
    };
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
    let short = sample.short.as_ref().map_or(0, |run| run.ios);
    sample.long.ios.saturating_sub(short).max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: &str = r#"{"format":5,"versions":{"fio":"1"},"rounds":1,"dom0_processors":1,"backends":[{"name":"phy","title":"p"}],"jobs":[{"name":"j","title":"J"}]}"#;
    const SAMPLE: &str = r#"{"sample":{"backend":"phy","job":"j","round":0,"shared":false,
        "short":{"ios":10,"marks":[0,1],"iops":1.0,"latency_us":2.0,"dom0":{"events":1,"switches":0},"guest":{"events":1,"switches":0}},
        "long":{"ios":30,"marks":[1,2],"iops":4.0,"latency_us":2.0,"percentiles":{"p99":70.0},"dom0":{"events":11,"switches":0},"guest":{"events":1,"switches":0}}}}"#;

    fn marks() -> Vec<Counters> {
        let text =
            "mark 0\n0 xen 0\nmark 1\n0 xen 100\nmark 2\n0 xen 400\n0 hypercall:29 40\n0 halts 5\n";
        counts::parse(text).unwrap()
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
        assert_eq!(row.per_io["p99, us"].median, 70.0);
        assert_eq!(row.per_io[counts::SLEEPS].median, 0.25);
        assert_eq!(row.hypercalls, [("dom0 sched_op".to_string(), 2.0)].into());
        assert_eq!(
            row.per_io[MODELLED].median,
            0.3 * 10.0 + 2.0 * 250.0 + 0.25 * 2000.0
        );
        assert_eq!(row.iops.median, 4.0);
        assert_eq!(row.instructions["Xen, dom0's processor"].median, 10.0);
        assert_eq!(row.instructions["total"].median, 10.0);
        assert_eq!(row.per_io["events to dom0"].median, 0.5);
    }

    #[test]
    fn mean_of_a_round_and_median_of_rounds() {
        let mut collector = Collector::default();
        collector.line(PLAN);
        let second = [0.0, 39.0, 41.0, 500.0].map(|speed| (1, speed));
        let others = [(0, 10.0), (0, 30.0), (2, 90.0)];
        for (round, speed) in others.into_iter().chain(second) {
            let mut sample: serde_json::Value = serde_json::from_str(SAMPLE).unwrap();
            sample["sample"]["round"] = round.into();
            sample["sample"]["long"]["iops"] = speed.into();
            collector.line(&sample.to_string());
        }
        collector.line(r#"{"done":true}"#);
        let iops = collector.results(&marks()).unwrap().rows[0].iops;
        assert_eq!((iops.low, iops.median, iops.high), (20.0, 40.0, 90.0));
    }

    #[test]
    fn job_without_a_short_run_and_with_functions() {
        let mut collector = Collector::default();
        let mut sample: serde_json::Value = serde_json::from_str(SAMPLE).unwrap();
        sample["sample"]["short"].take();
        for line in [
            PLAN,
            r#"{"modules":[["xen_blkback_rs","ffffffffc0000000"]]}"#,
            r#"{"functions":[["_RNvCs1_1a4take","ffffffffc0000000"]]}"#,
            &sample.to_string(),
            r#"{"done":true}"#,
        ] {
            collector.line(line);
        }
        let text = "mark 0\n0 xen 0\nmark 1\n0 xen 100\nmark 2\n0 xen 400\n0 ffffffffc0000010 60\n";
        let results = collector.results(&counts::parse(text).unwrap()).unwrap();
        let row = &results.rows[0];
        assert_eq!(row.instructions["Xen, dom0's processor"].median, 10.0);
        assert_eq!(row.functions, [("a::take".to_string(), 2.0)].into());
    }

    #[test]
    fn run_that_broke_off_says_so_and_keeps_what_it_has() {
        for end in [r#"{"failed":"no disk"}"#, "garbage", ""] {
            let mut collector = Collector::default();
            collector.line(PLAN);
            collector.line(SAMPLE);
            if !end.is_empty() {
                collector.line(end);
            }
            let results = collector.results(&marks()).unwrap();
            assert!(results.failed.is_some() && results.rows.len() == 1);
        }
    }

    #[test]
    fn run_without_a_sample_is_an_error() {
        let mut collector = Collector::default();
        collector.line(PLAN);
        collector.line(r#"{"failed":"no disk"}"#);
        let error = collector.results(&marks()).unwrap_err();
        assert!(error.to_string().contains("no disk"));
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
