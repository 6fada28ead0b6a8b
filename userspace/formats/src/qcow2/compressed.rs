// SPDX-License-Identifier: MIT OR Apache-2.0
//! Compressed clusters.

use super::header::Compression;
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
use miniz_oxide::inflate::core::{decompress, DecompressorOxide};
use miniz_oxide::inflate::TINFLStatus;
use ruzstd::encoding::{compress_to_vec, CompressionLevel};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::Read;
use std::rc::Rc;
use std::thread;

/// Returns a cluster compressed; `None` if it would not become smaller.
pub fn pack(how: Compression, content: &[u8]) -> Option<Vec<u8>> {
    match how {
        Compression::Zlib => crate::deflate::raw(content),
        Compression::Zstd => {
            let packed = in_thread(|| compress_to_vec(content, CompressionLevel::Fastest))?;
            (packed.len() < content.len()).then_some(packed)
        }
    }
}

/// Executes work that needs more stack than a helper thread has. `None` if there is no thread for it, so that the cluster
/// stays as it is.
fn in_thread<T: Send>(work: impl FnOnce() -> T + Send) -> Option<T> {
    /// Bytes of the stack that the encoder may need.
    const STACK: usize = 4 << 20;
    thread::scope(|scope| {
        let builder = thread::Builder::new().stack_size(STACK);
        builder.spawn_scoped(scope, work).ok()?.join().ok()
    })
}

/// Returns the content of a compressed cluster; `None` if it is damaged. `packed` may have more bytes behind the
/// cluster. Its memory is limited to one cluster and the decoder's own.
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

/// Decodes as many frames as fill a cluster. Their encoder may not have known the size, so they may claim a much larger
/// window: the decoder needs no more than a cluster, because there is no earlier content.
fn zstd(packed: &[u8], content: &mut [u8]) -> Option<()> {
    let mut packed = packed.to_vec();
    let (mut at, mut done) = (0, 0);
    while done < content.len() {
        let frame = packed.get_mut(at..)?;
        if let Some(len) = skipped(frame) {
            at = at.checked_add(len)?;
            continue;
        }
        narrow(frame, content.len() as u64)?;
        let mut rest: &[u8] = frame;
        let mut decoder = ruzstd::decoding::StreamingDecoder::new(&mut rest).ok()?;
        while done < content.len() {
            match decoder.read(&mut content[done..]).ok()? {
                0 => break,
                count => done += count,
            }
        }
        drop(decoder);
        let rest = rest.len();
        at = packed.len() - rest;
    }
    Some(())
}

/// Returns the length in bytes of a skippable frame (RFC 8878, 3.1.2); `None` for another frame.
fn skipped(frame: &[u8]) -> Option<usize> {
    let magic = u32::from_le_bytes(*frame.first_chunk()?);
    let len = u32::from_le_bytes(*frame.get(4..)?.first_chunk()?);
    (magic & 0xffff_fff0 == 0x184d_2a50).then_some(8 + len as usize)
}

/// Changes a frame's header so that the decoder keeps no more than a cluster (RFC 8878, 3.1.1.1); `None` if it is no
/// frame, or holds more than a cluster.
fn narrow(frame: &mut [u8], cluster: u64) -> Option<()> {
    if frame.get(..4)? != [0x28, 0xb5, 0x2f, 0xfd] {
        return None;
    }
    let flags = *frame.get(4)?;
    let is_single = flags & 0x20 != 0;
    if !is_single {
        // Blocks have at most 128 KiB, or as much as the window.
        let needed = cluster.max(128 << 10).next_power_of_two();
        // CAST: a cluster has at most 2 MiB.
        let most = ((needed.trailing_zeros() - 10) << 3) as u8;
        let window = frame.get_mut(5)?;
        *window = (*window).min(most);
        return Some(());
    }
    // A frame of one segment has a window of the size of its content.
    let dictionary = [0, 1, 2, 4][usize::from(flags & 3)];
    let at = 5 + dictionary;
    let size = |bytes: usize| {
        let bytes = frame.get(at..at + bytes)?;
        let number = bytes.iter().rev();
        Some(number.fold(0, |sum: u64, byte| sum << 8 | u64::from(*byte)))
    };
    let len = match flags >> 6 {
        0 => size(1),
        1 => size(2).map(|size| size + 256),
        2 => size(4),
        _ => size(8),
    };
    (len? <= cluster.max(1 << 10)).then_some(())
}

/// Clusters that were unpacked lately: a guest reads them in pieces.
#[derive(Debug)]
pub(crate) struct UnpackedClusters {
    most: usize,
    kept: RefCell<VecDeque<(u64, Rc<Vec<u8>>)>>,
}

impl UnpackedClusters {
    /// Keeps at most `budget` bytes, but always one cluster.
    pub(crate) fn new(cluster: u64, budget: usize) -> Self {
        Self {
            // CAST: a cluster has at most 2 MiB.
            most: (budget / cluster as usize).clamp(1, 64),
            kept: RefCell::default(),
        }
    }

    /// Returns the unpacked content of the cluster at an offset.
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

    /// Drops the unpacked content of clusters whose packed bytes lie in `range`.
    pub(crate) fn forget(&self, range: &std::ops::Range<u64>) {
        self.kept
            .borrow_mut()
            .retain(|(offset, _)| !range.contains(offset));
    }
}

#[cfg(test)]
mod tests {
    use super::{unpack, Compression};
    use ruzstd::encoding::{compress_to_vec, CompressionLevel};

    const CLUSTER: usize = 64 << 10;

    fn frame(content: &[u8]) -> Vec<u8> {
        let frame = compress_to_vec(content, CompressionLevel::Fastest);
        assert_eq!(frame[4] & 0x20, 0, "it has a window");
        frame
    }

    #[test]
    fn windows_may_be_larger_than_a_cluster() {
        let content: Vec<u8> = (0..CLUSTER).map(|at| (at / 7 % 251) as u8).collect();
        // 128 KiB, 2 MiB as an encoder of a stream has it, the most that QEMU decodes, and the most there is.
        for window in [0x38, 0x58, 0x88, 0xff] {
            let mut packed = frame(&content);
            packed[5] = window;
            // The bytes behind it belong to the next cluster.
            packed.extend([0xaa; 512]);
            let found = unpack(Compression::Zstd, &packed, CLUSTER);
            assert!(found.as_ref() == Some(&content), "{window:#x}");
        }
    }

    #[test]
    fn frames_follow_each_other() {
        let content: Vec<u8> = (0..CLUSTER).map(|at| (at / 7 % 251) as u8).collect();
        let (one, other) = content.split_at(10_000);
        let skipped = [&[0x5a, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
        let frames = [frame(one), skipped, frame(other)];
        let packed = frames.concat();
        let found = unpack(Compression::Zstd, &packed, CLUSTER);
        assert!(found.as_ref() == Some(&content));
        // Less than a cluster is damage, wherever it ends.
        let whole = [frame(one), frame(&other[1..])].concat();
        for packed in [
            &frames[0][..],
            &whole,
            &packed[..packed.len() - 9],
            &[],
            &[0; 600],
        ] {
            assert_eq!(unpack(Compression::Zstd, packed, CLUSTER), None);
        }
    }
}
