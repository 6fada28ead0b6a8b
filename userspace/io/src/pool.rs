// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory for I/O that is used again: to map and unmap some for each transfer costs more than most
//! transfers.

use crate::Region;
use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;

/// Bytes of the smallest region.
const SMALLEST: usize = 4096;
/// Sizes: each is twice the one before, up to 2 MiB. What is larger is not kept.
const SIZES: usize = 10;
/// Bytes that are kept while nobody uses them.
const KEPT: usize = 2 << 20;

/// Regions that nobody uses, by size.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    free: RefCell<[Vec<Region>; SIZES]>,
    kept: Cell<usize>,
}

impl Pool {
    /// A region of at least `len` bytes, with any content, that comes back when it is dropped.
    pub(crate) fn take(self: &Rc<Self>, len: usize) -> io::Result<Region> {
        let Some(size) = size(len) else {
            return Region::anonymous(len);
        };
        let region = match self.free.borrow_mut()[size].pop() {
            Some(region) => {
                self.kept.set(self.kept.get() - region.len());
                region
            }
            None => Region::anonymous(SMALLEST << size)?,
        };
        Ok(region.of(self.clone()))
    }

    /// Keeps a region, if there is room.
    pub(crate) fn give(&self, region: Region) {
        let kept = self.kept.get() + region.len();
        // By its length: it may be larger than it was asked for where pages are.
        if let Some(size) = size(region.len()).filter(|_| kept <= KEPT) {
            self.kept.set(kept);
            self.free.borrow_mut()[size].push(region);
        }
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
        pool.take(1 << 20).unwrap().write((1 << 20) - 1, &[1]);
    }

    #[test]
    fn memory_may_come_back_when_nobody_else_knows_the_pool() {
        let pool = Rc::new(Pool::default());
        let region = pool.take(1).unwrap();
        drop(pool);
        region.write(0, &[1]);
    }
}
