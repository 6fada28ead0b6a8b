// SPDX-License-Identifier: MIT OR Apache-2.0
//! Flushes of an image's files, which requests share.

use crate::metadata::{Metadata, MetadataLog};
use crate::Storage;
use diskio::Errno;
use std::rc::Rc;

/// All flushes of an image, or of one of its files. Copies are the same. See [`diskio::Barrier`].
#[derive(Debug)]
pub(crate) struct Barrier<S> {
    /// The data first, so that no metadata is durable much before it.
    storages: Rc<[S]>,
    shared: Rc<diskio::Barrier>,
    /// Metadata, which is all in the last of the files.
    log: Rc<MetadataLog>,
}

impl<S> Clone for Barrier<S> {
    fn clone(&self) -> Self {
        Self {
            storages: self.storages.clone(),
            shared: self.shared.clone(),
            log: self.log.clone(),
        }
    }
}

impl<S: Storage> Barrier<S> {
    pub(crate) fn new(storages: Vec<S>) -> Self {
        Self {
            storages: storages.into(),
            shared: Rc::default(),
            log: Rc::default(),
        }
    }

    /// The metadata in `file`, which is the last of the files.
    pub(crate) fn metadata(&self, file: &S) -> Metadata<S> {
        Metadata::new(file.clone(), self.clone())
    }

    pub(crate) fn log(&self) -> &MetadataLog {
        &self.log
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

    /// See [`diskio::Barrier::errors`].
    pub(crate) fn errors(&self) -> u64 {
        self.shared.errors()
    }

    /// For the driver itself, see [`diskio::Barrier::settle_since`].
    pub(crate) async fn settle_since(&self, errors: u64) -> Result<(), Errno> {
        let work = async || self.flush_all().await;
        self.shared.settle_since(errors, work).await
    }

    /// For those whom the driver serves, see [`diskio::Barrier::flush`].
    pub(crate) async fn flush(&self) -> Result<(), Errno> {
        self.shared.flush(async || self.flush_all().await).await
    }

    async fn flush_all(&self) -> Result<(), Errno> {
        let flush = async || {
            for storage in self.storages.iter() {
                storage.flush().await?;
            }
            Ok::<(), Errno>(())
        };
        match self.storages.last() {
            // A request that needs no flush is not to be larger for it.
            Some(file) => {
                let failed = |error| self.shared.lose(error);
                Box::pin(self.log.flush(file, flush, failed)).await
            }
            None => Ok(()),
        }
    }
}
