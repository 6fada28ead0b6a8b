// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Requests that a queue executes without the process, among threads: a process recalls mappings, another one begins,
//! and a request is unblocked while its queue is about to sleep. The lock of the disk protects the first two, except
//! for the I/O itself. The last is a race between a flag and a wake-up, which have no lock.

use loom::sync::atomic::{fence, AtomicBool, Ordering};
use loom::sync::{Arc, Condvar, Mutex, MutexGuard, Notify};
use loom::thread;
use ring::numbers::DiskTag;
use ring::response::ResponseStatus;
use ring::tap::checked::{Commit, RequestOutcome};
use ring::tap::extent::{BackingNumber, DataExtent, ExtentAccess, Sectors, Source};
use ring::tap::map::tree::{Leaf, LeafSlot};
use ring::tap::map::{ExtentMap, MapBacking};
use ring::tap::shadow::passthrough::{MapLookup, RequestParts};
use ring::tap::shadow::{Committed, Op, PostedRequest, Shadow};
use ring::tap::table::TagEntry;

const WRITE: PostedRequest = PostedRequest {
    op: Op::Write,
    preflush: false,
    fua: false,
    sector: 0,
    sectors: 8,
    segments: 1,
};
const DISK: u64 = 64;

type DiskMap = Option<Box<ExtentMap<Vec<LeafSlot>, Vec<Leaf>>>>;

/// State that the lock of a disk protects.
struct DirectState {
    shadow: Shadow<Vec<TagEntry>, DiskMap>,
    epoch: u64,
    /// Number of processes that wait until no request in a range is executed.
    recallers: u32,
}

struct SharedDirect {
    disk: Mutex<DirectState>,
    /// The processes wait here.
    ready: Condvar,
    /// I/O of the queue is running, at the mapped place.
    used: AtomicBool,
    /// The process uses that place for other data.
    reused: AtomicBool,
    /// The queue can begin something.
    resumable: AtomicBool,
    /// The queue's thread is awake or will wake.
    notified: AtomicBool,
    /// The queue must give express up, and is woken for that.
    withdrawn: AtomicBool,
    express: Notify,
}

fn map() -> DiskMap {
    let mut map = ExtentMap::new(vec![LeafSlot::FREE; 1], vec![Leaf::FREE; 1], DISK, true);
    let backing = MapBacking {
        sectors: DISK,
        block: 1,
        writable: true,
    };
    assert!(map.add_backing(number(), backing));
    Some(Box::new(map))
}

fn number() -> BackingNumber {
    BackingNumber::new(0).expect("a small number")
}

impl SharedDirect {
    /// Returns a disk that is served, with two queues that can execute mapped requests. Nothing is mapped yet.
    fn new() -> Arc<Self> {
        let mut shadow = Shadow::with_map(vec![TagEntry::FREE; 2], map());
        shadow.set_able(0, true);
        shadow.set_able(1, true);
        let epoch = shadow.opened().expect("nobody has it");
        assert!(shadow.started(epoch).is_ok());
        Arc::new(Self {
            disk: Mutex::new(DirectState {
                shadow,
                epoch,
                recallers: 0,
            }),
            ready: Condvar::new(),
            used: AtomicBool::new(false),
            reused: AtomicBool::new(false),
            resumable: AtomicBool::new(false),
            notified: AtomicBool::new(false),
            withdrawn: AtomicBool::new(false),
            express: Notify::new(),
        })
    }

    /// Returns a disk like [`new`](Self::new), all of which is mapped.
    fn mapped() -> Arc<Self> {
        let shared = Self::new();
        shared.lock().say();
        shared
    }

    fn lock(&self) -> MutexGuard<'_, DirectState> {
        self.disk.lock().expect("no thread has panicked")
    }

    /// The queue does I/O at the mapped place.
    fn transfer(&self) {
        assert!(
            !self.reused.load(Ordering::Relaxed),
            "begun in what is reused"
        );
        self.used.store(true, Ordering::Relaxed);
        thread::yield_now();
        self.finish_transfer();
    }

    fn finish_transfer(&self) {
        assert!(
            !self.reused.load(Ordering::Relaxed),
            "reused while it is used"
        );
        self.used.store(false, Ordering::Relaxed);
    }

    /// Ends the I/O. Returns the result of the request.
    fn ended(&self, tag: u16) -> Option<ResponseStatus> {
        let mut disk = self.lock();
        let status = disk.shadow.ended(DiskTag::new(tag), ResponseStatus::Okay);
        self.announce(&mut disk);
        if disk.recallers > 0 {
            self.ready.notify_all();
        }
        status
    }

    /// Wakes the first queue if it can begin a request.
    fn announce(&self, disk: &mut DirectState) {
        if disk.shadow.take_withdrawn() & 1 != 0 {
            self.withdrawn.store(true, Ordering::Release);
            self.express.notify();
        }
        disk.shadow.sort();
        if disk.shadow.take_resumable() & 1 != 0 {
            self.resumable.store(true, Ordering::Release);
            fence(Ordering::SeqCst);
            self.notified.swap(true, Ordering::AcqRel);
            fence(Ordering::SeqCst);
        }
    }

    /// The queue takes a request and executes it if it can. If it is `careless` it looks up the place before it has
    /// registered the execution.
    fn execute(&self, careless: bool) {
        let tag = DiskTag::new(0);
        let mut disk = self.lock();
        assert_eq!(disk.shadow.post(tag, 0, &WRITE, 0), Ok(()));
        let all = Sectors::new(0, 8).expect("not empty");
        let mut found = false;
        if careless {
            found = disk
                .shadow
                .map()
                .transfer(&all, ExtentAccess::ReadWrite, &mut RequestParts::default())
                .is_ok();
            drop(disk);
            disk = self.lock();
        }
        let begun = disk
            .shadow
            .begin(tag, &mut RequestParts::default())
            .is_some();
        drop(disk);
        if begun || found {
            self.transfer();
        }
        if begun {
            assert_eq!(self.ended(0), Some(ResponseStatus::Okay));
        }
    }

    /// The queue gives express up as soon as it must.
    fn leave_express(&self) {
        while !self.withdrawn.load(Ordering::Acquire) {
            self.express.wait();
        }
        let mut disk = self.lock();
        disk.shadow.gave_up_express(0);
        self.announce(&mut disk);
        self.ready.notify_all();
    }

    /// The process recalls everything, and uses the place for other data.
    fn reuse(&self) {
        let mut disk = self.lock();
        disk.map().recall(&Sectors::ALL);
        self.announce(&mut disk);
        disk.recallers += 1;
        while disk.shadow.is_executing(&Sectors::ALL) {
            disk = self.ready.wait(disk).expect("no thread has panicked");
        }
        disk.recallers -= 1;
        drop(disk);
        self.reused.store(true, Ordering::Relaxed);
        assert!(
            !self.used.load(Ordering::Relaxed),
            "reused while it is used"
        );
    }
}

impl DirectState {
    fn map(&mut self) -> &mut ExtentMap<Vec<LeafSlot>, Vec<Leaf>> {
        self.shadow.map().as_mut().expect("it has one")
    }

    /// The process maps the disk.
    fn say(&mut self) {
        let extent = DataExtent {
            range: Sectors::new(0, DISK).expect("not empty"),
            place: 0,
            source: Source::Backing(number()),
            access: ExtentAccess::ReadWrite,
        };
        let generation = self.map().generation();
        assert_eq!(self.map().set(&extent, generation), Ok(()));
    }

    /// The process fetches a request.
    fn fetch(&mut self) -> Option<(DiskTag, u32)> {
        let (epoch, mut got) = (self.epoch, None);
        let _more = self
            .shadow
            .deliver(epoch, 1, 0, |tag, desc| got = Some((tag, desc.generation)));
        got
    }
}

fn recall_against_execution(careless: bool) {
    let shared = SharedDirect::mapped();
    let queue = shared.clone();
    let queue = thread::spawn(move || queue.execute(careless));
    shared.reuse();
    queue.join().expect("the queue ends");
    if !careless {
        // One of them has executed it.
        let mut disk = shared.lock();
        let mut info = ring::tap::abi::Info::default();
        disk.shadow.describe(&mut info, 0);
        assert_eq!(u64::from(disk.fetch().is_some()), 1 - info.direct);
    }
}

#[test]
fn what_was_taken_back_is_not_used() {
    loom::model(|| recall_against_execution(false));
}

#[test]
#[should_panic(expected = "reuse")]
fn planted_a_queue_that_says_too_late_what_it_executes_is_found() {
    loom::model(|| recall_against_execution(true));
}

/// A queue with express executes a request while the process recalls everything. A `careless` queue gives express up before
/// its I/O has ended.
fn recall_against_express(careless: bool) {
    let shared = SharedDirect::mapped();
    {
        let (tag, mut disk) = (DiskTag::new(0), shared.lock());
        disk.shadow.set_express_streak(1);
        assert_eq!(disk.shadow.take_withdrawn(), 0);
        assert_eq!(disk.shadow.post(tag, 0, &WRITE, 0), Ok(()));
        let begun = disk.shadow.begin(tag, &mut RequestParts::default());
        assert!(begun.is_some());
        assert!(disk.shadow.ended(tag, ResponseStatus::Okay).is_some());
        assert!(disk.shadow.offer_express(0).is_some());
    }
    let queue = shared.clone();
    let queue = thread::spawn(move || {
        if queue.withdrawn.load(Ordering::Relaxed) {
            return queue.leave_express();
        }
        assert!(
            !queue.reused.load(Ordering::Relaxed),
            "begun in what is reused"
        );
        queue.used.store(true, Ordering::Relaxed);
        if careless {
            queue.leave_express();
            return queue.finish_transfer();
        }
        queue.finish_transfer();
        queue.leave_express();
    });
    shared.reuse();
    queue.join().expect("the queue ends");
}

#[test]
fn what_is_in_express_is_over_before_its_place_is_used_again() {
    loom::model(|| recall_against_express(false));
}

#[test]
#[should_panic(expected = "reuse")]
fn planted_a_queue_that_gives_express_up_too_early_is_found() {
    loom::model(|| recall_against_express(true));
}

/// The second of two requests waits for the first, and is begun or not while the process recalls everything.
fn recall_against_resumption() {
    let shared = SharedDirect::mapped();
    let (first, second) = (DiskTag::new(0), DiskTag::new(1));
    {
        let mut disk = shared.lock();
        assert_eq!(disk.shadow.post(first, 0, &WRITE, 0), Ok(()));
        assert!(disk
            .shadow
            .begin(first, &mut RequestParts::default())
            .is_some());
        assert_eq!(disk.shadow.post(second, 0, &WRITE, 0), Ok(()));
        shared.announce(&mut disk);
    }
    let queue = shared.clone();
    let queue = thread::spawn(move || {
        queue.transfer();
        assert_eq!(queue.ended(0), Some(ResponseStatus::Okay));
        let mut begun = false;
        let mut disk = queue.lock();
        disk.shadow.resume(0, 2, |_, _, _| begun = true);
        drop(disk);
        if begun {
            queue.transfer();
            assert_eq!(queue.ended(1), Some(ResponseStatus::Okay));
        }
        begun
    });
    shared.reuse();
    let begun = queue.join().expect("the queue ends");
    assert_eq!(shared.lock().fetch().is_none(), begun);
}

#[test]
fn what_waits_is_begun_or_taken_back() {
    loom::model(recall_against_resumption);
}

/// A process begins while a mapping of its predecessor is in use. Its first recall waits for that.
fn start_against_execution() {
    let shared = SharedDirect::mapped();
    {
        let mut disk = shared.lock();
        let tag = DiskTag::new(0);
        assert_eq!(disk.shadow.post(tag, 0, &WRITE, 0), Ok(()));
        assert!(disk
            .shadow
            .begin(tag, &mut RequestParts::default())
            .is_some());
        shared.used.store(true, Ordering::Relaxed);
    }
    let queue = shared.clone();
    let queue = thread::spawn(move || {
        queue.finish_transfer();
        assert_eq!(queue.ended(0), Some(ResponseStatus::Okay));
    });
    {
        let mut disk = shared.lock();
        disk.shadow.closed();
        assert!(disk.shadow.quiet(0).is_some());
        let epoch = disk.shadow.opened().expect("it is fenced");
        assert!(disk.shadow.started(epoch).is_ok());
        assert!(disk.map().is_empty());
        disk.epoch = epoch;
    }
    shared.reuse();
    queue.join().expect("the queue ends");
}

#[test]
fn a_process_that_begins_waits_for_what_the_last_one_has_said() {
    loom::model(start_against_execution);
}

/// A request is unblocked while its queue goes through a pass. A `careless` queue does not check again, after it has
/// cleared its wake-up, whether it can begin a request.
fn pass_against_commit(careless: bool) {
    let shared = SharedDirect::new();
    let (first, second) = (DiskTag::new(0), DiskTag::new(1));
    let (epoch, generation) = {
        let mut disk = shared.lock();
        assert_eq!(disk.shadow.post(first, 1, &WRITE, 0), Ok(()));
        let (_, generation) = disk.fetch().expect("nothing is mapped");
        disk.say();
        assert_eq!(disk.shadow.post(second, 0, &WRITE, 0), Ok(()));
        assert!(disk
            .shadow
            .begin(second, &mut RequestParts::default())
            .is_none());
        shared.announce(&mut disk);
        (disk.epoch, generation)
    };
    let process = shared.clone();
    let process = thread::spawn(move || {
        let mut disk = process.lock();
        let commit = Commit {
            tag: first,
            generation,
            outcome: RequestOutcome::Finished(ResponseStatus::Okay),
        };
        assert_eq!(disk.shadow.commit(epoch, &commit), Committed::Done(1));
        process.announce(&mut disk);
    });
    // Rearm before the pass looks at anything.
    let rearm = || {
        shared.notified.store(false, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    };
    rearm();
    let mut begun = false;
    if shared.resumable.load(Ordering::Relaxed) {
        shared.resumable.swap(false, Ordering::AcqRel);
        let mut disk = shared.lock();
        disk.shadow.resume(0, 1, |_, _, _| begun = true);
        drop(disk);
    }
    rearm();
    let again = !careless && shared.resumable.load(Ordering::Relaxed);
    process.join().expect("the process ends");
    let woken = shared.notified.load(Ordering::Relaxed);
    assert!(begun || again || woken, "sleeps over what it can begin");
}

#[test]
fn a_queue_does_not_sleep_over_what_it_can_begin() {
    loom::model(|| pass_against_commit(false));
}

#[test]
#[should_panic(expected = "sleeps over what it can begin")]
fn planted_a_queue_that_does_not_look_again_is_found() {
    loom::model(|| pass_against_commit(true));
}
