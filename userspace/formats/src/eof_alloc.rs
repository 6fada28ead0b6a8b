// SPDX-License-Identifier: MIT OR Apache-2.0
//! Free space at the end of an image that was never used: it reads as zeroes, also after a power cut, so the rest of a
//! new cluster never shows other data.

use crate::barrier::Barrier;
use crate::field::round_up;
use crate::Storage;
use diskio::{Errno, Gate};
use std::cell::Cell;

/// Bytes by which the image grows at once. The new bytes are a hole.
const CHUNK: u64 = 64 << 20;

/// Allocator at the end of an image.
#[derive(Debug)]
pub(crate) struct Tail<S> {
    next: Cell<u64>,
    /// Durable end of the image, in bytes.
    end: Cell<u64>,
    /// Largest end of the image, in bytes.
    most: u64,
    /// Serialises growth of the image.
    gate: Gate,
    /// All flushes of the image.
    barrier: Barrier<S>,
}

impl<S: Storage> Tail<S> {
    /// Room behind `size`, which is where the image ends.
    pub(crate) fn new(size: u64, most: u64, barrier: Barrier<S>) -> Self {
        Self {
            next: Cell::new(size),
            end: Cell::new(size),
            most,
            gate: Gate::default(),
            barrier,
        }
    }

    /// All flushes of the image.
    pub(crate) fn barrier(&self) -> &Barrier<S> {
        &self.barrier
    }

    /// Allocates `len` bytes that begin at a multiple of `align`. The range is never handed out twice.
    pub(crate) async fn take(&self, storage: &S, len: u64, align: u64) -> Result<u64, Errno> {
        if let Some(place) = self.ready(len, align)? {
            return Ok(place);
        }
        let _pass = self.gate.alone().await;
        loop {
            if let Some(place) = self.ready(len, align)? {
                return Ok(place);
            }
            self.extend(storage, len.saturating_add(align)).await?;
        }
    }

    fn ready(&self, len: u64, align: u64) -> Result<Option<u64>, Errno> {
        let begin = round_up(self.next.get(), align).ok_or(Errno::FBIG)?;
        let end = begin.checked_add(len).ok_or(Errno::FBIG)?;
        if end > self.most {
            return Err(Errno::FBIG);
        }
        if end > self.end.get() {
            return Ok(None);
        }
        self.next.set(end);
        Ok(Some(begin))
    }

    /// Makes the image longer. The new size is durable before an entry points there: an entry that leads behind the end
    /// would be damage.
    async fn extend(&self, storage: &S, len: u64) -> Result<(), Errno> {
        if storage.is_fixed() {
            return Err(Errno::NOSPC);
        }
        let end = self.end.get().checked_add(len).ok_or(Errno::FBIG)?;
        let size = round_up(end, CHUNK).map_or(end, |size| size.min(self.most));
        let errors = self.barrier.errors();
        storage.set_size(size).await?;
        self.barrier.settle_since(errors).await?;
        self.end.set(size);
        Ok(())
    }

    /// Returns the end of the image.
    pub(crate) fn end(&self) -> u64 {
        self.end.get()
    }

    /// Cuts off unused space at the end. The image called `name` is valid without that, so a failure is only reported.
    pub(crate) async fn tidy(&self, storage: &S, name: &str) {
        let (next, end) = (self.next.get(), self.end.get());
        if end <= next || storage.is_fixed() {
            return;
        }
        match storage.set_size(next).await {
            Ok(()) => self.end.set(next),
            Err(error) => diskio::say!(
                "{name}: the unused space at the end of the file could not be freed: {error}"
            ),
        }
    }
}
