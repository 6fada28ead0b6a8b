// SPDX-License-Identifier: MIT OR Apache-2.0
//! Changing the backing image in the header.

use super::header::{
    BackingImage, Extensions, Qcow2Header, AT_HEADER_LEN, AT_NAME, EXT_BACKING, EXT_SECTOR,
    RAW_EXTERNAL, V2, V3,
};
use crate::field::{be32, be64, failed, put, refused};
use crate::{storage, Storage};
use control::Failure;
use diskio::Bytes;

/// Changes the backing image in the header, or removes it, and stores the bytes of a logical sector if `sector` has
/// them. It reads neither the content of the image nor the other
/// image. The image must not be in use.
///
/// The new name is durable beside the old one before anything leads to it, and what leads there is one write,
/// which changes no other sector than the first if the header named a format before.
pub async fn set_backing<S: Storage>(
    file: &S,
    backing: Option<&BackingImage>,
    sector: Option<u32>,
) -> Result<(), Failure> {
    let reading = failed("cannot read the header");
    let begin = storage::bytes(file, 0, 512).await.map_err(reading)?;
    let len = super::header::needed(&begin)?;
    let reading = failed("cannot read the header");
    let old = storage::bytes(file, 0, len).await.map_err(reading)?;
    let header = Qcow2Header::parse(&old)?;
    if header.autoclear & RAW_EXTERNAL != 0 && backing.is_some() {
        return Err(refused(
            "the data file of the image is the disk, byte for byte, so nothing can be below it",
        ));
    }
    let new = renamed(&old, header.version, backing, sector)?;
    // The new header must be readable, so it has to pass the checks for foreign images.
    if Qcow2Header::parse(&new.head)?.backing.as_ref() != backing {
        return Err(refused(
            "the header cannot store the name of the backing image",
        ));
    }
    let work = async {
        if let Some(at) = new.name {
            let name = &new.head[at as usize..];
            file.write(at, Bytes::copied(name)?).await?;
            file.flush().await?;
        }
        file.write(0, Bytes::copied(&new.head)?).await?;
        file.flush().await
    };
    work.await.map_err(failed("cannot write the header"))
}

/// A header with another name in it.
struct RenamedHeader {
    /// Beginning of the image, up to the last byte that changes.
    head: Vec<u8>,
    /// Offset of the name in bytes, if it can be stored before the rest.
    name: Option<u64>,
}

fn renamed(
    old: &[u8],
    version: u32,
    backing: Option<&BackingImage>,
    sector: Option<u32>,
) -> Result<RenamedHeader, Failure> {
    let length = match version >= 3 {
        // `Qcow2Header::parse` has checked this.
        true => (be32(old, AT_HEADER_LEN) as usize).max(V3),
        false => V2,
    };
    let mut head = old.get(..length).unwrap_or(old).to_vec();
    if let Some(format) = backing.and_then(|backing| backing.format.as_ref()) {
        push(&mut head, EXT_BACKING, format.as_bytes());
    }
    let mut extensions = Extensions::of(old, length);
    for extension in extensions.by_ref() {
        let (kind, data) = extension?;
        if kind != EXT_BACKING && !(kind == EXT_SECTOR && sector.is_some()) {
            push(&mut head, kind, data);
        }
    }
    if let Some(sector) = sector {
        push(&mut head, EXT_SECTOR, &sector.to_be_bytes());
    }
    head.extend([0; 8]);
    let Some(backing) = backing else {
        put(&mut head, AT_NAME, &[0; 12]);
        return fits(head, old.len(), None);
    };
    let name = backing.name.as_bytes();
    // CAST: both are inside of a cluster, which was checked with the header.
    let (was, len) = (be64(old, AT_NAME) as usize, be32(old, AT_NAME + 8) as usize);
    // Behind all that the header has now, and beside the old name, if there is room; otherwise over them, with
    // the rest.
    let mut at = head.len().max(extensions.at + 8);
    if at < was + len && was < at + name.len() {
        at = was + len;
    }
    let is_apart = at + name.len() <= old.len();
    if !is_apart {
        at = head.len();
    }
    head.resize(at, 0);
    // CAST: inside of a cluster, or it does not fit.
    put(&mut head, AT_NAME, &(at as u64).to_be_bytes());
    put(&mut head, AT_NAME + 8, &(name.len() as u32).to_be_bytes());
    head.extend_from_slice(name);
    fits(head, old.len(), is_apart.then_some(at as u64))
}

fn fits(head: Vec<u8>, cluster: usize, name: Option<u64>) -> Result<RenamedHeader, Failure> {
    match head.len() <= cluster {
        true => Ok(RenamedHeader { head, name }),
        false => Err(refused(format!(
            "the name of the backing image does not fit into the header's cluster of {cluster} bytes: use a shorter \
             one, such as one in the same folder"
        ))),
    }
}

fn push(head: &mut Vec<u8>, kind: u32, data: &[u8]) {
    head.extend(kind.to_be_bytes());
    // CAST: inside of a cluster, or it does not fit.
    head.extend((data.len() as u32).to_be_bytes());
    head.extend_from_slice(data);
    head.resize(head.len().next_multiple_of(8), 0);
}
