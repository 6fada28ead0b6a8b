// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Model of an I/O's time on a real host from its counts, in nanoseconds of dom0's processor. A count of instructions
//! rates a hypercall like any other instruction; `tests/bench/weights.json` has its further cost and that of the other
//! counts, each with the source of the figure.

use super::counts::{PlaceCounts, DOM0, EVENT_OP, SLEEPS};
use anyhow::{Context, Result};
use serde::Deserialize;
use std::collections::BTreeMap;

const WEIGHTS: &str = include_str!("../../../../tests/bench/weights.json");
/// Name of the column.
pub(crate) const MODELLED: &str = "modelled ns, dom0's processor";
/// A copy counts as one instruction for this number of bytes.
const WORD: f64 = 8.0;

/// Nanoseconds of one event or byte.
#[derive(Debug, Deserialize)]
struct Weight {
    ns: f64,
    /// Source of the figure, for readers of the file.
    #[serde(rename = "from")]
    _from: String,
}

/// Returns the nanoseconds of one I/O from its instructions by place, its hypercalls and sleeps by name, and its
/// context switches. `None` where dom0 and the guest share a processor.
pub(crate) fn nanoseconds(
    places: &PlaceCounts,
    turns: &PlaceCounts,
    switches: f64,
) -> Result<Option<f64>> {
    let weights: BTreeMap<String, Weight> =
        serde_json::from_str(WEIGHTS).context("tests/bench/weights.json has other words")?;
    let weight = |name: &str| {
        let found = weights.get(name).map(|weight| weight.ns);
        found.with_context(|| format!("tests/bench/weights.json has no weight of `{name}`"))
    };
    let Some(all) = places.get(DOM0) else {
        return Ok(None);
    };
    let of = |counts: &PlaceCounts, name: &str| counts.get(name).copied().unwrap_or(0.0);
    let copied = of(places, "copying, dom0's processor");
    let events = of(turns, &format!("dom0 {EVENT_OP}"));
    let hypercalls: f64 = turns
        .iter()
        .filter(|(name, _)| name.starts_with("dom0 "))
        .map(|(_, count)| count)
        .sum();
    let parts = [
        ("instruction", all - copied),
        ("byte copied", copied * WORD),
        ("hypercall", hypercalls),
        ("sleep", of(turns, SLEEPS)),
        ("event sent", events),
        ("task switch", switches),
    ];
    let mut sum = 0.0;
    for (name, count) in parts {
        sum += weight(name)? * count;
    }
    Ok(Some(sum))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_count_has_its_weight() {
        let places = |of: &[(&str, f64)]| -> PlaceCounts {
            of.iter()
                .map(|(name, count)| (name.to_string(), *count))
                .collect()
        };
        let all = places(&[(DOM0, 1010.0), ("copying, dom0's processor", 10.0)]);
        let turns = places(&[
            ("dom0 sched_op", 1.0),
            ("dom0 evtchn_op", 1.0),
            ("guest evtchn_op", 9.0),
            (SLEEPS, 1.0),
        ]);
        let found = nanoseconds(&all, &turns, 2.0).unwrap().unwrap();
        let wanted = 0.3 * 1000.0 + 0.06 * 80.0 + 250.0 * 2.0 + 2000.0 + 300.0 + 300.0 * 2.0;
        assert!((found - wanted).abs() < 1e-6, "{found} {wanted}");
        assert_eq!(nanoseconds(&PlaceCounts::new(), &turns, 2.0).unwrap(), None);
    }
}
