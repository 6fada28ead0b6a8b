// SPDX-License-Identifier: MIT OR Apache-2.0
//! Checks for QEMU's tools, which are the second opinion. The tests of tapdisk and tapimg use this file, too.

use std::process::Command;

/// Returns false, and prints the words that `cargo xtask test` counts, if QEMU's tools are missing.
pub(crate) fn has_qemu(test: &str) -> bool {
    let known = Command::new("qemu-img").arg("--version").output();
    let is_there = known.is_ok_and(|output| output.status.success());
    if !is_there {
        println!("SKIP {test}: there is no qemu-img, install qemu-utils");
    }
    is_there
}
