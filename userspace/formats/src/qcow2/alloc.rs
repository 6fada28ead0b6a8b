// SPDX-License-Identifier: MIT OR Apache-2.0
//! Clusters for new content, and clusters that are not used any more.
//!
//! Clusters are prepared in runs: they are made to read as zeroes, their refcounts become one, and one flush makes both
//! durable. Only then may a request use them, so that an entry may lead to one of them as soon as its content is in
//! place: after a power cut the cluster holds zeroes or the new content, never older data, and it is never free as
//! well. If the process dies, prepared clusters that it did not use are leaked; when it closes the image, they are
//! freed.
//!
//! A cluster that is not used any more is freed when nothing leads to it on the disk (after a flush), and no
//! request relies on it that had found it before.

use super::geometry::MAX_OFFSET;
use super::image::Qcow2Image;
use super::refcounts::{get, set, SliceRefcounts};
use crate::{storage, Storage};
use diskio::{Errno, Gate};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

/// Bytes that are prepared at first, and at most.
const FIRST_RUN: u64 = 2 << 20;
const LONGEST_RUN: u64 = 64 << 20;
/// Parts of a run at most: each is zeroed by a call.
const PARTS: usize = 64;
/// Releases that may wait before a caller has to flush.
const WAITING: usize = 1024;

/// Clusters in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Clusters {
    pub(crate) first: u64,
    pub(crate) count: u64,
}

/// Clusters that lose a user.
#[derive(Clone, Copy, Debug)]
struct Release {
    clusters: Clusters,
    /// The flush that makes durable that nothing leads to them.
    barrier: u64,
    /// Requests with smaller numbers may rely on them.
    users: u64,
}

/// Prepared clusters, and clusters that wait to be freed.
#[derive(Debug)]
pub(crate) struct Allocator {
    ready: RefCell<VecDeque<Clusters>>,
    /// Apart from the known ones, no cluster below this is free.
    cursor: Cell<u64>,
    /// Bytes of the next run.
    run: Cell<u64>,
    waiting: RefCell<VecDeque<Release>>,
    /// Serialises changes of refcounts.
    pub(super) gate: Gate,
    pub(crate) prepared: Cell<u64>,
    pub(crate) freed: Cell<u64>,
}

impl Allocator {
    pub(crate) fn new() -> Self {
        Self {
            ready: RefCell::default(),
            cursor: Cell::new(0),
            run: Cell::new(FIRST_RUN),
            waiting: RefCell::default(),
            gate: Gate::default(),
            prepared: Cell::new(0),
            freed: Cell::new(0),
        }
    }

    /// At most `count` clusters in a row that are prepared.
    fn pop(&self, count: u64) -> Option<Clusters> {
        let mut ready = self.ready.borrow_mut();
        let front = ready.front_mut()?;
        let taken = Clusters {
            first: front.first,
            count: front.count.min(count),
        };
        front.first += taken.count;
        front.count -= taken.count;
        if front.count == 0 {
            ready.pop_front();
        }
        Some(taken)
    }

    /// Releases that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.borrow().len()
    }
}

impl<S: Storage> Qcow2Image<S> {
    /// Allocates up to `count` contiguous clusters, at least one. The clusters read as zeroes and have a refcount, both
    /// durably.
    pub(crate) async fn take(&self, count: u64) -> Result<Clusters, Errno> {
        loop {
            if let Some(taken) = self.allocator.pop(count) {
                return Ok(taken);
            }
            let _pass = self.allocator.gate.alone().await;
            // Another task may have prepared some.
            if self.allocator.ready.borrow().is_empty() {
                self.prepare().await?;
            }
        }
    }

    /// Allocates a row of clusters as [`take`](Self::take) does, but prepares longer runs from now on, so that the end
    /// of a run does not cut the row short.
    pub(crate) async fn take_run(&self, count: u64) -> Result<Clusters, Errno> {
        let bytes = count.saturating_mul(self.geometry.cluster());
        let run = &self.allocator.run;
        run.set(run.get().max(bytes.min(LONGEST_RUN)));
        self.take(count).await
    }

    /// Clusters lose a user. Nothing in the image's memory leads to them any more.
    pub(crate) fn release(&self, first: u64, count: u64) {
        let (barrier, users) = (self.barrier.next(), self.users.now());
        let mut waiting = self.allocator.waiting.borrow_mut();
        let last = waiting.back_mut();
        let last = last.filter(|last| {
            last.barrier == barrier && last.clusters.first + last.clusters.count == first
        });
        match last {
            Some(last) => {
                last.clusters.count += count;
                last.users = users;
            }
            None => waiting.push_back(Release {
                clusters: Clusters { first, count },
                barrier,
                users,
            }),
        }
    }

    /// Makes all writes durable that ended before this call. A flush that fails may have lost them although the next
    /// one succeeds, so tasks that wait for the next one get the error, too.
    pub(crate) async fn flush(&self) -> Result<(), Errno> {
        self.barrier.settle().await
    }

    /// Makes all writes durable that came since there was this number of errors, see [`diskio::Barrier::settle_since`].
    pub(crate) async fn flush_since(&self, errors: u64) -> Result<(), Errno> {
        self.barrier.settle_since(errors).await
    }

    /// Flushes up to this one say nothing of what waits for them: one of them failed.
    fn doubtful(&self) -> u64 {
        match self.barrier.lost() {
            0 => 0,
            failed => failed + 1,
        }
    }

    /// The range reads as zeroes, and the file is long enough for it.
    pub(crate) async fn prepare_range(&self, at: u64, len: u64) -> Result<(), Errno> {
        let size = self.file.size()?;
        let end = at + len;
        if end > size && self.file.is_fixed() {
            // Nothing may lead behind the end of a device.
            return Err(Errno::NOSPC);
        }
        if at < size {
            self.file.clear(at, end.min(size) - at).await?;
        }
        if end > size {
            self.file.set_size(end).await?;
        }
        self.slices.forget(at..end);
        Ok(())
    }

    /// Prepares the next run. The caller holds the gate, so no other task changes refcounts.
    async fn prepare(&self) -> Result<(), Errno> {
        let cluster = self.geometry.cluster();
        let bytes = self.allocator.run.get();
        let errors = self.barrier.errors();
        let found = self.gather((bytes / cluster).max(1)).await?;
        for part in &found {
            let at = part.first * cluster;
            self.check_no_table(at, part.count * cluster)?;
            self.prepare_range(at, part.count * cluster).await?;
            self.set_counts(*part, 1).await?;
        }
        self.flush_since(errors).await?;
        let count: u64 = found.iter().map(|part| part.count).sum();
        self.allocator.run.set((bytes * 2).min(LONGEST_RUN));
        self.allocator
            .prepared
            .set(self.allocator.prepared.get() + count);
        if let Some(last) = found.last() {
            self.allocator.cursor.set(last.first + last.count);
        }
        self.allocator.ready.borrow_mut().extend(found);
        self.free_or_say().await;
        Ok(())
    }

    /// Finds free clusters from the cursor on: `count` of them, or fewer if they are in many parts. Returns at least
    /// one.
    async fn gather(&self, count: u64) -> Result<Vec<Clusters>, Errno> {
        let mut found: Vec<Clusters> = Vec::new();
        let (mut at, mut missing) = (self.allocator.cursor.get(), count);
        let limit = self.limit()?;
        while missing > 0 && found.len() < PARTS {
            if at >= limit {
                break;
            }
            let Some(counts) = self.counts_to_change(at).await? else {
                if !found.is_empty() {
                    break;
                }
                self.make_block(at).await?;
                continue;
            };
            let (mut from, end) = (0, counts.count);
            while let Some((skip, len)) =
                self.free_in(&counts, from, end.min(from + missing.max(1)))
            {
                let len = len.min(limit.saturating_sub(at + skip));
                if len == 0 {
                    break;
                }
                missing -= len;
                push(&mut found, at + skip, len);
                from = skip + len;
                if missing == 0 || found.len() == PARTS {
                    return Ok(found);
                }
            }
            at += end;
            self.allocator.cursor.set(match found.first() {
                Some(first) => first.first,
                None => at,
            });
        }
        match found.is_empty() {
            true => Err(Errno::NOSPC),
            false => Ok(found),
        }
    }

    /// The first cluster that can never be one of the image: those of a device are all there.
    pub(super) fn limit(&self) -> Result<u64, Errno> {
        let end = match self.file.is_fixed() {
            true => self.file.size()?.min(MAX_OFFSET),
            false => MAX_OFFSET,
        };
        Ok(end / self.geometry.cluster())
    }

    /// The first free clusters among counts from `from` on, in a row, `most - from` at most.
    fn free_in(&self, counts: &SliceRefcounts, from: u64, most: u64) -> Option<(u64, u64)> {
        let order = self.geometry.refcount_order;
        let limit = most - from;
        counts.slice.look(|bytes| {
            // CAST: they are inside of a slice.
            let is_free = |number: &u64| get(bytes, counts.first + *number as usize, order) == 0;
            let first = (from..counts.count).find(is_free)?;
            let len = (first..counts.count).take_while(is_free).count() as u64;
            Some((first, len.min(limit)))
        })
    }

    /// Sets the refcounts of clusters that have one, and hands them to the kernel.
    async fn set_counts(&self, clusters: Clusters, value: u64) -> Result<(), Errno> {
        let order = self.geometry.refcount_order;
        let mut done = 0;
        while done < clusters.count {
            let counts = self.counts_to_change(clusters.first + done).await?;
            let counts = counts.ok_or_else(|| self.damaged("a refcount block is gone"))?;
            let some = counts.count.min(clusters.count - done);
            counts.slice.change(|bytes| {
                for number in 0..some as usize {
                    set(bytes, counts.first + number, order, value);
                }
            });
            self.slices.settle(&counts.slice).await?;
            done += some;
        }
        Ok(())
    }

    /// Frees what can be freed. To be called after a flush.
    pub(crate) async fn free(&self) {
        if self.allocator.waiting.borrow().is_empty() {
            return;
        }
        let _pass = self.allocator.gate.alone().await;
        self.free_or_say().await;
    }

    /// Frees released clusters for a caller that holds the gate. If that fails, the space is lost, which is reported;
    /// no request fails for it, because its own work is done.
    async fn free_or_say(&self) {
        if let Err(error) = self.free_released().await {
            self.damaged(format_args!("unused clusters cannot be freed ({error})"));
        }
    }

    async fn free_released(&self) -> Result<(), Errno> {
        loop {
            let next = self.allocator.waiting.borrow().front().copied();
            if next.is_some_and(|next| next.barrier <= self.doubtful()) {
                // The disk may still have an entry that leads there: rather a leak than a cluster of two.
                self.allocator.waiting.borrow_mut().pop_front();
                continue;
            }
            let next = next.filter(|next| {
                next.barrier <= self.barrier.done() && next.users <= self.users.oldest()
            });
            let Some(next) = next else { return Ok(()) };
            self.allocator.waiting.borrow_mut().pop_front();
            self.decrease(next.clusters).await?;
        }
    }

    /// Clusters lose a user; those that had no other are free.
    async fn decrease(&self, clusters: Clusters) -> Result<(), Errno> {
        let (order, cluster) = (self.geometry.refcount_order, self.geometry.cluster());
        let (at, len) = (clusters.first * cluster, clusters.count * cluster);
        if self.check_no_table(at, len).is_err() {
            // `check_no_table` has reported that. The entry that leads there is wrong, so no refcount is lowered.
            return Ok(());
        }
        let mut done = 0;
        while done < clusters.count {
            let first = clusters.first + done;
            let Some(counts) = self.counts_to_change(first).await? else {
                return Err(self.damaged(format_args!(
                    "cluster {first} was in use and has no refcount"
                )));
            };
            let some = counts.count.min(clusters.count - done);
            let mut freed = Vec::new();
            let mut wrong = None;
            counts.slice.change(|bytes| {
                for number in 0..some {
                    // CAST: inside of a slice.
                    let place = counts.first + number as usize;
                    match get(bytes, place, order) {
                        0 => wrong = Some(first + number),
                        count => {
                            set(bytes, place, order, count - 1);
                            if count == 1 {
                                push(&mut freed, first + number, 1);
                            }
                        }
                    }
                }
            });
            if let Some(cluster) = wrong {
                self.damaged(format_args!(
                    "cluster {cluster} was in use and has the refcount 0"
                ));
            }
            self.slices.settle(&counts.slice).await?;
            for part in freed {
                self.forget(part).await;
            }
            done += some;
        }
        Ok(())
    }

    /// Clusters are free: their content is given back, and they may be used again.
    async fn forget(&self, clusters: Clusters) {
        let cluster = self.geometry.cluster();
        let range = clusters.first * cluster..(clusters.first + clusters.count) * cluster;
        self.unpacked.forget(&range);
        self.slices.forget(range.clone());
        self.allocator
            .freed
            .set(self.allocator.freed.get() + clusters.count);
        if self.discard {
            // Without it they are free as well.
            let _ = storage::give_back(&self.file, range.start, range.end - range.start).await;
        }
        let cursor = &self.allocator.cursor;
        cursor.set(cursor.get().min(clusters.first));
    }

    /// Flushes and frees clusters once many are released, so that the list of waiting ones is bounded.
    pub(crate) async fn bound_released(&self) -> Result<(), Errno> {
        if self.allocator.waiting() < WAITING {
            return Ok(());
        }
        self.flush().await?;
        self.free().await;
        Ok(())
    }

    /// Frees prepared clusters that are unused. Clusters that remain are lost space, which is reported.
    pub(crate) async fn give_back(&self) {
        if let Err(error) = self.give_back_ready().await {
            self.damaged(format_args!(
                "unused clusters cannot be given back ({error})"
            ));
        }
    }

    async fn give_back_ready(&self) -> Result<(), Errno> {
        let _pass = self.allocator.gate.alone().await;
        let cluster = self.geometry.cluster();
        self.allocator.run.set(FIRST_RUN);
        loop {
            let next = self.allocator.ready.borrow_mut().pop_back();
            let Some(next) = next else { return Ok(()) };
            self.set_counts(next, 0).await?;
            let cursor = &self.allocator.cursor;
            cursor.set(cursor.get().min(next.first));
            // The end of the file is cut off again.
            if self.file.size()? == (next.first + next.count) * cluster {
                self.file.set_size(next.first * cluster).await?;
            }
        }
    }
}

/// Adds clusters behind others.
fn push(parts: &mut Vec<Clusters>, first: u64, count: u64) {
    match parts.last_mut() {
        Some(last) if last.first + last.count == first => last.count += count,
        _ => parts.push(Clusters { first, count }),
    }
}
