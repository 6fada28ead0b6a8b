// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Two results: what changed beyond the noise.

use super::counts::{DOM0, TOTAL};
use super::result::{Figure, ResultRow, Results, CONTROL, CONTROL_LIMIT, OURS};
use std::fmt::Write;

/// Smallest change that counts, however small the noise: addresses and timers vary.
const FLOOR: f64 = 0.02;

/// Returns the changes from `old` to `new`.
pub(crate) fn compare(old: &Results, new: &Results) -> String {
    let mut text = String::from("\ncompared with the other results:\n");
    let (mut compared, mut changed) = (0, 0);
    for row in &new.rows {
        let Some(before) = old.row(&row.backend, &row.job) else {
            continue;
        };
        compared += 1;
        let noise = noise(old, before).max(noise(new, row));
        for change in changes(before, row, noise) {
            changed += 1;
            let _ = writeln!(text, "  {:12} {:10} {change}", row.job, row.backend);
        }
    }
    let _ = writeln!(
        text,
        "  {compared} rows compared, {changed} figures changed beyond the noise"
    );
    text.push_str(&agreement(old, new));
    text
}

/// Returns the difference of the speeds: two runs of one build should agree in each row as well as a run with itself.
fn agreement(old: &Results, new: &Results) -> String {
    let (mut compared, mut apart) = (0, Vec::new());
    for row in &new.rows {
        let before = old.row(&row.backend, &row.job);
        let Some(before) = before.filter(|before| before.iops.median > 0.0) else {
            continue;
        };
        compared += 1;
        let change = row.iops.median / before.iops.median - 1.0;
        if change.abs() > CONTROL_LIMIT {
            let percent = change * 100.0;
            apart.push(format!("{} {} {percent:+.1} %", row.backend, row.job));
        }
    }
    let limit = CONTROL_LIMIT * 100.0;
    let within = compared - apart.len();
    let mut text = format!("  {within} of {compared} speeds are within {limit:.0} %");
    if !apart.is_empty() {
        let _ = write!(text, "; not {}", apart.join(", "));
    }
    text + "\n"
}

/// Returns the noise of a row: the spread of its rounds, or the difference of its job's control.
fn noise(results: &Results, row: &ResultRow) -> f64 {
    let control = results
        .ratio(CONTROL, OURS, &row.job)
        .map_or(0.0, |ratio| (ratio - 1.0).abs());
    row.iops.spread().max(control).max(FLOOR)
}

fn changes(old: &ResultRow, new: &ResultRow, noise: f64) -> Vec<String> {
    let mut found = Vec::new();
    let mut look =
        |what: &str, old: Option<&Figure>, new: Option<&Figure>, more_is_better: bool| {
            let (Some(old), Some(new)) = (old, new) else {
                return;
            };
            if old.median <= 0.0 {
                return;
            }
            let change = new.median / old.median - 1.0;
            if change.abs() > noise {
                found.push(format!(
                    "{what} {:.0} -> {:.0} ({:+.1} %, noise {:.1} %): {}",
                    old.median,
                    new.median,
                    change * 100.0,
                    noise * 100.0,
                    if (change > 0.0) == more_is_better {
                        "better"
                    } else {
                        "WORSE"
                    }
                ));
            }
        };
    look("IOPS", Some(&old.iops), Some(&new.iops), true);
    for (what, sum) in [("cost", TOTAL), ("cost on dom0's processor", DOM0)] {
        let (old, new) = (old.instructions.get(sum), new.instructions.get(sum));
        look(what, old, new, false);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::result::tests::results;
    use super::compare;

    #[test]
    fn changes_beyond_the_noise_are_told_with_their_sign() {
        let old = results(&[("phy", 100.0), ("c", 100.0), ("gone", 1.0)]);
        let new = results(&[("phy", 110.0), ("c", 101.0)]);
        let text = compare(&old, &new);
        assert!(
            text.contains("IOPS 100 -> 110 (+10.0 %, noise 2.0 %): better"),
            "{text}"
        );
        assert!(
            text.contains("2 rows compared, 2 figures changed"),
            "{text}"
        );
        assert!(compare(&new, &old).contains("WORSE"));
    }

    #[test]
    fn speeds_that_do_not_agree_are_named() {
        let old = results(&[("phy", 100.0), ("c", 100.0), ("idle", 0.0)]);
        let new = results(&[("phy", 106.0), ("c", 95.5), ("idle", 0.0)]);
        let text = compare(&old, &new);
        let wanted = "1 of 2 speeds are within 5 %; not phy j +6.0 %\n";
        assert!(text.ends_with(wanted), "{text}");
        assert!(compare(&old, &old).ends_with("2 of 2 speeds are within 5 %\n"));
    }

    #[test]
    fn what_the_control_shows_is_noise() {
        let old = results(&[("phy", 100.0), ("phy-again", 88.0)]);
        let new = results(&[("phy", 110.0), ("phy-again", 96.8)]);
        assert!(compare(&old, &new).contains("0 figures changed"));
    }
}
