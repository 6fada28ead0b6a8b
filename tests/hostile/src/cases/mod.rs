// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The attacks and their runner.

mod closing;
mod data;
mod events;
mod indices;
mod keys;
mod planted;
mod races;
mod ranges;
mod requests;
mod states;
mod tap_calls;
mod tap_claims;
mod tap_extents;
mod tap_life;
mod tap_maps;
mod tap_queues;
mod tap_recalls;
mod tap_spoiled;
mod tap_unbound;
mod tap_uring;

use crate::lab::Lab;
use crate::report::AttackReport;
use anyhow::Result;
use std::path::PathBuf;
use std::time::Instant;

/// One attack.
pub(crate) struct AttackCase {
    /// Its name; it begins with its number in the catalogue.
    pub(crate) name: &'static str,
    /// Purpose of the attack, in one line.
    pub(crate) about: &'static str,
    /// Words that the oracle must report after a case that plants a fault; empty for an attack.
    pub(crate) finds: &'static [&'static str],
    /// The attack.
    pub(crate) run: fn(&mut Lab) -> Result<()>,
}

/// Defines an entry of the table.
macro_rules! case {
    ($module:ident::$name:ident, $about:literal) => {
        AttackCase {
            name: stringify!($name),
            about: $about,
            finds: &[],
            run: $module::$name,
        }
    };
}
use case;

/// Module parameters that matter for a group of attacks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum AttackParameters {
    /// All: the attacks are about the pages of requests, which the module copies or maps.
    Pages,
    /// The attacks are not about the pages of their requests.
    Rings,
    /// The process of a tap disk, for which these parameters make no difference.
    Tap,
}

/// All attacks, in the order in which they run.
fn groups() -> impl Iterator<Item = (AttackParameters, AttackCase)> {
    let groups = [
        (AttackParameters::Rings, indices::all()),
        (AttackParameters::Rings, requests::all()),
        (AttackParameters::Pages, data::all()),
        (AttackParameters::Pages, races::all()),
        (AttackParameters::Rings, ranges::all()),
        (AttackParameters::Rings, keys::all()),
        (AttackParameters::Rings, states::all()),
        (AttackParameters::Pages, closing::all()),
        (AttackParameters::Rings, events::all()),
        (AttackParameters::Tap, tap_calls::all()),
        (AttackParameters::Tap, tap_claims::all()),
        (AttackParameters::Tap, tap_life::all()),
        (AttackParameters::Tap, tap_maps::all()),
        (AttackParameters::Tap, tap_extents::all()),
        (AttackParameters::Tap, tap_recalls::all()),
        (AttackParameters::Tap, tap_unbound::all()),
        (AttackParameters::Tap, tap_spoiled::all()),
        (AttackParameters::Tap, tap_queues::all()),
        (AttackParameters::Tap, tap_uring::all()),
        (AttackParameters::Rings, planted::all()),
    ];
    let each = |(meets, cases): (AttackParameters, Vec<AttackCase>)| {
        cases.into_iter().map(move |case| (meets, case))
    };
    groups.into_iter().flat_map(each)
}

/// All attacks.
pub(crate) fn all() -> Vec<AttackCase> {
    groups().map(|(_, case)| case).collect()
}

/// Selection of the attacks to run.
pub(crate) struct Selection {
    /// Attacks whose name contains one of these words, separated by commas; all without a word.
    pub(crate) only: String,
    /// Skip the attacks of tap disks.
    pub(crate) phy: bool,
    /// Run only the attacks that are about the pages of requests.
    pub(crate) pages: bool,
    /// Word in the names of the report.
    pub(crate) label: String,
}

impl Selection {
    fn cases(&self) -> Result<Vec<AttackCase>> {
        let words: Vec<&str> = self
            .only
            .split(',')
            .filter(|word| !word.is_empty())
            .collect();
        let named = |case: &AttackCase| {
            words.is_empty() || words.iter().any(|word| case.name.contains(word))
        };
        let wanted = groups().filter(|(meets, case)| {
            (!self.phy || *meets != AttackParameters::Tap)
                && (!self.pages || *meets == AttackParameters::Pages)
                && named(case)
        });
        let cases: Vec<AttackCase> = wanted.map(|(_, case)| case).collect();
        anyhow::ensure!(
            !cases.is_empty(),
            "no attack is called `{}`: see --list",
            self.only
        );
        Ok(cases)
    }

    fn name(&self, case: &AttackCase) -> String {
        match self.label.as_str() {
            "" => format!("hostile.{}", case.name),
            label => format!("hostile.{label}.{}", case.name),
        }
    }
}

/// Runs the selected attacks; returns true if the backend withstood all of them.
pub(crate) fn run(selection: &Selection, seed: u64, device: Option<&PathBuf>) -> Result<bool> {
    let cases = selection.cases()?;
    let mut report = AttackReport::open(cases.len())?;
    report.note(&format!("seed {seed}"))?;
    let mut lab = Lab::new(device, seed)?;
    for case in &cases {
        let start = Instant::now();
        lab.begin()?;
        let outcome = (case.run)(&mut lab);
        let outcome = match (outcome, lab.check()) {
            (outcome, health) if !case.finds.is_empty() => {
                let found = outcome.and_then(|()| planted::found(case.finds, health));
                lab.unplant().and(found)
            }
            (Err(error), Err(health)) => Err(error.context(format!("and also: {health:#}"))),
            (Ok(_), Err(health)) => Err(health),
            (outcome, Ok(())) => outcome,
        };
        report.verdict(
            &selection.name(case),
            start.elapsed().as_secs_f64(),
            &outcome,
        )?;
    }
    lab.finish()?;
    Ok(report.passed())
}

#[cfg(test)]
mod tests {
    use super::Selection;

    #[test]
    fn attacks_are_selected_by_what_they_are_about() {
        let select = |phy, pages, only: &str| {
            let (only, label) = (only.to_owned(), String::new());
            let cases = Selection {
                only,
                phy,
                pages,
                label,
            }
            .cases()?;
            anyhow::Ok(cases.into_iter().map(|case| case.name).collect::<Vec<_>>())
        };
        let (all, phy) = (
            select(false, false, "").unwrap(),
            select(true, false, "").unwrap(),
        );
        let pages = select(false, true, "").unwrap();
        assert!(all.contains(&"tap_serve") && !phy.contains(&"tap_serve"));
        assert!(phy.contains(&"h07_attach_to_garbage"));
        assert!(!pages.contains(&"h07_attach_to_garbage") && !pages.contains(&"tap_serve"));
        assert!(pages.contains(&"h25_taken_back_in_flight"));
        assert_eq!(
            select(false, true, "h25").unwrap(),
            ["h25_taken_back_in_flight"]
        );
        assert!(select(true, false, "tap_serve").is_err());
    }
}
