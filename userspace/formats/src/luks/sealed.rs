// SPDX-License-Identifier: MIT OR Apache-2.0
//! Content that is encrypted, where it is: its offset from the beginning is the tweak.

use super::xts::{Cipher, SECTOR};
use crate::Storage;
use diskio::{Bytes, Data, Errno};
use std::rc::Rc;

/// Bytes that are worked on at once.
const PIECE: usize = 8 * SECTOR;

/// Encrypted content of a storage, from a byte on. Copies are the same content.
pub(crate) struct Sealed<S> {
    storage: S,
    begin: u64,
    cipher: Rc<Cipher>,
}

impl<S: Storage> Sealed<S> {
    pub(crate) fn new(storage: S, begin: u64, cipher: Cipher) -> Self {
        Self {
            storage,
            begin,
            cipher: Rc::new(cipher),
        }
    }

    /// Returns this content through another handle of its storage.
    pub(super) fn over(&self, storage: S) -> Self {
        Self {
            storage,
            begin: self.begin,
            cipher: self.cipher.clone(),
        }
    }

    /// Reads into all of `data`. A read behind the end of the storage is [`Errno::IO`], because zeroes there would
    /// decrypt to garbage.
    pub(crate) async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        let first = sector(offset, data.len())?;
        let at = self.begin + offset;
        self.storage.read_exact(at, data.clone()).await?;
        let mut piece = [0; PIECE];
        for (number, at) in (first..).step_by(PIECE / SECTOR).zip(starts(data.len())) {
            let bytes = &mut piece[..PIECE.min(data.len() - at)];
            data.read(at, bytes);
            self.cipher.decrypt(number, bytes);
            data.write(at, bytes);
        }
        Ok(())
    }

    /// Writes all of `data` from an encrypted copy; `data` itself does not change.
    pub(crate) async fn write(&self, offset: u64, data: Bytes) -> Result<(), Errno> {
        let sealed = self.sealed(offset, &data)?;
        let at = self.begin + offset;
        self.storage.write(at, sealed.into()).await
    }

    /// Returns the encrypted copy of `data`, for the storage. The function is separate because a future that encrypts
    /// and writes would keep the piece in memory until the write ends.
    fn sealed(&self, offset: u64, data: &Bytes) -> Result<Data, Errno> {
        let first = sector(offset, data.len())?;
        let sealed = self.storage.buffer(data.len())?;
        let mut piece = [0; PIECE];
        for (number, at) in (first..).step_by(PIECE / SECTOR).zip(starts(data.len())) {
            let bytes = &mut piece[..PIECE.min(data.len() - at)];
            data.part(at, bytes.len()).read(0, bytes);
            self.cipher.encrypt(number, bytes);
            sealed.write(at, bytes);
        }
        Ok(sealed)
    }

    /// Forgets a range, which reads as anything then.
    pub(crate) async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.storage.discard(self.begin + offset, len).await
    }
}

/// Returns the number of the sector at an offset. Only whole sectors can be encrypted.
fn sector(offset: u64, len: usize) -> Result<u64, Errno> {
    let unit = SECTOR as u64;
    match offset % unit == 0 && len % SECTOR == 0 {
        true => Ok(offset / unit),
        false => Err(Errno::INVAL),
    }
}

/// Returns the offsets of the pieces.
fn starts(len: usize) -> impl Iterator<Item = usize> {
    (0..len).step_by(PIECE)
}
