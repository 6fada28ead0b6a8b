// SPDX-License-Identifier: MIT OR Apache-2.0
//! AES in the mode XTS (IEEE 1619), with the number of a sector as its tweak, as `plain64` says.

use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes128, Aes256, Block};

/// Bytes that are encrypted with one tweak.
pub(crate) const SECTOR: usize = 512;
/// Blocks of these.
const BLOCKS: usize = SECTOR / 16;

/// The cipher of an image, with its key, which is wiped with it and stays where it is until then.
pub(crate) enum Cipher {
    Aes128(Box<Xts<Aes128>>),
    Aes256(Box<Xts<Aes256>>),
}

impl Cipher {
    /// Returns the cipher with a key of 32 or 64 bytes, whose second half is the tweak's; `None` for any other length.
    pub(super) fn new(key: &[u8]) -> Option<Self> {
        match key.len() {
            32 => Xts::new(key).map(|xts| Self::Aes128(Box::new(xts))),
            64 => Xts::new(key).map(|xts| Self::Aes256(Box::new(xts))),
            _ => None,
        }
    }

    /// Encrypts whole sectors; `first` is the number of the first one.
    pub(crate) fn encrypt(&self, first: u64, bytes: &mut [u8]) {
        match self {
            Self::Aes128(xts) => xts.encrypt(first, bytes),
            Self::Aes256(xts) => xts.encrypt(first, bytes),
        }
    }

    /// Decrypts such.
    pub(crate) fn decrypt(&self, first: u64, bytes: &mut [u8]) {
        match self {
            Self::Aes128(xts) => xts.decrypt(first, bytes),
            Self::Aes256(xts) => xts.decrypt(first, bytes),
        }
    }
}

/// A block cipher in that mode.
pub(crate) struct Xts<C> {
    data: C,
    tweak: C,
}

impl<
        C: KeyInit + BlockCipherEncrypt<BlockSize = aes::cipher::consts::U16> + BlockCipherDecrypt,
    > Xts<C>
{
    fn new(key: &[u8]) -> Option<Self> {
        let (data, tweak) = key.split_at(key.len() / 2);
        Some(Self {
            data: C::new_from_slice(data).ok()?,
            tweak: C::new_from_slice(tweak).ok()?,
        })
    }

    fn encrypt(&self, first: u64, bytes: &mut [u8]) {
        self.sectors(first, bytes, |blocks| self.data.encrypt_blocks(blocks));
    }

    fn decrypt(&self, first: u64, bytes: &mut [u8]) {
        self.sectors(first, bytes, |blocks| self.data.decrypt_blocks(blocks));
    }

    /// Calls `crypt` on each sector, between the two steps that mix in the tweaks. It gets all blocks of a sector at
    /// once, because a processor works on several at the same time.
    fn sectors(&self, first: u64, bytes: &mut [u8], crypt: impl Fn(&mut [Block])) {
        assert_eq!(bytes.len() % SECTOR, 0, "sectors are whole");
        for (sector, bytes) in (first..).zip(bytes.chunks_exact_mut(SECTOR)) {
            let tweaks = self.tweaks(sector);
            let (blocks, _) = Block::slice_as_chunks_mut(bytes);
            mix(blocks, &tweaks);
            crypt(blocks);
            mix(blocks, &tweaks);
        }
    }

    /// The tweak of each block of a sector.
    fn tweaks(&self, sector: u64) -> [u128; BLOCKS] {
        let mut block = Block::from(u128::from(sector).to_le_bytes());
        self.tweak.encrypt_block(&mut block);
        let mut tweak = u128::from_le_bytes(block.into());
        [(); BLOCKS].map(|()| {
            let this = tweak;
            // Times x, in the field of 2^128 elements that the standard has.
            tweak = (tweak << 1) ^ ((tweak >> 127) * 0x87);
            this
        })
    }
}

fn mix(blocks: &mut [Block], tweaks: &[u128; BLOCKS]) {
    for (block, tweak) in blocks.iter_mut().zip(tweaks) {
        let mixed = u128::from_le_bytes((*block).into()) ^ tweak;
        *block = mixed.to_le_bytes().into();
    }
}

#[cfg(test)]
mod tests {
    use super::{Cipher, SECTOR};

    fn bytes(text: &str) -> Vec<u8> {
        let digit = |at| u8::from_str_radix(&text[at..at + 2], 16).expect("two digits");
        (0..text.len()).step_by(2).map(digit).collect()
    }

    /// The vectors 4 and 10 of IEEE 1619, which have a sector of 512 bytes.
    #[test]
    fn standard_vectors() {
        let content: Vec<u8> = (0..SECTOR).map(|at| at as u8).collect();
        let first = "2718281828459045235360287471352631415926535897932384626433832795";
        let long = "27182818284590452353602874713526624977572470936999595749669676273141592653589793238462643383279502884197169399375105820974944592";
        for (key, sector, begin) in [
            (
                first,
                0,
                "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c",
            ),
            (
                long,
                0xff,
                "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b",
            ),
        ] {
            let cipher = Cipher::new(&bytes(key)).expect("a key");
            let mut data = content.clone();
            cipher.encrypt(sector, &mut data);
            assert_eq!(data[..32], bytes(begin));
            cipher.decrypt(sector, &mut data);
            assert_eq!(data, content);
        }
    }

    #[test]
    fn each_sector_has_its_own_tweak_and_no_other_length_is_a_key() {
        let cipher = Cipher::new(&[7; 64]).expect("a key");
        let (mut both, mut second) = ([1; 2 * SECTOR], [1; SECTOR]);
        cipher.encrypt(1 << 40, &mut both);
        cipher.encrypt((1 << 40) + 1, &mut second);
        assert_eq!(both[SECTOR..], second);
        assert_ne!(both[..SECTOR], second);
        assert!(
            [0, 16, 31, 33, 48, 63, 65].map(|len| Cipher::new(&vec![0; len]).is_none())
                == [true; 7]
        );
    }
}
