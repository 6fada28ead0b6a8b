// SPDX-License-Identifier: MIT OR Apache-2.0
//! The bytes that come, and which of them have.

use super::wire::Wire;
use diskio::{Data, Errno};
use std::rc::Rc;

/// Bytes that are taken from the connection at once.
const BUFFER: usize = 64 << 10;
/// Smallest read in bytes that bypasses the buffer. With fewer bytes, a read into the buffer also takes the next
/// answer.
const DIRECT: usize = 16 << 10;

/// Buffered input: one system call reads many answers.
#[derive(Debug)]
pub(super) struct Incoming {
    wire: Rc<Wire>,
    buffer: Vec<u8>,
    /// Range of the buffer that was not consumed yet.
    from: usize,
    to: usize,
}

impl Incoming {
    pub(super) fn new(wire: &Rc<Wire>) -> Self {
        Self {
            wire: wire.clone(),
            buffer: vec![0; BUFFER],
            from: 0,
            to: 0,
        }
    }

    /// All that has come was taken.
    pub(super) fn is_empty(&self) -> bool {
        self.from == self.to
    }

    /// Bytes that are there, up to `most`, one at least.
    async fn some(&mut self, most: usize) -> Result<&[u8], Errno> {
        if self.from == self.to {
            let count = self.wire.receive(&mut self.buffer).await?;
            (self.from, self.to) = (0, count);
        }
        let from = self.from;
        self.from = self.to.min(from.saturating_add(most));
        Ok(&self.buffer[from..self.from])
    }

    /// The next bytes.
    pub(super) async fn array<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        let mut bytes = [0; N];
        self.fill(&mut bytes).await?;
        Ok(bytes)
    }

    /// Returns the next `len` bytes; more than `most` are an error.
    pub(super) async fn vec(&mut self, len: u32, most: usize) -> Result<Vec<u8>, Errno> {
        let len = usize::try_from(len).map_err(|_| Errno::PROTO)?;
        if len > most {
            return Err(Errno::PROTO);
        }
        let mut bytes = vec![0; len];
        self.fill(&mut bytes).await?;
        Ok(bytes)
    }

    async fn fill(&mut self, mut bytes: &mut [u8]) -> Result<(), Errno> {
        while !bytes.is_empty() {
            let some = self.some(bytes.len()).await?;
            let (head, rest) = bytes.split_at_mut(some.len());
            head.copy_from_slice(some);
            bytes = rest;
        }
        Ok(())
    }

    /// Passes some of the next `len` bytes to the data that `to` has for them, if it has any. Returns how many.
    pub(super) async fn pass(
        &mut self,
        len: usize,
        to: impl Fn() -> Option<Data>,
    ) -> Result<usize, Errno> {
        if self.is_empty() && len >= DIRECT {
            if let Some(count) = self.wire.receive_to(&to).await? {
                return Ok(count);
            }
        }
        let bytes = self.some(len).await?;
        if let Some(data) = to() {
            data.write(0, bytes);
        }
        Ok(bytes.len())
    }
}

/// Ranges of a read that have arrived.
#[derive(Debug, Default)]
pub(super) struct ReadCover {
    /// Ranges that do not touch, in order.
    parts: Vec<(usize, usize)>,
}

/// Maximum number of separate ranges of an answer.
const MOST_PARTS: usize = 1024;

impl ReadCover {
    /// Adds a range; `None` if it is invalid because it has arrived before, or if there are too many ranges.
    pub(super) fn add(&mut self, from: usize, len: usize) -> Option<()> {
        let to = from.checked_add(len).filter(|_| len > 0)?;
        let at = self.parts.partition_point(|part| part.1 < from);
        let (mut from, mut to) = (from, to);
        let mut end = at;
        while let Some(&part) = self.parts.get(end).filter(|part| part.0 <= to) {
            let touches = part.1 == from || part.0 == to;
            if !touches {
                return None;
            }
            (from, to) = (from.min(part.0), to.max(part.1));
            end += 1;
        }
        self.parts.splice(at..end, [(from, to)]);
        (self.parts.len() <= MOST_PARTS).then_some(())
    }

    /// All of `len` bytes have come.
    pub(super) fn is_whole(&self, len: usize) -> bool {
        self.parts == [(0, len)]
    }
}

#[cfg(test)]
mod tests {
    use super::ReadCover;
    use proptest::prelude::*;

    proptest! {
        /// As a map of all bytes has it.
        #[test]
        fn what_has_come_is_what_was_added(ranges in prop::collection::vec((0..40_usize, 0..12_usize), 0..12)) {
            let mut cover = ReadCover::default();
            let mut bytes = [false; 64];
            for (from, len) in ranges {
                let range = &mut bytes[from..from + len];
                let is_new = len > 0 && range.iter().all(|byte| !byte);
                prop_assert_eq!(cover.add(from, len).is_some(), is_new);
                if !is_new {
                    break;
                }
                range.fill(true);
                let end = bytes.iter().rposition(|byte| *byte).unwrap() + 1;
                let whole = bytes[..end].iter().all(|byte| *byte);
                prop_assert_eq!(cover.is_whole(end), whole);
            }
        }
    }
}
