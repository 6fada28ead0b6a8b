// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The shadow among threads. It is behind one lock, so no memory order is tested, but the order is in which queue,
//! process and the end of the process get the lock, and which of them sleeps.

use loom::sync::{Arc, Mutex, Notify};
use loom::thread;
use ring::numbers::DiskTag;
use ring::response::ResponseStatus;
use ring::tap::checked::{Commit, RequestOutcome};
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

/// A disk as its threads share it.
struct TapState {
    shadow: Shadow<Vec<TagEntry>>,
    epoch: u64,
    /// The process has found no request and must be woken.
    wanted: bool,
    /// The process was woken.
    woken: bool,
}

struct SharedTap {
    disk: Mutex<TapState>,
    to_process: Notify,
    to_queue: Notify,
}

impl SharedTap {
    fn new() -> Arc<Self> {
        let mut shadow = Shadow::new(vec![TagEntry::FREE; 2]);
        let epoch = shadow.opened().expect("nobody has it");
        assert!(shadow.started(epoch).is_ok());
        Arc::new(Self {
            disk: Mutex::new(TapState {
                shadow,
                epoch,
                wanted: false,
                woken: false,
            }),
            to_process: Notify::new(),
            to_queue: Notify::new(),
        })
    }

    fn announce(&self, disk: &mut TapState) {
        if disk.wanted && disk.shadow.has_deliverable() {
            disk.wanted = false;
            disk.woken = true;
            self.to_process.notify();
        }
    }

    fn post(&self, tag: u16) {
        let mut disk = self.disk.lock().unwrap();
        assert_eq!(disk.shadow.post(DiskTag::new(tag), 0, &WRITE, 0), Ok(()));
        self.announce(&mut disk);
    }

    /// Fetches a request; if there is none, sets `wanted` without releasing the lock, unless `careless`.
    fn fetch(&self, careless: bool) -> Option<(u16, u32)> {
        let mut got = None;
        let mut disk = self.disk.lock().unwrap();
        let epoch = disk.epoch;
        let _more = disk.shadow.deliver(epoch, 1, 0, |tag, desc| {
            got = Some((tag.number(), desc.generation))
        });
        if careless && got.is_none() {
            drop(disk);
            disk = self.disk.lock().unwrap();
        }
        disk.wanted = got.is_none();
        got
    }

    fn commit(&self, epoch: u64, (tag, generation): (u16, u32)) -> Committed {
        let mut disk = self.disk.lock().unwrap();
        let outcome = RequestOutcome::Finished(ResponseStatus::Okay);
        let committed = disk.shadow.commit(
            epoch,
            &Commit {
                tag: DiskTag::new(tag),
                generation,
                outcome,
            },
        );
        self.announce(&mut disk);
        if committed == Committed::Done(0) {
            self.to_queue.notify();
        }
        committed
    }
}

/// A queue posts two requests of which one waits for the other; a process serves them.
fn serve() {
    let shared = SharedTap::new();
    let process = shared.clone();
    let process = thread::spawn(move || {
        let mut left = 2;
        while left > 0 {
            match process.fetch(false) {
                None => process.to_process.wait(),
                Some(request) => {
                    assert_eq!(process.commit(1, request), Committed::Done(0));
                    left -= 1;
                }
            }
        }
    });
    shared.post(1);
    shared.post(0);
    let mut results = Vec::new();
    while results.len() < 2 {
        let reap = |tag: DiskTag, status| results.push((tag.number(), status));
        let reaped = shared.disk.lock().unwrap().shadow.reap(0, 2, reap);
        if reaped == 0 {
            shared.to_queue.wait();
        }
    }
    assert_eq!(
        results,
        [(1, ResponseStatus::Okay), (0, ResponseStatus::Okay)]
    );
    process.join().unwrap();
}

#[test]
fn nobody_sleeps_for_ever() {
    loom::model(serve);
}

/// A process looks for requests while one is posted, and goes to sleep if it finds none.
fn look_once(careless: bool) {
    let shared = SharedTap::new();
    let process = shared.clone();
    let process = thread::spawn(move || process.fetch(careless).is_some());
    shared.post(0);
    let found = process.join().unwrap();
    let disk = shared.disk.lock().unwrap();
    assert!(found || disk.woken, "sleeps with a request to fetch");
}

#[test]
fn a_process_that_finds_nothing_is_woken() {
    loom::model(|| look_once(false));
}

#[test]
#[should_panic(expected = "sleeps with a request to fetch")]
fn a_process_that_says_too_late_that_it_sleeps_is_not_woken() {
    loom::model(|| look_once(true));
}

/// A process commits while it dies, and the next one starts.
#[test]
fn a_commit_that_meets_the_end_counts_once() {
    loom::model(|| {
        let shared = SharedTap::new();
        shared.post(0);
        let delivered = shared.fetch(false).expect("it was posted");
        let dying = shared.clone();
        let dying = thread::spawn(move || dying.commit(1, delivered));
        shared.disk.lock().unwrap().shadow.closed();
        {
            let mut disk = shared.disk.lock().unwrap();
            assert_eq!(disk.shadow.quiet(0).unwrap().count, 0);
            disk.epoch = disk.shadow.opened().expect("it is fenced");
        }
        let epoch = {
            let mut disk = shared.disk.lock().unwrap();
            let epoch = disk.epoch;
            assert!(disk.shadow.started(epoch).is_ok());
            epoch
        };
        let again = shared.fetch(false);
        let second = again.map(|request| shared.commit(epoch, request));
        let first = dying.join().unwrap();
        match first {
            Committed::Done(0) => assert_eq!(second, None),
            Committed::Refused => assert_eq!(second, Some(Committed::Done(0))),
            other => panic!("{other:?}"),
        }
        let mut results = 0;
        let reap = |_, _| results += 1;
        shared.disk.lock().unwrap().shadow.reap(0, 2, reap);
        assert_eq!(results, 1);
    });
}
