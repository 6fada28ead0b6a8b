// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The shadow, one rule at a time.

use ring::numbers::DiskTag;
use ring::response::ResponseStatus;
use ring::tap::abi::{self, Completion, Desc, Info};
use ring::tap::checked::{Claimed, Fence};
use ring::tap::shadow::{
    Committed, Delivered, Op, OpenError, PostError, PostedRequest, Shadow, StartError,
};
use ring::tap::table::TagEntry;
use std::cell::Cell;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;

const DIED: u8 = abi::DESC_REPLAY;
const EIO: i32 = -5;

pub(super) fn request(op: Op, sector: u64, sectors: u64) -> PostedRequest {
    PostedRequest {
        op,
        preflush: false,
        fua: false,
        sector,
        sectors,
        segments: u16::from(matches!(op, Op::Read | Op::Write)),
    }
}

/// A disk and the process that has it.
struct ShadowDisk {
    shadow: Shadow<Vec<TagEntry>>,
    epoch: u64,
    now: u64,
}

impl ShadowDisk {
    fn new(tags: usize) -> Self {
        Self {
            shadow: Shadow::new(vec![TagEntry::FREE; tags]),
            epoch: 0,
            now: 100,
        }
    }

    fn live(tags: usize) -> Self {
        let mut disk = Self::new(tags);
        disk.start();
        disk
    }

    fn start(&mut self) {
        self.epoch = self.shadow.opened().expect("nobody has it");
        let failed = self.shadow.started(self.epoch).expect("it has opened it");
        assert!(failed.count == 0 || failed.queues != 0);
    }

    fn die(&mut self) {
        self.shadow.closed();
        assert_eq!(self.shadow.quiet(0).unwrap().count, 0);
    }

    #[track_caller]
    fn post(&mut self, tag: u16, op: Op, sector: u64, sectors: u64) {
        self.post_as(tag, &request(op, sector, sectors));
    }

    #[track_caller]
    fn post_as(&mut self, tag: u16, request: &PostedRequest) {
        self.now += 1;
        // The parity of the tag selects one of two queues.
        let posted = self
            .shadow
            .post(DiskTag::new(tag), tag % 2, request, self.now);
        assert_eq!(posted, Ok(()));
    }

    fn descs(&mut self, max: usize) -> Vec<Desc> {
        self.now += 1;
        let mut all = Vec::new();
        let delivered = self.shadow.deliver(self.epoch, max, self.now, |tag, desc| {
            assert_eq!(tag.number(), desc.tag);
            assert_eq!(desc.reserved, [0; 4]);
            all.push(*desc);
        });
        assert_eq!(delivered.count, all.len());
        all
    }

    fn tags(&mut self) -> Vec<u16> {
        self.descs(usize::MAX).iter().map(|desc| desc.tag).collect()
    }

    fn commit(&mut self, tag: u16, generation: u32, flags: u16, result: i32) -> Committed {
        let completion = Completion {
            tag,
            flags,
            generation,
            result,
            reserved: 0,
        };
        let commit = completion.check().expect("well-formed");
        self.shadow.commit(self.epoch, &commit)
    }

    /// The process finishes the first delivery of a tag.
    fn done(&mut self, tag: u16) -> Committed {
        self.commit(tag, 1, 0, 0)
    }

    fn reap(&mut self, queue: u16) -> Vec<(u16, ResponseStatus)> {
        let mut all = Vec::new();
        self.shadow.reap(queue, usize::MAX, |tag, status| {
            all.push((tag.number(), status))
        });
        all
    }

    fn info(&self) -> Info {
        let mut info = Info::default();
        self.shadow.describe(&mut info, self.now);
        info
    }
}

#[test]
fn a_request_goes_through_all_states() {
    let mut disk = ShadowDisk::live(8);
    disk.post_as(
        3,
        &PostedRequest {
            preflush: true,
            fua: true,
            ..request(Op::Write, 100, 8)
        },
    );
    assert_eq!(disk.info().waiting, 1);
    let descs = disk.descs(10);
    let expected = Desc {
        op: abi::OP_WRITE,
        flags: abi::DESC_FUA | abi::DESC_PREFLUSH,
        segments: 1,
        generation: 1,
        sector: 100,
        sectors: 8,
        sequence: 0,
        arrived_ns: 101,
        tag: 3,
        queue: 1,
        deliveries: 1,
        reserved: [0; 4],
    };
    assert_eq!(descs, [expected]);
    disk.now += 50;
    let info = disk.info();
    assert_eq!((info.waiting, info.delivered, info.oldest_ns), (0, 1, 50));
    assert_eq!((info.tags, info.epoch, info.state), (8, 1, abi::STATE_LIVE));
    assert_eq!(disk.done(3), Committed::Done(1));
    assert!(disk.shadow.has_results(1) && !disk.shadow.has_results(0));
    assert_eq!(disk.reap(0), []);
    assert_eq!(disk.reap(1), [(3, ResponseStatus::Okay)]);
    let info = disk.info();
    assert_eq!((info.delivered, info.committed, info.oldest_ns), (0, 1, 0));
    // The tag is free again, and its next delivery has another generation.
    disk.post(3, Op::Flush, 5, 5);
    let desc = disk.descs(10)[0];
    assert_eq!((desc.generation, desc.sequence), (2, 1));
    assert_eq!((desc.op, desc.sector, desc.sectors), (abi::OP_FLUSH, 0, 0));
}

#[test]
fn results_are_those_of_the_process() {
    for (result, status) in [
        (0, ResponseStatus::Okay),
        (EIO, ResponseStatus::Error),
        (-95, ResponseStatus::NotSupported),
        (-4095, ResponseStatus::Error),
    ] {
        let mut disk = ShadowDisk::live(2);
        disk.post(0, Op::Discard, 0, 8);
        disk.tags();
        assert_eq!(disk.commit(0, 1, 0, result), Committed::Done(0));
        assert_eq!(disk.reap(0), [(0, status)]);
    }
}

#[test]
fn tags_and_queues_that_do_not_exist_are_refused() {
    let mut disk = ShadowDisk::live(4);
    let read = request(Op::Read, 0, 8);
    let mut post = |tag, queue| disk.shadow.post(DiskTag::new(tag), queue, &read, 0);
    assert_eq!(post(4, 0), Err(PostError::OutOfRange));
    assert_eq!(post(0, 64), Err(PostError::OutOfRange));
    assert_eq!(post(3, 63), Ok(()));
    assert_eq!(post(3, 0), Err(PostError::InUse));
    assert_eq!(disk.tags(), [3]);
    assert_eq!(disk.done(3), Committed::Done(63));
    assert_eq!(
        disk.shadow.post(DiskTag::new(3), 0, &read, 0),
        Err(PostError::InUse)
    );
}

#[test]
fn only_so_many_tags_are_used_as_the_abi_allows() {
    let disk = ShadowDisk::new(5000);
    assert_eq!(disk.shadow.tags(), abi::MAX_TAGS);
    let mut disk = ShadowDisk::live(5000);
    let read = request(Op::Read, 0, 8);
    assert_eq!(disk.shadow.post(DiskTag::new(4095), 0, &read, 0), Ok(()));
    let beyond = disk.shadow.post(DiskTag::new(4096), 0, &read, 0);
    assert_eq!(beyond, Err(PostError::OutOfRange));
}

#[test]
fn a_request_waits_for_earlier_ones_that_it_overlaps() {
    let mut disk = ShadowDisk::live(8);
    disk.post(0, Op::Write, 0, 8);
    disk.post(1, Op::Read, 7, 2);
    disk.post(2, Op::Read, 8, 8);
    disk.post(3, Op::Write, 8, 1);
    disk.post(4, Op::Discard, 0, 10_000);
    disk.post(5, Op::Read, 9_999, 1);
    assert_eq!(disk.tags(), [0, 2]);
    assert!(!disk.shadow.has_deliverable());
    assert_eq!(disk.done(2), Committed::Done(0));
    assert_eq!(disk.tags(), [], "the read before it is not done");
    assert_eq!(disk.done(0), Committed::Done(0));
    assert!(disk.shadow.has_deliverable());
    assert_eq!(disk.tags(), [1]);
    assert_eq!(disk.done(1), Committed::Done(1));
    assert_eq!(disk.tags(), [3]);
    assert_eq!(disk.done(3), Committed::Done(1));
    assert_eq!(disk.tags(), [4]);
    assert_eq!(disk.done(4), Committed::Done(0));
    assert_eq!(disk.tags(), [5]);
}

#[test]
fn a_flush_waits_for_nobody_while_nothing_is_replayed() {
    let mut disk = ShadowDisk::live(8);
    disk.post(0, Op::Write, 0, 8);
    disk.post(1, Op::Flush, 0, 0);
    assert_eq!(disk.tags(), [0, 1]);
}

#[test]
fn what_a_dead_process_had_is_delivered_again_in_arrival_order() {
    let mut disk = ShadowDisk::live(8);
    for tag in [5, 1, 3, 2] {
        disk.post(tag, Op::Write, 8 * u64::from(tag), 8);
    }
    let before: Vec<u64> = disk.descs(3).iter().map(|d| d.sequence).collect();
    assert_eq!(before, [0, 1, 2]);
    assert_eq!(disk.done(1), Committed::Done(1));
    disk.shadow.closed();
    assert_eq!(disk.shadow.state(), abi::STATE_FENCING);
    assert_eq!(disk.shadow.opened(), Err(OpenError::Fencing));
    assert_eq!(disk.tags(), []);
    assert_eq!(disk.shadow.quiet(0).unwrap().count, 0);
    assert_eq!(disk.shadow.state(), abi::STATE_RECOVERING);
    assert_eq!(disk.info().waiting, 3);
    disk.start();
    assert_eq!(disk.shadow.opened(), Err(OpenError::Open));
    let descs = disk.descs(8);
    let seen: Vec<_> = descs
        .iter()
        .map(|d| (d.tag, d.sequence, d.flags, d.generation))
        .collect();
    // The last one was never delivered before.
    assert_eq!(seen, [(5, 0, DIED, 2), (3, 2, DIED, 2), (2, 3, 0, 1)]);
    assert_eq!(disk.info().replayed, 2);
    assert_eq!(
        disk.reap(1),
        [(1, ResponseStatus::Okay)],
        "its result outlives it"
    );
}

#[test]
fn a_flush_waits_for_earlier_writes_during_a_replay() {
    let mut disk = ShadowDisk::live(8);
    disk.post(0, Op::Read, 0, 8);
    disk.post(1, Op::Write, 8, 8);
    disk.post(2, Op::Flush, 0, 0);
    disk.post_as(
        3,
        &PostedRequest {
            preflush: true,
            ..request(Op::Write, 100, 8)
        },
    );
    assert_eq!(disk.tags(), [0, 1, 2, 3]);
    disk.die();
    disk.start();
    disk.post(4, Op::Flush, 0, 0);
    assert_eq!(disk.tags(), [0, 1]);
    assert_eq!(disk.commit(1, 2, 0, 0), Committed::Done(1));
    // The read need not wait.
    assert_eq!(disk.tags(), [2, 3]);
    disk.post(5, Op::Write, 200, 8);
    assert_eq!(disk.commit(3, 2, 0, 0), Committed::Done(1));
    assert_eq!(disk.tags(), [4, 5]);
    disk.post(6, Op::Flush, 0, 0);
    assert_eq!(disk.tags(), [], "one that came later waits as well");
    assert_eq!(disk.commit(0, 2, 0, 0), Committed::Done(0));
    assert_eq!(disk.commit(2, 2, 0, 0), Committed::Done(0));
    assert_eq!(disk.commit(5, 1, 0, 0), Committed::Done(1));
    assert_eq!(disk.tags(), [6]);
    disk.post(7, Op::Write, 300, 8);
    disk.reap(0);
    disk.post(0, Op::Flush, 0, 0);
    assert_eq!(disk.tags(), [7, 0], "the replay is over");
}

#[test]
fn completions_that_name_no_delivery_are_refused() {
    let mut disk = ShadowDisk::live(4);
    disk.post(0, Op::Write, 0, 8);
    assert_eq!(disk.done(0), Committed::Refused, "not delivered");
    disk.tags();
    assert_eq!(disk.commit(0, 0, 0, 0), Committed::Refused, "generation");
    assert_eq!(disk.commit(0, 2, 0, 0), Committed::Refused, "generation");
    assert_eq!(disk.commit(1, 1, 0, 0), Committed::Refused, "free");
    assert_eq!(disk.commit(4, 1, 0, 0), Committed::Refused, "no such tag");
    assert_eq!(disk.commit(u16::MAX, 1, 0, 0), Committed::Refused);
    disk.epoch = 0;
    assert_eq!(disk.done(0), Committed::Refused, "epoch");
    disk.epoch = 1;
    assert_eq!(disk.done(0), Committed::Done(0));
    assert_eq!(disk.done(0), Committed::Refused, "twice");
    disk.reap(0);
    assert_eq!(disk.done(0), Committed::Refused, "reaped");
    assert_eq!(disk.info().refused, 9);
    assert_eq!(disk.info().committed, 1);
}

#[test]
fn a_dead_process_is_not_heard() {
    let mut disk = ShadowDisk::live(4);
    disk.post(0, Op::Write, 0, 8);
    disk.tags();
    disk.shadow.closed();
    assert_eq!(disk.done(0), Committed::Refused);
    assert_eq!(disk.shadow.quiet(0).unwrap().count, 0);
    assert_eq!(disk.done(0), Committed::Refused);
    let old = disk.epoch;
    disk.start();
    assert_eq!(disk.descs(4)[0].generation, 2);
    let new = std::mem::replace(&mut disk.epoch, old);
    assert_eq!(disk.commit(0, 1, 0, 0), Committed::Refused);
    assert_eq!(disk.commit(0, 2, 0, 0), Committed::Refused);
    assert_eq!(disk.tags(), []);
    disk.epoch = new;
    assert_eq!(disk.commit(0, 1, 0, 0), Committed::Refused);
    assert_eq!(disk.commit(0, 2, 0, 0), Committed::Done(0));
}

#[test]
fn a_returned_request_keeps_its_place() {
    let mut disk = ShadowDisk::live(4);
    disk.post(0, Op::Write, 0, 8);
    disk.post(1, Op::Write, 4, 8);
    assert_eq!(disk.tags(), [0]);
    let returned = disk.commit(0, 1, abi::COMPLETION_RETURNED, 0);
    assert_eq!(returned, Committed::Returned);
    assert!(!disk.shadow.has_results(0));
    let desc = disk.descs(4)[0];
    assert_eq!((desc.tag, desc.flags, desc.generation), (0, 0, 2));
    assert_eq!(disk.info().replayed, 0, "nobody has begun it");
    assert_eq!(disk.done(0), Committed::Refused, "of the first delivery");
    assert_eq!(disk.commit(0, 2, 0, 0), Committed::Done(0));
    assert_eq!(disk.tags(), [1]);
}

#[test]
fn a_process_has_to_open_and_start_in_this_order() {
    let mut disk = ShadowDisk::new(4);
    assert!(disk.shadow.started(0).is_err());
    disk.post(0, Op::Read, 0, 8);
    assert_eq!(disk.shadow.state(), abi::STATE_IDLE);
    let epoch = disk.shadow.opened().expect("nobody has it");
    disk.epoch = epoch;
    assert_eq!(disk.shadow.state(), abi::STATE_OPEN);
    let nothing = disk
        .shadow
        .deliver(epoch, 4, 0, |_, _| panic!("not started"));
    assert_eq!(nothing, Delivered::default());
    assert!(!disk.shadow.has_deliverable());
    assert!(disk.shadow.started(epoch + 1).is_err());
    assert!(disk.shadow.started(epoch).is_ok());
    assert!(disk.shadow.started(epoch).is_err(), "twice");
    assert_eq!(disk.tags(), [0]);
}

#[test]
fn a_process_that_cannot_do_what_was_offered_is_not_started() {
    let bits = |ops: &[u8]| ops.iter().fold(0, |all, op| all | 1u64 << op);
    let mut disk = ShadowDisk::new(4);
    disk.shadow
        .offer(bits(&[abi::OP_READ, abi::OP_WRITE, abi::OP_DISCARD]));
    let request = request(Op::Flush, 0, 0);
    let refused = disk.shadow.post(DiskTag::new(0), 0, &request, 1);
    assert_eq!(refused, Err(PostError::NotOffered));
    disk.post(0, Op::Discard, 0, 8);
    let claims = |operations| Claimed {
        operations,
        features: 0,
        fence: Fence::Local,
    };
    let lacking = |disk: &ShadowDisk| {
        let mut info = abi::Info::default();
        disk.shadow.describe(&mut info, 0);
        info.lacking
    };
    let epoch = disk.shadow.opened().expect("nobody has it");
    disk.epoch = epoch;
    assert!(!disk.shadow.claim(epoch + 1, claims(0)), "somebody else");
    // A process that has only just read the properties of a disk claims too little, and may correct that.
    assert!(disk
        .shadow
        .claim(epoch, claims(bits(&[abi::OP_READ, abi::OP_FLUSH]))));
    let missing = bits(&[abi::OP_WRITE, abi::OP_DISCARD]);
    assert_eq!(disk.shadow.started(epoch), Err(StartError::Lacks(missing)));
    assert_eq!(lacking(&disk), missing);
    assert!(disk.tags().is_empty(), "it was started all the same");
    let all = bits(&[abi::OP_READ, abi::OP_WRITE, abi::OP_DISCARD]);
    assert!(disk.shadow.claim(epoch, claims(all)));
    assert!(disk.shadow.started(epoch).is_ok());
    assert_eq!(lacking(&disk), 0);
    assert!(!disk.shadow.has_claimed(abi::FEATURE_URING_CMD));
    assert_eq!(disk.tags(), [0]);
    assert!(!disk.shadow.claim(epoch, claims(0)), "it has a request");
    disk.die();
    // Claims of one process do not hold for the next.
    disk.start();
    assert!(disk.shadow.has_claimed(abi::FEATURE_URING_CMD));
    assert_eq!(disk.tags(), [0]);
}

fn claimed(fence: Fence) -> Claimed {
    Claimed {
        fence,
        ..Claimed::BEFORE
    }
}

fn claim(disk: &mut ShadowDisk, fence: Fence) {
    disk.epoch = disk.shadow.opened().expect("nobody has it");
    assert!(disk.shadow.claim(disk.epoch, claimed(fence)));
    assert!(disk.shadow.started(disk.epoch).is_ok());
}

/// Ends the process with no visible I/O, and returns the milliseconds after which its I/O is over.
fn settles(disk: &mut ShadowDisk) -> u64 {
    const NS: u64 = 1_000_000;
    let seen_last = 5_000 * NS;
    disk.shadow.closed();
    let mut later = 0..=u64::from(abi::MAX_SETTLE_MS);
    let over = later.find(|ms| disk.shadow.quiet(seen_last + ms * NS).is_some());
    over.expect("it ends")
}

#[test]
fn what_goes_over_a_network_has_time_to_settle() {
    let mut disk = ShadowDisk::new(4);
    let session = Fence::Session { settle_ms: 700 };
    claim(&mut disk, session);
    assert_eq!(settles(&mut disk), 700, "it may have served others");
    claim(&mut disk, session);
    disk.post(0, Op::Write, 0, 8);
    assert_eq!(disk.tags(), [0]);
    disk.shadow.closed();
    assert_eq!(disk.shadow.quiet(9), None);
    assert!(disk.shadow.opened().is_err(), "its write may be executed");
    assert_eq!(disk.shadow.quiet(9 + 699_999_999), None);
    assert!(disk.shadow.quiet(9 + 700_000_000).is_some());
    // The next process is not bound by the claim of the last one.
    disk.start();
    assert_eq!(disk.tags(), [0]);
    assert_eq!(settles(&mut disk), 0);
}

#[test]
fn what_was_said_of_io_is_not_taken_back_by_another_claim() {
    let mut disk = ShadowDisk::new(4);
    let session = |settle_ms| claimed(Fence::Session { settle_ms });
    claim(&mut disk, Fence::Session { settle_ms: 700 });
    // The process has no request of this disk, and does not declare its I/O for others over.
    assert!(disk.shadow.claim(disk.epoch, session(50)));
    assert_eq!(settles(&mut disk), 700);
    claim(&mut disk, Fence::Session { settle_ms: 700 });
    assert!(disk.shadow.claim(disk.epoch, session(50)));
    assert!(disk.shadow.started(disk.epoch).is_ok());
    assert_eq!(settles(&mut disk), 700);
    // This claim does.
    claim(&mut disk, Fence::Session { settle_ms: 700 });
    assert!(disk.shadow.claim(disk.epoch, claimed(Fence::Local)));
    assert!(disk.shadow.claim(disk.epoch, session(50)));
    assert!(disk.shadow.started(disk.epoch).is_ok());
    assert_eq!(settles(&mut disk), 50);
}

/// The process may have opened its storage, because tapdisk claims before it opens an image.
#[test]
fn what_was_claimed_counts_of_a_process_that_was_never_started() {
    let mut disk = ShadowDisk::new(4);
    let session = claimed(Fence::Session { settle_ms: 700 });
    disk.epoch = disk.shadow.opened().expect("nobody has it");
    assert!(disk.shadow.claim(disk.epoch, session));
    assert_eq!(settles(&mut disk), 700);
    // A claim before a refused start counts, too.
    let nothing = Claimed {
        operations: 0,
        ..session
    };
    disk.epoch = disk.shadow.opened().expect("it is over");
    assert!(disk.shadow.claim(disk.epoch, nothing));
    assert!(disk.shadow.started(disk.epoch).is_err());
    assert_eq!(settles(&mut disk), 700);
    // A process may declare that no I/O is in flight, started or not.
    disk.epoch = disk.shadow.opened().expect("it is over");
    assert!(disk.shadow.claim(disk.epoch, session));
    assert!(disk.shadow.claim(disk.epoch, claimed(Fence::Local)));
    assert_eq!(settles(&mut disk), 0);
}

/// Counts the accesses of the shadow to its memory.
struct Counted(Vec<TagEntry>, Rc<Cell<u64>>);

impl Deref for Counted {
    type Target = [TagEntry];
    fn deref(&self) -> &[TagEntry] {
        &self.0
    }
}

impl DerefMut for Counted {
    fn deref_mut(&mut self) -> &mut [TagEntry] {
        self.1.set(self.1.get() + 1);
        &mut self.0
    }
}

/// A process may start as often as it likes, and the queues wait for the lock during a start.
#[test]
fn a_start_after_the_first_one_looks_at_no_request() {
    const REQUESTS: u16 = 1000;
    let count = Rc::new(Cell::new(0));
    let mut shadow = Shadow::new(Counted(
        vec![TagEntry::FREE; REQUESTS.into()],
        count.clone(),
    ));
    shadow.set_death_limit(2);
    let mut epoch = shadow.opened().unwrap();
    assert!(shadow.started(epoch).is_ok());
    for tag in 0..REQUESTS {
        let read = request(Op::Read, 0, 8);
        shadow.post(DiskTag::new(tag), 0, &read, 1).unwrap();
    }
    let all = usize::from(REQUESTS);
    assert_eq!(shadow.deliver(epoch, all, 1, |_, _| {}).count, all);
    shadow.closed();
    assert!(shadow.quiet(1).is_some());
    epoch = shadow.opened().unwrap();
    let mut start = || {
        count.set(0);
        assert!(shadow.claim(epoch, Claimed::BEFORE));
        assert!(shadow.started(epoch).is_ok());
        count.get()
    };
    assert!(start() > REQUESTS.into());
    for _ in 0..3 {
        assert_eq!(start(), 0);
    }
}

/// Requests that wait for others keep their place.
#[test]
fn a_start_after_another_claim_keeps_what_waits_in_order() {
    let mut disk = ShadowDisk::live(4);
    disk.shadow.set_death_limit(2);
    disk.post(0, Op::Write, 0, 8);
    assert_eq!(disk.tags(), [0]);
    disk.die();
    disk.post(1, Op::Write, 4, 8);
    disk.start();
    assert_eq!(disk.info().isolated, 1);
    assert!(
        disk.shadow.has_deliverable(),
        "by which one waits for the other"
    );
    assert!(disk.shadow.claim(disk.epoch, Claimed::BEFORE));
    assert!(disk.shadow.started(disk.epoch).is_ok());
    assert_eq!(disk.tags(), [0]);
    assert_eq!(disk.commit(0, 2, 0, 0), Committed::Done(0));
    assert_eq!(disk.tags(), [1]);
    assert_eq!(disk.tags(), [], "it has it already");
    assert_eq!(disk.commit(1, 1, 0, 0), Committed::Done(1));
    assert_eq!(disk.info().delivered, 0);
}

#[test]
fn who_has_ended_all_its_io_says_so() {
    let mut disk = ShadowDisk::new(4);
    claim(&mut disk, Fence::Session { settle_ms: 700 });
    disk.post(0, Op::Write, 0, 8);
    assert_eq!(disk.tags(), [0]);
    let local = claimed(Fence::Local);
    assert!(!disk.shadow.claim(disk.epoch, local), "it has a request");
    assert_eq!(disk.commit(0, 1, 0, 0), Committed::Done(0));
    assert!(!disk.shadow.claim(disk.epoch + 1, local), "another one");
    assert!(disk.shadow.claim(disk.epoch, local));
    // From now on the process gets nothing.
    disk.post(2, Op::Write, 8, 8);
    assert!(!disk.shadow.has_deliverable());
    assert_eq!(settles(&mut disk), 0);
    disk.start();
    assert_eq!(disk.tags(), [2]);
}

/// For example, the process begins a mirror to a server: the guest does not wait for that.
#[test]
fn who_serves_says_that_its_io_is_over_later_and_serves_on() {
    let mut disk = ShadowDisk::new(4);
    let session = |settle_ms| claimed(Fence::Session { settle_ms });
    claim(&mut disk, Fence::Local);
    disk.post(0, Op::Write, 0, 8);
    assert_eq!(disk.tags(), [0]);
    assert!(!disk.shadow.claim(disk.epoch + 1, session(700)), "another");
    assert!(disk.shadow.claim(disk.epoch, session(700)));
    // For any other change of its claim it must start again, which is not allowed now.
    let more = Claimed {
        features: abi::FEATURE_MAPS,
        ..session(800)
    };
    let fewer = Claimed {
        operations: 0,
        ..session(800)
    };
    for other in [
        session(700),
        session(50),
        claimed(Fence::Local),
        more,
        fewer,
    ] {
        assert!(!disk.shadow.claim(disk.epoch, other), "{other:?}");
    }
    assert_eq!(disk.commit(0, 1, 0, 0), Committed::Done(0));
    // The wider claim works with no request in hand, too.
    assert!(disk.shadow.claim(disk.epoch, session(900)));
    disk.post(1, Op::Write, 8, 8);
    assert_eq!(disk.tags(), [1], "it is served on");
    assert_eq!(settles(&mut disk), 900);
    // Requests that it had before the wider claim are no exception.
    disk.start();
    assert_eq!(disk.tags(), [1]);
    assert!(disk.shadow.claim(disk.epoch, claimed(Fence::None)));
    disk.shadow.closed();
    assert_eq!(disk.shadow.quiet(0).map(|failed| failed.count), Some(1));
}

#[test]
fn what_cannot_be_fenced_is_not_executed_again() {
    let mut disk = ShadowDisk::new(8);
    claim(&mut disk, Fence::None);
    disk.post(0, Op::Write, 0, 8);
    disk.post(1, Op::Read, 64, 8);
    disk.post(2, Op::Write, 4, 8);
    disk.post(3, Op::Read, 128, 8);
    assert_eq!(disk.tags(), [0, 1, 3], "the third one waits for the first");
    assert_eq!(disk.commit(1, 1, 0, 0), Committed::Done(1));
    disk.shadow.closed();
    let failed = disk.shadow.quiet(0).unwrap();
    assert_eq!((failed.count, failed.queues, failed.more), (1, 1, false));
    assert_eq!(disk.reap(0), [(0, ResponseStatus::Error)]);
    assert_eq!(disk.reap(1), [(1, ResponseStatus::Okay)]);
    // The next process gets requests that the old one never had and requests that change nothing; only the latter are
    // replays.
    disk.start();
    assert_eq!(disk.tags(), [2, 3]);
    assert_eq!(disk.info().replayed, 1);
    assert_eq!(disk.commit(2, 1, 0, 0), Committed::Done(0));
    assert_eq!(disk.commit(3, 2, 0, 0), Committed::Done(1));
    disk.post(0, Op::Flush, 0, 0);
    assert_eq!(disk.tags(), [0], "a flush of its own time waits for nobody");
}

#[test]
fn deliveries_are_counted() {
    let mut disk = ShadowDisk::live(2);
    disk.post(0, Op::Write, 0, 8);
    for count in 1..4u32 {
        let epoch = disk.epoch;
        let mut seen = Vec::new();
        let _ = disk.shadow.deliver(epoch, 8, 1, |_, desc| seen.push(*desc));
        let desc = seen[0];
        assert_eq!(desc.deliveries, count);
        if count == 2 {
            disk.die();
            disk.start();
        } else {
            let returned = disk.commit(0, desc.generation, abi::COMPLETION_RETURNED, 0);
            assert_eq!(returned, Committed::Returned);
        }
    }
    let (mut last, epoch) = (None, disk.epoch);
    let _ = disk
        .shadow
        .deliver(epoch, 8, 1, |_, desc| last = Some(*desc));
    let last = last.expect("it was returned");
    assert_eq!(last.deliveries, 4);
    assert_eq!(disk.commit(0, last.generation, 0, 0), Committed::Done(0));
    assert_eq!(disk.reap(0), [(0, ResponseStatus::Okay)]);
    disk.post(0, Op::Write, 0, 8);
    let _ = disk
        .shadow
        .deliver(epoch, 8, 1, |_, desc| assert_eq!(desc.deliveries, 1));
}

#[test]
fn every_process_is_fenced_also_one_that_has_nothing() {
    let mut disk = ShadowDisk::new(4);
    let _epoch = disk.shadow.opened().expect("nobody has it");
    assert_eq!(disk.shadow.quiet(0).unwrap().count, 0);
    assert_eq!(disk.shadow.state(), abi::STATE_OPEN, "it is alive");
    disk.shadow.closed();
    assert_eq!(disk.shadow.opened(), Err(OpenError::Fencing));
    assert_eq!(disk.shadow.quiet(0).unwrap().count, 0);
    assert_eq!(disk.shadow.state(), abi::STATE_IDLE);
    disk.shadow.closed();
    assert_eq!(disk.shadow.state(), abi::STATE_IDLE);
    assert_eq!(disk.shadow.opened(), Ok(2));
}

#[test]
fn a_queue_that_is_gone_leaves_only_what_the_process_has() {
    let mut disk = ShadowDisk::live(8);
    disk.post(1, Op::Write, 0, 8);
    disk.post(3, Op::Write, 100, 8);
    disk.post(5, Op::Write, 0, 4);
    disk.post(0, Op::Write, 4, 8);
    assert_eq!(disk.tags(), [1, 3]);
    assert_eq!(disk.done(3), Committed::Done(1));
    assert_eq!(disk.shadow.orphan(1), 1);
    assert_eq!(disk.shadow.orphan(1), 0, "already told");
    assert_eq!((disk.shadow.orphans(), disk.shadow.waiting()), (1, 1));
    assert_eq!(disk.reap(1), []);
    assert_eq!(disk.tags(), [], "an orphan is still in the way");
    assert_eq!(disk.done(1), Committed::Released);
    assert_eq!(disk.shadow.orphans(), 0);
    assert_eq!(disk.tags(), [0]);
    disk.post(1, Op::Read, 0, 8);
    disk.post(5, Op::Read, 0, 8);
}

#[test]
fn orphans_of_a_dead_process_are_released_by_the_fence() {
    let mut disk = ShadowDisk::live(8);
    disk.post(1, Op::Write, 0, 8);
    disk.post(0, Op::Write, 4, 8);
    disk.tags();
    disk.shadow.closed();
    assert_eq!(disk.shadow.orphan(1), 1);
    assert_eq!(disk.shadow.orphans(), 1, "its I/O may still be running");
    assert_eq!(disk.shadow.quiet(0).unwrap().count, 0);
    assert_eq!((disk.shadow.orphans(), disk.shadow.delivered()), (0, 0));
    disk.start();
    assert_eq!(disk.tags(), [0]);
}

#[test]
fn a_queue_that_closes_gets_back_what_is_not_delivered() {
    let mut disk = ShadowDisk::live(8);
    disk.post(1, Op::Write, 0, 8);
    disk.post(3, Op::Write, 0, 8);
    disk.post(0, Op::Write, 0, 8);
    disk.tags();
    assert_eq!(disk.shadow.withdraw(1), 1);
    assert_eq!(disk.reap(1), [(3, ResponseStatus::Error)]);
    assert_eq!((disk.shadow.delivered(), disk.shadow.waiting()), (1, 1));
    assert_eq!(disk.done(1), Committed::Done(1));
    assert_eq!(disk.reap(1), [(1, ResponseStatus::Okay)]);
    assert_eq!(disk.tags(), [0]);
}

#[test]
fn requests_fail_only_while_nobody_serves_them() {
    let mut disk = ShadowDisk::live(8);
    for tag in 0..4 {
        disk.post(tag, Op::Write, 0, 8);
    }
    assert_eq!(disk.tags(), [0]);
    assert_eq!(disk.shadow.fail_waiting(8).count, 0, "live");
    disk.shadow.closed();
    // Requests of the process stay, because its I/O may be running.
    let failed = disk.shadow.fail_waiting(1);
    assert_eq!((failed.count, failed.queues, failed.more), (1, 2, true));
    let failed = disk.shadow.fail_waiting(8);
    assert_eq!((failed.count, failed.queues, failed.more), (2, 3, false));
    let error = |tag| (tag, ResponseStatus::Error);
    assert_eq!(disk.reap(0), [error(2)]);
    assert_eq!(disk.reap(1), [error(1), error(3)]);
    assert_eq!(disk.shadow.fail_waiting(8).count, 0, "not fenced");
    assert_eq!(disk.shadow.quiet(0).unwrap().count, 0);
    let failed = disk.shadow.fail_waiting(8);
    assert_eq!((failed.count, failed.queues, failed.more), (1, 1, false));
    assert_eq!(disk.reap(0), [error(0)]);
    disk.start();
    disk.post(0, Op::Flush, 0, 0);
    disk.post(1, Op::Write, 0, 8);
    assert_eq!(disk.tags(), [0, 1], "the replay is over");
}

#[test]
fn one_call_does_not_look_at_everything() {
    let mut disk = ShadowDisk::live(4096);
    // Each of these requests must be compared with all before it.
    for tag in 0..4096 {
        disk.post(tag, Op::Read, 0, 100_000);
    }
    let mut calls = 0;
    let mut seen = 0;
    while disk.shadow.has_deliverable() {
        disk.now += 1;
        let step = disk
            .shadow
            .deliver(disk.epoch, usize::MAX, disk.now, |_, _| {});
        assert!(step.count < 4096);
        seen += step.count;
        calls += 1;
        assert_eq!(step.more, seen < 4096);
    }
    assert_eq!(seen, 4096);
    assert!(calls > 100, "{calls}");
}
