// SPDX-License-Identifier: MIT OR Apache-2.0
//! The header of an encrypted image (LUKS On-Disk Format Specification 1.2): read once, checked, and only then used.

use super::hash::Hash;
use super::xts::SECTOR;
use crate::field::{array, be32, refused};
use control::Failure;

/// Bytes of it.
pub(super) const LEN: usize = 592;
pub(super) const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
/// Places for a key.
pub(super) const SLOTS: usize = 8;
pub(super) const SLOT: usize = 48;
pub(super) const AT_SLOTS: usize = 208;
/// States of a key slot.
pub(super) const USED: u32 = 0x00ac_71f3;
pub(super) const UNUSED: u32 = 0x0000_dead;
/// Stripes into which a key is split: no known program uses another number.
pub(super) const STRIPES: usize = 4000;
/// Rounds of a hash that all slots together may ask for: eight of them have as many that were made to take two seconds
/// each on a processor that does 30 million in one.
pub(super) const ROUNDS: u64 = 1 << 29;

/// Fields of a LUKS header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LuksHeader {
    pub(super) hash: Hash,
    /// Bytes of the key: two of AES.
    pub(super) key_bytes: usize,
    /// Offset of the content, in bytes.
    pub(super) payload: u64,
    pub(super) digest: [u8; 20],
    pub(super) digest_salt: [u8; 32],
    pub(super) digest_iterations: u32,
    /// Key slots in use.
    pub(super) slots: Vec<KeySlot>,
}

/// A place where the key is, encrypted with a passphrase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct KeySlot {
    pub(super) salt: [u8; 32],
    pub(super) iterations: u32,
    /// Offset of its stripes from the beginning of the header, in bytes.
    pub(super) at: u64,
}

impl LuksHeader {
    /// Returns the encryption of the content in the terms of QEMU and cryptsetup.
    #[must_use]
    pub fn cipher(&self) -> String {
        format!(
            "aes-{}-xts-plain64, {}",
            self.key_bytes * 4,
            self.hash.name()
        )
    }

    /// Keys that open the image.
    #[must_use]
    pub fn keys(&self) -> usize {
        self.slots.len()
    }

    /// The byte of the image at which its content begins.
    #[must_use]
    pub fn begin(&self) -> u64 {
        self.payload
    }

    /// Bytes of the stripes of a key.
    pub(super) fn stripes(&self) -> usize {
        self.key_bytes * STRIPES
    }

    /// Parses a header; the header and its keys may take `room` bytes.
    pub(super) fn parse(bytes: &[u8], room: u64) -> Result<Self, Failure> {
        check_version(bytes)?;
        if bytes.len() < LEN || room < LEN as u64 {
            return Err(refused("the header of LUKS is cut off"));
        }
        let (name, mode) = (text(bytes, 8)?, text(bytes, 40)?);
        if (name, mode) != ("aes", "xts-plain64") {
            return Err(Failure::unsupported(format!(
                "the image is encrypted with {name}-{mode}, and only aes-xts-plain64 is known: make another one with \
                 qemu-img create and copy it with qemu-img convert"
            )));
        }
        let hash = text(bytes, 72)?;
        let known = Hash::ALL.into_iter().find(|known| known.name() == hash);
        let hash = known.ok_or_else(|| {
            Failure::unsupported(format!(
                "the key of the image is derived with {hash}, and only {} are known: make another one with qemu-img \
                 create and copy it with qemu-img convert",
                Hash::ALL.map(Hash::name).join(", ")
            ))
        })?;
        let key_bytes = be32(bytes, 108) as usize;
        if !matches!(key_bytes, 32 | 64) {
            return Err(refused(format!(
                "the image has a key of {key_bytes} bytes, and AES in the mode XTS has one of 32 or 64"
            )));
        }
        let header = Self {
            hash,
            key_bytes,
            payload: sectors(be32(bytes, 104)),
            digest: array(bytes, 112),
            digest_salt: array(bytes, 132),
            digest_iterations: be32(bytes, 164),
            slots: slots(bytes)?,
        };
        header.check(room)?;
        Ok(header)
    }

    fn check(&self, room: u64) -> Result<(), Failure> {
        if self.slots.is_empty() {
            return Err(refused(
                "the image has no key slot in use, so nothing opens it any more",
            ));
        }
        for slot in &self.slots {
            // CAST: a few hundred KiB.
            let end = slot.at.saturating_add(self.stripes() as u64);
            if slot.at < LEN as u64 || end > room {
                return Err(refused(format!(
                    "a key slot is at {} of {room} bytes, where it cannot be: the header of LUKS is damaged",
                    slot.at
                )));
            }
        }
        let rounds = |slot: &KeySlot| self.hash.rounds(slot.iterations, self.key_bytes);
        let of_slots: u64 = self.slots.iter().map(rounds).sum();
        // Unlocking tries each slot, and compares the digest of each result.
        let of_digest = self.hash.rounds(self.digest_iterations, self.digest.len());
        let all = of_slots + of_digest * self.slots.len() as u64;
        let mut iterations = self.slots.iter().map(|slot| slot.iterations);
        if self.digest_iterations == 0 || iterations.any(|count| count == 0) {
            return Err(refused(
                "a key slot has no iterations: the LUKS header is damaged",
            ));
        }
        match all > ROUNDS {
            true => Err(refused(format!(
                "to open the image takes {all} rounds of {}, more than the {ROUNDS} that are done: give its keys a \
                 shorter iter-time with qemu-img amend, or fewer keys",
                self.hash.name()
            ))),
            false => Ok(()),
        }
    }
}

/// Is it LUKS, and of the version that is known?
fn check_version(bytes: &[u8]) -> Result<(), Failure> {
    if array(bytes, 0) != MAGIC {
        return Err(refused(
            "the image does not begin as one of LUKS does: see what it is with qemu-img info, and name its format",
        ));
    }
    match u16::from_be_bytes(array(bytes, 6)) {
        1 => Ok(()),
        2 => Err(Failure::unsupported(
            "the image is encrypted with LUKS version 2, and only version 1 is known: open it with cryptsetup and serve \
             the device that this makes with aio:, or copy that into an image of qemu-img create -f luks",
        )),
        version => Err(refused(format!(
            "the image has version {version} of LUKS, which does not exist: it is damaged"
        ))),
    }
}

fn slots(bytes: &[u8]) -> Result<Vec<KeySlot>, Failure> {
    let mut slots = Vec::new();
    for number in 0..SLOTS {
        let at = AT_SLOTS + number * SLOT;
        let stripes = be32(bytes, at + 44);
        match be32(bytes, at) {
            UNUSED => {}
            // CAST: a constant.
            USED if stripes != STRIPES as u32 => {
                return Err(refused(format!(
                    "key slot {number} has {stripes} stripes and not {STRIPES}: the header of LUKS is damaged"
                )))
            }
            USED => slots.push(KeySlot {
                salt: array(bytes, at + 8),
                iterations: be32(bytes, at + 4),
                at: sectors(be32(bytes, at + 40)),
            }),
            _ => {
                return Err(refused(format!(
                    "key slot {number} is neither used nor free: the header of LUKS is damaged"
                )))
            }
        }
    }
    Ok(slots)
}

/// Returns the bytes of that many sectors.
fn sectors(count: u32) -> u64 {
    // CAST: small constant.
    u64::from(count) * SECTOR as u64
}

/// A word of the header, which ends with a zero.
fn text(bytes: &[u8], at: usize) -> Result<&str, Failure> {
    let field = bytes.get(at..at + 32).unwrap_or_default();
    let word = field.split(|byte| *byte == 0).next().unwrap_or_default();
    let is_plain = |byte: &u8| byte.is_ascii_graphic();
    let word = std::str::from_utf8(word)
        .ok()
        .filter(|word| word.len() < 32 && word.bytes().all(|byte| is_plain(&byte)));
    word.ok_or_else(|| refused("a name in the LUKS header is not printable ASCII that ends with a zero: the header is damaged"))
}
