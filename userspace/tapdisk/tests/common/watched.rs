// SPDX-License-Identifier: MIT OR Apache-2.0
//! A raw image, and processes that serve it and record the guest's requests.

use super::images::{answered, file};
use super::{give_or_refuse, needs, Image, Process, SIZE};
use control::tapdisk::{Engine, FdGrant, Open, Reply, Request, RequestedFile};
use control::Channel;
use ring::tap::shadow::Op;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use tapdev::abi::{MAP_FLUSH, MAP_RECALL, MAP_SET};
use tapdev::fake::FakeTap;

/// Places where a process records the requests.
#[derive(Clone, Copy, Default)]
pub(crate) struct Watched<'a> {
    /// Memory of the dirty bitmap, and the bytes that one of its bits covers.
    pub(crate) notes: Option<(u64, BorrowedFd<'a>)>,
    /// The file of a trace.
    pub(crate) trace: Option<BorrowedFd<'a>>,
}

/// A raw image in a folder.
pub(crate) struct Raw(pub(crate) PathBuf);

impl Raw {
    pub(crate) fn open(&self, watched: &Watched<'_>) -> Open {
        let target = format!("aio:{}", self.0.display());
        Open {
            may_ask: true,
            notes: watched.notes.map(|(unit, _)| unit),
            trace: watched.trace.is_some(),
            ..Open::new(target.parse().expect("a target"))
        }
    }

    /// A process that serves it.
    pub(crate) fn start(&self, fake: &FakeTap, watched: Watched<'_>) -> Process {
        let mut process = Process::start(fake);
        let question = Request::Open(self.open(&watched));
        let image = file(&self.0, true);
        let give = |channel: &mut Channel| give(channel, &watched);
        let reply = process.ask_and_give(question, image.as_fd(), give);
        match reply {
            Ok(Reply::Disk(_)) => {}
            other => panic!("{other:?}"),
        }
        let open = process.status().open.expect("an image");
        assert_eq!(open.notes.is_some(), watched.notes.is_some());
        assert_eq!(open.trace, watched.trace.is_some());
        process
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        fs::read(&self.0).expect("read")
    }
}

/// Between `begin` and `end` a process must suspend passthrough, though the kernel could serve the disk.
pub(crate) fn does_all_itself(begin: impl FnOnce(&mut Process), end: impl FnOnce(&mut Process)) {
    let (fake, image) = (FakeTap::new(16).expect("a node"), Image::new(SIZE));
    fake.back(1);
    let mut process = Process::serving(&fake, &image, Engine::Auto);
    fake.wait_for_map_ops(2);
    begin(&mut process);
    answered(&fake, Op::Write, 0, &[7; 512]);
    let ops: Vec<u8> = fake.map_ops().iter().map(|op| op.op).collect();
    assert_eq!(ops, [MAP_SET, MAP_FLUSH, MAP_RECALL]);
    end(&mut process);
    fake.wait_for_map_ops(5);
    process.exit();
}

/// Answers the questions of a process that opens the image, without memory for the next process.
pub(crate) fn give(channel: &mut Channel, watched: &Watched<'_>) {
    let asked = usize::from(watched.notes.is_some()) + usize::from(watched.trace.is_some());
    let mut known = 0;
    for _ in 0..1 + asked {
        let all = needs(channel, known);
        let need = all.first().expect("a need");
        known = need.number;
        let given = match need.what {
            RequestedFile::Notes => watched.notes.map(|(_, map)| map),
            RequestedFile::Trace => watched.trace,
            _ => None,
        };
        give_or_refuse(channel, need.number, given, FdGrant::Shared);
    }
}
