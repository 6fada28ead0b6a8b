// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The results as a table of Markdown, for a README.

use super::result::{Results, Row, IO, OURS};
use std::fmt::Write;

/// The backends that have a column.
const SHOWN: [(&str, &str); 5] = [
    (OURS, "this driver"),
    ("c", "C, persistent"),
    ("c-plain", "C, not persistent"),
    ("tap-aio", "tap:aio"),
    ("qdisk", "qdisk"),
];
/// What is not the guest's own work.
const HOST: [&str; 5] = [
    "Xen",
    "dom0 kernel",
    "backend module",
    "other modules",
    "dom0 user",
];

/// The table: speeds, and what one costs outside of the guest.
pub(crate) fn summary(results: &Results) -> String {
    let shown: Vec<(&str, &str)> = SHOWN
        .into_iter()
        .filter(|(name, _)| results.backends.iter().any(|backend| backend.name == *name))
        .collect();
    let mut text = String::from("| per second |");
    for (_, title) in &shown {
        let _ = write!(text, " {title} |");
    }
    text.push_str(
        " ratio to C's best | Xen and dom0, k instructions: this driver | C, persistent |\n|---|",
    );
    text.push_str(&"---:|".repeat(shown.len() + 3));
    text.push('\n');
    let with_speed = results.jobs.iter().filter(|job| {
        results
            .row(OURS, &job.name)
            .is_some_and(|row| row.iops.median > 0.0)
    });
    for job in with_speed {
        let unit = match job.unit.as_str() {
            IO => String::new(),
            unit => format!(" ({unit})"),
        };
        let _ = write!(text, "| {}{unit} |", job.title);
        for (name, _) in &shown {
            let speed = results.row(name, &job.name).map(|row| row.iops.median);
            let _ = write!(text, " {} |", number(speed));
        }
        let ratio = results.ratio_to_best_c(&job.name);
        let _ = write!(
            text,
            " {} |",
            ratio.map_or("-".into(), |ratio| format!("**{ratio:.2}**"))
        );
        for name in [OURS, "c"] {
            let cost = results.row(name, &job.name).map(|row| host(row) / 1000.0);
            let _ = write!(text, " {} |", number(cost));
        }
        text.push('\n');
    }
    text
}

fn host(row: &Row) -> f64 {
    let of = |place: &&str| row.instructions.get(*place).map_or(0.0, |cost| cost.median);
    HOST.iter().map(of).sum()
}

/// As many digits as are worth reading.
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
    fn each_job_is_a_line() {
        let text = super::summary(&results(&[("phy", 50.0), ("c", 100.0)]));
        let line = text.lines().last().unwrap();
        assert_eq!(line, "| the j & more | 50.0 | 100 | **0.50** | 0.0 | 0.0 |");
    }
}
