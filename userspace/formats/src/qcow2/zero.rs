// SPDX-License-Identifier: MIT OR Apache-2.0
//! Ranges that are forgotten or become zeroes.

use super::entry::{ClusterLocation, L2Entry, SubclusterSource};
use super::image::{Found, Qcow2Image};
use crate::Storage;
use diskio::{Bytes, Data, Errno};
use std::ops::Range;

/// Maximum number of zero bytes in one write.
const ZEROES: u64 = 256 << 10;

impl<S: Storage> Qcow2Image<S> {
    /// A range reads as zeroes; with `hint` it may also stay as it is.
    pub(crate) async fn zero(&self, guest: u64, len: u64, hint: bool) -> Result<(), Errno> {
        let user = self.users.enter();
        self.begin_change(guest, len).await?;
        let part = self.geometry.part();
        let end = guest + len;
        // The last subcluster may be cut by the end of the disk.
        let is_end = end == self.size.get();
        let inner = guest.next_multiple_of(part)..match is_end {
            true => end.next_multiple_of(part),
            false => end - end % part,
        };
        if inner.start >= inner.end {
            if !hint {
                self.write_zeroes(guest..end).await?;
            }
            return Ok(());
        }
        if !hint {
            self.write_zeroes(guest..inner.start).await?;
            self.write_zeroes(inner.end.min(end)..end).await?;
        }
        let mut at = inner.start;
        while at < inner.end {
            at = self.zero_some(at..inner.end, hint).await?;
        }
        drop(user);
        self.bound_released().await
    }

    /// Writes zeroes where there is something else.
    async fn write_zeroes(&self, range: Range<u64>) -> Result<(), Errno> {
        if range.is_empty() || self.reads_zero(&range).await? {
            return Ok(());
        }
        let len = (range.end - range.start).min(ZEROES);
        // CAST: bounded.
        let zeroes = Bytes::from(Data::zeroed(len as usize)?);
        let mut at = range.start;
        while at < range.end {
            let some = (range.end - at).min(len);
            self.write_now(at, zeroes.part(0, some as usize)).await?;
            at += some;
        }
        Ok(())
    }

    /// The beginning of a range of whole subclusters becomes zeroes: says where it ends.
    async fn zero_some(&self, range: Range<u64>, hint: bool) -> Result<u64, Errno> {
        let geometry = &self.geometry;
        let span_end = (range.start / geometry.span() + 1) * geometry.span();
        let end = range.end.min(span_end);
        // Nothing was ever written there.
        if self.find(range.start).await?.l2.is_none() && self.is_bare(range.start) {
            return Ok(end);
        }
        let cluster = geometry.cluster();
        let per_slice = self.slices.slice_len() / geometry.entry() * cluster;
        let end = end.min((range.start / per_slice + 1) * per_slice);
        let first = range.start / cluster;
        let held = self.clusters.lock(first..end.div_ceil(cluster)).await;
        let found = self.find_owned(range.start).await?;
        let mut released = Vec::new();
        let mut written = Vec::new();
        let mut number = 0;
        while first + number < end.div_ceil(cluster) {
            let at = (first + number) * cluster;
            let some = at.max(range.start)..end.min(at + cluster);
            match self.zero_cluster(&found, number, &some)? {
                ClusterWork::Done(old) => released.extend(old),
                ClusterWork::Write if !hint => written.push(some),
                ClusterWork::Write => {}
            }
            number += 1;
        }
        self.settle(&found).await?;
        for old in &released {
            self.release_place(old);
        }
        if geometry.external {
            // Clears the place in the data file, too: a reader of that file alone then finds zeroes.
            self.data.clear(range.start, end - range.start).await?;
        }
        drop(held);
        for range in written {
            self.write_zeroes(range).await?;
        }
        Ok(end)
    }

    /// Changes a cluster's entry in memory, so that the part `some` reads as zeroes, and returns the remaining work.
    fn zero_cluster(
        &self,
        found: &Found,
        number: u64,
        some: &Range<u64>,
    ) -> Result<ClusterWork, Errno> {
        let geometry = &self.geometry;
        let Some(old) = self.entry(found, number)? else {
            return Err(Errno::IO);
        };
        if let ClusterLocation::Host { at, .. } = old.place {
            self.check_place(at, geometry.cluster())?;
        }
        let bare = self.is_bare(some.start);
        let skip = some.start % geometry.cluster();
        let len = some.end - some.start;
        // CAST: a cluster has at most 32 parts.
        let to = (skip + len).div_ceil(geometry.part()) as u32;
        let touched = geometry.some_parts((skip / geometry.part()) as u32, to);
        let whole = touched == geometry.all_parts();
        let is_packed = matches!(old.place, ClusterLocation::Compressed { .. });
        if self.is_whole(&old, SubclusterSource::Zero) && old.place == ClusterLocation::Nowhere {
            return Ok(ClusterWork::Done(None));
        }
        if bare
            && self.is_whole(&old, SubclusterSource::Below)
            && old.place == ClusterLocation::Nowhere
        {
            return Ok(ClusterWork::Done(None));
        }
        let can_say = geometry.has_zero || bare && whole;
        if !can_say || is_packed && !whole {
            return Ok(ClusterWork::Write);
        }
        let mut new = L2Entry {
            place: old.place,
            alloc: old.alloc & !touched,
            zero: if bare {
                old.zero & !touched
            } else {
                old.zero | touched
            },
        };
        if new.alloc == 0 {
            new.place = ClusterLocation::Nowhere;
        }
        self.zeroed.set(self.zeroed.get() + 1);
        self.set_entry(found, number, &new);
        let gone = new.place == ClusterLocation::Nowhere && old.place != ClusterLocation::Nowhere;
        Ok(ClusterWork::Done(gone.then_some(old)))
    }
}

/// Work that remains for a cluster.
enum ClusterWork {
    /// The entry was changed, and does not lead to its old place any more.
    Done(Option<L2Entry>),
    /// The entry cannot express it, so zeroes have to be stored.
    Write,
}
