// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Arguments of the process: every field out of its range, one at a time.

use proptest::prelude::*;
use ring::response::ResponseStatus;
use ring::tap::abi::{
    self, Buffer, Claims, Completion, CreateCommand, Destroy, DiscardLimits, Exchange, Geometry,
};
use ring::tap::checked::{Claimed, Fence, Malformed, NewDisk, RequestOutcome, UserArray};
use ring::tap::params::{Discard, ParamError, Params, Unfit, MAX_SECTORS};
use zerocopy::IntoBytes;

use crate::tap_oracle::{self, encode, record};

#[test]
fn completions() {
    let check = |flags, result, reserved| {
        let completion = Completion {
            tag: 7,
            flags,
            generation: 9,
            result,
            reserved,
        };
        completion.check().map(|commit| {
            assert_eq!((commit.tag.number(), commit.generation), (7, 9));
            commit.outcome
        })
    };
    assert_eq!(
        check(0, 0, 0),
        Ok(RequestOutcome::Finished(ResponseStatus::Okay))
    );
    assert_eq!(
        check(0, -5, 0),
        Ok(RequestOutcome::Finished(ResponseStatus::Error))
    );
    assert_eq!(
        check(0, -95, 0),
        Ok(RequestOutcome::Finished(ResponseStatus::NotSupported))
    );
    assert_eq!(
        check(0, -4095, 0),
        Ok(RequestOutcome::Finished(ResponseStatus::Error))
    );
    assert_eq!(check(1, 0, 0), Ok(RequestOutcome::Returned));
    for result in [1, 512, i32::MAX, -4096, i32::MIN] {
        assert_eq!(check(0, result, 0), Err(Malformed::Range), "{result}");
    }
    assert_eq!(check(1, -5, 0), Err(Malformed::Range));
    assert_eq!(check(0, 0, 1), Err(Malformed::Reserved));
    assert_eq!(check(2, 0, 0), Err(Malformed::Unknown), "kept for later");
    for flags in [3, 4, 0x8000, u16::MAX] {
        assert_eq!(check(flags, 0, 0), Err(Malformed::Flags), "{flags}");
    }
}

#[test]
fn claims() {
    let size = abi::CLAIMS_FIRST_SIZE;
    let good = Claims {
        size,
        fence: abi::FENCE_LOCAL,
        operations: abi::OPERATIONS,
        features: abi::FEATURES,
        settle_ms: 0,
        reserved: 0,
    };
    let check = |claims: Claims| claims.check().map(|got| (got.operations, got.features));
    assert_eq!(check(good), Ok((abi::OPERATIONS, abi::FEATURES)));
    let nothing = Claims {
        size,
        fence: abi::FENCE_LOCAL,
        ..Claims::default()
    };
    assert_eq!(check(nothing), Ok((0, 0)));
    let reserved = Claims {
        reserved: 1,
        ..good
    };
    assert_eq!(check(reserved), Err(Malformed::Reserved));
    for bit in 0..64 {
        let with = |known: u64| match known >> bit & 1 {
            1 => Ok(()),
            _ => Err(Malformed::Unknown),
        };
        let operations = Claims {
            operations: 1 << bit,
            ..nothing
        };
        let features = Claims {
            features: 1 << bit,
            ..nothing
        };
        assert_eq!(check(operations).map(drop), with(abi::OPERATIONS), "{bit}");
        assert_eq!(check(features).map(drop), with(abi::FEATURES), "{bit}");
    }
}

#[test]
fn what_is_kept_for_later() {
    use ring::tap::abi::{ioctl, kept};
    let used = [
        ioctl::CREATE,
        ioctl::DESTROY,
        ioctl::QUERY,
        ioctl::INFO,
        ioctl::SET_PARAMS,
        ioctl::CLAIM,
        ioctl::START,
        ioctl::EXCUSE,
        ioctl::EXCHANGE,
        ioctl::BACKING_ADD,
        ioctl::BACKING_REMOVE,
        ioctl::MAPPED,
        ioctl::MAP,
    ];
    assert!(!used.into_iter().any(ioctl::is_kept));
    for nr in [0x17, 0x18] {
        for size in [0, 16, 56, 0x3fff] {
            assert!(
                ioctl::is_kept(3 << 30 | size << 16 | 0x7800 | nr),
                "{nr:#x}"
            );
        }
        assert!(!ioctl::is_kept(0x7900 | nr), "not ours");
        assert!(!used.iter().any(|used| used & 0xff == nr));
    }
    assert!(ioctl::is_kept(ioctl::EXCHANGE & !(0x3fff << 16) | 48 << 16));
    let kept = kept::FEATURE_HANDOFF | kept::FEATURE_RETRY_LATER;
    assert_eq!(kept & abi::FEATURES, 0);
    let ops = [
        kept::OP_MAP_MISS,
        kept::OP_RECALLED,
        kept::OP_QUIESCE,
        kept::OP_IO_DONE,
    ];
    assert!(ops.iter().all(|op| abi::OPERATIONS >> op & 1 == 0));
    let mapping = [3u32, 16, 0, 0, 0, 0];
    assert_eq!(Params::parse(mapping.as_bytes()), Err(ParamError::Kept(3)));
}

#[test]
fn fences() {
    let check = |fence, settle_ms| {
        let claims = Claims {
            fence,
            settle_ms,
            ..Claims::default()
        };
        claims.check().map(|got| got.fence)
    };
    let session = |settle_ms| Ok(Fence::Session { settle_ms });
    assert_eq!(check(abi::FENCE_LOCAL, 0), Ok(Fence::Local));
    assert_eq!(check(abi::FENCE_NONE, 0), Ok(Fence::None));
    assert_eq!(check(abi::FENCE_SESSION, 1), session(1));
    assert_eq!(check(abi::FENCE_SESSION, 600_000), session(600_000));
    // A class of a later version gets another error than a mistake.
    for later in [4, u32::MAX] {
        assert_eq!(check(later, 0), Err(Malformed::Unknown));
    }
    let wrong = [
        (0, 0),
        (0, 1),
        (abi::FENCE_LOCAL, 1),
        (abi::FENCE_NONE, 1),
        (abi::FENCE_SESSION, 0),
        (abi::FENCE_SESSION, 600_001),
        (abi::FENCE_SESSION, u32::MAX),
    ];
    for (fence, settle_ms) in wrong {
        assert_eq!(
            check(fence, settle_ms),
            Err(Malformed::Range),
            "{fence} {settle_ms}"
        );
    }
}

#[test]
fn claims_of_another_size() {
    let ours = size_of::<Claims>();
    let first = abi::CLAIMS_FIRST_SIZE;
    for size in [0, 1, first - 1] {
        assert_eq!(Claims::check_size(size), Err(Malformed::Range), "{size}");
    }
    for size in [abi::CLAIMS_MAX_SIZE + 1, 1 << 31, u32::MAX] {
        assert_eq!(Claims::check_size(size), Err(Malformed::Larger), "{size}");
    }
    for size in [first, ours as u32, ours as u32 + 1, abi::CLAIMS_MAX_SIZE] {
        let lengths = Claims::check_size(size).expect("a size that may be");
        assert_eq!(lengths.known, ours.min(size as usize));
        assert_eq!(lengths.known + lengths.beyond, size as usize);
    }
}

/// A process that predates claims is served as before, whatever is added to the ABI.
#[test]
fn what_is_taken_for_granted_stays() {
    assert_eq!(Claimed::BEFORE.operations, 0b110_1111);
    assert_eq!(Claimed::BEFORE.features, 1);
    assert_eq!(Claimed::BEFORE.fence, Fence::Local);
}

#[test]
fn what_guests_may_ask_for() {
    let mut disk = Params {
        sectors: 8,
        logical_block: 512,
        physical_block: 512,
        read_only: false,
        write_cache: false,
        discard: None,
        may_shrink: false,
    };
    assert_eq!(disk.operations(), 0b11);
    disk.write_cache = true;
    assert_eq!(disk.operations(), 0b111);
    let mut discard = Discard {
        granularity: 512,
        alignment: 0,
        secure: false,
    };
    disk.discard = Some(discard);
    assert_eq!(disk.operations(), 0b1111);
    discard.secure = true;
    disk.discard = Some(discard);
    assert_eq!(disk.operations(), 0b100_1111);
    disk.read_only = true;
    assert_eq!(disk.operations(), 1);
}

const CREATE: CreateCommand = CreateCommand {
    version: abi::VERSION,
    minor: u32::MAX,
    arena_kib: 0,
    fail_after_s: 0,
    max_deaths: 0,
    reserved0: 0,
    reserved: [0; 3],
};

#[test]
fn new_disks() {
    let disk = NewDisk {
        minor: None,
        arena_kib: None,
        fail_after_s: None,
        max_deaths: 0,
    };
    assert_eq!(CREATE.check(), Ok(disk));
    let all = CreateCommand {
        minor: 7,
        arena_kib: 65536,
        fail_after_s: 30,
        max_deaths: 255,
        ..CREATE
    };
    let disk = NewDisk {
        minor: Some(7),
        arena_kib: Some(65536),
        fail_after_s: Some(30),
        max_deaths: 255,
    };
    assert_eq!(all.check(), Ok(disk));
    for version in [0, abi::VERSION + 1] {
        assert_eq!(
            CreateCommand { version, ..CREATE }.check(),
            Err(Malformed::Version)
        );
    }
    for minor in [1 << 20, u32::MAX - 1] {
        assert_eq!(
            CreateCommand { minor, ..CREATE }.check(),
            Err(Malformed::Range)
        );
    }
    for arena_kib in [1, 1023, 1025, 66560, u32::MAX] {
        let wrong = CreateCommand {
            arena_kib,
            ..CREATE
        };
        assert_eq!(wrong.check(), Err(Malformed::Range), "{arena_kib}");
    }
    let max_deaths = 256;
    let wrong = CreateCommand {
        max_deaths,
        ..CREATE
    };
    assert_eq!(wrong.check(), Err(Malformed::Range));
    for at in 0..4 {
        let mut wrong = CREATE;
        match wrong.reserved.get_mut(at) {
            Some(field) => *field = 1,
            None => wrong.reserved0 = 1,
        }
        assert_eq!(wrong.check(), Err(Malformed::Reserved));
    }
}

#[test]
fn disks_to_be_destroyed() {
    assert_eq!(Destroy { minor: 3, flags: 0 }.check(), Ok(3));
    let wrong = Destroy { minor: 3, flags: 1 };
    assert_eq!(wrong.check(), Err(Malformed::Reserved));
}

#[test]
fn arrays() {
    let buffer = |addr, len, reserved| Buffer {
        addr,
        len,
        reserved,
    };
    let check = |commits: Buffer, tags: Buffer| Exchange { commits, tags }.check();
    let none = buffer(0, 0, 0);
    let arrays = check(buffer(4096, 4096, 0), buffer(2, 4096, 0)).expect("both fit");
    assert_eq!(
        arrays.commits,
        UserArray {
            addr: 4096,
            len: 4096
        }
    );
    assert_eq!(arrays.commits.bytes(16), 65536);
    assert_eq!((arrays.tags.addr, arrays.tags.len), (2, 4096));
    // An empty array may be anywhere.
    assert!(check(buffer(u64::MAX, 0, 0), none).is_ok());
    for wrong in [
        buffer(0, 4097, 0),
        buffer(0, u32::MAX, 0),
        buffer(u64::MAX - 14, 1, 0),
    ] {
        assert_eq!(check(wrong, none), Err(Malformed::Buffer), "{wrong:?}");
    }
    assert!(check(none, buffer(u64::MAX - 2, 1, 0)).is_ok());
    assert_eq!(
        check(none, buffer(u64::MAX - 1, 1, 0)),
        Err(Malformed::Buffer)
    );
    assert_eq!(check(none, buffer(0, 0, 1)), Err(Malformed::Reserved));
    assert_eq!(check(buffer(0, 0, 1), none), Err(Malformed::Reserved));
    assert!(buffer(8, 4096, 0).check_params().is_ok());
    assert_eq!(buffer(8, 4097, 0).check_params(), Err(Malformed::Buffer));
}

const GEOMETRY: Geometry = Geometry {
    sectors: 4096,
    logical_block: 4096,
    physical_block: 4096,
    flags: 0,
    reserved: 0,
};

const LIMITS: DiscardLimits = DiscardLimits {
    granularity: 65536,
    alignment: 4096,
    secure: 0,
    reserved: 0,
};

fn described(geometry: &Geometry) -> Result<Params, ParamError> {
    Params::parse(&record(abi::PARAM_GEOMETRY, geometry.as_bytes()))
}

#[test]
fn a_disk_is_described_by_records_in_any_order() {
    let geometry = Geometry {
        logical_block: 512,
        flags: abi::GEOMETRY_WRITE_CACHE,
        ..GEOMETRY
    };
    let geometry = record(abi::PARAM_GEOMETRY, geometry.as_bytes());
    let limits = DiscardLimits {
        secure: 1,
        ..LIMITS
    };
    let discard = record(abi::PARAM_DISCARD, limits.as_bytes());
    let expected = Params {
        sectors: 4096,
        logical_block: 512,
        physical_block: 4096,
        read_only: false,
        write_cache: true,
        discard: Some(Discard {
            granularity: 65536,
            alignment: 4096,
            secure: true,
        }),
        may_shrink: false,
    };
    for bytes in [
        [&geometry[..], &discard].concat(),
        [&discard[..], &geometry].concat(),
    ] {
        assert_eq!(Params::parse(&bytes), Ok(expected));
        // Where the bytes end makes a record whole or not.
        for len in 0..bytes.len() {
            let cut = Params::parse(&bytes[..len]);
            let whole = len == geometry.len() && bytes[0] == 1;
            assert_eq!(cut.is_ok(), whole, "{len}: {cut:?}");
        }
    }
}

#[test]
fn records_that_are_not_understood_are_refused() {
    let geometry = record(abi::PARAM_GEOMETRY, GEOMETRY.as_bytes());
    let twice = [&geometry[..], &geometry].concat();
    assert_eq!(Params::parse(&twice), Err(ParamError::Duplicate(1)));
    let unknown = [&geometry[..], &record(9, &[0; 8])].concat();
    assert_eq!(Params::parse(&unknown), Err(ParamError::UnknownKind(9)));
    assert_eq!(Params::parse(&[]), Err(ParamError::NoGeometry));
    let discard = record(abi::PARAM_DISCARD, LIMITS.as_bytes());
    assert_eq!(Params::parse(&discard), Err(ParamError::NoGeometry));
    for len in [0, 8, 16, 32] {
        let other = record(abi::PARAM_GEOMETRY, &vec![0; len]);
        assert_eq!(Params::parse(&other), Err(ParamError::Length(1)), "{len}");
    }
    let mut beyond = geometry;
    beyond[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(Params::parse(&beyond), Err(ParamError::Truncated));
}

#[test]
fn geometries() {
    for logical_block in [0, 1, 256, 513, 1000, 8192, 1 << 31, u32::MAX] {
        let wrong = Geometry {
            logical_block,
            ..GEOMETRY
        };
        assert_eq!(described(&wrong), Err(ParamError::Block), "{logical_block}");
    }
    for physical_block in [0, 512, 2048, 4097, u32::MAX] {
        let wrong = Geometry {
            physical_block,
            ..GEOMETRY
        };
        assert_eq!(
            described(&wrong),
            Err(ParamError::Block),
            "{physical_block}"
        );
    }
    for sectors in [0, 1, 7, 9, MAX_SECTORS + 1, u64::MAX, u64::MAX - 7] {
        let wrong = Geometry {
            sectors,
            ..GEOMETRY
        };
        assert_eq!(described(&wrong), Err(ParamError::Size), "{sectors}");
    }
    let largest = Geometry {
        sectors: MAX_SECTORS / 8 * 8,
        ..GEOMETRY
    };
    assert!(described(&largest).is_ok());
    for flags in [8, 16, 1 << 31] {
        let wrong = Geometry { flags, ..GEOMETRY };
        assert_eq!(described(&wrong), Err(ParamError::Reserved), "{flags}");
    }
    let wrong = Geometry {
        reserved: 1,
        ..GEOMETRY
    };
    assert_eq!(described(&wrong), Err(ParamError::Reserved));
    let read_only = Geometry {
        flags: abi::GEOMETRY_READ_ONLY,
        ..GEOMETRY
    };
    assert!(described(&read_only).expect("it is right").read_only);
}

#[test]
fn discard_limits() {
    let check = |limits: DiscardLimits| {
        let geometry = record(abi::PARAM_GEOMETRY, GEOMETRY.as_bytes());
        let discard = record(abi::PARAM_DISCARD, limits.as_bytes());
        Params::parse(&[geometry, discard].concat()).map(|_| ())
    };
    assert_eq!(check(LIMITS), Ok(()));
    for granularity in [0, 512, 4097, 4096] {
        // The last is the alignment.
        let wrong = DiscardLimits {
            granularity,
            ..LIMITS
        };
        assert_eq!(check(wrong), Err(ParamError::Discard), "{granularity}");
    }
    for alignment in [1, 512, 65536, u32::MAX] {
        let wrong = DiscardLimits {
            alignment,
            ..LIMITS
        };
        assert_eq!(check(wrong), Err(ParamError::Discard), "{alignment}");
    }
    let wrong = DiscardLimits {
        secure: 2,
        ..LIMITS
    };
    assert_eq!(check(wrong), Err(ParamError::Reserved));
    let wrong = DiscardLimits {
        reserved: 1,
        ..LIMITS
    };
    assert_eq!(check(wrong), Err(ParamError::Reserved));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// An accepted description is the one that the oracle reads from the bytes.
    #[test]
    fn descriptions_with_any_bytes_changed(
        sectors in prop_oneof![Just(8u64), Just(MAX_SECTORS / 8 * 8), any::<u64>()],
        blocks in (9u32..14, 9u32..17),
        discard in any::<bool>(),
        changes in prop::collection::vec((0usize..64, any::<u8>()), 0..4),
        cut in prop_oneof![3 => Just(usize::MAX), 1 => 0usize..64],
    ) {
        let params = Params {
            sectors,
            logical_block: 1 << blocks.0,
            physical_block: 1 << blocks.1,
            read_only: false,
            write_cache: true,
            discard: discard.then_some(Discard {
                granularity: 1 << 16,
                alignment: 0,
                secure: false,
            }),
            may_shrink: false,
        };
        let mut bytes = encode(&params);
        for (at, value) in &changes {
            if let Some(byte) = bytes.get_mut(*at) {
                *byte = *value;
            }
        }
        bytes.truncate(cut);
        tap_oracle::params(&bytes);
    }
}

#[test]
fn guests_are_told_once_what_a_disk_is() {
    let disk = described(&Geometry {
        flags: abi::GEOMETRY_WRITE_CACHE,
        ..GEOMETRY
    })
    .expect("it is right");
    let larger = Params {
        sectors: 8192,
        ..disk
    };
    assert_eq!(disk.succeeded_by(&larger), Ok(larger));
    // Guests keep the description of the first process, wherever the image lies now.
    let discard = Some(Discard {
        granularity: 4096,
        alignment: 0,
        secure: false,
    });
    for other in [
        Params {
            logical_block: 512,
            ..disk
        },
        Params {
            physical_block: 8192,
            ..disk
        },
        Params {
            write_cache: false,
            ..disk
        },
        Params { discard, ..disk },
    ] {
        assert_eq!(disk.succeeded_by(&other), Ok(disk), "{other:?}");
        let told = other.succeeded_by(&disk);
        let may = other.write_cache && other.logical_block == 4096;
        assert_eq!(told, if may { Ok(other) } else { Err(Unfit::Shape) });
    }
    for other in [
        Params {
            logical_block: 8192,
            ..disk
        },
        Params {
            read_only: true,
            ..disk
        },
        // The size is not whole blocks of the size that guests know.
        Params {
            logical_block: 512,
            sectors: 8193,
            ..disk
        },
    ] {
        assert_eq!(disk.succeeded_by(&other), Err(Unfit::Shape), "{other:?}");
    }
}

#[test]
fn a_disk_shrinks_only_if_somebody_says_so() {
    let disk = described(&GEOMETRY).expect("it is right");
    let smaller = Params {
        sectors: 2048,
        ..disk
    };
    assert_eq!(disk.succeeded_by(&smaller), Err(Unfit::Smaller));
    let forced = described(&Geometry {
        sectors: 2048,
        flags: abi::GEOMETRY_MAY_SHRINK,
        ..GEOMETRY
    })
    .expect("it is right");
    assert_eq!(disk.succeeded_by(&forced), Ok(smaller));
}
