// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! What the process says of mappings: every field out of its range, one at a time.

use ring::tap::abi::{self, MapOp};
use ring::tap::checked::{Malformed, MapChange};
use ring::tap::extent::{Access, BackingNumber, Extent, Sectors, Source};

const SET: MapOp = MapOp {
    op: abi::MAP_SET,
    flags: abi::MAP_READ | abi::MAP_WRITE,
    backing: 15,
    generation: 7,
    sector: 8,
    sectors: 16,
    offset: 4096,
    cookie: 0,
    reserved: [0; 2],
};

const RECALL: MapOp = MapOp {
    op: abi::MAP_RECALL,
    flags: 0,
    backing: 0,
    generation: 0,
    sector: 0,
    sectors: u64::MAX,
    offset: 0,
    cookie: u64::MAX,
    reserved: [0; 2],
};

#[test]
fn changes_of_mappings() {
    let extent = Extent {
        range: Sectors::new(8, 16).expect("some"),
        place: 8,
        source: Source::Backing(BackingNumber::new(15).expect("the last")),
        access: Access::ReadWrite,
    };
    let set = |extent| {
        Ok(MapChange::Set {
            extent,
            generation: 7,
        })
    };
    assert_eq!(SET.check(), set(extent));
    let read = MapOp {
        flags: abi::MAP_READ,
        ..SET
    };
    let access = Access::Read;
    assert_eq!(read.check(), set(Extent { access, ..extent }));
    let zero = MapOp {
        flags: abi::MAP_READ | abi::MAP_ZERO,
        backing: abi::MAP_NO_BACKING,
        offset: 0,
        ..SET
    };
    let zeroes = Extent {
        place: 0,
        source: Source::Zeroes,
        access,
        ..extent
    };
    assert_eq!(zero.check(), set(zeroes));
    let all = Sectors::ALL;
    let cookie = u64::MAX;
    assert_eq!(RECALL.check(), Ok(MapChange::Recall { range: all, cookie }));
}

/// Each change of one field that is not understood.
#[test]
fn changes_of_mappings_that_are_not_understood() {
    let refused = |op: MapOp, why: Malformed| assert_eq!(op.check(), Err(why), "{op:?}");
    for (first, sectors) in [(8, 0), (1, u64::MAX), (u64::MAX, 1), (u64::MAX, u64::MAX)] {
        for op in [SET, RECALL] {
            let sector = first;
            refused(
                MapOp {
                    sector,
                    sectors,
                    ..op
                },
                Malformed::Range,
            );
        }
    }
    for op in [SET, RECALL] {
        for reserved in [[1, 0], [0, 1 << 31]] {
            refused(MapOp { reserved, ..op }, Malformed::Reserved);
        }
    }
    for op in [0, abi::MAP_COLLECT, 4, 255] {
        refused(MapOp { op, ..SET }, Malformed::Unknown);
    }
    for flags in 0..=255 {
        let why = match flags {
            1 | 3 => continue,
            // Zeroes are of no backing.
            5 => Malformed::Range,
            _ if flags & abi::MAP_TRACK != 0 => Malformed::Unknown,
            _ => Malformed::Flags,
        };
        refused(MapOp { flags, ..SET }, why);
    }
    for backing in [16, 0x100, 0x8000, abi::MAP_NO_BACKING] {
        refused(MapOp { backing, ..SET }, Malformed::Range);
    }
    for offset in [1, 256, 511, 4097, u64::MAX] {
        refused(MapOp { offset, ..SET }, Malformed::Range);
    }
    // Where it is would end behind the last number.
    let far = MapOp {
        sector: 0,
        sectors: u64::MAX,
        offset: 512,
        ..SET
    };
    refused(far, Malformed::Range);
    assert!(MapOp { offset: 0, ..far }.check().is_ok());
    refused(MapOp { cookie: 1, ..SET }, Malformed::Reserved);
    let zero = MapOp {
        flags: abi::MAP_READ | abi::MAP_ZERO,
        backing: abi::MAP_NO_BACKING,
        offset: 0,
        ..SET
    };
    refused(MapOp { backing: 0, ..zero }, Malformed::Range);
    refused(
        MapOp {
            offset: 512,
            ..zero
        },
        Malformed::Range,
    );
    for op in [
        MapOp { flags: 1, ..RECALL },
        MapOp {
            backing: 1,
            ..RECALL
        },
        MapOp {
            generation: 1,
            ..RECALL
        },
        MapOp {
            offset: 512,
            ..RECALL
        },
    ] {
        refused(op, Malformed::Reserved);
    }
}
