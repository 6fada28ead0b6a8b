// SPDX-License-Identifier: MIT OR Apache-2.0
//! Work on a disk while its guest works.

use super::Which;
use clap::Args;
use control::{MarkName, NewSize};

/// Making a disk larger.
#[derive(Debug, Args)]
pub(crate) struct Resize {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Make the image so large first, such as 20G, or +5G for 5 GiB more than it has: a raw file, LUKS, whose new part
    /// reads as anything, or qcow2. Without it the image has grown by other means, such as lvresize
    #[arg(long, value_name = "SIZE|+MORE")]
    pub(crate) size: Option<NewSize>,
}

/// Reading all of a disk.
#[derive(Debug, Args)]
pub(crate) struct Scrub {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Most MiB in a second, or another amount with its suffix, such as 1.5G; 0 ends one that runs, another
    /// number changes its rate
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = control::typed_mib)]
    pub(crate) rate: u32,
}

/// Taking over what is below.
#[derive(Debug, Args)]
pub(crate) struct Stream {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Most MiB in a second, or another amount with its suffix, such as 1.5G; another number changes the rate
    /// of one that runs
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = some_mib)]
    pub(crate) rate: u32,
    /// Begin it, and wait until it is over: the exit status says whether it was done
    #[arg(long)]
    pub(crate) wait: bool,
    /// End the one that runs
    #[arg(long, conflicts_with_all = ["wait", "rate"])]
    pub(crate) cancel: bool,
    /// Say how far it is, or how the last one has ended, and change nothing
    #[arg(long, conflicts_with_all = ["wait", "rate", "cancel"])]
    pub(crate) show: bool,
}

/// Parses MiB, at least one.
pub(super) fn some_mib(text: &str) -> Result<u32, String> {
    match control::typed_mib(text)? {
        0 => Err("write at least 1 MiB".into()),
        mib => Ok(mib),
    }
}

/// Marks, and changes since one.
#[derive(Debug, Args)]
pub(crate) struct Dirty {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Start a dirty bitmap with this name: 1 to 64 letters, digits, dots, dashes and underscores. A disk has eight at
    /// most
    #[arg(long, value_name = "NAME", conflicts_with_all = ["since", "forget"])]
    pub(crate) mark: Option<MarkName>,
    /// Print the ranges that the guest has written since this dirty bitmap was started
    #[arg(long, value_name = "NAME", conflicts_with = "forget")]
    pub(crate) since: Option<MarkName>,
    /// Remove a dirty bitmap. Removing the last one ends the tracking
    #[arg(long, value_name = "NAME")]
    pub(crate) forget: Option<MarkName>,
}
