// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl` as a shell runs it, on a host without a supervisor.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// The program, with an empty folder in place of the host's files.
fn program(root: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tap-ctl"));
    command
        .arg("--root")
        .arg(root)
        .args(["--socket", "/nowhere/control.sock"]);
    command
}

fn run(words: &[&str]) -> (Output, String) {
    let root = tempfile::tempdir().expect("a folder");
    let output = program(root.path()).args(words).output().expect("started");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    (output, errors)
}

#[test]
fn a_command_without_a_supervisor_says_how_long_it_waits() {
    let (output, errors) = run(&["--patience", "1", "list"]);
    assert_eq!(output.status.code(), Some(5), "{errors}");
    assert!(
        errors.contains("waiting up to 1 s for blktapctrl"),
        "{errors}"
    );
    assert!(errors.contains("is blktapctrl running?"), "{errors}");
}

#[test]
fn a_word_in_place_of_a_number_is_told_with_its_option() {
    let (output, errors) = run(&["pause", "-m", "xvda"]);
    assert_eq!(output.status.code(), Some(2), "{errors}");
    for words in ["'xvda'", "--minor <MINOR>", "write a whole number"] {
        assert!(errors.contains(words), "{words}: {errors}");
    }
}

/// As `tap-ctl report 2>&1 | head -0`.
#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let root = tempfile::tempdir().expect("a folder");
    let mut child = program(root.path())
        .args(["report", "--hung-after", "1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    drop((child.stdout.take(), child.stderr.take()));
    let status = child.wait().expect("it ends");
    assert_eq!(status.code(), Some(0), "{status}");
}

#[test]
fn a_report_into_a_file_that_is_there_is_refused_before_the_work() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let (output, errors) = run(&["report", "-o", file.path().to_str().expect("a name")]);
    assert_eq!(output.status.code(), Some(6), "{errors}");
    assert!(
        errors.contains("is there already: choose another name"),
        "{errors}"
    );
    assert!(!errors.contains("tap-ctl doctor"), "{errors}");
}

#[test]
fn completion_is_silent_without_a_supervisor() {
    let (output, errors) = run(&["complete", "web"]);
    assert!(
        output.status.success() && output.stdout.is_empty(),
        "{errors}"
    );
    assert_eq!(errors, "");
}

/// A program must not take what such a user sees for all disks.
#[test]
fn a_user_whom_the_supervisor_does_not_answer_gets_an_error() {
    let dir = tempfile::tempdir().expect("a folder");
    let socket = dir.path().join("socket");
    let _listener = UnixListener::bind(&socket).expect("a socket");
    // Root without the capability to pass over permissions, which keeps other users from a socket of root's.
    if std::os::unix::fs::chown(&socket, Some(65534), None).is_err() {
        println!("skipped: only root can give a file to another user");
        return;
    }
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600)).expect("chmod");
    for verb in ["list", "status", "metrics", "top -n 1", "top -n 1 --json"] {
        let said = Command::new("setpriv")
            .arg("--bounding-set=-dac_override,-dac_read_search")
            .arg(env!("CARGO_BIN_EXE_tap-ctl"))
            .args(["--patience", "0", "--socket"])
            .arg(&socket)
            .arg("--root")
            .arg(dir.path())
            .args(verb.split(' '))
            .output()
            .expect("started");
        // A look at all disks finds that blktapctrl does not answer.
        let code = if verb == "status" { 1 } else { 6 };
        assert_eq!(said.status.code(), Some(code), "{verb}: {said:?}");
        let all = [said.stdout, said.stderr].concat();
        let all = String::from_utf8_lossy(&all);
        assert!(all.contains("ermission denied"), "{verb}: {all}");
    }
}
