// SPDX-License-Identifier: GPL-2.0-only

//! The memory of a disk: the arena with the data, and the descriptor area.
//!
//! All of it is allocated when the disk is made, and belongs to this disk for as long as the disk exists, so a process
//! finds only data of its own disk in the arena.

use crate::linux::char::chardev::NewMapping;
use crate::linux::memory::pages::Pages;
use crate::params;
use crate::ring::numbers::DiskTag;
use crate::ring::tap::abi::{Desc, TapSegment};
use crate::ring::tap::arena::{self, MAX_SEGMENTS};
use kernel::prelude::*;
use kernel::sync::Arc;

const PAGE: u32 = 4096;
const DESC_SIZE: u32 = size_of::<Desc>() as u32;
const SEGMENT_SIZE: u32 = size_of::<TapSegment>() as u32;

/// The memory of a disk.
pub(crate) struct DiskAreas {
    /// Data.
    arena: Arc<Pages>,
    /// Descriptors, then segments.
    descriptors: Pages,
    tags: u16,
    segments_offset: u32,
}

impl DiskAreas {
    /// Allocates the memory for an arena of at least `arena_kib` KiB, or of the usual size. May sleep.
    pub(crate) fn new(arena_kib: Option<u32>) -> Result<Self> {
        let pages = arena::pages(arena_kib, params::max_queues());
        // Most requests have more than one page; a queue that runs out of tags waits.
        let tags = (pages / 2).clamp(1, crate::ring::tap::abi::MAX_TAGS as u16);
        let whole = |bytes: u32| bytes.div_ceil(PAGE);
        let heads = whole(u32::from(tags).wrapping_mul(DESC_SIZE));
        let stride = u32::from(MAX_SEGMENTS).wrapping_mul(SEGMENT_SIZE);
        let tables = whole(u32::from(tags).wrapping_mul(stride));
        let total = u16::try_from(heads.wrapping_add(tables)).map_err(|_| EINVAL)?;
        Ok(Self {
            arena: super::shared(Pages::new(pages)?)?,
            descriptors: Pages::new(total)?,
            tags,
            segments_offset: heads.wrapping_mul(PAGE),
        })
    }

    /// Returns the number of tags; each tag is below it.
    pub(crate) fn tags(&self) -> u16 {
        self.tags
    }

    /// Returns the arena.
    pub(crate) fn arena(&self) -> &Arc<Pages> {
        &self.arena
    }

    /// Returns the number of pages of the arena.
    pub(crate) fn arena_pages(&self) -> u16 {
        self.arena.len()
    }

    /// Returns the number of bytes of the arena.
    pub(crate) fn arena_len(&self) -> u64 {
        self.arena.bytes_of_memory() as u64
    }

    /// Returns the number of bytes of the descriptor area.
    pub(crate) fn descriptors_len(&self) -> u64 {
        self.descriptors.bytes_of_memory() as u64
    }

    /// Returns the byte offset of the segment table in the descriptor area.
    pub(crate) fn segments_offset(&self) -> u64 {
        self.segments_offset.into()
    }

    /// Maps the arena into a process. May sleep.
    pub(crate) fn map_arena(&self, area: &NewMapping<'_>) -> Result {
        self.arena.map(area, true)
    }

    /// Maps the descriptor area into a process, which can only read it. May sleep.
    pub(crate) fn map_descriptors(&self, area: &NewMapping<'_>) -> Result {
        self.descriptors.map(area, false)
    }

    /// Writes the descriptor of a request.
    pub(crate) fn write_desc(&self, tag: DiskTag, desc: &Desc) {
        let offset = u32::from(tag.number()).wrapping_mul(DESC_SIZE);
        // The shadow has no tag beyond the area.
        let _written = self.descriptors.write(offset as usize, desc);
    }

    /// Writes the segments of a request, and joins those that are neighbours in the arena. Returns their number after
    /// that; `None` if there are too many.
    pub(crate) fn write_segments(
        &self,
        tag: DiskTag,
        pieces: impl Iterator<Item = TapSegment>,
    ) -> Option<u16> {
        let mut count: u16 = 0;
        let mut last: Option<TapSegment> = None;
        for piece in pieces {
            last = Some(match last {
                Some(before) if before.offset.wrapping_add(before.len) == piece.offset => {
                    TapSegment {
                        offset: before.offset,
                        len: before.len.wrapping_add(piece.len),
                    }
                }
                Some(before) => {
                    self.write_segment(tag, count, &before)?;
                    count = count.wrapping_add(1);
                    piece
                }
                None => piece,
            });
        }
        if let Some(last) = last {
            self.write_segment(tag, count, &last)?;
            count = count.wrapping_add(1);
        }
        Some(count)
    }

    /// Returns a segment of a request, as the queue stored it: the process can only read it.
    pub(crate) fn segment(&self, tag: DiskTag, index: u16) -> Option<TapSegment> {
        let offset = self.segment_offset(tag, index)?;
        Some(TapSegment {
            offset: self.descriptors.read_word(offset)?,
            len: self
                .descriptors
                .read_word(offset.checked_add(size_of::<u32>())?)?,
        })
    }

    fn write_segment(&self, tag: DiskTag, index: u16, segment: &TapSegment) -> Option<()> {
        let offset = self.segment_offset(tag, index)?;
        self.descriptors.write(offset, segment).then_some(())
    }

    /// Returns the byte offset of a segment in the descriptor area.
    fn segment_offset(&self, tag: DiskTag, index: u16) -> Option<usize> {
        if index >= MAX_SEGMENTS {
            return None;
        }
        let entry = u32::from(tag.number())
            .wrapping_mul(MAX_SEGMENTS.into())
            .wrapping_add(index.into());
        let offset = entry
            .wrapping_mul(SEGMENT_SIZE)
            .wrapping_add(self.segments_offset);
        Some(offset as usize)
    }
}
