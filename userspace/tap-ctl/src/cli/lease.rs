// SPDX-License-Identifier: MIT OR Apache-2.0
//! `lease` on the command line.

use clap::Subcommand;

/// The lease of an image: `lease=record`, `lease=reservation` or `lease=sanlock` of a target. This asks the storage or
/// sanlock, not blktapctrl.
#[derive(Debug, Subcommand)]
pub(crate) enum LeaseVerb {
    /// Say who has it: of a reservation its key, the host if it is this one, else a part of its number; of a lease of
    /// sanlock's the host's number in the lockspace, and whether it lives; of an image of Ceph its clients, a line for
    /// each, which may be programs as well as hosts
    Show {
        /// A target, or the absolute path of an image
        image: String,
    },
    /// Take it away from a holder whose host is dead, which no program can know, and leave it free
    ///
    /// A record is watched for 13 seconds: its holder must be silent. Of a reservation the storage first ends what its
    /// holder has under way, and refuses from then on what it writes: should it live, its disk stops. A lease of
    /// sanlock's is not broken: sanlock gives it to the next host once a watchdog has reset the dead one. A client of an
    /// image of Ceph is put on the cluster's blocklist for 30 days: should it live, all its disks stop.
    Break {
        /// A target, or the absolute path of an image
        image: String,
        /// You say that the holder of this generation, of this key, or the client with this number (see show), is dead:
        /// its host was powered off, and nothing of its I/O can reach the storage any more
        #[arg(long, value_name = "GENERATION|KEY|CLIENT", value_parser = number)]
        holder_is_dead: u64,
    },
}

/// A number as `lease show` shows it: a generation, or a key.
fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| {
        "write what `tap-ctl lease show TARGET` says: a number, or a key with its 0x".into()
    })
}
