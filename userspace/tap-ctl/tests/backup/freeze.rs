// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl backup web xvda /backup --freeze`: file systems are frozen at the snapshot and never after the backup, whatever
//! the agent, the administrator's program, the supervisor and signals do.

use crate::agent::{AgentKind, FakeAgent};
use crate::host::{mode, Fault};
use crate::Bed;
use std::fs;
use std::process::Output;
use std::thread;
use std::time::{Duration, Instant};

/// Time limits that are far away, and one that passes soon.
const AGENT: &str = " --freeze={at}/agent --freeze-limit 60";
const HURRIED: &str = " --freeze={at}/agent --freeze-limit 3";

/// A program that freezes: it does what the file `how` says.
const PROGRAM: &str = r#"#!/bin/sh
dir=$(dirname "$0")
echo "$1 $2" >>"$dir/verbs"
case "$(cat "$dir/how" 2>/dev/null) $1" in
"fail freeze") exit 3;;
"hang freeze") : >"$dir/frozen"; sleep 600;;
"hang thaw") sleep 600;;
*" freeze") : >"$dir/frozen"; echo frozen;;
*" thaw") rm -f "$dir/frozen";;
esac
"#;

impl Bed {
    fn agent(&self, kind: AgentKind) -> FakeAgent {
        FakeAgent::serve(&self.path("at/agent"), &self.path("at/frozen"), kind)
    }

    fn program(&self) {
        fs::write(self.path("at/freezer"), PROGRAM).expect("write");
        mode(&self.path("at/freezer"), 0o755);
    }

    fn how(&self, how: &str) {
        fs::write(self.path("at/how"), how).expect("write");
    }

    fn is_frozen(&self) -> bool {
        self.path("at/frozen").exists()
    }

    /// Checks that the guest is thawed, at the latest when the guard of a program that was killed has seen that.
    fn assert_thawed(&self, about: &str) {
        let limit = Instant::now() + Duration::from_secs(20);
        while self.is_frozen() {
            assert!(Instant::now() < limit, "{about}: still frozen");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Takes a backup that must be refused, with nothing left.
    fn refused(&self, options: &str) -> String {
        let before = self.list();
        let output = self.with_fault(None, options);
        assert_eq!(output.status.code(), Some(6), "{output:?}");
        let why = errors(&output);
        assert!(!self.is_frozen(), "{why}");
        assert_eq!(self.list(), before, "{why}");
        self.assert_clean();
        why
    }

    fn consistency(&self) -> Vec<String> {
        let list = self.list();
        let word = |one: &serde_json::Value| one["consistency"].as_str().map(String::from);
        list.iter().filter_map(word).collect()
    }
}

/// Returns the standard error, which has nothing that a terminal would act on.
fn errors(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).expect("text");
    let acts = |c: char| c.is_control() && c != '\n';
    assert!(!text.contains(acts), "{text:?}");
    assert!(text.len() < 2000, "{text}");
    text
}

#[test]
fn file_systems_are_frozen_at_the_snapshot_only() {
    let bed = Bed::new(&[("a.img", 51712), ("b.img", 51728)]);
    let agent = bed.agent(AgentKind::Good);
    let line = format!("backup 3 xvda xvdb DIR {}", bed.tool());
    bed.good(&format!("{line}{AGENT}"));
    assert_eq!(bed.state().frozen_at_snapshot, [true]);
    // Once around both disks.
    assert_eq!(agent.counts(), (1, 1));
    assert!(!bed.is_frozen());
    bed.good(&line);
    assert_eq!(bed.state().frozen_at_snapshot, [true, false]);
    let crash = ["crash"; 2];
    assert_eq!(bed.consistency(), [["file-system"; 2], crash].concat());
    let text = bed.good("backup list DIR");
    assert!(text.contains(" consistency=file-system "), "{text}");
    bed.assert_clean();
    bed.assert_restorable();
}

#[test]
fn a_backup_whose_agent_does_not_freeze_is_refused_and_leaves_nothing() {
    for (kind, word) in [
        (AgentKind::Silent, "does not answer"),
        (AgentKind::Floods, "sends without an end"),
        (AgentKind::Refuses, "no\\u{1b}[31m\\r\\nluck"),
        (AgentKind::Endless, "has no end"),
        (AgentKind::Nonsense, "something else"),
        (AgentKind::Nothing, "has frozen none"),
        (AgentKind::Dies, "connection has ended"),
        (AgentKind::Late, "does not answer"),
        (AgentKind::Forgets, "by something else"),
    ] {
        let bed = Bed::new(&[("a.img", 51712)]);
        let agent = bed.agent(kind);
        let begin = Instant::now();
        let why = bed.refused(HURRIED);
        let took = begin.elapsed();
        assert!(why.contains(word), "{kind:?}: {why}");
        assert!(why.contains("no backup was taken"), "{kind:?}: {why}");
        assert!(took < Duration::from_secs(60), "{kind:?}: {took:?}");
        let (freezes, thaws) = agent.counts();
        assert!(thaws >= freezes, "{kind:?}: {freezes} {thaws}");
        if kind != AgentKind::Forgets {
            assert!(bed.state().frozen_at_snapshot.is_empty(), "{kind:?}");
        }
        // Without its help there is one.
        bed.back_up("");
        bed.assert_clean();
    }
}

#[test]
fn a_guest_without_an_agent_is_told_apart() {
    let bed = Bed::new(&[("a.img", 51712)]);
    let why = bed.refused(AGENT);
    assert!(why.contains("cannot connect to"), "{why}");
    let why = bed.refused(" --freeze");
    assert!(why.contains("/run/xentap/agent/3"), "{why}");
}

#[test]
fn noise_of_an_agent_is_skipped() {
    let bed = Bed::new(&[("a.img", 51712)]);
    bed.agent(AgentKind::Chatters);
    bed.back_up(AGENT);
    assert_eq!(bed.state().frozen_at_snapshot, [true]);
    assert_eq!(bed.consistency(), ["file-system"]);
}

#[test]
fn an_agent_that_was_started_again_while_frozen_gets_the_thaw_again() {
    let bed = Bed::new(&[("a.img", 51712)]);
    let agent = bed.agent(AgentKind::Restarts);
    bed.back_up(AGENT);
    assert_eq!(bed.state().frozen_at_snapshot, [true]);
    assert_eq!((agent.counts(), agent.state().lost), ((1, 1), 2));
    assert!(!bed.is_frozen());
    assert_eq!(bed.consistency(), ["file-system"]);
}

#[test]
fn a_program_freezes_and_thaws() {
    let bed = Bed::new(&[("a.img", 51712)]);
    bed.program();
    let options = |limit| format!(" --freeze-by {{at}}/freezer --freeze-limit {limit}");
    bed.back_up(&options(60));
    assert_eq!(bed.state().frozen_at_snapshot, [true]);
    let verbs = |bed: &Bed| fs::read_to_string(bed.path("at/verbs")).expect("verbs");
    assert_eq!(verbs(&bed), "freeze 3\nthaw 3\n");
    for (how, limit, word) in [
        ("fail", 60, "has failed"),
        ("hang", 1, "did not come to an end"),
    ] {
        bed.how(how);
        fs::write(bed.path("at/verbs"), "").expect("write");
        // A program that hangs does so when it should thaw as well, and the user learns that.
        let before = bed.list();
        let output = bed.with_fault(None, &options(limit));
        let why = errors(&output);
        assert_eq!(output.status.code(), Some(6), "{why}");
        assert!(why.contains(word), "{why}");
        let remedy = ["`xl sysrq 3 j`", "kernel.sysrq of the guest"];
        for words in remedy {
            assert_eq!(why.contains(words), how == "hang", "{why}");
        }
        assert!(verbs(&bed).starts_with("freeze 3\nthaw 3\n"), "{how}");
        assert_eq!(bed.list(), before, "{how}");
        bed.assert_clean();
    }
    fs::remove_file(bed.path("at/how")).expect("remove");
    fs::remove_file(bed.path("at/frozen")).expect("remove");
    let why = bed.refused(" --freeze-by {at}/missing");
    assert!(why.contains("cannot run"), "{why}");
}

/// Has the supervisor tell the agent which process the program is.
fn tell_program(bed: &Bed, agent: &FakeAgent) {
    let agent = agent.clone();
    bed.state().on_start = Some(Box::new(move |program| {
        agent.state().program = Some(program);
    }));
}

#[test]
fn a_signal_while_file_systems_are_frozen_thaws_them() {
    let bed = Bed::new(&[("a.img", 51712)]);
    let agent = bed.agent(AgentKind::Signals);
    tell_program(&bed, &agent);
    // The limit is far away.
    let begin = Instant::now();
    let why = bed.refused(" --freeze={at}/agent --freeze-limit 300");
    assert!(why.contains("ended by a signal"), "{why}");
    assert!(begin.elapsed() < Duration::from_secs(60));
    assert_eq!(agent.counts(), (1, 1));
}

#[test]
fn a_snapshot_that_takes_too_long_is_no_backup() {
    let bed = Bed::new(&[("a.img", 51712)]);
    bed.agent(AgentKind::Good);
    bed.state().slow_snapshot = Some(Duration::from_secs(5));
    let why = bed.refused(HURRIED);
    assert!(why.contains("--freeze-limit"), "{why}");
}

/// The program and the process that thaws were killed, by the administrator or for want of memory.
#[test]
fn a_guest_that_no_process_thaws_is_thawed_by_a_repair() {
    let bed = Bed::new(&[("a.img", 51712)]);
    let agent = bed.agent(AgentKind::Kills);
    tell_program(&bed, &agent);
    let output = bed.with_fault(None, AGENT);
    assert_eq!(output.status.code(), None, "{output:?}");
    assert!(bed.is_frozen());
    bed.good(&format!("backup repair DIR {}", bed.tool()));
    assert!(!bed.is_frozen());
    bed.assert_clean();
    assert!(bed.list().is_empty());
}

/// The guest is thawed also if the program is killed, or the supervisor ends, at any step.
#[test]
fn a_backup_that_ends_at_any_step_leaves_a_thawed_guest() {
    let bed = Bed::new(&[("a.img", 51712)]);
    let agent = bed.agent(AgentKind::Good);
    bed.back_up("");
    for fault in [
        Fault::KillBefore,
        Fault::KillAfter,
        Fault::EndBefore,
        Fault::EndAfter,
    ] {
        let (mut at, mut was_frozen) = (0, false);
        loop {
            at += 1;
            let requests = bed.state().frozen_at_snapshot.len();
            let output = bed.with_fault(Some((at, fault)), AGENT);
            let about = format!("{at} {fault:?}");
            bed.assert_thawed(&about);
            let taken = bed.state().frozen_at_snapshot.split_off(requests);
            was_frozen |= taken.contains(&true);
            bed.back_up("");
            bed.assert_clean();
            bed.assert_marked_once();
            if output.status.success() && !bed.state().has_failed() {
                break;
            }
        }
        assert!(was_frozen && at > 10, "{at} {fault:?}");
    }
    let (freezes, thaws) = agent.counts();
    assert!(thaws >= freezes, "{freezes} {thaws}");
    bed.good("backup verify DIR");
}
