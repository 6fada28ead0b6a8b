// SPDX-License-Identifier: MIT OR Apache-2.0
//! The key of an encrypted image.

use control::Failure;
use std::fmt;
use std::io::{ErrorKind, Read};
use std::sync::Arc;
use zeroize::Zeroizing;

/// Bytes of a passphrase at most.
const MOST: usize = 64 << 10;

/// The passphrase of an image: bytes, whatever they are. Copies are the same bytes, which are wiped with the last one.
#[derive(Clone)]
pub struct ImageKey(Arc<Zeroizing<Vec<u8>>>);

impl ImageKey {
    /// Makes a key of these bytes. The caller must not keep another copy of them.
    pub fn new(bytes: Zeroizing<Vec<u8>>) -> Self {
        Self(Arc::new(bytes))
    }

    /// Reads a key from a file: each byte of the file is part of the key.
    ///
    /// # Errors
    /// The file cannot be read, or holds no key.
    pub fn read(mut file: impl Read) -> Result<Self, Failure> {
        // The buffer has its final size from the beginning, because a copy that it left behind when it grew would not
        // be wiped.
        let mut bytes = Zeroizing::new(vec![0; MOST + 1]);
        let mut len = 0;
        while len < bytes.len() {
            match file.read(&mut bytes[len..]) {
                Ok(0) => break,
                Ok(count) => len += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Failure::system("cannot read the key", &error)),
            }
        }
        bytes.truncate(len);
        match len {
            0 => Err(Failure::invalid(
                "the file of the key is empty: write the passphrase there, without a line's end unless it has one",
            )),
            1..=MOST => Ok(Self::new(bytes)),
            _ => Err(Failure::invalid(format!(
                "the file of the key has more than {MOST} bytes, as no passphrase has"
            ))),
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Hides the key: it must not appear in a message, not even in one for debugging.
impl fmt::Debug for ImageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

#[cfg(test)]
mod tests {
    use super::{ImageKey, MOST};

    #[test]
    fn each_byte_of_a_file_counts() {
        let key = ImageKey::read(&b"one\0two\n"[..]).expect("a key");
        assert_eq!(key.bytes(), b"one\0two\n");
        assert_eq!(
            ImageKey::read(&vec![7; MOST][..])
                .expect("a key")
                .bytes()
                .len(),
            MOST
        );
        for (bytes, why) in [(0, "is empty"), (MOST + 1, "more than 65536 bytes")] {
            let failure = ImageKey::read(&vec![7; bytes][..]).expect_err("no key");
            assert!(failure.message.contains(why), "{failure}");
        }
    }
}
