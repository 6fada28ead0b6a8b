// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk's node, its behaviour on errors and its limits.

use super::Which;
use clap::{Args, ValueEnum};
use control::supervisor::HungAction;
use control::tapdisk::OnError;
use control::{GroupName, InGroup};

/// A node.
#[derive(Debug, Args)]
pub(crate) struct Allocate {
    /// Number of the disk; the lowest free one if absent
    #[arg(short, long)]
    pub(crate) minor: Option<u32>,
    /// MiB of memory shared with the process, at most 64; 0 for the default
    #[arg(long, value_name = "MIB", default_value_t = 0, value_parser = arena_mib)]
    pub(crate) arena: u32,
    #[command(flatten)]
    pub(crate) policy: Policy,
}

/// Parses MiB of memory, at most 64.
fn arena_mib(text: &str) -> Result<u32, String> {
    match control::typed_mib(text)? {
        mib @ 0..=64 => Ok(mib),
        mib => Err(format!("{mib} MiB are too many: write at most 64")),
    }
}

/// Behaviour of a disk on errors.
#[derive(Debug, Args)]
pub(crate) struct Policy {
    /// Seconds without a process after which requests fail; 0 holds them for ever
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub(crate) fail_after: u32,
    /// Processes that die of one request alone before it fails; 0 tries it for ever
    #[arg(long, value_name = "PROCESSES", default_value_t = 3, value_parser = clap::value_parser!(u32).range(..=255))]
    pub(crate) max_deaths: u32,
    /// Seconds without an answer after which a process counts as hung; 0 for never
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub(crate) hung_after: u32,
    /// Action on a process that is hung
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = HungName::Report)]
    pub(crate) hung: HungName,
    /// Older name of `--hung kill`
    #[arg(long, hide = true, conflicts_with = "hung")]
    pub(crate) kill_hung: bool,
    /// Action when the image has no room for a write
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = ErrorName::Stop)]
    pub(crate) on_no_space: ErrorName,
    /// Action when I/O on the image fails for another reason
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = ErrorName::Report)]
    pub(crate) on_error: ErrorName,
    /// Let the guest read and write no more bytes than this in a second, such as 20M; 0 for as many as there are
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = control::typed_rate)]
    pub(crate) bps: u64,
    /// Execute no more of its requests than this in a second, such as 500 or 20k; 0 for as many as there are
    #[arg(long, value_name = "NUMBER", default_value = "0", value_parser = control::typed_requests)]
    pub(crate) iops: u32,
    /// Seconds of its limits that the disk may use at once after a rest
    #[arg(long, value_name = "SECONDS", default_value_t = 1)]
    pub(crate) burst: u32,
    /// Let it share the limits of a group, too (tap-ctl group)
    #[arg(long, value_name = "NAME")]
    pub(crate) group: Option<GroupName>,
}

impl Policy {
    /// Returns the action on a process that is hung.
    pub(crate) fn on_hung(&self) -> HungAction {
        match self.kill_hung {
            true => HungAction::Kill,
            false => self.hung.into(),
        }
    }
}

/// Changes of a disk's policy. Other settings stay.
#[derive(Debug, Args)]
pub(crate) struct Set {
    #[command(flatten)]
    pub(crate) which: Which,
    #[command(flatten)]
    pub(crate) what: Changed,
}

/// The changed settings, at least one.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub(crate) struct Changed {
    /// Let the guest read and write no more bytes than this in a second, such as 20M; 0 for as many as there are
    #[arg(long, value_name = "BYTES", value_parser = control::typed_rate)]
    pub(crate) bps: Option<u64>,
    /// Execute no more of its requests than this in a second, such as 500 or 20k; 0 for as many as there are
    #[arg(long, value_name = "NUMBER", value_parser = control::typed_requests)]
    pub(crate) iops: Option<u32>,
    /// Seconds of its limits that the disk may use at once after a rest
    #[arg(long, value_name = "SECONDS")]
    pub(crate) burst: Option<u32>,
    /// Let it share the limits of a group, too (tap-ctl group), or take it out of its group with none
    #[arg(long, value_name = "NAME|none")]
    pub(crate) group: Option<InGroup>,
    /// Action when the image has no room for a write
    #[arg(long, value_enum, value_name = "WHAT")]
    pub(crate) on_no_space: Option<ErrorName>,
    /// Action when I/O on the image fails for another reason
    #[arg(long, value_enum, value_name = "WHAT")]
    pub(crate) on_error: Option<ErrorName>,
    /// Seconds without an answer after which a process counts as hung; 0 for never
    #[arg(long, value_name = "SECONDS")]
    pub(crate) hung_after: Option<u32>,
    /// Action on a process that is hung
    #[arg(long, value_enum, value_name = "WHAT")]
    pub(crate) hung: Option<HungName>,
}

/// Action on a process that is hung.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum HungName {
    /// An event tells
    Report,
    /// blktapctrl kills the process, and the next one executes its requests
    Kill,
}

impl From<HungName> for HungAction {
    fn from(name: HungName) -> HungAction {
        match name {
            HungName::Report => HungAction::Report,
            HungName::Kill => HungAction::Kill,
        }
    }
}

/// Action when I/O on an image fails. An event reports the failure in any case.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum ErrorName {
    /// The guest sees the error
    Report,
    /// The guest waits: the disk is paused with the request, which is tried again when it is unpaused
    Stop,
}

impl From<ErrorName> for OnError {
    fn from(name: ErrorName) -> OnError {
        match name {
            ErrorName::Report => OnError::Report,
            ErrorName::Stop => OnError::Stop,
        }
    }
}
