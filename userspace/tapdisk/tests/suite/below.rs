// SPDX-License-Identifier: MIT OR Apache-2.0
//! Backing images are read past dom0's page cache or through it: then disks with the same backing image share what was
//! read.

use crate::common::images::{answered, cached, holds, Folder, ServedImage, SIZE};
use crate::common::Process;
use control::tapdisk::{Engine, Open, Reply, Request};
use ring::tap::shadow::Op;
use rustix::fs::{fadvise, Advice};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use tapdev::fake::FakeTap;

/// Counter of bytes that a serving thread reads from storage.
struct Reads(PathBuf);

impl Reads {
    /// Bytes, so far.
    fn bytes(&self) -> u64 {
        let text = fs::read_to_string(&self.0).expect("counters of a thread");
        let mut lines = text.lines();
        let line = lines.find_map(|line| line.strip_prefix("read_bytes: "));
        line.expect("a counter").parse().expect("a number")
    }
}

/// A process that does in its own thread all that it does.
fn start(clone: &ServedImage, fake: &FakeTap) -> (Process, Reads) {
    let (tell, told) = mpsc::channel();
    let mut process = Process::start_with(fake, move |_| {
        let place = fs::read_link("/proc/thread-self").expect("a thread");
        tell.send(place).expect("who waits");
    });
    let open = Open {
        engine: Engine::Sync,
        ..clone.question()
    };
    let (reply, _) = clone.ask(&mut process, Request::Open(open));
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    let place = told.recv().expect("a thread");
    (process, Reads(Path::new("/proc").join(place).join("io")))
}

/// An image that is the backing image of two others, with nothing in the page cache.
struct Clones {
    folder: Folder,
    model: Vec<u8>,
    base: PathBuf,
    driver: &'static str,
}

impl Clones {
    fn new(test: &str, driver: &'static str) -> Option<Self> {
        let folder = Folder::new(test)?;
        let model = folder.raw("base.img", 5);
        for name in ["a.qcow2", "b.qcow2"] {
            let what = ["create", "-f", "qcow2", "-b", "base.img", "-F", "raw", name];
            folder.img(&what);
        }
        for name in ["base.img", "a.qcow2", "b.qcow2"] {
            let file = File::open(folder.path(name)).expect("an image");
            file.sync_all().expect("written back");
            fadvise(&file, 0, None, Advice::DontNeed).expect("dropped");
            assert_eq!(cached(&folder.path(name)), 0, "{name}");
        }
        Some(Self {
            base: folder.path("base.img"),
            folder,
            model,
            driver,
        })
    }

    fn served(&self, name: &str) -> ServedImage {
        ServedImage {
            path: self.folder.path(name),
            driver: self.driver,
            files: 1,
        }
    }

    /// A guest reads all of its disk, and writes something; bytes that were read from storage for the first.
    fn read_all(&self, name: &str) -> u64 {
        let (clone, fake) = (self.served(name), FakeTap::new(16).expect("a node"));
        let (mut process, reads) = start(&clone, &fake);
        // Its tables.
        answered(&fake, Op::Read, 0, &[0; 512]);
        let before = reads.bytes();
        holds(&fake, &self.model);
        let bytes = reads.bytes() - before;
        answered(&fake, Op::Write, 8, &[9; 512]);
        let written = answered(&fake, Op::Read, 8, &[0; 512]);
        assert_eq!(written, [9; 512]);
        // Another host may have the image now.
        assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
        assert_eq!(cached(&clone.path), 0, "what is written is never there");
        process.exit();
        bytes
    }
}

#[test]
fn clones_read_once_what_is_below_them() {
    let test = "clones_read_once_what_is_below_them";
    let Some(clones) = Clones::new(test, "below=cached,qcow2") else {
        return;
    };
    clones.read_all("a.qcow2");
    assert_eq!(cached(&clones.base), SIZE, "it is there for the others");
    assert_eq!(clones.read_all("b.qcow2"), 0, "bytes of storage");
    assert!(fs::read(&clones.base).expect("read") == clones.model);
}

#[test]
fn what_is_below_is_past_the_page_cache_if_nothing_is_said() {
    let test = "what_is_below_is_past_the_page_cache_if_nothing_is_said";
    let Some(clones) = Clones::new(test, "qcow2") else {
        return;
    };
    for name in ["a.qcow2", "b.qcow2"] {
        assert!(clones.read_all(name) >= SIZE, "bytes of storage");
        assert_eq!(cached(&clones.base), 0);
    }
}
