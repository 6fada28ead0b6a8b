// SPDX-License-Identifier: MIT OR Apache-2.0
//! Interface of a driver.

use crate::{Disk, QueuedIo};
use control::{Code, Failure};
use diskio::{is_remote, Bytes, Data, Errno, File};
use std::collections::BTreeMap;
use std::os::fd::AsFd;

/// Properties of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskInfo {
    /// Size in bytes, whole logical blocks.
    pub size: u64,
    /// Bytes of a logical block, the unit of requests: 512 to 4096.
    pub logical_block: u32,
    /// Bytes of a physical block, the unit that is best written as a whole.
    pub physical_block: u32,
    /// Bytes of the units that can be discarded; `None` if the disk cannot discard.
    pub discard: Option<u32>,
    /// True if a write is durable only after a flush.
    pub write_cache: bool,
    /// True if the driver supports [`Attributes::fua`]. Otherwise [`Disk`](crate::Disk) flushes after such a request.
    pub fua: bool,
    /// Limits of one call.
    pub limits: DriverLimits,
}

/// Limits of one call of a driver: [`Disk`](crate::Disk) splits a larger request into several calls. By default there
/// is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriverLimits {
    /// Largest read or write, in bytes.
    pub transfer: u64,
    /// Largest range to zero or discard at once, in bytes.
    pub zeroes: u64,
    /// Preferred boundaries of a split request: multiples of this number of bytes, such as a cluster.
    pub align: u32,
}

impl Default for DriverLimits {
    fn default() -> Self {
        Self {
            transfer: u64::MAX,
            zeroes: u64::MAX,
            align: 1,
        }
    }
}

/// Time at which the I/O of a dead process is over: the kernel replays none of its requests before that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fence {
    /// When this machine's kernel has ended it: for I/O on block devices and local files.
    Local,
    /// After this time, in which a server may still execute it: for I/O over a network. At most ten minutes.
    Session {
        /// Milliseconds, not 0.
        settle_ms: u32,
    },
    /// Unknown. Requests of the process fail instead of being replayed.
    None,
}

/// Time in which a server may execute the requests of a machine that has given it up: an NFS client sends a request
/// again after this time, so it is long enough for a request that is on its way.
pub(crate) const SETTLE_MS: u32 = 60_000;

impl Fence {
    /// For a driver that sends its I/O to a server.
    pub const NETWORK: Self = Fence::Session {
        settle_ms: SETTLE_MS,
    };

    /// Returns the fence for a driver whose I/O is that of a file.
    pub fn of(file: &File) -> Self {
        Self::of_descriptor(file)
    }

    /// Returns the fence for a file that this process must not read yet.
    pub fn of_descriptor(fd: impl AsFd) -> Self {
        // A file system that does not report its type may be anywhere.
        match is_remote(fd) {
            Ok(false) => Fence::Local,
            _ => Fence::NETWORK,
        }
    }
}

/// Properties of a request that changes the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// The request must be durable when it is answered. That does not cover earlier writes. If it fails, only
    /// [`Errno::NOSPC`] and [`Errno::DQUOT`] say that nothing else is lost, so they must not come from a flush
    /// ([`diskio::of_earlier`]): such a request may be tried again, others are not.
    pub fua: bool,
    /// True if an earlier process may have executed it, in whole or in part.
    pub replay: bool,
    /// Place of the request in the order in which the guest's requests arrived, which is the same when it is delivered
    /// again; `None` for requests of other clients.
    pub sequence: Option<u64>,
}

/// A part of the disk and its content. The content is valid until a write to the range: a caller that needs it for
/// longer claims the range. An extent does not say where the bytes are in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes, not 0.
    pub len: u64,
    /// Content of the extent.
    pub content: Content,
}

/// Content of a part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Bytes that have to be read to be known.
    Data,
    /// Zeroes, for which no space is used.
    Hole,
    /// Content of the backing image. Only [`Driver::layer`] returns this.
    Below,
}

/// A part of the disk in a dirty bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyExtent {
    /// Bytes, not 0.
    pub len: u64,
    /// True if a write may have changed it since the bitmap is there.
    pub is_dirty: bool,
}

/// Location of a part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// The image itself.
    Image,
    /// A backing image, which is only read: its number in the kernel.
    Below(u16),
    /// Nothing: it reads as zeroes.
    Nothing,
}

/// A part of the disk that is a part of a file, byte for byte and past the page cache, or nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedExtent {
    /// Offset on the disk, in bytes.
    pub offset: u64,
    /// Bytes, not 0.
    pub len: u64,
    /// Location of the bytes.
    pub holder: Holder,
    /// Offset in that file, in bytes; 0 if it is nowhere.
    pub at: u64,
    /// True if a write there changes nothing else of the image; always false outside of the image itself.
    pub writable: bool,
}

impl MappedExtent {
    /// Returns true if `next` directly continues this place, on the disk and in the file.
    #[must_use]
    pub fn is_continued_by(&self, next: &MappedExtent) -> bool {
        let goes_on = self.holder == Holder::Nothing || self.at + self.len == next.at;
        let alike = (self.holder, self.writable) == (next.holder, next.writable);
        alike && goes_on && self.offset + self.len == next.offset
    }
}

/// Backend that serves the content of a disk.
///
/// A driver is used by one thread: it needs neither locks nor atomics for its own data. Requests run at the same time,
/// as many as the guest sends. Requests that overlap, with a write on either side, do not: the kernel holds the later
/// one back. A request may come again that an earlier process has executed in whole or in part; executing it again must
/// do no harm.
///
/// Offsets and lengths are in bytes, whole 512-byte sectors, and inside of the disk. A future may borrow none of its
/// arguments, but it may use `self` at any time.
#[allow(async_fn_in_trait, reason = "everything is in one thread")]
pub trait Driver: 'static {
    /// Reads the image for the first time, and returns the properties of the disk. Before this, the driver must not
    /// read and keep any part of it, because another process may still change it. Now it is locked.
    async fn activate(&self) -> Result<DiskInfo, Failure>;

    /// Returns when its I/O is over if this process dies. There is no default: a driver that sends data over a network
    /// must not return [`Fence::Local`], or old writes take effect late.
    fn fence(&self) -> Fence;

    /// Returns true if the image begins with the disk, byte for byte and past the page cache, so that reads, writes and
    /// flushes of the image itself equal the driver's. The kernel may then serve it in passthrough, without this
    /// process.
    fn is_verbatim(&self) -> bool {
        false
    }

    /// Returns true if parts of the disk are parts of the image, which [`places`](Self::places) reports: the kernel may
    /// read and write those in passthrough, without this process.
    fn has_places(&self) -> bool {
        false
    }

    /// Returns where a range is, in order, if that is known and useful. A reported place
    ///
    /// - is stored in the image: the death of this process does not undo it;
    /// - stays valid until a request of the guest discards or zeroes it: no write to it or beside it moves it. A place
    ///   outside of the image itself stays valid until a write to it: a write beside it changes nothing. Before clients
    ///   other than the guest change the disk, the kernel has stopped passthrough;
    /// - may be changed, if it is `writable`, without the driver's knowledge: a flush makes that durable, too.
    async fn places(&self, _offset: u64, _len: u64) -> Result<Vec<MappedExtent>, Errno> {
        Ok(Vec::new())
    }

    /// Reads into all of `data`.
    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno>;

    /// Writes all of `data`. When this returns, the death of this process must not undo it.
    async fn write(&self, offset: u64, data: Bytes, how: Attributes) -> Result<(), Errno>;

    /// Queues a read whose place is known and that is one operation; `None` if [`read`](Self::read) has to do more. The
    /// result is that of the system call: fewer bytes, or an interrupted call, mean that `read` has to do it.
    fn begin_read(&self, _offset: u64, _data: &Data) -> Option<QueuedIo> {
        None
    }

    /// Queues a write that need not be durable, as [`begin_read`](Self::begin_read) does a read.
    fn begin_write(&self, _offset: u64, _data: &Bytes) -> Option<QueuedIo> {
        None
    }

    /// Makes all earlier writes durable: they must survive a power cut.
    ///
    /// # Errors
    /// Earlier writes may be lost. An error of any flush of the storage, whatever its reason, fails the calls of this
    /// that are under way, or else the next one, or the [`inactivate`](Self::inactivate) or [`close`](Self::close) that
    /// comes instead ([`diskio::Barrier`]).
    async fn flush(&self) -> Result<(), Errno>;

    /// Returns true if a flush of the storage has failed, and no call of [`flush`](Self::flush) has returned that yet.
    fn owes(&self) -> bool {
        false
    }

    /// Discards a range; it may read as anything afterwards.
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

    /// Returns the content of a range: contiguous extents from `offset` on, at least one; they need not end at the end
    /// of the range or of a block ([`Disk::extents`](crate::Disk::extents) corrects that). Copies use it to skip what
    /// need not be read.
    async fn extents(&self, _offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        let content = Content::Data;
        Ok(vec![Extent { len, content }])
    }

    /// Returns the content of a range of this image alone, without backing images: its own extents, and
    /// [`Content::Below`] where it has none. For operations on one image of a chain.
    async fn layer(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        self.extents(offset, len).await
    }

    /// Returns the names of the dirty bitmaps that the image itself stores and that can be relied on, each once.
    ///
    /// # Errors
    /// The image does not say, because it is damaged.
    async fn bitmaps(&self) -> Result<Vec<String>, Failure> {
        Ok(Vec::new())
    }

    /// Returns the parts of a range in a dirty bitmap of the image: contiguous from `offset` on, at least one and at
    /// most `most`, which need not reach the end of the range. Their ends are multiples of 512 bytes. They cover all
    /// writes that ended before this call.
    ///
    /// # Errors
    /// The image has no such bitmap, or it cannot be relied on. Nothing is known about any part then.
    async fn dirty(
        &self,
        bitmap: &str,
        _offset: u64,
        _len: u64,
        _most: usize,
    ) -> Result<Vec<DirtyExtent>, Failure> {
        Err(Failure::new(
            Code::NotFound,
            format!("the image has no dirty bitmap {bitmap:?}"),
        ))
    }

    /// Returns the backing disk that has all of a range, at the same offset, if that is known without a read of the
    /// storage: the reader continues there.
    fn passed(&self, _offset: u64, _len: u64) -> Option<Disk> {
        None
    }

    /// Reads the size again and returns it, in bytes.
    async fn resize(&self) -> Result<u64, Failure> {
        Err(Failure::unsupported(
            "the driver cannot change a disk's size",
        ))
    }

    /// Makes the disk larger: `size` bytes, whole blocks, and no fewer than it has. During this there are no other
    /// requests except flushes. It is durable when this returns.
    async fn grow(&self, _size: u64) -> Result<(), Failure> {
        Err(Failure::unsupported(
            "its driver cannot make a disk larger that is served: pause it, make the image larger if its \
             format can (`tapimg resize IMAGE SIZE`), and unpause it",
        ))
    }

    /// Returns true if this image has a backing image that it could drop once it holds all of that data itself: where
    /// [`layer`](Self::layer) returns [`Content::Below`] and there is data. The caller then copies that data and calls
    /// [`stand_alone`](Self::stand_alone). Returns false if there is no backing image.
    ///
    /// # Errors
    /// There is a backing image, and this image has to keep it.
    async fn goes_on(&self) -> Result<bool, Failure> {
        Ok(false)
    }

    /// Drops the backing image, because this image holds all content itself. During this there are no other requests
    /// except flushes. It is durable when this returns.
    ///
    /// # Errors
    /// The backing image may still be needed, and this image is unchanged.
    async fn stand_alone(&self) -> Result<(), Failure> {
        Ok(())
    }

    /// Facts for the administrator, such as the number of clusters in use.
    fn stats(&self) -> BTreeMap<String, u64> {
        BTreeMap::new()
    }

    /// Closes the image for some time: all writes are durable, and no part of the image stays in memory, because its
    /// next user may be another process or another host. The next call is [`activate`](Self::activate) or
    /// [`close`](Self::close).
    async fn inactivate(&self) -> Result<(), Errno> {
        self.flush().await
    }

    /// Closes the disk for good: no call may follow. All writes must be in the image, but need not be durable.
    async fn close(&self) -> Result<(), Errno> {
        Ok(())
    }
}
