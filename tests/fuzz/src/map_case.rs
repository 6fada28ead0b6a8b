// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The body of the fuzz target `map`: mappings of a hostile process.

use ring::tap::extent::{BackingNumber, DataExtent, ExtentAccess, Sectors, Source};
use ring::tap::map::MapBacking;

use crate::input::Input;
use crate::map_pair::{sectors, MapEvents, MapStep, Pair, LARGEST};

/// Runs one input, and returns the counts of events. Input that is too short is ignored.
pub fn run(data: &[u8]) -> Option<MapEvents> {
    let mut input = Input::new(data);
    let [leaves, size, kind] = input.bytes()?;
    let leaves = [1, 2, 3, 6, 24, 0][usize::from(leaves) % 6];
    let mut pair = Pair::new(leaves, LARGEST - u64::from(size % 16), kind % 8 != 0);
    for (number, sectors, block, writable) in [
        (0, 4096, 1, true),
        (1, 2048, 8, true),
        (2, 300, 1, false),
        (3, u64::MAX, 1, true),
    ] {
        pair.apply(MapStep::Add(number, backing(sectors, block, writable)));
    }
    while step(&mut pair, &mut input).is_some() {}
    Some(pair.seen().clone())
}

fn backing(sectors: u64, block: u32, writable: bool) -> MapBacking {
    MapBacking {
        sectors,
        block,
        writable,
    }
}

/// Takes the next step, or several of a kind.
fn step(pair: &mut Pair, input: &mut Input<'_>) -> Option<()> {
    let [what, value] = input.bytes()?;
    match what % 32 {
        0..=11 => {
            let extent = extent(pair, value, input)?;
            // Mostly the newest generation; seldom one that never existed.
            let ago = match value / 16 {
                0 => u32::from(what),
                1 => u32::MAX - u32::from(what / 128),
                2..=4 => u32::from(what / 64),
                _ => 0,
            };
            pair.apply(MapStep::Set(extent, ago));
        }
        12..=14 => {
            // Many that are not adjacent to each other.
            let [from, stride] = input.bytes()?;
            for at in 0..u64::from(value % 160) {
                let sector = u64::from(from) * 2 + at * u64::from(1 + stride % 3);
                let extent = DataExtent {
                    range: sectors(sector..sector + 1),
                    place: sector + at % 2,
                    source: Source::Backing(BackingNumber::new(0)?),
                    access: access(stride / 4),
                };
                pair.apply(MapStep::Set(extent, 0));
            }
        }
        15..=18 => pair.apply(MapStep::Recall(range(pair, value, input)?)),
        19..=22 => pair.apply(MapStep::Written(range(pair, value, input)?)),
        23..=28 => {
            let room = [16, 16, 2, 1, 0][usize::from(value / 8) % 5];
            let range = range(pair, value, input)?;
            pair.apply(MapStep::Translate(range, access(what / 32), room));
        }
        29 if value < 64 => pair.apply(MapStep::Clear),
        29 if value < 128 => pair.apply(MapStep::Grow(usize::from(value % 32))),
        29 => pair.apply(MapStep::Resize(LARGEST - u64::from(value) * 2)),
        30 => pair.apply(MapStep::Remove(u16::from(value) % 24)),
        _ => {
            let backing = backing(u64::from(value) * 16, 1 << (value % 4), value % 3 > 0);
            pair.apply(MapStep::Add(
                u16::from(what / 16) + u16::from(value % 4),
                backing,
            ));
        }
    }
    Some(())
}

fn access(value: u8) -> ExtentAccess {
    if value % 2 == 0 {
        ExtentAccess::ReadWrite
    } else {
        ExtentAccess::Read
    }
}

fn range(pair: &Pair, value: u8, input: &mut Input<'_>) -> Option<Sectors> {
    let [near, far, count] = input.bytes()?;
    if far >= 128 {
        // An existing extent, or a range of many.
        let (first, more) = [(near, 0), (near, 1), (near / 16, 90)][usize::from(far) % 3];
        if let Some(range) = pair.known(first.into(), more) {
            return Some(range);
        }
    }
    let start = u64::from(near) + u64::from(far % 128) * 4;
    let count = u64::from(count);
    Some(match value % 8 {
        0..=2 => sectors(start..start + 1 + count % 8),
        3 | 4 => sectors(start..start + 1 + count),
        // Whole blocks of all backings here.
        5 | 6 => sectors(start / 8 * 8..(start / 8 + 1 + count % 16) * 8),
        _ => match count % 4 {
            0 if far < 16 => Sectors::ALL,
            1 => Sectors::new(u64::MAX - 1 - start, 1 + start / 2)?,
            2 => sectors(start..start + LARGEST + count),
            _ => sectors(start..u64::MAX),
        },
    })
}

fn extent(pair: &Pair, value: u8, input: &mut Input<'_>) -> Option<DataExtent> {
    let range = range(pair, value, input)?;
    let [place, how] = input.bytes()?;
    let source = match how % 16 {
        0 | 1 => Source::Zeroes,
        2 => Source::Backing(BackingNumber::new(u16::from(place) % 16)?),
        number => Source::Backing(BackingNumber::new(u16::from(number) % 4)?),
    };
    // Few distances, so that neighbours are often adjacent in the backing; sometimes any distance.
    let place = match place % 16 {
        _ if source == Source::Zeroes => 0,
        0 => u64::from_le_bytes(input.bytes()?),
        1 => u64::MAX - range.start(),
        2 => range.start().wrapping_add(u64::from(place / 16)),
        other => range.start().wrapping_add(u64::from(other % 3) * 512),
    };
    Some(DataExtent {
        range,
        place,
        source,
        access: access(how / 16),
    })
}
