// SPDX-License-Identifier: MIT OR Apache-2.0
//! Compressed clusters.

use super::header::Compression;
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
use miniz_oxide::inflate::core::{decompress, DecompressorOxide};
use miniz_oxide::inflate::TINFLStatus;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::Read;
use std::rc::Rc;

/// The content of a compressed cluster; nothing if it is damaged. `packed` may go on behind it. No more
/// memory is used than for a cluster and what the decoder itself needs.
pub(crate) fn unpack(how: Compression, packed: &[u8], cluster: usize) -> Option<Vec<u8>> {
    let mut content = vec![0; cluster];
    match how {
        Compression::Zlib => inflate(packed, &mut content)?,
        Compression::Zstd => zstd(packed, &mut content)?,
    }
    Some(content)
}

fn inflate(packed: &[u8], content: &mut [u8]) -> Option<()> {
    let mut state = Box::<DecompressorOxide>::default();
    let flags = TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let (status, _, done) = decompress(&mut state, packed, content, 0, flags);
    // A stream may have been cut where the cluster was full.
    let ended = matches!(status, TINFLStatus::Done | TINFLStatus::HasMoreOutput);
    (ended && done == content.len()).then_some(())
}

fn zstd(packed: &[u8], content: &mut [u8]) -> Option<()> {
    // A window that is larger than a cluster would be memory for nothing.
    if window(packed)? > (content.len() as u64).max(1 << 10) {
        return None;
    }
    let mut decoder = ruzstd::decoding::StreamingDecoder::new(packed).ok()?;
    decoder.read_exact(content).ok()
}

/// Bytes that the decoder of a Zstandard frame keeps, as the frame says (RFC 8878, 3.1.1.1).
fn window(frame: &[u8]) -> Option<u64> {
    if frame.get(..4)? != [0x28, 0xb5, 0x2f, 0xfd] {
        return None;
    }
    let flags = *frame.get(4)?;
    let is_single = flags & 0x20 != 0;
    if !is_single {
        let window = *frame.get(5)?;
        let base = 1_u64 << (10 + u32::from(window >> 3));
        return Some(base + base / 8 * u64::from(window & 7));
    }
    // One segment: the window is the content.
    let dictionary = [0, 1, 2, 4][usize::from(flags & 3)];
    let at = 5 + dictionary;
    let size = |bytes: usize| {
        let bytes = frame.get(at..at + bytes)?;
        Some(
            bytes
                .iter()
                .rev()
                .fold(0, |sum: u64, byte| sum << 8 | u64::from(*byte)),
        )
    };
    match flags >> 6 {
        0 => size(1),
        1 => size(2).map(|size| size + 256),
        2 => size(4),
        _ => size(8),
    }
}

/// Clusters that were unpacked lately: a guest reads them in pieces.
#[derive(Debug)]
pub(crate) struct Unpacked {
    most: usize,
    kept: RefCell<VecDeque<(u64, Rc<Vec<u8>>)>>,
}

impl Unpacked {
    /// Keeps at most `budget` bytes, but always one cluster.
    pub(crate) fn new(cluster: u64, budget: usize) -> Self {
        Self {
            // CAST: a cluster has at most 2 MiB.
            most: (budget / cluster as usize).clamp(1, 64),
            kept: RefCell::default(),
        }
    }

    /// The content of what is packed at an offset.
    pub(crate) fn get(&self, at: u64) -> Option<Rc<Vec<u8>>> {
        let mut kept = self.kept.borrow_mut();
        let place = kept.iter().position(|(offset, _)| *offset == at)?;
        let found = kept.remove(place)?;
        kept.push_back(found.clone());
        Some(found.1)
    }

    pub(crate) fn keep(&self, at: u64, content: &Rc<Vec<u8>>) {
        let mut kept = self.kept.borrow_mut();
        kept.retain(|(offset, _)| *offset != at);
        if kept.len() >= self.most {
            kept.pop_front();
        }
        kept.push_back((at, content.clone()));
    }

    /// What was packed in a range is not there any more.
    pub(crate) fn forget(&self, range: &std::ops::Range<u64>) {
        self.kept
            .borrow_mut()
            .retain(|(offset, _)| !range.contains(offset));
    }
}
