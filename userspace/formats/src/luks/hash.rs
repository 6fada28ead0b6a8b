// SPDX-License-Identifier: MIT OR Apache-2.0
//! The hashes that a header may name, and what LUKS does with them.

use hmac::digest::{Digest, FixedOutputReset};
use pbkdf2::pbkdf2_hmac;
use sha1::Sha1;
use sha2::{Sha256, Sha512};

/// A hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hash {
    Sha1,
    Sha256,
    Sha512,
}

impl Hash {
    pub(super) const ALL: [Self; 3] = [Self::Sha1, Self::Sha256, Self::Sha512];

    /// As a header has it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    /// Bytes that it makes.
    fn len(self) -> usize {
        match self {
            Self::Sha1 => 20,
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }

    /// Returns the rounds of the hash that [`derive`](Self::derive) needs for that many bytes.
    pub(super) fn rounds(self, iterations: u32, bytes: usize) -> u64 {
        // CAST: a key is short.
        u64::from(iterations) * bytes.div_ceil(self.len()) as u64
    }

    /// PBKDF2.
    pub(super) fn derive(self, secret: &[u8], salt: &[u8], iterations: u32, key: &mut [u8]) {
        match self {
            Self::Sha1 => pbkdf2_hmac::<Sha1>(secret, salt, iterations, key),
            Self::Sha256 => pbkdf2_hmac::<Sha256>(secret, salt, iterations, key),
            Self::Sha512 => pbkdf2_hmac::<Sha512>(secret, salt, iterations, key),
        }
    }

    /// Every bit of a key comes to depend on many others of it (the LUKS specification, 2.4: `H2`).
    pub(super) fn diffuse(self, key: &mut [u8]) {
        match self {
            Self::Sha1 => diffuse::<Sha1>(key),
            Self::Sha256 => diffuse::<Sha256>(key),
            Self::Sha512 => diffuse::<Sha512>(key),
        }
    }
}

fn diffuse<H: Digest + FixedOutputReset>(key: &mut [u8]) {
    let mut hash = H::new();
    for (number, block) in (0_u32..).zip(key.chunks_mut(<H as Digest>::output_size())) {
        Digest::update(&mut hash, number.to_be_bytes());
        Digest::update(&mut hash, &*block);
        // The last block may be shorter than the hash.
        let len = block.len();
        block.copy_from_slice(&Digest::finalize_reset(&mut hash)[..len]);
    }
}
