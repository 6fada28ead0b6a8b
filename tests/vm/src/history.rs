// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Reads and writes a disk at random from many threads, and checks the data that the reads return.
//!
//! Runs in a guest. Each written sector carries a value of its own, and the program records the moments at which each
//! request was issued and answered; then the checker of the simulation (`tests/sim/src/history.rs`) decides whether
//! some order of the requests explains the reads. It works in rounds: at the end of one all threads wait, the program
//! reads the whole area, and the next round begins with that content, so that neither memory nor time grows.

use crate::memory::Aligned;
use crate::sys::discard;
use anyhow::{bail, ensure, Context, Result};
use sim::history::{decode, encode, value, DiskHistory, SECTOR, ZERO};
use sim::rng::Rng;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Sectors in one request at most: more than fit into a request that is not indirect.
const MAX_SECTORS: u64 = 192;
/// Discards are in whole units of this many sectors.
const DISCARD: u64 = 8;
/// Time of writes before a round. Not 0, which is the time of a disk without any write.
const BEFORE: u64 = 1;
/// Number of unexplained sectors that it prints.
const TOLD: usize = 5;

/// Work to do.
#[derive(clap::Args)]
pub(crate) struct HistoryArgs {
    /// The disk.
    device: PathBuf,
    /// Seed of the random numbers.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Requests that are in flight at once.
    #[arg(long, default_value_t = 16)]
    threads: u32,
    /// Sectors that are used, from the first one.
    #[arg(long, default_value_t = 2048)]
    sectors: u64,
    /// Requests of each thread in a round.
    #[arg(long, default_value_t = 60)]
    requests: u32,
    /// Rounds at least.
    #[arg(long, default_value_t = 1)]
    rounds: u32,
    /// Continue until this file exists.
    #[arg(long)]
    until: Option<PathBuf>,
    /// Discard as well.
    #[arg(long)]
    discard: bool,
    /// A discarded range may also stay as it is, in whole or in part.
    #[arg(long)]
    hints: bool,
}

/// Operation of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Read,
    Write,
    /// A write that is durable when it is answered.
    Durable,
    Flush,
    Discard,
}

/// A request that was answered. `number` is that of a write or discard.
struct AnsweredRequest {
    op: Op,
    start: u64,
    sectors: u64,
    number: u32,
    issued: u64,
    answered: u64,
    /// Values that a read returned.
    found: Vec<Option<u64>>,
}

/// State that all threads share.
struct SharedHistory<'a> {
    args: &'a HistoryArgs,
    disk: File,
    /// Descriptor whose writes are durable when they are answered.
    durable: File,
    /// Numbers events: one that ends before another begins has the lower number.
    clock: AtomicU64,
    /// Numbers writes.
    numbers: AtomicU32,
    slowest_ns: AtomicU64,
}

/// Numbers of requests.
#[derive(Default)]
struct RequestCounts {
    reads: u64,
    writes: u64,
    flushes: u64,
    discards: u64,
}

/// Does it, and fails if something was read that cannot be.
pub(crate) fn main(args: &HistoryArgs) -> Result<()> {
    ensure!(
        args.sectors > MAX_SECTORS && args.sectors % DISCARD == 0 && args.threads > 0,
        "--sectors must be a multiple of {DISCARD} above {MAX_SECTORS}, and --threads not 0"
    );
    let shared = SharedHistory {
        args,
        disk: open(&args.device, 0)?,
        durable: open(&args.device, libc::O_DSYNC)?,
        clock: AtomicU64::new(BEFORE + 2),
        numbers: AtomicU32::new(1),
        slowest_ns: AtomicU64::new(0),
    };
    let (mut counts, mut rounds) = (RequestCounts::default(), 0);
    // The old content of the disk is no write of this program.
    shared.zero()?;
    let mut known = shared.contents()?;
    while rounds < args.rounds || args.until.as_deref().is_some_and(|file| !file.exists()) {
        let events = shared.round(rounds)?;
        counts.add(&events);
        known = shared.judge(&known, events)?;
        rounds += 1;
    }
    println!(
        "history: seed {}, {rounds} rounds, {} reads, {} writes, {} flushes, {} discards, slowest {} ms: explained",
        args.seed,
        counts.reads,
        counts.writes,
        counts.flushes,
        counts.discards,
        shared.slowest_ns.load(Ordering::Relaxed) / 1_000_000
    );
    Ok(())
}

fn open(device: &Path, flags: i32) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    let file = options.custom_flags(libc::O_DIRECT | flags).open(device);
    file.with_context(|| format!("cannot open {}", device.display()))
}

impl SharedHistory<'_> {
    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    /// All threads do their requests; all answers are there when this returns.
    fn round(&self, round: u32) -> Result<Vec<AnsweredRequest>> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.args.threads)
                .map(|thread| {
                    let seed =
                        self.args.seed ^ (u64::from(round) << 32) ^ (u64::from(thread) << 16);
                    scope.spawn(move || self.thread(&mut Rng::new(seed)))
                })
                .collect();
            let mut events = Vec::new();
            for thread in threads {
                let result = thread
                    .join()
                    .map_err(|_| anyhow::anyhow!("a thread panicked"))?;
                events.extend(result?);
            }
            Ok(events)
        })
    }

    fn thread(&self, rng: &mut Rng) -> Result<Vec<AnsweredRequest>> {
        let mut memory = Aligned::new((MAX_SECTORS as usize) * SECTOR);
        (0..self.args.requests)
            .map(|_| self.request(rng, &mut memory))
            .collect()
    }

    /// Executes one random request: most are small, and half of them are in the first part of the disk, where they meet
    /// others.
    fn request(&self, rng: &mut Rng, memory: &mut Aligned) -> Result<AnsweredRequest> {
        let op = match rng.below(100) {
            0..45 => Op::Read,
            45..85 => Op::Write,
            85..91 => Op::Durable,
            91..95 if self.args.discard => Op::Discard,
            91..95 => Op::Write,
            _ => Op::Flush,
        };
        let most = if rng.below(8) == 0 { MAX_SECTORS } else { 16 };
        let mut sectors = 1 + rng.below(most);
        let area = if rng.below(2) == 0 {
            (MAX_SECTORS + 64).min(self.args.sectors)
        } else {
            self.args.sectors
        };
        let mut start = rng.below(area - sectors + 1);
        match op {
            Op::Flush => (start, sectors) = (0, 0),
            Op::Discard => {
                start -= start % DISCARD;
                sectors = DISCARD;
            }
            _ => (),
        }
        self.execute(op, start, sectors, memory)
    }

    fn execute(
        &self,
        op: Op,
        start: u64,
        sectors: u64,
        memory: &mut Aligned,
    ) -> Result<AnsweredRequest> {
        let bytes = memory.get(usize::try_from(sectors)? * SECTOR);
        let number = match op {
            Op::Write | Op::Durable | Op::Discard => self.numbers.fetch_add(1, Ordering::Relaxed),
            Op::Read | Op::Flush => 0,
        };
        if matches!(op, Op::Write | Op::Durable) {
            for (sector, bytes) in (start..).zip(bytes.chunks_exact_mut(SECTOR)) {
                encode(value(number, sector), bytes);
            }
        }
        let offset = start * SECTOR as u64;
        let begun = Instant::now();
        let issued = self.now();
        let result = match op {
            Op::Read => self.disk.read_exact_at(bytes, offset),
            Op::Write => self.disk.write_all_at(bytes, offset),
            Op::Durable => self.durable.write_all_at(bytes, offset),
            Op::Flush => self.disk.sync_data(),
            Op::Discard => discard(&self.disk, offset, sectors * SECTOR as u64),
        };
        let answered = self.now();
        result.with_context(|| format!("{op:?} of {sectors} sectors at {start}"))?;
        self.slowest(begun.elapsed());
        let found = match op {
            Op::Read => bytes.chunks_exact(SECTOR).map(decode).collect(),
            _ => Vec::new(),
        };
        Ok(AnsweredRequest {
            op,
            start,
            sectors,
            number,
            issued,
            answered,
            found,
        })
    }

    fn slowest(&self, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.slowest_ns.fetch_max(ns, Ordering::Relaxed);
    }

    fn zero(&self) -> Result<()> {
        let mut memory = Aligned::new((MAX_SECTORS as usize) * SECTOR);
        let mut start = 0;
        while start < self.args.sectors {
            let sectors = MAX_SECTORS.min(self.args.sectors - start);
            let bytes = memory.get(usize::try_from(sectors)? * SECTOR);
            self.disk
                .write_all_at(bytes, start * SECTOR as u64)
                .context("cannot clear the disk")?;
            start += sectors;
        }
        Ok(())
    }

    /// Returns the value of each sector.
    fn contents(&self) -> Result<Vec<Option<u64>>> {
        let mut memory = Aligned::new((MAX_SECTORS as usize) * SECTOR);
        let (mut all, mut start) = (Vec::new(), 0);
        while start < self.args.sectors {
            let sectors = MAX_SECTORS.min(self.args.sectors - start);
            all.extend(self.execute(Op::Read, start, sectors, &mut memory)?.found);
            start += sectors;
        }
        Ok(all)
    }

    /// Explains a round, given the disk's content before it; returns its content after it.
    fn judge(
        &self,
        before: &[Option<u64>],
        events: Vec<AnsweredRequest>,
    ) -> Result<Vec<Option<u64>>> {
        let issued = self.now();
        let after = self.contents()?;
        let answered = self.now();
        let hints = self.args.hints;
        let problems = explain(before, events, &after, (issued, answered), hints);
        if !problems.is_empty() {
            for problem in problems.iter().take(TOLD) {
                println!("history: {problem}");
            }
            bail!(
                "seed {}: {} sectors were read that no order of the requests explains",
                self.args.seed,
                problems.len()
            );
        }
        Ok(after)
    }
}

/// Returns the unexplained sectors of a round, after which the disk was read within `last`. With `hints` discards may
/// have done nothing.
fn explain(
    before: &[Option<u64>],
    mut events: Vec<AnsweredRequest>,
    after: &[Option<u64>],
    last: (u64, u64),
    hints: bool,
) -> Vec<String> {
    let mut history = DiskHistory::default();
    for (sector, held) in (0u64..).zip(before) {
        if let Some(held) = held.filter(|held| *held != ZERO) {
            // CAST: the upper half.
            let number = (held >> 32) as u32;
            history.write(number, BEFORE, sector, 1, false);
            history.answered(number, BEFORE + 1, true);
        }
    }
    for event in &events {
        match event.op {
            Op::Write | Op::Durable => {
                history.write(
                    event.number,
                    event.issued,
                    event.start,
                    event.sectors,
                    false,
                );
            }
            Op::Discard => {
                history.discard(event.number, event.issued, event.start, event.sectors);
            }
            Op::Read | Op::Flush => continue,
        }
        let is_sure = event.op != Op::Discard || !hints;
        history.answered(event.number, event.answered, is_sure);
    }
    events.sort_unstable_by_key(|event| event.answered);
    let mut problems = Vec::new();
    let reads = events.iter().filter(|event| event.op == Op::Read);
    let seen = reads.flat_map(|event| {
        (event.start..)
            .zip(&event.found)
            .map(|(sector, found)| (sector, *found, event.issued, event.answered))
    });
    let last = (0u64..)
        .zip(after)
        .map(|(sector, found)| (sector, *found, last.0, last.1));
    for (sector, found, issued, answered) in seen.chain(last) {
        if let Err(problem) = history.read(sector, found, issued, answered) {
            problems.push(problem);
        }
    }
    problems
}

impl RequestCounts {
    fn add(&mut self, events: &[AnsweredRequest]) {
        for event in events {
            *match event.op {
                Op::Read => &mut self.reads,
                Op::Write | Op::Durable => &mut self.writes,
                Op::Flush => &mut self.flushes,
                Op::Discard => &mut self.discards,
            } += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(
        op: Op,
        number: u32,
        issued: u64,
        answered: u64,
        found: Option<u64>,
    ) -> AnsweredRequest {
        AnsweredRequest {
            op,
            start: 0,
            sectors: 1,
            number,
            issued,
            answered,
            found: match op {
                Op::Read => vec![found],
                _ => Vec::new(),
            },
        }
    }

    /// Returns the number of complaints about a write 2 over [10, 20] onto a write 1 of the round before, a read over
    /// [30, 40], and the final content.
    fn verdict(read: Option<u64>, end: Option<u64>) -> usize {
        let events = vec![
            event(Op::Write, 2, 10, 20, None),
            event(Op::Read, 0, 30, 40, read),
        ];
        explain(&[Some(value(1, 0))], events, &[end], (50, 60), false).len()
    }

    #[test]
    fn a_round_begins_with_what_the_disk_held() {
        let (old, new) = (Some(value(1, 0)), Some(value(2, 0)));
        assert_eq!(verdict(new, new), 0);
        assert_eq!(verdict(old, new), 1);
        assert_eq!(verdict(new, old), 1);
        assert_eq!(verdict(Some(ZERO), new), 1);
        assert_eq!(verdict(None, new), 1);
        let quiet = explain(&[old], Vec::new(), &[old], (50, 60), false);
        assert_eq!(quiet, Vec::<String>::new());
        let quiet = explain(&[old], Vec::new(), &[Some(ZERO)], (50, 60), false);
        assert_eq!(quiet.len(), 1);
    }

    #[test]
    fn a_discard_that_is_a_hint_may_do_nothing() {
        let (old, new) = (Some(value(1, 0)), Some(value(3, 0)));
        let wrong = |hints: bool, end: Option<u64>| {
            let discard = || event(Op::Discard, 2, 10, 20, None);
            let both = vec![discard(), event(Op::Write, 3, 30, 40, None)];
            let first = explain(&[old], vec![discard()], &[end], (50, 60), hints);
            let then = explain(&[old], both, &[end], (50, 60), hints);
            (first.len(), then.len())
        };
        assert_eq!(wrong(false, old), (1, 1));
        assert_eq!(wrong(true, old), (0, 1));
        assert_eq!(wrong(true, Some(ZERO)), (0, 1));
        assert_eq!(wrong(true, new), (1, 0));
    }
}
