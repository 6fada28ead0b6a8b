// SPDX-License-Identifier: MIT OR Apache-2.0
//! A kernel, a xenstore and a tapdisk that are none.

mod fd_broker;
mod kernel;
mod process;
mod served;
mod store;

pub(crate) use kernel::{FakeBacking, FakeKernel, FakeRecords};
pub(crate) use process::{program, run};
use std::io;
use std::path::Path;
pub(crate) use store::{FakeDomains, FakeStore};

/// Makes a file that another process reads again and again: it is there with its text, or as it was before. A file that
/// is still being filled would be read as empty.
pub(crate) fn put(path: impl AsRef<Path>, text: impl AsRef<[u8]>) {
    let path = path.as_ref();
    // Processes of two disks write the same files at once.
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}", std::process::id()));
    std::fs::write(&beside, text).expect("write");
    std::fs::rename(&beside, path).expect("rename");
}

/// Writes down what happens, for the test to read.
fn note(dir: &Path, line: &str) {
    let file = std::fs::File::options()
        .create(true)
        .append(true)
        .open(dir.join("log"));
    let line = format!("{line}\n");
    io::Write::write_all(&mut file.expect("a log"), line.as_bytes()).expect("a log");
}
