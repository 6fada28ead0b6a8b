// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! State that is kept about requests that a queue executes, and bounds of the work of one call.

use super::{extent, number, range, BackedDisk, BACKING, SIZE};
use crate::tap::shadow::request;
use ring::numbers::DiskTag;
use ring::response::ResponseStatus;
use ring::tap::abi;
use ring::tap::extent::{DataExtent, ExtentAccess, Sectors, Source};
use ring::tap::shadow::passthrough::RequestPart;
use ring::tap::shadow::{Committed, Op, STEPS};

#[test]
fn what_is_executed_is_known_by_range() {
    let mut disk = BackedDisk::mapped(8);
    assert!(!disk.shadow.is_executing(&Sectors::ALL));
    disk.begin_write(0, 64);
    disk.post(1, Op::Write, 64, 64);
    assert!(disk.shadow.is_executing(&range(71, 1)));
    assert!(disk.shadow.is_executing(&range(0, 65)));
    assert!(!disk.shadow.is_executing(&range(0, 64)));
    assert!(!disk.shadow.is_executing(&range(72, 8)), "it only waits");
    disk.recall(0, SIZE);
    assert!(disk.shadow.is_executing(&Sectors::ALL), "it goes on");
    assert_eq!(
        disk.ended(0, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert!(!disk.shadow.is_executing(&Sectors::ALL));
    assert_eq!(disk.resume(1), []);
    assert_eq!(disk.tags(), [1]);
    assert!(
        !disk.shadow.is_executing(&Sectors::ALL),
        "the process does that"
    );
}

#[test]
fn a_flush_is_executed_until_everything_is_recalled() {
    let mut disk = BackedDisk::mapped(8);
    assert_eq!(disk.map().set_flush(), Ok(()));
    disk.post(0, Op::Flush, 0, 0);
    assert!(disk.begin(0).is_some());
    assert!(disk.shadow.is_executing_in(number(0)));
    // A guest could keep a flush executing at any time, so that a recall of a range would wait for ever.
    assert!(!disk.shadow.is_executing(&range(0, SIZE)));
    assert!(disk.shadow.is_executing(&Sectors::ALL));
    disk.map().recall(&Sectors::ALL);
    disk.post(1, Op::Flush, 0, 0);
    assert_eq!(disk.begin(1), None);
    assert_eq!(
        disk.ended(0, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert!(!disk.shadow.is_executing(&Sectors::ALL));
}

#[test]
fn what_is_executed_is_known_by_backing() {
    let mut disk = BackedDisk::mapped(8);
    assert!(disk.map().add_backing(number(1), BACKING));
    disk.recall(64, 64);
    let generation = disk.map().generation();
    let other = DataExtent {
        source: Source::Backing(number(1)),
        ..extent(64, 64, ExtentAccess::ReadWrite)
    };
    assert_eq!(disk.map().set(&other, generation), Ok(()));
    disk.begin_write(0, 64);
    disk.post(1, Op::Read, 80, 8);
    let start = disk.begin(1).expect("it is mapped");
    assert_eq!(start.backing, Some(number(1)));
    assert!(disk.shadow.is_executing_in(number(1)) && !disk.shadow.is_executing_in(number(0)));
    disk.begin_write(2, 0);
    assert!(disk.shadow.is_executing_in(number(0)));
    assert!(disk.map().remove_backing(number(1)));
    assert_eq!(
        disk.ended(0, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert!(disk.shadow.is_executing_in(number(1)));
    assert_eq!(disk.ended(1, ResponseStatus::Error), None);
    assert!(!disk.shadow.is_executing_in(number(1)));
    assert_eq!(
        disk.ended(2, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert!(!disk.shadow.is_executing_in(number(0)) && disk.shadow.executing() == 0);
}

#[test]
fn nothing_else_that_is_said_of_a_direct_request_counts() {
    let mut disk = BackedDisk::mapped(8);
    disk.post(0, Op::Discard, 64, 8);
    assert_eq!(disk.tags(), [0]);
    disk.done(0);
    disk.reap(0);
    disk.begin_write(0, 0);
    assert_eq!(disk.commit(0, 1, 0), Committed::Refused);
    assert_eq!(
        disk.commit(0, 1, abi::COMPLETION_RETURNED),
        Committed::Refused
    );
    disk.post(2, Op::Discard, 128, 8);
    assert_eq!(disk.tags(), [2]);
    assert_eq!(
        disk.ended(2, ResponseStatus::Okay),
        None,
        "the process has it"
    );
    assert_eq!(disk.ended(4, ResponseStatus::Okay), None, "there is none");
    assert_eq!(disk.ended(999, ResponseStatus::Okay), None);
    assert_eq!(disk.info().executing, 1);
    disk.done(2);
}

/// Posts more requests than one call sorts, before anything is mapped.
fn many(tags: u16, queue_of: impl Fn(u16) -> u16) -> BackedDisk {
    let mut disk = BackedDisk::unmapped(usize::from(tags));
    for tag in 0..tags {
        let read = request(Op::Read, 8 * u64::from(tag), 8);
        let posted = disk.shadow.post(DiskTag::new(tag), queue_of(tag), &read, 0);
        assert_eq!(posted, Ok(()));
        assert_eq!(disk.begin(tag), None);
    }
    disk.shadow.closed();
    assert_eq!(disk.shadow.quiet(0).unwrap().count, 0);
    disk.set(0, SIZE, ExtentAccess::ReadWrite);
    disk
}

#[test]
fn very_many_are_sorted_by_and_by() {
    let count = (STEPS + STEPS / 2) as u16;
    let mut disk = many(count, |_| 0);
    let mut got = Vec::new();
    let mut calls = 0;
    while disk.told() == 1 {
        calls += 1;
        let each = |tag: DiskTag, _, _: &[RequestPart]| got.push(tag.number());
        disk.shadow.resume(0, usize::MAX, each);
    }
    assert_eq!(got, Vec::from_iter(0..count));
    assert!(calls > 0 && calls <= 2, "{calls}");
    let mut disk = many(count, |_| 0);
    disk.shadow.sort();
    let mut some = 0;
    let each = |_, _, _: &[RequestPart]| some += 1;
    disk.shadow.resume(0, usize::MAX, each);
    assert_eq!(some, count, "the queue sorts as well");
}

#[test]
fn who_sorts_the_rest_is_a_queue_that_can() {
    // The first ones belong to a queue that executes nothing.
    let most = STEPS as u16 + 8;
    let mut disk = many(most + 1, |tag| u16::from(tag < most));
    disk.shadow.set_able(1, false);
    assert_eq!(disk.told(), 0b01);
    assert_eq!(disk.resume(0), [most]);
    assert_eq!(disk.info().waiting, u32::from(most));
}
