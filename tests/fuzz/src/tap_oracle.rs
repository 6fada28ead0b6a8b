// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! A second, independent reading of the arguments of a tap disk's process: which of them are valid, and their meaning.
//!
//! Written from the field offsets in wide integers. The bytes are those of the host.

use ring::response::ResponseStatus;
use ring::tap::abi::{
    Completion, CreateCommand, Destroy, DiscardLimits, Exchange, Geometry, MapOp, ParamHead,
    GEOMETRY_MAY_SHRINK, GEOMETRY_READ_ONLY, GEOMETRY_WRITE_CACHE, PARAM_DISCARD, PARAM_GEOMETRY,
};
use ring::tap::checked::{Commit, Malformed, MapChange, NewDisk, RequestOutcome, UserArray};
use ring::tap::extent::{BackingNumber, ExtentAccess, Source};
use ring::tap::params::{Discard, Params};
use zerocopy::{FromBytes, IntoBytes};

/// Maximum number of entries of an array of an exchange.
const MAX_ENTRIES: i128 = 4096;

fn number(bytes: &[u8], at: usize, len: usize) -> i128 {
    let mut wide = [0; 8];
    wide[..len].copy_from_slice(&bytes[at..at + len]);
    u64::from_le_bytes(wide).into()
}

/// Faults of an argument: a condition and its error.
type Defects<'a> = &'a [(bool, Malformed)];

/// Compares a check of the crate with this reading: it must take valid arguments, and refuse others for one of their
/// faults.
fn judge<T>(
    what: &impl std::fmt::Debug,
    got: Result<T, Malformed>,
    defects: Defects<'_>,
) -> Option<T> {
    let defects: Vec<Malformed> = defects.iter().filter(|d| d.0).map(|d| d.1).collect();
    match got {
        Ok(value) => {
            assert_eq!(defects, [], "accepted {what:x?}");
            Some(value)
        }
        Err(error) => {
            assert!(
                defects.contains(&error),
                "{error:?} refuses {what:x?}: {defects:?}"
            );
            None
        }
    }
}

/// Checks a completion; returns its meaning, if it is well-formed.
pub fn completion(bytes: &[u8; 16]) -> Option<Commit> {
    let [tag, flags] = [0, 2].map(|at| number(bytes, at, 2));
    let [generation, reserved] = [4, 12].map(|at| number(bytes, at, 4));
    let signed = number(bytes, 8, 4) - (number(bytes, 8, 4) >> 31 << 32);
    let in_range = match flags {
        1 => signed == 0,
        _ => (-4095..=0).contains(&signed),
    };
    let defects = [
        (reserved != 0, Malformed::Reserved),
        (flags == 2, Malformed::Unknown),
        (flags > 2, Malformed::Flags),
        (!in_range, Malformed::Range),
    ];
    let read = Completion::read_from_bytes(bytes).expect("sixteen bytes");
    assert_eq!(read.as_bytes(), bytes, "it says something else");
    let commit = judge(&read, read.check(), &defects)?;
    let meaning = match (flags, signed) {
        (1, _) => RequestOutcome::Returned,
        (_, 0) => RequestOutcome::Finished(ResponseStatus::Okay),
        (_, -95) => RequestOutcome::Finished(ResponseStatus::NotSupported),
        _ => RequestOutcome::Finished(ResponseStatus::Error),
    };
    assert_eq!(commit.outcome, meaning, "{read:x?}");
    assert_eq!(i128::from(commit.tag.number()), tag, "{read:x?}");
    assert_eq!(i128::from(commit.generation), generation, "{read:x?}");
    Some(commit)
}

/// Checks the creation of a disk; returns true if it is accepted.
pub fn create(bytes: &[u8; 48]) -> bool {
    let [version, minor, arena, seconds, deaths] = [0, 4, 8, 12, 16].map(|at| number(bytes, at, 4));
    let any = minor == (1 << 32) - 1;
    let defects = [
        (version != 1, Malformed::Version),
        (
            bytes[20..].iter().any(|byte| *byte != 0),
            Malformed::Reserved,
        ),
        (arena % 1024 != 0 || arena > 64 * 1024, Malformed::Range),
        (!any && minor >= 1 << 20, Malformed::Range),
        (deaths > 255, Malformed::Range),
    ];
    let read = CreateCommand::read_from_bytes(bytes).expect("48 bytes");
    let Some(disk) = judge(&read, read.check(), &defects) else {
        return false;
    };
    let small = |number: i128| u32::try_from(number).expect("32 bits");
    let meaning = NewDisk {
        minor: (!any).then_some(small(minor)),
        arena_kib: (arena > 0).then_some(small(arena)),
        fail_after_s: (seconds > 0).then_some(small(seconds)),
        max_deaths: u8::try_from(deaths).expect("checked above"),
    };
    assert_eq!(disk, meaning, "{read:x?}");
    true
}

/// Checks the destruction of a disk; returns true if it is accepted.
pub fn destroy(bytes: &[u8; 8]) -> bool {
    let read = Destroy::read_from_bytes(bytes).expect("8 bytes");
    let defects = [(number(bytes, 4, 4) != 0, Malformed::Reserved)];
    let minor = judge(&read, read.check(), &defects);
    assert!(minor.is_none_or(|minor| i128::from(minor) == number(bytes, 0, 4)));
    minor.is_some()
}

/// Checks the argument of an exchange; returns true if it is accepted.
pub fn exchange(bytes: &[u8; 32]) -> bool {
    let mut defects = Vec::new();
    for (at, size) in [(0, 16), (16, 2)] {
        let (addr, len) = (number(bytes, at, 8), number(bytes, at + 8, 4));
        let wraps = len > 0 && addr + len * size >= 1 << 64;
        defects.push((number(bytes, at + 12, 4) != 0, Malformed::Reserved));
        defects.push((len > MAX_ENTRIES || wraps, Malformed::Buffer));
    }
    let read = Exchange::read_from_bytes(bytes).expect("32 bytes");
    let Some(arrays) = judge(&read, read.check(), &defects) else {
        return false;
    };
    let same = |array: UserArray, at, size: u32| {
        assert_eq!(i128::from(array.addr), number(bytes, at, 8));
        assert_eq!(i128::from(array.len), number(bytes, at + 8, 4));
        // The memory that the kernel may access ends before the end of the address space.
        let end = i128::from(array.addr) + i128::from(array.bytes(size));
        assert!(array.len == 0 || end < 1 << 64, "{array:x?}");
    };
    same(arrays.commits, 0, 16);
    same(arrays.tags, 16, 2);
    true
}

/// Checks a change of mappings; returns true if it is accepted.
pub fn map_op(bytes: &[u8; 48]) -> bool {
    let [op, flags] = [0, 1].map(|at| number(bytes, at, 1));
    let (backing, generation) = (number(bytes, 2, 2), number(bytes, 4, 4));
    let [sector, sectors, offset] = [8, 16, 24].map(|at| number(bytes, at, 8));
    let (set, flush, zeroes) = (op == 1, op == 4, flags & 4 != 0);
    let range = (sector, sector + sectors);
    let unused = match op {
        1 => 0,
        4 => flags | backing | generation | offset | sector | sectors,
        _ => flags | backing | generation | offset,
    };
    let nowhere = backing == 0xffff && offset == 0;
    let somewhere = backing < 16 && offset % 512 == 0 && offset / 512 + sectors < 1 << 64;
    let defects = [
        (
            bytes[32..].iter().any(|byte| *byte != 0) || unused != 0,
            Malformed::Reserved,
        ),
        (
            ![1, 2, 4].contains(&op) || set && flags & 8 != 0,
            Malformed::Unknown,
        ),
        (set && ![1, 3, 5].contains(&flags), Malformed::Flags),
        (
            !flush && (sectors == 0 || range.1 >= 1 << 64),
            Malformed::Range,
        ),
        (
            set && !(if zeroes { nowhere } else { somewhere }),
            Malformed::Range,
        ),
    ];
    let read = MapOp::read_from_bytes(bytes).expect("48 bytes");
    let same = |got: &ring::tap::extent::Sectors| {
        assert_eq!((i128::from(got.start()), i128::from(got.end())), range);
    };
    match judge(&read, read.check(), &defects) {
        None => return false,
        Some(MapChange::Recall { range }) => {
            assert!(op == 2, "{read:x?}");
            same(&range);
        }
        Some(MapChange::Flush) => assert!(flush, "{read:x?}"),
        Some(MapChange::Set {
            extent,
            generation: got,
        }) => {
            assert!(set && i128::from(got) == generation, "{read:x?}");
            same(&extent.range);
            assert_eq!(i128::from(extent.place) * 512, offset, "{read:x?}");
            assert_eq!(
                extent.access == ExtentAccess::ReadWrite,
                flags == 3,
                "{read:x?}"
            );
            let named = u16::try_from(backing).ok().and_then(BackingNumber::new);
            assert_eq!(extent.source, named.map_or(Source::Zeroes, Source::Backing));
        }
    }
    true
}

/// Checks the records of `SET_PARAMS`; returns the disk that they describe, if they are valid.
pub fn params(bytes: &[u8]) -> Option<Params> {
    let (got, meaning) = (Params::parse(bytes), meaning_of(bytes));
    assert_eq!(
        got.as_ref().ok(),
        meaning.as_ref(),
        "{got:?} for {bytes:x?}"
    );
    let params = got.ok()?;
    assert_eq!(Params::parse(&encode(&params)), Ok(params), "said again");
    assert!(params.succeeded_by(&params).is_ok());
    Some(params)
}

fn meaning_of(bytes: &[u8]) -> Option<Params> {
    let mut bodies: [Option<&[u8]>; 2] = [None; 2];
    let mut rest = bytes;
    while !rest.is_empty() {
        let (head, behind) = rest.split_at_checked(8)?;
        let len = usize::try_from(number(head, 4, 4)).ok()?;
        let (body, behind) = behind.split_at_checked(len)?;
        rest = behind;
        let (place, size) = match number(head, 0, 4) {
            1 => (0, 24),
            2 => (1, 16),
            _ => return None,
        };
        if len != size || bodies[place].replace(body).is_some() {
            return None;
        }
    }
    let geometry = bodies[0]?;
    let sectors = number(geometry, 0, 8);
    let [logical, physical, flags, reserved] = [8, 12, 16, 20].map(|at| number(geometry, at, 4));
    let powers: Vec<i128> = (9..32).map(|bits| 1 << bits).collect();
    let right = powers[..4].contains(&logical)
        && powers.contains(&physical)
        && physical >= logical
        && sectors > 0
        // A file's size fits into 63 bits.
        && sectors * 512 < 1 << 63
        && sectors * 512 % logical == 0
        && flags <= 7
        && reserved == 0;
    let discard = match bodies[1] {
        None => None,
        Some(limits) if right => Some(meaning_of_limits(limits, logical)?),
        Some(_) => return None,
    };
    right.then_some(Params {
        sectors: sectors.try_into().ok()?,
        logical_block: logical.try_into().ok()?,
        physical_block: physical.try_into().ok()?,
        read_only: flags & 1 != 0,
        write_cache: flags & 2 != 0,
        discard,
        may_shrink: flags & 4 != 0,
    })
}

fn meaning_of_limits(limits: &[u8], block: i128) -> Option<Discard> {
    let [granularity, alignment, secure, reserved] = [0, 4, 8, 12].map(|at| number(limits, at, 4));
    let right = granularity % block == 0
        && alignment % block == 0
        && alignment < granularity
        && secure <= 1
        && reserved == 0;
    right.then_some(Discard {
        granularity: granularity.try_into().ok()?,
        alignment: alignment.try_into().ok()?,
        secure: secure == 1,
    })
}

/// Returns one record of `SET_PARAMS`.
pub fn record(kind: u32, body: &[u8]) -> Vec<u8> {
    let head = ParamHead {
        kind,
        len: body.len() as u32,
    };
    [head.as_bytes(), body].concat()
}

/// Returns a description in the bytes that a process would send.
pub fn encode(params: &Params) -> Vec<u8> {
    let flag = |on: bool, flag: u32| if on { flag } else { 0 };
    let geometry = Geometry {
        sectors: params.sectors,
        logical_block: params.logical_block,
        physical_block: params.physical_block,
        flags: flag(params.read_only, GEOMETRY_READ_ONLY)
            | flag(params.write_cache, GEOMETRY_WRITE_CACHE)
            | flag(params.may_shrink, GEOMETRY_MAY_SHRINK),
        reserved: 0,
    };
    let mut bytes = record(PARAM_GEOMETRY, geometry.as_bytes());
    if let Some(discard) = params.discard {
        let limits = DiscardLimits {
            granularity: discard.granularity,
            alignment: discard.alignment,
            secure: discard.secure.into(),
            reserved: 0,
        };
        bytes.extend(record(PARAM_DISCARD, limits.as_bytes()));
    }
    bytes
}
