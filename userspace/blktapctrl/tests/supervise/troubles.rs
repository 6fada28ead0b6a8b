// SPDX-License-Identifier: MIT OR Apache-2.0
//! I/O on images that fails.

use super::bed::{block_on, test, until, which, Bed, Succession};
use super::fake::put;
use blktapctrl::recovery;
use control::supervisor::{Reply, Request, What};
use control::tapdisk::{Call, IoErrorReport, OnError, State, Trouble};
use std::fs;
use std::path::Path;

/// Sets the process' answer from now on.
fn say(dir: &Path, count: u64, is_stopped: bool) {
    let told = IoErrorReport {
        count,
        last: Some(Trouble {
            what: Call::Write,
            offset: 4096,
            len: 512,
            errno: 28,
        }),
        is_stopped,
    };
    let text = serde_json::to_vec(&told).expect("JSON");
    put(dir.join("troubles"), text);
}

/// How many others were counted with each, and whether the disk was stopped.
fn told(events: Vec<What>) -> Vec<(u64, bool)> {
    let trouble = |what| match what {
        What::Trouble { more, stopped, .. } => Some((more, stopped)),
        _ => None,
    };
    events.into_iter().filter_map(trouble).collect()
}

async fn wait_told(bed: &Bed, expected: &[(u64, bool)]) {
    until("the event", || async {
        (told(bed.events()) == expected).then_some(())
    })
    .await;
}

/// Waits until a disk was paused so many times.
async fn wait_paused(bed: &Bed, minor: u32, times: usize) {
    until("the pause", || async {
        let pauses = bed
            .events()
            .into_iter()
            .filter(|what| *what == What::Paused);
        (pauses.count() == times).then_some(())
    })
    .await;
    assert_eq!(bed.row(minor).await.state, Some(State::Paused));
}

#[test]
fn errors_are_told_but_not_each_of_them() {
    test("errors", |bed| async move {
        let image = bed.image("a.img", "A");
        let mut create = bed.create("a.img");
        create.policy.on_error = OnError::Stop;
        let minor = bed.made(create).await;
        say(&bed.dir, 1, false);
        wait_told(&bed, &[(0, false)]).await;
        let first = bed.events().into_iter().find_map(|what| match what {
            What::Trouble { target, error, .. } => Some((target, error)),
            _ => None,
        });
        let (target, error) = first.expect("an event");
        assert_eq!(target.expect("a target").path(), Some(image.as_path()));
        assert!(error.contains("No space left"), "{error}");
        // These come together, when it is time for the next one.
        for count in 2..30 {
            say(&bed.dir, count, false);
        }
        wait_told(&bed, &[(0, false), (27, false)]).await;
        assert_eq!(bed.row(minor).await.state, Some(State::Running));
        // The policy that the process got for them.
        let open = fs::read_to_string(bed.dir.join("policy")).expect("written when it opened");
        assert_eq!(open, "Stop Stop");
    });
}

#[test]
fn disk_that_stopped_is_paused_and_goes_on_when_it_is_told_to() {
    test("stopped", |bed| async move {
        bed.image("a.img", "A");
        let minor = bed.made(bed.create("a.img")).await;
        say(&bed.dir, 1, true);
        wait_paused(&bed, minor, 1).await;
        assert_eq!(told(bed.events()), [(0, true)]);
        assert!(bed.row(minor).await.stopped.is_some());
        say(&bed.dir, 1, false);
        let unpause = || Request::Unpause {
            which: which(minor),
            target: None,
            may_shrink: false,
            files: Vec::new(),
        };
        assert!(matches!(bed.ask(unpause()).await, Ok(Reply::Opened(_))));
        let row = bed.row(minor).await;
        assert_eq!((row.state, row.stopped), (Some(State::Running), None));
        // There was not enough room after all.
        say(&bed.dir, 2, true);
        wait_paused(&bed, minor, 2).await;
        assert_eq!(told(bed.events()), [(0, true), (0, true)]);
    });
}

/// The disk stopped while there was no supervisor. Failures that were reported before are not reported again.
#[test]
fn next_supervisor_pauses_what_has_stopped() {
    let host = Succession::new("stopped-alone");
    block_on(async {
        let bed = host.bed();
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        say(&bed.dir, 3, false);
        wait_told(&bed, &[(2, false)]).await;
    });
    block_on(async {
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        say(&bed.dir, 4, true);
        wait_paused(&bed, 0, 1).await;
        assert_eq!(told(bed.events()).len(), 1);
    });
    block_on(async {
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        let row = bed.row(0).await;
        assert_eq!(row.state, Some(State::Paused));
        assert!(row.stopped.is_some(), "why it stopped is forgotten");
        bed.lifecycle.destroy_all(bed.registry().all()).await;
        assert_eq!(told(bed.events()), [], "it is paused already");
    });
}
