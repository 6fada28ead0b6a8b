// SPDX-License-Identifier: MIT OR Apache-2.0
//! Output with `--json` beside the pages of the reference: [`Bench::run`](crate::bench::Bench::run) compares that of each
//! run. Here each verb runs, and an image has as many facts as there can be.

use crate::bench::{has_qemu, Bench};
use jsonpages::JsonPages;
use rustix::process::{kill_process, Pid, Signal};
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::Command;

/// Verbs that run here, in this order, after the image `a` was made.
const LINES: &[&str] = &[
    "create qcow2:b --parent qcow2:a",
    "info --chain qcow2:b",
    "map qcow2:b --layer",
    "snapshot qcow2:a",
    "snapshot qcow2:b qcow2:c",
    "resize qcow2:c 3M",
    "convert qcow2:c aio:d",
    "convert qcow2:c vhd:e",
    "check qcow2:c",
    "check vhd:e",
    "compare qcow2:c aio:d",
    "compare qcow2:c qcow2:a",
    "resize qcow2:b 3M",
    "commit qcow2:c",
    "rebase qcow2:b --no-parent",
];

#[test]
fn each_verb_prints_what_the_pages_have() {
    if !has_qemu("each_verb_prints_what_the_pages_have") {
        return;
    }
    let bench = Bench::new();
    bench.qemu("qemu-img create -q -f qcow2 a 1M");
    bench.qemu_write("a", "write -q -P 7 128k 64k");
    bench.qemu("qemu-img snapshot -c monday a");
    bench.qemu("qemu-img bitmap --add a tuesday");
    let facts = &bench.json("info qcow2:a")[0];
    for key in ["snapshots", "bitmaps", "qcow2"] {
        assert!(!facts[key].is_null(), "{key}: {facts}");
    }
    bench.json("check qcow2:a --repair");
    for line in LINES {
        let printed = bench.json(line);
        assert!(printed.get("error").is_none(), "{line}: {printed}");
    }
    let failed = bench.json("map qcow2:none");
    assert_eq!(failed["error"]["code"], "not-found", "{failed}");
}

#[test]
fn a_server_prints_what_the_pages_have() {
    let bench = Bench::new();
    bench.sparse("a", 1 << 20, &[], 1);
    let mut server = bench.serve("aio:a s");
    let mut line = String::new();
    let output = server.stdout.take().expect("its output");
    BufReader::new(output).read_line(&mut line).expect("a line");
    JsonPages::of_checkout().assert_documented("tapimg serve", &line);
    kill_process(Pid::from_child(&server), Signal::TERM).expect("a signal");
    assert!(server.wait().expect("it ends").success());
}

#[test]
fn each_verb_is_compared_with_the_pages() {
    let output = Command::new(env!("CARGO_BIN_EXE_tapimg"))
        .arg("-h")
        .output();
    let help = String::from_utf8(output.expect("started").stdout).expect("text");
    let (_, listed) = help.split_once("Commands:\n").expect("verbs");
    let listed = listed.lines().take_while(|line| line.starts_with("  "));
    let verbs = listed.filter_map(|line| line.strip_prefix("  ")?.split_once(' '));
    let verbs = verbs.map(|(verb, _)| verb);
    let verbs: BTreeSet<&str> = verbs.filter(|verb| !["", "help"].contains(verb)).collect();
    let first = |line: &&'static str| line.split(' ').next().expect("a verb");
    // The tests of replay are in a program of their own.
    let known: BTreeSet<&str> = LINES.iter().map(first).chain(["replay", "serve"]).collect();
    assert_eq!(verbs, known, "{help}");
    let pages = JsonPages::of_checkout();
    let documented = pages.verbs("tapimg").into_iter();
    let documented: BTreeSet<&str> = documented
        .map(|verb| verb.split(' ').next().expect("one"))
        .collect();
    assert_eq!(documented, known);
}
