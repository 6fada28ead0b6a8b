// SPDX-License-Identifier: MIT OR Apache-2.0
//! Writing: where clusters are, or into new ones.

use super::alloc::Clusters;
use super::entry::{ClusterLocation, L2Entry, SubclusterSource};
use super::image::{ByteRun, Found, Qcow2Image};
use super::read::{all, PIECES};
use crate::Storage;
use diskio::{Bytes, Data, Errno};
use std::ops::Range;

/// Bytes of a write that go into new clusters at once, and at most are copied.
const AT_ONCE: u64 = 4 << 20;

/// A write into clusters that have to be changed: those of one slice of a table, in a row.
pub(crate) struct WritePlan {
    pub(crate) found: Found,
    /// The clusters of the disk.
    pub(crate) first: u64,
    /// Their current entries.
    pub(crate) old: Vec<L2Entry>,
    /// Clusters behind them that may get their place with them.
    ahead: u64,
    /// Range of the guest's write, in bytes of the disk.
    range: Range<u64>,
    /// Range to be stored: whole subclusters, filled up around the guest's bytes from the backing image.
    wide: Range<u64>,
}

impl<S: Storage> Qcow2Image<S> {
    /// Writes all of `data`. When this returns, no death of this process undoes it.
    pub(crate) async fn write(&self, guest: u64, data: Bytes) -> Result<(), Errno> {
        let _user = self.users.enter();
        self.begin_change(guest, data.len() as u64).await?;
        self.write_now(guest, data).await
    }

    /// Writes for a request that is counted already.
    pub(crate) async fn write_now(&self, guest: u64, data: Bytes) -> Result<(), Errno> {
        let whole = data.len() as u64;
        let mut at = 0;
        let mut pieces = Vec::new();
        while at < whole {
            let (run, len, found) = self.map(guest + at, whole - at).await?;
            if let ByteRun::Data {
                at: place,
                owned: true,
            } = run
            {
                let len = self.trusted(&found, place, len).await?;
                if len > 0 {
                    let part = part(&data, at, len);
                    pieces.push(self.overwrite(place, part, found));
                }
                at += len;
            } else {
                at += self
                    .allocate(guest + at, part(&data, at, whole - at))
                    .await?;
            }
            if pieces.len() == PIECES {
                all(std::mem::take(&mut pieces)).await?;
            }
        }
        match pieces.len() {
            1 => pieces.remove(0).await,
            _ => all(pieces).await,
        }
    }

    /// Returns how many bytes of a run of data may be overwritten in place, whose entries say that each cluster has one
    /// user. The refcounts must agree; if they do not for the first cluster, this clears the claim in its entry.
    async fn trusted(&self, found: &Found, place: u64, len: u64) -> Result<u64, Errno> {
        // A data file has no refcounts.
        let alone = match self.geometry.external {
            true => len,
            false => self.alone(place, len).await?,
        };
        if alone > 0 {
            return Ok(alone);
        }
        let cluster = place - place % self.geometry.cluster();
        if let Some(entry) = self.entry(found, 0)? {
            if entry.place
                == (ClusterLocation::Host {
                    at: cluster,
                    owned: true,
                })
            {
                self.damaged(format_args!(
                    "an entry says that the cluster at {cluster:#x} has no other user, and its refcount does not"
                ));
                let place = ClusterLocation::Host {
                    at: cluster,
                    owned: false,
                };
                self.set_entry(found, 0, &L2Entry { place, ..entry });
            }
        }
        Ok(0)
    }

    /// Writes where the cluster is. The entry that leads to it may still have to reach the image: the
    /// request that made it may not be answered, and its process die.
    async fn overwrite(&self, place: u64, data: Bytes, found: Found) -> Result<(), Errno> {
        self.check_place(place, data.len() as u64)?;
        self.data.write(place, data).await?;
        self.settle(&found).await
    }

    /// Writes the beginning of `data` into clusters whose entries have to change, and returns its length in bytes. It
    /// returns 0 if another request has allocated them in between.
    async fn allocate(&self, guest: u64, data: Bytes) -> Result<u64, Errno> {
        let cluster = self.geometry.cluster();
        let end = guest + (data.len() as u64).min(AT_ONCE);
        let (first, behind) = (guest / cluster, end.div_ceil(cluster));
        let ahead = self.wanted_ahead(first, behind - first);
        let _held = self.clusters.lock(first..behind + ahead).await;
        let found = self.find_owned(guest).await?;
        if let Some(L2Entry {
            place: ClusterLocation::Host { at, owned: true },
            ..
        }) = self.entry(&found, 0)?
        {
            self.trusted(&found, at, cluster).await?;
        }
        let Some(mut plan) = self.plan(found, guest..end)? else {
            return Ok(0);
        };
        if first + plan.old.len() as u64 == behind {
            plan.ahead = self.can_be_ahead(&plan, ahead)?;
        }
        let len = plan.range.end - guest;
        let data = part(&data, 0, len);
        match plan.old[0].place {
            ClusterLocation::Host { at, owned: true } => self.fill(&plan, at, data).await?,
            _ => self.write_new(&plan, data).await?,
        }
        Ok(len)
    }

    /// Plans the write of the beginning of a range; `None` if no entry has to change.
    fn plan(&self, found: Found, range: Range<u64>) -> Result<Option<WritePlan>, Errno> {
        let geometry = &self.geometry;
        let (cluster, part) = (geometry.cluster(), geometry.part());
        let first = range.start / cluster;
        let mut old = Vec::new();
        while first + (old.len() as u64) < range.end.div_ceil(cluster) {
            let Some(entry) = self.entry(&found, old.len() as u64)? else {
                break;
            };
            let is_here = matches!(entry.place, ClusterLocation::Host { owned: true, .. });
            if old.is_empty() && is_here {
                old.push(entry);
                break;
            }
            if is_here {
                break;
            }
            old.push(entry);
        }
        let Some(head) = old.first().copied() else {
            return Err(Errno::IO);
        };
        let mut range = range.start..range.end.min((first + old.len() as u64) * cluster);
        let is_owned = matches!(head.place, ClusterLocation::Host { owned: true, .. });
        if is_owned {
            range.end = range.end.min(self.missing(&head, range.start));
            if range.is_empty() {
                return Ok(None);
            }
        }
        let mut wide = range.start - range.start % part..range.end.next_multiple_of(part);
        if !is_owned {
            // The old content must move along with the cluster.
            let tail = old.last().copied().unwrap_or(head);
            if head.alloc != 0 {
                wide.start = first * cluster;
                wide.end = wide.end.max(wide.start + cluster);
            }
            if tail.alloc != 0 {
                wide.end = (first + old.len() as u64) * cluster;
                wide.start = wide.start.min(wide.end - cluster);
            }
        }
        Ok(Some(WritePlan {
            found,
            first,
            old,
            ahead: 0,
            range,
            wide,
        }))
    }

    /// Returns the end of the cluster's missing subclusters from that of byte `from` on; at or before `from` if that
    /// subcluster exists. An existing subcluster must not be copied along with missing ones, because other requests
    /// write into it without the lock, and the copy around the guest's bytes would undo that.
    fn missing(&self, entry: &L2Entry, from: u64) -> u64 {
        let (cluster, part) = (self.geometry.cluster(), self.geometry.part());
        let first = from % cluster / part;
        // CAST: a cluster has at most 32 parts.
        let count = (entry.alloc >> first as u32).trailing_zeros();
        let count = u64::from(count).min(u64::from(self.geometry.parts()) - first);
        from - from % part + count * part
    }

    /// Bits of the subclusters of the cluster at `start` that a range has.
    fn touched(&self, start: u64, range: &Range<u64>) -> u32 {
        let (cluster, part) = (self.geometry.cluster(), self.geometry.part());
        let from = range.start.clamp(start, start + cluster) - start;
        let to = range.end.clamp(start, start + cluster) - start;
        // CAST: a cluster has at most 32 parts.
        self.geometry
            .some_parts((from / part) as u32, to.div_ceil(part) as u32)
    }

    /// Writes into new clusters, then makes the entries lead there.
    async fn write_new(&self, plan: &WritePlan, data: Bytes) -> Result<(), Errno> {
        let cluster = self.geometry.cluster();
        let mut done = 0;
        let count = plan.old.len() as u64;
        // Free clusters may be in several places.
        while done < count {
            let rest = count - done;
            let all = self.place_for(plan.first + done, rest + plan.ahead).await?;
            let new = Clusters {
                count: all.count.min(rest),
                ..all
            };
            let from = (plan.first + done) * cluster;
            let to = from + new.count * cluster;
            let cut = |range: &Range<u64>| range.start.max(from)..range.end.min(to);
            let (range, wide) = (cut(&plan.range), cut(&plan.wide));
            let shift = new.first * cluster;
            let bytes = part(
                &data,
                range.start - plan.range.start,
                range.end - range.start,
            );
            let written = self.write_wide(
                &range,
                &wide,
                shift + (wide.start - from),
                bytes,
                self.prepares_zeroes(),
            );
            if let Err(error) = written.await {
                self.drop_new(all.first, all.count);
                return Err(error);
            }
            self.change(plan, done..done + new.count, |number, entry| {
                let at = shift + (number - done) * cluster;
                let touched = self.touched((plan.first + number) * cluster, &wide);
                L2Entry {
                    place: ClusterLocation::Host { at, owned: true },
                    alloc: entry.alloc | touched,
                    zero: entry.zero & !touched,
                }
            });
            let ahead = all.count - new.count;
            self.place_ahead(plan, shift + new.count * cluster, ahead);
            self.settle(&plan.found).await?;
            for old in &plan.old[done as usize..(done + new.count) as usize] {
                self.release_place(old);
            }
            done += new.count;
        }
        Ok(())
    }

    /// Allocates places for clusters of the disk, at least for the first one.
    async fn place_for(&self, first: u64, count: u64) -> Result<Clusters, Errno> {
        match self.geometry.external {
            // The offset on the disk is the place, so that the data file is the disk.
            true => Ok(Clusters { first, count }),
            false => self.take(count).await,
        }
    }

    /// Clusters that were taken and to which nothing leads.
    fn drop_new(&self, first: u64, count: u64) {
        if !self.geometry.external {
            self.release(first, count);
        }
    }

    /// Writes into subclusters of an allocated cluster, then updates the entry.
    async fn fill(&self, plan: &WritePlan, at: u64, data: Bytes) -> Result<(), Errno> {
        let place = at + plan.wide.start % self.geometry.cluster();
        self.check_place(place, plan.wide.end - plan.wide.start)?;
        self.write_wide(&plan.range, &plan.wide, place, data, false)
            .await?;
        self.change(plan, 0..1, |_, entry| {
            let touched = self.touched(plan.first * self.geometry.cluster(), &plan.wide);
            L2Entry {
                alloc: entry.alloc | touched,
                zero: entry.zero & !touched,
                ..*entry
            }
        });
        self.settle(&plan.found).await
    }

    /// Changes entries in memory.
    fn change(
        &self,
        plan: &WritePlan,
        numbers: Range<u64>,
        new: impl Fn(u64, &L2Entry) -> L2Entry,
    ) {
        for number in numbers {
            // CAST: there is one for each cluster of the plan.
            let entry = new(number, &plan.old[number as usize]);
            self.set_entry(&plan.found, number, &entry);
        }
    }

    /// Writes the guest's bytes, and the old content around them. `fresh` clusters are known to read as zeroes, even
    /// after a power cut.
    async fn write_wide(
        &self,
        range: &Range<u64>,
        wide: &Range<u64>,
        place: u64,
        data: Bytes,
        fresh: bool,
    ) -> Result<(), Errno> {
        let was_zero = self.reads_zero(wide).await?;
        if fresh && was_zero {
            return self
                .data
                .write(place + (range.start - wide.start), data)
                .await;
        }
        let errors = self.barrier.errors();
        if range == wide {
            self.data.write(place, data).await?;
        } else {
            // CAST: at most the limit of a copy and two clusters.
            let all = self.file.buffer((wide.end - wide.start) as usize)?;
            self.read_around(range, wide, &all).await?;
            data.copy_to(&all, (range.start - wide.start) as usize);
            self.data.write(place, all.into()).await?;
        }
        // A power cut must not leave the entry without the data, because the old content would be lost.
        self.flush_since(errors).await
    }

    async fn read_around(
        &self,
        range: &Range<u64>,
        wide: &Range<u64>,
        all: &Data,
    ) -> Result<(), Errno> {
        let len = |from: u64, to: u64| (to - from) as usize;
        if wide.start < range.start {
            let head = all.part(0, len(wide.start, range.start));
            self.read_now(wide.start, head).await?;
        }
        if range.end < wide.end {
            let tail = all.part(len(wide.start, range.end), len(range.end, wide.end));
            self.read_now(range.end, tail).await?;
        }
        Ok(())
    }

    /// Nothing but zeroes is there, without reading it.
    pub(crate) async fn reads_zero(&self, range: &Range<u64>) -> Result<bool, Errno> {
        let mut at = range.start;
        while at < range.end {
            let (run, len, _) = self.map(at, range.end - at).await?;
            if !self.is_zero(run, at) {
                return Ok(false);
            }
            at += len;
        }
        Ok(true)
    }

    /// An entry does not lead to its place any more, and the image says so.
    pub(crate) fn release_place(&self, old: &L2Entry) {
        let cluster = self.geometry.cluster();
        match old.place {
            ClusterLocation::Nowhere => {}
            ClusterLocation::Host { .. } if self.geometry.external => {}
            ClusterLocation::Host { at, .. } => self.release(at / cluster, 1),
            ClusterLocation::Compressed { at, len } => {
                // A cluster counts a compressed one once, even if that is only partly inside.
                let first = at / cluster;
                self.release(first, (at + len - 1) / cluster - first + 1);
            }
        }
    }

    /// Clears the autoclear features in the header before the first change: features that this driver does not know, or
    /// does not update, would become wrong.
    pub(crate) async fn begin_writing(&self) -> Result<(), Errno> {
        if !self.writable {
            return Err(Errno::ROFS);
        }
        if self.has_begun.get() {
            return Ok(());
        }
        let _pass = self.beginning.alone().await;
        if self.has_begun.get() {
            return Ok(());
        }
        let kept = self.begin_notes(self.autoclear.get()).await;
        if kept != self.autoclear.get() {
            self.set_autoclear(kept).await?;
        }
        self.has_begun.set(true);
        Ok(())
    }

    /// Prepares for a change of a range of the disk.
    pub(crate) async fn begin_change(&self, guest: u64, len: u64) -> Result<(), Errno> {
        self.begin_writing().await?;
        match self.notes.is_recording() {
            true => self.note(guest, len).await,
            false => Ok(()),
        }
    }

    /// True if all of an entry's parts are alike.
    pub(crate) fn is_whole(&self, entry: &L2Entry, kind: SubclusterSource) -> bool {
        (0..self.geometry.parts()).all(|part| entry.part(part) == kind)
    }
}

fn part(data: &Bytes, from: u64, len: u64) -> Bytes {
    // CAST: they are inside of the data.
    data.part(from as usize, len as usize)
}
