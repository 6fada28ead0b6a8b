// SPDX-License-Identifier: GPL-2.0-only

//! Pages of this module that a process maps, and pins for its own I/O.
//!
//! Facts about the kernel: a mapping and a pin each hold references to the pages (mm/memory.c, mm/gup.c), so a page
//! that is pinned when its owner frees it lives until the pin is gone. Unmapped pages cannot be pinned any more.
//!
//! Wraps `vm_insert_pages` and `page_count` (include/linux/mm.h, include/linux/page_ref.h).

use super::chardev::NewMapping;
use crate::linux::memory::pages::Pages;
use crate::linux::sys;
use kernel::bindings;
use kernel::error::to_result;
use kernel::page::PAGE_SIZE;
use kernel::prelude::*;
use zerocopy::IntoBytes;

impl Pages {
    /// Returns the bytes of all pages.
    pub(crate) fn bytes_of_memory(&self) -> usize {
        self.raw().len().wrapping_mul(PAGE_SIZE)
    }

    /// Maps all pages into a process; the mapping must have their length. May sleep.
    ///
    /// The pages are ordinary memory to the process, which may use them for direct I/O. The mapping can neither be
    /// grown nor executed, `fork` does not pass it on, and a core dump leaves it out, because it holds data of a guest.
    pub(crate) fn map(&self, mapping: &NewMapping<'_>, writable: bool) -> Result {
        if mapping.len() != self.bytes_of_memory() || !mapping.is_shared() {
            return Err(EINVAL);
        }
        let area = mapping.area();
        if !writable {
            area.try_clear_maywrite().map_err(|_| EACCES)?;
        }
        area.try_clear_mayexec().map_err(|_| EACCES)?;
        area.set_dontexpand();
        area.set_dontcopy();
        area.set_dontdump();
        area.set_mixedmap();
        let mut left = self.raw().len();
        // SAFETY: The area is being set up and spans exactly these pages, which are valid and
        // not part of larger ones. The kernel takes a reference to each and only reads the array.
        to_result(unsafe {
            bindings::vm_insert_pages(
                area.as_ptr(),
                area.start(),
                self.raw().as_ptr().cast_mut(),
                &mut left,
            )
        })
    }

    /// Returns the first page from `first` on with another reference than this module's: a mapping, or I/O that is
    /// under way.
    pub(crate) fn first_referenced(&self, first: u16) -> Option<u16> {
        let pages = self.raw().iter().zip(0..self.len()).skip(first.into());
        pages.into_iter().find_map(|(page, index)| {
            // SAFETY: The page is valid.
            let count = unsafe { sys::xbr_page_count(*page) };
            (count != 1).then_some(index)
        })
    }

    /// Returns the word at a byte offset, if that is a multiple of its size and inside the pages. Another thread may be
    /// writing the word.
    pub(crate) fn read_word(&self, offset: usize) -> Option<u32> {
        const WORD: usize = size_of::<u32>();
        let page = self.raw().get(offset / PAGE_SIZE)?;
        if offset % WORD != 0 {
            return None;
        }
        // SAFETY: The page is valid and, on a 64-bit kernel, always mapped.
        let start = unsafe { sys::xbr_page_address(*page) }.cast::<u32>();
        // SAFETY: The word lies inside the page, and is aligned. No reference to it exists. The kernel's memory model
        // allows a volatile read beside other accesses of that word (READ_ONCE).
        Some(unsafe { start.add(offset % PAGE_SIZE / WORD).read_volatile() })
    }

    /// Writes a value at a byte offset; `false` if it does not lie inside one page, in whole words.
    ///
    /// The process may be reading, and another thread writing. Both see a mixture of old and new whole words until they
    /// learn that the value is complete.
    pub(crate) fn write<T: IntoBytes + zerocopy::Immutable>(
        &self,
        offset: usize,
        value: &T,
    ) -> bool {
        const WORD: usize = size_of::<u32>();
        let bytes = value.as_bytes();
        let within = offset & (PAGE_SIZE - 1);
        let fits = within
            .checked_add(bytes.len())
            .is_some_and(|end| end <= PAGE_SIZE)
            && within % WORD == 0
            && bytes.len() % WORD == 0;
        let Some(page) = self.raw().get(offset / PAGE_SIZE).filter(|_| fits) else {
            return false;
        };
        // SAFETY: The page is valid and, on a 64-bit kernel, always mapped.
        let start = unsafe { sys::xbr_page_address(*page) }.cast::<u32>();
        // SAFETY: `within` lies inside the page.
        let target = unsafe { start.add(within / WORD) };
        for (index, word) in bytes.chunks_exact(WORD).enumerate() {
            let Ok(word) = <[u8; WORD]>::try_from(word) else {
                return false;
            };
            // SAFETY: The word lies inside the page, as was checked, and is aligned. No reference to it exists. The
            // kernel's memory model allows a volatile write of a word beside other accesses of that word (WRITE_ONCE).
            unsafe {
                target.add(index).write_volatile(u32::from_ne_bytes(word));
            }
        }
        true
    }
}
