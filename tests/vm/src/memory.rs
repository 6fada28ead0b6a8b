// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Memory of a guest's programs.

/// Requests are aligned to this in memory.
const ALIGN: usize = 4096;

/// Bytes at a place in memory from which a device can read.
pub(crate) struct Aligned {
    bytes: Vec<u8>,
    skip: usize,
}

impl Aligned {
    /// Makes `len` bytes of zeroes.
    pub(crate) fn new(len: usize) -> Aligned {
        let bytes = vec![0; len + ALIGN];
        let skip = bytes.as_ptr().align_offset(ALIGN);
        Aligned { bytes, skip }
    }

    /// Returns the first `len` bytes.
    pub(crate) fn get(&mut self, len: usize) -> &mut [u8] {
        &mut self.bytes[self.skip..self.skip + len]
    }
}
