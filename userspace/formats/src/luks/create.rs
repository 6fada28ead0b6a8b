// SPDX-License-Identifier: MIT OR Apache-2.0
//! The header of a new image: a key of its own, by chance, and the first slot, which a passphrase opens.

use super::hash::Hash;
use super::header::{
    KeySlot, LuksHeader, AT_SLOTS, LEN, MAGIC, ROUNDS, SLOT, SLOTS, STRIPES, UNUSED, USED,
};
use super::key::ImageKey;
use super::xts::{Cipher, SECTOR};
use crate::field::{failed, put, refused};
use crate::overlay::fill_by_chance;
use crate::Storage;
use control::Failure;
use diskio::{Bytes, Errno};
use rustix::time::{clock_gettime, ClockId};
use std::time::Duration;
use zeroize::Zeroizing;

/// Encryption of a new image: AES-256 in the mode XTS, the default of QEMU and cryptsetup.
#[derive(Clone, Debug)]
pub struct Encryption {
    /// Key that opens the image.
    pub key: ImageKey,
    /// Time that a processor of this host needs to try a passphrase.
    pub iter_time: Duration,
}

/// Default time to unlock, as QEMU and cryptsetup choose it.
pub const ITER_TIME: Duration = Duration::from_secs(2);

const HASH: Hash = Hash::Sha256;
/// Bytes of the key: two of AES-256.
const KEY: usize = 64;
/// Bytes of the stripes of a key slot.
const MATERIAL: usize = KEY * STRIPES;
/// Alignment in bytes of the stripes of a key slot.
const ALIGN: usize = 4096;
const _: () = assert!(LEN <= ALIGN, "the first slot is behind the header");
/// Offset of the content: behind all key slots, and a multiple of the block of any device.
pub(crate) const PAYLOAD: u64 = 2 << 20;
/// Minimum number of iterations, whatever time is given: fewer are not secure.
const FEWEST: u64 = 1000;
/// Rounds for the slot, and for the digest of the key, at most: eight such slots are still opened.
const MOST_OF_SLOT: u64 = ROUNDS / 64;
const MOST_OF_DIGEST: u64 = ROUNDS / 512;
/// The digest gets a part of the time, because all slots need it.
const DIGEST_PART: u32 = 8;
/// Maximum time of a measurement.
const MEASURED: Duration = Duration::from_millis(200);

/// Makes an image with a disk of `size` bytes in `file`, which must be empty or a device. Sectors that the guest has
/// not written yet have undefined content. It is durable when this returns.
///
/// # Errors
/// The size is no multiple of 512 bytes, `file` has no room, or its storage fails.
pub async fn create<S: Storage>(
    file: &S,
    size: u64,
    encryption: &Encryption,
) -> Result<(), Failure> {
    if size == 0 || size % 512 != 0 {
        return Err(refused(format!(
            "a disk of {size} bytes has no whole sectors: give a multiple of 512"
        )));
    }
    let end = PAYLOAD.saturating_add(size);
    if file.is_fixed() {
        let room = file.size().map_err(failed("cannot see the size"))?;
        if room < end {
            return Err(refused(format!(
                "the device has {room} bytes, and the disk with its header needs {end}: make the device larger"
            )));
        }
    }
    let head = header(file, encryption).await?;
    let written = write(file, end, &head).await;
    written.map_err(failed("cannot write the image"))
}

/// The header is stored last, because a file without one is no image.
async fn write<S: Storage>(file: &S, end: u64, head: &[u8]) -> Result<(), Errno> {
    if !file.is_fixed() {
        file.set_size(end).await?;
    }
    file.write_zeroes(0, PAYLOAD).await?;
    let (head, keys) = head.split_at(ALIGN);
    // CAST: a constant.
    file.write(ALIGN as u64, Bytes::copied(keys)?).await?;
    file.flush().await?;
    file.write(0, Bytes::copied(head)?).await?;
    file.flush().await
}

/// The header of a new image and its key slot, computed elsewhere; up to [`PAYLOAD`] zeroes follow it.
pub(crate) async fn header<S: Storage>(
    file: &S,
    encryption: &Encryption,
) -> Result<Vec<u8>, Failure> {
    let its = encryption.clone();
    let made = file.elsewhere(move || made(&its)).await;
    let bytes = made.map_err(failed("cannot make a key"))??;
    // The new header must be readable, so it has to pass the checks for foreign images.
    LuksHeader::parse(&bytes, PAYLOAD)?;
    Ok(bytes)
}

fn made(encryption: &Encryption) -> Result<Vec<u8>, Failure> {
    let mut master = Zeroizing::new([0; KEY]);
    fill_by_chance(&mut *master)?;
    let mut salts = [[0; 32]; 2];
    for salt in &mut salts {
        fill_by_chance(salt)?;
    }
    let [slot_salt, digest_salt] = salts;

    let rate = Rate::measure(encryption.iter_time.min(MEASURED));
    let whole = encryption.iter_time;
    let of_slot = rate.iterations(whole, HASH.rounds(1, KEY), MOST_OF_SLOT);
    let of_digest = rate.iterations(whole / DIGEST_PART, 1, MOST_OF_DIGEST);

    let mut split = Zeroizing::new([0; KEY]);
    HASH.derive(encryption.key.bytes(), &slot_salt, of_slot, &mut *split);
    let mut stripes = stripes(&*master)?;
    let cipher = Cipher::new(&*split).ok_or_else(|| refused("a key has another length"))?;
    cipher.encrypt(0, &mut stripes);
    let mut digest = [0; 20];
    HASH.derive(&*master, &digest_salt, of_digest, &mut digest);

    let slot = KeySlot {
        salt: slot_salt,
        iterations: of_slot,
        // CAST: a constant.
        at: ALIGN as u64,
    };
    let mut bytes = words(&digest, &digest_salt, of_digest)?;
    (0..SLOTS).for_each(|number| put_slot(&mut bytes, number, (number == 0).then_some(&slot)));
    bytes.extend_from_slice(&stripes);
    Ok(bytes)
}

/// A header without its slots, as long as there is room for it.
fn words(digest: &[u8; 20], salt: &[u8; 32], iterations: u32) -> Result<Vec<u8>, Failure> {
    let mut bytes = vec![0; ALIGN];
    for (at, value) in [
        (0, &MAGIC[..]),
        (6, &[0, 1]),
        (8, b"aes"),
        (40, b"xts-plain64"),
        (72, HASH.name().as_bytes()),
        // CAST: small constants, here and below.
        (104, &((PAYLOAD / SECTOR as u64) as u32).to_be_bytes()),
        (108, &(KEY as u32).to_be_bytes()),
        (112, digest),
        (132, salt),
        (164, &iterations.to_be_bytes()),
        (168, uuid()?.as_bytes()),
    ] {
        put(&mut bytes, at, value);
    }
    Ok(bytes)
}

/// A slot of a header; one that is not used says where its stripes would be all the same.
fn put_slot(bytes: &mut [u8], number: usize, slot: Option<&KeySlot>) {
    let at = AT_SLOTS + number * SLOT;
    let state = if slot.is_some() { USED } else { UNUSED };
    let place = (ALIGN + number * MATERIAL.next_multiple_of(ALIGN)) / SECTOR;
    put(bytes, at, &state.to_be_bytes());
    put(bytes, at + 40, &(place as u32).to_be_bytes());
    put(bytes, at + 44, &(STRIPES as u32).to_be_bytes());
    if let Some(slot) = slot {
        put(bytes, at + 4, &slot.iterations.to_be_bytes());
        put(bytes, at + 8, &slot.salt);
    }
}

/// A key, split so that it is gone when any of it is (the LUKS specification, 2.4: `AFsplit`).
fn stripes(master: &[u8]) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let mut stripes = Zeroizing::new(vec![0; MATERIAL]);
    let (random, last) = stripes.split_at_mut(MATERIAL - KEY);
    fill_by_chance(random)?;
    let mut mixed = Zeroizing::new([0; KEY]);
    for stripe in random.chunks_exact(KEY) {
        mixed.iter_mut().zip(stripe).for_each(|(a, b)| *a ^= b);
        HASH.diffuse(&mut *mixed);
    }
    for (place, (a, b)) in last.iter_mut().zip(master.iter().zip(&*mixed)) {
        *place = a ^ b;
    }
    Ok(stripes)
}

/// A name for the image, as those have one that are made by others (RFC 9562, version 4).
fn uuid() -> Result<String, Failure> {
    let mut bytes = [0; 16];
    fill_by_chance(&mut bytes)?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex = bytes.map(|byte| format!("{byte:02x}")).concat();
    let parts = [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ];
    Ok(parts.join("-"))
}

/// Speed of a processor.
struct Rate {
    rounds: u64,
    time: Duration,
}

impl Rate {
    /// Counts for about so long, of the time that this thread had a processor: others do not make a key weaker.
    fn measure(wanted: Duration) -> Self {
        let mut rounds: u32 = 1024;
        loop {
            let begin = spent();
            HASH.derive(b"a word", b"a salt", rounds, &mut [0; 32]);
            let time = spent().saturating_sub(begin);
            if time >= wanted || rounds >= u32::MAX / 4 {
                let rounds = u64::from(rounds);
                return Self { rounds, time };
            }
            rounds *= 2;
        }
    }

    /// Returns the number of iterations of `each` rounds that fit into `time`, and into `most` rounds in all.
    fn iterations(&self, time: Duration, each: u64, most: u64) -> u32 {
        let nanos = self.time.as_nanos().max(1);
        let rounds = u128::from(self.rounds) * time.as_nanos() / nanos;
        let rounds = u64::try_from(rounds).unwrap_or(u64::MAX).min(most);
        let count = (rounds / each).max(FEWEST);
        u32::try_from(count).unwrap_or(u32::MAX)
    }
}

/// Returns the processor time of this thread.
fn spent() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    // CAST: neither is negative, and the second is below a second.
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::{made, uuid, Encryption, LuksHeader, Rate, ALIGN, MATERIAL, PAYLOAD, ROUNDS};
    use crate::luks::unlock::unlock;
    use crate::luks::ImageKey;
    use std::time::Duration;

    fn key(word: &[u8]) -> ImageKey {
        ImageKey::new(word.to_vec().into())
    }

    #[test]
    fn a_header_is_opened_by_its_key_alone_and_is_no_other_ones() {
        let how = Encryption {
            key: key(b"one"),
            iter_time: Duration::from_millis(1),
        };
        let bytes = made(&how).expect("a header");
        assert_eq!(bytes.len(), ALIGN + MATERIAL);
        let header = LuksHeader::parse(&bytes, PAYLOAD).expect("what is made is read");
        let material = || vec![bytes[ALIGN..].to_vec()];
        assert!(unlock(&header, material(), &key(b"one")).is_some());
        assert!(unlock(&header, material(), &key(b"one\n")).is_none());
        let other = made(&how).expect("a header");
        let other = LuksHeader::parse(&other, PAYLOAD).expect("what is made is read");
        assert_ne!(header.digest, other.digest);
        assert_ne!(header.digest_salt, other.digest_salt);
        assert_ne!(header.slots[0].salt, other.slots[0].salt);
        assert_ne!(header.slots[0].salt, header.digest_salt);
    }

    /// Without one stripe, the key is lost.
    #[test]
    fn each_stripe_counts() {
        let how = Encryption {
            key: key(b"one"),
            iter_time: Duration::from_millis(1),
        };
        let bytes = made(&how).expect("a header");
        let header = LuksHeader::parse(&bytes, PAYLOAD).expect("what is made is read");
        for at in [0, MATERIAL / 2, MATERIAL - 1] {
            let mut material = bytes[ALIGN..].to_vec();
            material[at] ^= 1;
            assert!(unlock(&header, vec![material], &how.key).is_none(), "{at}");
        }
    }

    #[test]
    fn the_time_that_is_given_is_that_of_a_try_within_bounds() {
        let rate = Rate {
            rounds: 1000,
            time: Duration::from_millis(1),
        };
        let second = Duration::from_secs(1);
        assert_eq!(rate.iterations(second, 2, ROUNDS), 500_000);
        assert_eq!(rate.iterations(second, 1, ROUNDS), 1_000_000);
        assert_eq!(rate.iterations(Duration::ZERO, 2, ROUNDS), 1000);
        assert_eq!(rate.iterations(Duration::MAX, 2, 5000), 2500);
        let twice = Rate::measure(Duration::from_millis(2));
        assert!(twice.rounds >= 1024 && twice.time >= Duration::from_millis(2));
    }

    #[test]
    fn a_name_is_one_of_chance() {
        let name = uuid().expect("random numbers");
        assert_eq!(name.len(), 36);
        assert_eq!(name.as_bytes()[14], b'4');
        assert!(b"89ab".contains(&name.as_bytes()[19]), "{name}");
        assert_ne!(name, uuid().expect("random numbers"));
    }
}
