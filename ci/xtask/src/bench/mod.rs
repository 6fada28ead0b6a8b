// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! `cargo xtask bench`: our driver against others, in a machine whose time is counted in instructions.
//!
//! The program `bench` (tests/bench) does the measuring inside and reports raw samples; a plugin of
//! QEMU counts the instructions. Here they are put together, judged, and drawn.

mod bounds;
mod chart;
mod collect;
mod compare;
mod counts;
mod result;
mod table;

use crate::machine::Machine;
use crate::recipes::{self, Machines};
use crate::root::Root;
use crate::{build, payload, run as process};
use anyhow::{ensure, Context, Result};
use collect::Collector;
use result::Results;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What the user asked for.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
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
    /// Only these jobs, such as rr4k-qd32,rr4k-qd1,r1m-qd4.
    #[arg(long, value_name = "NAMES")]
    jobs: Option<String>,
    /// Measure only our driver, and fail when an I/O costs over 5 % more instructions than
    /// tests/bench/bounds.json allows.
    #[arg(long, conflicts_with_all = ["from", "backends", "jobs"])]
    bounds: bool,
    /// How often each backend is measured (default: 3; with --quick: 1).
    #[arg(long)]
    rounds: Option<u32>,
    /// Use this module in place of the one of the checkout.
    #[arg(long, value_name = "KO")]
    module: Option<PathBuf>,
}

/// Measures, shows, stores and compares; false when the run is void.
pub(crate) fn run(args: &Args) -> Result<bool> {
    // A file that cannot be read must not be found out after the measuring.
    let old = args.against.as_deref().map(Results::read).transpose()?;
    let results = match &args.from {
        Some(file) => Results::read(file)?,
        None => measure(args)?,
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
    if let Some(file) = &args.json {
        results.write(file)?;
    }
    println!("results: {}", folder.display());
    if let Some(old) = old {
        print!("{}", compare::compare(&old, &results));
    }
    if args.bounds {
        let crossed = bounds::crossed(&results)?;
        for line in &crossed {
            println!("TOO DEAR: {line}");
        }
        return Ok(crossed.is_empty());
    }
    let controlled = |row: &result::Row| row.backend == result::CONTROL;
    if !results.rows.iter().any(controlled) {
        println!("no control: without phy and phy-again nobody knows the noise of this run");
    }
    let void = results.void();
    for row in &void {
        println!("VOID: {row}");
    }
    Ok(void.is_empty())
}

/// Boots the machine and collects.
fn measure(args: &Args) -> Result<Results> {
    let machines = recipes::machines()?;
    let mut machine = Machine::new("bench");
    machine.icount = true;
    machine.checks = false;
    // Each domain has a processor of its own, so that the counters tell them apart.
    machine.xen_args = "dom0_max_vcpus=1 dom0_vcpus_pin".into();
    machine.dom0_args = "noblkback".into();
    machine.timeout = Duration::from_secs(if args.quick { 600 } else { 3600 });
    machine.plugin = Some(plugin(&machines)?);
    let payload = fill(args, &machines)?;
    eprintln!("booting Xen and dom0 in QEMU, with time counted in instructions ...");
    // The machine may have to wait for another one before it starts.
    let mut start = None;
    let mut collector = Collector::default();
    let mut raw = String::new();
    let outcome = machine.run(&machines, &payload, |line| {
        raw.push_str(line);
        raw.push('\n');
        collector.line(line);
        if let Some(progress) = collector.progress() {
            let start = start.get_or_insert_with(Instant::now);
            eprintln!("{:5} s  {progress}", start.elapsed().as_secs());
        }
    })?;
    fs::write(outcome.console.with_file_name("report.jsonl"), raw)?;
    outcome.verdict()?;
    let counts = outcome.console.with_file_name("plugin.out");
    let text = fs::read_to_string(&counts)
        .with_context(|| format!("QEMU's plugin wrote no {}", counts.display()))?;
    let mut results = collector.results(&counts::parse(&text)?)?;
    results.quick = args.quick;
    Ok(results)
}

/// The payload: our module, the program that measures, and a guest.
fn fill(args: &Args, machines: &Machines) -> Result<PathBuf> {
    let programs = build::programs()?;
    let module = match &args.module {
        Some(module) => module.canonicalize()?,
        None => build::module()?,
    };
    let dir = payload::new("bench", &script(args)?)?;
    fs::copy(&module, dir.join("xen-blkback-rs.ko"))
        .with_context(|| format!("cannot copy {}", module.display()))?;
    payload::add_program(&dir, &programs.join("bench"))?;
    payload::add_guest(&dir, machines, &programs.join("vmtest"))?;
    Ok(dir)
}

/// What dom0 runs.
fn script(args: &Args) -> Result<String> {
    if args.bounds {
        let (jobs, rounds) = (bounds::jobs()?, args.rounds.unwrap_or(1));
        return Ok(format!(
            "exec /t/bench --backends phy --jobs {jobs} --rounds {rounds}\n"
        ));
    }
    let mut line = "exec /t/bench".to_string();
    if args.quick {
        line.push_str(" --quick");
    }
    let quoted = |text: &str| text.replace('\'', "");
    for (option, value) in [("--backends", &args.backends), ("--jobs", &args.jobs)] {
        if let Some(names) = value {
            line.push_str(&format!(" {option} '{}'", quoted(names)));
        }
    }
    if let Some(rounds) = args.rounds {
        line.push_str(&format!(" --rounds {rounds}"));
    }
    line.push('\n');
    Ok(line)
}

/// Compiles the plugin in the build root: it must fit the QEMU in there, and needs nothing else.
fn plugin(machines: &Machines) -> Result<PathBuf> {
    let repository = build::repository()?;
    let out = repository.join("target/bench");
    fs::create_dir_all(&out)?;
    let root = Root::new(&machines.build_root)
        .bind_read_only(&repository.join("tests/bench/plugin/src"), "/mnt/a")
        .bind(&out, "/mnt/b");
    let script =
        "rustc --edition 2021 -O -C linker=gcc-14 --crate-type cdylib --crate-name plugin \
                  -o /mnt/b/plugin.so /mnt/a/lib.rs";
    process::shown(&mut root.script(script)).context("cannot compile QEMU's plugin")?;
    let file = out.join("plugin.so");
    ensure!(
        Path::new(&file).exists(),
        "the compiler made no {}",
        file.display()
    );
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::{script, Args};

    #[test]
    fn wishes_reach_the_machine() {
        let args = Args {
            quick: true,
            json: None,
            against: None,
            from: None,
            backends: Some("phy,c".into()),
            jobs: None,
            rounds: Some(2),
            module: None,
            bounds: false,
        };
        assert_eq!(
            script(&args).unwrap(),
            "exec /t/bench --quick --backends 'phy,c' --rounds 2\n"
        );
    }
}
