// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Random calls of the process of a tap disk, while an honest frontend sends requests; a seed repeats them.
//!
//! The process may complete its requests in any way, and its completion decides how each must end (`ledger`).
//! Completions of other requests must change nothing but a counter, and the counters must be exact (`process`). Wrong
//! calls must fail with the right error (`calls`).

mod calls;
mod ledger;
mod process;

use crate::fuzz::reported;
use crate::lab::Lab;
use crate::queue::ANSWER;
use crate::rng::Rng;
use crate::session::{Session, WIDE};
use crate::tap::server::DiskData;
use crate::tap::TapDisk;
use anyhow::{bail, ensure, Context, Result};
use ledger::Ledger;
use process::{FuzzProcess, ProcessEvents};
use std::path::PathBuf;
use std::thread;
use std::time::Instant;

/// Number of batches after which the oracle checks all of dom0.
const CHECK_EVERY: u32 = 100;
/// Sector at which the honest test of each batch writes: behind the places of the random requests.
const HONEST_SECTOR: u64 = 8192;
/// Requests of that test: three through each queue.
const HONEST_REQUESTS: u64 = 3 * WIDE.queues as u64;

/// Runs `cases` batches; returns true when all went well.
pub(crate) fn run(seed: u64, cases: u32, device: Option<&PathBuf>) -> Result<bool> {
    let name = format!("hostile.fuzz_tap_seed_{seed}_cases_{cases}");
    reported(&name, device, seed, |lab| batches(lab, seed, cases))
}

fn batches(lab: &mut Lab, seed: u64, cases: u32) -> Result<Option<String>> {
    let mut rng = Rng::new(seed);
    let mut seen = ProcessEvents::default();
    let mut case = 0;
    while case < cases {
        lab.begin()?;
        let mut fuzz = Fuzz::start(lab, seen)?;
        let end = cases.min(case + CHECK_EVERY);
        while case < end {
            fuzz.batch(&mut rng)
                .with_context(|| format!("seed {seed}, batch {case}"))?;
            case += 1;
        }
        // The counters must return to their old values, so the disk is destroyed first.
        let place = || format!("seed {seed}, after batch {case}");
        seen = fuzz.finish().with_context(place)?;
        lab.check().with_context(place)?;
    }
    let enough = cases < CHECK_EVERY || seen.is_whole();
    ensure!(enough, "something never happened: {seen:?}");
    Ok(Some(format!("{seen:?}")))
}

/// A disk, its process and its frontend.
struct Fuzz {
    session: Session,
    store: DiskData,
    /// Present except while one process replaces another.
    process: Option<FuzzProcess>,
    ledger: Ledger,
    disk: TapDisk,
}

impl Fuzz {
    fn start(lab: &Lab, seen: ProcessEvents) -> Result<Fuzz> {
        let disk = TapDisk::make()?;
        let mut process = FuzzProcess::open(&disk)?;
        process.seen = seen;
        process.start()?;
        let session = lab.session_on_tap(&disk, WIDE)?;
        Ok(Fuzz {
            session,
            store: DiskData::new()?,
            process: Some(process),
            ledger: Ledger::new(),
            disk,
        })
    }

    /// Sends some requests, and makes random calls until all of them are answered.
    fn batch(&mut self, rng: &mut Rng) -> Result<()> {
        let count = self.ledger.ask(&mut self.session, rng)?;
        let (process, store, ledger) = self.parts()?;
        for _ in 0..rng.below(3) {
            calls::harmless(process, ledger, rng)?;
        }
        all_posted(process, ledger, count)?;
        for _ in 0..rng.below(10) {
            calls::any(process, store, ledger, rng)?;
        }
        if rng.below(8) == 0 {
            self.die(rng)?;
        }
        let (process, store, ledger) = self.parts()?;
        let begun = Instant::now();
        while !ledger.is_over() {
            process.serve(store, ledger)?;
            let late = begun.elapsed() > ANSWER;
            ensure!(!late, "not delivered: {:?}", ledger.open());
        }
        let answers = self.session.answers(count)?;
        self.ledger.judge(&self.session, &answers)?;
        self.exercise(rng)?;
        let (process, _, ledger) = self.parts()?;
        process.judge(ledger)
    }

    fn parts(&mut self) -> Result<(&mut FuzzProcess, &DiskData, &mut Ledger)> {
        let process = self.process.as_mut().context("no process")?;
        Ok((process, &self.store, &mut self.ledger))
    }

    /// The process dies with all of its requests, and another one starts.
    fn die(&mut self, rng: &mut Rng) -> Result<()> {
        let process = self.process.take().context("no process")?;
        let mut next = process.die(&self.disk, &mut self.ledger)?;
        calls::before_the_start(&mut next, rng)?;
        next.start()?;
        self.process = Some(next);
        Ok(())
    }

    /// Runs the honest test, which must not suffer from calls that are only malformed.
    fn exercise(&mut self, rng: &mut Rng) -> Result<()> {
        let Fuzz {
            session,
            store,
            process,
            ledger,
            ..
        } = self;
        let process = process.as_mut().context("no process")?;
        let seed = rng.next() as u32;
        let mut calls = rng.below(6);
        thread::scope(|scope| {
            let guest = scope.spawn(|| session.exercise(HONEST_SECTOR, seed));
            while !guest.is_finished() {
                process.serve(store, ledger)?;
                if calls > 0 {
                    calls -= 1;
                    calls::harmless(process, ledger, rng)?;
                }
            }
            match guest.join() {
                Ok(result) => result,
                Err(_) => bail!("the frontend's thread died"),
            }
        })
        .context("good requests fail")?;
        self.ledger.skip(HONEST_REQUESTS);
        Ok(())
    }

    /// Checks that the disk has the right data, and tears everything down.
    fn finish(mut self) -> Result<ProcessEvents> {
        // The end of a ring takes waiting commands along, so the next process starts without any.
        let process = self.process.take().context("no process")?;
        let mut process = process.die(&self.disk, &mut self.ledger)?;
        process.start()?;
        let Fuzz {
            session,
            store,
            ledger,
            disk,
            ..
        } = self;
        crate::tap::scene::while_served(&process.node, &store, || {
            let mut session = session;
            ledger.verify(&mut session)?;
            session.finish()
        })?;
        let seen = process.seen;
        drop(process);
        disk.destroy()?;
        Ok(seen)
    }
}

/// Waits until the disk has all requests of a batch.
fn all_posted(process: &mut FuzzProcess, ledger: &Ledger, count: usize) -> Result<()> {
    let begun = Instant::now();
    loop {
        let info = process.node.ask()?;
        if (info.waiting + info.delivered) as usize == count {
            return Ok(());
        }
        let late = begun.elapsed() > ANSWER;
        ensure!(!late, "of {count} requests the disk has {info:?}");
        process.drain(ledger)?;
        thread::yield_now();
    }
}
