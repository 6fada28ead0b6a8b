// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Arguments of the process about mappings: every field out of its range, one at a time.

use ring::tap::abi::{self, BackingAdd, BackingRemove, Buffer, MapOp, Maps};
use ring::tap::checked::{Malformed, MapChange, NewBacking};
use ring::tap::extent::{BackingNumber, DataExtent, ExtentAccess, Sectors, Source};

const SET: MapOp = MapOp {
    op: abi::MAP_SET,
    flags: abi::MAP_READ | abi::MAP_WRITE,
    backing: 15,
    generation: 7,
    sector: 8,
    sectors: 16,
    offset: 4096,
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
    reserved: [0; 2],
};

const FLUSH: MapOp = MapOp {
    op: abi::MAP_FLUSH,
    sectors: 0,
    ..RECALL
};

#[test]
fn changes_of_mappings() {
    let extent = DataExtent {
        range: Sectors::new(8, 16).expect("some"),
        place: 8,
        source: Source::Backing(last()),
        access: ExtentAccess::ReadWrite,
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
    let access = ExtentAccess::Read;
    assert_eq!(read.check(), set(DataExtent { access, ..extent }));
    let zero = MapOp {
        flags: abi::MAP_READ | abi::MAP_ZERO,
        backing: abi::MAP_NO_BACKING,
        offset: 0,
        ..SET
    };
    let zeroes = DataExtent {
        place: 0,
        source: Source::Zeroes,
        access,
        ..extent
    };
    assert_eq!(zero.check(), set(zeroes));
    let all = Sectors::ALL;
    assert_eq!(RECALL.check(), Ok(MapChange::Recall { range: all }));
    assert_eq!(FLUSH.check(), Ok(MapChange::Flush));
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
    for op in [SET, RECALL, FLUSH] {
        for reserved in [[1, 0], [0, 1 << 63]] {
            refused(MapOp { reserved, ..op }, Malformed::Reserved);
        }
    }
    for op in [0, abi::MAP_COLLECT, 5, 255] {
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
    for op in [RECALL, FLUSH] {
        for more in [
            MapOp { flags: 1, ..op },
            MapOp { backing: 1, ..op },
            MapOp {
                generation: 1,
                ..op
            },
            MapOp { offset: 512, ..op },
        ] {
            refused(more, Malformed::Reserved);
        }
    }
    // A flush is of the whole disk.
    for (sector, sectors) in [(0, 1), (1, 0), (0, u64::MAX)] {
        let part = MapOp {
            sector,
            sectors,
            ..FLUSH
        };
        refused(part, Malformed::Reserved);
    }
}

const ADD: BackingAdd = BackingAdd {
    minor: 7,
    number: 15,
    fd: -1,
    flags: abi::BACKING_WRITE,
    reserved: [0; 2],
};

const REMOVE: BackingRemove = BackingRemove {
    minor: 7,
    number: 15,
    reserved: 0,
};

fn last() -> BackingNumber {
    BackingNumber::new(15).expect("the last")
}

#[test]
fn backings() {
    let writable = NewBacking {
        minor: 7,
        number: last(),
        // The number need not name an existing backing: the lookup finds out later.
        fd: -1,
        writable: true,
    };
    assert_eq!(ADD.check(), Ok(writable));
    let read_only = NewBacking {
        writable: false,
        ..writable
    };
    assert_eq!(BackingAdd { flags: 0, ..ADD }.check(), Ok(read_only));
    assert_eq!(REMOVE.check(), Ok((7, last())));
}

#[test]
fn backings_that_are_not_understood() {
    for flags in [2, 3, 1 << 31, u32::MAX] {
        let wrong = BackingAdd { flags, ..ADD };
        assert_eq!(wrong.check(), Err(Malformed::Flags), "{flags}");
    }
    for reserved in [[1, 0], [0, 1 << 63]] {
        let wrong = BackingAdd { reserved, ..ADD };
        assert_eq!(wrong.check(), Err(Malformed::Reserved));
    }
    let wrong = BackingRemove {
        reserved: 1,
        ..REMOVE
    };
    assert_eq!(wrong.check(), Err(Malformed::Reserved));
    // Those with more bits than a number of a backing has, too.
    for number in [16, 0x100, 0x1_0000, 0x1_000f, u32::MAX] {
        let add = BackingAdd { number, ..ADD };
        assert_eq!(add.check(), Err(Malformed::Range), "{number:#x}");
        let remove = BackingRemove { number, ..REMOVE };
        assert_eq!(remove.check(), Err(Malformed::Range), "{number:#x}");
    }
}

#[test]
fn calls_that_change_mappings() {
    let ops = Buffer {
        addr: 4096,
        len: abi::MAX_MAP_OPS,
        reserved: 0,
    };
    let check = |ops: Buffer| {
        let maps = Maps {
            ops,
            ..Maps::default()
        };
        maps.check().map(|array| (array.addr, array.len))
    };
    assert_eq!(check(ops), Ok((4096, 256)));
    // A query passes no operations, whatever its address.
    let none = Buffer {
        addr: u64::MAX,
        len: 0,
        reserved: 0,
    };
    assert_eq!(check(none), Ok((u64::MAX, 0)));
    // Fields that the kernel only writes are ignored.
    let before = Maps {
        ops,
        generation: 7,
        backings: 1,
        refused: 9,
        reserved: [0; 2],
    };
    assert!(before.check().is_ok());
    for wrong in [
        Buffer { len: 257, ..ops },
        Buffer {
            addr: u64::MAX - 46,
            len: 1,
            ..ops
        },
    ] {
        assert_eq!(check(wrong), Err(Malformed::Buffer), "{wrong:?}");
    }
    let wrong = Buffer { reserved: 1, ..ops };
    assert_eq!(check(wrong), Err(Malformed::Reserved));
    for reserved in [[1, 0], [0, 1]] {
        let wrong = Maps { reserved, ..before };
        assert_eq!(wrong.check(), Err(Malformed::Reserved));
    }
}
