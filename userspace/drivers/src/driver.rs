// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a driver does.

use crate::Disk;
use control::Failure;
use diskio::{is_remote, Bytes, Data, Errno, File};
use std::collections::BTreeMap;
use std::os::fd::AsFd;

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
    /// What one call may ask for.
    pub limits: Limits,
}

/// What one call of a driver may ask for: [`Disk`](crate::Disk) makes several of a request that is
/// larger. By default there is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a read or a write at most.
    pub transfer: u64,
    /// Bytes that are zeroed or discarded at once at most.
    pub zeroes: u64,
    /// Where a request is cut, if that is possible: at multiples of these bytes, such as a cluster.
    pub align: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            transfer: u64::MAX,
            zeroes: u64::MAX,
            align: 1,
        }
    }
}

/// When I/O of a process is over that died: nothing of what it had is executed again before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fence {
    /// When this machine's kernel has ended it: I/O on block devices and local files.
    Local,
    /// Others execute it, who may do so for this long: I/O over a network. At most ten minutes.
    Session {
        /// Milliseconds, not 0.
        settle_ms: u32,
    },
    /// Nobody knows. What the process had fails, instead of being executed again.
    None,
}

/// How long a server may execute what a machine sent that has given it up: the time after which
/// an NFS client sends a request again, which so is long enough for one that is on its way.
pub(crate) const SETTLE_MS: u32 = 60_000;

impl Fence {
    /// For a driver that sends its I/O to a server.
    pub const NETWORK: Self = Fence::Session {
        settle_ms: SETTLE_MS,
    };

    /// For a driver whose I/O is that of a file.
    pub fn of(file: &File) -> Self {
        Self::of_descriptor(file)
    }

    /// The same for a file that must not be looked at yet.
    pub fn of_descriptor(fd: impl AsFd) -> Self {
        // A file system that does not say what it is may be anywhere.
        match is_remote(fd) {
            Ok(false) => Fence::Local,
            _ => Fence::NETWORK,
        }
    }
}

/// What there is to know of a request that changes the disk, beside what it does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// It must be durable when it is answered. That says nothing of what came before. If it fails, only
    /// [`Errno::NOSPC`] and [`Errno::DQUOT`] say that nothing else is lost, so they must not come from a
    /// flush ([`diskio::of_earlier`]): such a request may be tried again, others are not.
    pub fua: bool,
    /// An earlier process may have executed it, in whole or in part.
    pub replay: bool,
    /// Its place in the order in which the guest's requests arrived, the same when it is delivered
    /// again; nothing for those that do not come from the guest.
    pub sequence: Option<u64>,
}

/// A part of the disk and what is there. It is true until something is written there: who needs it
/// for longer than a moment claims the range. Where in an image the bytes are it does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes, not 0.
    pub len: u64,
    /// What is there.
    pub content: Content,
}

/// What a part of a disk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Bytes that have to be read to be known.
    Data,
    /// Zeroes, for which no space is used.
    Hole,
    /// Nothing of this image: what the image below it has. Only [`Driver::layer`] says this.
    Below,
}

/// What holds a part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// The image itself.
    Image,
    /// A file below it, which is only read: the kernel has it by this number.
    Below(u16),
    /// Nothing: it reads as zeroes.
    Nothing,
}

/// A part of the disk that is a part of a file, byte for byte and past the page cache, or nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Where on the disk, in bytes.
    pub offset: u64,
    /// Bytes, not 0.
    pub len: u64,
    /// What holds it.
    pub holder: Holder,
    /// Where in that; 0 if it is nowhere.
    pub at: u64,
    /// To write there changes nothing else of the image. Only of the image itself.
    pub writable: bool,
}

impl Place {
    /// The place directly behind it goes on in the same way.
    #[must_use]
    pub fn is_continued_by(&self, next: &Place) -> bool {
        let goes_on = self.holder == Holder::Nothing || self.at + self.len == next.at;
        let alike = (self.holder, self.writable) == (next.holder, next.writable);
        alike && goes_on && self.offset + self.len == next.offset
    }
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

    /// When its I/O is over if this process dies. There is no default: who sends data over a network must
    /// not say [`Fence::Local`], or what was written early comes back late.
    fn fence(&self) -> Fence;

    /// The disk is what the image begins with, byte for byte and past the page cache: whoever reads, writes and
    /// flushes the image itself does what this driver does. Then the kernel may, without this process.
    fn is_verbatim(&self) -> bool {
        false
    }

    /// Parts of the disk are parts of the image, and [`places`](Self::places) says which: the kernel may read
    /// and write those without this process, and asks nobody when it does.
    fn has_places(&self) -> bool {
        false
    }

    /// Where a range is, as far as that is known and of use; in order. What is told
    ///
    /// - is in the image: the death of this process does not undo it;
    /// - stays true as long as no request of the guest discards it, or makes it zeroes: no write moves it, nor what
    ///   is beside it. What is not in the image itself stays true until it is written: to write beside it changes
    ///   nothing. Where others than the guest change something, the kernel has let go of the disk before;
    /// - may be written, if it says so, without anything that this driver would have to know of: a flush makes
    ///   that durable, too.
    async fn places(&self, _offset: u64, _len: u64) -> Result<Vec<Place>, Errno> {
        Ok(Vec::new())
    }

    /// Reads into all of `data`.
    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno>;

    /// Writes all of `data`. When this returns, the death of this process must not undo it.
    async fn write(&self, offset: u64, data: Bytes, how: Attributes) -> Result<(), Errno>;

    /// Makes durable whatever was written before: it must survive the loss of power.
    ///
    /// # Errors
    /// Something may be lost. An error of any flush of the storage, whatever the driver needed it for, fails those calls
    /// of this that are under way, or else the next one, or the [`inactivate`](Self::inactivate) or
    /// [`close`](Self::close) that comes instead ([`diskio::Barrier`]).
    async fn flush(&self) -> Result<(), Errno>;

    /// A flush of the storage has failed, and no call of [`flush`](Self::flush) has returned that yet.
    fn owes(&self) -> bool {
        false
    }

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

    /// What is in a range: extents in a row, without a gap, from `offset` on. There is one at least;
    /// they need not reach the end of the range, nor end there, nor where a block does
    /// ([`Disk::extents`](crate::Disk::extents) sees to that). For copies, which leave out what
    /// need not be read.
    async fn extents(&self, _offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        let content = Content::Data;
        Ok(vec![Extent { len, content }])
    }

    /// The same for this image alone, without those below it: what it has itself, and where
    /// [`Content::Below`] shows through. For verbs that work on one image of a chain.
    async fn layer(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        self.extents(offset, len).await
    }

    /// The disk below this image that has all of a range, at the same place, if that is known without asking the
    /// storage: who reads goes on with that one.
    fn passed(&self, _offset: u64, _len: u64) -> Option<Disk> {
        None
    }

    /// Looks at the size again and returns it.
    async fn resize(&self) -> Result<u64, Failure> {
        Err(Failure::unsupported(
            "the driver cannot change a disk's size",
        ))
    }

    /// Makes the disk larger: `size` bytes, whole blocks, and no fewer than it has. Nothing else is asked
    /// meanwhile but for flushes. It is durable when this returns.
    async fn grow(&self, _size: u64) -> Result<(), Failure> {
        Err(Failure::unsupported(
            "its driver cannot make a disk larger that is served: pause it, make the image larger with \
             tapimg resize if its format can, and unpause it",
        ))
    }

    /// It goes on from another image, and could do without that once it holds itself what it has of it: where
    /// [`layer`](Self::layer) says [`Content::Below`], and there is something. That is then written, and
    /// [`stand_alone`](Self::stand_alone) called. False if there is no other image.
    ///
    /// # Errors
    /// There is, and this image has to keep it.
    async fn goes_on(&self) -> Result<bool, Failure> {
        Ok(false)
    }

    /// The image needs no other one from now on. What it shows is in itself. Nothing else is asked meanwhile but
    /// for flushes. It is durable when this returns.
    ///
    /// # Errors
    /// The other image may still be needed, and this one is as good as before.
    async fn stand_alone(&self) -> Result<(), Failure> {
        Ok(())
    }

    /// Facts for the administrator, such as the number of clusters in use.
    fn stats(&self) -> BTreeMap<String, u64> {
        BTreeMap::new()
    }

    /// Lets go of the image for the time being: everything that was written is durable, and nothing of
    /// the image is kept in memory, because the next to use it may be another process, or another
    /// host. What comes after this is [`activate`](Self::activate) or [`close`](Self::close).
    async fn inactivate(&self) -> Result<(), Errno> {
        self.flush().await
    }

    /// Nothing comes after this. Everything that was written must be in the image, though not
    /// durable.
    async fn close(&self) -> Result<(), Errno> {
        Ok(())
    }
}
