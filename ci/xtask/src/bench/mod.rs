// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! `cargo xtask bench`: this driver against others, in a machine whose time is counted in instructions.
//!
//! The program `bench` (tests/bench) does the measuring inside and reports raw samples; a plugin of QEMU counts the
//! instructions. This module combines, judges, and draws the results.

mod boot;
mod bounds;
mod chart;
mod collect;
mod compare;
mod counts;
mod modelled;
mod overview;
mod result;
mod summary;
mod table;

use crate::build;
use crate::tally::TestTally;
use anyhow::{bail, Result};
use result::{Results, WASTEFUL};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

/// Arguments of the command.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct BenchArgs {
    /// Fewer backends, jobs and rounds: under 3 minutes.
    #[arg(long)]
    quick: bool,
    /// Also write the results to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Compare with the results in this file, and say what changed beyond the noise.
    #[arg(long, value_name = "FILE")]
    against: Option<PathBuf>,
    /// Do not measure: read the results from this file, and show or compare them.
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    /// Only these backends, such as phy,phy-again,c,c-plain,phy-loop,c-loop,qdisk,native.
    #[arg(long, value_name = "NAMES")]
    backends: Option<String>,
    /// Only these jobs, such as rr4k-qd32,rr4k-qd1,r1m-qd4. qdisk:rr4k-qd1 is one for this backend only.
    #[arg(long, value_name = "NAMES")]
    jobs: Option<String>,
    /// Measure only what has a bound in tests/bench/bounds.json, and fail when an I/O costs over 5 % more.
    #[arg(long, conflicts_with_all = ["from", "backends", "jobs"])]
    bounds: bool,
    /// Number of measurements of each backend (default: 2; with --quick: 1).
    #[arg(long)]
    rounds: Option<u32>,
    /// Stop after this number of minutes (default: 150), and keep the results so far.
    #[arg(long)]
    minutes: Option<u64>,
    /// Also count for each function of the drivers.
    #[arg(long)]
    functions: bool,
    /// Use this module in place of the one of the checkout.
    #[arg(long, value_name = "KO")]
    module: Option<PathBuf>,
}

/// Measures, shows, stores and compares; false when the run is void.
pub(crate) fn run(args: &BenchArgs) -> Result<bool> {
    // Report an unreadable file before the measurement, not after it.
    let old = args.against.as_deref().map(Results::read).transpose()?;
    let results = match &args.from {
        Some(file) => Results::read(file)?,
        None if args.bounds => boot::measure(&bounded()?)?,
        None => boot::measure(args)?,
    };
    let text = table::table(&results);
    print!("{text}");
    let folder = build::repository()?.join("target/bench");
    fs::create_dir_all(&folder)?;
    if args.from.is_none() {
        results.write(&folder.join("results.json"))?;
    }
    fs::write(folder.join("table.txt"), &text)?;
    fs::write(folder.join("chart.svg"), chart::chart(&results))?;
    fs::write(folder.join("summary.md"), summary::summary(&results))?;
    fs::write(folder.join("overview.svg"), overview::overview(&results))?;
    if let Some(file) = &args.json {
        results.write(file)?;
    }
    println!("results: {}", folder.display());
    if let Some(old) = old {
        print!("{}", compare::compare(&old, &results));
    }
    if args.bounds {
        println!("measured: {}", bounds::measured(&results)?);
        let crossed = bounds::crossed(&results)?;
        for (bound, why) in &crossed {
            println!("TOO DEAR: {bound}: {why}");
        }
        return Ok(crossed.is_empty() && results.failed.is_none());
    }
    let controlled = |row: &result::ResultRow| row.backend == result::CONTROL;
    if !results.rows.iter().any(controlled) {
        println!(
            "no control: the noise of this run is unknown, because it has no phy and phy-again"
        );
    }
    if let Some(reason) = &results.failed {
        println!("BROKE OFF: {reason}");
    }
    let void = results.void();
    for row in &void {
        println!("VOID: {row}");
    }
    Ok(void.is_empty() && results.failed.is_none())
}

/// Returns the arguments to measure the bounds.
fn bounded() -> Result<BenchArgs> {
    let (backends, jobs) = bounds::wanted()?;
    Ok(quick(backends, jobs))
}

/// Returns the arguments to measure the bounds, and a wasteful build of this driver.
fn bounded_and_wasteful() -> Result<BenchArgs> {
    let (backends, mut jobs) = bounds::wanted()?;
    for job in bounds::TELLING {
        jobs.push_str(&format!(",{WASTEFUL}:{job}"));
    }
    Ok(quick(format!("{backends},{WASTEFUL}"), jobs))
}

/// The lane of the gate: checks that the driver keeps the bounds, and that a wasteful build does not.
pub(crate) fn gate(tally: &mut TestTally) -> Result<()> {
    let wanted = bounded_and_wasteful()?;
    let mut results = boot::measure(&wanted)?;
    if let (Some(reason), true) = (&results.failed, results.rows.is_empty()) {
        // Slow storage of the host may keep such a machine from starting, because its clock runs while it waits.
        println!("the machine measured nothing ({reason}): it starts once more");
        results = boot::measure(&wanted)?;
    }
    if let Some(reason) = &results.failed {
        bail!("the measuring broke off: {reason}");
    }
    println!("measured: {}", bounds::measured(&results)?);
    let crossed = confirmed(bounds::crossed(&results)?)?;
    let caught = bounds::crossed_by_waste(&results)?;
    for bound in bounds::names()? {
        match crossed.get(&bound) {
            None => tally.pass(&format!("bench.{bound}")),
            Some(why) => tally.fail(&format!("bench.{bound}"), why),
        }
    }
    for job in bounds::TELLING {
        let name = format!("bench.{job}.wasteful-build-is-caught");
        let of_job = format!("{WASTEFUL}.{job}.");
        if caught.keys().any(|bound| bound.starts_with(&of_job)) {
            tally.pass(&name);
        } else {
            let why = "a module that always looks for requests, and notifies for each, keeps to the bounds: they are too wide";
            tally.fail(&name, why);
        }
    }
    Ok(())
}

/// Returns the bounds that are crossed in another boot as well. The relative timing of guest and dom0 differs from boot
/// to boot, and with it the polling time of a queue: dom0's cost of 4 KiB reads differed by 9 % in two boots of one
/// module. The cost of a change shows in each boot.
fn confirmed(crossed: BTreeMap<String, String>) -> Result<BTreeMap<String, String>> {
    if crossed.is_empty() {
        return Ok(crossed);
    }
    for (bound, why) in &crossed {
        println!("measured once more, in another boot: {bound}: {why}");
    }
    let results = boot::measure(&again(&crossed))?;
    if let Some(reason) = &results.failed {
        bail!("the measuring broke off: {reason}");
    }
    bounds::still_crossed(&results, &crossed)
}

/// Returns the arguments to measure the jobs of these bounds again.
fn again(crossed: &BTreeMap<String, String>) -> BenchArgs {
    let names = crossed.keys().map(|bound| bounds::backend_and_job(bound));
    let (backends, jobs): (BTreeSet<_>, BTreeSet<_>) = names
        .map(|(backend, job)| (backend, format!("{backend}:{job}")))
        .unzip();
    quick(
        Vec::from_iter(backends).join(","),
        Vec::from_iter(jobs).join(","),
    )
}

fn quick(backends: String, jobs: String) -> BenchArgs {
    BenchArgs {
        backends: Some(backends),
        jobs: Some(jobs),
        quick: true,
        ..BenchArgs::default()
    }
}

impl BenchArgs {
    /// Returns true if the arguments name jobs with this ending.
    fn names(&self, end: &str) -> bool {
        let names = self.jobs.as_deref().unwrap_or_default();
        names.split(',').any(|name| name.ends_with(end))
    }

    /// Returns true if the arguments name this backend.
    fn wants(&self, backend: &str) -> bool {
        let names = self.backends.as_deref().unwrap_or_default();
        names.split(',').any(|name| name == backend)
    }
}
