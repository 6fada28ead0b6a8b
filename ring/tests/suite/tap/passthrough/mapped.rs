// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Requests whose data is in mapped pages of the guest: begun at once or not at all, and never given to a process.

use super::{extent, number, range, BackedDisk, SHIFT, SIZE};
use crate::tap::shadow::request;
use ring::numbers::DiskTag;
use ring::response::ResponseStatus;
use ring::tap::abi;
use ring::tap::extent::{ExtentAccess, Sectors};
use ring::tap::shadow::passthrough::{RequestPart, RequestParts, Start};
use ring::tap::shadow::{Committed, Op, PostedRequest, Shadow};
use ring::tap::table::TagEntry;

/// Posts a request and begins it with mapped data, which fails: the shadow must forget it.
#[track_caller]
fn is_taken_back(disk: &mut BackedDisk, tag: u16, request: &PostedRequest) {
    let before = disk.info();
    let missed = disk.shadow.missed();
    disk.post_as(tag, request);
    assert_eq!(disk.begin_mapped(tag), None, "{request:?}");
    assert!(!disk.is_mapped(tag), "{request:?}");
    assert_eq!(disk.info(), before, "{request:?}");
    assert_eq!(disk.told(), 0, "{request:?}");
    assert_eq!(disk.shadow.missed(), missed, "{request:?}");
    assert_eq!(disk.tags(), [], "no process gets it: {request:?}");
    assert_eq!(disk.ended(tag, ResponseStatus::Okay), None, "{request:?}");
    assert_eq!(disk.reap(tag % 2), [], "{request:?}");
}

#[test]
fn it_begins_and_ends_as_any_other() {
    let mut disk = BackedDisk::mapped(8);
    disk.post(0, Op::Read, 16, 8);
    let mut parts = RequestParts::default();
    let start = Start {
        backing: Some(number(0)),
        op: abi::OP_READ,
        sectors: 8,
        segments: 1,
    };
    let begun = disk.shadow.begin_mapped(DiskTag::new(0), &mut parts);
    assert_eq!(begun, Some(start));
    let whole = RequestPart {
        sector: Some(16 + SHIFT),
        sectors: 8,
    };
    assert_eq!(parts.as_slice(), [whole]);
    assert!(disk.is_mapped(0) && !disk.is_mapped(1));
    let info = disk.info();
    assert_eq!((info.waiting, info.executing, info.direct), (0, 1, 0));
    assert_eq!((disk.told(), disk.tags()), (0, vec![]));
    assert_eq!(disk.begin_mapped(0), None, "once");
    assert_eq!(disk.begin(0), None, "once");
    assert!(disk.is_mapped(0), "and that changes nothing of it");
    assert_eq!(
        disk.ended(0, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert!(!disk.is_mapped(0));
    assert_eq!(disk.ended(0, ResponseStatus::Okay), None, "it has ended");
    assert_eq!((disk.info().executing, disk.info().direct), (0, 1));
    assert_eq!(disk.reap(0), [], "its result went to the queue");
    // The next request of that tag is independent.
    disk.begin_write(0, 16);
    assert!(!disk.is_mapped(0));
    assert_eq!(disk.ended(0, ResponseStatus::Error), None);
    assert_eq!(disk.tags(), [0]);
}

#[test]
fn what_is_in_its_way_has_it_taken_back() {
    let mut disk = BackedDisk::mapped(16);
    disk.recall(64, 64);
    // A request that a queue executes, one whose data is mapped, one that the process has, and one that waits.
    disk.begin_write(0, 0);
    disk.begin_mapped_write(2, 8);
    disk.post(4, Op::Write, 64, 8);
    assert_eq!(disk.tags(), [4]);
    disk.set(64, 64, ExtentAccess::ReadWrite);
    disk.post(6, Op::Write, 0, 24);
    assert_eq!(disk.begin(6), None);
    for sector in [0, 8, 64, 16] {
        is_taken_back(&mut disk, 1, &request(Op::Write, sector, 8));
        is_taken_back(&mut disk, 1, &request(Op::Read, sector, 8));
    }
    // A request that was taken back blocks no other.
    disk.post(3, Op::Write, 24, 8);
    assert_eq!(disk.begin_mapped(3).map(|start| start.sectors), Some(8));
    assert_eq!(
        disk.ended(3, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    is_taken_back(&mut disk, 1, &request(Op::Write, 16, 16));
    disk.begin_write(3, 24);
    // A request that was taken back is not resumed either.
    assert_eq!(
        disk.ended(0, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert_eq!(
        disk.ended(2, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert_eq!(disk.told(), 0b01);
    assert_eq!((disk.resume(1), disk.resume(0)), (vec![], vec![6]));
    disk.done(4);
    assert_eq!(
        disk.ended(6, ResponseStatus::Okay),
        Some(ResponseStatus::Okay)
    );
    assert_eq!((disk.told(), disk.tags()), (0, vec![]));
    // A request that is posted anew counts as a new one.
    disk.begin_write(1, 16);
}

#[test]
fn what_is_not_mapped_in_the_disk_has_it_taken_back() {
    let mut disk = BackedDisk::unmapped(8);
    is_taken_back(&mut disk, 0, &request(Op::Read, 0, 8));
    disk.set(64, 64, ExtentAccess::ReadWrite);
    disk.set(256, 64, ExtentAccess::Read);
    disk.set_zeroes(512, 64);
    let write = request(Op::Write, 64, 8);
    let fua = PostedRequest { fua: true, ..write };
    let preflush = PostedRequest {
        preflush: true,
        ..write
    };
    for request in [
        request(Op::Read, 0, 8),
        request(Op::Read, 120, 16),
        request(Op::Write, 256, 8),
        request(Op::Read, 65, 8),
        request(Op::Write, 512, 8),
        request(Op::Flush, 0, 0),
        request(Op::Discard, 64, 8),
        fua,
        preflush,
    ] {
        is_taken_back(&mut disk, 0, &request);
    }
    assert_eq!(disk.map().extents().count(), 3, "nobody has changed it");
    disk.shadow.set_able(0, false);
    is_taken_back(&mut disk, 0, &write);
    disk.shadow.set_able(0, true);
    disk.begin_mapped_write(0, 64);
}

#[test]
fn without_a_map_it_is_taken_back() {
    let mut shadow = Shadow::new(vec![TagEntry::FREE; 4]);
    shadow.set_able(0, true);
    let (tag, read) = (DiskTag::new(2), request(Op::Read, 0, 8));
    for _ in 0..3 {
        assert_eq!(shadow.post(tag, 0, &read, 0), Ok(()));
        assert_eq!(shadow.begin_mapped(tag, &mut RequestParts::default()), None);
        assert_eq!((shadow.waiting(), shadow.executing()), (0, 0));
    }
    assert!(!shadow.has_deliverable());
    // Unknown tags are not mapped either.
    let beyond = DiskTag::new(999);
    assert_eq!(
        shadow.begin_mapped(beyond, &mut RequestParts::default()),
        None
    );
    assert!(!shadow.is_mapped(beyond) && !shadow.is_mapped(tag));
}

#[test]
fn what_failed_is_for_no_process() {
    for (op, status) in [
        (Op::Write, ResponseStatus::Error),
        (Op::Read, ResponseStatus::NotSupported),
    ] {
        let mut disk = BackedDisk::mapped(8);
        let before = disk.info();
        disk.post(0, op, 0, 8);
        assert!(disk.begin_mapped(0).is_some());
        assert_eq!(disk.ended(0, status), None);
        assert!(!disk.is_mapped(0));
        assert_eq!(disk.ended(0, status), None, "it is given back once");
        assert_eq!(disk.info(), before);
        assert_eq!((disk.told(), disk.tags()), (0, vec![]));
        assert!(!disk.shadow.has_deliverable());
        assert_eq!((disk.reap(0), disk.reap(1)), (vec![], vec![]));
        assert_eq!(disk.shadow.missed(), [0; abi::MISSES as usize]);
        assert!(!disk.shadow.is_executing(&Sectors::ALL));
        // Posted anew it is an ordinary request: a queue may begin it, and a process gets it if it fails once more.
        disk.post(0, op, 0, 8);
        assert!(disk.begin(0).is_some());
        assert!(!disk.is_mapped(0));
        assert_eq!(disk.ended(0, status), None);
        let descs = disk.descs();
        let [desc] = descs.as_slice() else {
            panic!("{descs:?}");
        };
        assert_eq!((desc.tag, desc.flags), (0, abi::DESC_REPLAY));
        disk.done(0);
        assert_eq!(disk.reap(0), [(0, ResponseStatus::Okay)]);
    }
}

#[test]
fn what_waits_for_it_goes_on_when_it_ends() {
    for status in [ResponseStatus::Okay, ResponseStatus::Error] {
        let mut disk = BackedDisk::mapped(16);
        disk.occupy(7);
        disk.begin_mapped_write(0, 0);
        disk.post(1, Op::Read, 0, 8);
        assert_eq!(disk.begin(1), None);
        disk.post(2, Op::Discard, 0, 64);
        assert_eq!((disk.told(), disk.tags()), (0, vec![]));
        let expected = Some(status).filter(|status| *status == ResponseStatus::Okay);
        assert_eq!(disk.ended(0, status), expected);
        assert_eq!(disk.told(), 0b10);
        assert_eq!(disk.resume(1), [1]);
        // A request that is posted anew is behind them.
        disk.post(0, Op::Write, 0, 8);
        assert_eq!(disk.begin(0), None);
        assert_eq!((disk.told(), disk.tags()), (0, vec![]));
        assert_eq!(
            disk.ended(1, ResponseStatus::Okay),
            Some(ResponseStatus::Okay)
        );
        assert_eq!(disk.tags(), [2]);
        disk.done(2);
        assert_eq!(disk.tags(), [0]);
    }
}

#[test]
fn a_recall_waits_for_it() {
    for status in [ResponseStatus::Okay, ResponseStatus::Error] {
        let mut disk = BackedDisk::mapped(8);
        disk.begin_mapped_write(0, 64);
        disk.recall(0, SIZE);
        assert!(disk.is_mapped(0), "it goes on");
        for (sector, sectors, sees) in [(71, 1, true), (0, 65, true), (0, 64, false)] {
            let executes = disk.shadow.is_executing(&range(sector, sectors));
            assert_eq!(executes, sees, "{sector}, {sectors}");
        }
        assert!(disk.shadow.is_executing(&Sectors::ALL));
        assert!(disk.shadow.is_executing_in(number(0)));
        assert_eq!(
            disk.ended(0, status).is_some(),
            status == ResponseStatus::Okay
        );
        assert!(!disk.shadow.is_executing(&Sectors::ALL));
        assert!(!disk.shadow.is_executing_in(number(0)));
        is_taken_back(&mut disk, 2, &request(Op::Write, 64, 8));
    }
    // No request waits for one that was taken back.
    let mut disk = BackedDisk::mapped(8);
    disk.post(0, Op::Read, 65, 1);
    assert_eq!(disk.begin_mapped(0), None);
    assert!(!disk.shadow.is_executing(&Sectors::ALL));
}

#[test]
fn it_outlives_its_process_and_is_not_for_the_next_one() {
    for status in [ResponseStatus::Okay, ResponseStatus::Error] {
        let mut disk = BackedDisk::mapped(8);
        disk.begin_mapped_write(0, 0);
        disk.post(1, Op::Read, 0, 8);
        disk.shadow.closed();
        assert!(disk.is_mapped(0));
        // Mapped requests are begun while the dead process is fenced.
        disk.begin_mapped_write(2, 64);
        assert_eq!(disk.shadow.quiet(0).unwrap().count, 0);
        assert!(disk.is_mapped(0) && disk.is_mapped(2));
        assert_eq!(disk.shadow.fail_waiting(usize::MAX).count, 0);
        assert_eq!(disk.told(), 0, "it is in the way of the read");
        disk.start();
        assert_eq!(disk.tags(), []);
        assert_eq!((disk.info().waiting, disk.info().executing), (1, 2));
        assert_eq!(
            disk.ended(2, status).is_some(),
            status == ResponseStatus::Okay
        );
        assert_eq!(disk.tags(), []);
        assert_eq!(
            disk.ended(0, status).is_some(),
            status == ResponseStatus::Okay
        );
        let seen: Vec<_> = disk.descs().iter().map(|d| (d.tag, d.flags)).collect();
        assert_eq!(
            seen,
            [(1, 0)],
            "the map began anew, and nothing is replayed"
        );
        is_taken_back(&mut disk, 0, &request(Op::Write, 256, 8));
    }
}

#[test]
fn what_fails_while_nobody_serves_waits_for_nobody() {
    let mut disk = BackedDisk::mapped(8);
    disk.begin_mapped_write(0, 0);
    disk.die();
    assert_eq!(disk.ended(0, ResponseStatus::Error), None);
    assert_eq!(disk.info().waiting, 0);
    assert_eq!(disk.shadow.fail_waiting(usize::MAX).count, 0);
    assert_eq!(disk.reap(0), []);
    disk.start();
    assert_eq!(disk.tags(), []);
    assert_eq!(disk.info().replayed, 0);
}

#[test]
fn a_queue_that_goes_leaves_it_to_its_end() {
    for status in [ResponseStatus::Okay, ResponseStatus::Error] {
        let mut disk = BackedDisk::mapped(8);
        disk.begin_mapped_write(0, 0);
        disk.post(2, Op::Read, 0, 8);
        disk.post(1, Op::Read, 0, 8);
        assert_eq!(disk.shadow.withdraw(0), 1, "what waits for it");
        disk.shadow.set_able(0, false);
        assert_eq!(disk.shadow.orphan(0), 0, "no process has it");
        assert_eq!(disk.shadow.orphans(), 0);
        assert!(disk.is_mapped(0), "its queue waits for that");
        assert_eq!((disk.told(), disk.tags()), (0, vec![]));
        assert_eq!(
            disk.ended(0, status).is_some(),
            status == ResponseStatus::Okay
        );
        assert_eq!(disk.told(), 0b10);
        assert_eq!(disk.resume(1), [1]);
        assert_eq!((disk.info().waiting, disk.info().executing), (0, 1));
        // The next connection uses the tags from 0 on.
        disk.shadow.set_able(0, true);
        disk.begin_mapped_write(0, 64);
    }
}

#[test]
fn a_flush_waits_for_none_that_failed() {
    let mut disk = BackedDisk::mapped(8);
    assert_eq!(disk.map().set_flush(), Ok(()));
    // The process has a write, for which only a flush after a failure would wait.
    disk.post(4, Op::Write, 129, 1);
    assert_eq!(disk.tags(), [4]);
    for tag in [0, 2] {
        disk.begin_mapped_write(tag, 0);
        assert_eq!(disk.ended(tag, ResponseStatus::Error), None);
        is_taken_back(&mut disk, tag, &request(Op::Read, 128, 8));
        disk.post(1, Op::Flush, 0, 0);
        assert!(disk.begin(1).is_some(), "nothing is executed again");
        assert_eq!(
            disk.ended(1, ResponseStatus::Okay),
            Some(ResponseStatus::Okay)
        );
    }
}

#[test]
fn a_flush_waits_for_another_that_failed_all_the_same() {
    let mut disk = BackedDisk::mapped(8);
    assert_eq!(disk.map().set_flush(), Ok(()));
    disk.begin_write(0, 0);
    assert_eq!(disk.ended(0, ResponseStatus::Error), None);
    assert_eq!(disk.tags(), [0], "it is executed again");
    disk.begin_mapped_write(2, 64);
    assert_eq!(disk.ended(2, ResponseStatus::Error), None);
    is_taken_back(&mut disk, 4, &request(Op::Read, 0, 8));
    disk.post(1, Op::Flush, 0, 0);
    assert_eq!((disk.begin(1), disk.told()), (None, 0));
    disk.done(0);
    assert_eq!(disk.told(), 0b10);
    assert_eq!(disk.resume(1), [1]);
}

#[test]
fn nothing_that_a_process_says_of_it_counts() {
    let mut disk = BackedDisk::mapped(8);
    disk.post(0, Op::Discard, 64, 8);
    assert_eq!(disk.tags(), [0]);
    disk.done(0);
    disk.reap(0);
    disk.begin_mapped_write(0, 0);
    for flags in [0, abi::COMPLETION_RETURNED] {
        assert_eq!(disk.commit(0, 1, flags), Committed::Refused);
        assert_eq!(disk.commit(0, 2, flags), Committed::Refused);
    }
    assert!(disk.is_mapped(0));
    // The process writes in place, so the mapping stays.
    let all = disk.map().extents().copied().collect::<Vec<_>>();
    assert_eq!(disk.ended(0, ResponseStatus::Error), None);
    assert_eq!(disk.map().extents().copied().collect::<Vec<_>>(), all);
    assert!(all.contains(&extent(72, SIZE - 72, ExtentAccess::ReadWrite)));
}
