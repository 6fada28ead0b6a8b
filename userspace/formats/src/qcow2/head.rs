// SPDX-License-Identifier: MIT OR Apache-2.0
//! Changes of an active image's header.

use super::image::Qcow2Image;
use super::slices::{Slice, Slices};
use crate::metadata::Metadata;
use crate::Storage;
use diskio::Errno;
use std::rc::Rc;

/// Change of a part of the header in memory. Unless that is accepted, dropping this restores the old bytes, and they
/// are stored before any other slice, because the image may have either.
struct Changed<'i, S: Storage> {
    slices: &'i Slices<Metadata<S>>,
    header: Rc<Slice>,
    at: usize,
    old: Vec<u8>,
    is_taken: bool,
}

impl<S: Storage> Drop for Changed<'_, S> {
    fn drop(&mut self) {
        if !self.is_taken {
            self.header.put(self.at, &self.old);
            self.slices.owe(&self.header);
        }
    }
}

impl<S: Storage> Qcow2Image<S> {
    /// The header has `new` at a byte: it is durable when this returns. If that fails, it counts as not having
    /// happened.
    pub(crate) async fn change_header(&self, at: usize, new: &[u8]) -> Result<(), Errno> {
        let (header, _) = self.slices.at(0).await?;
        let old = header.look(|bytes| bytes[at..at + new.len()].to_vec());
        header.put(at, new);
        let mut changed = Changed {
            slices: &self.slices,
            header,
            at,
            old,
            is_taken: false,
        };
        self.slices.settle_first(&changed.header).await?;
        self.flush().await?;
        changed.is_taken = true;
        Ok(())
    }
}
