// SPDX-License-Identifier: MIT OR Apache-2.0
//! A kernel, a xenstore and a tapdisk that are none.

mod kernel;
mod needs;
mod process;
mod served;
mod store;

pub(crate) use kernel::{Backing, FakeKernel, FakeRecords};
pub(crate) use process::{program, run};
use std::io;
use std::path::Path;
pub(crate) use store::{FakeDomains, FakeStore};

/// Writes down what happens, for the test to read.
fn note(dir: &Path, line: &str) {
    let file = std::fs::File::options()
        .create(true)
        .append(true)
        .open(dir.join("log"));
    let line = format!("{line}\n");
    io::Write::write_all(&mut file.expect("a log"), line.as_bytes()).expect("a log");
}
