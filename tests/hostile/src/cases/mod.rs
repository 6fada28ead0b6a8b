// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The attacks and what runs them.

mod closing;
mod data;
mod events;
mod indices;
mod keys;
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
    /// The attack: nothing, or why it cannot run here.
    pub(crate) run: fn(&mut Lab) -> Result<Option<String>>,
}

/// An entry of the table: a function that always runs.
macro_rules! case {
    ($module:ident::$name:ident, $about:literal) => {
        Case {
            name: stringify!($name),
            about: $about,
            run: |lab| $module::$name(lab).map(|()| None),
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
    ];
    groups.into_iter().flatten().collect()
}

/// Runs the attacks that `only` selects; true when all were withstood.
pub(crate) fn run(only: &str, device: Option<&PathBuf>) -> Result<bool> {
    let words: Vec<&str> = only.split(',').filter(|word| !word.is_empty()).collect();
    let mut cases = all();
    cases.retain(|case| words.is_empty() || words.iter().any(|word| case.name.contains(word)));
    anyhow::ensure!(
        !cases.is_empty(),
        "no attack is called `{only}`: see --list"
    );
    let mut lab = Lab::new(device)?;
    let mut report = Report::open(cases.len())?;
    for case in &cases {
        let start = Instant::now();
        lab.begin()?;
        let outcome = (case.run)(&mut lab);
        let outcome = match (outcome, lab.check()) {
            (Err(error), Err(health)) => Err(error.context(format!("and also: {health:#}"))),
            (Ok(_), Err(health)) => Err(health),
            (outcome, Ok(())) => outcome,
        };
        let name = format!("hostile.{}", case.name);
        report.verdict(&name, start.elapsed().as_secs_f64(), &outcome)?;
    }
    lab.finish()?;
    Ok(report.passed())
}
