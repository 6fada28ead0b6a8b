// SPDX-License-Identifier: MIT OR Apache-2.0
//! Finds the parts of a buffer that have to be stored.

use diskio::Data;
use std::ops::Range;

/// Bytes that are looked at as one.
const BLOCK: usize = 4096;
/// Gaps shorter than this between data are stored all the same, because many small writes and many small holes are
/// worse.
const GAP: usize = 64 << 10;

/// Action on a part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Run {
    /// Store its bytes.
    Data(Range<usize>),
    /// The range is to become zeroes.
    Zero(Range<usize>),
}

/// The parts of `data` that are not as `below` has them, which is as long, or not zeroes if there is nothing below.
pub(crate) fn runs(data: &Data, below: Option<&Data>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let (mut seen, mut its) = ([0; BLOCK], [0; BLOCK]);
    for at in (0..data.len()).step_by(BLOCK) {
        let range = at..data.len().min(at + BLOCK);
        let block = &mut seen[..range.len()];
        data.read(at, block);
        let is_zero = is_zero(block);
        let is_same = match below {
            Some(below) => {
                let its = &mut its[..range.len()];
                below.read(at, its);
                its == block
            }
            None => is_zero,
        };
        if is_same {
            continue;
        }
        match (is_zero, runs.last_mut()) {
            (false, Some(Run::Data(last))) if at - last.end < GAP => last.end = range.end,
            (true, Some(Run::Zero(last))) if at == last.end => last.end = range.end,
            (false, _) => runs.push(Run::Data(range)),
            (true, _) => runs.push(Run::Zero(range)),
        }
    }
    runs
}

/// There is nothing but zeroes.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    /// Bytes that are looked at together, which the compiler does with its widest instructions.
    const TOGETHER: usize = 128;
    let is_zero = |part: &[u8]| part.iter().fold(0, |all, byte| all | byte) == 0;
    let mut parts = bytes.chunks_exact(TOGETHER);
    parts.by_ref().all(is_zero) && is_zero(parts.remainder())
}

/// The first byte in which two disks differ that are read side by side; what is missing is zeroes.
pub(crate) fn difference(one: Option<&Data>, other: Option<&Data>) -> Option<usize> {
    /// Bytes that are copied out at a time, so that they stay in the processor's first cache.
    const PART: usize = 8 << 10;
    let len = one.or(other)?.len();
    let (mut seen, mut its) = ([0; PART], [0; PART]);
    for at in (0..len).step_by(PART) {
        let part = ..PART.min(len - at);
        let place = match (one, other) {
            (Some(one), Some(other)) => {
                one.read(at, &mut seen[part]);
                other.read(at, &mut its[part]);
                if seen[part] == its[part] {
                    continue;
                }
                seen[part].iter().zip(&its[part]).position(|(a, b)| a != b)
            }
            (Some(data), None) | (None, Some(data)) => {
                data.read(at, &mut seen[part]);
                if is_zero(&seen[part]) {
                    continue;
                }
                seen[part].iter().position(|byte| *byte != 0)
            }
            (None, None) => None,
        };
        return place.map(|place| at + place);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::Run::{Data, Zero};
    use super::{difference, is_zero, runs};
    use diskio::Data as Buffer;

    fn bytes(bytes: &[u8]) -> Buffer {
        Buffer::copied(bytes).unwrap()
    }

    fn blocks(numbers: &[u8]) -> Buffer {
        let all: Vec<u8> = numbers.iter().flat_map(|number| [*number; 4096]).collect();
        bytes(&all)
    }

    #[test]
    fn zeroes_are_left_out() {
        assert_eq!(runs(&blocks(&[0, 0]), None), []);
        assert_eq!(runs(&blocks(&[0, 1, 0]), None), [Data(4096..8192)]);
        // A small hole in data is copied.
        assert_eq!(runs(&blocks(&[1, 0, 1]), None), [Data(0..12288)]);
        let large = blocks(&[0; 32]);
        large.fill(0, 1, 1);
        large.fill(31 * 4096, 1, 1);
        let ends = [Data(0..4096), Data(31 * 4096..32 * 4096)];
        assert_eq!(runs(&large, None), ends);
        // The last block may be a part of one.
        assert_eq!(runs(&bytes(&[1; 512]), None), [Data(0..512)]);
        assert_eq!(runs(&bytes(&[0; 512]), None), []);
    }

    #[test]
    fn what_is_below_is_left_out() {
        let below = blocks(&[1, 1, 0, 2]);
        assert_eq!(runs(&below, Some(&below)), []);
        assert_eq!(
            runs(&blocks(&[1, 0, 0, 2]), Some(&below)),
            [Zero(4096..8192)]
        );
        assert_eq!(
            runs(&blocks(&[0, 0, 3, 2]), Some(&below)),
            [Zero(0..8192), Data(8192..12288)]
        );
        // A block that becomes zeroes is never within data.
        assert_eq!(
            runs(&blocks(&[3, 0, 3, 2]), Some(&below)),
            [Data(0..4096), Zero(4096..8192), Data(8192..12288)]
        );
    }

    #[test]
    fn every_byte_counts() {
        for at in 0..300 {
            let mut bytes = [0; 300];
            assert!(is_zero(&bytes));
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{at}");
        }
    }

    #[test]
    fn holes_are_zeroes() {
        let find = |one: Option<&[u8]>, other: Option<&[u8]>| {
            difference(one.map(bytes).as_ref(), other.map(bytes).as_ref())
        };
        assert_eq!(find(None, None), None);
        assert_eq!(find(Some(&[0, 0]), None), None);
        assert_eq!(find(None, Some(&[0, 1])), Some(1));
        assert_eq!(find(Some(&[1, 2, 3]), Some(&[1, 2, 4])), Some(2));
        assert_eq!(find(Some(&[1, 2]), Some(&[1, 2])), None);
        // The difference is in any part, and the first one counts.
        for at in [0, 8191, 8192, 20_000, 24_999] {
            let (one, mut other) = (vec![7; 25_000], vec![7; 25_000]);
            other[at] = 8;
            other[24_999] = 8;
            assert_eq!(find(Some(&one), Some(&other)), Some(at));
            let mut zeroes = vec![0; 25_000];
            zeroes[at] = 1;
            assert_eq!(find(None, Some(&zeroes)), Some(at));
        }
    }
}
