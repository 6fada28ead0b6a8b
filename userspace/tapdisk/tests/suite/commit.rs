// SPDX-License-Identifier: MIT OR Apache-2.0
//! Commit: the backing image takes over the clusters of the disk's image while the guest works, and the disk switches
//! to it.

use crate::common::guest::{Guest, Step};
use crate::common::images::{answered, file, give, holds, steps, Folder, ServedImage, SIZE};
use crate::common::{Process, LIMIT};
use control::stats::{Mirror, Mirroring};
use control::tapdisk::{Disk, Reply, Request};
use control::{Channel, Code, Failure};
use ring::response::ResponseStatus as Answer;
use ring::tap::shadow::Op;
use std::fs;
use std::os::fd::AsFd;
use std::time::Instant;
use tapdev::fake::FakeTap;

fn told(process: &mut Process) -> Option<Mirror> {
    match process.ask(Request::Stats, None) {
        Ok(Reply::Stats(stats)) => stats.mirror,
        other => panic!("{other:?}"),
    }
}

/// Asks until both are equal; the limit is longer than that takes.
fn until_same(process: &mut Process) -> Mirror {
    let start = Instant::now();
    loop {
        let found = told(process).expect("a commit");
        match found.state {
            Mirroring::Same => return found,
            Mirroring::Copying => {}
            _ => panic!("{found:?}"),
        }
        assert!(start.elapsed() < LIMIT, "{found:?}");
    }
}

/// Commits the served image to `below`, which has that many files itself.
fn commit(process: &mut Process, below: &ServedImage) -> Result<Reply, Failure> {
    let image = file(&below.path, true);
    let question = Request::Mirror {
        open: below.question(),
        rate: 8 << 20,
        below: true,
    };
    if below.files == 0 {
        return process.ask_with(question, image.as_fd());
    }
    let give = |channel: &mut Channel| drop(give(channel, below.files - 1));
    process.ask_and_give(question, image.as_fd(), give)
}

/// Default options of an image.
const PLAIN: &str = "compat=1.1";

/// Makes an image over another one.
fn over(folder: &Folder, name: &str, option: &str, below: (&str, &str)) {
    let what = ["create", "-f", "qcow2", "-o", option];
    let over = ["-b", below.0, "-F", below.1, name];
    folder.img(&[&what[..], &over].concat());
}

/// A disk in `a.qcow2` over an image `base` of a format, over a raw one.
struct Chain {
    folder: Folder,
    top: ServedImage,
    below: ServedImage,
    model: Vec<u8>,
}

impl Chain {
    fn new(test: &str, format: &str, top: &str) -> Option<Self> {
        let folder = Folder::new(test)?;
        let (model, files) = match format {
            "raw" => (folder.raw("base", 5), 0),
            "qcow" | "vmdk" => {
                let model = folder.raw("root.img", 5);
                folder.copy("root.img", format, "base");
                (model, 0)
            }
            _ => {
                let model = folder.raw("root.img", 5);
                over(&folder, "base", "cluster_size=4k", ("root.img", "raw"));
                (model, 1)
            }
        };
        over(&folder, "a.qcow2", top, ("base", format));
        let driver = match format {
            "raw" => "aio",
            "qcow" => "qcow",
            "vmdk" => "vmdk",
            _ => "qcow2",
        };
        Some(Self {
            top: ServedImage {
                path: folder.path("a.qcow2"),
                driver: "qcow2",
                files: files + 1,
            },
            below: ServedImage {
                path: folder.path("base"),
                driver,
                files,
            },
            folder,
            model,
        })
    }
}

/// Works on `top` as a guest with the content `model`, while its process is killed, until `below` has all of it and
/// gets new writes, too. Returns the remaining steps, without deaths.
fn commits_under_load<'a>(
    fake: &'a FakeTap,
    top: &ServedImage,
    below: &ServedImage,
    model: Vec<u8>,
) -> (Process, Guest<'a>, impl Iterator<Item = Step>) {
    let (mut process, _) = top.start(fake);
    let mut guest = Guest::new(fake, model, 8);
    let mut steps = steps().into_iter();
    for step in steps.by_ref().take(40) {
        guest.send(&step);
    }
    commit(&mut process, below).expect("it begins");
    for step in steps.by_ref().take(160) {
        if matches!(step, Step::Kill) {
            process.kill();
            process = top.start(fake).0;
            commit(&mut process, below).expect("it begins anew");
        }
        guest.send(&step);
    }
    let same = until_same(&mut process);
    assert_eq!(same.offset, SIZE);
    // From now on each write goes to both.
    let lives = |step: &Step| !matches!(step, Step::Kill);
    for step in steps.by_ref().take(60).filter(lives) {
        guest.send(&step);
    }
    (process, guest, steps.filter(lives))
}

/// A guest works while its process is killed, and switches to the backing image.
fn ends_a_snapshot(test: &str, format: &str, driver: &'static str) {
    let Some(chain) = Chain::new(test, format, PLAIN) else {
        return;
    };
    let (folder, below) = (chain.folder, chain.below);
    let top = ServedImage {
        driver,
        ..chain.top
    };
    let root = (format != "raw").then(|| fs::read(folder.path("root.img")).expect("read"));
    let fake = FakeTap::new(16).expect("a node");
    let (mut process, mut guest, steps) = commits_under_load(&fake, &top, &below, chain.model);
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let last = told(&mut process).expect("a commit");
    assert_eq!(last.state, Mirroring::Complete, "{last:?}");
    folder.check("qcow2", "a.qcow2", true);
    if format != "raw" {
        folder.check(format, "base", true);
    }
    assert!(folder.content("qcow2", "a.qcow2") == folder.content(format, "base"));
    process.exit();
    fs::remove_file(&top.path).expect("nobody needs it");
    let (process, disk) = below.start(&fake);
    assert!(matches!(disk, Disk { size: SIZE, .. }));
    for step in steps {
        guest.send(&step);
    }
    guest.finish();
    process.exit();
    assert!(folder.content(format, "base") == guest.model);
    if let Some(root) = root {
        assert!(fs::read(folder.path("root.img")).expect("read") == root);
    }
}

/// Backing image of a VHD that was made as a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum UnderVhd {
    Raw,
    Dynamic,
    /// Another snapshot, of a raw image.
    Differencing,
}

/// A VHD over another image, made as `tap-ctl snapshot` has it made.
fn vhd_over(folder: &Folder, name: &str, below: &ServedImage) -> ServedImage {
    let child = ServedImage {
        path: folder.path(name),
        driver: "vhd",
        files: below.files + 1,
    };
    fs::File::create_new(&child.path).expect("a new file");
    let fake = FakeTap::new(4).expect("a node");
    let (mut process, _) = below.start(&fake);
    let target = child.question().target;
    let image = file(&child.path, true);
    let made = process.ask_with(Request::Overlay { target }, image.as_fd());
    assert_eq!(made, Ok(Reply::Done));
    process.exit();
    child
}

/// A disk in a VHD over another image.
fn vhd_chain(test: &str, under: UnderVhd) -> Option<Chain> {
    let folder = Folder::new(test)?;
    let model = folder.raw("base.img", 5);
    let raw = ServedImage {
        path: folder.path("base.img"),
        driver: "aio",
        files: 0,
    };
    let below = match under {
        UnderVhd::Raw => raw,
        UnderVhd::Dynamic => {
            // The size as it is, not as a number of cylinders.
            let options = "subformat=dynamic,force_size=on";
            let convert = ["convert", "-f", "raw", "-O", "vpc", "-o", options];
            folder.img(&[&convert[..], &["base.img", "base.vhd"]].concat());
            ServedImage {
                path: folder.path("base.vhd"),
                driver: "vhd",
                files: 0,
            }
        }
        UnderVhd::Differencing => vhd_over(&folder, "base.vhd", &raw),
    };
    Some(Chain {
        top: vhd_over(&folder, "a.vhd", &below),
        below,
        folder,
        model,
    })
}

/// The image holds this disk: to QEMU, if that can read it, and to us.
fn image_holds(folder: &Folder, image: &ServedImage, model: &[u8]) {
    let name = image.path.file_name().and_then(|name| name.to_str());
    let name = name.expect("a name");
    match (image.driver, image.files) {
        ("aio", _) => assert!(folder.content("raw", name) == model, "{name}"),
        ("vhd", 0) => assert!(folder.content("vpc", name) == model, "{name}"),
        // QEMU cannot make differencing VHDs.
        _ => {}
    }
    let fake = FakeTap::new(4).expect("a node");
    let (process, disk) = image.start(&fake);
    assert_eq!(disk.size, SIZE);
    holds(&fake, model);
    process.exit();
}

/// A guest works on a VHD while its process is killed, and switches to the backing image.
fn vhd_ends_in(test: &str, under: UnderVhd) {
    let Some(chain) = vhd_chain(test, under) else {
        return;
    };
    let (folder, top, below) = (chain.folder, chain.top, chain.below);
    let root = fs::read(folder.path("base.img")).expect("read");
    let fake = FakeTap::new(16).expect("a node");
    let (mut process, mut guest, steps) = commits_under_load(&fake, &top, &below, chain.model);
    guest.finish();
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let last = told(&mut process).expect("a commit");
    assert_eq!(last.state, Mirroring::Complete, "{last:?}");
    process.exit();
    // The image on top is the same disk while it exists.
    image_holds(&folder, &below, &guest.model);
    image_holds(&folder, &top, &guest.model);
    fs::remove_file(&top.path).expect("nobody needs it");
    let (process, _) = below.start(&fake);
    for step in steps {
        guest.send(&step);
    }
    guest.finish();
    process.exit();
    image_holds(&folder, &below, &guest.model);
    if under != UnderVhd::Raw {
        assert!(fs::read(folder.path("base.img")).expect("read") == root);
    }
}

#[test]
fn vhd_over_a_raw_image_ends_in_that() {
    vhd_ends_in("vhd_over_a_raw_image", UnderVhd::Raw);
}

#[test]
fn vhd_over_a_dynamic_one_ends_in_that() {
    vhd_ends_in("vhd_over_a_dynamic_one", UnderVhd::Dynamic);
}

#[test]
fn vhd_in_a_chain_ends_in_the_one_below() {
    vhd_ends_in("vhd_in_a_chain", UnderVhd::Differencing);
}

/// A commit that ends at any time leaves the disk in the VHD as it was, also where the guest zeroed or discarded.
#[test]
fn vhd_whose_commit_is_ended_is_the_disk_as_before() {
    for under in [UnderVhd::Raw, UnderVhd::Dynamic, UnderVhd::Differencing] {
        let Some(chain) = vhd_chain("vhd_whose_commit_is_ended", under) else {
            return;
        };
        let (folder, top, below) = (chain.folder, chain.top, chain.below);
        let fake = FakeTap::new(4).expect("a node");
        let (mut process, _) = top.start(&fake);
        let mut model = chain.model;
        let mut write = |fake: &FakeTap, at: usize, byte: u8| {
            answered(fake, Op::Write, at as u64 / 512, &[byte; 1536]);
            model[at..at + 1536].fill(byte);
        };
        for at in [512, 1 << 20, (3 << 20) + 4096] {
            write(&fake, at, 7);
        }
        commit(&mut process, &below).expect("it begins");
        let same = until_same(&mut process);
        assert_eq!(same.copied, 3 * 1536, "{under:?} {same:?}");
        write(&fake, 2 << 20, 8);
        write(&fake, 1536, 9);
        let tag = fake.send_range(Op::WriteZeroes, 2, 4).expect("a request");
        assert_eq!(fake.answer(tag, 0).expect("an answer").0, Answer::Okay);
        model[1024..3072].fill(0);
        process.kill();
        image_holds(&folder, &top, &model);
        // All earlier content is in the backing image, too, and ranges that the guest never changed are as they were.
        image_holds(&folder, &below, &model);
    }
}

/// A VHD has several names of its backing image. Only the place where that was found counts, not a deeper one.
#[test]
fn vhd_is_committed_to_what_is_right_below_it() {
    let Some(chain) = vhd_chain("vhd_right_below", UnderVhd::Differencing) else {
        return;
    };
    let fake = FakeTap::new(4).expect("a node");
    let (mut process, _) = chain.top.start(&fake);
    let deeper = ServedImage {
        path: chain.folder.path("base.img"),
        driver: "aio",
        files: 0,
    };
    let as_raw = ServedImage {
        path: chain.below.path.clone(),
        ..deeper
    };
    let before = fs::read(&deeper.path).expect("read");
    for wrong in [&deeper, &as_raw] {
        let failure = commit(&mut process, wrong).expect_err("it is not below");
        assert_eq!(failure.code, Code::Invalid, "{failure}");
    }
    process.exit();
    assert!(fs::read(&deeper.path).expect("read") == before);
}

/// One of its names leads to an image deeper in the chain, which is skipped when the chain is opened because it has
/// another number.
#[test]
fn vhd_is_not_committed_to_what_a_name_of_another_leads_to() {
    let Some(chain) = vhd_chain("vhd_other_name", UnderVhd::Dynamic) else {
        return;
    };
    let folder = chain.folder;
    let root = ServedImage {
        path: folder.path("root.vhd"),
        ..chain.below
    };
    fs::rename(&chain.below.path, &root.path).expect("rename");
    let base = vhd_over(&folder, "base.vhd", &root);
    let mut top = vhd_over(&folder, "b.vhd", &base);
    let mut bytes = fs::read(&top.path).expect("read");
    // The first name is a URL; the others are in UTF-16.
    let at = bytes.windows(8).position(|name| name == b"base.vhd");
    let at = at.expect("a name in a locator");
    bytes[at..at + 8].copy_from_slice(b"root.vhd");
    fs::write(&top.path, bytes).expect("write");
    // It asks for that one, too, which is refused.
    top.files += 1;
    let before = fs::read(&root.path).expect("read");
    let fake = FakeTap::new(4).expect("a node");
    let (mut process, _) = top.start(&fake);
    holds(&fake, &chain.model);
    let deeper = ServedImage { files: 0, ..root };
    let failure = commit(&mut process, &deeper).expect_err("it is deeper");
    assert_eq!(failure.code, Code::Invalid, "{failure}");
    commit(&mut process, &base).expect("it is right below");
    until_same(&mut process);
    process.exit();
    assert!(fs::read(&deeper.path).expect("read") == before);
}

#[test]
fn snapshot_over_a_raw_image_ends_in_that() {
    ends_a_snapshot("snapshot_over_a_raw_image", "raw", "qcow2");
}

#[test]
fn snapshot_in_a_chain_ends_in_the_image_below() {
    ends_a_snapshot("snapshot_in_a_chain", "qcow2", "qcow2");
}

#[test]
fn snapshot_over_another_format_ends_in_that() {
    for format in ["qcow", "vmdk"] {
        ends_a_snapshot("snapshot_over_another_format", format, "qcow2");
    }
}

/// Data that goes there past the page cache must be visible through it.
#[test]
fn snapshot_over_what_is_cached_ends_in_that() {
    for format in ["raw", "qcow2"] {
        ends_a_snapshot("snapshot_over_what_is_cached", format, "below=cached,qcow2");
    }
}

/// Only the image's own clusters are copied, and after an end at any time the disk is unchanged.
#[test]
fn one_that_is_ended_leaves_the_disk_as_it_is() {
    let Some(chain) = Chain::new("one_that_is_ended", "raw", "cluster_size=4k") else {
        return;
    };
    let (folder, top, below) = (chain.folder, chain.top, chain.below);
    let fake = FakeTap::new(4).expect("a node");
    let (mut process, _) = top.start(&fake);
    let mut model = chain.model;
    let mut write = |fake: &FakeTap, at: usize, byte: u8| {
        answered(fake, Op::Write, at as u64 / 512, &[byte; 8192]);
        model[at..at + 8192].fill(byte);
    };
    for at in [0, 1 << 20, (3 << 20) + 4096] {
        write(&fake, at, 7);
    }
    commit(&mut process, &below).expect("it begins");
    let same = until_same(&mut process);
    assert_eq!(same.copied, 3 * 8192, "{same:?}");
    write(&fake, 2 << 20, 8);
    // A discarded range does not show the old content of the backing image, which is another disk's.
    let tag = fake.send_range(Op::Discard, 0, 16).expect("a request");
    assert_eq!(fake.answer(tag, 0).expect("an answer").0, Answer::Okay);
    model[..8192].fill(0);
    process.kill();
    folder.check("qcow2", "a.qcow2", true);
    assert!(folder.content("qcow2", "a.qcow2") == model);
    let (process, _) = top.start(&fake);
    process.exit();
    assert!(folder.content("qcow2", "a.qcow2") == model);
    assert!(fs::read(&below.path).expect("read")[..8192] == [0; 8192]);
}

#[test]
fn what_is_not_below_is_no_place_for_it() {
    let Some(chain) = Chain::new("what_is_not_below", "raw", PLAIN) else {
        return;
    };
    let (folder, top, below) = (chain.folder, chain.top, chain.below);
    folder.raw("other", 9);
    let fake = FakeTap::new(4).expect("a node");
    let (mut process, _) = top.start(&fake);
    let other = ServedImage {
        path: folder.path("other"),
        driver: "aio",
        files: 0,
    };
    let as_qcow2 = ServedImage {
        path: below.path.clone(),
        driver: "qcow2",
        files: 0,
    };
    for wrong in [&other, &as_qcow2] {
        let failure = commit(&mut process, wrong).expect_err("it is not below");
        assert_eq!(failure.code, Code::Invalid, "{failure}");
    }
    process.exit();
    let fake = FakeTap::new(4).expect("a node");
    let (mut process, _) = below.start(&fake);
    let failure = commit(&mut process, &other).expect_err("it is raw");
    assert_eq!(failure.code, Code::Invalid, "{failure}");
    process.exit();
}

/// With larger clusters below, a write could move a part that another process reads.
#[test]
fn one_with_smaller_clusters_is_refused() {
    for smaller in ["cluster_size=2k", "cluster_size=64k,extended_l2=on"] {
        let Some(chain) = Chain::new("smaller_clusters", "qcow2", smaller) else {
            return;
        };
        let fake = FakeTap::new(4).expect("a node");
        let (mut process, _) = chain.top.start(&fake);
        let failure = commit(&mut process, &chain.below).expect_err("they are smaller");
        assert_eq!(failure.code, Code::Unsupported, "{failure}");
        assert!(failure.message.contains("larger clusters"), "{failure}");
        is_read_locked(&chain.below);
        process.exit();
    }
}

/// A snapshot of a disk with large clusters gets clusters as large, so that it ends while the guest works.
#[test]
fn a_snapshot_over_large_clusters_ends() {
    let Some(folder) = Folder::new("a_snapshot_over_large_clusters_ends") else {
        return;
    };
    let model = folder.raw("root.img", 5);
    over(&folder, "base", "cluster_size=2M", ("root.img", "raw"));
    let (below, top) = (
        ServedImage {
            path: folder.path("base"),
            driver: "qcow2",
            files: 1,
        },
        ServedImage {
            path: folder.path("a.qcow2"),
            driver: "qcow2",
            files: 2,
        },
    );
    let fake = FakeTap::new(16).expect("a node");
    let (mut process, _) = below.start(&fake);
    fs::File::create_new(&top.path).expect("a new file");
    let question = Request::Overlay {
        target: top.question().target,
    };
    let made = process.ask_with(question, file(&top.path, true).as_fd());
    assert_eq!(made, Ok(Reply::Done));
    process.exit();
    let (mut process, mut guest, _) = commits_under_load(&fake, &top, &below, model);
    guest.finish();
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let last = told(&mut process).expect("a commit");
    assert_eq!(last.state, Mirroring::Complete, "{last:?}");
    process.exit();
    folder.check("qcow2", "base", true);
    assert!(folder.content("qcow2", "base") == guest.model);
}

/// The process that serves an image over this one has this one locked: others may read it and may not write it.
fn is_read_locked(below: &ServedImage) {
    let other = file(&below.path, true);
    let written = diskio::lock_whole(other.as_fd(), diskio::LockKind::Write);
    written.expect_err("the disk goes on from it");
    diskio::lock_whole(other.as_fd(), diskio::LockKind::Read).expect("it may be read");
}

/// A write to the parent by another process would change the disk.
#[test]
fn one_that_ends_leaves_the_read_lock_of_the_parent() {
    for format in ["raw", "qcow2"] {
        let Some(chain) = Chain::new("leaves_the_read_lock", format, PLAIN) else {
            return;
        };
        let fake = FakeTap::new(4).expect("a node");
        let (mut process, _) = chain.top.start(&fake);
        is_read_locked(&chain.below);
        commit(&mut process, &chain.below).expect("it begins");
        until_same(&mut process);
        let other = file(&chain.below.path, false);
        let read = diskio::lock_whole(other.as_fd(), diskio::LockKind::Read);
        read.expect_err("it is written");
        // A disk that grows has its mirror ended.
        let size = SIZE + (1 << 20);
        let grown = process.ask(Request::Grow { size }, None);
        grown.expect("the image grows");
        let ended = told(&mut process).expect("a commit");
        assert_eq!(ended.state, Mirroring::Ended, "{ended:?}");
        is_read_locked(&chain.below);
        process.exit();
        let other = file(&chain.below.path, true);
        let written = diskio::lock_whole(other.as_fd(), diskio::LockKind::Write);
        written.expect("no process has it any more");
    }
}

/// A snapshot inside of the image also shows the backing image.
#[test]
fn one_with_internal_snapshots_is_refused() {
    let Some(chain) = Chain::new("internal_snapshots", "raw", PLAIN) else {
        return;
    };
    chain.folder.img(&["snapshot", "-c", "s1", "a.qcow2"]);
    let before = fs::read(&chain.below.path).expect("read");
    let fake = FakeTap::new(4).expect("a node");
    let (mut process, _) = chain.top.start(&fake);
    let failure = commit(&mut process, &chain.below).expect_err("it has a snapshot");
    assert!(failure.message.contains("snapshots"), "{failure}");
    process.exit();
    assert!(fs::read(&chain.below.path).expect("read") == before);
}

/// A process that reads the backing image would see it change.
#[test]
fn one_that_somebody_else_reads_is_refused() {
    let Some(chain) = Chain::new("somebody_reads", "raw", PLAIN) else {
        return;
    };
    let fake = FakeTap::new(4).expect("a node");
    let (mut process, _) = chain.top.start(&fake);
    let reader = file(&chain.below.path, false);
    diskio::lock_whole(reader.as_fd(), diskio::LockKind::Read).expect("it may be read");
    let failure = commit(&mut process, &chain.below).expect_err("somebody reads it");
    assert_eq!(failure.code, Code::Busy, "{failure}");
    drop(reader);
    commit(&mut process, &chain.below).expect("nobody does");
    // Now no other process may read it.
    let reader = file(&chain.below.path, false);
    let locked = diskio::lock_whole(reader.as_fd(), diskio::LockKind::Read);
    locked.expect_err("it is written");
    until_same(&mut process);
    process.exit();
}
