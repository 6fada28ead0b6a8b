// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The verdicts, as KTAP on standard output or in the file named by REPORT.

use anyhow::{Context, Result};
use std::fs::OpenOptions;
use std::io::Write;

/// The writer of the report.
pub(crate) struct AttackReport {
    channel: Box<dyn Write>,
    number: usize,
    failed: usize,
}

impl AttackReport {
    /// Opens the channel and announces how many cases follow.
    pub(crate) fn open(cases: usize) -> Result<AttackReport> {
        let channel: Box<dyn Write> = match std::env::var_os("REPORT") {
            Some(path) => Box::new(
                OpenOptions::new()
                    .append(true)
                    .create(true)
                    .open(&path)
                    .with_context(|| format!("cannot open {path:?}: correct REPORT"))?,
            ),
            None => Box::new(std::io::stdout()),
        };
        let mut report = AttackReport {
            channel,
            number: 0,
            failed: 0,
        };
        report.line("TAP version 14")?;
        report.line(&format!("1..{cases}"))?;
        Ok(report)
    }

    /// Adds a note.
    pub(crate) fn note(&mut self, text: &str) -> Result<()> {
        self.line(&format!("# {text}"))
    }

    /// Records a verdict.
    pub(crate) fn verdict(&mut self, name: &str, seconds: f64, outcome: &Result<()>) -> Result<()> {
        self.number += 1;
        let number = self.number;
        match outcome {
            Ok(()) => self.line(&format!("ok {number} - {name}"))?,
            Err(_) => {
                self.failed += 1;
                self.line(&format!("not ok {number} - {name}"))?;
            }
        }
        self.line("  ---")?;
        self.line(&format!("  seconds: {seconds:.1}"))?;
        if let Err(error) = outcome {
            self.line("  message: |")?;
            for line in format!("{error:#}").lines() {
                self.line(&format!("    {line}"))?;
            }
        }
        self.line("  ...")
    }

    /// Returns true when nothing failed.
    pub(crate) fn passed(&self) -> bool {
        self.failed == 0
    }

    fn line(&mut self, text: &str) -> Result<()> {
        writeln!(self.channel, "{text}")
            .and_then(|()| self.channel.flush())
            .context("cannot write the report")
    }
}
