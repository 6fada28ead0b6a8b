// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images in memory that record each write, and checks of disks against their expected content.

pub(crate) mod history;
pub(crate) mod places;
pub(crate) mod qemu;
pub(crate) mod secret;
pub(crate) mod tools;

use diskio::{Bytes, Data, Errno, Runtime};
use drivers::Fence;
use formats::Storage;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::rc::Rc;
use std::task::Poll;

const PAGE: usize = 4096;
pub(crate) const SECTOR: usize = 512;

/// Numbers by chance, the same for the same seed.
#[derive(Clone, Debug)]
pub(crate) struct SeededRng(pub(crate) u64);

impl SeededRng {
    pub(crate) fn next(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, most: u64) -> u64 {
        self.next() % most.max(1)
    }
}

/// Sparse content of a file: only pages that a change touched exist.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct SparseContent {
    pages: BTreeMap<u64, Rc<[u8; PAGE]>>,
    pub(crate) len: u64,
}

impl SparseContent {
    pub(crate) fn from(bytes: &[u8]) -> Self {
        let mut content = Self::default();
        content.write(0, bytes);
        content
    }

    pub(crate) fn read(&self, at: u64, to: &mut [u8]) {
        let mut done = 0;
        while done < to.len() {
            let place = at + done as u64;
            let within = place as usize % PAGE;
            let count = (PAGE - within).min(to.len() - done);
            let target = &mut to[done..done + count];
            match self.pages.get(&(place / PAGE as u64)) {
                Some(page) => target.copy_from_slice(&page[within..within + count]),
                None => target.fill(0),
            }
            done += count;
        }
    }

    pub(crate) fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len as usize];
        for (number, page) in &self.pages {
            let at = *number as usize * PAGE;
            if at < bytes.len() {
                let count = PAGE.min(bytes.len() - at);
                bytes[at..at + count].copy_from_slice(&page[..count]);
            }
        }
        bytes
    }

    pub(crate) fn write(&mut self, at: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let place = at + done as u64;
            let within = place as usize % PAGE;
            let count = (PAGE - within).min(bytes.len() - done);
            let page = self
                .pages
                .entry(place / PAGE as u64)
                .or_insert_with(|| Rc::new([0; PAGE]));
            Rc::make_mut(page)[within..within + count].copy_from_slice(&bytes[done..done + count]);
            done += count;
        }
        self.len = self.len.max(at + bytes.len() as u64);
    }

    /// Zeroes what there is.
    pub(crate) fn zero(&mut self, at: u64, len: u64) {
        let end = (at + len).min(self.len);
        let mut place = at;
        while place < end {
            let number = place / PAGE as u64;
            let next = ((number + 1) * PAGE as u64).min(end);
            if place % PAGE as u64 == 0 && next - place == PAGE as u64 {
                self.pages.remove(&number);
            } else if let Some(page) = self.pages.get_mut(&number) {
                let within = place as usize % PAGE;
                Rc::make_mut(page)[within..within + (next - place) as usize].fill(0);
            }
            place = next;
        }
    }

    pub(crate) fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len - len);
        }
        self.len = len;
    }

    pub(crate) fn apply(&mut self, event: &What) {
        match event {
            What::Write(at, bytes) => self.write(*at, bytes),
            What::Zero(at, len) => self.zero(*at, *len),
            What::Size(len) => self.set_len(*len),
            What::Flush => {}
        }
    }
}

/// Change of a file.
#[derive(Clone, Debug)]
pub(crate) enum What {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Size(u64),
    Flush,
}

/// Files whose changes are recorded in one order.
#[derive(Clone, Debug, Default)]
pub(crate) struct World(Rc<WorldState>);

#[derive(Debug, Default)]
struct WorldState {
    files: RefCell<Vec<SparseContent>>,
    log: RefCell<Vec<(usize, What)>>,
    chance: Cell<u64>,
    /// Operations end in another order than they begin.
    shuffles: Cell<bool>,
    /// Changes that are left until every one fails.
    left: Cell<Option<usize>>,
    /// Changes that are left until a single one fails, and its error.
    left_once: Cell<Option<(usize, Errno)>>,
    /// True if the failing change is applied nevertheless.
    fails_late: Cell<bool>,
    /// Number of changes before the single failure, if that was a flush.
    lost_flush: Cell<Option<usize>>,
}

impl World {
    pub(crate) fn new(files: Vec<SparseContent>) -> Self {
        let world = Self::default();
        *world.0.files.borrow_mut() = files;
        world
    }

    pub(crate) fn shuffle(&self, seed: u64) {
        self.0.chance.set(seed);
        self.0.shuffles.set(true);
    }

    pub(crate) fn fail_after(&self, changes: Option<usize>) {
        self.0.left.set(changes);
    }

    /// Lets one change fail after `after` others; later ones succeed.
    pub(crate) fn fail_once(&self, after: usize, error: Errno) {
        self.0.left_once.set(Some((after, error)));
    }

    /// Cancels the single failure.
    pub(crate) fn fail_never(&self) {
        self.0.left_once.set(None);
    }

    pub(crate) fn fail_late(&self) {
        self.0.fails_late.set(true);
    }

    /// Returns true if the single failure has happened, and was a flush.
    pub(crate) fn has_lost_flush(&self) -> bool {
        self.0.lost_flush.get().is_some()
    }

    /// Returns true if the single failure was a flush, and no other flush had succeeded between change `changes` and
    /// it.
    pub(crate) fn has_lost_since(&self, changes: usize) -> bool {
        self.0.lost_flush.get().is_some_and(|lost| {
            let log = self.0.log.borrow();
            let before = log.get(changes..lost).unwrap_or_default();
            !before.iter().any(|(_, what)| matches!(what, What::Flush))
        })
    }

    /// Returns true if the single failure has happened.
    pub(crate) fn has_failed(&self) -> bool {
        self.0.left_once.get().is_none()
    }

    pub(crate) fn files(&self) -> Vec<SparseContent> {
        self.0.files.borrow().clone()
    }

    pub(crate) fn log(&self) -> Vec<(usize, What)> {
        self.0.log.borrow().clone()
    }

    pub(crate) fn changes(&self) -> usize {
        self.0.log.borrow().len()
    }

    pub(crate) fn file(&self, number: usize) -> WorldFile {
        WorldFile {
            world: self.clone(),
            number,
            read_only: false,
            fills_blocks: false,
        }
    }

    async fn wait(&self) {
        if !self.0.shuffles.get() {
            return;
        }
        let mut chance = SeededRng(self.0.chance.get());
        let mut turns = chance.below(6);
        self.0.chance.set(chance.0);
        std::future::poll_fn(move |cx| {
            if turns == 0 {
                return Poll::Ready(());
            }
            turns -= 1;
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await
    }

    fn change(&self, file: usize, what: What) -> Result<(), Errno> {
        if let Some(left) = self.0.left.get() {
            if left == 0 {
                return Err(Errno::IO);
            }
            self.0.left.set(Some(left - 1));
        }
        match self.0.left_once.get() {
            Some((0, error)) => {
                self.0.left_once.set(None);
                let changes = matches!(what, What::Flush).then(|| self.changes());
                self.0.lost_flush.set(changes);
                if self.0.fails_late.get() {
                    self.0.files.borrow_mut()[file].apply(&what);
                    self.0.log.borrow_mut().push((file, what));
                }
                return Err(error);
            }
            Some((left, error)) => self.0.left_once.set(Some((left - 1, error))),
            None => {}
        }
        self.0.files.borrow_mut()[file].apply(&what);
        self.0.log.borrow_mut().push((file, what));
        Ok(())
    }
}

/// A file of a world.
#[derive(Clone, Debug)]
pub(crate) struct WorldFile {
    world: World,
    number: usize,
    pub(crate) read_only: bool,
    /// A write of its end makes it a whole number of blocks, as one past the page cache does.
    pub(crate) fills_blocks: bool,
}

/// Bytes of a block whose write is atomic.
pub(crate) const BLOCK: u64 = 4096;

impl Storage for WorldFile {
    async fn read_padded(&self, offset: u64, data: Data) -> Result<(), Errno> {
        self.world.wait().await;
        let mut bytes = vec![0; data.len()];
        self.world.0.files.borrow()[self.number].read(offset, &mut bytes);
        data.write(0, &bytes);
        self.world.wait().await;
        Ok(())
    }

    fn keep_size(&self) -> Result<Self, Errno> {
        let is_whole = self.size()? % BLOCK == 0;
        Ok(Self {
            fills_blocks: self.fills_blocks && is_whole,
            ..self.clone()
        })
    }

    async fn read_exact(&self, offset: u64, data: Data) -> Result<(), Errno> {
        self.world.wait().await;
        let mut bytes = vec![0; data.len()];
        {
            let files = self.world.0.files.borrow();
            let file = &files[self.number];
            if offset
                .checked_add(data.len() as u64)
                .is_none_or(|end| end > file.len)
            {
                return Err(Errno::IO);
            }
            file.read(offset, &mut bytes);
        }
        data.write(0, &bytes);
        self.world.wait().await;
        Ok(())
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), Errno> {
        assert!(!self.read_only, "a write to an image that is only read");
        self.world.wait().await;
        self.world
            .change(self.number, What::Write(offset, data.to_vec()))?;
        let size = self.size()?;
        if self.fills_blocks && offset + data.len() as u64 == size && size % BLOCK > 0 {
            let whole = size.next_multiple_of(BLOCK);
            self.world.change(self.number, What::Size(whole))?;
        }
        self.world.wait().await;
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Errno> {
        assert!(!self.read_only, "a write to an image that is only read");
        self.world.wait().await;
        self.world.change(self.number, What::Zero(offset, len))?;
        self.world.wait().await;
        Ok(())
    }

    async fn clear(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.write_zeroes(offset, len).await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.write_zeroes(offset, len).await
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.world.wait().await;
        let flushed = self.world.change(self.number, What::Flush);
        // An error may be heard of later than that a flush behind it has succeeded.
        self.world.wait().await;
        flushed
    }

    async fn part(&self, _offset: u64, len: u64) -> Result<(u64, bool), Errno> {
        Ok((len, true))
    }

    fn size(&self) -> Result<u64, Errno> {
        Ok(self.world.0.files.borrow()[self.number].len)
    }

    async fn set_size(&self, size: u64) -> Result<(), Errno> {
        assert!(!self.read_only, "a write to an image that is only read");
        self.world.wait().await;
        self.world.change(self.number, What::Size(size))?;
        self.world.wait().await;
        Ok(())
    }

    fn is_direct(&self) -> bool {
        true
    }

    fn is_fixed(&self) -> bool {
        false
    }

    fn is_writable(&self) -> Result<bool, Errno> {
        Ok(!self.read_only)
    }

    fn forget(&self) -> Result<(), Errno> {
        Ok(())
    }

    fn buffer(&self, len: usize) -> Result<Data, Errno> {
        let data = Data::zeroed(len)?;
        data.fill(0, len, 0xee);
        Ok(data)
    }

    async fn elsewhere<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Errno> {
        self.world.wait().await;
        Ok(work())
    }

    fn fence(&self) -> Fence {
        Fence::Local
    }
}

/// Runs one thing to its end.
pub(crate) fn run<T: 'static>(work: impl Future<Output = T> + 'static) -> T {
    Runtime::new().block_on(work).unwrap()
}
