// SPDX-License-Identifier: MIT OR Apache-2.0
//! From a passphrase to the key of an image, which may take seconds.

use super::header::{KeySlot, LuksHeader};
use super::key::ImageKey;
use super::xts::Cipher;
use zeroize::Zeroizing;

/// Returns the cipher of an image whose key slots hold `materials`, in the order of the header's slots; `None` if the
/// key opens none of them.
pub(super) fn unlock(
    header: &LuksHeader,
    materials: Vec<Vec<u8>>,
    key: &ImageKey,
) -> Option<Cipher> {
    let slots = header.slots.iter().zip(materials);
    slots
        .filter_map(|(slot, material)| open(header, slot, material, key))
        .find(|master| is_that(header, master))
        .and_then(|master| Cipher::new(&master))
}

/// Returns the image's key under the assumption that the passphrase is that of `slot`.
fn open(
    header: &LuksHeader,
    slot: &KeySlot,
    material: Vec<u8>,
    key: &ImageKey,
) -> Option<Zeroizing<Vec<u8>>> {
    let mut split = Zeroizing::new(vec![0; header.key_bytes]);
    let (secret, salt) = (key.bytes(), &slot.salt);
    header
        .hash
        .derive(secret, salt, slot.iterations, &mut split);
    let cipher = Cipher::new(&split)?;
    let mut material = Zeroizing::new(material);
    cipher.decrypt(0, &mut material);
    Some(merge(header, &material))
}

/// Merges the stripes of a key, of which none may be missing: so the key is gone when a few bytes of it are erased (the
/// LUKS specification, 2.4: `AFmerge`).
fn merge(header: &LuksHeader, stripes: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut key = Zeroizing::new(vec![0; header.key_bytes]);
    for (number, stripe) in stripes.chunks_exact(header.key_bytes).enumerate() {
        if number > 0 {
            header.hash.diffuse(&mut key);
        }
        key.iter_mut()
            .zip(stripe)
            .for_each(|(byte, other)| *byte ^= other);
    }
    key
}

/// The header knows the key by a digest of it.
fn is_that(header: &LuksHeader, master: &[u8]) -> bool {
    let mut digest = Zeroizing::new([0; 20]);
    let (salt, iterations) = (&header.digest_salt, header.digest_iterations);
    header.hash.derive(master, salt, iterations, &mut *digest);
    *digest == header.digest
}
