// SPDX-License-Identifier: MIT OR Apache-2.0
//! Output with `--json` beside the pages of the reference. A supervisor answers with each key that they have, and without
//! those that may be missing. Output of backups and migrations is compared where these are tested.

use super::blocks::lease_of_another_host;
use super::disks::suspended_volume;
use super::shell::ShellFolder;
use crate::rows::served;
use control::supervisor::{Event, Reply, Request, Row};
use control::wire::Envelope;
use control::Channel;
use jsonpages::JsonPages;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::net::UnixListener;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::thread;

/// Type of the answers of blktapctrl.
const REPLY: &str = "json-answers.md#Reply";

/// Commands that get an answer of a kind, and print it.
const ANSWERED: &[(&str, &[&str])] = &[
    (
        "done",
        &[
            "attach -p 1 -m 1",
            "close -m 1",
            "destroy -m 1",
            "detach -m 1",
            "forget -m 1",
            "free -m 1",
            "pause -m 1",
            "unpause -m 1",
            "resize -m 1",
            "scrub -m 1",
        ],
    ),
    ("process", &["adopt -m 1"]),
    ("minor", &["allocate"]),
    ("pid", &["spawn"]),
    ("policy", &["set -m 1 --bps 1M"]),
    (
        "groups",
        &[
            "group show customer-7",
            "group list",
            "group set customer-7 --bps 1M",
        ],
    ),
    (
        "opened",
        &["open -m 1 -a aio:/srv/a.img", "probe -a aio:/srv/a.img"],
    ),
    ("created", &["create -a aio:/srv/a.img"]),
    ("handed-off", &["handoff -m 1"]),
    ("snapshot", &["snapshot -m 1 /srv/b.qcow2"]),
    (
        "snapshots",
        &["snapshot 3 xvda /srv/b.qcow2 3 xvdb /srv/d.qcow2"],
    ),
    ("parked", &["park", "unpark"]),
    ("stream", &["stream -m 1 --show"]),
    ("mirror", &["mirror -m 1 --show", "commit -m 1 --show"]),
    ("marks", &["dirty -m 1"]),
    ("changed", &["dirty -m 1 --since monday"]),
    ("trace", &["trace -m 1"]),
    ("stats", &["stats -m 1"]),
];

/// Classes of a histogram of latencies.
const CLASSES: usize = 32;

/// Kinds of answers that commands do not print as they are.
const SHOWN_OTHERWISE: [&str; 2] = ["disks", "top"];

/// Commands whose output other tests compare with the pages.
const ELSEWHERE: [&str; 6] = [
    "backup",
    "backup list",
    "backup repair",
    "backup verify",
    "migrate-out",
    "restore",
];

/// Commands of which a test of this file compares the output.
const HERE: [&str; 9] = [
    "doctor",
    "events",
    "handoff --all",
    "lease break",
    "lease show",
    "list",
    "report",
    "status",
    "top",
];

/// Verbs that print no JSON: metrics has a format of its own, and refuses the option.
const WITHOUT: [&str; 2] = ["help", "metrics"];

/// Returns a text that a field may have.
fn text(key: &str) -> String {
    match key {
        "target" | "to" | "from" => "aio:/srv/b.img",
        "vbd" => "backend/vbd/3/51712",
        "host" | "machine" => "00000000000000000000000000000001",
        _ => "sample",
    }
    .into()
}

/// Returns values of a type. Histograms have all their classes.
fn samples(pages: &JsonPages, name: &str) -> Vec<Value> {
    let mut samples = pages.samples(name, &text);
    samples.iter_mut().for_each(fill_histograms);
    samples
}

fn fill_histograms(value: &mut Value) {
    match value {
        Value::Array(values) => values.iter_mut().for_each(fill_histograms),
        Value::Object(object) => {
            for (key, value) in object {
                match key.as_str() {
                    "counts" => *value = vec![1; CLASSES].into(),
                    _ => fill_histograms(value),
                }
            }
        }
        _ => {}
    }
}

/// Returns both disks of guest 3.
fn disks_of_guest() -> Vec<Row> {
    let disks = [(1, 51712), (2, 51728)].into_iter();
    let row = |(minor, device)| {
        let target = "aio:/srv/a.img".parse().expect("a target");
        served(minor, &format!("backend/vbd/3/{device}"), target)
    };
    disks.map(row).collect()
}

/// Answers each request with the present value, and a subscriber with all events.
fn supervisor(shell: &ShellFolder, reply: Arc<Mutex<Value>>, events: Vec<Value>) {
    let listener = UnixListener::bind(shell.socket()).expect("a socket");
    thread::spawn(move || {
        for connection in listener.incoming() {
            let mut channel = Channel::new(connection.expect("a connection"));
            while let Ok(Some((question, _))) = channel.receive::<Request>() {
                let is_subscriber = matches!(question.body, Request::Subscribe { .. });
                let mut value = reply.lock().expect("a value").clone();
                if matches!(question.body, Request::Changed { from, .. } if from > 0) {
                    // There is no third answer.
                    value.as_object_mut().expect("an object").remove("next");
                }
                let answer: Reply = match &question.body {
                    Request::Subscribe { .. } => Reply::Done,
                    // Where the disks of a guest are to be found.
                    Request::List(_) if value["is"] != "disks" => Reply::Disks {
                        disks: disks_of_guest(),
                    },
                    _ => {
                        let text = value.to_string();
                        serde_json::from_value(value)
                            .unwrap_or_else(|error| panic!("{error}: {text}"))
                    }
                };
                if channel.answer(question.id, Ok(answer)).is_err() {
                    break;
                }
                if is_subscriber {
                    for event in &events {
                        let event: Event = serde_json::from_value(event.clone()).expect("an event");
                        channel
                            .send(&Envelope::new(0, 0, event), &[])
                            .expect("sent");
                    }
                    break;
                }
            }
        }
    });
}

fn tap_ctl(shell: &ShellFolder, line: &str) -> Output {
    Command::new(shell.path("bin/tap-ctl"))
        .args(["--json", "--patience", "0"])
        .args(line.split(' '))
        .output()
        .expect("started")
}

/// Runs a command, which must not fail, and compares its output with the pages.
fn documented(pages: &JsonPages, shell: &ShellFolder, command: &str, line: &str) -> Vec<Value> {
    let values = compared(pages, shell, command, line);
    let failed = values.iter().find(|value| value.get("error").is_some());
    assert!(failed.is_none(), "{line}: {failed:?}");
    values
}

/// Runs a command, and compares its output with the pages, whatever comes of it.
fn compared(pages: &JsonPages, shell: &ShellFolder, command: &str, line: &str) -> Vec<Value> {
    let output = tap_ctl(shell, line);
    let printed = String::from_utf8(output.stdout.clone()).expect("text");
    assert!(!printed.is_empty(), "{line}: {output:?}");
    pages.assert_documented(&format!("tap-ctl {command}"), &printed);
    let values = printed
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"));
    values.collect()
}

#[test]
fn each_answer_of_the_supervisor_is_printed_as_on_the_pages() {
    let pages = JsonPages::of_checkout();
    let shell = ShellFolder::new();
    let reply = Arc::new(Mutex::new(Value::Null));
    supervisor(&shell, reply.clone(), Vec::new());
    let mut by_kind: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for sample in samples(&pages, REPLY) {
        let kind = sample["is"].as_str().expect("a kind").to_owned();
        by_kind.entry(kind).or_default().push(sample);
    }
    for kind in SHOWN_OTHERWISE {
        assert!(by_kind.remove(kind).is_some(), "{kind}");
    }
    let answered: BTreeSet<&str> = ANSWERED.iter().map(|(kind, _)| *kind).collect();
    let kinds: BTreeSet<&str> = by_kind.keys().map(String::as_str).collect();
    assert_eq!(
        answered, kinds,
        "each kind of answer needs a command that prints it"
    );
    for (kind, lines) in ANSWERED {
        for line in *lines {
            for sample in &by_kind[*kind] {
                *reply.lock().expect("a value") = sample.clone();
                let printed = documented(&pages, &shell, line, line);
                let mut wanted = sample.clone();
                wanted["json_version"] = 1.into();
                // A command adds the ranges of further answers.
                if *kind != "changed" {
                    assert_eq!(printed, [wanted], "{line}");
                }
            }
        }
    }
}

#[test]
fn events_are_printed_as_on_the_pages() {
    let pages = JsonPages::of_checkout();
    let shell = ShellFolder::new();
    let events = samples(&pages, "events.md#Event");
    supervisor(&shell, Arc::default(), events.clone());
    let printed = compared(&pages, &shell, "events", "events --after 0");
    // The last line is that the supervisor has ended.
    assert_eq!(printed.len(), events.len() + 1);
    assert_eq!(printed[events.len()]["error"]["code"], "gone");
}

#[test]
fn disks_are_listed_and_handed_over_as_on_the_pages() {
    let pages = JsonPages::of_checkout();
    let shell = ShellFolder::new();
    let reply = Arc::new(Mutex::new(Value::Null));
    supervisor(&shell, reply.clone(), Vec::new());
    let of_kind = |kind: &str| {
        let all = samples(&pages, REPLY).into_iter();
        all.filter(|sample| sample["is"] == kind)
            .collect::<Vec<_>>()
    };
    let disks = of_kind("disks");
    assert!(disks.len() > 2, "{disks:?}");
    for sample in disks {
        *reply.lock().expect("a value") = sample.clone();
        documented(&pages, &shell, "list", "list");
        // The answer to a hand-off is a list as well, which is a failure of each.
        documented(&pages, &shell, "handoff --all", "handoff --all");
    }
    let top = of_kind("top");
    for sample in &top {
        *reply.lock().expect("a value") = sample.clone();
        documented(&pages, &shell, "top", "top -n 1");
    }
    // With two looks at all disks, a second apart.
    for sample in [top.first(), top.last()] {
        *reply.lock().expect("a value") = sample.expect("a sample").clone();
        documented(&pages, &shell, "status", "status");
    }
}

#[test]
fn a_host_is_described_as_on_the_pages() {
    let pages = JsonPages::of_checkout();
    let shell = ShellFolder::new();
    suspended_volume(&shell);
    let [status] = &documented(&pages, &shell, "status", "status")[..] else {
        panic!("one object");
    };
    assert_eq!(
        status["disks"].as_array().map(Vec::len),
        Some(2),
        "{status}"
    );
    for line in ["list", "report", "doctor", "top -n 2 -d 1"] {
        let command = line.split(' ').next().expect("a verb");
        documented(&pages, &shell, command, line);
    }
    // Neither an answer nor a disk.
    let failed = compared(&pages, &shell, "pause", "pause -m 7");
    assert_eq!(failed[0]["error"]["code"], "invalid", "{failed:?}");
}

#[test]
fn leases_are_printed_as_on_the_pages() {
    let pages = JsonPages::of_checkout();
    let shell = ShellFolder::new();
    lease_of_another_host(&shell);
    let image = shell.path("srv/a.img");
    let show = format!("lease show {}", image.display());
    let shown = documented(&pages, &shell, "lease show", &show);
    assert_eq!(shown[0]["state"], "held");
    let generation = &shown[0]["generation"];
    let line = format!(
        "lease break {} --holder-is-dead {generation}",
        image.display()
    );
    let broken = documented(&pages, &shell, "lease break", &line);
    assert_eq!(broken[0]["was"]["host"], "alpha", "{broken:?}");
    let shown = documented(&pages, &shell, "lease show", &show);
    assert_eq!(shown[0]["state"], "free");
}

/// Returns the verbs that the program lists.
fn verbs() -> BTreeSet<String> {
    let output = Command::new(env!("CARGO_BIN_EXE_tap-ctl"))
        .arg("-h")
        .output();
    let text = String::from_utf8(output.expect("started").stdout).expect("text");
    let verbs = text
        .lines()
        .filter_map(|line| line.strip_prefix("  ")?.split_once(' '));
    let verbs = verbs
        .map(|(verb, _)| verb)
        .filter(|verb| verb.starts_with(|first: char| first.is_ascii_lowercase()));
    verbs.map(String::from).collect()
}

#[test]
fn each_verb_is_compared_with_the_pages() {
    let first = |line: &str| line.split(' ').next().expect("a verb").to_owned();
    let answered = ANSWERED.iter().flat_map(|(_, lines)| *lines);
    let all = answered.chain(&ELSEWHERE).chain(&HERE).chain(&WITHOUT);
    let known: BTreeSet<String> = all.map(|line| first(line)).collect();
    assert_eq!(verbs(), known);
    let pages = JsonPages::of_checkout();
    let compared: BTreeSet<&str> = ELSEWHERE.into_iter().chain(HERE).collect();
    assert_eq!(pages.verbs("tap-ctl"), compared);
}
