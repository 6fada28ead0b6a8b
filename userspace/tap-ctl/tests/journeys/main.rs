// SPDX-License-Identifier: MIT OR Apache-2.0
//! The page of recorded sessions, `docs/guide/journeys.md`: each is run here with the real programs, and the page must have
//! what they print. `XENTAP_RECORD=1` writes the page.

#[path = "../backup/host.rs"]
#[allow(dead_code, reason = "the faults are for the tests of backups")]
mod host;
#[path = "../backup/tapimg.rs"]
mod tapimg;
mod words;

use host::HostState;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::{Arc, Mutex};
use tapimg::{tapimg, tapimg_program};
use words::normal;

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/guide/journeys.md");
const RECORD: &str = "XENTAP_RECORD";

const HEAD: &str = "\
# Recorded sessions

A test has run these commands and compared this page with their output (`tap-ctl` `journeys`). Words that differ each time
are in capitals: `ID` for the identifier of a backup, `TIME` for a time, `BYTES` for the room on storage. The folder is
`/srv`.
";

/// A session: its heading, what it shows, and its commands.
type RecordedSession = (&'static str, &'static str, &'static [&'static str]);

const SESSIONS: &[RecordedSession] = &[
    (
        "A first disk",
        "An image is made, checked and described.",
        &[
            "tapimg create qcow2:a.qcow2 1G",
            "tapimg check qcow2:a.qcow2",
            "tapimg info qcow2:a.qcow2 | grep -v 'space in use'",
        ],
    ),
    (
        "Another format",
        "A raw image becomes a VHD, and both are the same disk.",
        &[
            "head -c 3M /dev/zero | tr '\\0' x > b.img",
            "tapimg convert aio:b.img vhd:b.vhd",
            "tapimg compare aio:b.img vhd:b.vhd",
        ],
    ),
    (
        "A disk served by NBD",
        "Any NBD client reads the image, without Xen.",
        &[
            "tapimg serve aio:b.img b.sock >b.log 2>&1 & server=$!; for i in $(seq 600); do [ -s b.log ] && break; sleep 0.1; done; cat b.log",
            "nbdinfo --size 'nbd+unix:///?socket=b.sock'",
            "nbdinfo --can write 'nbd+unix:///?socket=b.sock' && echo yes",
            "kill $server; wait $server; echo ended",
        ],
    ),
    (
        "A snapshot, and its end",
        "A child has the changes until they are merged into its parent. No guest uses the disk.",
        &[
            "tapimg create qcow2:child.qcow2 --parent aio:b.img",
            "qemu-io -f qcow2 -c 'write -q -P 7 1M 64k' child.qcow2",
            "tapimg map qcow2:child.qcow2",
            "tapimg commit qcow2:child.qcow2",
            "rm child.qcow2; tail -c +1048577 b.img | head -c 4 | od -An -tu1",
        ],
    ),
    (
        "A golden image and a clone",
        "The clone takes room for its own changes only, and may be larger.",
        &[
            "tapimg create qcow2:golden.qcow2 1G && chmod a-w golden.qcow2",
            "tapimg create qcow2:web1.qcow2 --parent qcow2:golden.qcow2",
            "tapimg resize qcow2:web1.qcow2 2G",
            "tapimg info qcow2:web1.qcow2 | grep -v 'space in use'",
        ],
    ),
    (
        "A lease",
        "A disk on storage of many hosts has a record of the host that may write it. This one has never been used.",
        &[
            "tap-ctl lease show \"$PWD/b.img\"",
            "tap-ctl lease break \"$PWD/b.img\" --holder-is-dead 7",
        ],
    ),
    (
        "Bitmaps of QEMU",
        "An NBD client reads which blocks changed since a bitmap of QEMU began.",
        &[
            "qemu-img create -q -f qcow2 c.qcow2 1M && qemu-img bitmap --add c.qcow2 monday",
            "qemu-io -f qcow2 -c 'write -q 128k 64k' c.qcow2",
            "tapimg serve qcow2:c.qcow2 c.sock >c.log 2>&1 & server=$!; for i in $(seq 600); do [ -s c.log ] && break; sleep 0.1; done; cat c.log",
            "nbdinfo --map=qemu:dirty-bitmap:monday 'nbd+unix:///?socket=c.sock'",
            "kill $server; wait $server; echo ended",
        ],
    ),
    (
        "Backups",
        "A guest's disk is copied twice, the second time compressed, and restored. The disk is one of a test.",
        &[
            "mkdir backup",
            "tap-ctl backup 3 xvda backup",
            "tap-ctl backup 3 xvda backup --compress",
            "tap-ctl backup list backup",
            "tap-ctl backup verify backup",
            "tap-ctl restore backup aio:restored.img",
        ],
    ),
];

/// A folder with the programs and a supervisor.
fn bed() -> tempfile::TempDir {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let path = |name: &str| dir.path().join(name);
    for name in ["bin", "root", "srv", "disks"] {
        fs::create_dir(path(name)).expect("a folder");
    }
    let options = format!(
        "--socket {} --root {}",
        path("socket").display(),
        path("root").display()
    );
    let real = env!("CARGO_BIN_EXE_tap-ctl");
    for (name, line) in [
        ("tapimg", format!("{} \"$@\"", tapimg_program().display())),
        ("tap-ctl", format!("{real} {options} \"$@\"")),
    ] {
        fs::write(path("bin").join(name), format!("#!/bin/sh\nexec {line}\n")).expect("write");
        host::mode(&path("bin").join(name), 0o755);
    }
    let state = Arc::new(Mutex::new(HostState::default()));
    let mut host = state.lock().expect("the state");
    host.frozen_file = path("frozen");
    host.add(path("disks").join("a.img"), 51712);
    drop(host);
    host::serve(&path("socket"), state);
    dir
}

/// Returns the whole page, made by a run.
fn page() -> String {
    let dir = bed();
    let mut script = String::from("exec 2>&1\n");
    for (number, (_, _, lines)) in SESSIONS.iter().enumerate() {
        for (at, line) in lines.iter().enumerate() {
            // The marks are no text that a program prints.
            writeln!(script, "printf '\\001{number}.{at}\\002'\n{line}").expect("text");
        }
    }
    let path = std::env::var("PATH").expect("a path");
    let output = Command::new("sh")
        .args(["-c", &script])
        .current_dir(dir.path().join("srv"))
        .env(
            "PATH",
            format!("{}:{path}", dir.path().join("bin").display()),
        )
        .output()
        .expect("sh");
    let text = String::from_utf8(output.stdout).expect("text");
    let text = normal(&text, dir.path());
    let mut outputs = text.split('\u{1}').skip(1).map(|part| {
        let (_, output) = part.split_once('\u{2}').expect("a mark");
        output.to_owned()
    });
    let mut page = HEAD.to_owned();
    for (heading, what, lines) in SESSIONS {
        write!(page, "\n## {heading}\n\n{what}\n\n```console\n").expect("text");
        for line in *lines {
            let output = outputs.next().expect("the output of each command");
            write!(page, "$ {line}\n{output}").expect("text");
            assert!(page.ends_with('\n'), "{line}: {output}");
        }
        page.push_str("```\n");
    }
    page
}

#[test]
fn the_page_has_what_the_programs_print() {
    for tool in ["nbdinfo", "qemu-io", "qemu-img"] {
        if Command::new(tool).arg("--version").output().is_err() {
            eprintln!("the_page_has_what_the_programs_print was not run: there is no {tool}");
            return;
        }
    }
    let new = page();
    if std::env::var_os(RECORD).is_some() {
        fs::write(PAGE, &new).expect("write");
        return;
    }
    let old = fs::read_to_string(PAGE).expect("the page");
    let differs = old.lines().zip(new.lines()).find(|(old, new)| old != new);
    assert!(
        old == new,
        "docs/guide/journeys.md is not what the programs print ({differs:?}): \
         `{RECORD}=1 cargo test -p tap-ctl --test journeys` writes it"
    );
    assert!(new.len() < 12 << 10, "the page is too long");
    let mode = fs::metadata(PAGE).expect("the page").permissions().mode();
    assert_eq!(mode & 0o111, 0);
}
