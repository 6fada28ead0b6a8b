// SPDX-License-Identifier: MIT OR Apache-2.0
//! Metadata of an image that a driver repeats after a flush failed.
//!
//! A storage that could not write something back reports that once. The cache then holds it as if it were durable, and
//! no later flush writes it. The guest learns that its writes may be lost, and continues to write: into a cluster whose
//! table entry is lost as well. Its next flush would succeed, and a loss of power would take data that the guest
//! believes to be durable. So after a flush that failed, the driver repeats all metadata since the last flush that
//! succeeded, before a flush may succeed again.

use crate::barrier::Barrier;
use crate::Storage;
use diskio::{Bytes, Data, Errno, Gate};
use drivers::Fence;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

/// Bytes of a part of the log.
const SECTOR: u64 = 512;
/// Sectors in memory at most: a flush comes before there are more.
const MOST: usize = 8192;

/// Metadata that may not be durable yet.
#[derive(Debug, Default)]
pub(crate) struct MetadataLog {
    sectors: RefCell<BTreeMap<u64, Sector>>,
    /// Writes until now.
    count: Cell<u64>,
    /// A flush has failed, or may have, since the last one that succeeded.
    is_lost: Cell<bool>,
    /// Writes share it; the repetition of the log has it alone.
    gate: Gate,
}

/// Writes to a sector of the file, in this order: a table may end within it, and another one begin.
#[derive(Debug, Default)]
struct Sector {
    parts: Vec<(u64, Vec<u8>)>,
    /// Number of the last write.
    number: u64,
}

impl MetadataLog {
    fn add(&self, at: u64, bytes: &[u8]) {
        let number = self.count.get().wrapping_add(1);
        self.count.set(number);
        let mut sectors = self.sectors.borrow_mut();
        let (mut at, mut rest) = (at, bytes);
        while !rest.is_empty() {
            // CAST: at most a sector.
            let room = (SECTOR - at % SECTOR) as usize;
            let (part, behind) = rest.split_at(room.min(rest.len()));
            let sector = sectors.entry(at / SECTOR).or_default();
            let end = at + part.len() as u64;
            sector
                .parts
                .retain(|(begin, old)| *begin < at || begin + old.len() as u64 > end);
            sector.parts.push((at, part.to_vec()));
            sector.number = number;
            (at, rest) = (end, behind);
        }
    }

    fn is_empty(&self) -> bool {
        self.sectors.borrow().is_empty()
    }

    fn is_full(&self) -> bool {
        self.sectors.borrow().len() > MOST
    }

    /// A flush begins: until it has succeeded, it may fail. Returns the last write that it makes durable.
    fn begin(&self) -> u64 {
        self.is_lost.set(true);
        self.count.get()
    }

    /// The flush that began after so many writes has succeeded.
    fn succeeded(&self, count: u64) {
        self.is_lost.set(false);
        self.sectors
            .borrow_mut()
            .retain(|_, sector| sector.number > count);
    }

    /// The parts for a repetition.
    fn parts(&self) -> Vec<(u64, Vec<u8>)> {
        let sectors = self.sectors.borrow();
        let parts = sectors.values().flat_map(|sector| &sector.parts);
        parts.cloned().collect()
    }

    /// Writes all of it to the file again, if a flush has failed.
    async fn write_again(&self, file: &impl Storage) -> Result<(), Errno> {
        if !self.is_lost.get() || self.is_empty() {
            return Ok(());
        }
        // The repetition must not undo a newer write, so no write runs beside it.
        let _alone = self.gate.alone().await;
        for (at, bytes) in self.parts() {
            file.write(at, Bytes::copied(&bytes)?).await?;
        }
        Ok(())
    }

    /// Repeats the metadata that an earlier flush has lost, and then does `flush`, which makes all writes to `file`
    /// durable. Calls `failed` with an error before it repeats what that may have lost, because the storage has reported
    /// the error and forgets it, and the process may die during the repetition.
    ///
    /// # Errors
    /// The first error. Metadata that the flush may have lost has been repeated, and is durable if that was possible.
    pub(crate) async fn flush(
        &self,
        file: &impl Storage,
        flush: impl AsyncFn() -> Result<(), Errno>,
        failed: impl FnOnce(Errno),
    ) -> Result<(), Errno> {
        let once = async || {
            self.write_again(file).await?;
            let count = self.begin();
            flush().await?;
            self.succeeded(count);
            Ok::<(), Errno>(())
        };
        match once().await {
            Err(Errno::OPNOTSUPP) => {
                // Nothing can be made durable at all.
                self.succeeded(self.count.get());
                Err(Errno::OPNOTSUPP)
            }
            Err(error) if !self.is_empty() => {
                failed(error);
                // The image is whole as soon as it can be, because this process may have no further flush. If that fails,
                // the next flush begins with it.
                once().await.or(Err(error))?;
                Err(error)
            }
            done => done,
        }
    }
}

/// The file with the metadata of an image, which logs each write until it is durable.
#[derive(Clone, Debug)]
pub(crate) struct Metadata<S> {
    file: S,
    barrier: Barrier<S>,
}

impl<S: Storage> Metadata<S> {
    /// The metadata in `file`, which `barrier` makes durable.
    pub(crate) fn new(file: S, barrier: Barrier<S>) -> Self {
        Self { file, barrier }
    }

    async fn write_and_log(&self, offset: u64, data: Bytes) -> Result<(), Errno> {
        let log = self.barrier.log();
        {
            let _shared = log.gate.shared().await;
            self.file.write(offset, data.clone()).await?;
            log.add(offset, &data.to_vec());
        }
        match log.is_full() {
            true => self.barrier.settle().await,
            false => Ok(()),
        }
    }
}

impl<S: Storage> Storage for Metadata<S> {
    fn size(&self) -> Result<u64, Errno> {
        self.file.size()
    }

    async fn set_size(&self, size: u64) -> Result<(), Errno> {
        self.file.set_size(size).await
    }

    fn is_fixed(&self) -> bool {
        self.file.is_fixed()
    }

    fn is_writable(&self) -> Result<bool, Errno> {
        self.file.is_writable()
    }

    fn keep_size(&self) -> Result<Self, Errno> {
        Ok(Self::new(self.file.keep_size()?, self.barrier.clone()))
    }

    fn is_direct(&self) -> bool {
        self.file.is_direct()
    }

    async fn read_exact(&self, offset: u64, data: Data) -> Result<(), Errno> {
        self.file.read_exact(offset, data).await
    }

    async fn read_padded(&self, offset: u64, data: Data) -> Result<(), Errno> {
        self.file.read_padded(offset, data).await
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), Errno> {
        // Few requests write metadata, and none is to be larger for it.
        Box::pin(self.write_and_log(offset, data)).await
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.barrier.settle().await
    }

    async fn clear(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.file.clear(offset, len).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.file.write_zeroes(offset, len).await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.file.discard(offset, len).await
    }

    async fn part(&self, offset: u64, len: u64) -> Result<(u64, bool), Errno> {
        self.file.part(offset, len).await
    }

    fn forget(&self) -> Result<(), Errno> {
        self.file.forget()
    }

    fn buffer(&self, len: usize) -> Result<Data, Errno> {
        self.file.buffer(len)
    }

    async fn elsewhere<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Errno> {
        self.file.elsewhere(work).await
    }

    fn fence(&self) -> Fence {
        self.file.fence()
    }
}

#[cfg(test)]
mod tests {
    use super::MetadataLog;

    #[test]
    fn log_holds_what_was_written_last_until_it_is_durable() {
        let log = MetadataLog::default();
        log.add(48, &[1; 600]);
        log.add(512, &[2; 512]);
        assert_eq!(
            log.parts(),
            [(48, vec![1; 464]), (512, vec![2; 512])],
            "a part that was written over is gone"
        );
        // Within the sector, so both count, in this order.
        log.add(600, &[3; 8]);
        let parts = log.parts();
        assert_eq!(parts[1..], [(512, vec![2; 512]), (600, vec![3; 8])]);
        let count = log.begin();
        log.add(0, &[4; 8]);
        log.succeeded(count);
        assert_eq!(log.parts(), [(48, vec![1; 464]), (0, vec![4; 8])]);
        log.succeeded(log.begin());
        assert!(log.is_empty());
    }
}
