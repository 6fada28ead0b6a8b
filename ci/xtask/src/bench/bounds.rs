// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The bounds that a change of the driver must not cross unnoticed: instructions per I/O, all places
//! together, as `tests/bench/bounds.json` records them.

use super::result::{Results, OURS};
use anyhow::{Context, Result};
use std::collections::BTreeMap;

/// Recorded instructions per I/O by job.
const BOUNDS: &str = include_str!("../../../../tests/bench/bounds.json");
/// How far above its bound a figure may be.
const TOLERANCE: f64 = 0.05;

/// The jobs that have a bound, as the machine wants to be told.
pub(super) fn jobs() -> Result<String> {
    Ok(parse(BOUNDS)?.into_keys().collect::<Vec<_>>().join(","))
}

/// One line for each bound that was crossed.
pub(super) fn crossed(results: &Results) -> Result<Vec<String>> {
    against(results, &parse(BOUNDS)?)
}

fn parse(text: &str) -> Result<BTreeMap<String, f64>> {
    serde_json::from_str(text).context("tests/bench/bounds.json must be numbers by names of jobs")
}

fn against(results: &Results, bounds: &BTreeMap<String, f64>) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for (job, bound) in bounds {
        let figure = results
            .row(OURS, job)
            .and_then(|row| row.instructions.get("total"))
            .with_context(|| format!("{job} has a bound, but was not measured"))?;
        let over = figure.median / bound - 1.0;
        if over > TOLERANCE {
            lines.push(format!(
                "{job}: {:.0} instructions per I/O are {:.1} % above the bound of {bound:.0}: make it \
                 cheaper again, or say in the commit why it may cost more and raise tests/bench/bounds.json",
                figure.median,
                over * 100.0
            ));
        }
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::super::result::tests::results;
    use super::*;

    #[test]
    fn five_per_cent_are_tolerated_and_no_more() {
        // 1e9 / 1e5 = 10000 instructions per I/O.
        let measured = results(&[("phy", 1e5)]);
        let bound = |value: f64| [("j".to_string(), value)].into();
        assert!(against(&measured, &bound(9600.0)).unwrap().is_empty());
        assert_eq!(against(&measured, &bound(9500.0)).unwrap().len(), 1);
        let unknown = [("other".to_string(), 1.0)].into();
        assert!(against(&measured, &unknown).is_err());
    }

    #[test]
    fn recorded_bounds_are_readable() {
        assert!(!jobs().unwrap().is_empty());
    }
}
