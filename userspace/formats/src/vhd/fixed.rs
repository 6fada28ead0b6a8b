// SPDX-License-Identifier: MIT OR Apache-2.0
//! The body of a fixed VHD: the disk, byte for byte. The footer behind it is out of reach.

use crate::field::refused;
use crate::{storage, Storage};
use control::Failure;
use diskio::{Bytes, Data, Errno};
use drivers::{Content, Extent, QueuedIo};
use std::cell::Cell;
use std::rc::Rc;

#[derive(Debug)]
pub(crate) struct Fixed<S> {
    storage: Rc<S>,
    size: Cell<u64>,
}

impl<S: Storage> Fixed<S> {
    pub(crate) fn new(storage: Rc<S>, size: u64) -> Self {
        Self {
            storage,
            size: Cell::new(size),
        }
    }

    /// Returns true if I/O goes past the page cache.
    pub(crate) fn is_direct(&self) -> bool {
        self.storage.is_direct()
    }

    /// Nothing may reach the footer.
    fn check(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let end = offset.checked_add(len);
        match end.is_some_and(|end| end <= self.size.get()) {
            true => Ok(()),
            false => Err(Errno::INVAL),
        }
    }

    pub(crate) async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        self.check(offset, data.len() as u64)?;
        self.storage.read_exact(offset, data).await
    }

    pub(crate) async fn write(&self, offset: u64, data: Bytes) -> Result<(), Errno> {
        self.check(offset, data.len() as u64)?;
        self.storage.write(offset, data).await
    }

    pub(crate) fn begin_read(&self, offset: u64, data: &Data) -> Option<QueuedIo> {
        self.check(offset, data.len() as u64).ok()?;
        self.storage.begin_read(offset, data).map(QueuedIo::from)
    }

    pub(crate) fn begin_write(&self, offset: u64, data: &Bytes) -> Option<QueuedIo> {
        self.check(offset, data.len() as u64).ok()?;
        self.storage.begin_write(offset, data).map(QueuedIo::from)
    }

    pub(crate) async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.check(offset, len)?;
        storage::give_back(&*self.storage, offset, len).await
    }

    pub(crate) async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.check(offset, len)?;
        self.storage.write_zeroes(offset, len).await
    }

    pub(crate) async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        self.check(offset, len)?;
        let (len, is_data) = self.storage.part(offset, len).await?;
        let content = match is_data {
            true => Content::Data,
            false => Content::Hole,
        };
        Ok(vec![Extent { len, content }])
    }

    pub(crate) fn resize(&self, size: u64) -> Result<u64, Failure> {
        if size < self.size.get() {
            return Err(refused(format!(
                "the fixed VHD has shrunk from {} bytes to {size} while it was open",
                self.size.get()
            )));
        }
        self.size.set(size);
        Ok(size)
    }
}
