// SPDX-License-Identifier: MIT OR Apache-2.0
//! The bytes of a write.

use crate::{Data, Errno};

/// Read-only bytes: the data of a write. They may be the guest's memory, which a later reader must find unchanged, so
/// no function of this type returns a [`Data`].
///
/// ```compile_fail,E0599
/// # fn wrong(bytes: diskio::Bytes) {
/// bytes.write(0, b"changed");
/// # }
/// ```
///
/// ```compile_fail,E0308
/// # async fn wrong(file: diskio::File, bytes: diskio::Bytes) {
/// file.read(0, bytes).await;
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Bytes(Data);

impl From<Data> for Bytes {
    fn from(data: Data) -> Self {
        Self(data)
    }
}

impl Bytes {
    /// Fresh bytes with the content of `bytes`.
    ///
    /// # Panics
    ///
    /// If there are none.
    pub fn copied(bytes: &[u8]) -> Result<Self, Errno> {
        Data::copied(bytes).map(Self)
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// False: there is always a byte.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The `len` bytes from `from` on.
    ///
    /// # Panics
    ///
    /// If they are not inside, or if there are none.
    #[must_use]
    pub fn part(&self, from: usize, len: usize) -> Self {
        Self(self.0.part(from, len))
    }

    /// Copies bytes out, from `from` on.
    ///
    /// # Panics
    ///
    /// If they are not inside.
    pub fn read(&self, from: usize, to: &mut [u8]) {
        self.0.read(from, to);
    }

    /// Copies all bytes to `to` from `at` on.
    ///
    /// # Panics
    ///
    /// If `to` is too short.
    pub fn copy_to(&self, to: &Data, at: usize) {
        self.0.copy_to(to, at);
    }

    /// All bytes as a vector.
    pub fn to_vec(&self) -> Vec<u8> {
        self.0.to_vec()
    }

    /// For the kernel, which reads them.
    pub(crate) fn data(&self) -> &Data {
        &self.0
    }
}
