// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! `xen-blkback-rs`, the script in front of this program, on a host that is a folder.

use jsonpages::JsonPages;
use serde_json::Value;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
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
            .env("XEN_BLKBACK_RS_MODPROBE_DIR", self.dir.path())
            .env("XEN_BLKBACK_RS_SECURITY_DIR", self.dir.path())
            .env(
                "PATH",
                format!("{}:/usr/bin:/bin", self.dir.path().display()),
            );
        let output = script.output().expect("a shell");
        let printed = String::from_utf8_lossy(&output.stdout);
        JsonPages::check_line("xen-blkback-rs", &words.join(" "), &printed);
        output
    }

    /// Makes the module known, with what `modinfo` prints of its fields.
    fn install(&self, version: &str, signature: &str) {
        let text = format!(
            "#!/bin/sh\ncase $2 in\nversion) printf '%s\\n' '{version}';;\nsig_id) echo '{signature}';;\nesac\n"
        );
        let program = self.dir.path().join("modinfo");
        fs::write(&program, text).expect("a file");
        fs::set_permissions(program, Permissions::from_mode(0o755)).expect("chmod");
    }

    /// Returns the status for programs.
    fn status(&self) -> Value {
        let said = self.run(&["status", "--json"]);
        assert_eq!(said.status.code(), Some(0), "{said:?}");
        serde_json::from_slice(&said.stdout).expect("JSON")
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

#[test]
fn status_for_programs_is_as_on_the_pages() {
    let host = HostFolder::enabled();
    let status = host.status();
    assert_eq!(status["decided"], "xen-blkback-rs", "{status}");
    assert_eq!(
        status["kernel"].as_str(),
        Some(kernel().as_str()),
        "{status}"
    );
    // A kernel of the host that runs this test may have the module, or demand signatures.
    host.install("0.1.0 \"a\\b\"", "PKCS#7");
    let status = host.status();
    assert_eq!(status["module"], "usable", "{status}");
    assert_eq!(status["module_version"], "0.1.0 \"a\\b\"", "{status}");
    host.install("", "");
    fs::write(
        host.dir.path().join("lockdown"),
        "none [integrity] confidentiality\n",
    )
    .expect("a file");
    let status = host.status();
    assert_eq!(status["module"], "unsigned", "{status}");
    assert!(status["module_version"].is_null(), "{status}");
    fs::write(host.dir.path().join("modinfo"), "#!/bin/sh\nexit 1\n").expect("a file");
    assert_eq!(host.status()["module"], "missing");
    assert_eq!(host.run(&["disable"]).status.code(), Some(0));
    assert_eq!(host.status()["decided"], "xen-blkback");
}

/// Returns the version of the kernel that runs.
fn kernel() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/osrelease").expect("the version");
    text.trim().into()
}

#[test]
fn status_knows_no_other_option() {
    let host = HostFolder::enabled();
    let said = host.run(&["status", "--planted"]);
    assert_eq!(said.status.code(), Some(2), "{said:?}");
    assert!(said.stdout.is_empty(), "{said:?}");
}
