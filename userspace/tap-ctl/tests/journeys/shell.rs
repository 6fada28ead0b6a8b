// SPDX-License-Identifier: MIT OR Apache-2.0
//! A shell with the real programs and a host of its own.

use super::host;
use super::tapimg::tapimg_program;
use super::words::normal;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Folder with the programs, the files of a host below `root`, and `srv`, in which commands run.
pub(crate) struct ShellFolder {
    dir: tempfile::TempDir,
}

impl ShellFolder {
    pub(crate) fn new() -> ShellFolder {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let folder = ShellFolder { dir };
        for name in ["bin", "root", "srv", "disks", "sanlock"] {
            fs::create_dir(folder.path(name)).expect("a folder");
        }
        let options = format!(
            "--socket {} --root {}",
            folder.socket().display(),
            folder.path("root").display()
        );
        let real = env!("CARGO_BIN_EXE_tap-ctl");
        for (name, line) in [
            ("tapimg", format!("{} \"$@\"", tapimg_program().display())),
            ("tap-ctl", format!("{real} {options} \"$@\"")),
        ] {
            let program = folder.path("bin").join(name);
            fs::write(&program, format!("#!/bin/sh\nexec {line}\n")).expect("write");
            host::mode(&program, 0o755);
        }
        folder
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Socket of the supervisor.
    pub(crate) fn socket(&self) -> PathBuf {
        self.path("socket")
    }

    /// Makes the folders above a file of the host, and returns where it is.
    pub(crate) fn of_host(&self, path: &str) -> PathBuf {
        let path = self.path("root").join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        path
    }

    /// Writes a file of the host.
    pub(crate) fn file(&self, path: &str, text: &str) {
        fs::write(self.of_host(path), text).expect("written");
    }

    /// Makes a link of the host.
    pub(crate) fn link(&self, path: &str, target: &str) {
        symlink(target, self.of_host(path)).expect("linked");
    }

    /// Runs all lines in one shell, and returns the output of each, with the same words each time.
    pub(crate) fn run(&self, lines: &[String]) -> Vec<String> {
        let mut script = String::from("exec 2>&1\n");
        for (at, line) in lines.iter().enumerate() {
            // The marks are no text that a program prints.
            writeln!(script, "printf '\\001{at}\\002'\n{line}").expect("text");
        }
        let path = std::env::var("PATH").expect("a path");
        let output = Command::new("sh")
            .args(["-c", &script])
            .current_dir(self.path("srv"))
            .env("PATH", format!("{}:{path}", self.path("bin").display()))
            .env("SANLOCK_RUN_DIR", self.path("sanlock"))
            .output()
            .expect("sh");
        let text = String::from_utf8(output.stdout).expect("text");
        let text = normal(&text, self.dir.path());
        let outputs = text.split('\u{1}').skip(1).map(|part| {
            let (_, output) = part.split_once('\u{2}').expect("a mark");
            output.to_owned()
        });
        let outputs: Vec<String> = outputs.collect();
        assert_eq!(outputs.len(), lines.len(), "{text}");
        outputs
    }
}

/// Returns the block of a page with these commands and their output, without the fences.
pub(crate) fn session<'a>(lines: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut text = String::new();
    for (line, output) in lines {
        write!(text, "$ {line}\n{output}").expect("text");
        assert!(text.ends_with('\n'), "{line}: {output}");
    }
    text
}

/// A file of the checkout.
pub(crate) fn of_checkout(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(path)
}
