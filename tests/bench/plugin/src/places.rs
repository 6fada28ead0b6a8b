// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Counters by address.

use std::collections::btree_map::{BTreeMap, Entry};

/// The bytes of the mark: `nop dword ptr [rax + rax + 0x6b72616d]`. No compiler makes it.
pub(crate) const MARK: [u8; 8] = [0x0f, 0x1f, 0x84, 0x00, b'm', b'a', b'r', b'k'];

/// Start of the hypervisor's own memory, and its end.
const XEN: u64 = 0xffff_82d0_0000_0000;
const AFTER_XEN: u64 = 0xffff_8300_0000_0000;
/// Start of a Linux kernel's text.
const KERNEL: u64 = 0xffff_ffff_8000_0000;
/// Start of its modules.
const MODULES: u64 = 0xffff_ffff_c000_0000;
/// End of user space.
const USER_END: u64 = 0x8000_0000_0000;
const PAGE: u64 = 4096;

/// Names of the counters that are not of a module.
pub(crate) const NAMES: [&str; 4] = ["xen", "kernel", "user", "other"];
/// Number of pages of modules with a counter of their own; the last one counts all pages beyond.
pub(crate) const PAGES: usize = 16384;
/// Number of counters that every run has.
pub(crate) const FIXED: usize = NAMES.len() + PAGES;
/// Number of blocks of kernels and their modules that can have a counter of their own, with `blocks=on`.
pub(crate) const BLOCKS: usize = 1 << 18;
/// Number of all counters.
pub(crate) const COUNTERS: usize = FIXED + BLOCKS;

/// The blocks of kernels and modules with a counter of their own, by start address.
#[derive(Debug, Default)]
pub(crate) struct CountedBlocks {
    counters: BTreeMap<u64, usize>,
}

impl CountedBlocks {
    /// Returns the counter of a block, or that of its page when there are too many blocks.
    pub(crate) fn counter(&mut self, address: u64) -> usize {
        let known = self.counters.len();
        match self.counters.entry(address) {
            Entry::Occupied(entry) => *entry.get(),
            Entry::Vacant(_) if known == BLOCKS => counter(address),
            Entry::Vacant(entry) => *entry.insert(FIXED + known),
        }
    }

    /// Returns all blocks and their counters.
    pub(crate) fn all(&self) -> impl Iterator<Item = (u64, usize)> + '_ {
        self.counters
            .iter()
            .map(|(address, counter)| (*address, *counter))
    }
}

/// Returns true for an address in a kernel's text or in a module.
pub(crate) fn in_kernel(address: u64) -> bool {
    address >= KERNEL
}

/// Returns the counter of an address.
pub(crate) fn counter(address: u64) -> usize {
    match address {
        XEN..AFTER_XEN => 0,
        MODULES.. => {
            let page = usize::try_from((address - MODULES) / PAGE).unwrap_or(PAGES);
            NAMES.len() + page.min(PAGES - 1)
        }
        KERNEL.. => 1,
        0..USER_END => 2,
        _ => 3,
    }
}

/// Returns the name of a counter in the file: that of a place, or the address of a page.
pub(crate) fn name(counter: usize) -> String {
    match counter.checked_sub(NAMES.len()) {
        None => NAMES[counter].to_owned(),
        Some(page) => format!("{:x}", MODULES + page as u64 * PAGE),
    }
}

#[cfg(test)]
mod tests {
    use super::{counter, in_kernel, name, CountedBlocks, BLOCKS, COUNTERS, FIXED, MARK};

    #[test]
    fn mark_is_one_long_nop() {
        assert_eq!(MARK[..3], [0x0f, 0x1f, 0x84]);
        assert_eq!(&MARK[4..], b"mark");
    }

    #[test]
    fn blocks_have_their_own_counters_until_there_are_too_many() {
        let mut blocks = CountedBlocks::default();
        let first = 0xffff_ffff_c000_0010;
        assert_eq!(blocks.counter(first), FIXED);
        assert_eq!(blocks.counter(first + 1), FIXED + 1);
        assert_eq!(blocks.counter(first), FIXED);
        for address in 0..BLOCKS as u64 {
            assert!(blocks.counter(first + address) < COUNTERS);
        }
        let beyond = first + BLOCKS as u64;
        assert_eq!(blocks.counter(beyond), counter(beyond));
        assert_eq!(blocks.all().count(), BLOCKS);
    }

    #[test]
    fn every_address_has_its_place() {
        assert!(in_kernel(0xffff_ffff_8100_0000) && !in_kernel(0xffff_82d0_4020_0000));
        for (address, place) in [
            (0, "user"),
            (0x7fff_ffff_ffff, "user"),
            (0x8000_0000_0000, "other"),
            (0xffff_82d0_4020_0000, "xen"),
            (0xffff_8300_0000_0000, "other"),
            (0xffff_ffff_8100_0000, "kernel"),
            (0xffff_ffff_c000_0fff, "ffffffffc0000000"),
            (0xffff_ffff_c000_1000, "ffffffffc0001000"),
            (u64::MAX, "ffffffffc3fff000"),
        ] {
            assert_eq!(name(counter(address)), place, "{address:x}");
            assert!(counter(address) < FIXED);
        }
    }
}
