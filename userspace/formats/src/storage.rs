// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where an image is: a file, or what stands in for one in a test.

use diskio::{Bytes, Data, Errno, File};
use drivers::Fence;
use std::io;

/// The bytes of an image. Copies are the same image.
#[allow(async_fn_in_trait, reason = "everything is in one thread")]
pub trait Storage: Clone + 'static {
    /// Bytes, now.
    fn size(&self) -> Result<u64, Errno>;

    /// Makes it longer, by bytes that read as zeroes, or shorter. A block device stays as it is.
    async fn set_size(&self, size: u64) -> Result<(), Errno>;

    /// Reads all of `data`. What is behind the end is zeroes.
    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno>;

    /// Writes all of `data`; no death of this process undoes it.
    async fn write(&self, offset: u64, data: Bytes) -> Result<(), Errno>;

    /// Makes durable what was written.
    async fn flush(&self) -> Result<(), Errno>;

    /// Forgets a range. [`Errno::OPNOTSUPP`] if that is not possible.
    async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno>;

    /// Makes a range read as zeroes, if possible without using space for it.
    async fn clear(&self, offset: u64, len: u64) -> Result<(), Errno>;

    /// Memory for a transfer, with anything in it.
    fn buffer(&self, len: usize) -> Result<Data, Errno>;

    /// The result of work that takes long, done by another thread if there is one.
    async fn elsewhere<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Errno>;

    /// When its I/O is over if this process dies.
    fn fence(&self) -> Fence;
}

fn number(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

impl Storage for File {
    fn size(&self) -> Result<u64, Errno> {
        File::size(self).map_err(number)
    }

    async fn set_size(&self, size: u64) -> Result<(), Errno> {
        File::set_size(self, size).await
    }

    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        self.read_padded(offset, data).await
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), Errno> {
        File::write(self, offset, data).await
    }

    async fn flush(&self) -> Result<(), Errno> {
        File::flush(self).await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        File::discard(self, offset, len).await
    }

    async fn clear(&self, offset: u64, len: u64) -> Result<(), Errno> {
        // What a device has forgotten may read as anything, a hole in a file does not.
        if !self.is_device() {
            match File::discard(self, offset, len).await {
                Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {}
                result => return result,
            }
        }
        File::write_zeroes(self, offset, len).await
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
