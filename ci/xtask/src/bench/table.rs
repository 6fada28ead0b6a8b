// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The results as text.

use super::counts::{CodePlace, PlaceOwner::Dom0, DOM0, PLACES, SLEEPS, TOTAL};
use super::modelled::MODELLED;
use super::result::{ResultRow, Results, TitledName, C, CONTROL, IO, OURS};
use std::fmt::Write;

/// Returns all tables: one for each job, then the summary.
pub(crate) fn table(results: &Results) -> String {
    let mut text = String::from(LEGEND);
    for (what, version) in &results.versions {
        let _ = writeln!(text, "{what}: {version}");
    }
    if let Some(reason) = &results.failed {
        let first = reason.lines().next().unwrap_or_default();
        let _ = writeln!(text, "NOT COMPLETE: {first}");
    }
    let measured = |name: &str| results.rows.iter().any(|row| row.job == name);
    for job in results.jobs.iter().filter(|job| measured(&job.name)) {
        let _ = writeln!(text, "\n{} ({})", job.title, job.name);
        let places = places(results, job);
        heading(&mut text, &job.unit, &places);
        for backend in &results.backends {
            if let Some(row) = results.row(&backend.name, &job.name) {
                let ratio = results.ratio(OURS, &backend.name, &job.name);
                line(&mut text, &backend.title, row, ratio, &places);
            }
        }
    }
    hypercalls(&mut text, results);
    figures(&mut text, results);
    functions(&mut text, results);
    summary(&mut text, results);
    text
}

/// Hypercalls of dom0 by kind.
fn hypercalls(text: &mut String, results: &Results) {
    let counted = results.rows.iter().filter(|row| !row.hypercalls.is_empty());
    for (index, row) in counted.enumerate() {
        if index == 0 {
            text.push_str("\nhypercalls of dom0 per I/O, or of both domains on one processor\n");
        }
        let _ = write!(text, "  {:16} {:10}", row.job, row.backend);
        let kind = |name: &'_ String| -> Option<String> {
            let kind = name.strip_prefix("dom0 ").or(name.strip_prefix("both "))?;
            // Results that a trace counted have these as well, which are not hypercalls.
            (kind != "wakeups").then(|| kind.to_string())
        };
        let mut kinds: Vec<(String, f64)> = row
            .hypercalls
            .iter()
            .filter_map(|(name, count)| Some((kind(name)?, *count)))
            .collect();
        kinds.sort_by(|a, b| b.1.total_cmp(&a.1));
        let sum: f64 = kinds.iter().map(|kind| kind.1).sum();
        let _ = write!(text, " {sum:5.2}:");
        for (name, count) in kinds.iter().filter(|kind| kind.1 >= 0.01) {
            let _ = write!(text, " {name} {count:.2},");
        }
        let sent = row.hypercalls.get("guest evtchn_op");
        let _ = writeln!(
            text,
            " and events sent by the guest {:.2}",
            sent.copied().unwrap_or(0.0)
        );
    }
}

/// Adds figures that only some jobs have.
fn figures(text: &mut String, results: &Results) {
    for job in &results.jobs {
        let rows: Vec<&ResultRow> = results
            .rows
            .iter()
            .filter(|row| row.job == job.name && !row.figures.is_empty())
            .collect();
        let mut names: Vec<&String> = rows.iter().flat_map(|row| row.figures.keys()).collect();
        names.sort();
        names.dedup();
        if names.is_empty() {
            continue;
        }
        let longest = rows.iter().map(|row| row.backend.len()).max();
        let width = longest.unwrap_or(0).max(10);
        let _ = write!(
            text,
            "\n{} ({}), further figures\n  {:width$}",
            job.title, job.name, ""
        );
        for name in &names {
            let _ = write!(text, "  {name}");
        }
        text.push('\n');
        for row in rows {
            let _ = write!(text, "  {:width$}", row.backend);
            for name in &names {
                let value = row.figures.get(*name);
                let value = value.map_or("-".to_string(), |value| format!("{value:.0}"));
                let _ = write!(text, "  {value:>width$}", width = name.len());
            }
            text.push('\n');
        }
    }
}

/// Number of functions shown; the results have the others' costs.
const FUNCTIONS: usize = 60;

/// Adds the costs of the functions of dom0's kernel and of the drivers, if they were counted.
fn functions(text: &mut String, results: &Results) {
    for row in results.rows.iter().filter(|row| !row.functions.is_empty()) {
        let _ = writeln!(
            text,
            "\n{}, functions of dom0's kernel and of the driver of {}",
            row.job, row.backend
        );
        let mut all: Vec<(&String, &f64)> = row.functions.iter().collect();
        all.sort_by(|a, b| b.1.total_cmp(a.1));
        for (name, cost) in all
            .into_iter()
            .take(FUNCTIONS)
            .filter(|(_, cost)| **cost >= 0.5)
        {
            let _ = writeln!(text, "  {cost:>8.0}  {name}");
        }
    }
}

/// Returns the columns of a job: its places, with the sums of dom0's processor and of everything behind those.
fn places(results: &Results, job: &TitledName) -> Vec<(&'static str, &'static str)> {
    let rows: Vec<&ResultRow> = results
        .rows
        .iter()
        .filter(|row| row.job == job.name)
        .collect();
    let is_there = |name: &str| rows.iter().any(|row| row.instructions.contains_key(name));
    let of = |place: &CodePlace| (place.name, place.head);
    let mut columns: Vec<_> = PLACES.iter().map(of).collect();
    let behind = PLACES.iter().rposition(|place| place.whose == Dom0);
    columns.insert(behind.map_or(0, |last| last + 1), (DOM0, "DOM0"));
    columns.push((TOTAL, "SUM"));
    columns.retain(|(name, _)| is_there(name));
    columns
}

/// The other counts of an I/O, and their column names.
const OTHERS: [(&str, &str); 10] = [
    (MODELLED, "MODEL"),
    ("events to dom0", "ev>d0"),
    ("events to the guest", "ev>gu"),
    ("context switches of dom0", "cs d0"),
    ("context switches of the guest", "cs gu"),
    (SLEEPS, "sl d0"),
    ("sleeps of the guest's processor", "sl gu"),
    ("p50, us", "p50"),
    ("p99, us", "p99"),
    ("p99.9, us", "p99.9"),
];
/// Meaning of the columns.
const LEGEND: &str = "\
spread: lowest to highest round. we are: this driver's speed as a multiple of the row's.
Cost of one unit of the speed, such as an I/O or a disk, in instructions. On dom0's processor: Xen, dom0's kernel, the driver, dom0's
other modules, its user space, copying at one for 8 bytes, and the time in which the driver looks for work; their sum is DOM0.
On the guest's: Xen, its kernel and user space, copying. SUM is all of it. Where both have one processor, domains is what is not Xen.
MODEL: nanoseconds of dom0's processor on a real host, as tests/bench/weights.json has them. Events (ev) to dom0 and to the guest;
context switches (cs); sleeps of processors (sl); microseconds that 50, 99 and 99.9 % of the I/Os took at most.
";

fn heading(text: &mut String, unit: &str, places: &[(&str, &str)]) {
    let speed = match unit {
        IO => "IOPS".to_string(),
        unit => format!("{}/s", unit.split(' ').next().unwrap_or_default()),
    };
    let _ = write!(
        text,
        "  {:36} {speed:>8} {:>7} {:>8} |",
        "backend", "spread", "we are"
    );
    for (_, head) in places {
        let _ = write!(text, " {head:>8}");
    }
    text.push_str(" |");
    for (_, head) in OTHERS {
        let _ = write!(text, " {head:>6}");
    }
    text.push('\n');
}

fn line(
    text: &mut String,
    title: &str,
    row: &ResultRow,
    ratio: Option<f64>,
    places: &[(&str, &str)],
) {
    let ratio = ratio.map_or("-".into(), |ratio| format!("{ratio:.2} x"));
    let _ = write!(
        text,
        "  {title:36} {:>8.0} {:>6.1}% {ratio:>8} |",
        row.iops.median,
        row.iops.spread() * 100.0
    );
    for (place, _) in places {
        let figure = row.instructions.get(*place);
        let _ = write!(text, " {:>8.0}", figure.map_or(0.0, |figure| figure.median));
    }
    text.push_str(" |");
    for (name, _) in OTHERS {
        let figure = row.per_io.get(name);
        let value = figure.map_or(0.0, |figure| figure.median);
        let digits = if value < 100.0 { 2 } else { 0 };
        let _ = write!(text, " {value:>6.digits$}");
    }
    text.push('\n');
}

/// Compares this driver with each other one, in one line a job: the two sums, and the speed.
fn summary(text: &mut String, results: &Results) {
    let what = "cost with this driver, as a part of the cost with the other";
    let heads = [
        ("the sum", TOTAL),
        ("dom0's processor", DOM0),
        ("modelled nanoseconds of dom0's processor", MODELLED),
    ];
    for (head, sum) in heads {
        let title = format!("{head}: {what}");
        let cost = |others: &[&str], job: &str| results.cost(others, sum, job);
        against_others(text, results, &title, &cost);
    }
    let speed = |others: &[&str], job: &str| {
        let ratios = others.iter().map(|other| results.ratio(OURS, other, job));
        ratios.flatten().min_by(f64::total_cmp)
    };
    against_others(
        text,
        results,
        "this driver's speed as a multiple of",
        &speed,
    );
}

fn against_others(
    text: &mut String,
    results: &Results,
    title: &str,
    ratio: &dyn Fn(&[&str], &str) -> Option<f64>,
) {
    let others: Vec<&str> = results
        .backends
        .iter()
        .map(|backend| backend.name.as_str())
        .filter(|name| *name != OURS && *name != CONTROL)
        .collect();
    let _ = write!(text, "\n{title}\n  {:16} {:>8}", "job", "C's best");
    for name in &others {
        let _ = write!(text, " {name:>12}");
    }
    let _ = writeln!(text, " {:>8}", "control");
    let ours = |name: &str| results.row(OURS, name).is_some();
    for job in results.jobs.iter().filter(|job| ours(&job.name)) {
        let best = times(ratio(&C, &job.name));
        let _ = write!(text, "  {:16} {best:>8}", job.name);
        for name in &others {
            let _ = write!(text, " {:>12}", times(ratio(&[name], &job.name)));
        }
        let _ = writeln!(text, " {:>8}", times(ratio(&[CONTROL], &job.name)));
    }
}

fn times(ratio: Option<f64>) -> String {
    ratio.map_or("-".into(), |ratio| format!("{ratio:.2}"))
}

#[cfg(test)]
mod tests {
    use super::super::result::tests::results;

    #[test]
    fn further_figures_have_a_column_each_and_a_dash_where_there_is_none() {
        let mut found = results(&[("phy", 50.0), ("tap-clone-cached", 100.0)]);
        found.jobs[0].unit = "MiB of files".into();
        let mut add = |row: usize, name: &str, value: f64| {
            found.rows[row].figures.insert(name.into(), value);
        };
        add(0, "MiB the storage read", 201.4);
        add(0, "MiB the storage wrote", 12.0);
        add(1, "MiB the storage read", 25.6);
        let text = super::table(&found);
        let lines: Vec<&str> = text
            .lines()
            .skip_while(|line| !line.ends_with("further figures"))
            .skip(1)
            .take(3)
            .collect();
        assert_eq!(
            lines,
            [
                "                    MiB the storage read  MiB the storage wrote",
                "  phy                                201                     12",
                "  tap-clone-cached                    26                      -",
            ]
        );
        assert!(text.contains("   MiB/s "), "{text}");
    }

    #[test]
    fn a_row_that_loses_is_shown_as_it_is() {
        let text = super::table(&results(&[("phy", 50.0), ("c", 100.0)]));
        assert!(text.contains("0.50"), "{text}");
        assert!(text.contains("the phy & more"), "{text}");
    }
}
