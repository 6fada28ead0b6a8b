// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tables of an image in memory, equal to those in the image. A change goes to the image first, and changes of one
//! table that arrive during a write go out together.

use crate::field::put;
use crate::storage;
use crate::Storage;
use diskio::{Bytes, Errno, Gate};
use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

/// Unit of a write that is atomic, in bytes.
const SECTOR: u64 = 512;

/// One table.
#[derive(Debug)]
pub(crate) struct CachedTable {
    at: u64,
    len: usize,
    gate: Gate,
    state: RefCell<TableState>,
}

#[derive(Debug, Default)]
struct TableState {
    /// As in the image; empty until it was read.
    bytes: Vec<u8>,
    /// Content with the changes that are waiting.
    next: Option<Vec<u8>>,
    /// Number of the last change that may be stored, and of the last one that is.
    wanted: u64,
    written: u64,
    /// Changes up to this number that are not in the image yet are dropped. A waiting task runs before later ones, so
    /// one number is enough.
    lost: Option<(u64, Errno)>,
    /// Ranges in which the image may differ from `bytes` because a write failed.
    doubtful: Vec<(usize, usize)>,
    /// True if it was used since the last check.
    used: bool,
}

impl CachedTable {
    /// Makes a table whose content is known.
    pub(crate) fn with(at: u64, bytes: Vec<u8>) -> Rc<Self> {
        let len = bytes.len();
        let state = TableState {
            bytes,
            ..TableState::default()
        };
        Rc::new(Self {
            at,
            len,
            gate: Gate::default(),
            state: RefCell::new(state),
        })
    }

    /// Returns the result of `look` at its bytes.
    pub(crate) fn see<T>(&self, look: impl FnOnce(&[u8]) -> T) -> T {
        look(&self.state.borrow().bytes)
    }

    /// The image has what [`see`](Self::see) shows, whatever failed.
    pub(crate) fn is_settled(&self) -> bool {
        self.state.borrow().doubtful.is_empty()
    }

    fn is_read(&self) -> bool {
        self.len == self.state.borrow().bytes.len()
    }

    /// Reads the table, unless another task has read it.
    async fn load(&self, storage: &impl Storage) -> Result<(), Errno> {
        if self.is_read() {
            return Ok(());
        }
        let _pass = self.gate.alone().await;
        if !self.is_read() {
            let bytes = storage::bytes(storage, self.at, self.len).await?;
            self.state.borrow_mut().bytes = bytes;
        }
        Ok(())
    }

    /// Changes the table. The place that the new entry leads to must be in the image already: from now on another
    /// change may take this one along.
    pub(crate) async fn change(
        &self,
        storage: &impl Storage,
        edit: impl FnOnce(&mut [u8]),
    ) -> Result<(), Errno> {
        let mine = self.state.borrow_mut().edit(edit);
        let _pass = self.gate.alone().await;
        let Some((new, wanted)) = self.state.borrow().pending(mine)? else {
            return Ok(());
        };
        let ranges = {
            let state = self.state.borrow();
            differences(self.at, &state.bytes, &new, &state.doubtful)
        };
        match self.write(storage, &new, &ranges).await {
            Ok(()) => {
                self.state.borrow_mut().is_written(new, wanted);
                Ok(())
            }
            Err(error) => {
                self.state.borrow_mut().is_lost(ranges, error);
                self.restore(storage).await;
                Err(error)
            }
        }
    }

    async fn write(
        &self,
        storage: &impl Storage,
        from: &[u8],
        ranges: &[(usize, usize)],
    ) -> Result<(), Errno> {
        for (begin, end) in ranges {
            let bytes = Bytes::copied(&from[*begin..*end])?;
            storage.write(self.at + *begin as u64, bytes).await?;
        }
        Ok(())
    }

    /// Restores the old content of ranges that a failed write may have changed. If that fails too, the next change does
    /// it.
    async fn restore(&self, storage: &impl Storage) {
        let (old, ranges) = {
            let state = self.state.borrow();
            (state.bytes.clone(), state.doubtful.clone())
        };
        if self.write(storage, &old, &ranges).await.is_ok() {
            self.state.borrow_mut().doubtful.clear();
        }
    }
}

impl TableState {
    /// Makes a change in memory that may be stored from now on, and returns its number.
    fn edit(&mut self, edit: impl FnOnce(&mut [u8])) -> u64 {
        let mut next = match self.next.take() {
            Some(next) => next,
            None => self.bytes.clone(),
        };
        edit(&mut next);
        self.next = Some(next);
        self.wanted += 1;
        self.wanted
    }

    /// Returns the bytes that must be stored for change `mine`, with the number of the last change in them. Returns
    /// `None` if another task has stored it, and the error if another task failed to.
    fn pending(&self, mine: u64) -> Result<Option<(Vec<u8>, u64)>, Errno> {
        if self.written >= mine {
            return Ok(None);
        }
        match (self.lost, &self.next) {
            (Some((last, error)), _) if last >= mine => Err(error),
            (_, Some(next)) => Ok(Some((next.clone(), self.wanted))),
            (_, None) => Err(Errno::IO),
        }
    }

    fn is_written(&mut self, new: Vec<u8>, wanted: u64) {
        self.bytes = new;
        self.written = wanted;
        self.doubtful.clear();
        if self.wanted == wanted {
            self.next = None;
        }
    }

    /// Drops all changes that are not in the image: the tasks that made them get the error and may take another way,
    /// which a later write must not undo.
    fn is_lost(&mut self, ranges: Vec<(usize, usize)>, error: Errno) {
        self.next = None;
        self.lost = Some((self.wanted, error));
        self.doubtful = ranges;
    }
}

/// Returns the ranges of `new` that must be stored: whole sectors of the image, clipped to the table. They include
/// those of `doubtful`.
fn differences(
    at: u64,
    old: &[u8],
    new: &[u8],
    doubtful: &[(usize, usize)],
) -> Vec<(usize, usize)> {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    let mut from = 0;
    while from < new.len() {
        let past = (at + from as u64) % SECTOR;
        // CAST: at most a sector.
        let to = new.len().min(from + (SECTOR - past) as usize);
        let is_doubtful = doubtful
            .iter()
            .any(|(begin, end)| *begin < to && from < *end);
        if is_doubtful || old.get(from..to) != Some(&new[from..to]) {
            match ranges.last_mut() {
                Some(last) if last.1 == from => last.1 = to,
                _ => ranges.push((from, to)),
            }
        }
        from = to;
    }
    ranges
}

/// A table that is in memory as a whole: the first of two levels, which is small.
#[derive(Debug)]
pub(crate) struct Pinned {
    chunks: Vec<Rc<CachedTable>>,
    len: usize,
}

/// Unit in bytes in which it is stored and tracked.
const CHUNK: usize = 4096;

impl Pinned {
    /// Reads `len` bytes at `at`.
    pub(crate) async fn read(storage: &impl Storage, at: u64, len: usize) -> Result<Self, Errno> {
        Ok(Self::with(at, storage::bytes(storage, at, len).await?))
    }

    /// Makes a table whose content at `at` is known.
    pub(crate) fn with(at: u64, bytes: Vec<u8>) -> Self {
        let places = (at..).step_by(CHUNK);
        let chunks = places.zip(bytes.chunks(CHUNK));
        Self {
            chunks: chunks
                .map(|(at, bytes)| CachedTable::with(at, bytes.to_vec()))
                .collect(),
            len: bytes.len(),
        }
    }

    /// Returns the result of `look` at the bytes from `at` to the end of their chunk.
    pub(crate) fn see<T>(&self, at: usize, look: impl FnOnce(&[u8]) -> T) -> T {
        match self.chunks.get(at / CHUNK) {
            Some(chunk) => chunk.see(|bytes| look(bytes.get(at % CHUNK..).unwrap_or(&[]))),
            None => look(&[]),
        }
    }

    /// Puts `value` at `at`.
    pub(crate) async fn put(
        &self,
        storage: &impl Storage,
        at: usize,
        value: &[u8],
    ) -> Result<(), Errno> {
        let chunk = self.chunks.get(at / CHUNK).ok_or(Errno::INVAL)?;
        chunk
            .change(storage, |bytes| put(bytes, at % CHUNK, value))
            .await
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

/// The tables that are in memory, no more than a budget allows.
#[derive(Debug)]
pub(crate) struct TableCache {
    budget: usize,
    cached: RefCell<Cached>,
}

#[derive(Debug, Default)]
struct Cached {
    tables: HashMap<u64, Rc<CachedTable>>,
    /// Offsets in the order in which tables are checked when there is no room.
    order: VecDeque<u64>,
    bytes: usize,
    hits: u64,
    misses: u64,
}

impl TableCache {
    pub(crate) fn new(budget: usize) -> Self {
        Self {
            budget,
            cached: RefCell::default(),
        }
    }

    /// The table of `len` bytes at `at`.
    pub(crate) async fn get(
        &self,
        storage: &impl Storage,
        at: u64,
        len: usize,
    ) -> Result<Rc<CachedTable>, Errno> {
        let table = self.find(at, len);
        table.load(storage).await?;
        Ok(table)
    }

    /// Returns the table of `len` bytes at `at`, if its content is in memory.
    pub(crate) fn known(&self, at: u64, len: usize) -> Option<Rc<CachedTable>> {
        let table = self.cached.borrow_mut().hit(at, len);
        table.filter(|table| table.is_read())
    }

    /// The table, if its content is here.
    #[cfg(test)]
    fn peek(&self, at: u64) -> Option<Rc<CachedTable>> {
        let cached = self.cached.borrow();
        cached
            .tables
            .get(&at)
            .filter(|table| table.is_read())
            .cloned()
    }

    fn find(&self, at: u64, len: usize) -> Rc<CachedTable> {
        let mut cached = self.cached.borrow_mut();
        if let Some(table) = cached.hit(at, len) {
            return table;
        }
        cached.misses += 1;
        let table = Rc::new(CachedTable {
            at,
            len,
            gate: Gate::default(),
            state: RefCell::default(),
        });
        cached.insert(table.clone(), self.budget);
        table
    }

    /// A table that was just written there.
    pub(crate) fn put(&self, at: u64, bytes: Vec<u8>) {
        let table = CachedTable::with(at, bytes);
        self.cached.borrow_mut().insert(table, self.budget);
    }

    /// Forgets the table at `at`, because the place now holds something else.
    pub(crate) fn forget(&self, at: u64) {
        self.cached.borrow_mut().remove(at);
    }

    /// Bytes, hits and misses.
    pub(crate) fn counts(&self) -> (u64, u64, u64) {
        let cached = self.cached.borrow();
        (cached.bytes as u64, cached.hits, cached.misses)
    }
}

impl Cached {
    /// Returns the table of `len` bytes at `at`, whose content may still be on its way.
    fn hit(&mut self, at: u64, len: usize) -> Option<Rc<CachedTable>> {
        let found = self.tables.get(&at).filter(|table| table.len == len);
        let table = found.cloned()?;
        table.state.borrow_mut().used = true;
        self.hits += 1;
        Some(table)
    }

    fn insert(&mut self, table: Rc<CachedTable>, budget: usize) {
        self.remove(table.at);
        self.make_room(budget.saturating_sub(table.len));
        self.bytes += table.len;
        self.order.push_back(table.at);
        self.tables.insert(table.at, table);
    }

    fn remove(&mut self, at: u64) {
        if let Some(table) = self.tables.remove(&at) {
            self.bytes -= table.len;
            // Each table is in the order once; the search happens only when a table is replaced.
            self.order.retain(|other| *other != at);
        }
    }

    /// Drops tables until at most `most` bytes are left, the least recently used ones first; tables in use stay.
    fn make_room(&mut self, most: usize) {
        let mut looks = self.order.len().saturating_mul(2);
        while self.bytes > most && looks > 0 {
            looks -= 1;
            let Some(at) = self.order.pop_front() else {
                return;
            };
            let Some(table) = self.tables.get(&at) else {
                continue;
            };
            let is_busy = Rc::strong_count(table) > 1 || {
                let mut state = table.state.borrow_mut();
                std::mem::take(&mut state.used) || state.next.is_some()
            };
            if is_busy {
                self.order.push_back(at);
            } else {
                self.bytes -= table.len;
                self.tables.remove(&at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{differences, TableCache};

    #[test]
    fn only_what_changed_is_written_in_sectors_of_the_image() {
        let old = vec![0; 2000];
        let mut new = old.clone();
        assert_eq!(differences(48, &old, &new, &[]), []);
        new[463] = 1;
        assert_eq!(differences(48, &old, &new, &[]), [(0, 464)]);
        new[464] = 1;
        assert_eq!(differences(48, &old, &new, &[]), [(0, 976)]);
        new[1999] = 1;
        assert_eq!(differences(48, &old, &new, &[]), [(0, 976), (1488, 2000)]);
        assert_eq!(
            differences(48, &old, &old, &[(464, 976)]),
            [(464, 976)],
            "a write of it failed"
        );
    }

    #[test]
    fn budget_is_kept_and_what_is_used_stays() {
        let tables = TableCache::new(4096);
        tables.put(0, vec![1; 1024]);
        let held = tables.peek(0).unwrap();
        for at in 1..100 {
            tables.put(at * 1024, vec![0; 1024]);
            assert!(tables.counts().0 <= 4096);
        }
        assert_eq!(tables.peek(0).unwrap().see(|bytes| bytes[0]), 1);
        drop(held);
        for at in 100..110 {
            tables.put(at * 1024, vec![0; 1024]);
        }
        assert!(tables.peek(0).is_none());
    }
}
