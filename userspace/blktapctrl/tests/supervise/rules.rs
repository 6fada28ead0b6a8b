// SPDX-License-Identifier: MIT OR Apache-2.0
//! Changes of a disk's policy while it is served.

use super::bed::{block_on, kill, test, which, Bed, Succession};
use blktapctrl::recovery;
use control::supervisor::{Changes, Check, Create, HungAction, Mode, Policy, Reply, Request};
use control::tapdisk::{OnError, Open};
use control::{Code, Failure, Target};
use std::fs;

async fn set(bed: &Bed, changes: Changes) -> Result<Policy, Failure> {
    let which = which(0);
    match bed.ask(Request::Set { which, changes }).await? {
        Reply::Policy(policy) => Ok(policy),
        other => panic!("{other:?}"),
    }
}

fn iops(requests: u32) -> Changes {
    Changes {
        requests: Some(requests),
        ..Changes::default()
    }
}

/// The limits that the last process was given with its image.
fn given(bed: &Bed) -> String {
    fs::read_to_string(bed.dir.join("limits")).expect("limits")
}

fn limited(bed: &Bed, words: &str) -> Target {
    let path = bed.image("a.img", "A");
    let text = format!("{words}sync:{}", path.display());
    text.parse().expect("a target")
}

#[test]
fn what_a_configuration_says_of_errors_is_the_disks() {
    test("rules-said", |bed| async move {
        let target = limited(&bed, "on-error=stop,fail-after=60,hung-after=5,hung=kill,");
        let check = Check {
            target: target.clone(),
            mode: Mode::Write,
            vbd: None,
        };
        bed.ask(Request::Check(check)).await.expect("free");
        // The host's settings for all disks give way where a disk has its own.
        let create = || Create {
            open: Open::new(target.clone()),
            policy: Policy {
                on_error: OnError::Report,
                on_no_space: OnError::Report,
                fail_after_s: 7,
                ..Policy::default()
            },
            ..bed.create("a.img")
        };
        let minor = bed.made(create()).await;
        let expected = Policy {
            on_error: OnError::Stop,
            on_no_space: OnError::Report,
            fail_after_s: 60,
            hung_after_s: 5,
            hung: HungAction::Kill,
            ..Policy::default()
        };
        let disk = bed.registry().get(minor).expect("a disk");
        assert_eq!(disk.record.borrow().policy, expected);
        let told = || fs::read_to_string(bed.dir.join("policy")).expect("written when it opened");
        assert_eq!(told(), "Report Stop");
        bed.replaced(minor, kill).await;
        assert_eq!(told(), "Report Stop");
        let (which, timeout_s) = (which(minor), 0);
        bed.ask(Request::Pause { which, timeout_s })
            .await
            .expect("paused");
        let unpause = Request::Unpause {
            which: super::bed::which(minor),
            target: Some(target.clone()),
            may_shrink: false,
            files: Vec::new(),
        };
        let failure = bed.ask(unpause).await.expect_err("not here");
        assert!(failure.message.contains("tap-ctl set"), "{failure}");
    });
}

#[test]
fn limits_of_a_configuration_are_the_disks() {
    test("rules-target", |bed| async move {
        let target = limited(&bed, "bps=20M,iops=500,");
        let create = || Create {
            open: Open::new(target.clone()),
            ..bed.create("a.img")
        };
        let check = Check {
            target: target.clone(),
            mode: Mode::Write,
            vbd: None,
        };
        bed.ask(Request::Check(check)).await.expect("free");
        let minor = bed.made(create()).await;
        assert_eq!(given(&bed), "bps=20971520 iops=500 burst=1s");
        // They stay with another image, and another process.
        let (which, timeout_s) = (which(minor), 0);
        let pause = Request::Pause { which, timeout_s };
        bed.ask(pause).await.expect("paused");
        bed.image("b.img", "B");
        let unpause = |target: Target| Request::Unpause {
            which: super::bed::which(minor),
            target: Some(target),
            may_shrink: false,
            files: Vec::new(),
        };
        let failure = bed
            .ask(unpause(target.clone()))
            .await
            .expect_err("no limits");
        assert!(failure.message.contains("tap-ctl set"), "{failure}");
        bed.ask(unpause(bed.create("b.img").open.target))
            .await
            .expect("goes on");
        assert_eq!(given(&bed), "bps=20971520 iops=500 burst=1s");
        bed.replaced(minor, kill).await;
        assert_eq!(given(&bed), "bps=20971520 iops=500 burst=1s");
    });
}

#[test]
fn rules_are_changed_while_a_disk_is_served() {
    test("rules-set", |bed| async move {
        bed.image("a.img", "A");
        let minor = bed.made(bed.create("a.img")).await;
        let changes = Changes {
            on_error: Some(OnError::Stop),
            bytes: Some(1 << 20),
            ..Changes::default()
        };
        let policy = set(&bed, changes).await.expect("set");
        assert_eq!(
            (policy.on_error, policy.limits.bytes),
            (OnError::Stop, 1 << 20)
        );
        // Settings that a request leaves out stay.
        let policy = set(&bed, iops(100)).await.expect("set");
        assert_eq!(
            (policy.on_error, policy.limits.bytes),
            (OnError::Stop, 1 << 20)
        );
        let log = bed.log();
        assert_eq!(
            log[log.len() - 1],
            "rules bps=1048576 iops=100 burst=1s Stop"
        );
        bed.replaced(minor, kill).await;
        assert_eq!(given(&bed), "bps=1048576 iops=100 burst=1s");
        // Limits that make no sense change nothing.
        let failure = set(&bed, iops(1)).await.expect_err("too few");
        assert_eq!(failure.code, Code::Invalid);
        bed.replaced(minor, kill).await;
        assert_eq!(given(&bed), "bps=1048576 iops=100 burst=1s");
        // The supervisor reports a process that refuses, and the next process obeys.
        fs::write(bed.dir.join("refuse-rules"), "").expect("write");
        let failure = set(&bed, iops(50)).await.expect_err("refused");
        assert!(
            failure.message.contains("the next process does it"),
            "{failure}"
        );
        fs::remove_file(bed.dir.join("refuse-rules")).expect("remove");
        bed.replaced(minor, kill).await;
        assert_eq!(given(&bed), "bps=1048576 iops=50 burst=1s");
    });
}

#[test]
fn rules_outlive_the_supervisor() {
    let host = Succession::new("rules-outlive");
    block_on(async {
        let bed = host.bed();
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        set(&bed, iops(100)).await.expect("set");
    });
    block_on(async {
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        bed.replaced(0, kill).await;
        assert_eq!(given(&bed), "iops=100 burst=1s");
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}
