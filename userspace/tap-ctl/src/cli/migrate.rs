// SPDX-License-Identifier: MIT OR Apache-2.0
//! `migrate-out` on the command line.

use clap::Args;
use std::path::PathBuf;

const EXAMPLES: &str = "\
HOST needs this driver's programs, and root there is reached by ssh without a password. Images of the disks are made
there under the names that the guest's configuration has: those of the disks here. An export in an ssh tunnel leads
there, so the data is encrypted on its way.

If it fails or is killed, the guest continues: before `mirror` is done with the image here, afterwards with the one on
HOST, for as long as the tunnel exists. Run it again to continue; the copy is not made again.

Examples:
  tap-ctl migrate-out web beta                    # copy the tap disks of web to beta, then xl migrate
  tap-ctl migrate-out web beta --rate 200 --overwrite
  tap-ctl migrate-out web beta --ssh /root/ssh-by-another-port";

/// A migration of a guest with its tap disks.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct MigrateOut {
    /// Guest: its name or its number, as in xl list
    #[arg(value_name = "GUEST")]
    pub(crate) guest: String,
    /// The other host, as ssh and xl migrate know it
    #[arg(value_name = "HOST")]
    pub(crate) host: String,
    /// Replace images that exist on HOST; a block device there is always to be replaced
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Most MiB in a second that are copied for each disk, or another amount with its suffix, such as 1.5G
    #[arg(long, value_name = "MIB", default_value = "64", value_parser = super::some_mib)]
    pub(crate) rate: u32,
    /// Command that reaches HOST, for the tunnel and for xl; it takes ssh's options -o and -L
    #[arg(long, value_name = "COMMAND", default_value = "ssh")]
    pub(crate) ssh: String,
    /// The program xl
    #[arg(long, hide = true, value_name = "PROGRAM", default_value = "xl")]
    pub(crate) xl: PathBuf,
}
