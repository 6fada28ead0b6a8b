// SPDX-License-Identifier: MIT OR Apache-2.0
//! Lists, verdicts and figures of disks.

use super::notes::STATUS;
use crate::status::verdict::{HUNG_S, SLOW_MS};
use clap::Args;
use control::Driver;
use std::path::PathBuf;

/// Filter for the list: disks must match every given option.
#[derive(Debug, Args)]
pub(crate) struct List {
    /// Of this guest: its name or its number, as in xl list
    #[arg(value_name = "GUEST")]
    pub(crate) guest: Option<String>,
    /// With this name in the guest, such as xvda, or this number
    #[arg(value_name = "VDEV", requires = "guest")]
    pub(crate) vdev: Option<String>,
    /// Of this process
    #[arg(short, long)]
    pub(crate) pid: Option<u32>,
    /// With this node
    #[arg(short, long)]
    pub(crate) minor: Option<u32>,
    /// Of this driver
    #[arg(short = 't', long = "type")]
    pub(crate) driver: Option<Driver>,
    /// Of this image
    #[arg(short, long)]
    pub(crate) file: Option<PathBuf>,
}

/// How every disk is.
#[derive(Debug, Args)]
#[command(after_help = STATUS)]
pub(crate) struct Status {
    /// Only the disks of this guest: its name or its number, as in xl list
    #[arg(value_name = "GUEST")]
    pub(crate) guest: Option<String>,
    /// Only the disk with this name in the guest, such as xvda, or this number
    #[arg(value_name = "VDEV", requires = "guest")]
    pub(crate) vdev: Option<String>,
    /// Only disks that are not well: those whose verdict has an exit status other than 0
    #[arg(long)]
    pub(crate) sick: bool,
    /// Show the figures behind each verdict, and what no counter tells
    #[arg(short = 'x', long)]
    pub(crate) extended: bool,
    #[command(flatten)]
    pub(crate) watch: Watch,
}

/// Report about this host.
#[derive(Debug, Args)]
pub(crate) struct Report {
    /// Write to this new file instead, which only you may read
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) watch: Watch,
}

/// Counters of all disks, with the verdicts of status.
#[derive(Debug, Args)]
pub(crate) struct Metrics {
    /// Write to this file instead, which is exchanged as a whole
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) watch: Watch,
}

/// How long disks are watched, and limits for a verdict.
#[derive(Debug, Args)]
pub(crate) struct Watch {
    /// Seconds between the two looks at all disks
    #[arg(short, long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) interval: u32,
    /// Milliseconds for a request from which a disk counts as slow
    #[arg(long, value_name = "MILLISECONDS", default_value_t = SLOW_MS, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) slow: u32,
    /// Seconds that the oldest request of a hung disk has waited; a disk whose oldest request is unknown is watched for that
    /// time
    #[arg(
        long,
        alias = "hung",
        value_name = "SECONDS",
        default_value_t = HUNG_S,
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub(crate) hung_after: u32,
}

/// A display.
#[derive(Debug, Args)]
pub(crate) struct Top {
    /// Seconds between two pictures
    #[arg(short, long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) delay: u32,
    /// Number of pictures to print before the end
    #[arg(short = 'n', long, value_name = "PICTURES")]
    pub(crate) iterations: Option<u32>,
}
