// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disks of memory, whose content outlives every process.

use super::bed::{block_on, kill, test, until, which, Bed, Succession};
use blktapctrl::recovery;
use control::supervisor::{Create, Request, What};
use control::tapdisk::{Open, State};
use std::fs;
use std::path::PathBuf;

fn create(bed: &Bed) -> Create {
    Create {
        open: Open::new("ram:512".parse().expect("a target")),
        ..bed.create("none")
    }
}

fn file(bed: &Bed, minor: u32) -> PathBuf {
    bed.dir.join("run/ram").join(minor.to_string())
}

/// As a process does for its guest.
fn write(bed: &Bed, minor: u32, content: &str) {
    fs::write(file(bed, minor), format!("{content:512}")).expect("write");
}

/// Returns the content that the last process found.
fn found(bed: &Bed) -> String {
    let log = bed.log();
    let last = log
        .iter()
        .rfind(|line| line.contains("open w") || line.contains("unpause w"));
    let content = last.and_then(|line| line.split("w ").nth(1));
    content.unwrap_or_default().trim().to_owned()
}

#[test]
fn content_outlives_a_death_and_a_pause() {
    test("memory", |bed| async move {
        let minor = bed.made(create(&bed)).await;
        write(&bed, minor, "first");
        bed.replaced(minor, kill).await;
        assert_eq!(found(&bed), "first");
        write(&bed, minor, "second");
        let (pause, target) = (which(minor), None);
        let pause = Request::Pause {
            which: pause,
            timeout_s: 0,
        };
        bed.ask(pause).await.expect("paused");
        kill(bed.row(minor).await.pid.expect("a process"));
        until("its end is noticed", || async {
            bed.row(minor).await.pid.is_none().then_some(())
        })
        .await;
        let unpause = Request::Unpause {
            which: which(minor),
            target,
            may_shrink: false,
            files: Vec::new(),
        };
        bed.ask(unpause).await.expect("unpaused");
        assert_eq!(found(&bed), "second");
        bed.destroy(minor).await;
        bed.assert_nothing_left().await;
        // No disk gets the memory that another disk of that number had.
        assert_eq!(bed.made(create(&bed)).await, minor);
        assert_eq!(found(&bed).trim_matches('\0'), "");
    });
}

#[test]
fn memory_that_is_lost_is_not_taken_for_zeroes() {
    test("lost", |bed| async move {
        let minor = bed.made(create(&bed)).await;
        write(&bed, minor, "content");
        fs::remove_file(file(&bed, minor)).expect("remove");
        kill(bed.row(minor).await.pid.expect("a process"));
        until("the failure", || async {
            let lost = |what: &What| matches!(what, What::Failed { message, .. } if message.contains("lost"));
            bed.events().iter().any(lost).then_some(())
        })
        .await;
        assert_ne!(bed.row(minor).await.state, Some(State::Running));
    });
}

/// The process died while there was no supervisor.
#[test]
fn content_outlives_the_supervisor_and_the_process_together() {
    let host = Succession::new("memory-both");
    let dies = block_on(async {
        let bed = host.bed();
        let minor = bed.made(create(&bed)).await;
        write(&bed, minor, "content");
        bed.row(minor).await.pid.expect("a process")
    });
    kill(dies);
    block_on(async {
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        until("the disk is served", || async {
            let row = bed.row(0).await;
            (row.state == Some(State::Running) && row.pid != Some(dies)).then_some(())
        })
        .await;
        assert_eq!(found(&bed), "content");
        bed.lifecycle.destroy_all(bed.registry().all()).await;
        bed.assert_nothing_left().await;
    });
}
