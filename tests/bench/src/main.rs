// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Measures backends of disks inside a Xen machine: runs in dom0, drives one guest, and writes its results as lines of
//! JSON to the file named by REPORT (default: standard output).
//!
//! This program judges nothing: `cargo xtask bench` computes medians, ratios and charts outside of the machine.

mod backends;
mod bonnie;
mod booted;
mod copied;
mod disks;
mod drivers;
mod guest;
mod images;
mod jobs;
mod many;
mod mark;
mod memory;
mod monitor;
mod pauses;
mod plan;
mod reads;
mod report;
mod run;
mod sample;
mod sh;
mod snapshots;
mod storage;
mod tap;

use clap::Parser;
use std::process::ExitCode;

/// Measures backends of disks inside a Xen machine.
#[derive(Debug, Parser)]
#[command(name = "bench", version)]
struct BenchCli {
    /// Measure less of everything: for a quick check, not for a verdict.
    #[arg(long)]
    quick: bool,
    /// Measure only these backends (names separated by commas).
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    backends: Vec<String>,
    /// Measure only these jobs (names separated by commas).
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    jobs: Vec<String>,
    /// Number of measurements of each backend.
    #[arg(long)]
    rounds: Option<u32>,
    /// The module of this project.
    #[arg(long, default_value = "/t/xen-blkback-rs.ko", value_name = "KO")]
    module: String,
    /// Also report the addresses of the functions of the kernel and the drivers.
    #[arg(long)]
    functions: bool,
}

fn main() -> ExitCode {
    let cli = BenchCli::parse();
    let plan = plan::BenchPlan {
        quick: cli.quick,
        backends: cli.backends,
        jobs: cli.jobs,
        rounds: cli.rounds,
        module: cli.module,
        functions: cli.functions,
    };
    match run::run(&plan) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
