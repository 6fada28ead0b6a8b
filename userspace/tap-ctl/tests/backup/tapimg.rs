// SPDX-License-Identifier: MIT OR Apache-2.0
//! The real tapimg, which is beside tap-ctl.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Returns its path; it is built if only this crate was.
pub(crate) fn tapimg_program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let path = Path::new(env!("CARGO_BIN_EXE_tap-ctl")).with_file_name("tapimg");
        if !path.exists() {
            let built = Command::new(env!("CARGO"))
                .args(["build", "-p", "tapimg"])
                .status();
            assert!(built.expect("cargo").success());
        }
        path
    })
}

/// Runs tapimg, which must succeed.
pub(crate) fn tapimg(line: &str) {
    let output = Command::new(tapimg_program())
        .args(line.split(' '))
        .output()
        .expect("started");
    assert!(output.status.success(), "tapimg {line}: {output:?}");
}
