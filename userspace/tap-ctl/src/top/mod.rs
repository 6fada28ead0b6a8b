// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl top`: what all disks are doing, phy and tap, the busiest one first.

mod columns;
#[cfg(test)]
mod fake;
mod picture;
mod plain;

use crate::{cli, Cli, Error};

/// Shows all disks, again and again.
pub(crate) fn run(cli: &Cli, asked: &cli::Top) -> Result<(), Error> {
    plain::run(cli, asked)
}
