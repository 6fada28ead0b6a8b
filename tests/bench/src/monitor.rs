// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The monitor of the QEMU that serves the guest, as xl starts it.

use anyhow::{bail, Context, Result};
use serde_json::{json, Value};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A longer silence means that QEMU hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// A connection. xl cannot talk to this QEMU while there is one.
#[derive(Debug)]
pub(crate) struct Monitor {
    lines: BufReader<UnixStream>,
}

impl Monitor {
    /// Connects to the QEMU of this guest.
    pub(crate) fn open(domid: &str) -> Result<Monitor> {
        let path = format!("/run/xen/qmp-libxl-{domid}");
        let stream = UnixStream::connect(&path)
            .with_context(|| format!("cannot connect to the monitor of QEMU, {path}"))?;
        stream.set_read_timeout(Some(LIMIT))?;
        let lines = BufReader::new(stream);
        let mut monitor = Monitor { lines };
        monitor.command("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Executes a command in QEMU, and returns its answer.
    pub(crate) fn command(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let command = json!({"execute": name, "arguments": arguments});
        writeln!(self.lines.get_mut(), "{command}")
            .with_context(|| format!("cannot tell QEMU `{name}`"))?;
        // The greeting and events arrive between the answers.
        loop {
            let mut line = String::new();
            let read = self.lines.read_line(&mut line);
            if read.with_context(|| format!("QEMU does not answer to `{name}`"))? == 0 {
                bail!("QEMU closed its monitor at `{name}`");
            }
            let answer: Value = serde_json::from_str(&line)
                .with_context(|| format!("QEMU says what is no JSON: {line}"))?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses `{command}`: {error}");
            }
            if let Some(result) = answer.get("return") {
                return Ok(result.clone());
            }
        }
    }
}
