// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Requests that a queue was to execute and that the process executes, because they were recalled, failed, or returned.

use super::{extent, number, BackedDisk, BACKING, SIZE};
use ring::response::ResponseStatus;
use ring::tap::abi;
use ring::tap::extent::{DataExtent, ExtentAccess, Sectors};
use ring::tap::map::RefusedExtent;
use ring::tap::shadow::{Committed, Op};

#[test]
fn what_is_recalled_before_it_was_begun_is_for_the_process() {
    let mut disk = BackedDisk::mapped(8);
    disk.begin_write(0, 0);
    disk.post(1, Op::Write, 0, 8);
    disk.post(3, Op::Read, 0, 8);
    assert_eq!(
        disk.ended(0, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert_eq!(disk.told(), 0b10);
    disk.recall(0, 8);
    assert_eq!(disk.resume(1), []);
    assert!(disk.shadow.has_deliverable());
    assert_eq!(disk.tags(), [1]);
    // Recall the last mapping: no later call sorts.
    disk.done(1);
    disk.reap(1);
    disk.begin_write(5, 64);
    disk.post(7, Op::Write, 64, 8);
    assert_eq!(
        disk.ended(5, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert_eq!(disk.told(), 0b10);
    disk.map().recall(&Sectors::ALL);
    assert_eq!(disk.resume(1), []);
    assert_eq!(disk.tags(), [3, 7]);
}

#[test]
fn what_failed_is_executed_again_by_the_process() {
    for (op, status) in [
        (Op::Write, ResponseStatus::Error),
        (Op::Read, ResponseStatus::NotSupported),
    ] {
        let mut disk = BackedDisk::mapped(8);
        disk.post(0, op, 0, 8);
        assert!(disk.begin(0).is_some());
        disk.post(1, Op::Write, 0, 8);
        assert_eq!(disk.told(), 0, "it is in the way");
        assert_eq!(disk.ended(0, status), None);
        assert_eq!((disk.info().executing, disk.info().direct), (0, 0));
        // It arrives anew, behind the requests that waited for it.
        assert_eq!((disk.told(), disk.tags()), (0b10, vec![]));
        assert_eq!(disk.resume(1), [1]);
        assert_eq!(disk.tags(), []);
        assert_eq!(
            disk.ended(1, ResponseStatus::Okay),
            Some(ResponseStatus::Okay)
        );
        assert_eq!(disk.told(), 0, "it is not tried again");
        let descs = disk.descs();
        let [desc] = descs.as_slice() else {
            panic!("{descs:?}");
        };
        assert_eq!((desc.tag, desc.flags), (0, abi::DESC_REPLAY));
        assert_eq!((desc.generation, desc.deliveries), (1, 1));
        disk.done(0);
        assert_eq!(disk.reap(0), [(0, ResponseStatus::Okay)]);
        assert_eq!((disk.info().waiting, disk.info().executing), (0, 0));
    }
}

/// The process may move the data of a write that it gets, so no queue may write there at the same time.
#[test]
fn what_failed_waits_for_all_that_is_executed_where_it_is() {
    let mut disk = BackedDisk::mapped(8);
    disk.begin_write(0, 0);
    disk.begin_write(1, 0);
    disk.begin_mapped_write(2, 0);
    disk.begin_write(3, 64);
    assert_eq!(disk.ended(0, ResponseStatus::Error), None);
    disk.post(4, Op::Write, 0, 8);
    assert_eq!(disk.begin(4), None, "it came after it");
    for tag in [1, 2] {
        assert_eq!((disk.told(), disk.tags()), (0, vec![]), "{tag}");
        assert_eq!(
            disk.ended(tag, ResponseStatus::Okay),
            Some(ResponseStatus::Okay)
        );
    }
    assert_eq!((disk.told(), disk.tags()), (0, vec![0]));
    disk.done(0);
    assert_eq!(disk.told(), 0b01);
    assert_eq!(disk.resume(0), [4]);
}

#[test]
fn flushes_wait_for_what_failed() {
    let mut disk = BackedDisk::mapped(8);
    assert_eq!(disk.map().set_flush(), Ok(()));
    disk.begin_write(0, 0);
    assert_eq!(disk.ended(0, ResponseStatus::Error), None);
    disk.post(1, Op::Flush, 0, 0);
    assert_eq!(
        disk.begin(1),
        None,
        "it may be of a write that is executed again"
    );
    assert_eq!(disk.tags(), [0]);
    disk.done(0);
    assert_eq!(disk.told(), 0b10);
    assert_eq!(disk.resume(1), [1]);
    disk.post(2, Op::Flush, 0, 0);
    assert!(
        disk.begin(2).is_some(),
        "nothing is executed again any more"
    );
}

#[test]
fn a_flush_is_one_of_the_only_backing_if_the_process_says_so() {
    let mut disk = BackedDisk::mapped(8);
    disk.post(0, Op::Flush, 0, 0);
    assert_eq!(disk.begin(0), None);
    assert_eq!(disk.tags(), [0]);
    assert_eq!(disk.map().set_flush(), Ok(()));
    disk.post(1, Op::Flush, 0, 0);
    let start = disk.begin(1).expect("now it is");
    assert_eq!((start.op, start.backing), (abi::OP_FLUSH, Some(number(0))));
    assert_eq!(
        disk.ended(1, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    // This holds also if nothing else is mapped.
    disk.recall(0, SIZE);
    disk.post(1, Op::Flush, 0, 0);
    assert!(disk.begin(1).is_some());
    // A retried flush could succeed over lost data.
    assert_eq!(
        disk.ended(1, ResponseStatus::Error),
        Some(ResponseStatus::Error)
    );
    assert_eq!((disk.info().executing, disk.info().waiting), (0, 0));
    assert!(disk.map().add_backing(number(1), BACKING));
    disk.post(1, Op::Flush, 0, 0);
    assert_eq!(disk.begin(1), None, "there are two");
    assert_eq!(disk.map().set_flush(), Err(RefusedExtent::NoBacking));
    assert!(disk.map().remove_backing(number(1)));
    disk.post(2, Op::Flush, 0, 0);
    assert_eq!(disk.begin(2), None, "all was taken back");
    assert_eq!(disk.tags(), [1, 2]);
}

#[test]
fn a_delivered_write_takes_back_what_may_only_be_read_of_its_range() {
    let mut disk = BackedDisk::unmapped(8);
    disk.set(0, 64, ExtentAccess::Read);
    disk.post(0, Op::Write, 8, 8);
    assert_eq!(disk.begin(0), None);
    assert_eq!(disk.tags(), [0]);
    let extents: Vec<DataExtent> = disk.map().extents().copied().collect();
    let rest = [
        extent(0, 8, ExtentAccess::Read),
        extent(16, 48, ExtentAccess::Read),
    ];
    assert_eq!(extents, rest);
    let between = disk.map().generation();
    // The process looks up the range while it executes the write.
    let old = extent(8, 8, ExtentAccess::Read);
    assert_eq!(disk.map().set(&old, between), Ok(()));
    disk.done(0);
    let extents: Vec<DataExtent> = disk.map().extents().copied().collect();
    assert_eq!(extents, rest, "at the answer again");
    assert_eq!(disk.map().set(&old, between), Err(RefusedExtent::Stale));
    disk.set(8, 8, ExtentAccess::Read);
    // Writable extents stay mapped; the process executes this write because it is not whole blocks.
    disk.set(128, 64, ExtentAccess::ReadWrite);
    disk.post(1, Op::Write, 129, 1);
    assert_eq!(disk.begin(1), None);
    assert_eq!(disk.tags(), [1]);
    disk.done(1);
    disk.post(2, Op::Read, 128, 8);
    assert!(disk.begin(2).is_some());
}

#[test]
fn a_delivered_discard_takes_back_its_range() {
    for op in [Op::Discard, Op::WriteZeroes, Op::SecureDiscard] {
        let mut disk = BackedDisk::mapped(8);
        let before = disk.map().generation();
        disk.post(0, op, 64, 64);
        assert_eq!(disk.begin(0), None);
        assert_eq!(disk.map().extents().count(), 1, "nobody has it yet");
        assert_eq!(disk.tags(), [0]);
        assert_eq!(disk.map().extents().count(), 2, "{op:?}");
        let between = disk.map().generation();
        let old = extent(64, 64, ExtentAccess::ReadWrite);
        assert_eq!(disk.map().set(&old, before), Err(RefusedExtent::Stale));
        assert_eq!(disk.map().set(&old, between), Ok(()));
        disk.done(0);
        assert_eq!(disk.map().extents().count(), 2, "at the answer again");
        assert_eq!(disk.map().set(&old, between), Err(RefusedExtent::Stale));
    }
}

#[test]
fn a_change_that_has_no_queue_any_more_is_one_all_the_same() {
    let mut disk = BackedDisk::mapped(8);
    disk.post(0, Op::Discard, 64, 64);
    assert_eq!(disk.tags(), [0]);
    let between = disk.map().generation();
    assert_eq!(disk.shadow.orphan(0), 1);
    assert_eq!(disk.commit(0, 1, 0), Committed::Released);
    let old = extent(64, 64, ExtentAccess::ReadWrite);
    assert_eq!(disk.map().set(&old, between), Err(RefusedExtent::Stale));
}

/// A process looks up a range, discards it, and dies. No process executes the discard again, but its lookup is stale.
#[test]
fn a_discard_that_nobody_answers_takes_back_its_range_too() {
    let ends: [fn(&mut BackedDisk); 3] = [
        |disk| {
            disk.shadow.withdraw(0);
        },
        |disk| {
            assert_eq!(disk.shadow.fail_waiting(8).count, 1);
        },
        // Its queue is gone first.
        |_| (),
    ];
    for (number, end) in ends.into_iter().enumerate() {
        let mut disk = BackedDisk::mapped(8);
        disk.post(0, Op::Discard, 64, 64);
        assert_eq!(disk.tags(), [0]);
        let between = disk.map().generation();
        let old = extent(64, 64, ExtentAccess::ReadWrite);
        assert_eq!(disk.map().set(&old, between), Ok(()));
        if number == 2 {
            assert_eq!(disk.shadow.orphan(0), 1);
        }
        disk.die();
        end(&mut disk);
        let range = Sectors::new(64, 64).unwrap();
        let left = disk
            .map()
            .extents()
            .filter(|e| e.range.common(&range).is_some());
        assert_eq!(left.count(), 0, "{number}");
        assert_eq!(disk.map().set(&old, between), Err(RefusedExtent::Stale));
    }
}

#[test]
fn what_the_process_gives_back_is_delivered_again() {
    let mut disk = BackedDisk::unmapped(8);
    disk.post(0, Op::Write, 0, 8);
    assert_eq!(disk.tags(), [0]);
    let returned = disk.commit(0, 1, abi::COMPLETION_RETURNED);
    assert_eq!(returned, Committed::Returned);
    disk.set(0, SIZE, ExtentAccess::ReadWrite);
    assert_eq!(disk.told(), 0, "a process had it");
    assert_eq!(disk.tags(), [0]);
}
