// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! What a queue executes without the process, one rule at a time.

use ring::numbers::DiskTag;
use ring::response::Status;
use ring::tap::abi::{self, Completion, Desc, Info};
use ring::tap::checked::{Claimed, Fence};
use ring::tap::extent::{Access, BackingNumber, Extent, Sectors, Source};
use ring::tap::map::tree::{Leaf, Slot};
use ring::tap::map::{Backing, Map, Refused};
use ring::tap::shadow::direct::{Part, Parts, Start, MAX_PARTS};
use ring::tap::shadow::{Committed, Op, Request, Shadow, STEPS};
use ring::tap::table::Entry;

use super::shadow::request;

/// Sectors of the disk.
const SIZE: u64 = 1 << 16;
/// An extent of the disk begins so much later in its backing.
const SHIFT: u64 = 1 << 10;
const BACKING: Backing = Backing {
    sectors: SIZE + SHIFT,
    block: 8,
    writable: true,
};

fn number(number: u16) -> BackingNumber {
    BackingNumber::new(number).expect("a small one")
}

fn range(start: u64, count: u64) -> Sectors {
    Sectors::new(start, count).expect("it is not empty")
}

fn extent(start: u64, count: u64, access: Access) -> Extent {
    Extent {
        range: range(start, count),
        place: start + SHIFT,
        source: Source::Backing(number(0)),
        access,
    }
}

type VecMap = Map<Vec<Slot>, Vec<Leaf>>;

/// A disk with one backing, its two queues and its process. A tag belongs to queue `tag % 2`.
struct Disk {
    shadow: Shadow<Vec<Entry>, Option<Box<VecMap>>>,
    epoch: u64,
}

impl Disk {
    /// A disk that a process serves, of which it has said nothing.
    fn unmapped(tags: usize) -> Self {
        let mut map = Map::new(vec![Slot::FREE; 8], vec![Leaf::FREE; 8], SIZE, true);
        assert!(map.add_backing(number(0), BACKING));
        let mut shadow = Shadow::with_map(vec![Entry::FREE; tags], Some(Box::new(map)));
        shadow.set_able(0, true);
        shadow.set_able(1, true);
        let mut disk = Self { shadow, epoch: 0 };
        disk.start();
        disk
    }

    /// A disk all of which may be read and written.
    fn mapped(tags: usize) -> Self {
        let mut disk = Self::unmapped(tags);
        disk.set(0, SIZE, Access::ReadWrite);
        disk
    }

    fn start(&mut self) {
        self.epoch = self.shadow.opened().expect("nobody has it");
        let failed = self.shadow.started(self.epoch).expect("it has opened it");
        assert_eq!(failed.count, 0);
    }

    fn die(&mut self) {
        self.shadow.closed();
        assert_eq!(self.shadow.quiet(0).unwrap().count, 0);
    }

    fn map(&mut self) -> &mut VecMap {
        self.shadow.map().as_mut().expect("it has one")
    }

    #[track_caller]
    fn set(&mut self, start: u64, count: u64, access: Access) {
        let generation = self.map().generation();
        let set = self.map().set(&extent(start, count, access), generation);
        assert_eq!(set, Ok(()));
    }

    #[track_caller]
    fn set_zeroes(&mut self, start: u64, count: u64) {
        let zeroes = Extent {
            source: Source::Zeroes,
            place: 0,
            ..extent(start, count, Access::Read)
        };
        let generation = self.map().generation();
        assert_eq!(self.map().set(&zeroes, generation), Ok(()));
    }

    fn recall(&mut self, start: u64, count: u64) {
        self.map().recall(&range(start, count));
    }

    #[track_caller]
    fn post(&mut self, tag: u16, op: Op, sector: u64, sectors: u64) {
        self.post_as(tag, &request(op, sector, sectors));
    }

    #[track_caller]
    fn post_as(&mut self, tag: u16, request: &Request) {
        let posted = self.shadow.post(DiskTag::new(tag), tag % 2, request, 0);
        assert_eq!(posted, Ok(()));
    }

    fn begin(&mut self, tag: u16) -> Option<Start> {
        self.begin_in_parts(tag).map(|(start, _)| start)
    }

    fn begin_in_parts(&mut self, tag: u16) -> Option<(Start, Vec<Part>)> {
        let mut parts = Parts::default();
        let start = self.shadow.begin(DiskTag::new(tag), &mut parts)?;
        Some((start, parts.as_slice().to_vec()))
    }

    /// Posts a write of eight sectors and begins it.
    #[track_caller]
    fn begin_write(&mut self, tag: u16, sector: u64) {
        self.post(tag, Op::Write, sector, 8);
        assert!(self.begin(tag).is_some());
    }

    fn ended(&mut self, tag: u16, status: Status) -> Option<Status> {
        self.shadow.ended(DiskTag::new(tag), status)
    }

    /// The queues that are told to resume something, one bit for each.
    fn told(&mut self) -> u64 {
        self.shadow.sort();
        self.shadow.take_resumable()
    }

    fn resume(&mut self, queue: u16) -> Vec<u16> {
        let mut tags = Vec::new();
        let each = |tag: DiskTag, _, _: &[Part]| tags.push(tag.number());
        self.shadow.resume(queue, usize::MAX, each);
        tags
    }

    fn descs(&mut self) -> Vec<Desc> {
        let mut all = Vec::new();
        let each = |_, desc: &Desc| all.push(*desc);
        let delivered = self.shadow.deliver(self.epoch, usize::MAX, 0, each);
        assert_eq!(delivered.count, all.len());
        all
    }

    /// What the process gets.
    fn tags(&mut self) -> Vec<u16> {
        self.descs().iter().map(|desc| desc.tag).collect()
    }

    fn commit(&mut self, tag: u16, generation: u32, flags: u16) -> Committed {
        let completion = Completion {
            tag,
            flags,
            generation,
            ..Completion::default()
        };
        let commit = completion.check().expect("well-formed");
        self.shadow.commit(self.epoch, &commit)
    }

    /// The process answers the first delivery of a tag.
    #[track_caller]
    fn done(&mut self, tag: u16) {
        let committed = self.commit(tag, 1, 0);
        assert_eq!(committed, Committed::Done(tag % 2));
    }

    fn reap(&mut self, queue: u16) -> Vec<(u16, Status)> {
        let mut all = Vec::new();
        self.shadow.reap(queue, usize::MAX, |tag, status| {
            all.push((tag.number(), status))
        });
        all
    }

    fn info(&self) -> Info {
        let mut info = Info::default();
        self.shadow.describe(&mut info, 0);
        info
    }
}

#[test]
fn what_is_mapped_begins_at_once() {
    let mut disk = Disk::mapped(8);
    disk.post(0, Op::Read, 16, 8);
    let start = Start {
        backing: Some(number(0)),
        op: abi::OP_READ,
        sectors: 8,
        segments: 1,
    };
    assert_eq!(disk.info().waiting, 1);
    let whole = Part {
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
    assert_eq!(disk.ended(1, Status::Okay), Some(Status::Okay));
    assert_eq!(disk.ended(1, Status::Okay), None, "it has ended");
    assert_eq!((disk.info().executing, disk.info().direct), (1, 1));
    assert_eq!(disk.reap(1), [], "its result went to the queue");
    disk.begin_write(1, 32);
}

#[test]
fn what_is_not_mapped_is_for_the_process() {
    let mut disk = Disk::unmapped(16);
    disk.post(0, Op::Read, 0, 8);
    assert_eq!(disk.begin(0), None, "nothing is mapped");
    disk.set(64, 64, Access::ReadWrite);
    disk.set(256, 64, Access::Read);
    disk.set_zeroes(512, 64);
    let write = request(Op::Write, 64, 8);
    let fua = Request { fua: true, ..write };
    let preflush = Request {
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
        // Zeroes are nowhere that could be written.
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
    // A flush is the process's until it says otherwise, and so is what has no place.
    assert_eq!(disk.shadow.missed(), [1, 1, 2, 2, 0, 0, 2, 0]);
    for tag in 0..8 {
        disk.done(tag);
    }
    disk.set(256, 64, Access::Read);
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
    let mut disk = Disk::mapped(8);
    disk.shadow.set_able(1, false);
    disk.begin_write(0, 0);
    disk.post(1, Op::Write, 8, 8);
    assert_eq!(disk.begin(1), None);
    disk.post(3, Op::Read, 0, 8);
    assert_eq!(disk.begin(3), None);
    assert_eq!(disk.ended(0, Status::Okay), Some(Status::Okay));
    assert_eq!(disk.told(), 0);
    assert_eq!(disk.resume(1), []);
    assert_eq!(disk.tags(), [1, 3]);
    assert_eq!(disk.shadow.missed()[usize::from(abi::MISS_QUEUE)], 2);
}

#[test]
fn what_waits_for_an_earlier_one_is_ready_when_that_ends() {
    let mut disk = Disk::mapped(8);
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
    assert_eq!(disk.ended(0, Status::Okay), Some(Status::Okay));
    assert_eq!(disk.told(), 0b10);
    assert_eq!(disk.told(), 0, "it was told");
    assert_eq!(disk.resume(0), [], "that is not its request");
    assert!(!disk.shadow.has_deliverable(), "it needs no process");
    assert_eq!(disk.resume(1), [1]);
    assert_eq!(disk.told(), 0);
    assert_eq!(disk.ended(1, Status::Okay), Some(Status::Okay));
    assert_eq!(disk.told(), 0b01);
    assert_eq!(disk.resume(0), [2]);
}

#[test]
fn what_the_process_has_is_in_the_way() {
    let mut disk = Disk::unmapped(8);
    disk.post(0, Op::Write, 0, 8);
    assert_eq!(disk.tags(), [0]);
    disk.set(0, SIZE, Access::ReadWrite);
    disk.post(1, Op::Read, 0, 8);
    assert_eq!(disk.begin(1), None);
    assert_eq!(disk.told(), 0);
    disk.done(0);
    disk.set(0, SIZE, Access::ReadWrite);
    assert_eq!(disk.told(), 0b10);
    assert_eq!(disk.resume(1), [1]);
}

#[test]
fn what_a_queue_executes_is_in_the_way_of_what_the_process_gets() {
    let mut disk = Disk::mapped(8);
    disk.begin_write(0, 0);
    disk.post(1, Op::Discard, 0, 64);
    assert_eq!((disk.told(), disk.tags()), (0, vec![]));
    disk.post(2, Op::Read, 8, 8);
    assert_eq!(disk.begin(2), None, "the discard was before it");
    assert_eq!(disk.ended(0, Status::Okay), Some(Status::Okay));
    assert!(disk.shadow.has_deliverable());
    assert_eq!(disk.tags(), [1]);
    disk.done(1);
    assert_eq!(disk.told(), 0, "the discard has changed the range");
    assert_eq!(disk.tags(), [2]);
}

/// `count` extents of 16 sectors, from the beginning of the disk on, in the opposite order in the backing.
fn scattered(count: u64) -> Disk {
    let mut disk = Disk::unmapped(8);
    for at in 0..count {
        let scattered = Extent {
            place: 16 * (count - 1 - at),
            ..extent(16 * at, 16, Access::ReadWrite)
        };
        let generation = disk.map().generation();
        assert_eq!(disk.map().set(&scattered, generation), Ok(()));
    }
    disk
}

#[test]
fn a_request_is_executed_in_parts() {
    let part = |sector, sectors| Part {
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
    // What overlaps one of them waits for all.
    disk.post(2, Op::Read, 32, 8);
    assert_eq!(disk.begin(2), None);
    assert_eq!(disk.told(), 0);
    assert_eq!(disk.ended(0, Status::Okay), Some(Status::Okay));
    assert_eq!((disk.told(), disk.resume(0)), (1, vec![2]));
    assert_eq!(disk.ended(2, Status::Okay), Some(Status::Okay));
    // As many as there is room for, and one more.
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
    let other = Extent {
        source: Source::Backing(number(1)),
        ..extent(32, 8, Access::Read)
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
    let mut disk = Disk::unmapped(8);
    disk.set(0, 16, Access::ReadWrite);
    disk.set_zeroes(16, 16);
    disk.set(32, 8, Access::ReadWrite);
    let part = |sector, sectors| Part { sector, sectors };
    disk.post(0, Op::Read, 8, 32);
    let (start, parts) = disk.begin_in_parts(0).expect("it is known");
    assert_eq!((start.backing, start.sectors), (Some(number(0)), 32));
    let stored = [Some(8 + SHIFT), Some(32 + SHIFT)];
    assert_eq!(
        parts,
        [part(stored[0], 8), part(None, 16), part(stored[1], 8)]
    );
    // Of them there are no blocks.
    disk.post(1, Op::Read, 17, 3);
    let (start, parts) = disk.begin_in_parts(1).expect("it is known");
    assert_eq!((start.backing, parts), (None, vec![part(None, 3)]));
    assert_eq!(disk.info().executing, 2);
    assert!(disk.shadow.is_executing_in(number(0)));
    assert_eq!(disk.ended(0, Status::Okay), Some(Status::Okay));
    assert!(!disk.shadow.is_executing_in(number(0)));
    assert!(disk.shadow.is_executing(&range(17, 1)));
    assert_eq!(disk.ended(1, Status::Okay), Some(Status::Okay));
    assert_eq!(disk.info().executing, 0);
}

#[test]
fn a_write_ends_zeroes_when_the_process_gets_it_and_when_it_answers() {
    let mut disk = Disk::unmapped(8);
    disk.set_zeroes(0, 64);
    disk.post(0, Op::Write, 8, 8);
    assert_eq!(disk.begin(0), None);
    assert_eq!(disk.tags(), [0]);
    // The process looked before it had it, or while it had not done it.
    disk.set_zeroes(0, 64);
    disk.done(0);
    disk.post(1, Op::Read, 8, 8);
    assert_eq!(disk.begin(1), None);
    disk.post(3, Op::Read, 16, 8);
    assert!(disk.begin(3).is_some(), "what is beside it is as before");
}

#[test]
fn a_queue_is_told_of_all_that_it_has_not_taken() {
    let mut disk = Disk::mapped(16);
    disk.begin_write(0, 0);
    for tag in [2, 4, 6] {
        disk.post(tag, Op::Read, 0, 8);
    }
    assert_eq!(disk.told(), 0);
    assert_eq!(disk.ended(0, Status::Okay), Some(Status::Okay));
    let mut got = Vec::new();
    for left in [2, 1, 0] {
        assert_eq!(disk.told(), 1);
        let each = |tag: DiskTag, _, _: &[Part]| got.push(tag.number());
        disk.shadow.resume(0, 1, each);
        assert_eq!(disk.info().waiting, left);
    }
    assert_eq!(disk.told(), 0);
    assert_eq!(got, [2, 4, 6]);
}

#[test]
fn what_is_recalled_before_it_was_begun_is_for_the_process() {
    let mut disk = Disk::mapped(8);
    disk.begin_write(0, 0);
    disk.post(1, Op::Write, 0, 8);
    disk.post(3, Op::Read, 0, 8);
    assert_eq!(disk.ended(0, Status::Okay), Some(Status::Okay));
    assert_eq!(disk.told(), 0b10);
    disk.recall(0, 8);
    assert_eq!(disk.resume(1), []);
    assert!(disk.shadow.has_deliverable());
    assert_eq!(disk.tags(), [1]);
    // The last of all is recalled: nobody sorts any more.
    disk.done(1);
    disk.reap(1);
    disk.begin_write(5, 64);
    disk.post(7, Op::Write, 64, 8);
    assert_eq!(disk.ended(5, Status::Okay), Some(Status::Okay));
    assert_eq!(disk.told(), 0b10);
    disk.map().recall(&Sectors::ALL);
    assert_eq!(disk.resume(1), []);
    assert_eq!(disk.tags(), [3, 7]);
}

#[test]
fn what_failed_is_executed_again_by_the_process() {
    for (op, status) in [(Op::Write, Status::Error), (Op::Read, Status::NotSupported)] {
        let mut disk = Disk::mapped(8);
        disk.post(0, op, 0, 8);
        assert!(disk.begin(0).is_some());
        disk.post(1, Op::Write, 0, 8);
        assert_eq!(disk.ended(0, status), None);
        assert_eq!(
            disk.told(),
            0,
            "it is not tried again, and it is in the way"
        );
        assert_eq!((disk.info().executing, disk.info().direct), (0, 0));
        let descs = disk.descs();
        let [desc] = descs.as_slice() else {
            panic!("{descs:?}");
        };
        assert_eq!((desc.tag, desc.flags), (0, abi::DESC_REPLAY));
        assert_eq!((desc.generation, desc.deliveries), (1, 1));
        disk.done(0);
        assert_eq!(disk.reap(0), [(0, Status::Okay)]);
        assert_eq!(disk.told(), 0b10);
        assert_eq!(disk.resume(1), [1]);
    }
}

#[test]
fn flushes_wait_for_what_failed() {
    let mut disk = Disk::mapped(8);
    assert_eq!(disk.map().set_flush(), Ok(()));
    disk.begin_write(0, 0);
    assert_eq!(disk.ended(0, Status::Error), None);
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
    let mut disk = Disk::mapped(8);
    disk.post(0, Op::Flush, 0, 0);
    assert_eq!(disk.begin(0), None);
    assert_eq!(disk.tags(), [0]);
    assert_eq!(disk.map().set_flush(), Ok(()));
    disk.post(1, Op::Flush, 0, 0);
    let start = disk.begin(1).expect("now it is");
    assert_eq!((start.op, start.backing), (abi::OP_FLUSH, Some(number(0))));
    assert_eq!(disk.ended(1, Status::Okay), Some(Status::Okay));
    // Also if nothing else is mapped.
    disk.recall(0, SIZE);
    disk.post(1, Op::Flush, 0, 0);
    assert!(disk.begin(1).is_some());
    // Nobody knows what a second one would do.
    assert_eq!(disk.ended(1, Status::Error), Some(Status::Error));
    assert_eq!((disk.info().executing, disk.info().waiting), (0, 0));
    assert!(disk.map().add_backing(number(1), BACKING));
    disk.post(1, Op::Flush, 0, 0);
    assert_eq!(disk.begin(1), None, "there are two");
    assert_eq!(disk.map().set_flush(), Err(Refused::NoBacking));
    assert!(disk.map().remove_backing(number(1)));
    disk.post(2, Op::Flush, 0, 0);
    assert_eq!(disk.begin(2), None, "all was taken back");
    assert_eq!(disk.tags(), [1, 2]);
}

#[test]
fn a_delivered_write_takes_back_what_may_only_be_read_of_its_range() {
    let mut disk = Disk::unmapped(8);
    disk.set(0, 64, Access::Read);
    disk.post(0, Op::Write, 8, 8);
    assert_eq!(disk.begin(0), None);
    assert_eq!(disk.tags(), [0]);
    let extents: Vec<Extent> = disk.map().extents().copied().collect();
    let rest = [extent(0, 8, Access::Read), extent(16, 48, Access::Read)];
    assert_eq!(extents, rest);
    let between = disk.map().generation();
    // It looks where the range is while it executes the write.
    let old = extent(8, 8, Access::Read);
    assert_eq!(disk.map().set(&old, between), Ok(()));
    disk.done(0);
    let extents: Vec<Extent> = disk.map().extents().copied().collect();
    assert_eq!(extents, rest, "at the answer again");
    assert_eq!(disk.map().set(&old, between), Err(Refused::Stale));
    disk.set(8, 8, Access::Read);
    // What may be written is written where it is; here by the process, for it is no whole block.
    disk.set(128, 64, Access::ReadWrite);
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
        let mut disk = Disk::mapped(8);
        let before = disk.map().generation();
        disk.post(0, op, 64, 64);
        assert_eq!(disk.begin(0), None);
        assert_eq!(disk.map().extents().count(), 1, "nobody has it yet");
        assert_eq!(disk.tags(), [0]);
        assert_eq!(disk.map().extents().count(), 2, "{op:?}");
        let between = disk.map().generation();
        let old = extent(64, 64, Access::ReadWrite);
        assert_eq!(disk.map().set(&old, before), Err(Refused::Stale));
        assert_eq!(disk.map().set(&old, between), Ok(()));
        disk.done(0);
        assert_eq!(disk.map().extents().count(), 2, "at the answer again");
        assert_eq!(disk.map().set(&old, between), Err(Refused::Stale));
    }
}

#[test]
fn a_change_that_has_no_queue_any_more_is_one_all_the_same() {
    let mut disk = Disk::mapped(8);
    disk.post(0, Op::Discard, 64, 64);
    assert_eq!(disk.tags(), [0]);
    let between = disk.map().generation();
    assert_eq!(disk.shadow.orphan(0), 1);
    assert_eq!(disk.commit(0, 1, 0), Committed::Released);
    let old = extent(64, 64, Access::ReadWrite);
    assert_eq!(disk.map().set(&old, between), Err(Refused::Stale));
}

/// A process has found out where something is, discards it, and dies: nobody executes the discard again, and what was
/// found is not true.
#[test]
fn a_discard_that_nobody_answers_takes_back_its_range_too() {
    let ends: [fn(&mut Disk); 3] = [
        |disk| {
            disk.shadow.withdraw(0);
        },
        |disk| {
            assert_eq!(disk.shadow.fail_waiting(8).count, 1);
        },
        // Its queue went first.
        |_| (),
    ];
    for (number, end) in ends.into_iter().enumerate() {
        let mut disk = Disk::mapped(8);
        disk.post(0, Op::Discard, 64, 64);
        assert_eq!(disk.tags(), [0]);
        let between = disk.map().generation();
        let old = extent(64, 64, Access::ReadWrite);
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
        assert_eq!(disk.map().set(&old, between), Err(Refused::Stale));
    }
}

#[test]
fn what_the_process_gives_back_is_delivered_again() {
    let mut disk = Disk::unmapped(8);
    disk.post(0, Op::Write, 0, 8);
    assert_eq!(disk.tags(), [0]);
    let returned = disk.commit(0, 1, abi::COMPLETION_RETURNED);
    assert_eq!(returned, Committed::Returned);
    disk.set(0, SIZE, Access::ReadWrite);
    assert_eq!(disk.told(), 0, "a process had it");
    assert_eq!(disk.tags(), [0]);
}

#[test]
fn a_process_begins_with_nothing() {
    let mut disk = Disk::mapped(8);
    assert_eq!(disk.map().set_flush(), Ok(()));
    let before = disk.map().generation();
    disk.begin_write(0, 0);
    disk.post(1, Op::Write, 0, 8);
    disk.die();
    disk.post(3, Op::Read, 64, 8);
    assert!(disk.begin(3).is_some(), "what the dead process said holds");
    disk.post(2, Op::Write, 128, 8);
    assert_eq!(disk.ended(0, Status::Okay), Some(Status::Okay));
    assert_eq!(disk.told(), 0b11);
    disk.start();
    assert!(disk.map().is_empty());
    let all = extent(0, SIZE, Access::ReadWrite);
    assert_eq!(disk.map().set(&all, before), Err(Refused::Stale));
    assert_eq!(disk.info().executing, 1, "what was begun goes on");
    assert_eq!((disk.resume(0), disk.resume(1)), (vec![], vec![]));
    assert_eq!(disk.tags(), [2, 1]);
    disk.post(4, Op::Flush, 0, 0);
    assert_eq!(disk.begin(4), None);
    assert_eq!(disk.tags(), [4]);
    assert_eq!(disk.ended(3, Status::Okay), Some(Status::Okay));
}

#[test]
fn a_process_that_starts_again_begins_with_nothing() {
    let mut disk = Disk::mapped(8);
    assert!(disk.shadow.claim(disk.epoch, Claimed::BEFORE));
    disk.begin_write(0, 0);
    assert!(disk.shadow.started(disk.epoch).is_ok());
    assert!(disk.map().is_empty());
}

#[test]
fn the_order_outlives_the_process() {
    let mut disk = Disk::mapped(16);
    // Something of each: direct, delivered, waiting for the one and for the other.
    disk.begin_write(0, 0);
    disk.post(2, Op::Discard, 64, 64);
    assert_eq!(disk.tags(), [2]);
    disk.set(64, 64, Access::ReadWrite);
    disk.post(1, Op::Write, 0, 16);
    disk.post(3, Op::Write, 64, 8);
    disk.post(5, Op::Read, 8, 8);
    assert_eq!(disk.told(), 0);
    disk.shadow.closed();
    disk.begin_write(4, 256);
    assert_eq!(disk.shadow.quiet(0).unwrap().count, 0);
    assert_eq!(disk.info().executing, 2);
    assert_eq!(disk.told(), 0, "all of it is still in the way");
    assert_eq!(disk.ended(0, Status::Okay), Some(Status::Okay));
    assert_eq!(disk.ended(0, Status::Okay), None);
    assert_eq!(disk.told(), 0b10);
    assert_eq!(disk.resume(1), [1]);
    disk.start();
    let descs = disk.descs();
    let seen: Vec<_> = descs.iter().map(|d| (d.tag, d.flags)).collect();
    assert_eq!(seen, [(2, abi::DESC_REPLAY)]);
    assert_eq!(disk.ended(1, Status::Okay), Some(Status::Okay));
    assert_eq!(disk.ended(4, Status::Okay), Some(Status::Okay));
    assert_eq!(disk.tags(), [5]);
    assert_eq!(disk.commit(2, 2, 0), Committed::Done(0));
    assert_eq!(disk.tags(), [3]);
    let info = disk.info();
    assert_eq!((info.waiting, info.delivered, info.executing), (0, 2, 0));
    assert_eq!(info.direct, 3);
}

#[test]
fn a_transfer_that_fails_while_nobody_serves_waits_for_the_next_process() {
    let mut disk = Disk::mapped(8);
    disk.begin_write(0, 0);
    disk.die();
    assert_eq!(disk.info().state, abi::STATE_RECOVERING);
    assert_eq!(disk.ended(0, Status::Error), None);
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
    let mut disk = Disk::mapped(8);
    disk.begin_write(0, 0);
    disk.post(1, Op::Read, 0, 8);
    disk.post(3, Op::Read, 0, 8);
    assert_eq!(disk.ended(0, Status::Okay), Some(Status::Okay));
    assert_eq!(disk.told(), 0b10);
    // The queue is about to resume it.
    disk.die();
    assert_eq!(disk.resume(1), [1, 3]);
    assert_eq!(disk.shadow.state(), abi::STATE_RECOVERING);
}

#[test]
fn what_failed_for_a_lost_process_sets_free_what_waits() {
    let mut disk = Disk::mapped(8);
    let claimed = Claimed {
        fence: Fence::None,
        ..Claimed::BEFORE
    };
    assert!(disk.shadow.claim(disk.epoch, claimed));
    disk.set(0, SIZE, Access::ReadWrite);
    // A write of no whole block.
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
    let mut disk = Disk::mapped(16);
    disk.recall(64, 64);
    disk.begin_write(0, 0);
    disk.begin_write(2, 8);
    disk.post(1, Op::Write, 8, 8);
    // Not mapped; and what waits for that.
    disk.post(3, Op::Write, 64, 8);
    disk.post(4, Op::Read, 56, 16);
    // For what is executed, and what waits for what waits for that.
    disk.post(6, Op::Write, 0, 8);
    disk.post(8, Op::Read, 0, 8);
    assert_eq!(disk.ended(2, Status::Okay), Some(Status::Okay));
    assert_eq!(disk.told(), 0b10);
    disk.die();
    assert_eq!(disk.told(), 0b10);
    let failed = disk.shadow.fail_waiting(usize::MAX);
    assert_eq!((failed.count, failed.queues), (2, 0b11));
    assert_eq!(disk.reap(1), [(3, Status::Error)]);
    assert_eq!(disk.reap(0), [(4, Status::Error)]);
    assert_eq!(disk.info().executing, 1);
    assert_eq!(disk.resume(1), [1]);
    assert_eq!(disk.ended(0, Status::Okay), Some(Status::Okay));
    assert_eq!(disk.told(), 0b01);
    assert_eq!(disk.resume(0), [6]);
    // It does once it needs one.
    assert_eq!(disk.ended(6, Status::Error), None);
    assert_eq!(disk.told(), 0);
    let failed = disk.shadow.fail_waiting(usize::MAX);
    assert_eq!((failed.count, failed.more), (2, false));
    assert_eq!(disk.reap(0), [(6, Status::Error), (8, Status::Error)]);
}

#[test]
fn what_waits_for_a_process_that_is_gone_fails_for_want_of_one() {
    let mut disk = Disk::mapped(8);
    disk.post(0, Op::Discard, 0, 64);
    assert_eq!(disk.tags(), [0]);
    disk.set(0, 64, Access::ReadWrite);
    disk.post(1, Op::Read, 0, 8);
    assert_eq!(disk.told(), 0);
    disk.shadow.closed();
    assert_eq!(disk.shadow.fail_waiting(usize::MAX).count, 1);
    assert_eq!(disk.reap(1), [(1, Status::Error)]);
}

#[test]
fn a_queue_that_closes_fails_what_it_has_not_begun() {
    let mut disk = Disk::mapped(8);
    disk.begin_write(0, 0);
    disk.begin_write(1, 64);
    disk.post(2, Op::Write, 64, 8);
    disk.post(3, Op::Read, 64, 8);
    disk.post(4, Op::Read, 0, 8);
    assert_eq!(disk.ended(1, Status::Okay), Some(Status::Okay));
    assert_eq!(disk.told(), 0b01);
    assert_eq!(disk.shadow.withdraw(0), 2);
    assert_eq!(disk.reap(0), [(2, Status::Error), (4, Status::Error)]);
    assert_eq!(disk.resume(0), []);
    assert_eq!(disk.told(), 0b10, "the write was in the way of its read");
    assert_eq!(disk.resume(1), [3]);
    assert_eq!(disk.ended(0, Status::Okay), Some(Status::Okay));
}

#[test]
fn a_queue_that_is_gone_has_nothing_ready() {
    let mut disk = Disk::mapped(8);
    disk.begin_write(0, 0);
    disk.post(2, Op::Write, 0, 8);
    disk.post(3, Op::Read, 0, 8);
    assert_eq!(disk.ended(0, Status::Okay), Some(Status::Okay));
    assert_eq!(disk.told(), 0b01);
    disk.shadow.set_able(0, false);
    assert_eq!(disk.shadow.orphan(0), 0);
    assert_eq!(disk.told(), 0b10);
    assert_eq!(disk.resume(1), [3]);
    assert_eq!(disk.info().waiting, 0);
    // The next connection begins with its tags.
    disk.shadow.set_able(0, true);
    disk.begin_write(2, 64);
    assert_eq!(disk.resume(0), []);
}

#[test]
fn what_is_executed_is_known_by_range() {
    let mut disk = Disk::mapped(8);
    assert!(!disk.shadow.is_executing(&Sectors::ALL));
    disk.begin_write(0, 64);
    disk.post(1, Op::Write, 64, 64);
    assert!(disk.shadow.is_executing(&range(71, 1)));
    assert!(disk.shadow.is_executing(&range(0, 65)));
    assert!(!disk.shadow.is_executing(&range(0, 64)));
    assert!(!disk.shadow.is_executing(&range(72, 8)), "it only waits");
    disk.recall(0, SIZE);
    assert!(disk.shadow.is_executing(&Sectors::ALL), "it goes on");
    assert_eq!(disk.ended(0, Status::Okay), Some(Status::Okay));
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
    let mut disk = Disk::mapped(8);
    assert_eq!(disk.map().set_flush(), Ok(()));
    disk.post(0, Op::Flush, 0, 0);
    assert!(disk.begin(0).is_some());
    assert!(disk.shadow.is_executing_in(number(0)));
    // There may always be one, as the guest likes: who recalls a range would wait for ever.
    assert!(!disk.shadow.is_executing(&range(0, SIZE)));
    assert!(disk.shadow.is_executing(&Sectors::ALL));
    disk.map().recall(&Sectors::ALL);
    disk.post(1, Op::Flush, 0, 0);
    assert_eq!(disk.begin(1), None);
    assert_eq!(disk.ended(0, Status::Okay), Some(Status::Okay));
    assert!(!disk.shadow.is_executing(&Sectors::ALL));
}

#[test]
fn what_is_executed_is_known_by_backing() {
    let mut disk = Disk::mapped(8);
    assert!(disk.map().add_backing(number(1), BACKING));
    disk.recall(64, 64);
    let generation = disk.map().generation();
    let other = Extent {
        source: Source::Backing(number(1)),
        ..extent(64, 64, Access::ReadWrite)
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
    assert_eq!(disk.ended(0, Status::Okay), Some(Status::Okay));
    assert!(disk.shadow.is_executing_in(number(1)));
    assert_eq!(disk.ended(1, Status::Error), None);
    assert!(!disk.shadow.is_executing_in(number(1)));
    assert_eq!(disk.ended(2, Status::Okay), Some(Status::Okay));
    assert!(!disk.shadow.is_executing_in(number(0)) && disk.shadow.executing() == 0);
}

#[test]
fn nothing_else_that_is_said_of_a_direct_request_counts() {
    let mut disk = Disk::mapped(8);
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
    assert_eq!(disk.ended(2, Status::Okay), None, "the process has it");
    assert_eq!(disk.ended(4, Status::Okay), None, "there is none");
    assert_eq!(disk.ended(999, Status::Okay), None);
    assert_eq!(disk.info().executing, 1);
    disk.done(2);
}

/// More than one call looks at, posted before anything is mapped.
fn many(tags: u16, queue_of: impl Fn(u16) -> u16) -> Disk {
    let mut disk = Disk::unmapped(usize::from(tags));
    for tag in 0..tags {
        let read = request(Op::Read, 8 * u64::from(tag), 8);
        let posted = disk.shadow.post(DiskTag::new(tag), queue_of(tag), &read, 0);
        assert_eq!(posted, Ok(()));
        assert_eq!(disk.begin(tag), None);
    }
    disk.shadow.closed();
    assert_eq!(disk.shadow.quiet(0).unwrap().count, 0);
    disk.set(0, SIZE, Access::ReadWrite);
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
        let each = |tag: DiskTag, _, _: &[Part]| got.push(tag.number());
        disk.shadow.resume(0, usize::MAX, each);
    }
    assert_eq!(got, Vec::from_iter(0..count));
    assert!(calls > 0 && calls <= 2, "{calls}");
    let mut disk = many(count, |_| 0);
    disk.shadow.sort();
    let mut some = 0;
    let each = |_, _, _: &[Part]| some += 1;
    disk.shadow.resume(0, usize::MAX, each);
    assert_eq!(some, count, "the queue sorts as well");
}

#[test]
fn who_sorts_the_rest_is_a_queue_that_can() {
    // The first ones are of a queue that executes nothing.
    let most = STEPS as u16 + 8;
    let mut disk = many(most + 1, |tag| u16::from(tag < most));
    disk.shadow.set_able(1, false);
    assert_eq!(disk.told(), 0b01);
    assert_eq!(disk.resume(0), [most]);
    assert_eq!(disk.info().waiting, u32::from(most));
}
