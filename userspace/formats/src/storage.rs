// SPDX-License-Identifier: MIT OR Apache-2.0
//! Storage of an image: a file, or its replacement in a test.

use diskio::{Bytes, Data, Errno, File, Pending};
use drivers::Fence;
use std::io;

/// The bytes of an image. Copies are the same image.
#[allow(async_fn_in_trait, reason = "everything is in one thread")]
pub trait Storage: Clone + 'static {
    /// Bytes, now.
    fn size(&self) -> Result<u64, Errno>;

    /// Makes the image longer, by bytes that read as zeroes, or shorter. Storage that [is fixed](Self::is_fixed) keeps
    /// its size.
    async fn set_size(&self, size: u64) -> Result<(), Errno>;

    /// Its size cannot change: a block device.
    fn is_fixed(&self) -> bool;

    /// Returns true if the image may be changed.
    fn is_writable(&self) -> Result<bool, Errno>;

    /// Returns a handle of this image whose writes have exactly their length; other handles may fill the last block.
    fn keep_size(&self) -> Result<Self, Errno>;

    /// Its transfers go past the page cache.
    fn is_direct(&self) -> bool;

    /// Reads all of `data`. A read behind the end is [`Errno::IO`].
    async fn read_exact(&self, offset: u64, data: Data) -> Result<(), Errno>;

    /// Reads all of `data`. Bytes behind the end are zeroes.
    async fn read_padded(&self, offset: u64, data: Data) -> Result<(), Errno>;

    /// Writes all of `data`, and makes the image longer if it ends before that; no death of this process
    /// undoes it.
    async fn write(&self, offset: u64, data: Bytes) -> Result<(), Errno>;

    /// Queues a read that is one operation; `None` if it may be none. The result is that of [`File::begin_read`].
    fn begin_read(&self, _offset: u64, _data: &Data) -> Option<Pending> {
        None
    }

    /// Queues a write that is one operation, as [`begin_read`](Self::begin_read) does a read.
    fn begin_write(&self, _offset: u64, _data: &Bytes) -> Option<Pending> {
        None
    }

    /// Makes all completed writes durable.
    async fn flush(&self) -> Result<(), Errno>;

    /// Makes a range read as zeroes, if possible without using space for it.
    async fn clear(&self, offset: u64, len: u64) -> Result<(), Errno>;

    /// Makes a range read as zeroes, and keeps the space for it, if possible.
    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Errno>;

    /// Forgets a range, which may read as anything afterwards. [`Errno::OPNOTSUPP`] if that is not possible.
    async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno>;

    /// Bytes that are alike from `offset` on, at most `len`, and whether they are data.
    async fn part(&self, offset: u64, len: u64) -> Result<(u64, bool), Errno>;

    /// Keeps nothing of it in memory.
    fn forget(&self) -> Result<(), Errno>;

    /// Memory for a transfer, with anything in it.
    fn buffer(&self, len: usize) -> Result<Data, Errno>;

    /// The result of work that takes long, done by another thread if there is one.
    async fn elsewhere<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Errno>;

    /// Returns when its I/O is over if this process dies.
    fn fence(&self) -> Fence;
}

impl Storage for File {
    fn size(&self) -> Result<u64, Errno> {
        File::size(self).map_err(number)
    }

    async fn set_size(&self, size: u64) -> Result<(), Errno> {
        File::set_size(self, size).await
    }

    fn is_fixed(&self) -> bool {
        self.is_device()
    }

    fn is_writable(&self) -> Result<bool, Errno> {
        File::is_writable(self).map_err(number)
    }

    fn is_direct(&self) -> bool {
        // If the system does not answer, use the path that always works.
        File::is_direct(self).unwrap_or(false)
    }

    fn keep_size(&self) -> Result<Self, Errno> {
        let mut file = self.clone();
        File::keep_size(&mut file).map_err(number)?;
        Ok(file)
    }

    async fn read_exact(&self, offset: u64, data: Data) -> Result<(), Errno> {
        File::read(self, offset, data).await
    }

    async fn read_padded(&self, offset: u64, data: Data) -> Result<(), Errno> {
        File::read_padded(self, offset, data).await
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), Errno> {
        File::write(self, offset, data).await
    }

    fn begin_read(&self, offset: u64, data: &Data) -> Option<Pending> {
        File::begin_read(self, offset, data)
    }

    fn begin_write(&self, offset: u64, data: &Bytes) -> Option<Pending> {
        File::begin_write(self, offset, data)
    }

    async fn flush(&self) -> Result<(), Errno> {
        File::flush(self).await
    }

    async fn clear(&self, offset: u64, len: u64) -> Result<(), Errno> {
        // A discarded range of a device may read as anything; a hole in a file reads as zeroes.
        if !self.is_device() {
            match File::discard(self, offset, len).await {
                Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {}
                result => return result,
            }
        }
        File::write_zeroes(self, offset, len).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Errno> {
        File::write_zeroes(self, offset, len).await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        File::discard(self, offset, len).await
    }

    async fn part(&self, offset: u64, len: u64) -> Result<(u64, bool), Errno> {
        File::part(self, offset, len).await
    }

    fn forget(&self) -> Result<(), Errno> {
        File::forget(self)
    }

    fn buffer(&self, len: usize) -> Result<Data, Errno> {
        self.io().buffer(len)
    }

    async fn elsewhere<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Errno> {
        self.io().elsewhere(work).await
    }

    fn fence(&self) -> Fence {
        Fence::of(self)
    }
}

/// Gives back unused space if the storage can do that: it is a hint.
pub(crate) async fn give_back(storage: &impl Storage, offset: u64, len: u64) -> Result<(), Errno> {
    match storage.discard(offset, len).await {
        // A device refuses ranges that are not a multiple of its own unit.
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Reads `len` bytes from `offset` on; bytes behind the end are zero. The length must have been checked.
pub(crate) async fn bytes(
    storage: &impl Storage,
    offset: u64,
    len: usize,
) -> Result<Vec<u8>, Errno> {
    let data = storage.buffer(len)?;
    storage.read_padded(offset, data.clone()).await?;
    Ok(data.to_vec())
}

/// The fence of an image in several files: the widest of theirs.
pub(crate) fn fence<'s, S: Storage>(files: impl Iterator<Item = &'s S>) -> Fence {
    files.map(Storage::fence).fold(Fence::Local, |all, other| {
        let settle = |fence| match fence {
            Fence::Local => 0,
            Fence::Session { settle_ms } => settle_ms,
            Fence::None => u32::MAX,
        };
        match settle(other) > settle(all) {
            true => other,
            false => all,
        }
    })
}

fn number(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}
