// SPDX-License-Identifier: MIT OR Apache-2.0
//! Compressed clusters of a new image, which are stored one behind the other without regard to clusters of the file.
//!
//! Nothing is durable before the end, when the image gets its name: tables and bytes reach the file when there are many.

use super::alloc::Clusters;
use super::entry::{ClusterLocation, L2Entry};
use super::image::Qcow2Image;
use super::refcounts::{get, set};
use super::Qcow2;
use crate::Storage;
use diskio::{Bytes, Errno, Gate};
use std::cell::{Cell, RefCell};

/// Bytes of one write, and of one allocation.
const WRITTEN: usize = 1 << 20;
const ALLOCATED: u64 = 16 << 20;
/// Compressed clusters after which the tables reach the file, so that memory is bounded.
const UNSTORED: u32 = 256;

/// Place of the next compressed cluster.
#[derive(Debug, Default)]
pub(crate) struct PackedEnd {
    /// Bytes of the file that are allocated and not used.
    room: RefCell<std::ops::Range<u64>>,
    /// No compressed cluster uses this cluster of the file or one behind it.
    fresh: Cell<u64>,
    /// Bytes that end where the room begins, and that the file does not have yet.
    bytes: RefCell<Vec<u8>>,
    /// Compressed clusters since the tables reached the file.
    unstored: Cell<u32>,
    gate: Gate,
}

impl<S: Storage> Qcow2<S> {
    /// Stores the cluster at byte `guest` of a new image, where the caller has put nothing else: compressed, as
    /// [`pack`](super::pack) returns it. The disk shows it after [`finish_packed`](Self::finish_packed).
    ///
    /// # Errors
    /// The storage fails, or the image is one whose clusters cannot be compressed.
    pub async fn write_packed(&self, guest: u64, packed: Vec<u8>) -> Result<(), Errno> {
        let image = self.image()?;
        if image.geometry.external || !image.data.is_plain() {
            return Err(Errno::OPNOTSUPP);
        }
        let _user = image.users.enter();
        image.begin_writing().await?;
        image.place_packed(guest, packed).await
    }

    /// Writes what [`write_packed`](Self::write_packed) still has in memory. The caller then closes the image, which
    /// makes it durable.
    ///
    /// # Errors
    /// The storage fails.
    pub async fn finish_packed(&self) -> Result<(), Errno> {
        let image = self.image()?;
        let _alone = image.packed.gate.alone().await;
        image.end_room().await?;
        image.slices.settle_all().await
    }
}

impl<S: Storage> Qcow2Image<S> {
    async fn place_packed(&self, guest: u64, packed: Vec<u8>) -> Result<(), Errno> {
        let _alone = self.packed.gate.alone().await;
        let len = packed.len() as u64;
        let found = self.find_owned(guest).await?;
        // The row of a plain one in front of it may have got its place ahead.
        let old = self.entry(&found, 0)?.unwrap_or(L2Entry::NONE);
        self.make_room(len).await?;
        let at = self.packed.room.borrow().start;
        self.packed.room.borrow_mut().start = at + len;
        self.packed.bytes.borrow_mut().extend_from_slice(&packed);
        self.count_users(at, len).await?;
        let entry = L2Entry {
            place: ClusterLocation::Compressed { at, len },
            alloc: self.geometry.all_parts(),
            zero: 0,
        };
        self.set_entry(&found, 0, &entry);
        self.release_place(&old);
        let unstored = &self.packed.unstored;
        unstored.set(unstored.get() + 1);
        if self.packed.bytes.borrow().len() >= WRITTEN {
            self.write_bytes().await?;
        }
        if unstored.get() >= UNSTORED {
            unstored.set(0);
            self.slices.settle_all().await?;
        }
        Ok(())
    }

    /// Makes sure that `len` bytes in a row are allocated.
    async fn make_room(&self, len: u64) -> Result<(), Errno> {
        let cluster = self.geometry.cluster();
        loop {
            let room = self.packed.room.borrow().clone();
            if room.end - room.start >= len {
                return Ok(());
            }
            let wanted = (ALLOCATED / cluster).max(2);
            let Clusters { first, count } = self.take_run(wanted).await?;
            if first * cluster == room.end {
                self.packed.room.borrow_mut().end = (first + count) * cluster;
                continue;
            }
            self.end_room().await?;
            self.packed.fresh.set(first);
            *self.packed.room.borrow_mut() = first * cluster..(first + count) * cluster;
        }
    }

    /// Writes the bytes that the file does not have, and gives back clusters that nothing uses.
    async fn end_room(&self) -> Result<(), Errno> {
        self.write_bytes().await?;
        let room = std::mem::take(&mut *self.packed.room.borrow_mut());
        let cluster = self.geometry.cluster();
        let (first, end) = (room.start.div_ceil(cluster), room.end / cluster);
        if end > first {
            self.release(first, end - first);
        }
        Ok(())
    }

    async fn write_bytes(&self) -> Result<(), Errno> {
        let bytes = self.packed.bytes.take();
        if bytes.is_empty() {
            return Ok(());
        }
        let at = self.packed.room.borrow().start - bytes.len() as u64;
        self.data.write(at, Bytes::copied(&bytes)?).await
    }

    /// The clusters of the file that hold some bytes get one more user. Each was allocated for one.
    async fn count_users(&self, at: u64, len: u64) -> Result<(), Errno> {
        let (order, cluster) = (self.geometry.refcount_order, self.geometry.cluster());
        for number in at / cluster..(at + len).div_ceil(cluster) {
            if number >= self.packed.fresh.get() {
                self.packed.fresh.set(number + 1);
                continue;
            }
            let counts = self.counts_to_change(number).await?;
            let counts = counts.ok_or_else(|| self.damaged("a refcount block is gone"))?;
            let count = counts.slice.look(|bytes| get(bytes, counts.first, order)) + 1;
            if count > self.geometry.max_refcount() {
                return Err(Errno::NOSPC);
            }
            counts
                .slice
                .change(|bytes| set(bytes, counts.first, order, count));
        }
        Ok(())
    }
}
