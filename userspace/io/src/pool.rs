// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory for I/O that is used again: to map and unmap some for each transfer costs more than most
//! transfers.

use crate::Region;
use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;

/// Bytes of the smallest region.
const SMALLEST: usize = 4096;
/// Sizes: each is twice the one before, up to 2 MiB. A larger region is not kept.
const SIZES: usize = 10;
/// Unused bytes that are kept by default.
const KEPT: usize = 2 << 20;

/// Unused regions, by size.
#[derive(Debug)]
pub(crate) struct Pool {
    free: RefCell<[Vec<Region>; SIZES]>,
    kept: Cell<usize>,
    most: Cell<usize>,
    /// Regions that were taken, and how many that were when one of each size was taken last.
    taken: Cell<u64>,
    last: RefCell<[u64; SIZES]>,
}

impl Default for Pool {
    fn default() -> Self {
        Self {
            free: RefCell::default(),
            kept: Cell::new(0),
            most: Cell::new(KEPT),
            taken: Cell::new(0),
            last: RefCell::default(),
        }
    }
}

impl Pool {
    /// Keeps at least that many bytes from now on.
    pub(crate) fn keep(&self, bytes: usize) {
        self.most.set(self.most.get().max(bytes));
    }

    /// Returns a region of at least `len` bytes, with any content, that comes back when it is dropped.
    pub(crate) fn take(self: &Rc<Self>, len: usize) -> io::Result<Region> {
        let Some(size) = size(len) else {
            return Region::anonymous(len);
        };
        self.taken.set(self.taken.get() + 1);
        self.last.borrow_mut()[size] = self.taken.get();
        let region = match self.free.borrow_mut()[size].pop() {
            Some(region) => {
                self.kept.set(self.kept.get() - region.len());
                region
            }
            None => Region::anonymous(SMALLEST << size)?,
        };
        Ok(region.of(self.clone()))
    }

    /// Keeps a region. If there is no room, those go of the size that was not taken for longest, or it goes itself if that
    /// is its own.
    pub(crate) fn give(&self, region: Region) {
        // The length of the region counts, because it may be larger than the requested one on machines with large
        // pages.
        let Some(size) = size(region.len()) else {
            return;
        };
        let mut free = self.free.borrow_mut();
        let last = self.last.borrow();
        while self.kept.get() + region.len() > self.most.get() {
            let there = (0..SIZES).filter(|other| !free[*other].is_empty() || *other == size);
            let oldest = there.min_by_key(|other| last[*other]).unwrap_or(size);
            if oldest == size {
                return;
            }
            let old = free[oldest].pop();
            self.kept
                .set(self.kept.get() - old.map_or(0, |old| old.len()));
        }
        self.kept.set(self.kept.get() + region.len());
        free[size].push(region);
    }
}

/// The smallest size that holds `len` bytes.
fn size(len: usize) -> Option<usize> {
    (0..SIZES).find(|size| len <= SMALLEST << size)
}

#[cfg(test)]
mod tests {
    use super::{Pool, KEPT};
    use crate::Region;
    use std::rc::Rc;

    #[test]
    fn memory_is_used_again_and_not_hoarded() {
        let pool = Rc::new(Pool::default());
        let first = pool.take(5000).unwrap();
        assert_eq!(first.len(), 8192);
        let place = first.address(0);
        drop(first);
        let (again, other) = (pool.take(8192).unwrap(), pool.take(8192).unwrap());
        assert_eq!(again.address(0), place);
        assert_ne!(other.address(0), place);
        assert_eq!(pool.kept.get(), 0);
        drop(pool.take(8 << 20).unwrap());
        assert_eq!(pool.kept.get(), 0, "it is too large to be kept");
        let many: Vec<Region> = (0..5).map(|_| pool.take(1 << 20).unwrap()).collect();
        drop(many);
        assert_eq!(pool.kept.get(), KEPT);
        drop((again, other));
        assert_eq!(pool.kept.get(), KEPT);
        pool.keep(2 * KEPT);
        pool.keep(KEPT);
        let many: Vec<Region> = (0..5).map(|_| pool.take(1 << 20).unwrap()).collect();
        drop(many);
        assert_eq!(pool.kept.get(), 2 * KEPT);
        pool.take(1 << 20).unwrap().write((1 << 20) - 1, &[1]);
    }

    #[test]
    fn what_was_used_long_ago_makes_room() {
        let pool = Rc::new(Pool::default());
        let take = |count: usize, len| -> Vec<Region> {
            (0..count).map(|_| pool.take(len).unwrap()).collect()
        };
        drop(take(KEPT / 4096 + 7, 4096));
        assert_eq!(pool.kept.get(), KEPT);
        let counts = |size: usize| pool.free.borrow()[size].len();
        // Regions are freed when others need the room, and not before.
        drop(take(1, 1 << 20));
        assert_eq!((counts(0), counts(8)), (256, 1));
        drop(take(9, 1 << 20));
        assert_eq!((counts(0), counts(8)), (0, 2));
        // A region that comes back late makes no room for itself.
        let late = take(1, 4096);
        drop(take(9, 1 << 20));
        drop(late);
        assert_eq!((counts(0), counts(8)), (0, 2));
        drop(take(2, 4096));
        assert_eq!((counts(0), counts(8)), (2, 1));
        assert_eq!(pool.kept.get(), (1 << 20) + 2 * 4096);
    }

    #[test]
    fn memory_may_come_back_when_nobody_else_knows_the_pool() {
        let pool = Rc::new(Pool::default());
        let region = pool.take(1).unwrap();
        drop(pool);
        region.write(0, &[1]);
    }
}
