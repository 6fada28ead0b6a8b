// SPDX-License-Identifier: MIT OR Apache-2.0
//! Metadata in memory: small parts of an image's tables, within a budget.
//!
//! A change is made in memory first, and [`Slices::settle`] hands the slice to the kernel: a request that relies on an
//! entry settles its slice before its answer, even if another request made the change. Changes that arrive during the
//! write of a slice go together with the next write, so many requests share one.

use crate::bell::Bell;
use crate::Storage;
use diskio::Errno;
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::rc::Rc;

/// Bytes of a slice at most. Images with smaller clusters have slices of a cluster.
pub(crate) const SLICE: usize = 4096;

/// A part of a table.
#[derive(Debug)]
pub(crate) struct Slice {
    /// Offset in the image, in bytes.
    offset: u64,
    bytes: RefCell<Box<[u8]>>,
    /// Grows with each change.
    version: Cell<u64>,
    /// The version that the image has.
    written: Cell<u64>,
    writing: Cell<bool>,
    /// Used since the cache looked for something to forget.
    used: Cell<bool>,
    bell: Bell,
}

impl Slice {
    pub(crate) fn len(&self) -> usize {
        self.bytes.borrow().len()
    }

    /// Returns the big-endian number at a byte; zero behind the end.
    pub(crate) fn number(&self, at: usize) -> u64 {
        let bytes = self.bytes.borrow();
        let found = at.checked_add(8).and_then(|end| bytes.get(at..end));
        found.map_or(0, |found| {
            found
                .iter()
                .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
        })
    }

    /// Looks at the bytes.
    pub(crate) fn look<T>(&self, at: impl FnOnce(&[u8]) -> T) -> T {
        at(&self.bytes.borrow())
    }

    /// Changes the bytes, in memory.
    pub(crate) fn change<T>(&self, with: impl FnOnce(&mut [u8]) -> T) -> T {
        self.version.set(self.version.get() + 1);
        with(&mut self.bytes.borrow_mut())
    }

    /// Changes a big-endian number, in memory. There must be one.
    pub(crate) fn set_number(&self, at: usize, number: u64) {
        self.put(at, &number.to_be_bytes());
    }

    /// Changes bytes from `at` on, in memory. The range must be inside of the slice.
    pub(crate) fn put(&self, at: usize, new: &[u8]) {
        self.change(|bytes| bytes[at..at + new.len()].copy_from_slice(new));
    }

    /// The image has all of it.
    pub(crate) fn is_settled(&self) -> bool {
        self.written.get() == self.version.get()
    }
}

/// The slices of an image.
#[derive(Debug)]
pub(crate) struct Slices<S> {
    storage: S,
    len: usize,
    most: usize,
    known: RefCell<HashMap<u64, Rc<Slice>>>,
    /// Offsets in the order in which slices are checked when one has to be dropped.
    queue: RefCell<VecDeque<u64>>,
    loading: RefCell<HashSet<u64>>,
    loaded: Bell,
    /// Slices that other entries rely on and that may differ in the image: they are stored before any other slice.
    owed: RefCell<Vec<Rc<Slice>>>,
    pub(crate) misses: Cell<u64>,
    pub(crate) writes: Cell<u64>,
}

/// A slice is being read, until this is dropped.
struct LoadingSlice<'s, S>(&'s Slices<S>, u64);

impl<S> Drop for LoadingSlice<'_, S> {
    fn drop(&mut self) {
        self.0.loading.borrow_mut().remove(&self.1);
        self.0.loaded.ring();
    }
}

/// A slice is being written, until this is dropped.
struct Writing<'s>(&'s Slice);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.writing.set(false);
        self.0.bell.ring();
    }
}

impl<S: Storage> Slices<S> {
    /// Slices of `len` bytes, which take about `budget` bytes; a few more if many requests use
    /// different ones at once.
    pub(crate) fn new(storage: S, len: usize, budget: usize) -> Self {
        Self {
            storage,
            len,
            most: (budget / (len + 256)).max(16),
            known: RefCell::default(),
            queue: RefCell::default(),
            loading: RefCell::default(),
            loaded: Bell::default(),
            owed: RefCell::default(),
            misses: Cell::new(0),
            writes: Cell::new(0),
        }
    }

    /// Bytes of a slice.
    pub(crate) fn slice_len(&self) -> u64 {
        self.len as u64
    }

    /// Slices in memory.
    pub(crate) fn count(&self) -> usize {
        self.known.borrow().len()
    }

    /// The slice with the byte at `offset`, and where that is in it.
    pub(crate) async fn at(&self, offset: u64) -> Result<(Rc<Slice>, usize), Errno> {
        let within = offset % self.slice_len();
        let slice = self.get(offset - within).await?;
        // CAST: smaller than a slice.
        Ok((slice, within as usize))
    }

    /// Returns the slice at `offset`, and the offset within it, if it is in memory.
    pub(crate) fn known_at(&self, offset: u64) -> Option<(Rc<Slice>, usize)> {
        let within = offset % self.slice_len();
        // CAST: smaller than a slice.
        Some((self.known(offset - within)?, within as usize))
    }

    fn known(&self, offset: u64) -> Option<Rc<Slice>> {
        let known = self.known.borrow();
        let slice = known.get(&offset)?;
        slice.used.set(true);
        Some(slice.clone())
    }

    async fn get(&self, offset: u64) -> Result<Rc<Slice>, Errno> {
        loop {
            if let Some(slice) = self.known(offset) {
                return Ok(slice);
            }
            if self.loading.borrow_mut().insert(offset) {
                break;
            }
            let over = || (!self.loading.borrow().contains(&offset)).then_some(());
            self.loaded.until(over).await;
        }
        let _loading = LoadingSlice(self, offset);
        self.misses.set(self.misses.get() + 1);
        let data = self.storage.buffer(self.len)?;
        self.storage.read_padded(offset, data.clone()).await?;
        let mut bytes = vec![0; self.len];
        data.read(0, &mut bytes);
        let slice = Rc::new(Slice {
            offset,
            bytes: RefCell::new(bytes.into()),
            version: Cell::new(0),
            written: Cell::new(0),
            writing: Cell::new(false),
            used: Cell::new(true),
            bell: Bell::default(),
        });
        self.make_room();
        self.known.borrow_mut().insert(offset, slice.clone());
        self.queue.borrow_mut().push_back(offset);
        Ok(slice)
    }

    /// Drops slices that are unused and settled, the least recently used ones first.
    fn make_room(&self) {
        let mut known = self.known.borrow_mut();
        let mut queue = self.queue.borrow_mut();
        let mut looks = queue.len() * 2;
        while known.len() >= self.most && looks > 0 {
            looks -= 1;
            let Some(offset) = queue.pop_front() else {
                return;
            };
            let Some(slice) = known.get(&offset) else {
                continue;
            };
            let is_needed =
                Rc::strong_count(slice) > 1 || !slice.is_settled() || slice.writing.get();
            if is_needed || slice.used.replace(false) {
                queue.push_back(offset);
            } else {
                known.remove(&offset);
            }
        }
    }

    /// Drops the slices of a range of the image that holds no table any more.
    pub(crate) fn forget(&self, range: Range<u64>) {
        let mut known = self.known.borrow_mut();
        let count = (range.end - range.start) / self.slice_len();
        if count > known.len() as u64 {
            known.retain(|offset, _| !range.contains(offset));
        } else {
            for number in 0..count {
                known.remove(&(range.start + number * self.slice_len()));
            }
        }
        self.queue
            .borrow_mut()
            .retain(|offset| known.contains_key(offset));
        self.owed
            .borrow_mut()
            .retain(|slice| !range.contains(&slice.offset));
    }

    /// Settles all slices, also those whose write has failed before.
    pub(crate) async fn settle_all(&self) -> Result<(), Errno> {
        let unsettled = |slice: &&Rc<Slice>| !slice.is_settled();
        let all: Vec<Rc<Slice>> = {
            let known = self.known.borrow();
            known.values().filter(unsettled).cloned().collect()
        };
        for slice in all {
            self.settle(&slice).await?;
        }
        Ok(())
    }

    /// Returns when the image has the present content of the slice, which no death of this process can undo.
    pub(crate) async fn settle(&self, slice: &Slice) -> Result<(), Errno> {
        self.pay().await?;
        self.write_out(slice).await
    }

    /// Settles a slice that says where tables are, because the users of those tables do not settle it. Until this
    /// succeeds, no other slice can be settled.
    pub(crate) async fn settle_first(&self, slice: &Rc<Slice>) -> Result<(), Errno> {
        self.owe(slice);
        self.pay().await
    }

    /// Schedules the slice to be stored before any other.
    pub(crate) fn owe(&self, slice: &Rc<Slice>) {
        let mut owed = self.owed.borrow_mut();
        if !owed.iter().any(|other| Rc::ptr_eq(other, slice)) {
            owed.push(slice.clone());
        }
    }

    /// Writes what goes before any other.
    pub(crate) async fn pay(&self) -> Result<(), Errno> {
        loop {
            let next = self.owed.borrow().first().cloned();
            let Some(slice) = next else { return Ok(()) };
            self.write_out(&slice).await?;
            self.owed.borrow_mut().retain(|slice| !slice.is_settled());
        }
    }

    async fn write_out(&self, slice: &Slice) -> Result<(), Errno> {
        let wanted = slice.version.get();
        while slice.written.get() < wanted {
            if slice.writing.get() {
                slice
                    .bell
                    .until(|| (!slice.writing.get()).then_some(()))
                    .await;
                continue;
            }
            slice.writing.set(true);
            let _writing = Writing(slice);
            let version = slice.version.get();
            let data = self.storage.buffer(self.len)?;
            slice.look(|bytes| data.write(0, bytes));
            self.storage.write(slice.offset, data.into()).await?;
            slice.written.set(version);
            self.writes.set(self.writes.get() + 1);
        }
        Ok(())
    }
}
