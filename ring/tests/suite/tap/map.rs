// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The map compared with its model in all short histories, and rule by rule.

use proptest::prelude::*;
use ring::tap::extent::{BackingNumber, DataExtent, ExtentAccess, Sectors, Source};
use ring::tap::map::recent::REMEMBERED;
use ring::tap::map::tree::{Leaf, LeafSlot, LEAF, MAX_LEAVES};
use ring::tap::map::{ExtentMap, MapBacking, Miss, RefusedExtent, MAX_REPLACED};

use crate::map_case;
use crate::map_pair::{sectors, MapStep, Pair};

type VecMap = ExtentMap<Vec<LeafSlot>, Vec<Leaf>>;

/// Sectors of the disks here.
const SIZE: u64 = 1 << 20;
const BACKING: MapBacking = MapBacking {
    sectors: 2 * SIZE,
    block: 1,
    writable: true,
};

fn number(number: u16) -> BackingNumber {
    BackingNumber::new(number).expect("a small one")
}

/// Returns the map of a disk with one backing.
fn with(leaves: usize, backing: MapBacking) -> VecMap {
    let memory = (vec![LeafSlot::FREE; leaves], vec![Leaf::FREE; leaves]);
    let mut map = ExtentMap::new(memory.0, memory.1, SIZE, true);
    assert!(map.add_backing(number(0), backing));
    map
}

fn extent(start: u64, count: u64, place: u64, access: ExtentAccess) -> DataExtent {
    DataExtent {
        range: Sectors::new(start, count).expect("it is not empty"),
        place,
        source: Source::Backing(number(0)),
        access,
    }
}

/// Returns a writable extent.
fn writable(start: u64, count: u64, place: u64) -> DataExtent {
    extent(start, count, place, ExtentAccess::ReadWrite)
}

fn readable(start: u64, count: u64, place: u64) -> DataExtent {
    extent(start, count, place, ExtentAccess::Read)
}

fn zeroes(start: u64, count: u64) -> DataExtent {
    DataExtent {
        source: Source::Zeroes,
        ..readable(start, count, 0)
    }
}

/// Sets an extent with the newest generation.
fn set(map: &mut VecMap, extent: DataExtent) -> Result<(), RefusedExtent> {
    map.set(&extent, map.generation())
}

/// Sets extents of one sector that are not adjacent in the backing.
fn comb(map: &mut VecMap, starts: impl Iterator<Item = u64>) {
    for start in starts {
        assert_eq!(set(map, writable(start, 1, start + start % 2)), Ok(()));
    }
}

fn all(map: &VecMap) -> Vec<DataExtent> {
    map.extents().copied().collect()
}

fn read(map: &mut VecMap, start: u64, count: u64) -> Result<Vec<DataExtent>, Miss> {
    let mut pieces = Vec::new();
    let range = sectors(start..start + count);
    map.translate(&range, ExtentAccess::Read, 4, |piece| pieces.push(*piece))?;
    Ok(pieces)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// The body of the fuzz target, for a small counterexample.
    #[test]
    fn the_map_does_what_the_model_does(bytes in prop::collection::vec(any::<u8>(), 40..300)) {
        map_case::run(&bytes).expect("long enough");
    }
}

/// All orders of steps on a disk of four sectors.
#[test]
fn every_short_history_does_what_the_model_does() {
    let ranges = || (0..4).flat_map(|start| (start + 1..5).map(move |end| (start, end - start)));
    let mut steps = Vec::new();
    for (start, count) in ranges() {
        for access in [ExtentAccess::Read, ExtentAccess::ReadWrite] {
            steps.push(MapStep::Set(extent(start, count, start, access), 0));
        }
        steps.push(MapStep::Set(readable(start, count, start + 8), 0));
        steps.push(MapStep::Set(zeroes(start, count), 1));
        steps.push(MapStep::Recall(sectors(start..start + count)));
        steps.push(MapStep::Written(sectors(start..start + count)));
        steps.push(MapStep::Translate(
            sectors(start..start + count),
            ExtentAccess::ReadWrite,
            2,
        ));
    }
    steps.extend([
        MapStep::Clear,
        MapStep::Resize(3),
        MapStep::Remove(0),
        MapStep::Add(0, BACKING),
    ]);
    let mut start = Pair::new(1, 4, true);
    start.apply(MapStep::Add(0, BACKING));
    let mut count = 0;
    explore(&start, &steps, 3, &mut count);
    assert!(count > 300_000, "{count}");
}

fn explore(pair: &Pair, steps: &[MapStep], depth: u32, count: &mut u64) {
    for step in steps {
        let mut next = pair.clone();
        next.apply(*step);
        *count += 1;
        if depth > 1 {
            explore(&next, steps, depth - 1, count);
        }
    }
}

#[test]
fn an_extent_lies_inside_the_disk_and_its_backing() {
    let small = MapBacking {
        sectors: 1000,
        ..BACKING
    };
    let mut map = with(4, small);
    let mut set = |extent| set(&mut map, extent);
    assert_eq!(set(writable(SIZE - 8, 8, 992)), Ok(()));
    assert_eq!(set(zeroes(SIZE - 16, 16)), Err(RefusedExtent::Writable));
    for beyond in [
        readable(SIZE - 8, 9, 0),
        zeroes(SIZE, 1),
        readable(u64::MAX - 1, 1, 0),
    ] {
        assert_eq!(set(beyond), Err(RefusedExtent::OutsideDisk), "{beyond:?}");
    }
    let everything = DataExtent {
        range: Sectors::ALL,
        ..readable(0, 1, u64::MAX)
    };
    assert_eq!(set(everything), Err(RefusedExtent::OutsideDisk));
    for place in [993, 1000, u64::MAX - 7, u64::MAX] {
        assert_eq!(
            set(readable(0, 8, place)),
            Err(RefusedExtent::OutsideBacking),
            "{place}"
        );
    }
    let elsewhere = DataExtent {
        source: Source::Backing(number(15)),
        ..readable(0, 8, 0)
    };
    assert_eq!(set(elsewhere), Err(RefusedExtent::NoBacking));
    assert_eq!(all(&map), [writable(SIZE - 8, 8, 992)]);
}

#[test]
fn what_may_only_be_read_is_not_written() {
    let fixed = MapBacking {
        writable: false,
        ..BACKING
    };
    let mut map = with(4, fixed);
    assert_eq!(
        set(&mut map, writable(0, 8, 0)),
        Err(RefusedExtent::ReadOnly)
    );
    assert_eq!(set(&mut map, readable(0, 8, 0)), Ok(()));
    let written = DataExtent {
        access: ExtentAccess::ReadWrite,
        ..zeroes(8, 8)
    };
    assert_eq!(set(&mut map, written), Err(RefusedExtent::ReadOnly));
    let range = sectors(0..8);
    let got = map.translate(&range, ExtentAccess::ReadWrite, 1, |_| ());
    assert_eq!(got, Err(Miss::ReadOnly));
    let mut disk = ExtentMap::new(vec![LeafSlot::FREE; 1], vec![Leaf::FREE; 1], SIZE, false);
    assert!(disk.add_backing(number(0), BACKING));
    assert_eq!(
        set(&mut disk, writable(0, 8, 0)),
        Err(RefusedExtent::ReadOnly)
    );
    assert_eq!(set(&mut disk, readable(0, 8, 0)), Ok(()));
}

#[test]
fn only_whole_blocks_of_a_backing_are_given_out() {
    let blocks = MapBacking {
        block: 8,
        ..BACKING
    };
    let mut map = with(4, blocks);
    for place in [1, 4, 7, 9] {
        assert_eq!(
            set(&mut map, readable(0, 64, place)),
            Err(RefusedExtent::Unaligned)
        );
    }
    // The ends need not be aligned, because a disk may end anywhere.
    assert_eq!(set(&mut map, readable(3, 60, 11)), Ok(()));
    assert_eq!(read(&mut map, 8, 16), Ok(vec![readable(8, 16, 16)]));
    for (start, count) in [(3, 5), (9, 8), (8, 9), (56, 7)] {
        assert_eq!(
            read(&mut map, start, count),
            Err(Miss::Unaligned),
            "{start}"
        );
    }
    // A block size that is not a power of two is refused.
    for block in [0, 3, 12] {
        let odd = MapBacking { block, ..BACKING };
        let mut map = with(1, odd);
        assert_eq!(
            set(&mut map, readable(0, 12, 0)),
            Err(RefusedExtent::Unaligned)
        );
    }
}

#[test]
fn a_range_is_found_in_pieces() {
    let mut map = with(4, BACKING);
    let parts = [writable(0, 8, 80), zeroes(8, 8), readable(16, 8, 16)];
    for part in parts {
        assert_eq!(set(&mut map, part), Ok(()));
    }
    let inner = [writable(4, 4, 84), zeroes(8, 8), readable(16, 1, 16)];
    assert_eq!(read(&mut map, 4, 13), Ok(inner.to_vec()));
    assert_eq!(read(&mut map, 4, 21), Err(Miss::Partial));
    assert_eq!(read(&mut map, 24, 1), Err(Miss::Unmapped));
    let mut count = 0;
    let mut two = |range| map.translate(&range, ExtentAccess::Read, 2, |_| count += 1);
    assert_eq!(two(sectors(4..17)), Err(Miss::Pieces));
    assert_eq!(two(sectors(4..16)), Ok(()));
    assert_eq!(count, 4);
}

#[test]
fn what_goes_on_is_one_extent() {
    let mut map = with(4, BACKING);
    // Mappings of a whole disk in parts, in any order.
    for at in [3, 0, 2, 1] {
        assert_eq!(set(&mut map, writable(at * 64, 64, at * 64)), Ok(()));
    }
    assert_eq!(all(&map), [writable(0, 256, 0)]);
    assert_eq!(
        set(&mut map, writable(100, 8, 100)),
        Ok(()),
        "known already"
    );
    assert_eq!(all(&map), [writable(0, 256, 0)]);
    // An extent at another place, or with another access, is not joined.
    assert_eq!(set(&mut map, writable(256, 64, 320)), Ok(()));
    assert_eq!(set(&mut map, readable(320, 64, 384)), Ok(()));
    assert_eq!(map.extents().count(), 3);
}

#[test]
fn what_may_be_written_is_recalled_before_it_is_elsewhere() {
    let mut map = with(4, BACKING);
    assert_eq!(set(&mut map, writable(0, 64, 0)), Ok(()));
    for other in [readable(63, 2, 500), writable(0, 1, 1), zeroes(8, 8)] {
        assert_eq!(
            set(&mut map, other),
            Err(RefusedExtent::Writable),
            "{other:?}"
        );
    }
    // The process may make a writable extent read-only, at the place that it has.
    assert_eq!(set(&mut map, readable(8, 8, 8)), Ok(()));
    let three = [writable(0, 8, 0), readable(8, 8, 8), writable(16, 48, 16)];
    assert_eq!(all(&map), three);
    assert_eq!(
        set(&mut map, writable(8, 8, 800)),
        Ok(()),
        "the copy of a write"
    );
    map.recall(&sectors(4..60));
    assert_eq!(all(&map), [writable(0, 4, 0), writable(60, 4, 60)]);
}

#[test]
fn a_write_of_the_process_takes_away_what_it_may_move() {
    let mut map = with(8, BACKING);
    assert_eq!(set(&mut map, writable(0, 64, 0)), Ok(()));
    assert_eq!(set(&mut map, readable(64, 64, 500)), Ok(()));
    map.written(&sectors(8..16));
    assert_eq!(map.extents().count(), 2, "it is written in place");
    // Writes to a neighbouring range leave it readable.
    map.written(&sectors(80..88));
    let rest = [
        writable(0, 64, 0),
        readable(64, 16, 500),
        readable(88, 40, 524),
    ];
    assert_eq!(all(&map), rest);
    // Lookups by other threads during the write are stale.
    let before = map.generation();
    assert_eq!(map.set(&readable(80, 8, 516), before), Ok(()));
    map.written(&sectors(80..88));
    assert_eq!(
        map.set(&readable(72, 9, 508), before),
        Err(RefusedExtent::Stale)
    );
    assert_eq!(all(&map), rest);
    // The process maps the range of its own write before it answers, and the mapping stays.
    assert_eq!(set(&mut map, writable(80, 8, 700)), Ok(()));
    map.written(&sectors(80..88));
    assert_eq!(read(&mut map, 80, 8), Ok(vec![writable(80, 8, 700)]));
    // A range with more extents than a call examines is forgotten, whatever its access.
    let many = MAX_REPLACED as u64;
    comb(&mut map, 1000..1001 + many);
    map.written(&sectors(1000..1000 + many));
    assert!(read(&mut map, 1000, 1).is_ok());
    map.written(&sectors(1000..1001 + many));
    assert_eq!(read(&mut map, 1000, 1), Err(Miss::Unmapped));
}

#[test]
fn what_was_found_out_before_a_change_does_not_count_for_it() {
    let mut map = with(4, BACKING);
    let before = map.generation();
    assert_eq!(
        map.set(&readable(0, 8, 0), before.wrapping_sub(1)),
        Err(RefusedExtent::Stale)
    );
    assert_eq!(
        map.set(&readable(0, 8, 0), before + 1),
        Err(RefusedExtent::Stale)
    );
    map.recall(&sectors(0..8));
    assert_eq!(map.generation(), before + 1);
    assert_eq!(
        map.set(&readable(7, 8, 7), before),
        Err(RefusedExtent::Stale)
    );
    assert_eq!(map.set(&readable(8, 8, 8), before), Ok(()), "another range");
    assert_eq!(map.set(&readable(7, 8, 7), before + 1), Ok(()));
    // The generation is too old to be remembered.
    for _ in 1..REMEMBERED {
        map.recall(&sectors(100..101));
    }
    assert_eq!(map.set(&readable(16, 8, 16), before), Ok(()));
    map.recall(&sectors(100..101));
    assert_eq!(
        map.set(&readable(24, 8, 24), before),
        Err(RefusedExtent::Stale)
    );
}

#[test]
fn each_process_begins_with_nothing() {
    let mut map = with(4, BACKING);
    comb(&mut map, 0..100);
    let before = map.generation();
    map.clear();
    assert_eq!(map.extents().count(), 0);
    assert_eq!(
        map.set(&readable(0, 8, 0), before),
        Err(RefusedExtent::Stale)
    );
    assert_eq!(
        set(&mut map, readable(0, 8, 0)),
        Ok(()),
        "the backings stay"
    );
    comb(&mut map, 100..100 + 4 * LEAF as u64);
}

#[test]
fn a_number_that_names_another_backing_is_not_mistaken() {
    let mut map = with(4, BACKING);
    assert!(!map.add_backing(number(0), BACKING), "there is one");
    assert_eq!(set(&mut map, writable(0, 8, 0)), Ok(()));
    let before = map.generation();
    assert!(map.remove_backing(number(0)));
    assert!(!map.remove_backing(number(0)));
    assert_eq!(map.extents().count(), 0);
    assert_eq!(
        map.set(&readable(0, 8, 0), before),
        Err(RefusedExtent::NoBacking)
    );
    assert!(map.add_backing(number(0), BACKING));
    assert_eq!(
        map.set(&readable(0, 8, 0), before),
        Err(RefusedExtent::Stale)
    );
    assert_eq!(BackingNumber::new(16), None);
    assert_eq!(BackingNumber::new(256), None);
}

#[test]
fn nothing_stays_behind_the_end_of_a_disk() {
    let mut map = with(4, BACKING);
    assert_eq!(set(&mut map, writable(0, 64, 0)), Ok(()));
    map.resize(40);
    assert_eq!(all(&map), [writable(0, 40, 0)]);
    assert_eq!(
        set(&mut map, zeroes(40, 1)),
        Err(RefusedExtent::OutsideDisk)
    );
    map.resize(64);
    assert_eq!(read(&mut map, 40, 1), Err(Miss::Unmapped));
}

#[test]
fn one_extent_does_not_replace_too_many() {
    let mut map = with(8, BACKING);
    let many = MAX_REPLACED as u64;
    for start in 0..=many {
        assert_eq!(set(&mut map, readable(start, 1, start * 2)), Ok(()));
    }
    assert_eq!(
        set(&mut map, readable(0, many + 1, 9000)),
        Err(RefusedExtent::Crowded)
    );
    assert_eq!(set(&mut map, readable(0, many, 9000)), Ok(()));
    assert_eq!(map.extents().count(), 2);
}

#[test]
fn what_was_not_used_is_forgotten_first() {
    let leaf = LEAF as u64;
    let mut map = with(4, BACKING);
    comb(&mut map, 0..4 * leaf);
    assert_eq!(
        (map.extents().count(), map.evicted()),
        (4 * LEAF, 0),
        "in order they fill it"
    );
    // All leaves were used since the first search, so the first one goes.
    comb(&mut map, 1000..1001);
    assert_eq!(map.evicted(), leaf);
    assert_eq!(read(&mut map, 0, 1), Err(Miss::Unmapped));
    // The first of the others is used again, so the second goes.
    assert!(read(&mut map, leaf, 1).is_ok());
    comb(&mut map, 1001..1001 + leaf);
    assert_eq!(map.evicted(), 2 * leaf);
    assert!(read(&mut map, leaf, 1).is_ok());
    assert_eq!(read(&mut map, 2 * leaf, 1), Err(Miss::Unmapped));
    assert!(read(&mut map, 3 * leaf, 1).is_ok());
}

#[test]
fn the_size_is_fixed_whatever_the_process_says() {
    for leaves in [0, 1, 2, MAX_LEAVES + 9] {
        let mut map = with(leaves, BACKING);
        // Insert backwards, which splits leaves, and with holes that need more room.
        let mut said = 0;
        for at in (0..40_000u64).rev() {
            assert_eq!(set(&mut map, writable(at * 3, 3, at * 4)), Ok(()));
            said += 1;
            if at % 4 == 0 {
                map.recall(&sectors(at * 3 + 1..at * 3 + 2));
                said += u64::from(leaves > 0);
            }
        }
        let count = map.extents().count();
        assert!(count <= leaves.min(MAX_LEAVES) * LEAF, "{count}");
        assert!(
            leaves < 2 || count >= leaves.min(MAX_LEAVES) * LEAF / 4,
            "{count}"
        );
        assert_eq!(count as u64 + map.evicted(), said);
        map.recall(&Sectors::ALL);
        assert_eq!(map.extents().count(), 0);
    }
}

#[test]
fn with_more_memory_nothing_is_forgotten() {
    const COUNT: u64 = 40 * LEAF as u64;
    // Grow as a caller with enough memory does: before each change.
    let filled = |grows: bool| {
        let mut map = with(4, BACKING);
        for at in 0..COUNT {
            if let Some(leaves) = map.wants().filter(|_| grows) {
                let memory = (vec![LeafSlot::FREE; leaves], vec![Leaf::FREE; leaves]);
                let rest = map.grow(memory.0, memory.1);
                assert!(rest.1.len() < leaves);
            }
            comb(&mut map, at..at + 1);
        }
        (map.extents().count() as u64, map.evicted())
    };
    assert_eq!(filled(true), (COUNT, 0));
    let (left, evicted) = filled(false);
    assert!(left <= 4 * LEAF as u64 && left + evicted == COUNT);
}

#[test]
fn a_map_does_not_want_more_than_there_may_be() {
    for (leaves, wanted) in [(1, Some(4)), (128, Some(512)), (129, None), (512, None)] {
        let mut map = with(leaves, BACKING);
        assert_eq!(map.wants(), None);
        let mut at = 0;
        while map.evicted() == 0 {
            comb(&mut map, at..at + 1);
            at += 1;
        }
        assert_eq!(map.wants(), wanted, "{leaves}");
    }
}
