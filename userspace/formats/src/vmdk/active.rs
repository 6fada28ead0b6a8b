// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk that is open: its parts, one behind the other, and the number that changes with its content.

use super::grains::ExtentGrains;
use crate::clusters::Clusters;
use crate::Storage;
use diskio::{Bytes, Errno, Gate};
use drivers::{Content, Extent};
use std::cell::Cell;
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

/// A disk that is open.
#[derive(Debug)]
pub(super) struct Active<S> {
    pub(super) parts: Vec<ExtentPart<S>>,
    pub(super) size: u64,
    pub(super) cid: Mark,
}

/// A part of the disk, from a byte on.
#[derive(Debug)]
pub(super) struct ExtentPart<S> {
    pub(super) begin: u64,
    pub(super) len: u64,
    pub(super) body: PartContent<S>,
}

/// Content of a part.
#[derive(Debug)]
pub(super) enum PartContent<S> {
    Flat(Rc<S>, u64),
    Sparse(Box<Clusters<S, ExtentGrains>>),
    Zero,
}

/// The number that changes when the content does.
#[derive(Debug, Default)]
pub(super) struct Mark {
    /// Offset and number of the digits of the `CID`, and its old value.
    at: Option<(u64, usize, u32)>,
    is_changed: Cell<bool>,
    gate: Gate,
}

/// A piece of a range in one part of the disk: the part, where in it, where in the range, how long.
pub(super) type PartPiece<'a, S> = (&'a ExtentPart<S>, u64, u64, u64);

impl Mark {
    /// Makes the mark of a descriptor whose digits are at this offset; without an offset the content changes silently.
    pub(super) fn new(at: Option<(u64, usize, u32)>) -> Self {
        Self {
            at,
            ..Self::default()
        }
    }

    /// The image shows that its content is another one than before, or cannot.
    pub(super) fn is_said(&self) -> bool {
        self.at.is_none() || self.is_changed.get()
    }
}

impl<S: Storage> Active<S> {
    /// The pieces of a range.
    pub(super) fn pieces(&self, offset: u64, len: u64) -> Result<Vec<PartPiece<'_, S>>, Errno> {
        let end = offset.checked_add(len).filter(|end| *end <= self.size);
        let end = end.ok_or(Errno::INVAL)?;
        let mut found = Vec::new();
        let mut at = offset;
        let first = self
            .parts
            .partition_point(|part| part.begin + part.len <= offset);
        for part in &self.parts[first.min(self.parts.len())..] {
            if at >= end {
                break;
            }
            let count = (part.begin + part.len - at).min(end - at);
            if count > 0 {
                found.push((part, at - part.begin, at - offset, count));
            }
            at += count;
        }
        match at == end {
            true => Ok(found),
            false => Err(Errno::INVAL),
        }
    }

    /// Says that the content changes, before it does.
    pub(super) async fn mark(&self, image: &S) -> Result<(), Errno> {
        let Some((at, digits, old)) = self.cid.at.filter(|_| !self.cid.is_changed.get()) else {
            return Ok(());
        };
        let _pass = self.cid.gate.alone().await;
        if self.cid.is_changed.get() {
            return Ok(());
        }
        let time = SystemTime::now().duration_since(UNIX_EPOCH);
        // CAST: any bits of it will do.
        let time = time.map_or(0, |time| time.as_nanos() as u32);
        // As many digits as there are: what follows them is the rest of the text.
        let most = 0x7fff_ffff_u32.min(u32::MAX >> (32 - 4 * digits.clamp(1, 8)));
        let mut cid = (old.wrapping_mul(0x9e37_79b9) ^ time) & most;
        if cid == old {
            cid = cid.wrapping_add(1) & most;
        }
        let text = format!("{cid:0digits$x}");
        image.write(at, Bytes::copied(text.as_bytes())?).await?;
        self.cid.is_changed.set(true);
        Ok(())
    }

    /// Returns the content at the beginning of a range: with the backing images if `whole` is set, else of this image
    /// alone.
    pub(super) async fn runs(
        &self,
        offset: u64,
        len: u64,
        whole: bool,
    ) -> Result<Vec<Extent>, Errno> {
        let pieces = self.pieces(offset, len)?;
        let (part, within, _, len) = pieces.first().ok_or(Errno::INVAL)?;
        match &part.body {
            PartContent::Flat(file, first) => {
                let (len, is_data) = file.part(first + within, *len).await?;
                let content = match is_data {
                    true => Content::Data,
                    false => Content::Hole,
                };
                Ok(vec![Extent { len, content }])
            }
            PartContent::Sparse(clusters) => clusters.extents(*within, *len, whole).await,
            PartContent::Zero => Ok(vec![Extent {
                len: *len,
                content: Content::Hole,
            }]),
        }
    }
}
