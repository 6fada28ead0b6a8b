// SPDX-License-Identifier: MIT OR Apache-2.0
//! Flushes of an image's files, which requests share.

use crate::Storage;
use diskio::Errno;
use std::rc::Rc;

/// All flushes of an image, or of one of its files. Copies are the same. See [`diskio::Barrier`].
#[derive(Debug)]
pub(crate) struct Barrier<S> {
    /// The data first, so that no metadata is durable much before it.
    storages: Rc<[S]>,
    shared: Rc<diskio::Barrier>,
}

impl<S> Clone for Barrier<S> {
    fn clone(&self) -> Self {
        Self {
            storages: self.storages.clone(),
            shared: self.shared.clone(),
        }
    }
}

impl<S: Storage> Barrier<S> {
    pub(crate) fn new(storages: Vec<S>) -> Self {
        Self {
            storages: storages.into(),
            shared: Rc::default(),
        }
    }

    /// See [`diskio::Barrier::next`].
    pub(crate) fn next(&self) -> u64 {
        self.shared.next()
    }

    /// See [`diskio::Barrier::done`].
    pub(crate) fn done(&self) -> u64 {
        self.shared.done()
    }

    /// See [`diskio::Barrier::lost`].
    pub(crate) fn lost(&self) -> u64 {
        self.shared.lost()
    }

    /// See [`diskio::Barrier::owes`].
    pub(crate) fn owes(&self) -> bool {
        self.shared.owes()
    }

    /// For the driver itself, see [`diskio::Barrier::settle`].
    pub(crate) async fn settle(&self) -> Result<(), Errno> {
        self.shared.settle(async || self.flush_all().await).await
    }

    /// For those whom the driver serves, see [`diskio::Barrier::flush`].
    pub(crate) async fn flush(&self) -> Result<(), Errno> {
        self.shared.flush(async || self.flush_all().await).await
    }

    async fn flush_all(&self) -> Result<(), Errno> {
        for storage in self.storages.iter() {
            storage.flush().await?;
        }
        Ok(())
    }
}
