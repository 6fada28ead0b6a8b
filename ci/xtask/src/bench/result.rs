// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The results: one schema for the file, the table, the chart and the comparison.

use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// The version of the schema.
pub(crate) const VERSION: u32 = 3;
/// This driver, and its control: this driver once more.
pub(crate) const OURS: &str = "phy";
pub(crate) const CONTROL: &str = "phy-again";
/// The build of this driver that wastes the savings.
pub(crate) const WASTEFUL: &str = "phy-wasteful";
/// The C driver, with and without persistent grants.
pub(crate) const C: [&str; 2] = ["c", "c-plain"];
/// QEMU in dom0, through its page cache and with direct I/O.
pub(crate) const QDISK: [&str; 2] = ["qdisk", "qdisk-direct"];
/// The unit of most jobs.
pub(crate) const IO: &str = "I/O";
/// Largest permitted difference of this driver and its control.
pub(crate) const CONTROL_LIMIT: f64 = 0.05;

/// A run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Results {
    /// The version of the schema.
    pub(crate) version: u32,
    /// Made with --quick.
    pub(crate) quick: bool,
    /// Reason that the run broke off, if it did: then the results are incomplete.
    #[serde(default)]
    pub(crate) failed: Option<String>,
    /// Versions of all parts of the measurement.
    pub(crate) versions: BTreeMap<String, String>,
    /// Number of measurements of each backend.
    pub(crate) rounds: u32,
    /// The backends, in the order of the table.
    pub(crate) backends: Vec<TitledName>,
    /// The jobs, in the order of the table.
    pub(crate) jobs: Vec<TitledName>,
    /// One row for each job and backend that were measured together.
    pub(crate) rows: Vec<ResultRow>,
}

/// Something with a short name and a title.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct TitledName {
    /// The short name.
    pub(crate) name: String,
    /// The title.
    pub(crate) title: String,
    /// For a job: the unit of its figures.
    #[serde(default = "io")]
    pub(crate) unit: String,
}

fn io() -> String {
    IO.to_string()
}

/// One job on one backend.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ResultRow {
    /// The backend's name.
    pub(crate) backend: String,
    /// The job's name.
    pub(crate) job: String,
    /// I/Os (or units of the job) per second of the machine's time: a thousand million instructions of all processors.
    /// 0 where there is no speed.
    pub(crate) iops: Figure,
    /// Mean time of one I/O in microseconds of the machine's time.
    pub(crate) latency_us: Figure,
    /// Cost of one I/O, by place and in sums: executed instructions without those that copy; copies at one instruction
    /// for 8 bytes; the time for which dom0 polls.
    pub(crate) instructions: BTreeMap<String, Figure>,
    /// Other counts per unit.
    pub(crate) per_io: BTreeMap<String, Figure>,
    /// Hypercalls per unit, by domain and kind.
    #[serde(default)]
    pub(crate) hypercalls: BTreeMap<String, f64>,
    /// Figures of only this job, such as the columns of bonnie++.
    #[serde(default)]
    pub(crate) figures: BTreeMap<String, f64>,
    /// Executed instructions per unit by function of the driver, with `--functions`.
    #[serde(default)]
    pub(crate) functions: BTreeMap<String, f64>,
}

/// A figure of all rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Figure {
    /// The median.
    pub(crate) median: f64,
    /// The lowest.
    pub(crate) low: f64,
    /// The highest.
    pub(crate) high: f64,
}

impl Figure {
    /// Returns the figure of these values; `None` without values.
    pub(crate) fn of(values: &[f64]) -> Option<Figure> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (low, high) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            (sorted[middle - 1] + sorted[middle]) / 2.0
        };
        Some(Figure { median, low, high })
    }

    /// Returns the difference of lowest and highest, as a part of the median.
    pub(crate) fn spread(&self) -> f64 {
        if self.median == 0.0 {
            return 0.0;
        }
        (self.high - self.low) / self.median
    }
}

impl Results {
    /// Reads a file.
    pub(crate) fn read(path: &Path) -> Result<Results> {
        let text = fs::read_to_string(path)
            .with_context(|| format!("cannot read the results in {}", path.display()))?;
        let results: Results = serde_json::from_str(&text)
            .with_context(|| format!("{} holds no results of `bench`", path.display()))?;
        ensure!(
            results.version == VERSION,
            "{} has version {} of the schema, not {VERSION}: measure again",
            path.display(),
            results.version
        );
        Ok(results)
    }

    /// Writes a file.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        fs::write(path, text)
            .with_context(|| format!("cannot write the results to {}", path.display()))
    }

    /// Returns the row of a job on a backend.
    pub(crate) fn row(&self, backend: &str, job: &str) -> Option<&ResultRow> {
        self.rows
            .iter()
            .find(|row| row.backend == backend && row.job == job)
    }

    /// Returns the IOPS of one backend as a part of another's.
    pub(crate) fn ratio(&self, backend: &str, reference: &str, job: &str) -> Option<f64> {
        let (one, other) = (self.row(backend, job)?, self.row(reference, job)?);
        (other.iops.median > 0.0).then(|| one.iops.median / other.iops.median)
    }

    /// Returns the lowest cost of one unit in this sum, or in this column, among these backends.
    pub(crate) fn least(&self, backends: &[&str], sum: &str, job: &str) -> Option<f64> {
        backends
            .iter()
            .filter_map(|backend| {
                let row = self.row(backend, job)?;
                let figure = row.instructions.get(sum).or_else(|| row.per_io.get(sum))?;
                Some(figure.median)
            })
            .min_by(f64::total_cmp)
    }

    /// Returns the cost of one unit on this driver in this sum, as a part of the lowest cost among the others.
    pub(crate) fn cost(&self, others: &[&str], sum: &str, job: &str) -> Option<f64> {
        let other = self.least(others, sum, job)?;
        (other > 0.0).then_some(self.least(&[OURS], sum, job)? / other)
    }

    /// Returns the reasons that the run cannot be trusted: each job whose control differs too much.
    pub(crate) fn void(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        for job in &self.jobs {
            let Some(ratio) = self.ratio(CONTROL, OURS, &job.name) else {
                continue;
            };
            if (ratio - 1.0).abs() > CONTROL_LIMIT {
                complaints.push(format!(
                    "{}: our driver differs from itself by {:+.1} %, more than {:.0} %: measure again with more --rounds",
                    job.name,
                    (ratio - 1.0) * 100.0,
                    CONTROL_LIMIT * 100.0
                ));
            }
        }
        complaints
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Returns results with one job and these medians.
    pub(crate) fn results(rows: &[(&str, f64)]) -> Results {
        let named = |name: &str| TitledName {
            name: name.into(),
            title: format!("the {name} & more"),
            unit: io(),
        };
        let figure = |median: f64| Figure {
            median,
            low: median,
            high: median,
        };
        Results {
            version: VERSION,
            quick: false,
            failed: None,
            versions: BTreeMap::new(),
            rounds: 1,
            backends: rows.iter().map(|(name, _)| named(name)).collect(),
            jobs: vec![named("j")],
            rows: rows
                .iter()
                .map(|(name, iops)| ResultRow {
                    backend: (*name).into(),
                    job: "j".into(),
                    iops: figure(*iops),
                    latency_us: figure(1.0),
                    instructions: [("total".to_string(), figure(1e9 / iops))].into(),
                    per_io: BTreeMap::new(),
                    hypercalls: BTreeMap::new(),
                    figures: BTreeMap::new(),
                    functions: BTreeMap::new(),
                })
                .collect(),
        }
    }

    #[test]
    fn median_and_spread() {
        let figure = Figure::of(&[3.0, 1.0, 2.0]).unwrap();
        assert_eq!((figure.median, figure.spread()), (2.0, 1.0));
        assert_eq!(Figure::of(&[1.0, 2.0]).unwrap().median, 1.5);
        assert!(Figure::of(&[]).is_none());
    }

    #[test]
    fn control_that_is_off_voids_the_run() {
        assert!(results(&[("phy", 100.0), ("phy-again", 104.0)])
            .void()
            .is_empty());
        assert_eq!(
            results(&[("phy", 100.0), ("phy-again", 106.0)])
                .void()
                .len(),
            1
        );
        assert_eq!(
            results(&[("phy", 100.0), ("phy-again", 94.0)]).void().len(),
            1
        );
    }

    #[test]
    fn costs_are_of_the_best_of_the_others() {
        let found = results(&[("phy", 125.0), ("c", 100.0), ("c-plain", 50.0)]);
        assert_eq!(found.cost(&C, "total", "j"), Some(0.8));
        assert_eq!(found.cost(&QDISK, "total", "j"), None);
        assert_eq!(found.cost(&C, "other", "j"), None);
    }

    #[test]
    fn file_is_read_back_and_other_versions_are_refused() {
        let path = std::env::temp_dir().join(format!("xtask-bench-{}.json", std::process::id()));
        let mut written = results(&[("phy", 10.0)]);
        written.write(&path).unwrap();
        assert_eq!(Results::read(&path).unwrap().rows[0].iops.median, 10.0);
        written.version += 1;
        written.write(&path).unwrap();
        assert!(Results::read(&path)
            .unwrap_err()
            .to_string()
            .contains("measure again"));
        fs::remove_file(path).unwrap();
    }
}
