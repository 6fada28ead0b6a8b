// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! What was asked for, and what that is of the tables of backends and jobs.

use crate::backends::{self, Backend, Set};
use crate::jobs::{self, Job};
use anyhow::{ensure, Result};

/// What was asked for.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Less of everything.
    pub(crate) quick: bool,
    /// Names of backends; all when empty.
    pub(crate) backends: Vec<String>,
    /// Names of jobs; all when empty.
    pub(crate) jobs: Vec<String>,
    /// How often; a default when absent.
    pub(crate) rounds: Option<u32>,
    /// The module of this project.
    pub(crate) module: String,
    /// Also say where the functions of the drivers are.
    pub(crate) functions: bool,
}

impl Plan {
    pub(crate) fn backends(&self) -> Result<Vec<Backend>> {
        let all = backends::ALL
            .iter()
            .map(|entry| (entry.name, entry.set, *entry));
        select("backend", all.collect(), &self.backends, self.quick)
    }

    pub(crate) fn jobs(&self) -> Result<Vec<Job>> {
        let all = jobs::ALL
            .iter()
            .map(|entry| (entry.name, entry.set, *entry));
        select("job", all.collect(), &self.jobs, self.quick)
    }

    pub(crate) fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.quick { 1 } else { 2 }).max(1)
    }
}

/// The entries named by `wanted`, in the order of the table; without names all, or all quick ones.
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
    use super::{select, Set};

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
