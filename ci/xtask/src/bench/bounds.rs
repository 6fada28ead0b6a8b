// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The bounds that a change of the driver must not cross unnoticed: instructions per I/O, as
//! `tests/bench/bounds.json` records them for the driver alone and for Xen and dom0 together.

use super::result::{Results, Row};
use anyhow::{Context, Result};
use std::collections::BTreeMap;

/// Recorded instructions per I/O by job and part.
const BOUNDS: &str = include_str!("../../../../tests/bench/bounds.json");
/// How far above its bound a figure may be.
const TOLERANCE: f64 = 0.05;
/// What is bounded, and the places whose sum it is.
const PARTS: [(&str, &[&str]); 2] = [
    ("driver", &["backend module"]),
    (
        "xen-and-dom0",
        &[
            "Xen",
            "dom0 kernel",
            "backend module",
            "other modules",
            "dom0 user",
        ],
    ),
];

type Bounds = BTreeMap<String, BTreeMap<String, f64>>;

/// The jobs that have a bound, as the machine wants to be told.
pub(super) fn jobs() -> Result<String> {
    Ok(parse(BOUNDS)?.into_keys().collect::<Vec<_>>().join(","))
}

/// The names of all bounds: `JOB.PART`.
pub(super) fn names() -> Result<Vec<String>> {
    let bounds = parse(BOUNDS)?;
    let of = |(job, parts): (String, BTreeMap<String, f64>)| {
        parts.into_keys().map(move |part| format!("{job}.{part}"))
    };
    Ok(bounds.into_iter().flat_map(of).collect())
}

/// The bounds that `backend` crosses, and why that is one.
pub(super) fn crossed(results: &Results, backend: &str) -> Result<BTreeMap<String, String>> {
    against(results, backend, &parse(BOUNDS)?)
}

/// What `backend` costs now, in the form of `tests/bench/bounds.json`.
pub(super) fn measured(results: &Results, backend: &str) -> Result<String> {
    let mut bounds = Bounds::new();
    for row in results.rows.iter().filter(|row| row.backend == backend) {
        let parts = PARTS.iter().map(|(part, places)| {
            // A hundredth of the tolerance is all that anybody reads of it.
            ((*part).to_string(), cost(row, places).round())
        });
        bounds.insert(row.job.clone(), parts.collect());
    }
    Ok(serde_json::to_string_pretty(&bounds)?)
}

fn parse(text: &str) -> Result<Bounds> {
    serde_json::from_str(text)
        .context("tests/bench/bounds.json must be numbers by names of parts by names of jobs")
}

fn cost(row: &Row, places: &[&str]) -> f64 {
    let of = |place: &&str| row.instructions.get(*place).map_or(0.0, |cost| cost.median);
    places.iter().map(of).sum()
}

fn against(results: &Results, backend: &str, bounds: &Bounds) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for (job, parts) in bounds {
        let row = results
            .row(backend, job)
            .with_context(|| format!("{job} has a bound, but was not measured on {backend}"))?;
        for (part, bound) in parts {
            let (_, places) = PARTS
                .iter()
                .find(|(name, _)| name == part)
                .with_context(|| {
                    format!("tests/bench/bounds.json bounds an unknown part `{part}`")
                })?;
            let cost = cost(row, places);
            let over = cost / bound - 1.0;
            if over > TOLERANCE {
                let why = format!(
                    "{cost:.0} instructions per I/O are {:.1} % above the bound of {bound:.0}: make it \
                     cheaper again, or say in the commit why it may cost more and raise tests/bench/bounds.json",
                    over * 100.0
                );
                found.insert(format!("{job}.{part}"), why);
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::result::tests::results;
    use super::super::result::{Figure, OURS};
    use super::*;

    fn with_driver(cost: f64) -> Results {
        let mut measured = results(&[("phy", 1e5)]);
        let figure = Figure::of(&[cost]).unwrap();
        measured.rows[0].instructions = [("backend module".to_string(), figure)].into();
        measured
    }

    fn bounds(job: &str, part: &str, bound: f64) -> Bounds {
        [(job.to_string(), [(part.to_string(), bound)].into())].into()
    }

    #[test]
    fn five_per_cent_are_tolerated_and_no_more() {
        let measured = with_driver(10_000.0);
        let crossed = |bound: f64| against(&measured, OURS, &bounds("j", "driver", bound)).unwrap();
        assert!(crossed(9600.0).is_empty());
        assert!(crossed(9500.0)["j.driver"].contains("5.3 % above"));
        let of_all = against(&measured, OURS, &bounds("j", "xen-and-dom0", 9500.0)).unwrap();
        assert_eq!(of_all.len(), 1);
    }

    #[test]
    fn bound_of_nothing_that_was_measured_is_an_error() {
        let measured = with_driver(1.0);
        for unknown in [bounds("other", "driver", 1.0), bounds("j", "other", 1.0)] {
            assert!(against(&measured, OURS, &unknown).is_err());
        }
    }

    #[test]
    fn recorded_bounds_are_readable_and_cover_both_parts() {
        let names = names().unwrap();
        for job in jobs().unwrap().split(',') {
            for (part, _) in PARTS {
                assert!(names.contains(&format!("{job}.{part}")), "{job}.{part}");
            }
        }
    }

    #[test]
    fn what_is_measured_can_be_recorded() {
        let text = measured(&with_driver(12.3), OURS).unwrap();
        assert_eq!(parse(&text).unwrap()["j"]["driver"], 12.0);
    }
}
