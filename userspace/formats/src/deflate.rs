// SPDX-License-Identifier: MIT OR Apache-2.0
//! Compression with deflate.

use zlib_rs::{compress_bound, compress_slice, DeflateConfig, ReturnCode};

/// Level of compression: that of QEMU and of zlib itself.
const LEVEL: i32 = 6;
/// Readers of qcow2 have a window of 4 KiB, as QEMU's.
const QCOW2_WINDOW: i32 = 12;

/// Returns bytes compressed as a cluster of a qcow2 image has them, without a header; `None` if they do not become
/// fewer.
pub(crate) fn raw(bytes: &[u8]) -> Option<Vec<u8>> {
    let config = DeflateConfig {
        // Negative: without a header.
        window_bits: -QCOW2_WINDOW,
        ..DeflateConfig::new(LEVEL)
    };
    let mut packed = vec![0; bytes.len().checked_sub(1)?];
    let (found, code) = compress_slice(&mut packed, bytes, config);
    let len = found.len();
    (code == ReturnCode::Ok).then(|| {
        packed.truncate(len);
        packed
    })
}

/// Returns bytes compressed with a header and a checksum (RFC 1950), whether they become fewer or not.
pub(crate) fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut packed = vec![0; compress_bound(bytes.len())];
    let (found, _) = compress_slice(&mut packed, bytes, DeflateConfig::new(LEVEL));
    // With that much room it cannot fail.
    let len = found.len();
    packed.truncate(len);
    packed
}

#[cfg(test)]
mod tests {
    use super::{raw, zlib};
    use miniz_oxide::inflate::{decompress_to_vec, decompress_to_vec_zlib};

    fn text(len: usize) -> Vec<u8> {
        (0..len).map(|at| (at / 7 % 251) as u8).collect()
    }

    #[test]
    fn what_is_packed_comes_back() {
        for len in [1, 511, 65536] {
            let bytes = text(len);
            assert_eq!(decompress_to_vec_zlib(&zlib(&bytes)).unwrap(), bytes);
        }
        let bytes = text(65536);
        let packed = raw(&bytes).unwrap();
        assert!(packed.len() < bytes.len() / 8, "{}", packed.len());
        assert_eq!(decompress_to_vec(&packed).unwrap(), bytes);
    }

    #[test]
    fn what_does_not_become_less_is_not_packed() {
        let mut state = 1_u64;
        let noise: Vec<u8> = (0..65536)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                (state >> 56) as u8
            })
            .collect();
        assert_eq!(raw(&noise), None);
        assert_eq!(raw(&[]), None);
        assert_eq!(decompress_to_vec_zlib(&zlib(&noise)).unwrap(), noise);
    }

    /// A reader with a window of 4 KiB needs nothing that lies farther back.
    #[test]
    fn nothing_is_farther_back_than_the_window() {
        let mut bytes = vec![0; 16384];
        let mut state = 7_u64;
        for byte in &mut bytes[..4096] {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            *byte = (state >> 56) as u8;
        }
        // The noise again, once within reach and once not.
        let noise = bytes[..4096].to_vec();
        bytes[8192..12288].copy_from_slice(&noise);
        let packed = raw(&bytes).unwrap();
        assert!(packed.len() > 2 * 4096, "{}", packed.len());
    }
}
