// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The life of the packages on a host with systemd: installed while the C driver serves, upgraded and downgraded under
//! load, removed; refused by a kernel that wants signatures; and in a driver domain. The host's disk outlives its boots.
//! Each boot is a part of the life, and each chapter of a part builds on those before it.

mod after;
mod before;
mod domain;
mod groups;
mod host;
mod refused;
mod serving;
mod working;

use crate::report::{CaseReport, CaseVerdict};
use crate::{guest, splat};
use anyhow::{Context, Result};
use clap::ValueEnum;
use std::process::ExitCode;
use std::time::Instant;
use working::WorkingGuest;

/// Work in one boot.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BootPart {
    /// The C driver serves, the packages are installed, and it is decided for ours.
    Installed,
    /// The kernel takes no module without a signature, as ours.
    Refused,
    /// A copy of the host's disk is booted as a driver domain.
    Domains,
    /// Ours serves, is upgraded and downgraded below guests that work, and removed.
    Upgraded,
    /// The C driver serves again.
    Removed,
}

impl BootPart {
    fn chapters(self) -> Vec<Chapter> {
        match self {
            BootPart::Installed => before::chapters(),
            BootPart::Refused => refused::chapters(),
            BootPart::Domains => domain::chapters(),
            BootPart::Upgraded => serving::chapters(),
            BootPart::Removed => after::chapters(),
        }
    }
}

/// A piece of a part, and its description in one line.
struct Chapter {
    name: &'static str,
    about: &'static str,
    tell: fn(&mut LifeStory) -> Result<()>,
}

/// State that passes from one chapter to the next.
struct LifeStory {
    report: CaseReport,
    working: Option<WorkingGuest>,
}

impl LifeStory {
    fn working(&mut self) -> Result<&mut WorkingGuest> {
        self.working.as_mut().context("nobody works")
    }
}

/// Tells one part.
pub(crate) fn run(part: BootPart) -> Result<ExitCode> {
    let mut story = LifeStory {
        report: CaseReport::open()?,
        working: None,
    };
    let chapters = part.chapters();
    story.report.plan(chapters.len())?;
    for chapter in chapters {
        let about = format!("{}: {}", chapter.name, chapter.about);
        story.report.note(&about)?;
        let begun = Instant::now();
        let verdict = match judged(&mut story, chapter.tell) {
            Ok(()) => CaseVerdict::Pass,
            Err(error) => CaseVerdict::Fail(format!("{error:#}")),
        };
        let seconds = begun.elapsed().as_secs_f64();
        story.report.verdict(chapter.name, seconds, &verdict)?;
        if story.report.problems() > 0 {
            let why = "the chapters that follow build on this one";
            story.report.bail_out(why)?;
            return Ok(ExitCode::FAILURE);
        }
    }
    story.report.finish()?;
    Ok(ExitCode::SUCCESS)
}

/// Tells a chapter, and looks whether the kernels of dom0 and of guests that have ended are well.
fn judged(story: &mut LifeStory, tell: fn(&mut LifeStory) -> Result<()>) -> Result<()> {
    let mut kmsg = dom0::kmsg::Kmsg::from_now()?;
    tell(story)?;
    let messages = kmsg.take()?;
    let mut bad = splat::in_kernel("dom0", messages.iter().map(String::as_str));
    bad.extend(guest::take_trouble());
    anyhow::ensure!(bad.is_empty(), "{}", bad.join("; "));
    Ok(())
}
