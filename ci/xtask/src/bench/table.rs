// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The results as text.

use super::counts::PLACES;
use super::result::{Results, Row, CONTROL, IO, OURS};
use std::fmt::Write;

/// All tables: one for each job, then the sum of it.
pub(crate) fn table(results: &Results) -> String {
    let mut text = String::from(LEGEND);
    if let Some(reason) = &results.failed {
        let first = reason.lines().next().unwrap_or_default();
        let _ = writeln!(text, "NOT COMPLETE: {first}");
    }
    let measured = |name: &str| results.rows.iter().any(|row| row.job == name);
    for job in results.jobs.iter().filter(|job| measured(&job.name)) {
        let _ = writeln!(text, "\n{} ({})", job.title, job.name);
        heading(&mut text, &job.unit);
        for backend in &results.backends {
            if let Some(row) = results.row(&backend.name, &job.name) {
                let ratio = results.ratio(OURS, &backend.name, &job.name);
                line(&mut text, &backend.title, row, ratio);
            }
        }
    }
    hypercalls(&mut text, results);
    figures(&mut text, results);
    functions(&mut text, results);
    summary(&mut text, results);
    text
}

/// Hypercalls of dom0 by kind, where they were counted.
fn hypercalls(text: &mut String, results: &Results) {
    let counted = results.rows.iter().filter(|row| !row.hypercalls.is_empty());
    for (index, row) in counted.enumerate() {
        if index == 0 {
            text.push_str("\nhypercalls of dom0 per I/O, and what a trace shows beside them\n");
        }
        let _ = write!(text, "  {:12} {:10}", row.job, row.backend);
        let woken = |domain: &str| row.hypercalls.get(&format!("{domain} wakeups")).copied();
        let mut kinds: Vec<(&str, f64)> = row
            .hypercalls
            .iter()
            .filter_map(|(name, count)| Some((name.strip_prefix("dom0 ")?, *count)))
            .filter(|(name, _)| *name != "wakeups")
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
            " and events sent by the guest {:.2}, wakeups in dom0 {:.2}, in the guest {:.2}",
            sent.copied().unwrap_or(0.0),
            woken("dom0").unwrap_or(0.0),
            woken("guest").unwrap_or(0.0)
        );
    }
}

/// What only some jobs have.
fn figures(text: &mut String, results: &Results) {
    for job in &results.jobs {
        let rows: Vec<&Row> = results
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
        let _ = write!(
            text,
            "\n{} ({}), further figures\n  {:10}",
            job.title, job.name, ""
        );
        for name in &names {
            let _ = write!(text, "  {name}");
        }
        text.push('\n');
        for row in rows {
            let _ = write!(text, "  {:10}", row.backend);
            for name in &names {
                let value = row.figures.get(*name);
                let value = value.map_or("-".to_string(), |value| format!("{value:.0}"));
                let _ = write!(text, "  {value:>width$}", width = name.len());
            }
            text.push('\n');
        }
    }
}

/// How many functions are shown; what the others cost is in the results.
const FUNCTIONS: usize = 30;

/// What the functions of the drivers cost, where that was asked for.
fn functions(text: &mut String, results: &Results) {
    for row in results.rows.iter().filter(|row| !row.functions.is_empty()) {
        let _ = writeln!(
            text,
            "\n{}, functions of the driver of {}",
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

/// Heads of the columns of [`PLACES`] and their sum.
const SHORT: [&str; 8] = [
    "Xen", "dom0 k", "driver", "other m", "dom0 u", "guest k", "guest u", "total",
];
/// The other counts of an I/O, and heads for them.
const OTHERS: [(&str, &str); 4] = [
    ("events to dom0", "ev>d0"),
    ("events to the guest", "ev>gu"),
    ("context switches of dom0", "cs d0"),
    ("context switches of the guest", "cs gu"),
];
/// What the heads mean.
const LEGEND: &str = "\
spread: lowest to highest round. we are: this driver's speed as a multiple of the row's.
Per I/O, disk or what the speed is of: executed instructions in Xen, dom0's kernel, the driver, dom0's other modules, dom0's user
space, the guest's kernel and user space; events (ev) to dom0 and to the guest; context switches (cs).
";

fn heading(text: &mut String, unit: &str) {
    let speed = match unit {
        IO => "IOPS".to_string(),
        unit => format!("{}/s", unit.split(' ').next().unwrap_or_default()),
    };
    let _ = write!(
        text,
        "  {:32} {speed:>8} {:>7} {:>8} |",
        "backend", "spread", "we are"
    );
    for head in SHORT {
        let _ = write!(text, " {head:>8}");
    }
    text.push_str(" |");
    for (_, head) in OTHERS {
        let _ = write!(text, " {head:>6}");
    }
    text.push('\n');
}

fn line(text: &mut String, title: &str, row: &Row, ratio: Option<f64>) {
    let ratio = ratio.map_or("-".into(), |ratio| format!("{ratio:.2} x"));
    let _ = write!(
        text,
        "  {title:32} {:>8.0} {:>6.1}% {ratio:>8} |",
        row.iops.median,
        row.iops.spread() * 100.0
    );
    for place in PLACES.iter().chain(&["total"]) {
        let figure = row.instructions.get(*place);
        let _ = write!(text, " {:>8.0}", figure.map_or(0.0, |figure| figure.median));
    }
    text.push_str(" |");
    for (name, _) in OTHERS {
        let figure = row.per_io.get(name);
        let _ = write!(text, " {:>6.2}", figure.map_or(0.0, |figure| figure.median));
    }
    text.push('\n');
}

/// Our driver against each other, in one line a job.
fn summary(text: &mut String, results: &Results) {
    let others: Vec<&str> = results
        .backends
        .iter()
        .map(|backend| backend.name.as_str())
        .filter(|name| *name != OURS && *name != CONTROL)
        .collect();
    let _ = write!(
        text,
        "\nthis driver's speed as a multiple of\n  {:14} {:>8}",
        "job", "C's best"
    );
    for name in &others {
        let _ = write!(text, " {name:>8}");
    }
    let _ = writeln!(text, " {:>8}", "control");
    let ours = |name: &str| results.row(OURS, name).is_some();
    for job in results.jobs.iter().filter(|job| ours(&job.name)) {
        let _ = write!(
            text,
            "  {:14} {:>8}",
            job.name,
            times(results.ratio_to_best_c(&job.name))
        );
        for name in others.iter().chain(&[CONTROL]) {
            let _ = write!(text, " {:>8}", times(results.ratio(OURS, name, &job.name)));
        }
        text.push('\n');
    }
}

fn times(ratio: Option<f64>) -> String {
    ratio.map_or("-".into(), |ratio| format!("{ratio:.2}"))
}

#[cfg(test)]
mod tests {
    use super::super::result::tests::results;

    #[test]
    fn a_row_that_loses_is_shown_as_it_is() {
        let text = super::table(&results(&[("phy", 50.0), ("c", 100.0)]));
        assert!(text.contains("0.50"), "{text}");
        assert!(text.contains("the phy & more"), "{text}");
    }
}
