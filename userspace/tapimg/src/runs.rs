// SPDX-License-Identifier: MIT OR Apache-2.0
//! Finds the parts of a buffer that have to be stored.

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

/// The parts of `bytes` that are not as `below` has them, or not zeroes if there is nothing below.
pub(crate) fn runs(bytes: &[u8], below: Option<&[u8]>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (number, block) in bytes.chunks(BLOCK).enumerate() {
        let at = number * BLOCK;
        let range = at..at + block.len();
        let is_zero = is_zero(block);
        let is_same = match below {
            Some(below) => below.get(range.clone()) == Some(block),
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
    let mut words = bytes.chunks_exact(16);
    words.by_ref().all(|word| word == [0; 16]) && words.remainder().iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::Run::{Data, Zero};
    use super::{is_zero, runs};

    fn blocks(numbers: &[u8]) -> Vec<u8> {
        numbers.iter().flat_map(|number| [*number; 4096]).collect()
    }

    #[test]
    fn zeroes_are_left_out() {
        assert_eq!(runs(&blocks(&[0, 0]), None), []);
        assert_eq!(runs(&blocks(&[0, 1, 0]), None), [Data(4096..8192)]);
        // A small hole in data is copied.
        assert_eq!(runs(&blocks(&[1, 0, 1]), None), [Data(0..12288)]);
        let mut large = blocks(&[0; 32]);
        large[0] = 1;
        large[31 * 4096] = 1;
        let ends = [Data(0..4096), Data(31 * 4096..32 * 4096)];
        assert_eq!(runs(&large, None), ends);
        // The last block may be a part of one.
        assert_eq!(runs(&[1; 512], None), [Data(0..512)]);
        assert_eq!(runs(&[0; 512], None), []);
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
        for at in 0..37 {
            let mut bytes = [0; 37];
            assert!(is_zero(&bytes));
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{at}");
        }
    }
}
