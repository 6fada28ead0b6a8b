// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Requests that a queue begins, their order, and the number of their parts.

use super::{extent, number, range, BackedDisk, BACKING, SHIFT, SIZE};
use crate::tap::shadow::request;
use ring::numbers::DiskTag;
use ring::response::ResponseStatus;
use ring::tap::abi;
use ring::tap::extent::{DataExtent, ExtentAccess, Source};
use ring::tap::shadow::passthrough::{RequestPart, Start, MAX_PARTS};
use ring::tap::shadow::{Op, PostedRequest};

#[test]
fn what_is_mapped_begins_at_once() {
    let mut disk = BackedDisk::mapped(8);
    disk.post(0, Op::Read, 16, 8);
    let start = Start {
        backing: Some(number(0)),
        op: abi::OP_READ,
        sectors: 8,
        segments: 1,
    };
    assert_eq!(disk.info().waiting, 1);
    let whole = RequestPart {
        sector: Some(16 + SHIFT),
        sectors: 8,
    };
    assert_eq!(disk.begin_in_parts(0), Some((start, vec![whole])));
    assert_eq!(disk.begin(0), None, "once");
    disk.post(1, Op::Write, 32, 16);
    let (write, parts) = disk.begin_in_parts(1).expect("it is mapped");
    assert_eq!((write.op, write.sectors), (abi::OP_WRITE, 16));
    assert_eq!(parts[0].sector, Some(32 + SHIFT));
    let info = disk.info();
    assert_eq!((info.waiting, info.executing, info.direct), (0, 2, 0));
    assert_eq!(
        (disk.told(), disk.tags()),
        (0, vec![]),
        "nobody else has it"
    );
    assert_eq!(
        disk.ended(1, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert_eq!(disk.ended(1, ResponseStatus::Okay), None, "it has ended");
    assert_eq!((disk.info().executing, disk.info().direct), (1, 1));
    assert_eq!(disk.reap(1), [], "its result went to the queue");
    disk.begin_write(1, 32);
}

#[test]
fn what_is_not_mapped_is_for_the_process() {
    let mut disk = BackedDisk::unmapped(16);
    disk.post(0, Op::Read, 0, 8);
    assert_eq!(disk.begin(0), None, "nothing is mapped");
    disk.set(64, 64, ExtentAccess::ReadWrite);
    disk.set(256, 64, ExtentAccess::Read);
    disk.set_zeroes(512, 64);
    let write = request(Op::Write, 64, 8);
    let fua = PostedRequest { fua: true, ..write };
    let preflush = PostedRequest {
        preflush: true,
        ..write
    };
    let requests = [
        request(Op::Read, 120, 16),
        request(Op::Write, 256, 8),
        // Not whole blocks.
        request(Op::Read, 65, 8),
        request(Op::Read, 64, 1),
        request(Op::Read, 64, 0),
        // Zeroes have no place to write to.
        request(Op::Write, 512, 8),
        request(Op::Flush, 0, 0),
    ];
    for (tag, request) in (1..).zip(&requests) {
        disk.post_as(tag, request);
        assert_eq!(disk.begin(tag), None, "{request:?}");
    }
    assert_eq!(disk.told(), 0);
    assert_eq!(
        disk.shadow.missed(),
        [0; abi::MISSES as usize],
        "nobody has them"
    );
    assert_eq!(disk.tags(), [0, 1, 2, 3, 4, 5, 6, 7]);
    // A flush goes to the process until it maps the flush, and so does an unmapped request.
    assert_eq!(disk.shadow.missed(), [1, 1, 2, 2, 0, 0, 2, 0]);
    for tag in 0..8 {
        disk.done(tag);
    }
    disk.set(256, 64, ExtentAccess::Read);
    for (tag, request) in (8..).zip(&[fua, preflush, request(Op::Discard, 72, 8)]) {
        disk.post_as(tag, request);
        assert_eq!(disk.begin(tag), None, "{request:?}");
    }
    disk.post(11, Op::Read, 256, 64);
    assert!(disk.begin(11).is_some());
    assert_eq!(disk.info().executing, 1);
}

#[test]
fn a_queue_that_cannot_gets_nothing() {
    let mut disk = BackedDisk::mapped(8);
    disk.shadow.set_able(1, false);
    disk.begin_write(0, 0);
    disk.post(1, Op::Write, 8, 8);
    assert_eq!(disk.begin(1), None);
    disk.post(3, Op::Read, 0, 8);
    assert_eq!(disk.begin(3), None);
    assert_eq!(
        disk.ended(0, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert_eq!(disk.told(), 0);
    assert_eq!(disk.resume(1), []);
    assert_eq!(disk.tags(), [1, 3]);
    assert_eq!(disk.shadow.missed()[usize::from(abi::MISS_QUEUE)], 2);
}

#[test]
fn what_waits_for_an_earlier_one_is_ready_when_that_ends() {
    let mut disk = BackedDisk::mapped(8);
    disk.occupy(7);
    disk.begin_write(0, 0);
    disk.post(1, Op::Write, 0, 16);
    assert_eq!(
        disk.begin(1),
        None,
        "one that a queue executes is in its way"
    );
    disk.post(2, Op::Read, 8, 8);
    assert_eq!(disk.begin(2), None, "one that waits is in its way");
    disk.post(4, Op::Read, 16, 8);
    assert!(disk.begin(4).is_some(), "nothing is in its way");
    assert_eq!((disk.told(), disk.tags()), (0, vec![]));
    assert!(!disk.shadow.has_deliverable());
    assert_eq!(
        disk.ended(0, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert_eq!(disk.told(), 0b10);
    assert_eq!(disk.told(), 0, "it was told");
    assert_eq!(disk.resume(0), [], "that is not its request");
    assert!(!disk.shadow.has_deliverable(), "it needs no process");
    assert_eq!(disk.resume(1), [1]);
    assert_eq!(disk.told(), 0);
    assert_eq!(
        disk.ended(1, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert_eq!(disk.told(), 0b01);
    assert_eq!(disk.resume(0), [2]);
}

#[test]
fn what_queues_execute_waits_for_each_other_only_beside_what_is_for_a_process() {
    let mut disk = BackedDisk::mapped(16);
    // As on a device without a process, a guest expects no order among requests in flight.
    for (tag, sector) in [(0, 0), (1, 0), (2, 4088)] {
        disk.begin_write(tag, sector);
    }
    disk.post(3, Op::Read, 0, 4096);
    assert!(disk.begin(3).is_some());
    disk.begin_mapped_write(4, 0);
    // While one request is for the process, each waits for all overlapping ones before it.
    disk.post(5, Op::Discard, 0, 8);
    assert_eq!((disk.told(), disk.tags()), (0, vec![]));
    disk.post(6, Op::Write, 4088, 8);
    assert_eq!(disk.begin(6), None);
    disk.post(8, Op::Read, 4088, 8);
    assert_eq!(disk.begin_mapped(8), None);
    for tag in [1, 4, 3] {
        assert_eq!(
            disk.ended(tag, ResponseStatus::Okay),
            Some(ResponseStatus::Okay)
        );
        assert_eq!((disk.told(), disk.tags()), (0, vec![]), "{tag}");
    }
    assert_eq!(
        disk.ended(0, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert_eq!((disk.told(), disk.tags()), (0, vec![5]));
    disk.begin_write(0, 64);
    disk.post(1, Op::Read, 64, 8);
    assert_eq!(disk.begin(1), None, "the process has something");
    disk.done(5);
    assert_eq!(
        disk.ended(2, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert_eq!(
        disk.ended(0, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert_eq!(disk.told(), 0b11);
    assert_eq!((disk.resume(0), disk.resume(1)), (vec![6], vec![1]));
    // Without such a request they do not wait.
    disk.begin_write(0, 4088);
}

#[test]
fn what_the_process_has_is_in_the_way() {
    let mut disk = BackedDisk::unmapped(8);
    disk.post(0, Op::Write, 0, 8);
    assert_eq!(disk.tags(), [0]);
    disk.set(0, SIZE, ExtentAccess::ReadWrite);
    disk.post(1, Op::Read, 0, 8);
    assert_eq!(disk.begin(1), None);
    assert_eq!(disk.told(), 0);
    disk.done(0);
    disk.set(0, SIZE, ExtentAccess::ReadWrite);
    assert_eq!(disk.told(), 0b10);
    assert_eq!(disk.resume(1), [1]);
}

#[test]
fn what_a_queue_executes_is_in_the_way_of_what_the_process_gets() {
    let mut disk = BackedDisk::mapped(8);
    disk.begin_write(0, 0);
    disk.post(1, Op::Discard, 0, 64);
    assert_eq!((disk.told(), disk.tags()), (0, vec![]));
    disk.post(2, Op::Read, 8, 8);
    assert_eq!(disk.begin(2), None, "the discard was before it");
    assert_eq!(
        disk.ended(0, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert!(disk.shadow.has_deliverable());
    assert_eq!(disk.tags(), [1]);
    disk.done(1);
    assert_eq!(disk.told(), 0, "the discard has changed the range");
    assert_eq!(disk.tags(), [2]);
}

/// `count` extents of 16 sectors, from the beginning of the disk on, in the opposite order in the backing.
fn scattered(count: u64) -> BackedDisk {
    let mut disk = BackedDisk::unmapped(8);
    for at in 0..count {
        let scattered = DataExtent {
            place: 16 * (count - 1 - at),
            ..extent(16 * at, 16, ExtentAccess::ReadWrite)
        };
        let generation = disk.map().generation();
        assert_eq!(disk.map().set(&scattered, generation), Ok(()));
    }
    disk
}

#[test]
fn a_request_is_executed_in_parts() {
    let part = |sector, sectors| RequestPart {
        sector: Some(sector),
        sectors,
    };
    let most = MAX_PARTS as u64;
    let mut disk = scattered(most + 1);
    disk.post(0, Op::Write, 8, 32);
    let (start, parts) = disk.begin_in_parts(0).expect("it is mapped");
    assert_eq!((start.backing, start.sectors), (Some(number(0)), 32));
    let first = 16 * most;
    let second = first - 16;
    assert_eq!(
        parts,
        [part(first + 8, 8), part(second, 16), part(second - 16, 8)]
    );
    // A request that overlaps one of them waits for all.
    disk.occupy(7);
    disk.post(2, Op::Read, 32, 8);
    assert_eq!(disk.begin(2), None);
    assert_eq!(disk.told(), 0);
    assert_eq!(
        disk.ended(0, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert_eq!((disk.told(), disk.resume(0)), (1, vec![2]));
    assert_eq!(
        disk.ended(2, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    // As many parts as are allowed, and one more.
    disk.post(4, Op::Read, 0, 16 * most);
    assert_eq!(disk.begin_in_parts(4).expect("just so").1.len(), MAX_PARTS);
    disk.post(6, Op::Read, 0, 16 * most + 8);
    assert_eq!(disk.begin(6), None);
    assert_eq!(disk.tags(), [6]);
    assert_eq!(disk.shadow.missed()[usize::from(abi::MISS_PIECES)], 1);
}

#[test]
fn all_parts_are_in_one_backing() {
    let mut disk = scattered(2);
    assert!(disk.map().add_backing(number(1), BACKING));
    let generation = disk.map().generation();
    let other = DataExtent {
        source: Source::Backing(number(1)),
        ..extent(32, 8, ExtentAccess::Read)
    };
    assert_eq!(disk.map().set(&other, generation), Ok(()));
    for (tag, (sector, sectors)) in (0..).zip([(0, 40), (16, 24)]) {
        disk.post(tag, Op::Read, sector, sectors);
        assert_eq!(disk.begin(tag), None, "{sector}, {sectors}");
    }
    assert_eq!(disk.tags(), [0, 1]);
    assert_eq!(disk.shadow.missed()[usize::from(abi::MISS_BACKINGS)], 2);
}

#[test]
fn zeroes_are_read_beside_one_backing_and_alone() {
    let mut disk = BackedDisk::unmapped(8);
    disk.set(0, 16, ExtentAccess::ReadWrite);
    disk.set_zeroes(16, 16);
    disk.set(32, 8, ExtentAccess::ReadWrite);
    let part = |sector, sectors| RequestPart { sector, sectors };
    disk.post(0, Op::Read, 8, 32);
    let (start, parts) = disk.begin_in_parts(0).expect("it is known");
    assert_eq!((start.backing, start.sectors), (Some(number(0)), 32));
    let stored = [Some(8 + SHIFT), Some(32 + SHIFT)];
    assert_eq!(
        parts,
        [part(stored[0], 8), part(None, 16), part(stored[1], 8)]
    );
    // These sectors are not whole blocks.
    disk.post(1, Op::Read, 17, 3);
    let (start, parts) = disk.begin_in_parts(1).expect("it is known");
    assert_eq!((start.backing, parts), (None, vec![part(None, 3)]));
    assert_eq!(disk.info().executing, 2);
    assert!(disk.shadow.is_executing_in(number(0)));
    assert_eq!(
        disk.ended(0, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert!(!disk.shadow.is_executing_in(number(0)));
    assert!(disk.shadow.is_executing(&range(17, 1)));
    assert_eq!(
        disk.ended(1, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert_eq!(disk.info().executing, 0);
}

#[test]
fn a_write_ends_zeroes_when_the_process_gets_it_and_when_it_answers() {
    let mut disk = BackedDisk::unmapped(8);
    disk.set_zeroes(0, 64);
    disk.post(0, Op::Write, 8, 8);
    assert_eq!(disk.begin(0), None);
    assert_eq!(disk.tags(), [0]);
    // The process looked up the range before it had the request, or before it had executed it.
    disk.set_zeroes(0, 64);
    disk.done(0);
    disk.post(1, Op::Read, 8, 8);
    assert_eq!(disk.begin(1), None);
    disk.post(3, Op::Read, 16, 8);
    assert!(disk.begin(3).is_some(), "what is beside it is as before");
}

#[test]
fn a_queue_is_told_of_all_that_it_has_not_taken() {
    let mut disk = BackedDisk::mapped(16);
    disk.begin_write(0, 0);
    for tag in [2, 4, 6] {
        disk.post(tag, Op::Read, 0, 8);
    }
    assert_eq!(disk.told(), 0);
    assert_eq!(
        disk.ended(0, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    let mut got = Vec::new();
    for left in [2, 1, 0] {
        assert_eq!(disk.told(), 1);
        let each = |tag: DiskTag, _, _: &[RequestPart]| got.push(tag.number());
        disk.shadow.resume(0, 1, each);
        assert_eq!(disk.info().waiting, left);
    }
    assert_eq!(disk.told(), 0);
    assert_eq!(got, [2, 4, 6]);
}
