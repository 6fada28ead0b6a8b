// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A malicious blkif frontend in user space.
//!
//! The program runs in dom0, plays toolstack and frontend, and lets dom0's own backend serve its rings: grants and
//! event channels are between dom0 and itself. `run` executes numbered attacks, `fuzz` sends random requests that a
//! seed repeats, `fuzz-tap` makes random calls as the process of a tap disk. After each, one oracle checks dom0: good
//! requests get right data, a neighbour's disk works, the kernel's log is short and calm, nothing is left behind.

mod cases;
mod disk;
mod evtchn;
mod filesystem;
mod fuzz;
mod fuzz_tap;
mod grants;
mod lab;
mod leaks;
mod queue;
mod report;
mod rng;
mod session;
mod standstill;
mod store;
mod tap;
mod vbd;
mod wait;
mod wire;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering::Relaxed;

/// A malicious frontend against the block backend of this dom0.
#[derive(Parser)]
#[command(name = "hostile", version)]
struct HostileCli {
    /// Attack this block device in place of a new null_blk device; its content is destroyed.
    #[arg(long, global = true, value_name = "DEVICE")]
    device: Option<PathBuf>,
    /// Offer persistent grants, as most guests do.
    #[arg(long, global = true)]
    keeps_grants: bool,
    #[command(subcommand)]
    face: Face,
}

#[derive(Subcommand)]
enum Face {
    /// Execute the attacks and print KTAP to the file named by REPORT (default: standard output).
    Run {
        /// Only attacks whose name contains one of these words, separated by commas.
        #[arg(long, default_value = "")]
        only: String,
        /// Skip the attacks of tap disks.
        #[arg(long)]
        phy: bool,
        /// Run only attacks that are about the pages of requests, which the module copies or maps.
        #[arg(long)]
        pages: bool,
        /// Word in the names of the report, if attacks run more than once.
        #[arg(long, default_value = "", value_name = "WORD")]
        label: String,
        /// Seed of the random numbers; a run reports its own, with which it can be repeated.
        #[arg(long)]
        seed: Option<u64>,
        /// List the attacks and stop.
        #[arg(long)]
        list: bool,
    },
    /// Be the process of a tap disk; the attacks start it.
    #[command(hide = true)]
    TapServe(tap::server::ServerOrders),
    /// Make a tap disk, use it once, and leave it; for a test of its removal.
    #[command(hide = true)]
    TapLeave,
    /// Random requests, good and bad, on a live ring.
    Fuzz {
        /// Seed: equal seeds send equal requests. Without it a new one, which is reported.
        #[arg(long)]
        seed: Option<u64>,
        /// Number of batches of requests.
        #[arg(long, default_value_t = 500)]
        cases: u32,
    },
    /// Random calls of the process of a tap disk, under requests that must not suffer.
    FuzzTap {
        /// Seed: equal seeds make equal calls. Without it a new one, which is reported.
        #[arg(long)]
        seed: Option<u64>,
        /// Number of batches of requests and calls.
        #[arg(long, default_value_t = 500)]
        cases: u32,
    },
}

fn main() -> ExitCode {
    match start() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("hostile: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn start() -> Result<bool> {
    let cli = HostileCli::parse();
    let device = cli.device.as_ref();
    session::KEEPS_GRANTS.store(cli.keeps_grants, Relaxed);
    match cli.face {
        Face::Run { list: true, .. } => {
            for case in cases::all() {
                println!("{:34} {}", case.name, case.about);
            }
            Ok(true)
        }
        Face::Run {
            only,
            phy,
            pages,
            label,
            seed,
            ..
        } => {
            let seed = seed.unwrap_or_else(seeds::fresh_seed);
            let selection = cases::Selection {
                only,
                phy,
                pages,
                label,
            };
            cases::run(&selection, seed, device)
        }
        Face::TapServe(orders) => tap::server::run(&orders).map(|()| true),
        Face::TapLeave => tap::leave().map(|()| true),
        Face::Fuzz { seed, cases } => {
            let seed = seed.unwrap_or_else(seeds::fresh_seed);
            session::KEEPS_GRANTS.fetch_or(seed % 2 == 0, Relaxed);
            fuzz::run(seed, cases, device)
        }
        Face::FuzzTap { seed, cases } => {
            fuzz_tap::run(seed.unwrap_or_else(seeds::fresh_seed), cases, device)
        }
    }
}
