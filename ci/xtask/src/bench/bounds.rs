// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The bounds that a change must not cross unnoticed: the cost of an I/O, as `tests/bench/bounds.json` records it by
//! backend, job and part.

use super::counts::{DOM0, GUEST, TOTAL};
use super::result::{ResultRow, Results, OURS, WASTEFUL};
use anyhow::{Context, Result};
use std::collections::BTreeMap;

/// The recorded bounds.
const BOUNDS: &str = include_str!("../../../../tests/bench/bounds.json");
/// Share by which a figure may exceed its bound.
const TOLERANCE: f64 = 0.05;
/// Bounded parts, and their figures. The time in which a queue polls counts for dom0, so that a driver that polls
/// instead of sleeping does not look cheap.
const PARTS: [(&str, &str); 4] = [
    ("driver", "backend module"),
    ("dom0", DOM0),
    ("guest", GUEST),
    ("sum", TOTAL),
];
/// The jobs in which a wasteful build of the driver must exceed its bounds.
pub(super) const TELLING: [&str; 2] = ["rr4k-qd1", "rr4k-qd32"];

type BoundParts = BTreeMap<String, f64>;
type Bounds = BTreeMap<String, BTreeMap<String, BoundParts>>;

/// Returns the backends that have a bound, and their jobs, as arguments for the measuring program.
pub(super) fn wanted() -> Result<(String, String)> {
    let bounds = parse(BOUNDS)?;
    let jobs = bounds
        .iter()
        .flat_map(|(backend, jobs)| jobs.keys().map(move |job| format!("{backend}:{job}")));
    let jobs = jobs.collect::<Vec<_>>().join(",");
    let backends = bounds.keys().cloned().collect::<Vec<_>>().join(",");
    Ok((backends, jobs))
}

/// Returns the names of all bounds: `BACKEND.JOB.PART`.
pub(super) fn names() -> Result<Vec<String>> {
    Ok(each(&parse(BOUNDS)?)
        .into_iter()
        .map(|(backend, job, part, _)| name(backend, job, part))
        .collect())
}

/// Returns the bounds that are crossed, with the reasons.
pub(super) fn crossed(results: &Results) -> Result<BTreeMap<String, String>> {
    against(results, &parse(BOUNDS)?)
}

/// Returns those of the crossed bounds that these results cross as well; the results have only some jobs.
pub(super) fn still_crossed(
    results: &Results,
    before: &BTreeMap<String, String>,
) -> Result<BTreeMap<String, String>> {
    let mut bounds = parse(BOUNDS)?;
    for (backend, jobs) in &mut bounds {
        for (job, parts) in jobs.iter_mut() {
            parts.retain(|part, _| before.contains_key(&name(backend, job, part)));
        }
    }
    against(results, &bounds)
}

/// Returns backend and job of the name of a bound.
pub(super) fn backend_and_job(bound: &str) -> (&str, &str) {
    let mut parts = bound.split('.');
    (
        parts.next().unwrap_or_default(),
        parts.next().unwrap_or_default(),
    )
}

/// Returns the result of [`crossed`] for a wasteful build of this driver, of which only the telling jobs are measured.
pub(super) fn crossed_by_waste(results: &Results) -> Result<BTreeMap<String, String>> {
    let mut jobs = parse(BOUNDS)?.remove(OURS).unwrap_or_default();
    jobs.retain(|job, _| TELLING.contains(&job.as_str()));
    against(results, &[(WASTEFUL.to_string(), jobs)].into())
}

/// Returns the current figures of all bounds, in the form of `tests/bench/bounds.json`.
pub(super) fn measured(results: &Results) -> Result<String> {
    let mut bounds = parse(BOUNDS)?;
    for (backend, jobs) in &mut bounds {
        for (job, parts) in jobs {
            let row = row(results, backend, job)?;
            for (part, bound) in parts {
                // Readers need no more digits than a hundredth of the tolerance.
                *bound = cost(row, part)?.round();
            }
        }
    }
    Ok(serde_json::to_string_pretty(&bounds)?)
}

fn parse(text: &str) -> Result<Bounds> {
    serde_json::from_str(text)
        .context("tests/bench/bounds.json must be numbers by names of parts, jobs and backends")
}

/// Returns backend, job, part and bound.
fn each(bounds: &Bounds) -> Vec<(&str, &str, &str, f64)> {
    let mut all = Vec::new();
    for (backend, jobs) in bounds {
        for (job, parts) in jobs {
            let of_job = parts.iter().map(|(part, bound)| (part.as_str(), *bound));
            all.extend(of_job.map(|(part, bound)| (backend.as_str(), job.as_str(), part, bound)));
        }
    }
    all
}

fn name(backend: &str, job: &str, part: &str) -> String {
    format!("{backend}.{job}.{part}")
}

fn row<'a>(results: &'a Results, backend: &str, job: &str) -> Result<&'a ResultRow> {
    results
        .row(backend, job)
        .with_context(|| format!("{job} has a bound, but was not measured on {backend}"))
}

fn cost(row: &ResultRow, part: &str) -> Result<f64> {
    let (_, figure) = PARTS
        .iter()
        .find(|(name, _)| *name == part)
        .with_context(|| format!("tests/bench/bounds.json bounds an unknown part `{part}`"))?;
    let cost = row.instructions.get(*figure).with_context(|| {
        format!(
            "{} on {} has no part `{part}`: take it out of tests/bench/bounds.json",
            row.job, row.backend
        )
    })?;
    Ok(cost.median)
}

fn against(results: &Results, bounds: &Bounds) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for (backend, job, part, bound) in each(bounds) {
        let cost = cost(row(results, backend, job)?, part)?;
        let over = cost / bound - 1.0;
        if over > TOLERANCE {
            let why = format!(
                "{cost:.0} instructions per I/O are {:.1} % above the bound of {bound:.0}: make it \
                 cheaper again, or say in the commit why it may cost more and raise tests/bench/bounds.json",
                over * 100.0
            );
            found.insert(name(backend, job, part), why);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::counts::LOOKING;
    use super::super::result::tests::results;
    use super::super::result::Figure;
    use super::*;

    fn with_driver(cost: f64) -> Results {
        let mut measured = results(&[("phy", 1e5)]);
        let figure = Figure::of(&[cost]).unwrap();
        measured.rows[0].instructions = [("backend module".to_string(), figure)].into();
        measured
    }

    fn bounds(backend: &str, job: &str, part: &str, bound: f64) -> Bounds {
        let parts = BoundParts::from([(part.to_string(), bound)]);
        [(backend.to_string(), [(job.to_string(), parts)].into())].into()
    }

    #[test]
    fn five_per_cent_are_tolerated_and_no_more() {
        let measured = with_driver(10_000.0);
        let crossed =
            |bound: f64| against(&measured, &bounds("phy", "j", "driver", bound)).unwrap();
        assert!(crossed(9600.0).is_empty());
        assert!(crossed(9500.0)["phy.j.driver"].contains("5.3 % above"));
    }

    #[test]
    fn time_in_which_the_driver_looks_for_work_is_dom0s() {
        let mut measured = with_driver(10_000.0);
        for (name, cost) in [(DOM0, 9_000.0), (LOOKING, 8_000.0)] {
            let figure = Figure::of(&[cost]).unwrap();
            measured.rows[0].instructions.insert(name.into(), figure);
        }
        let of_dom0 = |bound| against(&measured, &bounds("phy", "j", "dom0", bound)).unwrap();
        assert!(of_dom0(9_000.0).is_empty());
        assert!(!of_dom0(1_000.0).is_empty());
    }

    #[test]
    fn what_is_not_crossed_again_was_the_boot() {
        let names = ["phy.rr4k-qd32.driver", "phy.rr4k-qd32.dom0"];
        let before = names.map(|name| (name.to_string(), String::new())).into();
        let mut measured = with_driver(1e9);
        measured.rows[0].job = "rr4k-qd32".into();
        let figure = Figure::of(&[1.0]).unwrap();
        measured.rows[0].instructions.insert(DOM0.into(), figure);
        let again = still_crossed(&measured, &before).unwrap();
        assert_eq!(again.keys().collect::<Vec<_>>(), [names[0]]);
        assert_eq!(backend_and_job(names[0]), ("phy", "rr4k-qd32"));
    }

    #[test]
    fn bound_of_nothing_that_was_measured_is_an_error() {
        let measured = with_driver(1.0);
        for (backend, job, part) in [
            ("phy", "other", "driver"),
            ("phy", "j", "other"),
            ("phy", "j", "dom0"),
            ("c", "j", "driver"),
        ] {
            let bounds = bounds(backend, job, part, 1.0);
            assert!(
                against(&measured, &bounds).is_err(),
                "{backend} {job} {part}"
            );
        }
    }

    #[test]
    fn recorded_bounds_cover_reads_writes_large_ones_tap_and_one_processor() {
        let names = names().unwrap();
        for job in TELLING.iter().chain(&["r1m-qd4"]) {
            for part in ["driver", "dom0", "guest"] {
                let name = name("phy", job, part);
                assert!(names.contains(&name), "{name}");
            }
        }
        for name in [
            "phy.rr4k-qd1-1p.sum",
            "phy.rw4k-qd32.dom0",
            "phy.w1m-qd4.dom0",
            "tap-aio.rr4k-qd32.dom0",
        ] {
            assert!(names.contains(&name.to_string()), "{name}");
        }
        let (backends, jobs) = wanted().unwrap();
        assert!(
            backends.contains("phy") && jobs.contains("phy:rr4k-qd32"),
            "{jobs}"
        );
    }
}
