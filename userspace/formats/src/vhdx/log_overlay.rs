// SPDX-License-Identifier: MIT OR Apache-2.0
//! A file as it would be after a replay of its log, which never happens: the log's changes lie over it in memory. For a
//! sector in the log, only its place there is kept.

use crate::field::{part, put};
use crate::{storage, Storage};
use diskio::{Bytes, Data, Errno};
use drivers::Fence;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Bytes of everything that a log writes.
pub(crate) const SECTOR: u64 = 4096;
/// Ranges at most, which is some MiB of memory. A log that has more is refused.
pub(crate) const MOST: usize = 1 << 17;

/// Replayed content of a range of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Over {
    /// Zeroes.
    Zeroes,
    /// The sector at a byte of the file, in the log. Its first and last bytes are elsewhere.
    Sector {
        at: u64,
        leading: [u8; 8],
        trailing: [u8; 4],
    },
}

/// Changes of a log: ranges of whole sectors, by their first byte, with their end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Overlay {
    ranges: BTreeMap<u64, (u64, Over)>,
    /// The file has as many bytes at least.
    length: u64,
}

impl Overlay {
    /// Nothing yet, over a file that is to have `length` bytes at least.
    pub(crate) fn new(length: u64) -> Self {
        Self {
            ranges: BTreeMap::new(),
            length,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    pub(crate) fn count(&self) -> usize {
        self.ranges.len()
    }

    /// Puts a change over a range, in place of earlier ones.
    pub(crate) fn put(&mut self, begin: u64, end: u64, over: Over) {
        if begin >= end {
            return;
        }
        let before = self.ranges.range(..begin).next_back();
        if let Some((at, (to, what))) = before.map(|(at, (to, what))| (*at, (*to, *what))) {
            if to > begin {
                // Only zeroes have more than one sector, so only they are cut.
                self.ranges.insert(at, (begin, what));
            }
            if to > end {
                self.ranges.insert(end, (to, what));
            }
        }
        let within: Vec<(u64, u64, Over)> = self
            .ranges
            .range(begin..end)
            .map(|(at, (to, what))| (*at, *to, *what))
            .collect();
        for (at, to, what) in within {
            self.ranges.remove(&at);
            if to > end {
                self.ranges.insert(end, (to, what));
            }
        }
        self.ranges.insert(begin, (end, over));
        self.length = self.length.max(end);
    }

    /// Returns the source at `at` and its length in bytes, `len` at most: a change, or `None` for the file itself.
    fn first(&self, at: u64, len: u64) -> (Option<(u64, Over)>, u64) {
        let held = self.ranges.range(..=at).next_back();
        if let Some((begin, (end, over))) = held.filter(|(_, (end, _))| *end > at) {
            return (Some((at - begin, *over)), len.min(end - at));
        }
        let next = self.ranges.range(at..).next().map(|(begin, _)| begin - at);
        (None, next.map_or(len, |next| next.min(len)))
    }
}

/// The file with the log's changes over it. It is read-only.
#[derive(Clone, Debug)]
pub(crate) struct Replayed<S> {
    file: S,
    /// Bytes that the file has.
    size: u64,
    overlay: Rc<Overlay>,
}

impl<S: Storage> Replayed<S> {
    pub(crate) fn new(file: S, overlay: Overlay) -> Result<Self, Errno> {
        Ok(Self {
            size: file.size()?,
            file,
            overlay: Rc::new(overlay),
        })
    }

    /// Ranges that lie over the file.
    pub(crate) fn count(&self) -> usize {
        self.overlay.count()
    }

    /// Bytes of the file after the replay.
    fn length(&self) -> u64 {
        self.size.max(self.overlay.length)
    }

    /// Reads a part of the file. Bytes that the replay would have appended are zeroes.
    async fn read_file(&self, offset: u64, data: Data) -> Result<(), Errno> {
        let end = offset.saturating_add(data.len() as u64);
        match end <= self.size {
            true => self.file.read_exact(offset, data).await,
            false => self.file.read_padded(offset, data).await,
        }
    }

    async fn read_over(&self, over: Over, within: u64, data: Data) -> Result<(), Errno> {
        let Over::Sector {
            at,
            leading,
            trailing,
        } = over
        else {
            data.fill(0, data.len(), 0);
            return Ok(());
        };
        let mut sector = storage::bytes(&self.file, at, SECTOR as usize).await?;
        put(&mut sector, 0, &leading);
        put(&mut sector, SECTOR as usize - trailing.len(), &trailing);
        // CAST: inside of the sector.
        let from = within as usize;
        let wanted = sector.get(from..from.saturating_add(data.len()));
        data.write(0, wanted.ok_or(Errno::IO)?);
        Ok(())
    }

    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        if self.overlay.is_empty() {
            return self.read_file(offset, data).await;
        }
        let len = data.len() as u64;
        let mut done = 0;
        while done < len {
            let at = offset.checked_add(done).ok_or(Errno::INVAL)?;
            let (over, count) = self.overlay.first(at, len - done);
            let piece = part(&data, done, count);
            match over {
                Some((within, over)) => self.read_over(over, within, piece).await?,
                None => self.read_file(at, piece).await?,
            }
            done += count;
        }
        Ok(())
    }
}

impl<S: Storage> Storage for Replayed<S> {
    fn size(&self) -> Result<u64, Errno> {
        Ok(self.length())
    }

    async fn set_size(&self, _size: u64) -> Result<(), Errno> {
        Err(Errno::ROFS)
    }

    fn is_fixed(&self) -> bool {
        self.file.is_fixed()
    }

    fn is_writable(&self) -> Result<bool, Errno> {
        Ok(false)
    }

    fn keep_size(&self) -> Result<Self, Errno> {
        Ok(self.clone())
    }

    fn is_direct(&self) -> bool {
        self.file.is_direct()
    }

    async fn read_exact(&self, offset: u64, data: Data) -> Result<(), Errno> {
        let end = offset.checked_add(data.len() as u64);
        match end.is_some_and(|end| end <= self.length()) {
            true => self.read(offset, data).await,
            false => Err(Errno::IO),
        }
    }

    async fn read_padded(&self, offset: u64, data: Data) -> Result<(), Errno> {
        self.read(offset, data).await
    }

    async fn write(&self, _offset: u64, _data: Bytes) -> Result<(), Errno> {
        Err(Errno::ROFS)
    }

    async fn flush(&self) -> Result<(), Errno> {
        Ok(())
    }

    async fn clear(&self, _offset: u64, _len: u64) -> Result<(), Errno> {
        Err(Errno::ROFS)
    }

    async fn write_zeroes(&self, _offset: u64, _len: u64) -> Result<(), Errno> {
        Err(Errno::ROFS)
    }

    async fn discard(&self, _offset: u64, _len: u64) -> Result<(), Errno> {
        Err(Errno::ROFS)
    }

    async fn part(&self, offset: u64, len: u64) -> Result<(u64, bool), Errno> {
        match self.overlay.first(offset, len) {
            (Some((_, Over::Zeroes)), count) => Ok((count, false)),
            (Some((_, Over::Sector { .. })), count) => Ok((count, true)),
            (None, count) => match self.size.saturating_sub(offset).min(count) {
                0 => Ok((count, false)),
                there => self.file.part(offset, there).await,
            },
        }
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
    use super::{Over, Overlay, SECTOR};

    fn sector(at: u64) -> Over {
        Over::Sector {
            at,
            leading: [0; 8],
            trailing: [0; 4],
        }
    }

    /// Beside a model of single sectors.
    #[test]
    fn what_comes_later_lies_above() {
        let mut seed = 7_u64;
        let mut chance = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % below
        };
        for _ in 0..200 {
            let mut overlay = Overlay::default();
            let mut model: Vec<Option<Over>> = vec![None; 40];
            for number in 0..12 {
                let begin = chance(32);
                let (len, over) = match chance(2) {
                    0 => (1, sector(number)),
                    _ => (chance(8), Over::Zeroes),
                };
                overlay.put(begin * SECTOR, (begin + len) * SECTOR, over);
                for at in begin..begin + len {
                    model[at as usize] = Some(over);
                }
            }
            for (number, wanted) in model.iter().enumerate() {
                let at = number as u64 * SECTOR + 512;
                let (found, count) = overlay.first(at, u64::MAX - at);
                assert_eq!(found.map(|(_, over)| over), *wanted, "{number}");
                assert!(count >= SECTOR - 512);
                let same = model[number..]
                    .iter()
                    .take_while(|other| **other == *wanted);
                assert!(count == u64::MAX - at || count <= same.count() as u64 * SECTOR - 512);
            }
        }
    }
}
