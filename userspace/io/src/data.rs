// SPDX-License-Identifier: MIT OR Apache-2.0
//! The bytes of one I/O.

use crate::{Errno, Region};
use std::io;
use std::rc::Rc;

/// A range of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RegionPiece {
    pub(crate) at: usize,
    pub(crate) len: usize,
}

/// Most I/O has one piece, which needs no allocation.
#[derive(Clone, Debug)]
enum Pieces {
    One([RegionPiece; 1]),
    Many(Rc<[RegionPiece]>),
}

/// Pieces of a [`Region`], in the order of the disk. Copies refer to the same bytes.
///
/// # Invariants
///
/// Every piece is inside the region and not empty; `len` is the sum of their lengths, not 0.
#[derive(Clone, Debug)]
pub struct Data {
    region: Rc<Region>,
    pieces: Pieces,
    len: usize,
}

impl Data {
    /// The pieces `(offset, bytes)` of a region; pieces that follow each other become one. `None`
    /// if one of them is empty or outside, or if there are none.
    pub fn new(
        region: &Rc<Region>,
        pieces: impl IntoIterator<Item = (usize, usize)>,
    ) -> Option<Self> {
        let mut pieces = pieces.into_iter();
        let piece = |(at, len): (usize, usize)| {
            (len > 0 && region.holds(at, len)).then_some(RegionPiece { at, len })
        };
        let mut last = piece(pieces.next()?)?;
        let mut total = last.len;
        let mut many = Vec::new();
        for next in pieces {
            let next = piece(next)?;
            total = total.checked_add(next.len)?;
            if last.at + last.len == next.at {
                last.len += next.len;
            } else {
                many.push(last);
                last = next;
            }
        }
        let pieces = if many.is_empty() {
            Pieces::One([last])
        } else {
            many.push(last);
            Pieces::Many(many.into())
        };
        Some(Self {
            region: region.clone(),
            pieces,
            len: total,
        })
    }

    /// Returns fresh zeroed bytes, aligned to a page, for a driver's own I/O.
    ///
    /// # Panics
    ///
    /// If `len` is 0.
    pub fn zeroed(len: usize) -> Result<Self, Errno> {
        assert!(len > 0, "data has bytes");
        let region = Region::anonymous(len).map_err(|_: io::Error| Errno::NOMEM)?;
        Ok(Self {
            region: Rc::new(region),
            pieces: Pieces::One([RegionPiece { at: 0, len }]),
            len,
        })
    }

    /// Returns the first `len` bytes of a region, at least one.
    pub(crate) fn at_begin(region: Region, len: usize) -> Option<Self> {
        Self::new(&Rc::new(region), [(0, len)])
    }

    /// Fresh bytes with the content of `bytes`.
    ///
    /// # Panics
    ///
    /// If there are none.
    pub fn copied(bytes: &[u8]) -> Result<Self, Errno> {
        let data = Self::zeroed(bytes.len())?;
        data.write(0, bytes);
        Ok(data)
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// False: there is always a byte.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The region it is in.
    pub fn region(&self) -> &Rc<Region> {
        &self.region
    }

    pub(crate) fn pieces(&self) -> &[RegionPiece] {
        match &self.pieces {
            Pieces::One(piece) => piece,
            Pieces::Many(pieces) => pieces,
        }
    }

    /// Returns the addresses and lengths of its pieces, for the kernel.
    pub(crate) fn vectors(&self) -> impl Iterator<Item = libc::iovec> + '_ {
        self.pieces().iter().map(|piece| libc::iovec {
            iov_base: self.region.place(piece.at, piece.len).cast(),
            iov_len: piece.len,
        })
    }

    /// The `len` bytes from `from` on.
    ///
    /// # Panics
    ///
    /// If they are not inside, or if there are none.
    pub fn part(&self, from: usize, len: usize) -> Self {
        assert!(len > 0, "data has bytes");
        if from == 0 && len == self.len {
            return self.clone();
        }
        let parts = self.ranges(from, len);
        Self::new(&self.region, parts.map(|piece| (piece.at, piece.len)))
            .expect("parts of pieces are inside the region")
    }

    /// Copies bytes out, from `from` on.
    ///
    /// # Panics
    ///
    /// If they are not inside.
    pub fn read(&self, from: usize, mut to: &mut [u8]) {
        for piece in self.ranges(from, to.len()) {
            let (head, rest) = to.split_at_mut(piece.len);
            self.region.read(piece.at, head);
            to = rest;
        }
    }

    /// Copies bytes in, from `from` on.
    ///
    /// # Panics
    ///
    /// If they are not inside.
    pub fn write(&self, from: usize, mut bytes: &[u8]) {
        for piece in self.ranges(from, bytes.len()) {
            let (head, rest) = bytes.split_at(piece.len);
            self.region.write(piece.at, head);
            bytes = rest;
        }
    }

    /// Sets `len` bytes from `from` on to `byte`.
    ///
    /// # Panics
    ///
    /// If they are not inside.
    pub fn fill(&self, from: usize, len: usize, byte: u8) {
        for piece in self.ranges(from, len) {
            self.region.fill(piece.at, piece.len, byte);
        }
    }

    /// Copies all bytes to `to` from `at` on.
    ///
    /// # Panics
    ///
    /// If `to` is too short.
    pub fn copy_to(&self, to: &Self, mut at: usize) {
        assert!(
            at.checked_add(self.len).is_some_and(|end| end <= to.len),
            "{} bytes at {at} are not inside {}",
            self.len,
            to.len
        );
        for source in self.pieces() {
            let mut from = source.at;
            for target in to.ranges(at, source.len) {
                to.region.copy(target.at, &self.region, from, target.len);
                from += target.len;
            }
            at += source.len;
        }
    }

    /// All bytes as a vector.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.read(0, &mut bytes);
        bytes
    }

    /// Every piece begins at a multiple of `at` in memory, and has a multiple of `len` bytes.
    pub(crate) fn is_aligned(&self, at: usize, len: usize) -> bool {
        self.pieces()
            .iter()
            .all(|piece| piece.at % at == 0 && piece.len % len == 0)
    }

    /// The pieces of the `len` bytes from `from` on.
    fn ranges(&self, from: usize, len: usize) -> impl Iterator<Item = RegionPiece> + '_ {
        assert!(
            from.checked_add(len).is_some_and(|end| end <= self.len),
            "{len} bytes at {from} are not inside data of {}",
            self.len
        );
        let mut skip = from;
        let mut left = len;
        self.pieces().iter().filter_map(move |piece| {
            let skipped = skip.min(piece.len);
            skip -= skipped;
            let taken = left.min(piece.len - skipped);
            left -= taken;
            (taken > 0).then_some(RegionPiece {
                at: piece.at + skipped,
                len: taken,
            })
        })
    }
}
