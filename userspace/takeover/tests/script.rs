// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! `xen-blkback-rs`, the script in front of this program, on a host that is a folder.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A host for which xen-blkback-rs is decided.
struct HostFolder {
    dir: tempfile::TempDir,
}

impl HostFolder {
    fn enabled() -> HostFolder {
        let host = HostFolder {
            dir: tempfile::tempdir().expect("a folder"),
        };
        std::fs::write(host.settings(), "# settings\n").expect("a file");
        std::os::unix::fs::symlink(host.settings(), host.link()).expect("a link");
        host
    }

    fn settings(&self) -> PathBuf {
        self.dir.path().join("settings.conf")
    }

    fn link(&self) -> PathBuf {
        self.dir.path().join("xen-blkback-rs.conf")
    }

    fn run(&self, words: &[&str]) -> Output {
        let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../ci/packaging");
        let mut script = Command::new("sh");
        script.arg(packaging.join("xen-blkback-rs")).args(words);
        script
            .env("XEN_BLKBACK_RS_SETTINGS", self.settings())
            .env("XEN_BLKBACK_RS_MODPROBE_DIR", self.dir.path());
        script.output().expect("a shell")
    }
}

#[test]
fn question_for_help_changes_nothing() {
    for verb in ["enable", "disable", "status"] {
        let host = HostFolder::enabled();
        for help in ["--help", "-h"] {
            let said = host.run(&[verb, help]);
            assert_eq!(said.status.code(), Some(0), "{verb} {help}: {said:?}");
            let text = String::from_utf8_lossy(&said.stdout);
            assert!(text.starts_with("Usage: "), "{verb} {help}: {text}");
            assert!(host.link().exists(), "{verb} {help}");
        }
    }
}

#[test]
fn unknown_option_changes_nothing() {
    let host = HostFolder::enabled();
    let said = host.run(&["disable", "--dry-run"]);
    assert_eq!(said.status.code(), Some(2), "{said:?}");
    let text = String::from_utf8_lossy(&said.stderr);
    assert!(text.contains("--dry-run"), "{text}");
    assert!(host.link().exists());
}

#[test]
fn disable_takes_the_settings_away() {
    let host = HostFolder::enabled();
    let said = host.run(&["disable"]);
    assert_eq!(said.status.code(), Some(0), "{said:?}");
    assert!(!host.link().exists() && host.settings().exists());
}
