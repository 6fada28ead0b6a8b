// SPDX-License-Identifier: GPL-2.0-only

//! Free blocks that are ready at once: taking one neither sleeps nor allocates.

use super::page_blocks::PageBlock;
use kernel::new_spinlock;
use kernel::prelude::*;
use kernel::sync::SpinLock;

/// A list of blocks.
struct BlockList {
    head: Option<KBox<PageBlock>>,
    count: u32,
}

impl BlockList {
    fn pop(&mut self) -> Option<KBox<PageBlock>> {
        let mut block = self.head.take()?;
        self.head = block.next.take();
        self.count = self.count.wrapping_sub(1);
        Some(block)
    }
}

impl Drop for BlockList {
    fn drop(&mut self) {
        // One by one, because each block owns the next one, and dropping the first would drop the others recursively.
        while self.pop().is_some() {}
    }
}

/// Free blocks.
#[pin_data]
pub(crate) struct Pool {
    #[pin]
    free: SpinLock<BlockList>,
}

impl Pool {
    /// Makes an empty pool.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            free <- new_spinlock!(BlockList { head: None, count: 0 }, "Pool::free"),
        })
    }

    /// Returns the number of free blocks.
    pub(crate) fn len(&self) -> u32 {
        self.free.lock().count
    }

    /// Takes a block; neither sleeps nor allocates.
    pub(crate) fn take(&self) -> Option<KBox<PageBlock>> {
        self.free.lock().pop()
    }

    /// Adds a block, or frees it if there are `most` already. Does not sleep.
    pub(crate) fn give(&self, mut block: KBox<PageBlock>, most: u32) {
        let mut free = self.free.lock();
        if free.count >= most {
            drop(free);
            drop(block);
            return;
        }
        block.next = free.head.take();
        free.head = Some(block);
        free.count = free.count.wrapping_add(1);
    }
}
