// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The verdicts, as KTAP, to the channel that the machine keeps free of console noise.

use anyhow::{Context, Result};
use std::fs::OpenOptions;
use std::io::Write;

/// Result of a case.
pub(crate) enum CaseVerdict {
    /// The case has passed.
    Pass,
    /// The case has failed, for this reason.
    Fail(String),
    /// The case has failed, and the driver under test is known for that.
    KnownFail(String, &'static str),
    /// The case cannot run here, for this reason.
    Skip(String),
}

/// The writer of the report.
pub(crate) struct CaseReport {
    channel: Box<dyn Write>,
    number: usize,
    failed: usize,
    skipped: usize,
}

impl CaseReport {
    /// Opens the channel named by the environment variable REPORT, or standard output.
    pub(crate) fn open() -> Result<CaseReport> {
        let channel: Box<dyn Write> =
            match std::env::var_os("REPORT") {
                Some(path) => {
                    let file = OpenOptions::new().append(true).create(true).open(&path);
                    Box::new(file.with_context(|| {
                        format!("cannot open the report {path:?}: correct REPORT")
                    })?)
                }
                None => Box::new(std::io::stdout()),
            };
        Ok(CaseReport {
            channel,
            number: 0,
            failed: 0,
            skipped: 0,
        })
    }

    /// Announces how many cases follow.
    pub(crate) fn plan(&mut self, cases: usize) -> Result<()> {
        self.line("TAP version 14")?;
        self.line(&format!("1..{cases}"))
    }

    /// Adds a comment to the report.
    pub(crate) fn note(&mut self, text: &str) -> Result<()> {
        self.line(&format!("# {text}"))
    }

    /// The emulator killed a guest; the sums have a word of their own for that.
    pub(crate) fn emulator(&mut self, what: &str) -> Result<()> {
        self.note(&format!("emulator: {what}"))
    }

    /// A line of free text, for the demonstration.
    pub(crate) fn say(&mut self, text: &str) -> Result<()> {
        self.line(text)
    }

    /// Counts something that went wrong outside of any case.
    pub(crate) fn problem(&mut self) {
        self.failed += 1;
    }

    /// Returns the number of problems so far.
    pub(crate) fn problems(&self) -> usize {
        self.failed
    }

    /// Records the verdict on a case.
    pub(crate) fn verdict(
        &mut self,
        name: &str,
        seconds: f64,
        verdict: &CaseVerdict,
    ) -> Result<()> {
        self.number += 1;
        let number = self.number;
        match verdict {
            CaseVerdict::Pass => self.line(&format!("ok {number} - {name}"))?,
            CaseVerdict::Skip(reason) => {
                self.skipped += 1;
                return self.line(&format!("ok {number} - {name} # SKIP {}", one_line(reason)));
            }
            CaseVerdict::Fail(_) => {
                self.failed += 1;
                self.line(&format!("not ok {number} - {name}"))?;
            }
            CaseVerdict::KnownFail(_, known) => {
                self.line(&format!("not ok {number} - {name} # TODO {known}"))?
            }
        }
        self.line("  ---")?;
        self.line(&format!("  seconds: {seconds:.1}"))?;
        if let CaseVerdict::Fail(why) | CaseVerdict::KnownFail(why, _) = verdict {
            self.line("  message: |")?;
            for line in why.lines() {
                self.line(&format!("    {line}"))?;
            }
        }
        self.line("  ...")
    }

    /// Reports that the run cannot continue.
    pub(crate) fn bail_out(&mut self, why: &str) -> Result<()> {
        self.line(&format!("Bail out! {}", one_line(why)))
    }

    /// The totals; true when nothing failed.
    pub(crate) fn finish(&mut self) -> Result<bool> {
        let (number, failed, skipped) = (self.number, self.failed, self.skipped);
        self.line(&format!(
            "# {} passed, {failed} failed, {skipped} skipped",
            number - failed - skipped
        ))?;
        Ok(failed == 0)
    }

    fn line(&mut self, text: &str) -> Result<()> {
        writeln!(self.channel, "{text}")
            .and_then(|()| self.channel.flush())
            .context("cannot write the report")
    }
}

fn one_line(text: &str) -> String {
    text.replace('\n', " ")
}
