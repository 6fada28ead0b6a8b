// SPDX-License-Identifier: MIT OR Apache-2.0
//! `backup` and `restore` on the command line.

use super::Which;
use clap::{Args, Subcommand};
use control::Failure;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

const USAGE: &str = "\
tap-ctl backup [OPTIONS] GUEST [VDEV]... DIR
       tap-ctl backup list DIR
       tap-ctl backup verify DIR
       tap-ctl backup repair DIR";

const EXAMPLES: &str = "\
A guest that is called list, verify or repair is named by its number.

Examples:
  tap-ctl backup web xvda /backup                 # full the first time, then the changes
  tap-ctl backup web xvda xvdb /backup --keep 7   # both at one instant
  tap-ctl backup web xvda /backup --scratch /srv  # of a volume
  tap-ctl backup web xvda /backup --compress      # takes less space, and longer
  tap-ctl backup web xvda /backup --freeze        # its file systems agree
  tap-ctl backup verify /backup
  tap-ctl restore /backup qcow2:/srv/new.qcow2";

/// A backup of disks of one guest.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    override_usage = USAGE,
    after_help = EXAMPLES
)]
pub(crate) struct Backup {
    #[command(subcommand)]
    pub(crate) verb: Option<BackupVerb>,
    /// Guest of the disks, their names there (none if the guest has one tap disk), and the folder of the backups, which
    /// exists. All disks are copied as of one instant
    #[arg(value_name = "GUEST [VDEV]... DIR", required = true)]
    words: Vec<PathBuf>,
    /// Copy whole disks, even if the changes since the last backup are known
    #[arg(long)]
    pub(crate) full: bool,
    /// Remove older backups, but for this number of the newest ones and those that they need. A full backup is taken
    /// when this many have been taken since the last one, so that there are at most twice as many
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) keep: Option<u32>,
    /// Most MiB in a second that are read, or another amount with its suffix, such as 1.5G; as fast as possible if not
    /// said
    #[arg(long, value_name = "MIB", value_parser = super::some_mib)]
    pub(crate) rate: Option<u32>,
    /// Compress the copy, which takes less space and longer: with zlib, which all programs read, or zstd. Compressed
    /// backups and others continue each other
    #[arg(long, value_name = "METHOD", num_args = 0..=1, require_equals = true, default_missing_value = "zlib")]
    pub(crate) compress: Option<BackupCompression>,
    /// Have the guest's file systems frozen around that instant, so that they and their programs agree with it: by
    /// QEMU's guest agent in the guest, which this socket leads to, /run/xentap/agent/GUEST if not said. No backup is
    /// taken if they cannot be frozen
    #[arg(long, value_name = "SOCKET", num_args = 0..=1, require_equals = true)]
    pub(crate) freeze: Option<Option<PathBuf>>,
    /// As --freeze, by a program, which is called as PROGRAM freeze GUEST and PROGRAM thaw GUEST
    #[arg(long, value_name = "PROGRAM", conflicts_with = "freeze")]
    pub(crate) freeze_by: Option<PathBuf>,
    /// Longest time in seconds in which they stay frozen, and for each answer of the agent or program
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub(crate) freeze_limit: u64,
    /// Folder for the guest's writes while the copy is made; that of the image if not said, needed for a block device
    #[arg(long, value_name = "FOLDER")]
    pub(crate) scratch: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) tool: Tool,
    /// The disks.
    #[arg(skip)]
    pub(crate) disks: Vec<Which>,
    /// The folder.
    #[arg(skip)]
    pub(crate) dir: PathBuf,
}

/// Compression of the data of a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum BackupCompression {
    /// Deflate.
    Zlib,
    /// Zstandard, which QEMU reads since 5.1.
    Zstd,
}

impl BackupCompression {
    /// Returns its name, as on the command line of tap-ctl and tapimg.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }
}

/// The program that copies.
#[derive(Clone, Debug, Args)]
pub(crate) struct Tool {
    /// The program that copies
    #[arg(long, hide = true, value_name = "PROGRAM", default_value = "tapimg")]
    pub(crate) tapimg: PathBuf,
}

/// The verbs about existing backups.
#[derive(Debug, Subcommand)]
pub(crate) enum BackupVerb {
    /// List the backups of a folder, the oldest first
    List {
        /// Folder of the backups
        #[arg(value_name = "DIR")]
        dir: PathBuf,
    },
    /// Read all backups of a folder, and check that none has changed and each has the ones that it needs
    ///
    /// The exit status is 0 if all are good, and 1 if one is not.
    Verify {
        /// Folder of the backups
        #[arg(value_name = "DIR")]
        dir: PathBuf,
    },
    /// Finish or undo a backup that was killed, without taking another one
    ///
    /// The next backup into the folder begins with that. A guest that was shut down before, or whose host has died, can
    /// be started after it only.
    Repair {
        /// Folder of the backups
        #[arg(value_name = "DIR")]
        dir: PathBuf,
        #[command(flatten)]
        tool: Tool,
    },
}

impl Backup {
    /// Parts the words into the disks and the folder.
    pub(super) fn settle(&mut self) -> Result<(), Failure> {
        if self.verb.is_some() {
            return Ok(());
        }
        let usage = || {
            Failure::invalid(
                "name the guest, its disks, and last the folder of the backups, as in `tap-ctl backup web xvda /backup`",
            )
        };
        let mut words = std::mem::take(&mut self.words);
        self.dir = words.pop().ok_or_else(usage)?;
        let words: Option<Vec<&str>> = words.iter().map(|word| word.to_str()).collect();
        let words = words.ok_or_else(usage)?;
        let (guest, vdevs) = words.split_first().ok_or_else(usage)?;
        if guest.contains('/') || vdevs.iter().any(|vdev| !control::is_vdev(vdev)) {
            return Err(usage());
        }
        let disk = |vdev: Option<&&str>| Which {
            guest: Some((*guest).to_owned()),
            vdev: vdev.map(|vdev| (*vdev).to_owned()),
            ..Which::default()
        };
        self.disks = match vdevs.is_empty() {
            true => vec![disk(None)],
            false => vdevs.iter().map(|vdev| disk(Some(vdev))).collect(),
        };
        Ok(())
    }
}

/// A disk from a backup.
#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// Folder of the backups
    #[arg(value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// Image to make: KIND:PATH, as of tapimg, such as qcow2:/srv/b.qcow2 or aio:/dev/vg/b
    #[arg(value_name = "IMAGE")]
    pub(crate) image: String,
    /// Guest of the disk, if the folder has backups of several
    #[arg(long, value_name = "GUEST")]
    pub(crate) guest: Option<String>,
    /// The disk's name in the guest, if the folder has backups of several
    #[arg(long, value_name = "VDEV")]
    pub(crate) vdev: Option<String>,
    /// The backup, as in tap-ctl backup list; the newest one if not said
    #[arg(long, value_name = "ID")]
    pub(crate) id: Option<String>,
    /// Replace an existing image or the content of a device
    #[arg(long)]
    pub(crate) force: bool,
    /// Most MiB in a second, or another amount with its suffix, such as 1.5G; as fast as possible if not said
    #[arg(long, value_name = "MIB", value_parser = super::some_mib)]
    pub(crate) rate: Option<u32>,
    #[command(flatten)]
    pub(crate) tool: Tool,
}
