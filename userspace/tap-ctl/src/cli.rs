// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command line.

mod backup;
mod disk;
mod image;
mod jobs;
mod lease;
mod migrate;
mod notes;
mod policy;
mod steps;
mod verb;
mod watch;

pub(crate) use backup::{Backup, BackupCompression, BackupVerb, Restore};
use clap::Parser;
pub(crate) use disk::{Handoff, Mirror, Snapshot, Trace, Which};
pub(crate) use image::{Create, Image, Open, OverlayFormat, Probe, Unpause};
use jobs::some_mib;
pub(crate) use jobs::{Dirty, Resize, Scrub, Stream};
pub(crate) use lease::LeaseVerb;
pub(crate) use migrate::MigrateOut;
use notes::HELP;
pub(crate) use policy::{Allocate, Changed, Set};
use std::path::PathBuf;
pub(crate) use steps::{Close, Destroy, Pause, ProcessNode};
pub(crate) use verb::Verb;
pub(crate) use watch::{List, Metrics, Report, Status, Top, Watch};

/// Heading of the options that each verb has, so that they are not among its own.
const EVERY: &str = crate::help::OPTIONS;

/// Make, watch and take away disks that a process serves to Xen guests.
///
/// `create` and `destroy` do all that a disk needs; xl's script block-tap-rs uses them. `allocate`, `spawn`, `attach`,
/// `open`, `close`, `detach` and `free` are the single steps, with the names that blktap2's tap-ctl gave them.
/// The output is this program's own: XCP-ng's storage manager cannot read that of `list`.
#[derive(Debug, Parser)]
#[command(name = "tap-ctl", version, after_long_help = HELP)]
pub(crate) struct Cli {
    /// Print JSON, for programs
    #[arg(long, global = true, help_heading = EVERY)]
    pub(crate) json: bool,
    /// Socket of the supervisor blktapctrl
    #[arg(
        long,
        global = true,
        help_heading = EVERY,
        value_name = "PATH",
        default_value = "/run/xentap/control.sock"
    )]
    pub(crate) socket: PathBuf,
    /// Seconds to wait for blktapctrl if it is starting again
    #[arg(long, global = true, help_heading = EVERY, value_name = "SECONDS", default_value_t = 30)]
    pub(crate) patience: u32,
    /// A folder that stands for / where files of the kernel and the system are read
    #[arg(
        long,
        global = true,
        hide = true,
        value_name = "DIR",
        default_value = "/"
    )]
    pub(crate) root: PathBuf,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}
