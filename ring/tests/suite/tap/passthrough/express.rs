// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Express: the offer, what withdraws it, and what waits until a queue has given it up.

use super::{extent, number, range, BackedDisk, SHIFT, SIZE};
use ring::response::ResponseStatus;
use ring::tap::extent::{ExpressExtent, ExtentAccess, Sectors};
use ring::tap::shadow::express::STREAK;
use ring::tap::shadow::Op;

impl BackedDisk {
    /// Returns a disk, all of which is mapped, on which one request in a row is enough.
    fn for_express() -> Self {
        let mut disk = Self::mapped(8);
        disk.shadow.set_express_streak(1);
        assert_eq!(disk.shadow.take_withdrawn(), 0, "no queue has it yet");
        disk
    }

    /// A queue executes a write of the first sectors, and gets express.
    #[track_caller]
    fn enter(&mut self, queue: u16) -> ExpressExtent {
        self.pass(queue);
        self.shadow
            .offer_express(queue)
            .expect("nothing is in its way")
    }

    /// A queue executes a write with the shadow.
    #[track_caller]
    fn pass(&mut self, queue: u16) {
        self.begin_write(queue, 0);
        let ended = self.ended(queue, ResponseStatus::Okay);
        assert_eq!(ended, Some(ResponseStatus::Okay));
    }
}

#[test]
fn a_queue_gets_express_after_many_requests_without_a_process() {
    let mut disk = BackedDisk::mapped(8);
    assert_eq!(disk.shadow.take_withdrawn(), 0);
    for _ in 1..STREAK {
        disk.pass(0);
        assert_eq!(disk.shadow.offer_express(0), None);
    }
    disk.pass(0);
    let extent = disk.shadow.offer_express(0).expect("these are enough");
    assert_eq!(extent.backing(), number(0));
    assert_eq!(
        extent.place_of(8, 8, ExtentAccess::ReadWrite),
        Some(8 + SHIFT)
    );
    assert!(disk.shadow.has_express());
    assert_eq!(disk.shadow.offer_express(0), None, "it has it");
    assert!(disk.shadow.offer_express(1).is_some(), "so may the other");
    disk.shadow.set_able(1, false);
    disk.shadow.gave_up_express(1);
    assert_eq!(disk.shadow.offer_express(1), None, "it executes nothing");
}

#[test]
fn a_request_for_the_process_begins_the_count_anew() {
    let mut disk = BackedDisk::mapped(8);
    disk.shadow.set_express_streak(2);
    disk.pass(0);
    disk.occupy(3);
    disk.done(3);
    assert_eq!(disk.reap(1).len(), 1);
    assert_eq!(disk.shadow.take_withdrawn(), 0, "no queue has it");
    disk.pass(0);
    assert_eq!(disk.shadow.offer_express(0), None);
    disk.pass(0);
    assert!(disk.shadow.offer_express(0).is_some());
}

#[test]
fn nothing_is_offered_while_a_request_waits_or_a_process_has_one() {
    let mut disk = BackedDisk::for_express();
    disk.pass(0);
    disk.post(3, Op::Discard, SIZE - 8, 8);
    assert_eq!(disk.shadow.offer_express(0), None, "one waits");
    disk.shadow.sort();
    assert_eq!(disk.tags(), [3]);
    disk.pass(0);
    assert_eq!(disk.shadow.offer_express(0), None, "the process has one");
}

#[test]
fn zeroes_are_not_offered() {
    let mut disk = BackedDisk::unmapped(8);
    disk.shadow.set_express_streak(1);
    disk.set_zeroes(0, 64);
    assert_eq!(disk.shadow.take_withdrawn(), 0);
    disk.post(0, Op::Read, 0, 8);
    assert!(disk.begin(0).is_some());
    assert_eq!(disk.shadow.offer_express(0), None);
}

#[test]
fn a_waiting_request_is_delivered_when_the_queues_have_given_up() {
    let mut disk = BackedDisk::for_express();
    disk.enter(0);
    disk.enter(1);
    disk.post(3, Op::Discard, SIZE - 8, 8);
    assert_eq!(disk.shadow.take_withdrawn(), 0b11);
    assert_eq!(disk.shadow.take_withdrawn(), 0, "both were told");
    disk.shadow.sort();
    assert!(!disk.shadow.has_deliverable());
    assert_eq!(disk.tags(), []);
    disk.shadow.gave_up_express(0);
    assert_eq!(disk.tags(), [], "the other has it still");
    assert_eq!(
        disk.shadow.offer_express(0),
        None,
        "not before all have left"
    );
    disk.shadow.gave_up_express(1);
    assert!(disk.shadow.has_deliverable());
    assert_eq!(disk.tags(), [3]);
}

#[test]
fn a_request_that_a_queue_executes_withdraws_nothing() {
    let mut disk = BackedDisk::for_express();
    disk.enter(0);
    disk.pass(1);
    assert_eq!(disk.shadow.take_withdrawn(), 0);
    // A request in mapped pages that fails is given back, and its second try is one for the shadow.
    disk.begin_mapped_write(2, 8);
    assert_eq!(disk.ended(2, ResponseStatus::Error), None);
    assert_eq!(disk.shadow.take_withdrawn(), 0);
    disk.begin_write(2, 8);
    assert_eq!(
        disk.ended(2, ResponseStatus::Error),
        None,
        "the process gets it"
    );
    assert_eq!(disk.shadow.take_withdrawn(), 0b1);
}

#[test]
fn a_recall_of_any_range_waits_for_express() {
    let mut disk = BackedDisk::for_express();
    disk.enter(0);
    let (elsewhere, other) = (range(SIZE - 8, 8), number(1));
    assert!(disk.shadow.is_executing(&elsewhere));
    assert!(
        disk.shadow.is_executing_in(other),
        "the shadow does not know where"
    );
    disk.recall(SIZE - 8, 8);
    assert_eq!(disk.shadow.take_withdrawn(), 0b1);
    assert!(disk.shadow.is_executing(&Sectors::ALL));
    disk.shadow.gave_up_express(0);
    assert!(!disk.shadow.is_executing(&Sectors::ALL));
    assert!(!disk.shadow.is_executing_in(number(0)));
}

#[test]
fn every_change_of_the_map_withdraws_express() {
    let changes: [fn(&mut BackedDisk); 5] = [
        |disk| disk.recall(0, 8),
        |disk| disk.set(SIZE - 8, 8, ExtentAccess::ReadWrite),
        |disk| disk.map().resize(SIZE / 2),
        |disk| assert!(disk.map().remove_backing(number(0))),
        |disk| {
            disk.die();
            disk.start();
        },
    ];
    for (at, change) in changes.into_iter().enumerate() {
        let mut disk = BackedDisk::for_express();
        disk.enter(0);
        change(&mut disk);
        assert_eq!(disk.shadow.offer_express(1), None, "change {at}");
        assert_eq!(disk.shadow.take_withdrawn(), 0b1, "change {at}");
    }
}

#[test]
fn a_queue_that_gave_express_up_counts_anew() {
    let mut disk = BackedDisk::mapped(8);
    disk.shadow.set_express_streak(2);
    assert_eq!(disk.shadow.take_withdrawn(), 0);
    disk.pass(0);
    disk.pass(0);
    assert!(disk.shadow.offer_express(0).is_some());
    disk.recall(SIZE - 8, 8);
    assert_eq!(disk.shadow.take_withdrawn(), 0b1);
    disk.shadow.gave_up_express(0);
    // So a process that waits for that finds no queue in express again before it runs.
    disk.pass(0);
    assert_eq!(disk.shadow.offer_express(0), None);
    disk.pass(0);
    assert!(disk.shadow.offer_express(0).is_some());
}

#[test]
fn a_look_at_the_map_withdraws_nothing() {
    let mut disk = BackedDisk::for_express();
    disk.enter(0);
    let map = disk.shadow.map_seen().as_ref().expect("it has one");
    assert!(map.has_backing(number(0)));
    assert_eq!(disk.shadow.take_withdrawn(), 0);
}

#[test]
fn a_process_that_dies_withdraws_nothing_and_the_next_one_does() {
    let mut disk = BackedDisk::for_express();
    disk.enter(0);
    disk.die();
    assert_eq!(disk.shadow.take_withdrawn(), 0, "the map stays");
    disk.start();
    assert_eq!(disk.shadow.take_withdrawn(), 0b1);
}

#[test]
fn requests_of_express_are_counted_like_others() {
    let mut disk = BackedDisk::for_express();
    disk.pass(0);
    disk.shadow.count_express(41);
    assert_eq!(disk.info().direct, 42);
}

#[test]
fn an_extent_has_whole_blocks_inside_of_it() {
    let mut disk = BackedDisk::unmapped(8);
    disk.shadow.set_express_streak(1);
    let generation = disk.map().generation();
    let read_only = extent(64, 64, ExtentAccess::Read);
    assert_eq!(disk.map().set(&read_only, generation), Ok(()));
    assert_eq!(disk.shadow.take_withdrawn(), 0);
    disk.post(0, Op::Read, 64, 8);
    assert!(disk.begin(0).is_some());
    let express = disk.shadow.offer_express(0).expect("nothing is in its way");
    let read = |sector, sectors| express.place_of(sector, sectors, ExtentAccess::Read);
    assert_eq!(read(64, 64), Some(64 + SHIFT));
    assert_eq!(read(120, 8), Some(120 + SHIFT));
    for (sector, sectors) in [(56, 8), (64, 72), (120, 16), (128, 8), (68, 8), (64, 4)] {
        assert_eq!(read(sector, sectors), None, "{sector}, {sectors}");
    }
    assert_eq!(read(64, 0), None, "nothing is no range");
    assert_eq!(read(u64::MAX - 7, 16), None, "beyond the last number");
    let write = express.place_of(64, 8, ExtentAccess::ReadWrite);
    assert_eq!(write, None, "it may only be read");
}
