// SPDX-License-Identifier: MIT OR Apache-2.0
//! Events outlive the supervisor, and who listens learns what it has missed.

use super::bed::{block_on, test, Bed, Succession};
use super::log;
use super::steps::pause;
use blktapctrl::{recovery, server};
use control::supervisor::{Event, Reply, Request, What};
use control::Channel;
use std::fs;
use std::rc::Rc;
use std::time::Duration;

/// Returns the events that a client gets at once over the socket if it knows one.
async fn heard(bed: &Rc<Bed>, after: u64, series: Option<u32>, count: usize) -> Vec<Event> {
    let path = bed.registry().folder.control();
    let _ = fs::remove_file(&path);
    let listener = tokio::net::UnixListener::bind(&path).expect("a socket");
    let serving = tokio::task::spawn_local(server::serve(bed.lifecycle.clone(), listener));
    let client = tokio::task::spawn_blocking(move || {
        let mut channel = Channel::connect(&path).expect("a connection");
        let limit = Some(Duration::from_secs(20));
        channel.set_timeout(limit).expect("a limit");
        let subscribe = Request::Subscribe { after, series };
        let reply: Reply = channel.ask(subscribe, &[]).expect("events");
        assert_eq!(reply, Reply::Done);
        let mut event = || {
            let message = channel.receive::<Event>().expect("an event");
            message.expect("an event").0.body
        };
        (0..count).map(|_| event()).collect()
    });
    let events = client.await.expect("no panic");
    serving.abort();
    events
}

fn numbers(events: &[Event]) -> Vec<u64> {
    events.iter().map(|event| event.number).collect()
}

#[test]
fn an_event_names_the_guest_of_its_disk() {
    test("event-guest", |bed| async move {
        log::of_a_guest(&bed).await;
        bed.ask(pause(0)).await.expect("paused");
        let events = bed.registry().events.after(0);
        let paused = events.iter().find(|event| event.what == What::Paused);
        let paused = paused.expect("an event");
        let named = (paused.guest, paused.guest_name.as_deref());
        assert_eq!(named, (Some(3), Some("web")));
        assert_eq!(paused.vdev.as_deref(), Some("xvdb"));
    });
}

#[test]
fn the_next_supervisor_goes_on_with_the_numbers() {
    let host = Succession::new("numbers");
    let known = block_on(async {
        let bed = host.bed();
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        let events = heard(&bed, 0, None, 2).await;
        assert_eq!(numbers(&events), [1, 2]);
        assert!(matches!(events[0].what, What::Created { .. }));
        events[0].clone()
    });
    // It was killed, and so was another one that had nothing to tell.
    block_on(async { drop(host.bed()) });
    block_on(async {
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        let events = heard(&bed, known.number, Some(known.series), 1).await;
        assert!(matches!(events[0].what, What::Started { .. }));
        bed.destroy(0).await;
        let events = heard(&bed, known.number, Some(known.series), 2).await;
        assert_eq!(numbers(&events), [2, 3]);
        assert_eq!(events[1].what, What::Destroyed);
        assert_eq!(events[1].series, known.series);
        bed.assert_nothing_left().await;
    });
}

#[test]
fn what_is_not_kept_for_so_long_is_told_by_the_next_one() {
    let host = Succession::new("gap");
    const MANY: u64 = 9000;
    block_on(async {
        let bed = host.bed();
        for number in 1..=MANY {
            let why = format!("refused {number}");
            bed.registry().events.add(Some(3), What::Refused { why });
        }
    });
    block_on(async {
        let bed = host.bed();
        bed.registry().events.add(Some(3), What::Paused);
        let all = bed.registry().events.since(5, None);
        let What::Lost { count } = all[0].what else {
            panic!("{:?}", all[0]);
        };
        assert!(count > 1000, "more than a supervisor keeps");
        assert_eq!(all[1].number, 5 + count + 1);
        let rest: Vec<u64> = (5 + count..=MANY + 1).collect();
        assert_eq!(numbers(&all), rest, "and nothing else is missing");
        assert_eq!(bed.registry().events.lost(), count);
        let same = heard(&bed, 5, None, 2).await;
        assert_eq!(same, all[..2]);
    });
}

#[test]
fn a_history_that_cannot_be_read_stops_nobody_and_is_told() {
    let host = Succession::new("unread");
    let known = block_on(async {
        let bed = host.bed();
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        bed.registry().events.after(1).remove(0)
    });
    let file = host.dir.join("run/events");
    fs::write(&file, vec![b'x'; 100_000]).expect("written");
    let next = block_on(async {
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        for _ in 0..5 {
            bed.registry().events.add(Some(0), What::Paused);
        }
        // It knows the number 2, and so does this one: of something else.
        let events = heard(&bed, known.number, Some(known.series), 6).await;
        assert_eq!(events[0].what, What::Renumbered);
        assert_eq!(numbers(&events), [0, 1, 2, 3, 4, 5]);
        assert_ne!(events[1].series, known.series);
        events[5].clone()
    });
    // There can be none at all: a folder is in its place.
    fs::remove_file(&file).expect("removed");
    fs::create_dir(&file).expect("a folder");
    block_on(async {
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        bed.destroy(0).await;
        let events = bed.registry().events.since(next.number, Some(next.series));
        let what = |event: Option<&Event>| event.map(|event| event.what.clone());
        assert_eq!(what(events.first()), Some(What::Renumbered));
        assert_eq!(what(events.last()), Some(What::Destroyed));
        bed.assert_nothing_left().await;
    });
}
