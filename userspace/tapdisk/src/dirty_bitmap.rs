// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dirty bitmap of the disk, in memory that survives this process: a bit for each unit of the disk.
//!
//! A bit is set before the write of its unit, so even if this process dies, a unit without a bit has not changed. Most
//! writes find their bits set, and only read the bitmap.

use crate::bitmap::Bitmap;
use control::{Code, Failure};
use diskio::Errno;
use rustix::fs::fstat;
use std::cell::{Ref, RefCell};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

const UNREAD: &str = "cannot read the dirty bitmap";
/// Bytes of the largest map that is taken.
const LARGEST: u64 = 64 << 20;

/// Dirty bitmap, in memory that survives the process.
#[derive(Debug)]
pub(crate) struct DirtyBitmap {
    memory: File,
    /// Copy of the memory. A write behind its end needs no bit, because the disk was smaller when the bitmap was
    /// created.
    bits: RefCell<Bitmap>,
}

impl DirtyBitmap {
    /// Continues a bitmap of an earlier process. `unit` is in bytes.
    ///
    /// # Errors
    /// The memory cannot be read or is too large, or `unit` is no multiple of 512.
    pub(crate) fn new(memory: OwnedFd, unit: u64) -> Result<Self, Failure> {
        if unit == 0 || unit % 512 != 0 {
            let why =
                format!("dirty bitmap with units of {unit} bytes: they must be a multiple of 512");
            return Err(Failure::invalid(why));
        }
        let size = fstat(&memory).map_err(|error| Failure::system(UNREAD, &error.into()))?;
        let size = size.st_size;
        let size = u64::try_from(size).unwrap_or(u64::MAX);
        if size > LARGEST {
            return Err(Failure::new(
                Code::Invalid,
                format!("dirty bitmap of {size} bytes: {LARGEST} are the most"),
            ));
        }
        // CAST: it is not larger than that.
        let mut bits = vec![0; size as usize];
        let memory = File::from(memory);
        let read = memory.read_exact_at(&mut bits, 0);
        read.map_err(|error| Failure::system(UNREAD, &error))?;
        Ok(Self {
            memory,
            bits: RefCell::new(Bitmap::new(bits, unit)),
        })
    }

    /// Sets the bits of a range before the disk is changed there.
    pub(crate) fn add(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let mut bits = self.bits.borrow_mut();
        if let Some((from, new)) = bits.with(offset, len) {
            // CAST: it is a place in the map.
            let written = self.memory.write_all_at(&new, from as u64);
            written.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
            bits.set(from, &new);
        }
        Ok(())
    }

    /// Returns the bitmap.
    pub(crate) fn bits(&self) -> Ref<'_, Bitmap> {
        self.bits.borrow()
    }
}

#[cfg(test)]
mod tests {
    use super::DirtyBitmap;
    use proptest::prelude::*;
    use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
    use rustix::io::pread;
    use std::os::fd::OwnedFd;

    const UNIT: u64 = 4096;

    fn memory(bytes: u64) -> OwnedFd {
        let memory = memfd_create("notes", MemfdFlags::CLOEXEC).expect("memory");
        ftruncate(&memory, bytes).expect("truncate");
        memory
    }

    fn notes(memory: &OwnedFd) -> DirtyBitmap {
        DirtyBitmap::new(memory.try_clone().expect("dup"), UNIT).expect("notes")
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for unit in [0, 1, 4097] {
            assert!(DirtyBitmap::new(memory(8), unit).is_err(), "{unit}");
        }
        assert!(DirtyBitmap::new(memory(super::LARGEST + 1), UNIT).is_err());
    }

    proptest! {
        /// After any writes and deaths, exactly the touched units have their bits set, if the memory has a bit for
        /// them.
        #[test]
        fn each_unit_that_is_touched_has_its_bit(
            writes in prop::collection::vec((0u64..200 * UNIT, 0u64..9 * UNIT, any::<bool>()), 0..40),
            bytes in 0u64..24,
        ) {
            let memory = memory(bytes);
            let mut now = notes(&memory);
            let mut wanted = vec![0u8; usize::try_from(bytes).expect("small")];
            for (offset, len, dies) in writes {
                if dies {
                    now = notes(&memory);
                }
                now.add(offset, len).expect("a note");
                for at in offset..offset + len {
                    let unit = at / UNIT;
                    if let Some(byte) = wanted.get_mut(usize::try_from(unit / 8).expect("small")) {
                        *byte |= 1 << (unit % 8);
                    }
                }
                let mut found = vec![0; wanted.len()];
                let count = pread(&memory, &mut found, 0).expect("read");
                prop_assert_eq!(count, wanted.len());
                prop_assert_eq!(&found, &wanted);
            }
        }
    }
}
