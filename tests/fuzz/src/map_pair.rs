// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The map of a tap disk and its model, which keeps the mapping of each sector: both get the same steps, and both are
//! compared.

use std::collections::BTreeMap;
use std::ops::Range;

use ring::tap::abi::MAX_BACKINGS;
use ring::tap::extent::{BackingNumber, DataExtent, ExtentAccess, Sectors, Source};
use ring::tap::map::recent::REMEMBERED;
use ring::tap::map::tree::{Leaf, LeafSlot, LEAF};
use ring::tap::map::{ExtentMap, MapBacking, Miss, RefusedExtent, MAX_REPLACED};

/// Sectors of the largest disk of these tests.
pub const LARGEST: u64 = 640;

/// A step of a map.
#[derive(Clone, Copy, Debug)]
pub enum MapStep {
    /// The process maps an extent, with a generation that is this many changes old.
    Set(DataExtent, u32),
    /// The process recalls a range, or has a request that may move any of it.
    Recall(Sectors),
    /// The process has a write of a range.
    Written(Sectors),
    /// Another process begins.
    Clear,
    /// The disk gets a backing.
    Add(u16, MapBacking),
    /// The disk loses a backing.
    Remove(u16),
    /// The disk has another size.
    Resize(u64),
    /// The map gets memory for this number of leaves.
    Grow(usize),
    /// A queue looks up a range for an access, in at most this number of pieces.
    Translate(Sectors, ExtentAccess, usize),
}

/// Number of times that each event happened.
pub type MapEvents = BTreeMap<String, u64>;

/// Mapping of a sector.
type Cell = (u64, Source, ExtentAccess);

#[derive(Clone, Debug)]
struct Model {
    cells: Vec<Option<Cell>>,
    sectors: u64,
    writable: bool,
    backings: Vec<Option<MapBacking>>,
    /// The changes, the first one of generation 1.
    changes: Vec<Range<u64>>,
}

fn range(sectors: &Sectors) -> Range<u64> {
    sectors.start()..sectors.end()
}

/// Returns a range; it is not empty.
pub fn sectors(range: Range<u64>) -> Sectors {
    Sectors::between(range.start, range.end).expect("it is not empty")
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start.max(other.start) < one.end.min(other.end)
}

impl Model {
    fn cell(&self, sector: u64) -> Option<Cell> {
        *self.cells.get(usize::try_from(sector).ok()?)?
    }

    /// Returns the part of a range for which there are cells.
    fn cells_of(&self, range: &Range<u64>) -> Range<usize> {
        let place = |sector: u64| sector.min(LARGEST) as usize;
        place(range.start)..place(range.end)
    }

    /// Returns the longest runs of sectors with adjacent mappings.
    fn runs(&self) -> Vec<DataExtent> {
        let mut runs: Vec<DataExtent> = Vec::new();
        for sector in 0..LARGEST {
            let Some((place, source, access)) = self.cell(sector) else {
                continue;
            };
            if let Some(last) = runs.last_mut() {
                let on = match source {
                    Source::Zeroes => 0,
                    Source::Backing(_) => last.place + last.range.count(),
                };
                let goes_on = (on, sector) == (place, last.range.end());
                if goes_on && (last.source, last.access) == (source, access) {
                    last.range = sectors(last.range.start()..sector + 1);
                    continue;
                }
            }
            runs.push(DataExtent {
                range: sectors(sector..sector + 1),
                place,
                source,
                access,
            });
        }
        runs
    }

    fn backing(&self, source: Source) -> Option<MapBacking> {
        match source {
            Source::Zeroes => None,
            Source::Backing(number) => self.backings[number.index()],
        }
    }

    /// Returns the reasons to refuse an extent.
    fn defects(&self, extent: &DataExtent, known: Option<usize>) -> Vec<RefusedExtent> {
        let range = range(&extent.range);
        let runs = self.runs();
        let old = |run: &&DataExtent| {
            let first = run.range.start().max(range.start);
            let is_part = || run.access == extent.access && said(run, first) == said(extent, first);
            overlap(&range, &self::range(&run.range)) && !is_part()
        };
        let writes = extent.access == ExtentAccess::ReadWrite;
        let elsewhere = |sector: u64| {
            let meant = said(extent, sector);
            let cell = self.cell(sector);
            cell.is_some_and(|cell| cell.2 == ExtentAccess::ReadWrite && (cell.0, cell.1) != meant)
        };
        let oldest = self.changes.len().saturating_sub(REMEMBERED);
        let stale = known.is_none_or(|known| {
            known < oldest || self.changes[known..].iter().any(|c| overlap(c, &range))
        });
        let mut defects = vec![
            (stale, RefusedExtent::Stale),
            (range.end > self.sectors, RefusedExtent::OutsideDisk),
            (
                runs.iter().filter(old).count() > MAX_REPLACED,
                RefusedExtent::Crowded,
            ),
            (
                range.clone().take(LARGEST as usize).any(elsewhere),
                RefusedExtent::Writable,
            ),
            (writes && !self.writable, RefusedExtent::ReadOnly),
        ];
        match (extent.source, self.backing(extent.source)) {
            (Source::Zeroes, _) => defects.push((writes, RefusedExtent::ReadOnly)),
            (_, None) => defects.push((true, RefusedExtent::NoBacking)),
            (_, Some(backing)) => {
                let end = u128::from(extent.place) + u128::from(extent.range.count());
                let block = u64::from(backing.block);
                let unlike = extent.place % block != range.start % block;
                defects.push((end > backing.sectors.into(), RefusedExtent::OutsideBacking));
                defects.push((unlike, RefusedExtent::Unaligned));
                defects.push((writes && !backing.writable, RefusedExtent::ReadOnly));
            }
        }
        defects.iter().filter(|d| d.0).map(|d| d.1).collect()
    }

    fn forget(&mut self, range: &Range<u64>) {
        let cells = self.cells_of(range);
        self.cells[cells].fill(None);
    }

    /// Forgets a range if one of its extents is read-only, or if there are too many of them.
    fn written(&mut self, range: &Range<u64>) {
        let runs = self.runs();
        let hit: Vec<_> = runs
            .iter()
            .filter(|run| overlap(range, &self::range(&run.range)))
            .collect();
        if hit.len() > MAX_REPLACED || hit.iter().any(|run| run.access == ExtentAccess::Read) {
            self.forget(range);
        }
    }

    fn translate(
        &self,
        range: &Range<u64>,
        access: ExtentAccess,
        room: usize,
    ) -> Result<Vec<DataExtent>, Miss> {
        let mut pieces: Vec<DataExtent> = Vec::new();
        let runs = self.runs();
        let mut at = range.start;
        while at < range.end {
            let run = runs
                .iter()
                .find(|run| self::range(&run.range).contains(&at));
            match run {
                _ if pieces.len() == room => return Err(Miss::Pieces),
                None if at == range.start => return Err(Miss::Unmapped),
                None => return Err(Miss::Partial),
                Some(run) => {
                    let end = run.range.end().min(range.end);
                    let block = self.backing(run.source).map_or(1, |b| u64::from(b.block));
                    if access == ExtentAccess::ReadWrite && run.access == ExtentAccess::Read {
                        return Err(Miss::ReadOnly);
                    }
                    if at % block != 0 || end % block != 0 {
                        return Err(Miss::Unaligned);
                    }
                    let (place, source) = said(run, at);
                    let range = sectors(at..end);
                    pieces.push(DataExtent {
                        range,
                        place,
                        source,
                        ..*run
                    });
                    at = end;
                }
            }
        }
        Ok(pieces)
    }
}

/// Returns the place of a sector according to an extent.
fn said(extent: &DataExtent, sector: u64) -> (u64, Source) {
    let place = match extent.source {
        Source::Zeroes => 0,
        Source::Backing(_) => extent.place.wrapping_add(sector - extent.range.start()),
    };
    (place, extent.source)
}

/// A map and its model.
#[derive(Clone, Debug)]
pub struct Pair {
    map: ExtentMap<Vec<LeafSlot>, Vec<Leaf>>,
    model: Model,
    leaves: usize,
    seen: MapEvents,
}

impl Pair {
    /// Returns a disk without backings, whose map has this number of leaves.
    pub fn new(leaves: usize, sectors: u64, writable: bool) -> Self {
        let memory = (vec![LeafSlot::FREE; leaves], vec![Leaf::FREE; leaves]);
        Self {
            map: ExtentMap::new(memory.0, memory.1, sectors, writable),
            model: Model {
                cells: vec![None; LARGEST as usize],
                sectors,
                writable,
                backings: vec![None; MAX_BACKINGS.into()],
                changes: Vec::new(),
            },
            leaves,
            seen: MapEvents::new(),
        }
    }

    /// Returns the number of times that each event happened.
    pub fn seen(&self) -> &MapEvents {
        &self.seen
    }

    /// Returns the range from one of the extents to one behind it, if there are any.
    pub fn known(&self, first: usize, more: usize) -> Option<Sectors> {
        let all: Vec<&DataExtent> = self.map.extents().collect();
        let from = first % all.len().max(1);
        let last = all.get(from + more).or(all.last())?;
        Some(sectors(all[from].range.start()..last.range.end()))
    }

    fn saw(&mut self, what: String) {
        *self.seen.entry(what).or_default() += 1;
    }

    /// Applies a step to both.
    pub fn apply(&mut self, step: MapStep) {
        let before = self.map.evicted();
        match step {
            MapStep::Set(extent, ago) => self.set(&extent, ago),
            MapStep::Recall(range) => {
                self.map.recall(&range);
                self.change(self::range(&range));
            }
            MapStep::Written(range) => {
                self.map.written(&range);
                self.model.changes.push(self::range(&range));
                self.model.written(&self::range(&range));
            }
            MapStep::Clear => {
                self.map.clear();
                self.change(0..u64::MAX);
            }
            MapStep::Add(number, backing) => {
                let Some(number) = BackingNumber::new(number) else {
                    return assert!(number >= MAX_BACKINGS);
                };
                let place = &mut self.model.backings[number.index()];
                assert_eq!(self.map.add_backing(number, backing), place.is_none());
                place.get_or_insert(backing);
            }
            MapStep::Remove(number) => {
                let Some(number) = BackingNumber::new(number) else {
                    return;
                };
                let had = self.model.backings[number.index()].take().is_some();
                assert_eq!(self.map.remove_backing(number), had);
                if had {
                    self.change(0..u64::MAX);
                }
            }
            MapStep::Resize(sectors) => {
                self.map.resize(sectors);
                self.model.sectors = sectors;
                self.change(sectors..u64::MAX);
            }
            MapStep::Grow(leaves) => {
                let memory = (vec![LeafSlot::FREE; leaves], vec![Leaf::FREE; leaves]);
                let all: Vec<DataExtent> = self.map.extents().copied().collect();
                let rest = self.map.grow(memory.0, memory.1);
                let (less, more) = (leaves.min(self.leaves), leaves.max(self.leaves));
                assert_eq!((rest.0.len(), rest.1.len()), (less, less));
                assert!(self.map.extents().eq(&all));
                self.leaves = more;
                self.saw("memory".into());
            }
            MapStep::Translate(range, access, room) => self.translate(&range, access, room),
        }
        self.compare(self.map.evicted() - before);
    }

    fn change(&mut self, range: Range<u64>) {
        self.model.forget(&range);
        self.model.changes.push(range);
    }

    fn set(&mut self, extent: &DataExtent, ago: u32) {
        let now = self.map.generation();
        let known = self.model.changes.len().checked_sub(ago as usize);
        let got = self.map.set(extent, now.wrapping_sub(ago));
        let defects = self.model.defects(extent, known);
        match got {
            Ok(()) => {
                assert_eq!(defects, [], "took {extent:?}");
                for sector in range(&extent.range) {
                    let (place, source) = said(extent, sector);
                    self.model.cells[sector as usize] = Some((place, source, extent.access));
                }
            }
            Err(why) => assert!(
                defects.contains(&why),
                "{why:?} refuses {extent:?}: {defects:?}"
            ),
        }
        self.saw(format!("{got:?}"));
    }

    fn translate(&mut self, range: &Sectors, access: ExtentAccess, room: usize) {
        let mut pieces = Vec::new();
        let each = |piece: &DataExtent| pieces.push(*piece);
        let got = self.map.translate(range, access, room, each);
        let got = got.map(|()| pieces);
        let expected = self.model.translate(&self::range(range), access, room);
        assert_eq!(got, expected, "{range:?}, {access:?}");
        self.saw(match got {
            Ok(pieces) => format!("hit of {}", if pieces.len() > 1 { "some" } else { "one" }),
            Err(why) => format!("miss {why:?}"),
        });
    }

    /// Checks that both have equal mappings; the map has counted those that it forgot for lack of room.
    fn compare(&mut self, evicted: u64) {
        let (mine, theirs): (Vec<DataExtent>, Vec<DataExtent>) =
            (self.map.extents().copied().collect(), self.model.runs());
        assert!(mine.len() <= self.leaves * LEAF);
        assert_eq!(self.map.generation() as usize, self.model.changes.len());
        if evicted == 0 {
            return assert_eq!(mine, theirs);
        }
        self.saw("evicted".into());
        assert_eq!(mine.len() as u64 + evicted, theirs.len() as u64);
        for lost in theirs.iter().filter(|run| !mine.contains(run)) {
            self.model.forget(&range(&lost.range));
        }
        assert_eq!(mine, self.model.runs(), "not only forgotten");
    }
}
