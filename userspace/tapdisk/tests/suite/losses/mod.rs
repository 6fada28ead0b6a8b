// SPDX-License-Identifier: MIT OR Apache-2.0
//! WritebackErrors writes: random schedules of requests, of storage that fails, and of what becomes of the process, for each driver.
//!
//! The storage has a cache and forgets what it could not write back ([`storage`]). The guest knows what it was promised
//! ([`guest`]), in both directions: a flush that succeeds says that everything acknowledged before it survives a loss of
//! power, but for what an earlier flush has reported; so a write that is lost fails the first flush that begins after its
//! acknowledgement. After flushes, pauses and hand-offs that succeeded, the power is lost, and the image of that moment
//! must hold all that was promised.
//!
//! The storage of an export is behind a [`server`] that goes away at times. A disk that [moves](mirror) gets another image
//! while its guest works.
//!
//! `SEEDS` is the number of schedules for each driver, `SEED` repeats those from one on.

mod chance;
mod extent;
mod guest;
mod images;
mod life;
mod mirror;
mod server;
mod storage;
mod subject;

use chance::Chance;
use images::DiskImages;
use life::Life;
use seeds::Seeds;
use std::cell::RefCell;
use std::rc::Rc;
use subject::Subject;
use tapdev::fake::FakeTap;

/// Schedules of each driver by default.
const SCHEDULES: u64 = 8;
/// Processes of a schedule at most.
const LIVES: usize = 12;

/// Runs schedules. How many flushes succeeded and failed is part of what must be so: a schedule without either tests
/// nothing.
fn holds(subject: Subject) {
    runs(subject, SCHEDULES);
}

fn runs(subject: Subject, schedules: u64) {
    let (mut flushed, mut failed) = (0, 0);
    let mut seeds = Seeds::few(schedules);
    for seed in seeds.by_ref() {
        let (well, badly) = run(subject, seed);
        flushed += well;
        failed += badly;
    }
    let count = seeds.given();
    println!(
        "{}: {count} schedules, {flushed} flushes succeeded, {failed} failed",
        subject.name
    );
    assert!(flushed > 0, "no flush succeeded");
    // One schedule may have no fault.
    assert!(failed > 0 || count < schedules, "no flush failed");
}

fn run(subject: Subject, seed: u64) -> (u64, u64) {
    let mut chance = Chance(seed);
    let fake = FakeTap::new(16).expect("a node");
    let images = DiskImages::new(subject, Chance(chance.next()));
    let guest = guest::Guest::new(&fake, subject, Chance(chance.next()));
    let guest = Rc::new(RefCell::new(guest));
    let life = Life::new(&fake, &images, &guest);
    let ended = (0..LIVES).find_map(|number| life.live(number + 1 == LIVES));
    let guest = guest.borrow();
    if let Some(Err(what)) = ended {
        let from = guest.log.len().saturating_sub(120);
        for line in &guest.log[from..] {
            println!("{line}");
        }
        panic!("{}: {what}: SEED={seed} SEEDS=1 repeats it", subject.name);
    }
    (guest.flushed, guest.failed)
}

#[test]
fn raw() {
    holds(subject::RAW);
}

#[test]
fn qcow2() {
    holds(subject::QCOW2);
}

#[test]
fn qcow2_over_raw() {
    holds(subject::QCOW2_OVER);
}

#[test]
fn qcow_over_raw() {
    holds(subject::QCOW);
}

#[test]
fn vhd() {
    holds(subject::VHD);
}

#[test]
fn vhd_over_raw() {
    holds(subject::VHD_OVER);
}

#[test]
fn vmdk() {
    holds(subject::VMDK);
}

#[test]
fn luks() {
    // Each look at an image derives its key.
    runs(subject::LUKS, 2);
}

#[test]
fn cow_over_raw() {
    holds(subject::COW);
}

#[test]
fn nbd() {
    holds(subject::NBD);
}

#[test]
fn mirror() {
    holds(subject::MOVING);
}
