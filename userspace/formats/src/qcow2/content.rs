// SPDX-License-Identifier: MIT OR Apache-2.0
//! The clusters with the disk's content: as they are, or encrypted, each sector by where it is in the image.

use super::header::Qcow2Header;
use crate::luks::{self, ImageKey, Sealed};
use crate::Storage;
use control::Failure;
use diskio::{Bytes, Data, Errno, Pending};

/// File that holds the clusters.
pub(crate) enum ClusterFile<S> {
    Plain(S),
    Sealed(Sealed<S>),
}

impl<S: Storage> ClusterFile<S> {
    /// Returns the content of an image in `file`, which `key` opens if it is encrypted.
    ///
    /// # Errors
    /// The image is encrypted and there is no key or a wrong one, or it is not and there is one.
    pub(super) async fn of(
        file: &S,
        data: Option<&S>,
        header: &Qcow2Header,
        key: Option<&ImageKey>,
    ) -> Result<Self, Failure> {
        let Some(place) = header.crypt else {
            return match key {
                None => Ok(Self::Plain(data.unwrap_or(file).clone())),
                Some(_) => Err(Failure::invalid(
                    "the image is not encrypted, and a key was named: remove key=, or copy the image with qemu-img \
                     convert into one that is",
                )),
            };
        };
        let keys = luks::header_at(file, place.at, place.len).await?;
        let cipher = luks::unlock(file, place.at, &keys, key).await?;
        Ok(Self::Sealed(Sealed::new(file.clone(), 0, cipher)))
    }

    /// True if zeroes in the file read as zeroes of the disk, because the content is not encrypted.
    pub(super) fn is_plain(&self) -> bool {
        matches!(self, Self::Plain(_))
    }

    pub(super) async fn read(&self, at: u64, data: Data) -> Result<(), Errno> {
        match self {
            Self::Plain(storage) => storage.read_padded(at, data).await,
            Self::Sealed(sealed) => sealed.read(at, data).await,
        }
    }

    /// Queues a read that is one operation; an encrypted one is not.
    pub(super) fn begin_read(&self, at: u64, data: &Data) -> Option<Pending> {
        match self {
            Self::Plain(storage) => storage.begin_read(at, data),
            Self::Sealed(_) => None,
        }
    }

    /// Queues a write that is one operation; an encrypted one is not.
    pub(super) fn begin_write(&self, at: u64, data: &Bytes) -> Option<Pending> {
        match self {
            Self::Plain(storage) => storage.begin_write(at, data),
            Self::Sealed(_) => None,
        }
    }

    /// A range reads as zeroes, where the disk and the storage have the same ones.
    pub(super) async fn clear(&self, at: u64, len: u64) -> Result<(), Errno> {
        match self {
            Self::Plain(storage) => storage.clear(at, len).await,
            Self::Sealed(_) => Err(Errno::OPNOTSUPP),
        }
    }

    pub(super) async fn write(&self, at: u64, data: Bytes) -> Result<(), Errno> {
        match self {
            Self::Plain(storage) => storage.write(at, data).await,
            Self::Sealed(sealed) => sealed.write(at, data).await,
        }
    }
}
