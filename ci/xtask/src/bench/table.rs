// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The results as text.

use super::counts::PLACES;
use super::result::{Results, Row, CONTROL, OURS};
use std::fmt::Write;

/// All tables: one for each job, then the sum of it.
pub(crate) fn table(results: &Results) -> String {
    let mut text = String::from(LEGEND);
    for job in &results.jobs {
        let _ = writeln!(text, "\n{} ({})", job.title, job.name);
        heading(&mut text);
        for backend in &results.backends {
            if let Some(row) = results.row(&backend.name, &job.name) {
                let ratio = results.ratio(OURS, &backend.name, &job.name);
                line(&mut text, &backend.title, row, ratio);
            }
        }
    }
    hypercalls(&mut text, results);
    summary(&mut text, results);
    text
}

/// Hypercalls of dom0 by kind, where they were counted.
fn hypercalls(text: &mut String, results: &Results) {
    let counted = results.rows.iter().filter(|row| !row.hypercalls.is_empty());
    for (index, row) in counted.enumerate() {
        if index == 0 {
            text.push_str("\nhypercalls of dom0 per I/O\n");
        }
        let _ = write!(text, "  {:12} {:10}", row.job, row.backend);
        let mut kinds: Vec<(&str, f64)> = row
            .hypercalls
            .iter()
            .filter_map(|(name, count)| Some((name.strip_prefix("dom0 ")?, *count)))
            .collect();
        kinds.sort_by(|a, b| b.1.total_cmp(&a.1));
        let sum: f64 = kinds.iter().map(|kind| kind.1).sum();
        let _ = write!(text, " {sum:5.2}:");
        for (name, count) in kinds.iter().filter(|kind| kind.1 >= 0.01) {
            let _ = write!(text, " {name} {count:.2},");
        }
        text.push('\n');
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
spread: lowest to highest round. we are: this driver's IOPS as a multiple of the row's.
Per I/O: executed instructions in Xen, dom0's kernel, the driver, dom0's other modules, dom0's user
space, the guest's kernel and user space; events (ev) to dom0 and to the guest; context switches (cs).
";

fn heading(text: &mut String) {
    let _ = write!(
        text,
        "  {:32} {:>8} {:>7} {:>8} |",
        "backend", "IOPS", "spread", "we are"
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
        "\nthis driver's IOPS as a multiple of\n  {:14} {:>8}",
        "job", "C's best"
    );
    for name in &others {
        let _ = write!(text, " {name:>8}");
    }
    let _ = writeln!(text, " {:>8}", "control");
    for job in &results.jobs {
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
