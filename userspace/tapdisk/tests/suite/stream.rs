// SPDX-License-Identifier: MIT OR Apache-2.0
//! Stream: the image of a disk takes over the data of its backing images, beside its guest and through deaths of its
//! process.

use crate::common::guest::{Guest, Step};
use crate::common::images::{answered, file, steps, Folder, ServedImage, SIZE};
use crate::common::{give_or_refuse, Process, LIMIT};
use control::stats::{Stream, Streaming};
use control::tapdisk::{Call, FdGrant, Open, Reply, Request, RequestedFile};
use control::{Channel, Code, Failure};
use diskio::{Bytes, Data, Errno};
use drivers::{Attributes, Content, Disk, DiskInfo, Driver, DriverLimits, Extent, Fence};
use ring::response::ResponseStatus as Answer;
use ring::tap::shadow::Op;
use std::cell::RefCell;
use std::fs::{self, File};
use std::future::poll_fn;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::Arc;
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};
use tapdev::fake::FakeTap;

fn stream(process: &mut Process, rate: u64) -> Result<Stream, Failure> {
    match process.ask(Request::Stream { rate, anew: false }, None)? {
        Reply::Stream(stream) => Ok(stream),
        other => panic!("{other:?}"),
    }
}

/// Asks until `is_so` holds; the limit is longer than any of these waits.
fn until(process: &mut Process, rate: u64, is_so: impl Fn(&Stream) -> bool) -> Stream {
    let start = Instant::now();
    loop {
        let found = stream(process, rate).expect("a stream");
        if is_so(&found) {
            return found;
        }
        assert!(start.elapsed() < LIMIT, "{found:?}");
    }
}

fn over(stream: &Stream) -> bool {
    stream.state != Streaming::Running
}

/// Lowest backing image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    /// As long as the disk, with something everywhere.
    Full,
    /// Longer than the disk, with holes that end within clusters, and something behind the disk's end.
    Sparse,
}

impl Base {
    /// Makes it; returns the content that the disk shows.
    fn make(self, folder: &Folder) -> Vec<u8> {
        let all = folder.raw("base.img", 9);
        if self == Base::Full {
            return all;
        }
        let file = File::create(folder.path("base.img")).expect("a file");
        file.set_len(SIZE + (3 << 20)).expect("a size");
        let mut model = vec![0; all.len()];
        for at in (0..all.len()).step_by(300 << 10) {
            let end = all.len().min(at + (100 << 10));
            file.write_all_at(&all[at..end], at as u64)
                .expect("written");
            model[at..end].copy_from_slice(&all[at..end]);
        }
        // This would be visible when the disk grows, unless the stream hides it.
        file.write_all_at(&all[..1 << 20], SIZE - 4096)
            .expect("written");
        model[all.len() - 4096..].copy_from_slice(&all[..4096]);
        model
    }
}

/// Makes a raw image, one over it with some data, and an empty one over both; returns the top one and the content.
fn chain(folder: &Folder, options: &str, base: Base) -> (ServedImage, Vec<u8>) {
    let mut model = base.make(folder);
    let below = match base {
        Base::Full => SIZE,
        Base::Sparse => SIZE + (3 << 20),
    };
    let create = |name: &str, below: &str, format: &str, size: u64| {
        let size = size.to_string();
        folder.img(&[
            "create", "-f", "qcow2", "-o", options, "-b", below, "-F", format, name, &size,
        ]);
    };
    create("mid.qcow2", "base.img", "raw", below);
    let mid = ServedImage {
        path: folder.path("mid.qcow2"),
        driver: "qcow2",
        files: 1,
    };
    let fake = FakeTap::new(4).expect("a node");
    let (process, _) = mid.start(&fake);
    for (sector, byte) in [(1, 1), (700, 2), (2500, 3), (8000, 4)] {
        answered(&fake, Op::Write, sector, &[byte; 4096]);
        model[sector as usize * 512..][..4096].fill(byte);
    }
    process.exit();
    create("leaf.qcow2", "mid.qcow2", "qcow2", SIZE);
    let leaf = ServedImage {
        path: folder.path("leaf.qcow2"),
        driver: "qcow2",
        files: 2,
    };
    (leaf, model)
}

/// Returns whether the header of an image still names another one.
fn goes_on(folder: &Folder, name: &str) -> bool {
    folder
        .img(&["info", "-f", "qcow2", "-U", name])
        .contains("backing file:")
}

/// A guest works on an image over two others during a stream, while its process is killed again and again. After each
/// death the image is valid; at the end it has no backing image.
fn endure(test: &str, options: &str, base: Base) {
    let Some(folder) = Folder::new(test) else {
        return;
    };
    let (mut served, model) = chain(&folder, options, base);
    let below = ["base.img", "mid.qcow2"].map(|name| fs::read(folder.path(name)).expect("read"));
    let fake = FakeTap::new(16).expect("a node");
    let (mut process, _) = served.start(&fake);
    let mut guest = Guest::new(&fake, model, 8);
    // All of it takes longer than a second, in pieces that are as long as clusters at least.
    let mut rate = 4 << 20;
    stream(&mut process, rate).expect("a stream");
    let mut deaths = 0;
    for step in steps() {
        if matches!(step, Step::Kill) {
            deaths += 1;
            if deaths % 2 == 0 {
                until(&mut process, rate, |stream| {
                    over(stream) || stream.copied > 0
                });
            }
            if deaths == 5 {
                // The stream ends while the guest works.
                rate = u64::MAX;
            }
            process.kill();
            folder.check("qcow2", "leaf.qcow2", true);
            if !goes_on(&folder, "leaf.qcow2") {
                served.files = 0;
            }
            process = served.start(&fake).0;
            stream(&mut process, rate).expect("a stream");
        }
        guest.send(&step);
    }
    guest.finish();
    let ended = until(&mut process, u64::MAX, over);
    assert_eq!(ended.state, Streaming::Done);
    assert!(!goes_on(&folder, "leaf.qcow2"));
    // A second stream has nothing to do.
    assert_eq!(
        stream(&mut process, 1).expect("a stream").state,
        Streaming::Done
    );
    // No process needs them, not even the next one after a death.
    for (name, before) in ["base.img", "mid.qcow2"].into_iter().zip(below) {
        assert!(
            fs::read(folder.path(name)).expect("read") == before,
            "{name}"
        );
        fs::remove_file(folder.path(name)).expect("remove");
    }
    served.files = 0;
    for step in steps().iter().take(50) {
        guest.send(step);
    }
    process.kill();
    folder.check("qcow2", "leaf.qcow2", true);
    let (mut process, _) = served.start(&fake);
    guest.finish();
    // No data of a backing image appears behind the old end.
    let size = SIZE + (4 << 20);
    let grown = process.ask(Request::Grow { size }, None);
    assert!(matches!(grown, Ok(Reply::Disk(_))), "{grown:?}");
    process.exit();
    folder.img(&["check", "-r", "leaks", "leaf.qcow2"]);
    folder.check("qcow2", "leaf.qcow2", false);
    guest.model.resize(size as usize, 0);
    assert!(folder.content("qcow2", "leaf.qcow2") == guest.model);
    // It can get a backing image again, and grow.
    folder.raw("other.img", 1);
    folder.img(&[
        "rebase",
        "-u",
        "-f",
        "qcow2",
        "-b",
        "other.img",
        "-F",
        "raw",
        "leaf.qcow2",
    ]);
    assert!(goes_on(&folder, "leaf.qcow2"));
}

#[test]
fn image_takes_over_what_is_below_it() {
    endure("takes_over", "compat=1.1", Base::Full);
}

#[test]
fn image_takes_over_what_is_longer_and_sparse() {
    endure("takes_over_sparse", "compat=1.1", Base::Sparse);
}

#[test]
fn image_with_large_clusters_takes_over_what_is_below_it() {
    endure("takes_over_large", "cluster_size=2M", Base::Full);
    endure("takes_over_large_sparse", "cluster_size=2M", Base::Sparse);
}

#[test]
fn image_of_version_2_takes_over_what_is_below_it() {
    endure("version_2_takes_over", "compat=0.10", Base::Full);
    endure("version_2_takes_over_sparse", "compat=0.10", Base::Sparse);
}

#[test]
fn image_with_subclusters_takes_over_what_is_below_it() {
    let options = "extended_l2=on,cluster_size=128k";
    endure("subclusters_take_over", options, Base::Full);
    endure("subclusters_take_over_sparse", options, Base::Sparse);
}

#[test]
fn rate_is_kept_and_a_pause_and_an_end_are_heeded() {
    let Some(folder) = Folder::new("rate_is_kept_and_a_pause") else {
        return;
    };
    let (served, model) = chain(&folder, "compat=1.1", Base::Full);
    let fake = FakeTap::new(4).expect("a node");
    let (mut process, _) = served.start(&fake);
    // A piece takes days.
    stream(&mut process, 1).expect("a stream");
    let first = until(&mut process, 1, |stream| stream.copied > 0);
    assert_eq!((first.copied, first.offset), (1 << 20, 1 << 20));
    answered(&fake, Op::Write, 4000, &[7; 512]);
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let (reply, _) = served.ask(&mut process, Request::Unpause(served.question()));
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    // Another process may have had the image during the pause, so the stream checks all of it again.
    let anew = until(&mut process, 1, |stream| stream.copied > 0);
    assert!(anew.offset > 1 << 20 && anew.copied <= 1 << 20, "{anew:?}");
    let ended = until(&mut process, 0, over);
    assert_eq!(ended.state, Streaming::Ended);
    assert!(goes_on(&folder, "leaf.qcow2"));
    // Clusters that were copied are the image's own, and the next stream finds the rest.
    stream(&mut process, 1).expect("a stream");
    let slow = until(&mut process, 1, |stream| stream.copied > 0);
    // A poller that is too slow sees only the end of this.
    let begun = Instant::now();
    let rate = 2 << 20;
    let rest = until(&mut process, rate, over);
    let (copied, took) = (rest.copied - slow.copied, begun.elapsed());
    let least = Duration::from_secs_f64(copied as f64 / rate as f64);
    assert!(took >= least, "{copied} bytes took {took:?}");
    assert_eq!(rest.state, Streaming::Done);
    assert!(
        copied > 0 && rest.copied <= SIZE - first.copied - anew.copied,
        "{rest:?} after {first:?} and {anew:?}"
    );
    let Ok(Reply::Stats(stats)) = process.ask(Request::Stats, None) else {
        panic!("no statistics");
    };
    assert_eq!(stats.stream, Some(rest));
    process.exit();
    let mut expected = model;
    expected[4000 * 512..][..512].fill(7);
    assert!(folder.content("qcow2", "leaf.qcow2") == expected);
}

#[test]
fn image_that_has_nothing_below_it_is_done_and_one_that_must_keep_it_is_refused() {
    let Some(folder) = Folder::new("image_that_has_nothing_below") else {
        return;
    };
    folder.raw("base.img", 1);
    let fake = FakeTap::new(4).expect("a node");
    let raw = ServedImage {
        path: folder.path("base.img"),
        driver: "aio",
        files: 0,
    };
    let (mut process, _) = raw.start(&fake);
    assert_eq!(
        stream(&mut process, 1).expect("done").state,
        Streaming::Done
    );
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let paused = stream(&mut process, 1).expect_err("it is paused");
    assert_eq!(paused.code, Code::State);
    process.exit();
    let create = [
        "create", "-f", "qcow2", "-b", "base.img", "-F", "raw", "a.qcow2",
    ];
    folder.img(&create);
    folder.img(&["snapshot", "-c", "kept", "a.qcow2"]);
    let kept = ServedImage {
        path: folder.path("a.qcow2"),
        driver: "qcow2",
        files: 1,
    };
    let fake = FakeTap::new(4).expect("a node");
    let (mut process, _) = kept.start(&fake);
    let refused = stream(&mut process, 1).expect_err("it has a snapshot");
    assert_eq!(refused.code, Code::Image, "{refused}");
    assert!(refused.message.contains("snapshot -d"), "{refused}");
    process.exit();
    assert!(goes_on(&folder, "a.qcow2"));
    let fake = FakeTap::new(4).expect("a node");
    let mut process = Process::start(&fake);
    let open = Open {
        read_only: true,
        ..kept.question()
    };
    let (reply, _) = kept.ask(&mut process, Request::Open(open));
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    let refused = stream(&mut process, 1).expect_err("it is read-only");
    assert!(refused.message.contains("read-only"), "{refused}");
    process.exit();
}

/// Gives the files that the process asks for, with a backing image that cannot be read.
fn give_unreadable(channel: &mut Channel) {
    let mut known = 0;
    loop {
        let question = Request::Needs { after: known };
        let Ok(Reply::Needs { needs }) = channel.ask(question, &[]) else {
            return;
        };
        for need in needs {
            known = need.number;
            let fd = match &need.what {
                RequestedFile::Parent { path } => Some(unreadable(path)),
                _ => None,
            };
            let is_last = fd.is_some();
            give_or_refuse(channel, need.number, fd, FdGrant::Shared);
            if is_last {
                return;
            }
        }
    }
}

fn unreadable(path: &Path) -> File {
    File::options().write(true).open(path).expect("a file")
}

#[test]
fn what_cannot_be_read_ends_it_and_nothing_is_forgotten() {
    let Some(folder) = Folder::new("what_cannot_be_read_ends_it") else {
        return;
    };
    let model = folder.raw("base.img", 3);
    let create = [
        "create", "-f", "qcow2", "-b", "base.img", "-F", "raw", "a.qcow2",
    ];
    folder.img(&create);
    let served = ServedImage {
        path: folder.path("a.qcow2"),
        driver: "qcow2",
        files: 1,
    };
    let fake = FakeTap::new(4).expect("a node");
    let mut process = Process::start(&fake);
    let image = file(&served.path, true);
    let open = Request::Open(served.question());
    let reply = process.ask_and_give(open, image.as_fd(), give_unreadable);
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    // A range that the guest has overwritten need not be read from below.
    answered(&fake, Op::Write, 0, &[7; 65536]);
    for anew in [false, true] {
        let question = Request::Stream {
            rate: u64::MAX,
            anew,
        };
        let begun = process.ask(question, None).expect("it begins");
        let Reply::Stream(Stream { state, .. }) = begun else {
            panic!("{begun:?}");
        };
        assert_eq!(state, Streaming::Running);
        // Each question gets the same answer.
        for _ in 0..2 {
            let failed = until(&mut process, u64::MAX, over);
            let Streaming::Failed { why } = failed.state else {
                panic!("{failed:?}");
            };
            assert!(why.contains("cannot read"), "{why}");
        }
    }
    let Ok(Reply::Troubles(troubles)) = process.ask(Request::Troubles { after: None }, None) else {
        panic!("no troubles");
    };
    assert_eq!(troubles.last.map(|last| last.what), Some(Call::Read));
    assert!(!troubles.is_stopped);
    assert!(goes_on(&folder, "a.qcow2"));
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let (reply, _) = served.ask(&mut process, Request::Unpause(served.question()));
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    assert_eq!(until(&mut process, u64::MAX, over).state, Streaming::Done);
    process.exit();
    let mut expected = model;
    expected[..65536].fill(7);
    assert!(folder.content("qcow2", "a.qcow2") == expected);
    folder.check("qcow2", "a.qcow2", false);
}

/// A disk on top of another one, in blocks: a write of the guest takes as long as the test wants.
struct SlowDisk {
    own: RefCell<Vec<Option<u8>>>,
    state: Arc<SlowState>,
    /// Bytes of a cluster.
    unit: u32,
}

#[derive(Default)]
struct SlowState {
    begun: AtomicBool,
    go_on: AtomicBool,
    looked: AtomicBool,
    alone: AtomicBool,
    /// Blocks that the stream has written, and not the guest.
    copied: AtomicUsize,
    /// True if the copy ran during a write of the guest.
    beside: AtomicBool,
}

const BLOCK: u64 = 4096;
const SLOW_SIZE: u64 = 64 * BLOCK;
/// Content of the whole backing image.
const BELOW: u8 = 0xbb;

impl Driver for SlowDisk {
    async fn activate(&self) -> Result<DiskInfo, Failure> {
        Ok(DiskInfo {
            size: SLOW_SIZE,
            limits: DriverLimits {
                align: self.unit,
                ..DriverLimits::default()
            },
            ..crate::common::shape(false)
        })
    }
    fn fence(&self) -> Fence {
        Fence::Local
    }
    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        let own = self.own.borrow();
        for at in (0..data.len()).step_by(512) {
            let block = own[((offset + at as u64) / BLOCK) as usize];
            data.fill(at, 512, block.unwrap_or(BELOW));
        }
        Ok(())
    }
    async fn write(&self, offset: u64, data: Bytes, how: Attributes) -> Result<(), Errno> {
        if how.sequence.is_some() {
            self.state.begun.store(true, SeqCst);
            poll_fn(|cx| match self.state.go_on.load(SeqCst) {
                true => Poll::Ready(()),
                false => {
                    cx.waker().wake_by_ref();
                    Poll::Pending
                }
            })
            .await;
        }
        let bytes = data.to_vec();
        if how.sequence.is_none() {
            let guest_writes = self.state.begun.load(SeqCst) && !self.state.go_on.load(SeqCst);
            self.state.beside.fetch_or(guest_writes, SeqCst);
            let blocks = bytes.len() / BLOCK as usize;
            self.state.copied.fetch_add(blocks, SeqCst);
        }
        let mut own = self.own.borrow_mut();
        for at in (0..bytes.len()).step_by(BLOCK as usize) {
            own[((offset + at as u64) / BLOCK) as usize] = Some(bytes[at]);
        }
        Ok(())
    }
    async fn flush(&self) -> Result<(), Errno> {
        Ok(())
    }
    async fn extents(&self, _: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        let content = Content::Data;
        Ok(vec![Extent { len, content }])
    }
    async fn layer(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        self.state.looked.store(true, SeqCst);
        let own = self.own.borrow();
        let first = (offset / BLOCK) as usize;
        let blocks = own[first..][..(len / BLOCK) as usize].iter();
        let alike = blocks.take_while(|block| block.is_some() == own[first].is_some());
        let content = match own[first] {
            Some(_) => Content::Data,
            None => Content::Below,
        };
        let len = alike.count() as u64 * BLOCK;
        Ok(vec![Extent { len, content }])
    }
    async fn goes_on(&self) -> Result<bool, Failure> {
        Ok(true)
    }
    async fn stand_alone(&self) -> Result<(), Failure> {
        assert!(self.own.borrow().iter().all(Option::is_some));
        self.state.alone.store(true, SeqCst);
        Ok(())
    }
}

/// A process that serves a slow disk, with these blocks of its own.
fn slow(fake: &FakeTap, state: &Arc<SlowState>, own: &[usize], unit: u32) -> Process {
    let mut blocks = vec![None; (SLOW_SIZE / BLOCK) as usize];
    for number in own {
        blocks[*number] = Some(0x22);
    }
    let slow = SlowDisk {
        own: RefCell::new(blocks),
        state: state.clone(),
        unit,
    };
    let process = Process::start_with(fake, |session| {
        let serves = session.clone();
        session.runtime().tasks.spawn(async move {
            let disk = Disk::new(slow);
            let shape = disk.activate().await.expect("active");
            let open = Open::new("null:8M".parse().expect("a target"));
            let served = serves.serve_disk(open, disk, shape).await;
            served.expect("served");
        });
    });
    fake.wait_for_params();
    process
}

fn wait(flag: &AtomicBool) {
    while !flag.load(SeqCst) {
        thread::yield_now();
    }
}

/// The stream must not overwrite a write of the guest with the content that the backing image had before it.
#[test]
fn a_write_of_the_guest_is_not_overtaken() {
    let fake = FakeTap::new(4).expect("a node");
    let state = Arc::new(SlowState::default());
    let mut process = slow(&fake, &state, &[], 1);
    let block = [0x11; BLOCK as usize];
    let tag = fake.send(Op::Write, 8, &block, false).expect("a request");
    wait(&state.begun);
    stream(&mut process, u64::MAX).expect("a stream");
    wait(&state.looked);
    state.go_on.store(true, SeqCst);
    assert_eq!(fake.answer(tag, 0).expect("an answer").0, Answer::Okay);
    let ended = until(&mut process, u64::MAX, over);
    assert_eq!(ended.state, Streaming::Done);
    assert!(state.alone.load(SeqCst));
    // A copy over the guest's new data would race with the kernel, which may write there in passthrough.
    let others = (SLOW_SIZE / BLOCK) as usize - 1;
    assert_eq!(state.copied.load(SeqCst), others);
    let all = answered(&fake, Op::Read, 0, &[0; 4 * BLOCK as usize]);
    let expected: Vec<u8> = [BELOW, 0x11, BELOW, BELOW]
        .into_iter()
        .flat_map(|byte| [byte; BLOCK as usize])
        .collect();
    assert!(all == expected);
    process.exit();
}

/// A write allocates a whole cluster, and the kernel may write the rest of it in passthrough from then on.
#[test]
fn a_cluster_is_not_copied_while_the_guest_writes_a_part_of_it() {
    let fake = FakeTap::new(4).expect("a node");
    let state = Arc::new(SlowState::default());
    // Two parts of one cluster are missing.
    let mut process = slow(&fake, &state, &[10], 64 * 4096);
    let block = [0x11; BLOCK as usize];
    let tag = fake
        .send(Op::Write, 40 * 8, &block, false)
        .expect("a request");
    wait(&state.begun);
    stream(&mut process, u64::MAX).expect("a stream");
    wait(&state.looked);
    // Each question is a turn in which it could continue.
    for _ in 0..100 {
        stream(&mut process, u64::MAX).expect("a stream");
    }
    state.go_on.store(true, SeqCst);
    assert_eq!(fake.answer(tag, 0).expect("an answer").0, Answer::Okay);
    let ended = until(&mut process, u64::MAX, over);
    assert_eq!(ended.state, Streaming::Done);
    assert!(!state.beside.load(SeqCst), "it was copied beside a write");
    process.exit();
}
