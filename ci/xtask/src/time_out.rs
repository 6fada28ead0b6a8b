// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The end of a command by SIGTERM, which `.ci/run` sends when its time is over. A run that was too slow needs the table of
//! times most, so it ends with that, too.

use crate::steps;
use anyhow::{Context, Result};
use signal_hook::consts::SIGTERM;
use signal_hook::iterator::Signals;
use std::process;
use std::thread;

/// Has SIGTERM show what ran and what was still running, and then end the command. Programs that the command starts have
/// the signal as usual.
pub(crate) fn show_times() -> Result<()> {
    let mut ends = Signals::new([SIGTERM]).context("cannot wait for SIGTERM")?;
    let waiter = thread::Builder::new().name("sigterm".into());
    let end = move || {
        if ends.forever().next().is_none() {
            return;
        }
        if let Err(error) = steps::finish() {
            eprintln!("error: {error:#}");
        }
        steps::running().iter().for_each(|line| println!("{line}"));
        println!("failed: ended by SIGTERM before all was done");
        process::exit(128 + SIGTERM);
    };
    waiter.spawn(end).context("cannot make a thread")?;
    Ok(())
}
