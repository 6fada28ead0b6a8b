// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Requests of a queue while no process has the disk, or after another one has started.

use super::{extent, BackedDisk, SIZE};
use ring::response::ResponseStatus;
use ring::tap::abi;
use ring::tap::checked::{Claimed, Fence};
use ring::tap::extent::ExtentAccess;
use ring::tap::map::RefusedExtent;
use ring::tap::shadow::{Committed, Op};

#[test]
fn a_process_begins_with_nothing() {
    let mut disk = BackedDisk::mapped(8);
    assert_eq!(disk.map().set_flush(), Ok(()));
    let before = disk.map().generation();
    disk.begin_write(0, 0);
    disk.post(1, Op::Write, 0, 8);
    disk.die();
    disk.post(3, Op::Read, 64, 8);
    assert!(disk.begin(3).is_some(), "what the dead process said holds");
    disk.post(2, Op::Write, 128, 8);
    assert_eq!(
        disk.ended(0, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert_eq!(disk.told(), 0b11);
    disk.start();
    assert!(disk.map().is_empty());
    let all = extent(0, SIZE, ExtentAccess::ReadWrite);
    assert_eq!(disk.map().set(&all, before), Err(RefusedExtent::Stale));
    assert_eq!(disk.info().executing, 1, "what was begun goes on");
    assert_eq!((disk.resume(0), disk.resume(1)), (vec![], vec![]));
    assert_eq!(disk.tags(), [2, 1]);
    disk.post(4, Op::Flush, 0, 0);
    assert_eq!(disk.begin(4), None);
    assert_eq!(disk.tags(), [4]);
    assert_eq!(
        disk.ended(3, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
}

#[test]
fn a_process_that_starts_again_begins_with_nothing() {
    let mut disk = BackedDisk::mapped(8);
    assert!(disk.shadow.claim(disk.epoch, Claimed::BEFORE));
    disk.begin_write(0, 0);
    assert!(disk.shadow.started(disk.epoch).is_ok());
    assert!(disk.map().is_empty());
}

#[test]
fn the_order_outlives_the_process() {
    let mut disk = BackedDisk::mapped(16);
    // One request of each kind: direct, delivered, and waiting for either.
    disk.begin_write(0, 0);
    disk.post(2, Op::Discard, 64, 64);
    assert_eq!(disk.tags(), [2]);
    disk.set(64, 64, ExtentAccess::ReadWrite);
    disk.post(1, Op::Write, 0, 16);
    disk.post(3, Op::Write, 64, 8);
    disk.post(5, Op::Read, 8, 8);
    assert_eq!(disk.told(), 0);
    disk.shadow.closed();
    disk.begin_write(4, 256);
    assert_eq!(disk.shadow.quiet(0).unwrap().count, 0);
    assert_eq!(disk.info().executing, 2);
    assert_eq!(disk.told(), 0, "all of it is still in the way");
    assert_eq!(
        disk.ended(0, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert_eq!(disk.ended(0, ResponseStatus::Okay), None);
    assert_eq!(disk.told(), 0b10);
    assert_eq!(disk.resume(1), [1]);
    disk.start();
    let descs = disk.descs();
    let seen: Vec<_> = descs.iter().map(|d| (d.tag, d.flags)).collect();
    assert_eq!(seen, [(2, abi::DESC_REPLAY)]);
    assert_eq!(
        disk.ended(1, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert_eq!(
        disk.ended(4, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert_eq!(disk.tags(), [5]);
    assert_eq!(disk.commit(2, 2, 0), Committed::Done(0));
    assert_eq!(disk.tags(), [3]);
    let info = disk.info();
    assert_eq!((info.waiting, info.delivered, info.executing), (0, 2, 0));
    assert_eq!(info.direct, 3);
}

#[test]
fn a_transfer_that_fails_while_nobody_serves_waits_for_the_next_process() {
    let mut disk = BackedDisk::mapped(8);
    disk.begin_write(0, 0);
    disk.die();
    assert_eq!(disk.info().state, abi::STATE_RECOVERING);
    assert_eq!(disk.ended(0, ResponseStatus::Error), None);
    disk.post(1, Op::Read, 0, 8);
    assert_eq!(disk.told(), 0);
    assert_eq!(disk.resume(0), []);
    disk.start();
    assert_eq!(disk.tags(), [0]);
    disk.done(0);
    assert_eq!(disk.tags(), [1]);
}

#[test]
fn what_is_ready_is_ready_after_a_death() {
    let mut disk = BackedDisk::mapped(8);
    disk.begin_write(0, 0);
    disk.post(1, Op::Read, 0, 8);
    disk.post(3, Op::Read, 0, 8);
    assert_eq!(
        disk.ended(0, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert_eq!(disk.told(), 0b10);
    // The queue is about to resume the request.
    disk.die();
    assert_eq!(disk.resume(1), [1, 3]);
    assert_eq!(disk.shadow.state(), abi::STATE_RECOVERING);
}

#[test]
fn what_failed_for_a_lost_process_sets_free_what_waits() {
    let mut disk = BackedDisk::mapped(8);
    let claimed = Claimed {
        fence: Fence::None,
        ..Claimed::BEFORE
    };
    assert!(disk.shadow.claim(disk.epoch, claimed));
    disk.set(0, SIZE, ExtentAccess::ReadWrite);
    // A write that is not whole blocks.
    disk.post(0, Op::Write, 1, 1);
    assert_eq!(disk.tags(), [0]);
    disk.post(1, Op::Read, 0, 8);
    assert_eq!((disk.begin(1), disk.told()), (None, 0));
    disk.shadow.closed();
    let failed = disk.shadow.quiet(0).expect("it is over");
    assert_eq!((failed.count, failed.queues), (1, 0b01));
    assert_eq!(disk.told(), 0b10);
    assert_eq!(disk.resume(1), [1]);
}

#[test]
fn what_needs_no_process_does_not_fail_for_want_of_one() {
    let mut disk = BackedDisk::mapped(16);
    disk.recall(64, 64);
    disk.begin_write(0, 0);
    disk.begin_write(2, 8);
    disk.post(1, Op::Write, 8, 8);
    // A request that is not mapped, and one that waits for it.
    disk.post(3, Op::Write, 64, 8);
    disk.post(4, Op::Read, 56, 16);
    // One that waits for a direct request, and one that waits for that.
    disk.post(6, Op::Write, 0, 8);
    disk.post(8, Op::Read, 0, 8);
    assert_eq!(
        disk.ended(2, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert_eq!(disk.told(), 0b10);
    disk.die();
    assert_eq!(disk.told(), 0b10);
    let failed = disk.shadow.fail_waiting(usize::MAX);
    assert_eq!((failed.count, failed.queues), (2, 0b11));
    assert_eq!(disk.reap(1), [(3, ResponseStatus::Error)]);
    assert_eq!(disk.reap(0), [(4, ResponseStatus::Error)]);
    assert_eq!(disk.info().executing, 1);
    assert_eq!(disk.resume(1), [1]);
    assert_eq!(
        disk.ended(0, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert_eq!(disk.told(), 0b01);
    assert_eq!(disk.resume(0), [6]);
    // It waits for a process once it needs one.
    assert_eq!(disk.ended(6, ResponseStatus::Error), None);
    // Its waiter no longer waits for a queue, and waits for a process instead.
    assert_eq!(disk.told(), 0b01);
    assert_eq!(disk.shadow.fail_waiting(usize::MAX).count, 0);
    assert_eq!(disk.resume(0), [8]);
    assert_eq!(
        disk.ended(8, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert_eq!(disk.told(), 0);
    let failed = disk.shadow.fail_waiting(usize::MAX);
    assert_eq!((failed.count, failed.more), (1, false));
    assert_eq!(disk.reap(0), [(6, ResponseStatus::Error)]);
}

#[test]
fn what_waits_for_a_process_that_is_gone_fails_for_want_of_one() {
    let mut disk = BackedDisk::mapped(8);
    disk.post(0, Op::Discard, 0, 64);
    assert_eq!(disk.tags(), [0]);
    disk.set(0, 64, ExtentAccess::ReadWrite);
    disk.post(1, Op::Read, 0, 8);
    assert_eq!(disk.told(), 0);
    disk.shadow.closed();
    assert_eq!(disk.shadow.fail_waiting(usize::MAX).count, 1);
    assert_eq!(disk.reap(1), [(1, ResponseStatus::Error)]);
}

#[test]
fn a_queue_that_closes_fails_what_it_has_not_begun() {
    let mut disk = BackedDisk::mapped(8);
    disk.begin_write(0, 0);
    disk.begin_write(1, 64);
    disk.post(2, Op::Write, 64, 8);
    disk.post(3, Op::Read, 64, 8);
    disk.post(4, Op::Read, 0, 8);
    assert_eq!(
        disk.ended(1, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert_eq!(disk.told(), 0b01);
    assert_eq!(disk.shadow.withdraw(0), 2);
    assert_eq!(
        disk.reap(0),
        [(2, ResponseStatus::Error), (4, ResponseStatus::Error)]
    );
    assert_eq!(disk.resume(0), []);
    assert_eq!(disk.told(), 0b10, "the write was in the way of its read");
    assert_eq!(disk.resume(1), [3]);
    assert_eq!(
        disk.ended(0, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
}

#[test]
fn a_queue_that_is_gone_has_nothing_ready() {
    let mut disk = BackedDisk::mapped(8);
    disk.begin_write(0, 0);
    disk.post(2, Op::Write, 0, 8);
    disk.post(3, Op::Read, 0, 8);
    assert_eq!(
        disk.ended(0, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert_eq!(disk.told(), 0b01);
    disk.shadow.set_able(0, false);
    assert_eq!(disk.shadow.orphan(0), 0);
    assert_eq!(disk.told(), 0b10);
    assert_eq!(disk.resume(1), [3]);
    assert_eq!(disk.info().waiting, 0);
    // The next connection uses the tags from 0 on.
    disk.shadow.set_able(0, true);
    disk.begin_write(2, 64);
    assert_eq!(disk.resume(0), []);
}
