// SPDX-License-Identifier: MIT OR Apache-2.0
//! New VHDs, laid out as tapdisk does it.

use super::batmap;
use super::blocks::UNUSED;
use super::footer::{self, Footer, VhdKind};
use super::header::{self, table_len, Locator, VhdHeader};
use super::{locator, MOST};
use crate::field::failed;
use crate::Storage;
use control::Failure;
use diskio::{Bytes, Errno};

/// Properties of a new image.
#[derive(Clone, Debug)]
pub struct VhdCreate {
    /// Kind of the VHD.
    pub kind: VhdKind,
    /// Bytes of the disk, whole sectors.
    pub size: u64,
    /// Identity of the disk: any unique number.
    pub id: [u8; 16],
    /// Parent of a differencing disk.
    pub parent: Option<ParentOf>,
    /// The disk can become as large as this without moving its table; 0 for its size.
    pub reserve: u64,
}

/// A parent, to be named.
#[derive(Clone, Debug)]
pub struct ParentOf {
    /// Its path from the folder of the new image, or an absolute one.
    pub path: String,
    /// Identity of the parent ([`id`](super::id)); zeroes for a raw image.
    pub id: [u8; 16],
}

impl VhdCreate {
    fn check(&self) -> Result<(), Failure> {
        let largest = self.size.max(self.reserve);
        if self.size == 0 || self.size % 512 != 0 {
            return Err(Failure::invalid(format!(
                "a disk of {} bytes cannot be made: its size must be whole sectors of 512",
                self.size
            )));
        }
        if largest > MOST {
            return Err(Failure::invalid(format!(
                "a VHD has at most 2040 GiB, and {largest} bytes are more: use another format, such as qcow2"
            )));
        }
        match (self.kind, &self.parent) {
            (VhdKind::Differencing, None) => Err(Failure::invalid(
                "a differencing VHD needs a parent: name it",
            )),
            (VhdKind::Differencing, Some(parent)) if parent.path.is_empty() => {
                Err(Failure::invalid("the parent's name is empty"))
            }
            (VhdKind::Differencing, Some(_)) | (_, None) => Ok(()),
            (_, Some(_)) => Err(Failure::invalid(
                "only a differencing VHD has a parent: leave it out",
            )),
        }
    }
}

/// Makes an image in `storage`, whose old content is lost. The structure that identifies the image is at the beginning
/// and comes last: before that it is no image.
pub async fn create(storage: &impl Storage, what: &VhdCreate) -> Result<(), Failure> {
    what.check()?;
    let footer = Footer::new(what.kind, what.size, what.id);
    let failed = |error| failed("cannot make the VHD")(error);
    match what.kind {
        VhdKind::Fixed => fixed(storage, &footer).await.map_err(failed),
        _ => blocks(storage, &footer, what).await.map_err(failed),
    }
}

async fn fixed(storage: &impl Storage, footer: &Footer) -> Result<(), Errno> {
    let end = footer
        .size
        .checked_add(footer::LEN as u64)
        .ok_or(Errno::FBIG)?;
    let at = match storage.is_fixed() {
        true if storage.size()? < end => return Err(Errno::NOSPC),
        true => {
            storage.clear(0, footer.size).await?;
            storage.size()? - footer::LEN as u64
        }
        false => {
            storage.set_size(0).await?;
            storage.set_size(end).await?;
            footer.size
        }
    };
    storage.write(at, Bytes::copied(footer.bytes())?).await?;
    storage.flush().await
}

async fn blocks(storage: &impl Storage, footer: &Footer, what: &VhdCreate) -> Result<(), Errno> {
    let largest = what.size.max(what.reserve);
    let count = largest.div_ceil(u64::from(header::BLOCK));
    let count = u32::try_from(count).map_err(|_| Errno::FBIG)?;
    let table = footer::LEN as u64 + header::LEN as u64;
    let mut header = VhdHeader::new(table, count);
    let mut bytes = empty_table(count);
    let map = table + bytes.len() as u64;
    bytes.extend(batmap::empty(map, count));
    if let Some(parent) = &what.parent {
        let begin = table + bytes.len() as u64;
        let paths = locators(&parent.path, begin, &mut bytes);
        header.set_parent(parent.id, &parent.path, paths);
    }
    let end = table + bytes.len() as u64;
    let at = match storage.is_fixed() {
        true if storage.size()? < end + footer::LEN as u64 => return Err(Errno::NOSPC),
        true => storage.size()? - footer::LEN as u64,
        false => {
            storage.set_size(0).await?;
            end
        }
    };
    if storage.is_fixed() {
        storage.write(0, Bytes::copied(&[0; footer::LEN])?).await?;
    }
    let mut head = header.bytes().to_vec();
    head.extend(bytes);
    storage.write(footer.header, Bytes::copied(&head)?).await?;
    storage.write(at, Bytes::copied(footer.bytes())?).await?;
    storage.flush().await?;
    storage.write(0, Bytes::copied(footer.bytes())?).await?;
    storage.flush().await
}

/// A table of blocks that do not exist.
pub(crate) fn empty_table(count: u32) -> Vec<u8> {
    // CAST: a table of at most 2^22 blocks.
    let mut bytes = vec![0; table_len(count) as usize];
    // Entries behind the last one fill its last sector, and are never read.
    for entry in bytes.chunks_exact_mut(4) {
        entry.copy_from_slice(&UNUSED.to_be_bytes());
    }
    bytes
}

/// Adds the parent's path in three spellings to what goes to `begin`, each in sectors of its own.
pub(super) fn locators(path: &str, begin: u64, bytes: &mut Vec<u8>) -> Vec<Locator> {
    let first = bytes.len() as u64;
    let spellings = [locator::URL, locator::ABSOLUTE, locator::RELATIVE];
    let path = match path.starts_with('/') || path.starts_with("../") || path.starts_with("./") {
        true => path.to_string(),
        false => format!("./{path}"),
    };
    spellings
        .into_iter()
        .map(|code| {
            let spelled = locator::encode(code, &path);
            let at = begin + bytes.len() as u64 - first;
            let len = spelled.len();
            let room = len.next_multiple_of(512);
            bytes.extend(spelled);
            bytes.resize(bytes.len() + room - len, 0);
            Locator {
                code,
                room: room as u64,
                len: u32::try_from(len).unwrap_or(u32::MAX),
                at,
            }
        })
        .collect()
}
