// SPDX-License-Identifier: MIT OR Apache-2.0
//! Single steps of a disk's life.

use super::Which;
use clap::Args;

/// A process and a node.
#[derive(Debug, Args)]
pub(crate) struct ProcessNode {
    /// The process
    #[arg(short, long)]
    pub(crate) pid: u32,
    /// The node
    #[arg(short, long)]
    pub(crate) minor: u32,
}

/// A disk to close.
#[derive(Debug, Args)]
pub(crate) struct Close {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Kill the process if it does not finish in time
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Seconds to wait
    #[arg(short, long, value_name = "SECONDS", default_value_t = 120)]
    pub(crate) timeout: u32,
}

/// A disk to pause.
#[derive(Debug, Args)]
pub(crate) struct Pause {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Seconds to wait
    #[arg(short, long, value_name = "SECONDS", default_value_t = 120)]
    pub(crate) timeout: u32,
}

/// A disk to take away.
#[derive(Debug, Args)]
pub(crate) struct Destroy {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Seconds to wait; the disk goes all the same when nothing holds it any more
    #[arg(short, long, value_name = "SECONDS", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) timeout: u32,
}
