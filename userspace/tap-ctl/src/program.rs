// SPDX-License-Identifier: MIT OR Apache-2.0
//! Other programs, which may hang.

use std::ffi::OsStr;
use std::io;
use std::process::{Command, Output};
use std::time::Duration;

/// Time limit of a program.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// Returns the output of a program, and its exit status; one that exceeds the limit is ended.
pub(crate) fn output(words: &[impl AsRef<OsStr>], limit: Duration) -> io::Result<Output> {
    let limit = limit.as_secs_f64().to_string();
    // Of the coreutils, which every host has.
    Command::new("timeout")
        .args(["-k", "5", &limit])
        .args(words)
        .output()
}
