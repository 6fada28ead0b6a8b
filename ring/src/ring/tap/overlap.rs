// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! An index over the ranges of requests without a result: finds the request that another must wait for.
//!
//! A range is hashed by its first and its last granule, whose size suits the range, so it is in
//! one bucket or two. Ranges larger than any granule (discards) are in a list of their own. Buckets
//! have the newest request in front, so the first hit in a bucket is the latest one. Reads and
//! writes are kept apart, because a read looks for writes only.

use crate::ring::numbers::DiskTag;
use crate::ring::tap::table::{next, prev, Link, ListNode, TagEntry, TagList, LEVELS};

/// Granules of both sizes, as powers of two of sectors: 32 KiB and 2 MiB.
const GRANULES: [u32; LEVELS] = [6, 12];

/// The two kinds of ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RangeKind {
    Read,
    Write,
}

impl RangeKind {
    fn of(entry: &TagEntry) -> Self {
        if writes(entry.op) {
            RangeKind::Write
        } else {
            RangeKind::Read
        }
    }

    /// Returns the kinds of earlier requests that one of this kind must wait for.
    fn opposed(self) -> &'static [RangeKind] {
        match self {
            RangeKind::Read => &[RangeKind::Write],
            RangeKind::Write => &[RangeKind::Write, RangeKind::Read],
        }
    }
}

/// Returns true for an operation that changes the disk.
pub(super) fn writes(op: u8) -> bool {
    use crate::ring::tap::abi;
    !matches!(op, abi::OP_READ | abi::OP_FLUSH)
}

/// Returns true if one of the two must wait for the other.
fn conflict(one: &TagEntry, other: &TagEntry) -> bool {
    one.sector < other.end && other.sector < one.end && (writes(one.op) || writes(other.op))
}

/// Place of a range in the index.
enum Home {
    Level(usize),
    Wide,
}

#[derive(Clone, Copy, Debug)]
struct PerKind {
    /// Number of ranges of each level.
    held: [u16; LEVELS],
    wide: TagList,
}

/// The index.
#[derive(Clone, Debug)]
pub(super) struct Overlap {
    /// Number of low bits of a hash that are dropped to get the number of a bucket.
    shift: u32,
    kinds: [PerKind; 2],
}

impl Overlap {
    /// Returns an index whose buckets are in `entries` entries.
    pub(super) fn new(entries: usize) -> Self {
        let bits = entries.checked_ilog2().unwrap_or(0);
        Self {
            shift: u64::BITS.wrapping_sub(bits),
            kinds: [PerKind {
                held: [0; LEVELS],
                wide: TagList::EMPTY,
            }; 2],
        }
    }

    /// Returns the entry that has the bucket of a granule.
    fn bucket(&self, granule: u64) -> usize {
        let hash = granule.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // CAST: below the number of entries.
        hash.checked_shr(self.shift).unwrap_or(0) as usize
    }

    fn home(entry: &TagEntry) -> Option<Home> {
        let sectors = entry.end.checked_sub(entry.sector).filter(|n| *n > 0)?;
        let fits = |bits: &u32| sectors <= 1u64.wrapping_shl(*bits);
        Some(
            GRANULES
                .iter()
                .position(fits)
                .map_or(Home::Wide, Home::Level),
        )
    }

    /// Returns the buckets of the first and the last granule of a range.
    fn ends(&self, entry: &TagEntry, level: usize) -> (usize, usize) {
        let bits = GRANULES.get(level).copied().unwrap_or(0);
        let granules = granules(entry, bits);
        (self.bucket(*granules.start()), self.bucket(*granules.end()))
    }

    /// Adds the range of a request that is later than all in the index.
    pub(super) fn insert(&mut self, entries: &mut [TagEntry], tag: DiskTag) {
        self.change(entries, tag, 1, TagList::push_front);
    }

    /// Removes the range of a request that was added.
    pub(super) fn remove(&mut self, entries: &mut [TagEntry], tag: DiskTag) {
        self.change(entries, tag, u16::MAX, TagList::remove);
    }

    /// Applies a function to the lists to which a range belongs, and adds to their number.
    fn change(
        &mut self,
        entries: &mut [TagEntry],
        tag: DiskTag,
        by: u16,
        apply: impl Fn(&mut TagList, &mut [TagEntry], ListNode),
    ) {
        let Some(entry) = entries.get(tag.index()) else {
            return;
        };
        let (kind, home) = (RangeKind::of(entry) as usize, Self::home(entry));
        let Some(lists) = self.kinds.get_mut(kind) else {
            return;
        };
        let level = match home {
            None => return,
            Some(Home::Wide) => {
                return apply(&mut lists.wide, entries, ListNode::new(tag, Link::First));
            }
            Some(Home::Level(level)) => level,
        };
        if let Some(held) = lists.held.get_mut(level) {
            *held = held.wrapping_add(by);
        }
        let (first, last) = self.ends(entry, level);
        let mut at = |bucket: usize, link: Link| {
            let Some(mut list) = entries
                .get_mut(bucket)
                .and_then(|e| e.bucket(kind, level))
                .copied()
            else {
                return;
            };
            apply(&mut list, entries, ListNode::new(tag, link));
            if let Some(home) = entries.get_mut(bucket).and_then(|e| e.bucket(kind, level)) {
                *home = list;
            }
        };
        at(first, Link::First);
        if last != first {
            at(last, Link::Last);
        }
    }

    /// Returns the latest earlier request that this one must wait for; `steps` is the rest of the work that the caller
    /// allows. It may become 0 here, but the search is finished.
    pub(super) fn blocker(
        &self,
        entries: &[TagEntry],
        tag: DiskTag,
        steps: &mut u32,
    ) -> Option<DiskTag> {
        let entry = entries.get(tag.index())?;
        let mut search = Search {
            entries,
            entry,
            latest: None,
            steps,
        };
        if let Home::Wide = Self::home(entry)? {
            // A range of this kind overlaps most others, and there are few: examine all.
            search.walk(prev(entries, ListNode::new(tag, Link::Order)), prev);
            return search.latest.map(|(_, tag)| tag);
        }
        let opposed = RangeKind::of(entry).opposed();
        for kind in opposed {
            let wide = self.kinds.get(*kind as usize).map(|kind| kind.wide);
            search.walk(wide.and_then(|list| list.first()), next);
        }
        for (level, bits) in (0..LEVELS).zip(GRANULES) {
            if opposed.iter().all(|kind| self.held(*kind, level) == 0) {
                continue;
            }
            for granule in granules(entry, bits) {
                let Some(home) = entries.get(self.bucket(granule)) else {
                    continue;
                };
                for kind in opposed {
                    let levels = home.buckets.get(*kind as usize);
                    let list = levels.and_then(|levels| levels.get(level));
                    search.walk(list.and_then(TagList::first), next);
                }
            }
        }
        search.latest.map(|(_, tag)| tag)
    }

    fn held(&self, kind: RangeKind, level: usize) -> u16 {
        let kind = self.kinds.get(kind as usize);
        let held = kind.and_then(|kind| kind.held.get(level));
        held.copied().unwrap_or(0)
    }
}

/// A search for the latest of the requests that one must wait for.
struct Search<'a> {
    entries: &'a [TagEntry],
    entry: &'a TagEntry,
    latest: Option<(u64, DiskTag)>,
    steps: &'a mut u32,
}

impl Search<'_> {
    /// Searches a list in which later requests come first.
    fn walk(
        &mut self,
        from: Option<ListNode>,
        onward: impl Fn(&[TagEntry], ListNode) -> Option<ListNode>,
    ) {
        *self.steps = self.steps.saturating_sub(1);
        let mut at = from;
        while let Some(node) = at {
            *self.steps = self.steps.saturating_sub(1);
            let Some(other) = self.entries.get(node.tag().index()) else {
                return;
            };
            let earlier = other.sequence < self.entry.sequence;
            if earlier && conflict(self.entry, other) {
                let known = self.latest.map_or(0, |(sequence, _)| sequence);
                if self.latest.is_none() || other.sequence > known {
                    self.latest = Some((other.sequence, node.tag()));
                }
                return;
            }
            at = onward(self.entries, node);
        }
    }
}

impl TagEntry {
    /// Returns a bucket that this entry lends to the index.
    fn bucket(&mut self, kind: usize, level: usize) -> Option<&mut TagList> {
        self.buckets.get_mut(kind)?.get_mut(level)
    }
}

/// Returns the granules that a range touches; it must not be empty.
fn granules(entry: &TagEntry, bits: u32) -> core::ops::RangeInclusive<u64> {
    let last = entry.end.wrapping_sub(1);
    entry.sector.wrapping_shr(bits)..=last.wrapping_shr(bits)
}
