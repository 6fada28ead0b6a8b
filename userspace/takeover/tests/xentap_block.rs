// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! `xentap-block`, with a folder in place of Xen's scripts.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A folder of scripts, with Xen's and ours.
struct ScriptFolder(tempfile::TempDir);

impl ScriptFolder {
    fn new() -> ScriptFolder {
        let folder = ScriptFolder(tempfile::tempdir().expect("a folder"));
        for name in ["block", "block-or-tap"] {
            let script = folder.path(name);
            fs::write(&script, name).expect("written");
            fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("chmod");
        }
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, words: &[&str]) -> Output {
        let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../ci/packaging");
        let mut script = Command::new("sh");
        script.arg(packaging.join("xentap-block")).args(words);
        script.env("XEN_SCRIPT_DIR", self.0.path());
        script.output().expect("a shell")
    }

    fn is_ours(&self) -> bool {
        fs::read_link(self.path("block")).is_ok_and(|link| link == Path::new("block-or-tap"))
    }
}

#[test]
fn a_question_for_help_changes_nothing() {
    for is_enabled in [false, true] {
        let folder = ScriptFolder::new();
        if is_enabled {
            assert!(folder.run(&["enable"]).status.success());
        }
        for words in [
            &["enable", "--help"][..],
            &["disable", "-h"],
            &["--help"],
            &["status", "--help"],
        ] {
            let said = folder.run(words);
            assert_eq!(said.status.code(), Some(0), "{words:?}: {said:?}");
            let text = String::from_utf8_lossy(&said.stdout);
            assert!(text.starts_with("Usage: "), "{words:?}: {text}");
            assert_eq!(folder.is_ours(), is_enabled, "{words:?}");
        }
    }
}

#[test]
fn a_wrong_command_line_changes_nothing_and_ends_with_2() {
    let folder = ScriptFolder::new();
    for words in [&[][..], &["enable", "--dry-run"], &["on"], &["enable", "x"]] {
        let said = folder.run(words);
        assert_eq!(said.status.code(), Some(2), "{words:?}: {said:?}");
        assert!(
            !said.stderr.is_empty() && said.stdout.is_empty(),
            "{said:?}"
        );
        assert!(!folder.is_ours(), "{words:?}");
    }
}

#[test]
fn ours_takes_the_place_of_xens_and_gives_it_back() {
    let folder = ScriptFolder::new();
    for _ in 0..2 {
        assert!(folder.run(&["enable"]).status.success());
        assert!(folder.is_ours());
        assert_eq!(fs::read(folder.path("block.xen")).expect("Xen's"), b"block");
    }
    let said = folder.run(&["status"]);
    assert_eq!(said.stdout, b"files are served by tapdisk\n");
    for _ in 0..2 {
        assert!(folder.run(&["disable"]).status.success());
        assert_eq!(fs::read(folder.path("block")).expect("Xen's"), b"block");
    }
}
