// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The attacks and what runs them.

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
mod tap_life;
mod tap_queues;
mod tap_uring;

use crate::lab::Lab;
use crate::report::Report;
use anyhow::Result;
use std::path::PathBuf;
use std::time::Instant;

/// One attack.
pub(crate) struct Case {
    /// Its name; it begins with its number in the catalogue.
    pub(crate) name: &'static str,
    /// What it shows, in one line.
    pub(crate) about: &'static str,
    /// What the oracle must find after it, for a case that plants something; nothing for an attack.
    pub(crate) finds: &'static [&'static str],
    /// The attack.
    pub(crate) run: fn(&mut Lab) -> Result<()>,
}

/// An entry of the table.
macro_rules! case {
    ($module:ident::$name:ident, $about:literal) => {
        Case {
            name: stringify!($name),
            about: $about,
            finds: &[],
            run: $module::$name,
        }
    };
}
use case;

/// All attacks, in the order in which they run.
pub(crate) fn all() -> Vec<Case> {
    let groups = [
        indices::all(),
        requests::all(),
        data::all(),
        races::all(),
        ranges::all(),
        keys::all(),
        states::all(),
        closing::all(),
        events::all(),
        tap_calls::all(),
        tap_life::all(),
        tap_queues::all(),
        tap_uring::all(),
        planted::all(),
    ];
    groups.into_iter().flatten().collect()
}

/// Which attacks run.
pub(crate) struct Selection {
    /// Those whose name contains one of these words, separated by commas; all without a word.
    pub(crate) only: String,
    /// Not those of tap disks.
    pub(crate) phy: bool,
    /// Stands in the names of the report.
    pub(crate) label: String,
}

impl Selection {
    fn cases(&self) -> Result<Vec<Case>> {
        let words: Vec<&str> = self
            .only
            .split(',')
            .filter(|word| !word.is_empty())
            .collect();
        let mut cases = all();
        cases.retain(|case| words.is_empty() || words.iter().any(|word| case.name.contains(word)));
        cases.retain(|case| !self.phy || !case.name.starts_with("tap_"));
        anyhow::ensure!(
            !cases.is_empty(),
            "no attack is called `{}`: see --list",
            self.only
        );
        Ok(cases)
    }

    fn name(&self, case: &Case) -> String {
        match self.label.as_str() {
            "" => format!("hostile.{}", case.name),
            label => format!("hostile.{label}.{}", case.name),
        }
    }
}

/// Runs the attacks that were selected; true when all were withstood.
pub(crate) fn run(selection: &Selection, seed: u64, device: Option<&PathBuf>) -> Result<bool> {
    let cases = selection.cases()?;
    let mut report = Report::open(cases.len())?;
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
