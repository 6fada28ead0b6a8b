// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the disk is written is noted, in memory that outlives this process: a bit for each unit of the disk.
//!
//! A bit is set before what it stands for is written. So whatever becomes of this process, nothing has changed where no
//! bit is set. Most writes find their bits set, and cost nothing more than to look.

use crate::bits::Bits;
use control::{Code, Failure};
use diskio::Errno;
use rustix::fs::fstat;
use std::cell::{Ref, RefCell};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

const UNREAD: &str = "cannot read the notes of where the disk was written";
/// Bytes of the largest map that is taken.
const LARGEST: u64 = 64 << 20;

/// The notes.
#[derive(Debug)]
pub(crate) struct Notes {
    memory: File,
    /// What the memory has. What is behind its end needs no note: the disk was not so large.
    bits: RefCell<Bits>,
}

impl Notes {
    /// Goes on with what is noted already.
    ///
    /// # Errors
    /// It cannot be read, or makes no sense.
    pub(crate) fn new(memory: OwnedFd, unit: u64) -> Result<Self, Failure> {
        if unit == 0 || unit % 512 != 0 {
            let why = format!("notes of units of {unit} bytes: whole sectors of 512 are wanted");
            return Err(Failure::invalid(why));
        }
        let size = fstat(&memory).map_err(|error| Failure::system(UNREAD, &error.into()))?;
        let size = size.st_size;
        let size = u64::try_from(size).unwrap_or(u64::MAX);
        if size > LARGEST {
            return Err(Failure::new(
                Code::Invalid,
                format!("notes of {size} bytes: {LARGEST} are the most"),
            ));
        }
        // CAST: it is not larger than that.
        let mut bits = vec![0; size as usize];
        let memory = File::from(memory);
        let read = memory.read_exact_at(&mut bits, 0);
        read.map_err(|error| Failure::system(UNREAD, &error))?;
        Ok(Self {
            memory,
            bits: RefCell::new(Bits::new(bits, unit)),
        })
    }

    /// Notes that a range of the disk is about to be written.
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

    /// What is noted.
    pub(crate) fn bits(&self) -> Ref<'_, Bits> {
        self.bits.borrow()
    }
}

#[cfg(test)]
mod tests {
    use super::Notes;
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

    fn notes(memory: &OwnedFd) -> Notes {
        Notes::new(memory.try_clone().expect("dup"), UNIT).expect("notes")
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for unit in [0, 1, 4097] {
            assert!(Notes::new(memory(8), unit).is_err(), "{unit}");
        }
        assert!(Notes::new(memory(super::LARGEST + 1), UNIT).is_err());
    }

    proptest! {
        /// Of any writes, over deaths, exactly those units have a bit that were touched, and only where there is one.
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
