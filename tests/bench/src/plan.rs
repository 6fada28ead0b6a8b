// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The requested measurements, selected from the tables of backends and jobs.

use crate::backends::{self, Backend, Set};
use crate::jobs::{self, BenchJob};
use anyhow::{ensure, Result};

/// The requested measurements.
#[derive(Debug)]
pub(crate) struct BenchPlan {
    /// Less of everything.
    pub(crate) quick: bool,
    /// Names of backends; all when empty.
    pub(crate) backends: Vec<String>,
    /// Names of jobs, `BACKEND:JOB` for one that is not for all; all when empty.
    pub(crate) jobs: Vec<String>,
    /// Number of rounds; a default when absent.
    pub(crate) rounds: Option<u32>,
    /// The module of this project.
    pub(crate) module: String,
    /// Also report the addresses of the functions of the kernel and the drivers.
    pub(crate) functions: bool,
}

impl BenchPlan {
    pub(crate) fn backends(&self) -> Result<Vec<Backend>> {
        let all = backends::ALL
            .iter()
            .map(|entry| (entry.name, entry.set, *entry));
        select("backend", all.collect(), &self.backends, self.quick)
    }

    pub(crate) fn jobs(&self) -> Result<Vec<BenchJob>> {
        let all = jobs::ALL
            .iter()
            .map(|entry| (entry.name, entry.set, *entry));
        let names = self.jobs.iter().map(|name| cell(name).1.to_owned());
        select("job", all.collect(), &names.collect::<Vec<_>>(), self.quick)
    }

    /// Returns true if the job is to be measured on this backend.
    pub(crate) fn wants(&self, backend: &Backend, job: &BenchJob) -> bool {
        let here = |name: &String| {
            let (only, name) = cell(name);
            name == job.name && only.is_none_or(|only| only == backend.name)
        };
        self.jobs.is_empty() || self.jobs.iter().any(here)
    }

    pub(crate) fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.quick { 1 } else { 2 }).max(1)
    }
}

/// Splits the name of a job: the only backend that it is for, and the job.
fn cell(name: &str) -> (Option<&str>, &str) {
    match name.split_once(':') {
        Some((backend, job)) => (Some(backend), job),
        None => (None, name),
    }
}

/// Returns the entries named by `wanted`, in the order of the table; without names all, or all quick ones.
fn select<T>(
    what: &str,
    all: Vec<(&str, Set, T)>,
    wanted: &[String],
    quick: bool,
) -> Result<Vec<T>> {
    for name in wanted {
        let known: Vec<&str> = all.iter().map(|entry| entry.0).collect();
        ensure!(
            known.contains(&name.as_str()),
            "there is no {what} `{name}`: choose from {}",
            known.join(", ")
        );
    }
    let chosen = |name: &str, set: Set| match wanted {
        [] => set == Set::Quick || (set == Set::Full && !quick),
        names => names.iter().any(|wanted| wanted == name),
    };
    Ok(all
        .into_iter()
        .filter(|entry| chosen(entry.0, entry.1))
        .map(|entry| entry.2)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::{backends, jobs, select, BenchPlan, Set};

    #[test]
    fn jobs_can_be_for_one_backend() {
        let plan = BenchPlan {
            quick: true,
            backends: Vec::new(),
            jobs: vec!["c:rr4k-qd1".into(), "rr4k-qd32".into()],
            rounds: None,
            module: String::new(),
            functions: false,
        };
        let wants = |backend: &str, job: &str| {
            let backend = backends::ALL.iter().find(|entry| entry.name == backend);
            let job = jobs::ALL.iter().find(|entry| entry.name == job);
            plan.wants(backend.unwrap(), job.unwrap())
        };
        assert!(wants("c", "rr4k-qd1") && wants("c", "rr4k-qd32"));
        assert!(wants("phy", "rr4k-qd32") && !wants("phy", "rr4k-qd1"));
        assert!(!wants("c", "r1m-qd4"));
        assert_eq!(plan.jobs().unwrap().len(), 2);
    }

    #[test]
    fn names_choose_and_unknown_names_are_refused() {
        let all = || {
            vec![
                ("a", Set::Quick, 1),
                ("b", Set::Full, 2),
                ("d", Set::Named, 3),
            ]
        };
        assert_eq!(select("x", all(), &[], false).unwrap(), [1, 2]);
        assert_eq!(select("x", all(), &[], true).unwrap(), [1]);
        assert_eq!(select("x", all(), &["b".into()], true).unwrap(), [2]);
        assert_eq!(select("x", all(), &["d".into()], false).unwrap(), [3]);
        let error = select("x", all(), &["c".into()], true).unwrap_err();
        assert!(error.to_string().contains("choose from a, b, d"));
    }
}
