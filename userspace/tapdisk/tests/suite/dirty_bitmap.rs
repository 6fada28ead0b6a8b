// SPDX-License-Identifier: MIT OR Apache-2.0
//! The dirty bitmap has the guest's changes, over deaths of its process.

use crate::common::guest::{Guest, Step};
use crate::common::images::{answered, file, steps, Folder, SIZE};
use crate::common::watched::{does_all_itself, Raw, Watched};
use crate::common::{needs, refuse, Process};
use control::tapdisk::{Reply, Request};
use control::{Channel, Code};
use ring::tap::shadow::Op;
use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
use rustix::io::pread;
use std::os::fd::{AsFd, OwnedFd};
use tapdev::fake::FakeTap;

/// Bytes that a bit covers.
pub(super) const UNIT: u64 = 4096;

/// The memory of a mark, which outlives processes.
pub(super) struct MarkMemory(OwnedFd);

impl MarkMemory {
    pub(super) fn new() -> Self {
        let memory = memfd_create("map", MemfdFlags::CLOEXEC).expect("memory");
        ftruncate(&memory, SIZE.div_ceil(UNIT).div_ceil(8)).expect("truncate");
        Self(memory)
    }

    /// Returns a copy of the descriptor.
    pub(super) fn descriptor(&self) -> OwnedFd {
        self.0.try_clone().expect("dup")
    }

    pub(super) fn watched(&self) -> Watched<'_> {
        Watched {
            notes: Some((UNIT, self.0.as_fd())),
            ..Watched::default()
        }
    }

    /// Returns the units whose bits are set.
    pub(super) fn units(&self) -> Vec<u64> {
        let mut bits = vec![0; 4096];
        let count = pread(&self.0, &mut bits, 0).expect("read");
        let is_set = |unit: &u64| bits[..count][(unit / 8) as usize] & 1 << (unit % 8) != 0;
        (0..SIZE.div_ceil(UNIT)).filter(is_set).collect()
    }

    /// From now on a process notes here.
    pub(super) fn given_to(&self, process: &mut Process) {
        let question = Request::Note { unit: Some(UNIT) };
        let reply = process.ask_with(question, self.0.as_fd());
        assert_eq!(reply, Ok(Reply::Done));
        let open = process.status().open.expect("an image");
        assert_eq!(open.notes, Some(UNIT));
    }
}

/// Returns the units in which two states of an image differ.
fn differ(one: &[u8], other: &[u8]) -> Vec<u64> {
    let pairs = one.chunks(UNIT as usize).zip(other.chunks(UNIT as usize));
    let pairs = (0..).zip(pairs);
    pairs
        .filter(|(_, (a, b))| a != b)
        .map(|(unit, _)| unit)
        .collect()
}

/// Units that a guest writes with these steps.
pub(super) fn touched(steps: &[Step]) -> Vec<u64> {
    let mut units: Vec<u64> = Vec::new();
    for step in steps {
        let (at, sectors) = match *step {
            Step::Write(at, len, ..) => (at, len as u64 / 512),
            Step::Zeroes(at, sectors) => (at, sectors),
            _ => continue,
        };
        units.extend(at * 512 / UNIT..=((at + sectors) * 512 - 1) / UNIT);
    }
    units.sort_unstable();
    units.dedup();
    units
}

#[test]
fn nothing_changes_that_is_not_noted() {
    let Some(folder) = Folder::new("nothing_changes") else {
        return;
    };
    let model = folder.raw("a.img", 5);
    let image = Raw(folder.path("a.img"));
    let fake = FakeTap::new(16).expect("a node");
    let mut process = image.start(&fake, Watched::default());
    let mut guest = Guest::new(&fake, model, 8);
    let maps = [MarkMemory::new(), MarkMemory::new()];
    let mut states: Vec<Vec<u8>> = Vec::new();
    let steps = steps();
    for (number, step) in steps.iter().enumerate() {
        if number % 60 == 50 {
            // The process gets its memory again while it uses it: no bit is lost.
            if let Some(last) = states.len().checked_sub(1) {
                maps[last].given_to(&mut process);
            }
        }
        // Requests are under way at these moments.
        if number % 60 == 40 && states.len() < maps.len() {
            maps[states.len()].given_to(&mut process);
            states.push(image.bytes());
        }
        if matches!(step, Step::Kill) {
            process.kill();
            let last = states.len().checked_sub(1).map(|last| maps[last].watched());
            process = image.start(&fake, last.unwrap_or_default());
        }
        guest.send(step);
    }
    guest.finish();
    process.exit();
    let end = image.bytes();
    assert!(end == guest.model);
    let [first, second] = maps.map(|map| map.units());
    let known = |units: &[u64], unit: &u64| units.binary_search(unit).is_ok();
    for unit in differ(&states[0], &end) {
        assert!(known(&first, &unit) || known(&second, &unit), "unit {unit}");
    }
    for unit in differ(&states[1], &end) {
        assert!(known(&second, &unit), "unit {unit} since the second");
    }
    // Not more than can be: at most eight requests were under way when the first mark was set.
    let (before, between) = (touched(&steps[32..100]), touched(&steps[92..]));
    assert!(first.iter().all(|unit| known(&before, unit)), "{first:?}");
    assert!(
        second.iter().all(|unit| known(&between, unit)),
        "{second:?}"
    );
    assert!(!first.is_empty() && first.len() < 1000 && !second.is_empty());
}

#[test]
fn notes_end_and_are_refused_without_a_map() {
    let Some(folder) = Folder::new("notes_end") else {
        return;
    };
    folder.raw("a.img", 5);
    let image = Raw(folder.path("a.img"));
    let fake = FakeTap::new(16).expect("a node");
    let map = MarkMemory::new();
    let mut process = image.start(&fake, map.watched());
    answered(&fake, Op::Write, 8, &[7; 512]);
    assert_eq!(map.units(), [1]);
    let alone = process.ask(Request::Note { unit: Some(UNIT) }, None);
    assert_eq!(alone.expect_err("no map").code, Code::Invalid);
    assert_eq!(
        process.ask(Request::Note { unit: None }, None),
        Ok(Reply::Done)
    );
    answered(&fake, Op::Write, 16, &[7; 512]);
    assert_eq!(map.units(), [1]);
    process.exit();
    // Without its dirty bitmap the disk is not served.
    let mut process = Process::start(&fake);
    let question = Request::Open(image.open(&map.watched()));
    let refuse_all = |channel: &mut Channel| {
        for _ in 0..2 {
            let number = needs(channel, 0)[0].number;
            refuse(channel, number);
        }
    };
    let opened = process.ask_and_give(question, file(&image.0, true).as_fd(), refuse_all);
    assert_eq!(opened.expect_err("refused").code, Code::Denied);
    process.exit();
}

/// The kernel would write without a note.
#[test]
fn the_kernel_writes_nothing_by_itself_meanwhile() {
    let map = MarkMemory::new();
    let end = |process: &mut Process| {
        let ended = process.ask(Request::Note { unit: None }, None);
        assert_eq!(ended, Ok(Reply::Done));
    };
    does_all_itself(|process| map.given_to(process), end);
}
