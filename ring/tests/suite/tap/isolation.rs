// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Requests of which processes die.

use ring::numbers::DiskTag;
use ring::response::ResponseStatus;
use ring::tap::abi::{self, Completion, Info};
use ring::tap::shadow::{Op, Shadow};
use ring::tap::table::TagEntry;

use super::shadow::request;

/// A disk whose processes die of some requests.
struct Deadly {
    shadow: Shadow<Vec<TagEntry>>,
    poison: Vec<u16>,
    /// Number of requests that a process takes before it answers any.
    width: usize,
    deaths: u32,
    results: Vec<(u16, ResponseStatus)>,
}

impl Deadly {
    fn new(limit: u8, poison: &[u16], width: usize) -> Self {
        let mut shadow = Shadow::new(vec![TagEntry::FREE; 32]);
        shadow.set_death_limit(limit);
        Self {
            shadow,
            poison: poison.to_vec(),
            width,
            deaths: 0,
            results: Vec::new(),
        }
    }

    fn post(&mut self, tags: std::ops::Range<u16>) {
        for tag in tags {
            let write = request(Op::Write, 8 * u64::from(tag), 8);
            assert_eq!(self.shadow.post(DiskTag::new(tag), 0, &write, 0), Ok(()));
        }
    }

    /// A process takes requests and answers them, until it gets one of which it dies (returns `false`) or there are
    /// none.
    fn process(&mut self) -> bool {
        let epoch = self.shadow.opened().expect("nobody has it");
        assert!(self.shadow.started(epoch).is_ok());
        let lived = self.serve(epoch);
        self.reap();
        self.shadow.closed();
        assert_eq!(self.shadow.quiet(0).unwrap().count, 0);
        self.deaths += u32::from(!lived);
        lived
    }

    fn serve(&mut self, epoch: u64) -> bool {
        loop {
            let mut got = Vec::new();
            let delivered = self.shadow.deliver(epoch, self.width, 0, |_, desc| {
                got.push((desc.tag, desc.generation))
            });
            if got.is_empty() {
                assert!(!delivered.more);
                return true;
            }
            if self.info().isolated > 0 {
                assert_eq!(got.len(), 1, "one at a time");
                assert!(!self.shadow.has_deliverable() && !delivered.more);
            }
            // The process begins all requests that it has, and answers afterwards.
            if got.iter().any(|(tag, _)| self.poison.contains(tag)) {
                return false;
            }
            for (tag, generation) in got {
                let answer = Completion {
                    tag,
                    generation,
                    ..Completion::default()
                };
                let commit = answer.check().expect("well-formed");
                let _committed = self.shadow.commit(epoch, &commit);
            }
        }
    }

    fn reap(&mut self) {
        let results = &mut self.results;
        self.shadow.reap(0, usize::MAX, |tag, status| {
            results.push((tag.number(), status))
        });
    }

    fn info(&self) -> Info {
        let mut info = Info::default();
        self.shadow.describe(&mut info, 0);
        info
    }

    fn failed(&self) -> Vec<u16> {
        let failed = self.results.iter().filter(|r| r.1 == ResponseStatus::Error);
        failed.map(|r| r.0).collect()
    }

    /// Starts processes until one has nothing to do.
    fn run(&mut self, most: u32) {
        while !self.process() {
            assert!(
                self.deaths <= most,
                "{} deaths: {:?}",
                self.deaths,
                self.info()
            );
        }
    }
}

/// The request fails wherever it is among the others, and however many requests a process takes at once.
#[test]
fn after_three_deaths_the_request_fails_alone() {
    for place in 0..16 {
        for width in [1, 3, 8, 16] {
            let mut disk = Deadly::new(3, &[place], width);
            // The first process has answered something before.
            disk.post(16..17);
            assert!(disk.process());
            disk.results.clear();
            disk.post(0..16);
            disk.run(4);
            assert_eq!(disk.failed(), [place], "width {width}");
            assert_eq!(disk.results.len(), 16, "all have a result");
            let info = disk.info();
            assert_eq!((info.poisoned, info.isolated), (1, 0));
            assert_eq!(info.poison_op, u32::from(abi::OP_WRITE));
            assert_eq!(
                (info.poison_sector, info.poison_sectors),
                (8 * u64::from(place), 8)
            );
            // Three deaths, not counting a process that died of it before it had answered anything.
            let expected = if width > usize::from(place) { 4 } else { 3 };
            assert!(
                disk.deaths == 3 || disk.deaths == expected,
                "{}",
                disk.deaths
            );
        }
    }
}

/// The guest waits for only this request, and its first process has served others.
#[test]
fn a_request_that_is_the_only_one_fails_after_three_deaths() {
    let mut disk = Deadly::new(3, &[1], 8);
    disk.post(0..2);
    disk.width = 1;
    disk.run(3);
    assert_eq!((disk.deaths, disk.failed()), (3, vec![1]));
}

#[test]
fn several_fail_one_after_the_other() {
    let mut disk = Deadly::new(3, &[2, 5, 6], 16);
    disk.post(0..12);
    disk.run(20);
    let mut failed = disk.failed();
    failed.sort_unstable();
    assert_eq!(failed, [2, 5, 6]);
    assert_eq!(disk.info().poisoned, 3);
}

/// A process that dies of every request must not make any fail.
#[test]
fn nothing_fails_if_no_process_has_answered_anything() {
    let mut disk = Deadly::new(3, &[0, 1, 2, 3], 16);
    disk.post(0..4);
    for _ in 0..50 {
        assert!(!disk.process());
    }
    assert_eq!(disk.failed(), []);
    // A correct process starts, and serves all waiting requests.
    disk.poison.clear();
    disk.run(50);
    assert_eq!((disk.results.len(), disk.failed()), (4, vec![]));
}

/// A process that served well is replaced by one that dies of every request.
#[test]
fn at_most_one_fails_while_nothing_is_answered() {
    let mut disk = Deadly::new(3, &[1, 2, 3, 4, 5], 1);
    disk.post(0..6);
    for _ in 0..50 {
        assert!(!disk.process());
    }
    assert_eq!(disk.failed(), [1]);
    disk.poison.clear();
    disk.run(51);
    assert_eq!(disk.failed(), [1]);
}

#[test]
fn a_death_that_is_excused_counts_nothing() {
    let mut disk = Deadly::new(2, &[1], 1);
    disk.post(0..2);
    assert!(!disk.process());
    for _ in 0..5 {
        let epoch = disk.shadow.opened().expect("nobody has it");
        assert!(!disk.shadow.excuse(epoch + 1), "somebody else");
        assert!(disk.shadow.excuse(epoch));
        assert_eq!(disk.shadow.started(epoch).map(|failed| failed.count), Ok(0));
        assert!(!disk.shadow.excuse(epoch), "it has started");
        assert!(!disk.serve(epoch));
        disk.shadow.closed();
        assert_eq!(disk.shadow.quiet(0).unwrap().count, 0);
    }
    assert_eq!((disk.info().isolated, disk.info().poisoned), (0, 0));
    // An answer to another request proves that the next process works.
    disk.post(2..3);
    disk.run(3);
    assert_eq!(disk.failed(), [1]);
}

#[test]
fn one_that_dies_before_it_starts_counts_nothing() {
    let mut disk = Deadly::new(2, &[1], 1);
    disk.post(0..2);
    assert!(!disk.process());
    for _ in 0..5 {
        let _epoch = disk.shadow.opened().expect("nobody has it");
        disk.shadow.closed();
        assert_eq!(disk.shadow.quiet(0).unwrap().count, 0);
    }
    disk.run(2);
    assert_eq!((disk.deaths, disk.failed()), (2, vec![1]));
}

/// Requests that overlap an isolated one keep their place behind it.
#[test]
fn order_holds_while_requests_are_isolated() {
    let mut disk = Deadly::new(3, &[1], 1);
    disk.post(0..2);
    let over = request(Op::Write, 8, 8);
    assert_eq!(disk.shadow.post(DiskTag::new(9), 0, &over, 0), Ok(()));
    disk.run(3);
    let order: Vec<u16> = disk.results.iter().map(|r| r.0).collect();
    assert_eq!(order, [0, 1, 9]);
    assert_eq!(disk.failed(), [1]);
}

#[test]
fn without_a_limit_it_is_tried_for_ever() {
    let mut disk = Deadly::new(0, &[1], 1);
    disk.post(0..3);
    for _ in 0..300 {
        assert!(!disk.process());
    }
    assert_eq!((disk.failed(), disk.info().isolated), (vec![], 0));
}

/// The isolated requests of a queue are dropped with it.
#[test]
fn isolation_ends_with_its_requests() {
    let mut disk = Deadly::new(2, &[1], 8);
    disk.post(0..4);
    assert!(!disk.process());
    let epoch = disk.shadow.opened().expect("nobody has it");
    assert!(disk.shadow.started(epoch).is_ok());
    assert_eq!(disk.info().isolated, 4);
    assert_eq!(disk.shadow.withdraw(0), 4);
    assert_eq!(disk.info().isolated, 0);
    disk.post(10..14);
    let delivered = disk.shadow.deliver(epoch, 8, 0, |_, _| {});
    assert_eq!(delivered.count, 4);
}
