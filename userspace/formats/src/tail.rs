// SPDX-License-Identifier: MIT OR Apache-2.0
//! Room at the end of an image that nothing was ever written to: it reads as zeroes, also after the
//! loss of power, so what is not written of a new cluster shows nobody's bytes.

use crate::barrier::Barrier;
use crate::field::round_up;
use crate::Storage;
use diskio::{Errno, Gate};
use std::cell::Cell;

/// Bytes that the image is made longer by at once. They are a hole.
const CHUNK: u64 = 64 << 20;

/// Where the next cluster goes.
#[derive(Debug)]
pub(crate) struct Tail<S> {
    next: Cell<u64>,
    /// Where the image ends, also after the loss of power.
    end: Cell<u64>,
    /// Where it must end at last.
    most: u64,
    /// One makes the image longer, for all.
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

    /// Where `len` bytes are that begin at a multiple of `align`. They are not given twice.
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

    /// Makes the image longer. That is durable before anything points there: an entry that leads behind
    /// the end would be damage.
    async fn extend(&self, storage: &S, len: u64) -> Result<(), Errno> {
        if storage.is_fixed() {
            return Err(Errno::NOSPC);
        }
        let end = self.end.get().checked_add(len).ok_or(Errno::FBIG)?;
        let size = round_up(end, CHUNK).map_or(end, |size| size.min(self.most));
        storage.set_size(size).await?;
        self.barrier.settle().await?;
        self.end.set(size);
        Ok(())
    }

    /// Where the image ends.
    pub(crate) fn end(&self) -> u64 {
        self.end.get()
    }

    /// Gives back what was not used. The image called `name` is whole without that, so a failure is only
    /// told.
    pub(crate) async fn tidy(&self, storage: &S, name: &str) {
        let (next, end) = (self.next.get(), self.end.get());
        if end <= next || storage.is_fixed() {
            return;
        }
        match storage.set_size(next).await {
            Ok(()) => self.end.set(next),
            Err(error) => diskio::say!("{name}: the image keeps the room at its end: {error}"),
        }
    }
}
