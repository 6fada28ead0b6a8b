// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Report: lines of JSON for the program that started the machine.

use anyhow::{Context, Result};
use serde_json::Value;
use std::fs::File;
use std::io::{stdout, Write};

/// Where the lines go.
pub(crate) struct BenchReport(Box<dyn Write>);

impl BenchReport {
    /// The file named by REPORT, or standard output.
    pub(crate) fn open() -> Result<BenchReport> {
        let out: Box<dyn Write> = match std::env::var_os("REPORT") {
            None => Box::new(stdout()),
            Some(path) => Box::new(
                File::options()
                    .write(true)
                    .open(&path)
                    .context("cannot open the file named by REPORT")?,
            ),
        };
        Ok(BenchReport(out))
    }

    /// Writes one line.
    pub(crate) fn line(&mut self, value: &Value) -> Result<()> {
        writeln!(self.0, "{value}")
            .and_then(|()| self.0.flush())
            .context("cannot write the report")
    }
}
