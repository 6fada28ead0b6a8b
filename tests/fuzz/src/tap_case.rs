// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The body of the fuzz target `tap`: calls of a hostile process of a tap disk.
//!
//! An input is a history of a disk, or the bytes of one argument. The shadow and its model execute a history; the crate
//! and the oracle read an argument.

use ring::response::ResponseStatus;
use ring::tap::checked::{Fence, RequestOutcome};
use ring::tap::extent::{ExtentAccess, Sectors};
use ring::tap::params::{Discard, Params};
use ring::tap::shadow::{Op, PostedRequest};

use crate::input::Input;
use crate::tap_oracle;
use crate::tap_pair::{Pair, ShadowStep, TapEvents, OVER, QUEUES, ZEROES};

/// Kind of an input, and its result.
#[derive(Clone, Copy, Debug)]
pub enum Ran {
    /// A history.
    History(TapEvents),
    /// One argument of this kind, below [`ARGUMENTS`], and whether it was accepted.
    Argument(usize, bool),
}

/// Number of kinds of arguments.
pub const ARGUMENTS: usize = 6;
/// Bytes of the record that comes first in a description.
const GEOMETRY_LEN: usize = 32;

/// Runs one input. Input that is too short is ignored.
pub fn run(data: &[u8]) -> Option<Ran> {
    let mut input = Input::new(data);
    let kind = input.byte()?;
    if kind < 128 {
        return argument(usize::from(kind) % ARGUMENTS, &mut input);
    }
    history(&mut input).map(Ran::History)
}

/// Reads an argument; most are adjusted so that only a few fields are wrong.
fn argument(kind: usize, input: &mut Input<'_>) -> Option<Ran> {
    let bent = input.byte()? % 8 != 0;
    let accepted = match kind {
        0 => tap_oracle::completion(&completion(input, bent, None)?).is_some(),
        1 => tap_oracle::create(&create(input, bent)?),
        2 => {
            let mut bytes: [u8; 8] = input.bytes()?;
            if bent {
                bytes[4..].fill(0);
            }
            tap_oracle::destroy(&bytes)
        }
        3 => tap_oracle::exchange(&exchange(input, bent)?),
        4 => tap_oracle::map_op(&map_op(input, bent)?),
        _ if bent => tap_oracle::params(&description(input)?).is_some(),
        _ => tap_oracle::params(input.rest()).is_some(),
    };
    Some(Ran::Argument(kind, accepted))
}

/// Returns a completion; if `bent`, one that may name this delivery.
fn completion(input: &mut Input<'_>, bent: bool, delivery: Option<(u16, u32)>) -> Option<[u8; 16]> {
    let (how, mut bytes): (u8, [u8; 16]) = (input.byte()?, input.bytes()?);
    if !bent {
        return Some(bytes);
    }
    if let Some((tag, generation)) = delivery {
        let generation = generation.wrapping_sub(u32::from(how % 16 == 0));
        bytes[..2].copy_from_slice(&tag.to_le_bytes());
        bytes[4..8].copy_from_slice(&generation.to_le_bytes());
    }
    bytes[2] = [0, 0, 0, 0, 0, 1, 1, 2][usize::from(bytes[2]) % 8];
    bytes[3] = 0;
    // Around the ends of the range of results, and values with a special meaning.
    let result = match how / 16 {
        0 => i32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]),
        1 => -95,
        2 => -4090 - i32::from(bytes[8] % 8),
        3 => i32::from(bytes[8] % 3) - 1,
        4 => -i32::from(bytes[8]),
        _ => 0,
    };
    bytes[8..12].copy_from_slice(&result.to_le_bytes());
    if how % 16 > 1 {
        bytes[12..].fill(0);
    }
    Some(bytes)
}

fn create(input: &mut Input<'_>, bent: bool) -> Option<[u8; 48]> {
    let (how, mut bytes): (u8, [u8; 48]) = (input.byte()?, input.bytes()?);
    if bent {
        let version = 1 + u32::from(how % 32 == 0);
        bytes[..4].copy_from_slice(&version.to_le_bytes());
        match how / 64 {
            0 => bytes[4..8].fill(0xff),
            1 => {
                // On both sides of the largest number.
                let minor = (1 << 20) - 4 + u32::from(bytes[4] % 8);
                bytes[4..8].copy_from_slice(&minor.to_le_bytes());
            }
            2 => bytes[6..8].fill(0),
            _ => {}
        }
        let kib = u32::from(bytes[8] % 70) * 1024 + u32::from(bytes[9] / 250);
        bytes[8..12].copy_from_slice(&kib.to_le_bytes());
        // Deaths: around the maximum, and 0.
        let deaths = [0, 3, 255, 256][usize::from(bytes[16]) % 4];
        bytes[16..20].copy_from_slice(&u32::to_le_bytes(deaths));
        let wrong = usize::from(how) % 32;
        bytes[20..].iter_mut().enumerate().for_each(|(at, byte)| {
            *byte *= u8::from(at == wrong && how & 32 != 0);
        });
    }
    Some(bytes)
}

fn exchange(input: &mut Input<'_>, bent: bool) -> Option<[u8; 32]> {
    let (how, mut bytes): (u8, [u8; 32]) = (input.byte()?, input.bytes()?);
    if bent {
        for (at, how) in [(0, how % 16), (16, how / 16)] {
            // Lengths around the maximum, and addresses so near the end that it matters.
            bytes[at + 10..at + 12].fill(0);
            bytes[at + 9] %= 17;
            if how % 2 == 0 {
                bytes[at + 2..at + 8].fill(0xff);
            }
            if how != 15 {
                bytes[at + 12..at + 16].fill(0);
            }
        }
    }
    Some(bytes)
}

fn map_op(input: &mut Input<'_>, bent: bool) -> Option<[u8; 48]> {
    let (how, mut bytes): (u8, [u8; 48]) = (input.byte()?, input.bytes()?);
    if bent {
        bytes[0] = [1, 1, 1, 1, 2, 4, 3, 0][usize::from(bytes[0]) % 8];
        bytes[1] = [1, 1, 3, 3, 5, 5, 9, 2][usize::from(bytes[1]) % 8];
        bytes[2] %= 18;
        bytes[3] = 0;
        // Ranges that end near the end of the numbers, and offsets in whole sectors and beside them.
        bytes[18 + usize::from(how % 8) / 2..24].fill(0);
        bytes[24] &= u8::from(how % 16 == 0);
        bytes[25] &= 0xfe;
        bytes[32..].fill(0);
        let (recall, flush) = (bytes[0] == 2, bytes[0] == 4);
        if (recall || flush) && how < 240 {
            bytes[1..8].fill(0);
            bytes[if flush { 8 } else { 24 }..32].fill(0);
        } else if bytes[1] == 5 && how < 240 {
            bytes[2..4].fill(0xff);
            bytes[24..32].fill(0);
        }
        // A byte of the reserved fields.
        if how % 8 == 7 {
            bytes[32 + usize::from(how / 16)] = how;
        }
    }
    Some(bytes)
}

/// Returns the records of a disk that is valid or nearly so, with some bytes changed.
fn description(input: &mut Input<'_>) -> Option<Vec<u8>> {
    let [size, blocks, flags, discards] = input.bytes()?;
    let sectors = u64::from_le_bytes(input.bytes()?) >> (size % 64);
    let whole = if size < 192 { !7 } else { !0 };
    let units = |number: u8| u32::from(number) << (9 + blocks % 5);
    let params = Params {
        sectors: sectors & whole,
        logical_block: 512 << (blocks % 5),
        physical_block: 512 << (blocks / 16 % 8),
        read_only: flags & 1 != 0,
        write_cache: flags & 2 != 0,
        discard: (flags & 4 != 0).then_some(Discard {
            granularity: units(discards / 16),
            alignment: units(discards % 4),
            secure: flags & 8 != 0,
        }),
        may_shrink: size & 1 != 0,
    };
    let mut bytes = tap_oracle::encode(&params);
    if flags & 16 != 0 && params.discard.is_some() {
        // Swap the order of the records.
        bytes.rotate_left(GEOMETRY_LEN);
    } else if blocks >= 240 {
        bytes.extend_from_within(..GEOMETRY_LEN);
    }
    for _ in 0..flags / 64 {
        let [at, value] = input.bytes()?;
        let at = usize::from(at) % bytes.len();
        bytes[at] = value;
    }
    if flags & 32 != 0 {
        bytes.truncate(usize::from(input.byte()?));
    }
    Some(bytes)
}

fn history(input: &mut Input<'_>) -> Option<TapEvents> {
    let shape = input.byte()?;
    let tags = [1, 2, 3, 8, 24, 40][usize::from(shape) % 6];
    let limit = [0, 0, 1, 2, 3][usize::from(input.byte()?) % 5];
    let claim = ShadowStep::Claim(fence(input.byte()?), 0);
    let start = [
        ShadowStep::Limit(limit),
        ShadowStep::Open,
        claim,
        ShadowStep::Start(0),
    ];
    let mut pair = match shape / 64 {
        0 => Pair::new(tags),
        // Enough leaves that none is forgotten.
        more => Pair::mapped(tags, 64, u16::from(more).div_ceil(2)),
    };
    pair = pair.after(&start);
    pair.apply(match shape & 48 {
        0 | 16 => ShadowStep::Set(near()?, ExtentAccess::ReadWrite, 0, 0),
        32 => ShadowStep::Scatter(0),
        _ => ShadowStep::Set(near()?, ExtentAccess::Read, ZEROES, 0),
    });
    while step(&mut pair, tags, input).is_some() {}
    Some(pair.drain())
}

/// Returns when the I/O of a process is over, as it claims.
fn fence(value: u8) -> Fence {
    match value % 8 {
        0..=3 => Fence::Local,
        4..=6 => Fence::Session {
            settle_ms: 1 + u32::from(value / 8),
        },
        _ => Fence::None,
    }
}

/// Takes the next step, or several that belong together.
fn step(pair: &mut Pair, tags: u16, input: &mut Input<'_>) -> Option<()> {
    let [what, value] = input.bytes()?;
    let queue = u16::from(value) % QUEUES;
    // Mostly from the current process.
    let ago = u64::from(value / 248);
    let some = match value % 4 {
        0 => usize::MAX,
        few => usize::from(few),
    };
    let kinds = if pair.is_mapped() { 96 } else { 64 };
    match what % kinds {
        0..=17 => post(pair, tags, value, input)?,
        18 => pair.apply(ShadowStep::Claim(fence(value), u64::from(value == 255))),
        19 => pair.apply(ShadowStep::Pass(u32::from(value / 4))),
        20..=28 => pair.apply(ShadowStep::Deliver(some, ago)),
        29..=39 => {
            let Some((tag, _)) = aim(pair, tags, value) else {
                return Some(());
            };
            let how = input.byte()?;
            let outcome = match how % 8 {
                0 => RequestOutcome::Returned,
                1 => RequestOutcome::Finished(ResponseStatus::Error),
                2 => RequestOutcome::Finished(ResponseStatus::NotSupported),
                _ => RequestOutcome::Finished(ResponseStatus::Okay),
            };
            let beside = match how / 16 {
                0 => 1,
                1 => u32::MAX,
                _ => 0,
            };
            let commit = ShadowStep::Commit(tag, outcome, beside, ago);
            pair.apply(commit);
            if how & 8 != 0 {
                pair.apply(commit);
            }
        }
        40..=44 => {
            let delivery = aim(pair, tags, value);
            let bytes = completion(input, value < 240, delivery)?;
            pair.apply(ShadowStep::Say(bytes, ago));
        }
        45..=49 => pair.apply(ShadowStep::Reap(queue, some)),
        50 => pair.apply(ShadowStep::Look),
        51 => pair.apply(ShadowStep::Open),
        52 => pair.apply(ShadowStep::Start(ago)),
        53 => pair.apply(ShadowStep::Close),
        54 => pair.apply(ShadowStep::Quiet),
        55 => pair.apply(ShadowStep::Withdraw(queue)),
        56..=58 => pair.apply(ShadowStep::Orphan(queue)),
        59 => pair.apply(ShadowStep::Fail(some)),
        60 => {
            // A death, after which no process starts in time.
            let begin = [ShadowStep::Close].into_iter().chain(OVER);
            begin
                .chain([ShadowStep::Fail(some)])
                .for_each(|step| pair.apply(step));
        }
        61 => pair.apply(ShadowStep::Excuse(ago)),
        what @ 64.. => mapped(pair, tags, [what % 32, value], input)?,
        _ => {
            let begin = [ShadowStep::Close]
                .into_iter()
                .chain(OVER)
                .chain([ShadowStep::Open]);
            let claim = ShadowStep::Claim(fence(value), 0);
            let set = ShadowStep::Set(near()?, ExtentAccess::ReadWrite, 0, 0);
            begin
                .chain([claim, ShadowStep::Start(0), set])
                .for_each(|step| pair.apply(step));
        }
    }
    Some(())
}

/// Returns the range that most requests are in.
fn near() -> Option<Sectors> {
    Sectors::new(0, 1 << 14)
}

/// Takes a step that concerns mappings.
fn mapped(pair: &mut Pair, tags: u16, [what, value]: [u8; 2], input: &mut Input<'_>) -> Option<()> {
    let queue = u16::from(value) % QUEUES;
    let step = match what {
        0..=9 => ShadowStep::Begin(u16::from(value) % (tags + 1), queue, request(input)?.1),
        10..=14 => ShadowStep::Resume(queue, [usize::MAX, 1][usize::from(value / 4) % 2]),
        15..=23 => {
            let begun = pair.begun();
            let Some(tag) = begun.get(usize::from(value / 4) % begun.len().max(1)) else {
                return Some(());
            };
            let status = match value % 8 {
                0 | 1 => ResponseStatus::Error,
                2 => ResponseStatus::NotSupported,
                _ => ResponseStatus::Okay,
            };
            ShadowStep::End(*tag, status)
        }
        24..=28 => {
            let range = if value < 128 { near()? } else { range(input)? };
            let (backing, ago) = (u16::from(value / 16) % (ZEROES + 1), u32::from(value / 224));
            let access = match value % 2 {
                1 if backing != ZEROES => ExtentAccess::ReadWrite,
                _ => ExtentAccess::Read,
            };
            ShadowStep::Set(range, access, backing, ago)
        }
        29 if value >= 192 => ShadowStep::Scatter(u16::from(value) % 2),
        29 => ShadowStep::Recall(range(input)?),
        30 => ShadowStep::SetFlush,
        31 if value < 32 => ShadowStep::Remove(u16::from(value) % 2),
        _ => ShadowStep::Add(u16::from(value) % 2),
    };
    pair.apply(step);
    Some(())
}

/// Returns a part of that range, or the whole disk.
fn range(input: &mut Input<'_>) -> Option<Sectors> {
    let [place, size] = input.bytes()?.map(u64::from);
    let sectors = match size % 4 {
        0 => 8,
        1 => size,
        2 => size * 64,
        _ => return Some(Sectors::ALL),
    };
    Sectors::new(place * 64, sectors.max(1))
}

/// Returns a tag that the process has, or any, and its latest generation.
fn aim(pair: &Pair, tags: u16, value: u8) -> Option<(u16, u32)> {
    let held = pair.held();
    let tag = match value % 8 {
        0 => u16::from(value / 8) % (tags + 1),
        1 if value > 128 => u16::MAX - u16::from(value),
        _ => *held.get(usize::from(value / 8) % held.len().max(1))?,
    };
    Some((tag, pair.generation(tag)))
}

fn post(pair: &mut Pair, tags: u16, value: u8, input: &mut Input<'_>) -> Option<()> {
    let tag = u16::from(value) % (tags + 1);
    let (queue, request) = request(input)?;
    pair.apply(ShadowStep::Post(tag, queue, request));
    Some(())
}

/// Returns a request and its queue.
fn request(input: &mut Input<'_>) -> Option<(u16, PostedRequest)> {
    let [op, place, size, near] = input.bytes()?;
    let queue = match op / 8 {
        0 => 63,
        1 => 64,
        other => u16::from(other) % QUEUES,
    };
    let near = u64::from(near);
    // Sizes around those of the granules of the index, at places where these meet.
    let request = PostedRequest {
        op: match op % 8 {
            0..=2 => Op::Write,
            3 | 4 => Op::Read,
            5 => Op::Flush,
            6 => Op::Discard,
            _ if size & 64 == 0 => Op::WriteZeroes,
            _ => Op::SecureDiscard,
        },
        preflush: size & 32 != 0 && op % 8 < 3,
        fua: size & 16 != 0,
        sector: match place % 8 {
            0..=2 => u64::from(place / 8),
            3 | 4 => 58 + near % 12,
            5 => 4085 + near % 20,
            6 => 8185 + near % 10,
            // At the end of the largest disk.
            _ => (1 << 54) - 128 + near % 128,
        },
        sectors: match size % 8 {
            0..=3 => near % 16,
            4 | 5 => 60 + near % 10,
            6 => 4090 + near % 10,
            _ => 1 << 21,
        },
        segments: u16::from(size),
    };
    Some((queue, request))
}
