// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl top`: what all disks are doing, phy and tap, the busiest one first.
//!
//! `picture` is what there is to show, `columns` what of that stands in a table, `order` how its rows are sorted; `plain`
//! prints it, and `interactive` has it on a terminal with keys.

mod columns;
#[cfg(test)]
mod fake;
mod interactive;
mod order;
mod picture;
mod plain;

use crate::{cli, Cli, Error};
use std::io::{self, IsTerminal};

/// Shows all disks, again and again.
pub(crate) fn run(cli: &Cli, asked: &cli::Top) -> Result<(), Error> {
    let is_counted = asked.iterations.is_some();
    if cli.json || is_counted || !is_terminal() {
        return plain::run(cli, asked);
    }
    interactive::run(cli, asked)
}

/// Whether a user at a terminal can press keys, and the terminal can show more than lines.
fn is_terminal() -> bool {
    let is_dumb = std::env::var_os("TERM").is_none_or(|name| name.is_empty() || name == "dumb");
    io::stdin().is_terminal() && io::stdout().is_terminal() && !is_dumb
}
