// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether there is a second opinion: QEMU's tools. The tests of tapdisk and tapimg use this file, too.

use std::process::Command;

/// False, and said so in the words that `cargo xtask test` counts, if QEMU's tools are not there.
pub(crate) fn has_qemu(test: &str) -> bool {
    let known = Command::new("qemu-img").arg("--version").output();
    let is_there = known.is_ok_and(|output| output.status.success());
    if !is_there {
        println!("SKIP {test}: there is no qemu-img, install qemu-utils");
    }
    is_there
}
