// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a driver does.

use control::Failure;
use diskio::{Bytes, Data, Errno};
use std::collections::BTreeMap;

/// What a disk is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Size in bytes, whole logical blocks.
    pub size: u64,
    /// Bytes of a logical block: what requests are multiples of. 512 to 4096.
    pub logical_block: u32,
    /// Bytes of a physical block: what is written best as a whole.
    pub physical_block: u32,
    /// Bytes of the units that can be discarded; nothing if none can.
    pub discard: Option<u32>,
    /// What was written is durable after a flush only.
    pub write_cache: bool,
    /// The driver heeds [`Attributes::fua`]. Otherwise [`Disk`](crate::Disk) flushes after such a
    /// request.
    pub fua: bool,
}

/// What there is to know of a request that changes the disk, beside what it does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// It must be durable when it is answered. That says nothing of what came before.
    pub fua: bool,
    /// An earlier process may have executed it, in whole or in part.
    pub replay: bool,
    /// Its place in the order in which the guest's requests arrived, the same when it is delivered
    /// again; nothing for those that do not come from the guest.
    pub sequence: Option<u64>,
}

/// Where the bytes of a range are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Ask [`Driver::read`] and [`Driver::write`].
    NotMappable,
    /// In the image at this offset, `len` bytes in a row, for as long as the disk is open.
    Image {
        /// Bytes from the beginning of the image.
        offset: u64,
        /// Bytes, from the one that was asked for on.
        len: u64,
    },
}

/// What serves the content of a disk.
///
/// A driver is used by one thread: it needs neither locks nor atomics for its own data. Requests run
/// at the same time, as many as the guest sends. Those that overlap, with a write on either side, do
/// not: the kernel holds the later one back. A request may come again that an earlier process has
/// executed in whole or in part; executing it again must do no harm.
///
/// Offsets and lengths are in bytes, whole 512-byte sectors, and inside of the disk. A future may
/// borrow nothing of what it gets, but it may use `self` as long as it likes.
#[allow(async_fn_in_trait, reason = "everything is in one thread")]
pub trait Driver: 'static {
    /// Looks at the image for the first time. Before this, nothing of it may be read and kept: it
    /// may still be changed by somebody else. Now it is locked.
    async fn activate(&self) -> Result<Shape, Failure>;

    /// Reads into all of `data`.
    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno>;

    /// Writes all of `data`. When this returns, the death of this process must not undo it.
    async fn write(&self, offset: u64, data: Bytes, how: Attributes) -> Result<(), Errno>;

    /// Makes durable whatever was written before: it must survive the loss of power.
    async fn flush(&self) -> Result<(), Errno>;

    /// Forgets a range; it may read as anything afterwards.
    async fn discard(&self, _offset: u64, _len: u64, _how: Attributes) -> Result<(), Errno> {
        Err(Errno::OPNOTSUPP)
    }

    /// Makes a range read as zeroes.
    async fn write_zeroes(&self, offset: u64, len: u64, how: Attributes) -> Result<(), Errno> {
        const PIECE: u64 = 256 << 10;
        // CAST: it is at most `PIECE`.
        let zeroes = Bytes::from(Data::zeroed(len.clamp(1, PIECE) as usize)?);
        let mut done = 0;
        while done < len {
            let count = (len - done).min(PIECE) as usize;
            let piece = zeroes.part(0, count);
            self.write(offset + done, piece, how).await?;
            done += count as u64;
        }
        Ok(())
    }

    /// Where the bytes from `offset` on are, if they may be read and written there directly.
    fn map(&self, _offset: u64, _len: u64) -> Extent {
        Extent::NotMappable
    }

    /// Looks at the size again and returns it.
    async fn resize(&self) -> Result<u64, Failure> {
        Err(Failure::unsupported(
            "the driver cannot change a disk's size",
        ))
    }

    /// Facts for the administrator, such as the number of clusters in use.
    fn stats(&self) -> BTreeMap<String, u64> {
        BTreeMap::new()
    }

    /// Nothing comes after this. Everything that was written must be in the image, though not
    /// durable.
    async fn close(&self) -> Result<(), Errno> {
        Ok(())
    }
}
