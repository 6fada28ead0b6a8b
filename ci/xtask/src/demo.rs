// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! `cargo xtask demo`: a demonstration of the driver by `vmtest demo` in a Xen machine.

use crate::kernel::Dom0Kernel;
use crate::machine::Machine;
use crate::{artifacts, lanes, steps};
use anyhow::Result;
use std::process::ExitCode;
use std::time::Duration;

/// Last line of the report when the story is complete.
const TOLD: &str = "xtask: told";

/// Story of the demonstration.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum Story {
    /// A guest's disks: a volume, one whose process is killed, one that needs no process for a minute
    Disks,
    /// A guest that moves while its disk gets another process, another image and another module
    Migrate,
}

impl Story {
    /// Name of the story.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Story::Disks => "disks",
            Story::Migrate => "migrate",
        }
    }
}

/// Shows the story.
pub(crate) fn run(story: Story) -> Result<ExitCode> {
    tell(story).map(|()| ExitCode::SUCCESS)
}

/// Boots the machine and prints the story's lines as they arrive; the consoles go to a log.
pub(crate) fn tell(story: Story) -> Result<()> {
    let story = story.name();
    let script = format!(
        "/t/vmtest demo --story {story} 2>/tmp/complaint && echo '{TOLD}' >\"$REPORT\" || cat /tmp/complaint >\"$REPORT\"\n"
    );
    let payload = lanes::e2e::with_everything("demo", &script, Dom0Kernel::Stock)?;
    let mut machine = Machine::new("demo");
    machine.timeout = Duration::from_secs(900);
    eprintln!("booting Xen and dom0 in QEMU (about 30 s) ...");
    let mut told = false;
    let outcome = machine.run(&artifacts::machines(Dom0Kernel::Stock)?, &payload, |line| {
        steps::printed();
        if line == TOLD {
            told = true;
        } else {
            println!("{line}");
        }
    })?;
    outcome.verdict()?;
    anyhow::ensure!(
        told,
        "the demonstration broke off; the console log is {}",
        outcome.console.display()
    );
    Ok(())
}
