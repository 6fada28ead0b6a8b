// SPDX-License-Identifier: MIT OR Apache-2.0
//! Work of a disk between two looks.

use crate::host::block::Block;
use crate::host::task::Task;
use crate::host::vbd::{Operation, Vbd};
use crate::sample::SampledDisk;
use control::stats::{Histogram, Stats};
use serde::Serialize;
use std::time::Duration;

const SECTOR: u64 = 512;

/// I/O of one operation that ended in an interval, as the driver counts it: the wait for its answer, without
/// that for pages.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct EndedIo {
    /// Which one.
    pub(crate) operation: Operation,
    /// How many ended. A request that was done in pieces is several.
    pub(crate) done: u64,
    /// How long they took on average.
    pub(crate) mean_ms: f64,
}

/// The figures of an interval.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Figures {
    /// Its length.
    pub(crate) seconds: f64,
    /// Reads in a second.
    pub(crate) reads: f64,
    /// Writes in a second.
    pub(crate) writes: f64,
    /// Bytes read in a second.
    pub(crate) read_bytes: f64,
    /// Bytes written in a second.
    pub(crate) written_bytes: f64,
    /// Requests of all kinds, not in a second but all of them.
    pub(crate) requests: u64,
    /// The mean time of requests on the block device, whoever they were from.
    pub(crate) storage_ms: Option<f64>,
    /// Mean times of finished requests, by operation; no entry for an operation without one, or without a count.
    pub(crate) awaits: Vec<EndedIo>,
    /// Requests that it has now, if that is counted.
    pub(crate) in_flight: Option<u64>,
    /// For how long its storage has had the oldest one, if that is counted.
    pub(crate) oldest_ms: Option<f64>,
    /// Half of the requests took longer, from their arrival in the kernel to their answer.
    pub(crate) half_above_us: Option<u64>,
    /// 99 of 100 requests took less.
    pub(crate) p99_us: Option<u64>,
    /// Times that a request had to wait for pages.
    pub(crate) page_waits: u64,
    /// The part of the time, of 1 for each queue, that requests waited for pages, if that is counted.
    pub(crate) page_wait: Option<f64>,
    /// Pieces beyond the first of requests that were done in several for want of pages.
    pub(crate) pieces: u64,
    /// The part of the passes over its rings that found one full, if that is counted.
    pub(crate) ring_full: Option<f64>,
    /// The part of the room in its rings that was in use on average, if that is counted.
    pub(crate) ring_used: Option<f64>,
    /// Requests that ended in an error.
    pub(crate) errors: u64,
    /// Requests of the guest that were no proper ones.
    pub(crate) refused: u64,
    /// The part of the time, of 1, that the one of its threads with the longest waits could have run and had
    /// no processor, without what the other threads of its process may have kept it waiting.
    pub(crate) starved: f64,
    /// The part of the time that the busiest of its threads ran.
    pub(crate) ran: f64,
    /// Processor time of all threads of its process, of 1 for each processor.
    pub(crate) process_ran: f64,
}

impl Figures {
    /// Of a disk between two looks; nothing without an interval.
    pub(crate) fn between(
        before: &SampledDisk,
        now: &SampledDisk,
        elapsed: Duration,
    ) -> Option<Figures> {
        let seconds = elapsed.as_secs_f64();
        if seconds <= 0.0 {
            return None;
        }
        let mut figures = Figures {
            seconds,
            storage_ms: mean_ms(before.block.as_ref(), now.block.as_ref()),
            ..Figures::default()
        };
        figures.add_counters(before, now);
        figures.add_stats(before, now);
        figures.add_threads(before, now);
        Some(figures)
    }

    /// Adds the driver's counters.
    fn add_counters(&mut self, before: &SampledDisk, now: &SampledDisk) {
        let (Some(old), Some(new)) = (&before.vbd, &now.vbd) else {
            return;
        };
        let more = |name: &str| new.counter(name).saturating_sub(old.counter(name));
        let rate = |count: u64| count as f64 / self.seconds;
        self.reads = rate(more("rd_req"));
        self.writes = rate(more("wr_req"));
        self.read_bytes = rate(more("rd_sect").saturating_mul(SECTOR));
        self.written_bytes = rate(more("wr_sect").saturating_mul(SECTOR));
        self.requests = new.requests().saturating_sub(old.requests());
        self.page_waits = more("oo_req");
        self.errors = more("failed");
        self.refused = more("refused");
        self.pieces = more("pieces");
        let passes = more("passes");
        let is_counted = passes > 0 && new.counters.contains_key("ring_full");
        self.ring_full = is_counted.then(|| more("ring_full") as f64 / passes as f64);
        self.add_times(old, new);
    }

    /// Adds the driver's times.
    fn add_times(&mut self, old: &Vbd, new: &Vbd) {
        self.in_flight = new.in_flight();
        self.oldest_ms = new.oldest().map(milliseconds);
        let waited = || Some(new.page_wait()?.saturating_sub(old.page_wait()?));
        self.page_wait = waited().map(|waited| waited.as_secs_f64() / self.seconds);
        let all = Operation::ALL.into_iter();
        self.awaits = all
            .filter_map(|operation| EndedIo::between(operation, old, new))
            .collect();
        // The average number of requests under way is their total time in a second. A sum of no numbers would be -0.0.
        let took: f64 = self
            .awaits
            .iter()
            .map(|it| it.done as f64 * it.mean_ms)
            .fold(0.0, |sum, ms| sum + ms);
        let slots = new.counted("ring_slots").filter(|slots| *slots > 0);
        self.ring_used = slots.map(|slots| took / 1000.0 / self.seconds / slots as f64);
    }

    /// Returns the finished requests of an operation, if there were some.
    pub(crate) fn awaited(&self, operation: Operation) -> Option<EndedIo> {
        let mut all = self.awaits.iter();
        all.find(|one| one.operation == operation).copied()
    }

    /// Adds the process' counters, which have the finished requests and their times.
    fn add_stats(&mut self, before: &SampledDisk, now: &SampledDisk) {
        let Some((old, new)) = stats(before, now) else {
            return;
        };
        // The process sees the rest of what the driver counts.
        if by_kernel(now) {
            return;
        }
        let more = |count: fn(&Stats) -> u64| count(new).saturating_sub(count(old));
        let rate = |count: fn(&Stats) -> u64| more(count) as f64 / self.seconds;
        self.reads = rate(|stats| stats.read.requests);
        self.writes = rate(|stats| stats.write.requests);
        self.read_bytes = rate(|stats| stats.read.bytes);
        self.written_bytes = rate(|stats| stats.write.bytes);
        self.requests = more(|stats| counters(stats).map(|one| one.requests).iter().sum());
        self.errors = more(|stats| counters(stats).map(|one| one.errors).iter().sum());
        let mut latency = Histogram::default();
        for (new, old) in [(&new.read, &old.read), (&new.write, &old.write)] {
            latency = latency.with(&new.latency.since(&old.latency));
        }
        if latency.total() > 0 {
            self.half_above_us = Some(latency.above(0.5) / 1000);
            self.p99_us = Some(latency.below(0.99) / 1000);
        }
    }

    fn add_threads(&mut self, before: &SampledDisk, now: &SampledDisk) {
        let seconds = self.seconds;
        // Running and waiting time of each thread.
        let parts = |before: &[Task], now: &[Task]| -> Vec<(f64, f64)> {
            let pairs = now
                .iter()
                .filter_map(|task| Some((task.among(before)?, task)));
            let part =
                |old: Duration, new: Duration| new.saturating_sub(old).as_secs_f64() / seconds;
            pairs
                .map(|(old, new)| (part(old.ran, new.ran), part(old.waited, new.waited)))
                .collect()
        };
        let process = parts(&before.process, &now.process);
        self.process_ran = process.iter().fold(0.0, |sum, (ran, _)| sum + ran);
        for (ran, waited) in &process {
            let by_others = waited - (self.process_ran - ran);
            self.starved = self.starved.max(by_others);
            self.ran = self.ran.max(*ran);
        }
        for (ran, waited) in parts(&before.queues, &now.queues) {
            self.starved = self.starved.max(waited);
            self.ran = self.ran.max(ran);
        }
    }
}

impl EndedIo {
    fn between(operation: Operation, old: &Vbd, new: &Vbd) -> Option<EndedIo> {
        let ((before, earlier), (now, later)) = (old.took(operation)?, new.took(operation)?);
        let done = now.saturating_sub(before);
        let took = milliseconds(later.saturating_sub(earlier));
        (done > 0).then(|| EndedIo {
            operation,
            done,
            mean_ms: took / done as f64,
        })
    }
}

pub(crate) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn mean_ms(before: Option<&Block>, now: Option<&Block>) -> Option<f64> {
    Some(now?.mean_ms(before?)?.0)
}

/// The kernel serves the disk without its process.
fn by_kernel(disk: &SampledDisk) -> bool {
    let kernel = disk.tap.as_ref().and_then(|tap| tap.row.kernel.as_ref());
    kernel.is_some_and(|kernel| kernel.by_itself().is_some())
}

/// Returns the counters of both looks, if they are of one process.
fn stats<'a>(before: &'a SampledDisk, now: &'a SampledDisk) -> Option<(&'a Stats, &'a Stats)> {
    let (old, new) = (before.tap.as_ref()?, now.tap.as_ref()?);
    let is_same = old.row.pid == new.row.pid;
    is_same.then_some(())?;
    Some((old.stats.as_deref()?, new.stats.as_deref()?))
}

/// The kinds of requests.
pub(crate) fn counters(stats: &Stats) -> [&control::stats::Counter; 5] {
    let Stats {
        read,
        write,
        flush,
        discard,
        zeroes,
        ..
    } = stats;
    [read, write, flush, discard, zeroes]
}

#[cfg(test)]
mod tests {
    use super::Figures;
    use crate::host::task::Task;
    use crate::status::fake;
    use std::time::Duration;

    const TWO: Duration = Duration::from_secs(2);

    #[test]
    fn latencies_are_those_of_the_interval() {
        let mut before = fake::tap(0);
        let counted = fake::stats(&mut before);
        for _ in 0..1000 {
            counted.read.latency.add(10_000_000_000);
        }
        let mut now = before.clone();
        let counted = fake::stats(&mut now);
        counted.read.requests += 100;
        for _ in 0..100 {
            counted.read.latency.add(1_000_000);
        }
        let figures = Figures::between(&before, &now, TWO).expect("an interval");
        assert_eq!((figures.reads, figures.requests), (50.0, 100));
        assert_eq!(
            (figures.half_above_us, figures.p99_us),
            (Some(524), Some(1048))
        );
        let idle = Figures::between(&now, &now, TWO).expect("an interval");
        assert_eq!((idle.reads, idle.p99_us), (0.0, None));
        assert_eq!(Figures::between(&now, &now, Duration::ZERO), None);
    }

    #[test]
    fn another_process_counts_for_itself() {
        let before = fake::tap(0);
        let mut now = before.clone();
        fake::stats(&mut now).read.requests = 20;
        if let Some(tap) = &mut now.tap {
            tap.row.pid = Some(999);
        }
        let figures = Figures::between(&before, &now, TWO).expect("an interval");
        assert_eq!((figures.reads, figures.requests), (0.0, 0));
    }

    #[test]
    fn of_what_the_kernel_serves_the_driver_counts() {
        let mut before = fake::tap(0);
        fake::kernel(&mut before).backings = 1;
        let mut now = before.clone();
        fake::stats(&mut now).read.requests = 20;
        let vbd = now.vbd.as_mut().expect("a guest has it");
        vbd.counters.insert("rd_req".into(), 100);
        let figures = Figures::between(&before, &now, TWO).expect("an interval");
        assert_eq!((figures.reads, figures.p99_us), (50.0, None));
    }

    #[test]
    fn the_thread_with_the_longest_waits_counts() {
        let mut before = fake::phy();
        let task = |pid, waited| Task {
            pid,
            waited: Duration::from_millis(waited),
            ..Task::default()
        };
        before.queues = vec![task(1, 100), task(2, 100)];
        let mut now = before.clone();
        now.queues = vec![task(1, 100), task(2, 600), task(3, 9000)];
        let figures = Figures::between(&before, &now, TWO).expect("an interval");
        assert_eq!(figures.starved, 0.25);
    }

    #[test]
    fn what_threads_of_a_process_keep_from_each_other_is_not_what_others_do() {
        let mut before = fake::tap(0);
        let task = |pid, ran, waited| Task {
            pid,
            ran: Duration::from_millis(ran),
            waited: Duration::from_millis(waited),
            ..Task::default()
        };
        before.process = vec![task(1, 0, 0), task(2, 0, 0)];
        let mut now = before.clone();
        now.process = vec![task(1, 800, 1200), task(2, 1200, 800)];
        let figures = Figures::between(&before, &now, TWO).expect("an interval");
        assert_eq!((figures.starved, figures.process_ran), (0.0, 1.0));
        // The figures differ if other programs use the processor.
        now.process = vec![task(1, 200, 1800), task(2, 200, 1800)];
        let figures = Figures::between(&before, &now, TWO).expect("an interval");
        assert_eq!((figures.starved, figures.process_ran), (0.8, 0.2));
    }
}
