// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where an image is: a file, or what a test puts in its place.

use diskio::{Bytes, Data, Errno, File};
use drivers::Fence;
use std::io;

/// The bytes of an image. The calls are those of [`File`]; what they mean is said there.
#[allow(async_fn_in_trait, reason = "everything is in one thread")]
pub trait Store: 'static {
    /// Reads into all of `data`. What is behind the end is [`Errno::IO`].
    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno>;
    /// Writes all of `data`, and makes the image longer if it ends before that.
    async fn write(&self, offset: u64, data: Bytes) -> Result<(), Errno>;
    /// Makes a range read as zeroes. It does not make the image longer.
    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Errno>;
    /// Makes a range read as zeroes and gives its space back, or [`Errno::OPNOTSUPP`].
    async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno>;
    /// Makes durable what was written.
    async fn flush(&self) -> Result<(), Errno>;
    /// Bytes that are alike from `offset` on, and whether they are data.
    async fn part(&self, offset: u64, len: u64) -> Result<(u64, bool), Errno>;
    /// Bytes, now.
    fn size(&self) -> Result<u64, Errno>;
    /// Ends the image there. What is new reads as zeroes.
    fn set_size(&self, size: u64) -> Result<(), Errno>;
    /// Its size cannot change.
    fn is_fixed(&self) -> bool;
    /// It may be written.
    fn is_writable(&self) -> Result<bool, Errno>;
    /// Keeps nothing of it in memory.
    fn forget(&self) -> Result<(), Errno>;
    /// When I/O of a process is over that died.
    fn fence(&self) -> Fence;
}

impl Store for File {
    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        File::read(self, offset, data).await
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), Errno> {
        File::write(self, offset, data).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Errno> {
        File::write_zeroes(self, offset, len).await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        match self.is_device() {
            // What a device forgets need not be zero.
            true => File::write_zeroes(self, offset, len).await,
            false => File::discard(self, offset, len).await,
        }
    }

    async fn flush(&self) -> Result<(), Errno> {
        File::flush(self).await
    }

    async fn part(&self, offset: u64, len: u64) -> Result<(u64, bool), Errno> {
        File::part(self, offset, len).await
    }

    fn size(&self) -> Result<u64, Errno> {
        File::size(self).map_err(|error| number(&error))
    }

    fn set_size(&self, size: u64) -> Result<(), Errno> {
        rustix::fs::ftruncate(self, size)
    }

    fn is_fixed(&self) -> bool {
        self.is_device()
    }

    fn is_writable(&self) -> Result<bool, Errno> {
        File::is_writable(self).map_err(|error| number(&error))
    }

    fn forget(&self) -> Result<(), Errno> {
        File::forget(self)
    }

    fn fence(&self) -> Fence {
        Fence::of(self)
    }
}

/// Reads what there is of `len` bytes from `offset` on; the rest is zero.
pub(crate) async fn read_some(
    storage: &impl Store,
    offset: u64,
    len: usize,
) -> Result<Vec<u8>, Errno> {
    let there = storage.size()?.saturating_sub(offset).min(len as u64);
    let mut bytes = vec![0; len];
    // CAST: it is at most `len`.
    let there = there as usize;
    if there > 0 {
        let data = Data::zeroed(there)?;
        storage.read(offset, data.clone()).await?;
        data.read(0, &mut bytes[..there]);
    }
    Ok(bytes)
}

fn number(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
