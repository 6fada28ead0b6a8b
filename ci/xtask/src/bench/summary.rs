// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The results as a table of Markdown, for a README.

use super::counts::{DOM0, TOTAL};
use super::modelled::MODELLED;
use super::result::{Results, TitledName, C, IO, OURS, QDISK};
use std::fmt::Write;

/// Backends of each column. A column of several shows the lowest cost among them.
const SHOWN: [(&[&str], &str); 7] = [
    (&[OURS], "this driver"),
    (&C, "C, best"),
    (&["tap-aio"], "tap:aio"),
    (&[QDISK[0]], "qdisk"),
    (&[QDISK[1]], "qdisk, past the cache"),
    (&["phy-pvh"], "PVH: this driver"),
    (&["c-pvh", "c-plain-pvh"], "PVH: C, best"),
];
/// The heads.
const HEADS: [(&str, &str); 3] = [
    (TOTAL, "the sum"),
    (DOM0, "dom0's processor"),
    (MODELLED, "modelled us of it"),
];
/// Memory of dom0 that a disk needs while idle and under load: figures of this job.
const MEMORY: (&str, [&str; 2]) = ("idle16", ["KiB of dom0, idle", "KiB of dom0, busy"]);

/// Returns the table: the total cost of each job, and its cost on dom0's processor in instructions and in modelled
/// microseconds.
pub(crate) fn summary(results: &Results) -> String {
    let measured = |names: &[&str]| {
        results
            .backends
            .iter()
            .any(|b| names.contains(&b.name.as_str()))
    };
    let shown: Vec<(&[&str], &str)> = SHOWN
        .into_iter()
        .filter(|(names, _)| measured(names))
        .collect();
    let mut text = String::from("| thousands of instructions for each |");
    for (_, head) in HEADS {
        for (_, title) in &shown {
            let _ = write!(text, " {head}: {title} |");
        }
        text.push_str(" of C's best |");
    }
    text.push_str("\n|---|");
    text.push_str(&"---:|".repeat(HEADS.len() * (shown.len() + 1)));
    text.push('\n');
    for job in &results.jobs {
        if results.least(&[OURS], TOTAL, &job.name).is_some() {
            line(&mut text, results, job, &shown);
        }
    }
    memory(&mut text, results);
    text
}

fn line(text: &mut String, results: &Results, job: &TitledName, shown: &[(&[&str], &str)]) {
    let unit = match job.unit.as_str() {
        IO => String::new(),
        unit => format!(" ({unit})"),
    };
    let _ = write!(text, "| {}{unit} |", job.title);
    for (sum, _) in HEADS {
        for (names, _) in shown {
            let cost = results.least(names, sum, &job.name);
            let _ = write!(text, " {} |", number(cost.map(|cost| cost / 1000.0)));
        }
        let ratio = results.cost(&C, sum, &job.name);
        let ratio = ratio.map_or("-".into(), |ratio| format!("**{ratio:.2}**"));
        let _ = write!(text, " {ratio} |");
    }
    text.push('\n');
}

/// Adds a line of its own, because its values are kilobytes.
fn memory(text: &mut String, results: &Results) {
    let (job, names) = MEMORY;
    let rows = results.rows.iter().filter(|row| row.job == job);
    let taken: Vec<String> = rows
        .filter_map(|row| {
            let [idle, busy] = names.map(|name| row.figures.get(name));
            Some(format!("{} {:.0} and {:.0}", row.backend, idle?, busy?))
        })
        .collect();
    if !taken.is_empty() {
        let _ = writeln!(
            text,
            "\nMemory of a disk, idle and busy, in KiB of dom0: {}.",
            taken.join(", ")
        );
    }
}

/// Returns a number with as many digits as are useful.
fn number(value: Option<f64>) -> String {
    match value {
        None => "-".to_string(),
        Some(few) if few < 100.0 => format!("{few:.1}"),
        Some(many) => format!("{many:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::result::tests::results;

    #[test]
    fn each_job_is_a_line_with_all_heads() {
        let mut found = results(&[("phy", 50_000.0), ("c", 100_000.0), ("c-plain", 10_000.0)]);
        found.jobs.push(found.jobs[0].clone());
        found.jobs[1].name = "not measured".into();
        let text = super::summary(&found);
        let line = text.lines().last().unwrap();
        assert_eq!(
            line,
            "| the j & more | 20.0 | 10.0 | **2.00** | - | - | - | - | - | - |"
        );
    }

    #[test]
    fn memory_is_a_line_of_its_own() {
        let mut found = results(&[("phy", 1.0), ("c", 1.0)]);
        for row in &mut found.rows {
            row.job = "idle16".into();
            row.figures = super::MEMORY.1.map(|name| (name.to_string(), 12.3)).into();
        }
        assert!(super::summary(&found).ends_with("in KiB of dom0: phy 12 and 12, c 12 and 12.\n"));
    }
}
