// SPDX-License-Identifier: MIT OR Apache-2.0
//! Output on pages of the manual: the sessions of `docs/guide/journeys.md`, and blocks of other pages. Their commands are
//! run here with the real programs, and the pages must have what they print. `XENTAP_RECORD=1` writes the pages.

mod blocks;
mod disks;
mod documented;
#[path = "../backup/host.rs"]
#[allow(dead_code, reason = "the faults are for the tests of backups")]
mod host;
#[path = "../common/rows.rs"]
mod rows;
mod shell;
#[path = "../backup/tapimg.rs"]
mod tapimg;
mod words;

use host::HostState;
use shell::{of_checkout, session, ShellFolder};
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::{Arc, Mutex};
use tapimg::tapimg;

const PAGE: &str = "docs/guide/journeys.md";
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

/// A shell, and a supervisor with a disk that can be backed up.
fn shell_with_supervisor() -> ShellFolder {
    let shell = ShellFolder::new();
    let state = Arc::new(Mutex::new(HostState::default()));
    let mut host = state.lock().expect("the state");
    host.frozen_file = shell.path("frozen");
    host.add(shell.path("disks/a.img"), 51712);
    drop(host);
    host::serve(&shell.socket(), state);
    shell
}

/// Returns the whole page, made by a run.
fn page() -> String {
    let lines = SESSIONS.iter().flat_map(|(_, _, lines)| *lines);
    let lines: Vec<String> = lines.map(|line| (*line).to_owned()).collect();
    let outputs = shell_with_supervisor().run(&lines);
    let mut outputs = outputs.iter().map(String::as_str);
    let mut page = HEAD.to_owned();
    for (heading, what, lines) in SESSIONS {
        let block = session(lines.iter().copied().zip(outputs.by_ref()));
        write!(page, "\n## {heading}\n\n{what}\n\n```console\n{block}```\n").expect("text");
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
        fs::write(of_checkout(PAGE), &new).expect("write");
        return;
    }
    let old = fs::read_to_string(of_checkout(PAGE)).expect("the page");
    let differs = old.lines().zip(new.lines()).find(|(old, new)| old != new);
    assert!(
        old == new,
        "{PAGE} is not what the programs print ({differs:?}): \
         `{RECORD}=1 cargo test -p tap-ctl --test journeys` writes it"
    );
    assert!(new.len() < 12 << 10, "the page is too long");
    let mode = fs::metadata(of_checkout(PAGE))
        .expect("the page")
        .permissions()
        .mode();
    assert_eq!(mode & 0o111, 0);
}
