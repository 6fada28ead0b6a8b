// SPDX-License-Identifier: MIT OR Apache-2.0
//! The metadata of a VHD, read and checked.

use super::footer::{self, Footer, VhdKind};
use super::header::{self, VhdHeader};
use super::locator;
use crate::field::{array, failed, refused};
use crate::storage;
use crate::{ImageNeeds, Parent, Storage};
use control::Failure;

/// A footer, and the header if there is one.
#[derive(Debug)]
pub(crate) struct VhdImage {
    pub(crate) footer: Footer,
    pub(crate) header: Option<VhdHeader>,
}

impl VhdImage {
    /// Reads the footer and the header, and checks each of them alone.
    pub(crate) async fn read(storage: &impl Storage) -> Result<Self, Failure> {
        let length = storage
            .size()
            .map_err(failed("cannot see the image's size"))?;
        let footer = find(storage, length).await?;
        if footer.kind == VhdKind::Fixed {
            if footer.size > length.saturating_sub(511) {
                return Err(refused(format!(
                    "the fixed VHD has {length} bytes, which is not enough for its disk of {}: it is cut off",
                    footer.size
                )));
            }
            return Ok(Self {
                footer,
                header: None,
            });
        }
        let end = footer.header.checked_add(header::LEN as u64);
        if footer.header < footer::LEN as u64
            || footer.header % 512 != 0
            || end.is_none_or(|end| end > length)
        {
            return Err(refused(format!(
                "the VHD's header cannot be at byte {} of {length}",
                footer.header
            )));
        }
        let bytes = storage::bytes(storage, footer.header, header::LEN).await;
        let bytes = bytes.map_err(failed("cannot read the VHD's header"))?;
        let header = VhdHeader::parse(bytes, &footer, length)?;
        Ok(Self {
            footer,
            header: Some(header),
        })
    }
}

/// Returns the footer that counts. The beginning of a fixed VHD belongs to the guest, so the end is read first; in the
/// other kinds the footer at the beginning never moves, and counts.
async fn find(storage: &impl Storage, length: u64) -> Result<Footer, Failure> {
    let last = match last(storage, length).await {
        Ok(Some(footer)) if footer.kind == VhdKind::Fixed => return Ok(footer),
        last => last,
    };
    let first = at(storage, 0).await;
    match (first, last) {
        (Ok(Some(first)), Ok(_)) if first.kind != VhdKind::Fixed => Ok(first),
        // Only the end was being written.
        (Ok(Some(first)), Err(_)) if first.kind != VhdKind::Fixed => Ok(first),
        (_, Ok(Some(last))) => Ok(last),
        (Err(failure), _) | (_, Err(failure)) => Err(failure),
        _ => Err(refused(
            "there is no footer of a VHD, neither at the end nor at the beginning: it is cut off, or no VHD",
        )),
    }
}

/// Returns the fault of the footers of a VHD that can be served nevertheless: all but the fixed ones have two, and one
/// is enough. The image must not be in use.
///
/// # Errors
/// The image is no VHD, or cannot be read.
pub async fn footers(storage: &impl Storage) -> Result<Option<String>, Failure> {
    let length = storage
        .size()
        .map_err(failed("cannot see the image's size"))?;
    if find(storage, length).await?.kind == VhdKind::Fixed {
        return Ok(None);
    }
    let said = |place: &str, found: Result<Option<Footer>, Failure>| match found {
        Ok(Some(footer)) => Ok(footer),
        Ok(None) => Err(format!("there is no footer at the {place} of the VHD")),
        Err(_) => Err(format!("the footer at the {place} of the VHD is damaged")),
    };
    let first = said("beginning", at(storage, 0).await);
    let last = said("end", last(storage, length).await);
    Ok(match (first, last) {
        (Ok(first), Ok(last)) if first == last => None,
        (Ok(first), Ok(last)) => Some(format!(
            "the footers at the beginning of the VHD and at its end are different, of disks with {} and {} bytes: one is from \
             another time; the first one counts",
            first.size, last.size
        )),
        (Err(why), _) => Some(format!("{why}, and that at its end counts")),
        (_, Err(why)) => Some(format!(
            "{why}, which may have been cut off; that at its beginning counts"
        )),
    })
}

/// The footer at the end. Early ones of Microsoft have a byte less.
async fn last(storage: &impl Storage, length: u64) -> Result<Option<Footer>, Failure> {
    let Some(begin) = length.checked_sub(footer::LEN as u64) else {
        return Err(refused(format!(
            "the image has {length} bytes: that is no VHD"
        )));
    };
    match at(storage, begin).await? {
        Some(footer) => Ok(Some(footer)),
        None => at(storage, begin + 1).await,
    }
}

async fn at(storage: &impl Storage, offset: u64) -> Result<Option<Footer>, Failure> {
    let bytes = storage::bytes(storage, offset, footer::LEN).await;
    let bytes = bytes.map_err(failed("cannot read the VHD's footer"))?;
    Footer::parse(array(&bytes, 0))
}

/// Returns the kind of a VHD and the files that it needs; no name in it is followed.
pub async fn look(storage: &impl Storage) -> Result<(VhdKind, ImageNeeds), Failure> {
    let image = VhdImage::read(storage).await?;
    let mut needs = ImageNeeds {
        size: image.footer.size,
        ..ImageNeeds::default()
    };
    if let (VhdKind::Differencing, Some(header)) = (image.footer.kind, &image.header) {
        needs.parent = Some(parent(storage, header).await?);
    }
    Ok((image.footer.kind, needs))
}

async fn parent(storage: &impl Storage, header: &VhdHeader) -> Result<Parent, Failure> {
    let mut names: Vec<String> = Vec::new();
    for locator in &header.locators {
        // CAST: it was checked to be small.
        let bytes = storage::bytes(storage, locator.at, locator.len as usize).await;
        let bytes = bytes.map_err(failed("cannot read a name of the VHD's parent"))?;
        let name = locator::decode(locator.code, &bytes);
        names.extend(name.filter(|name| !names.contains(name)));
    }
    names.extend(header.parent_name().filter(|name| !names.contains(name)));
    let id = header.parent_id();
    // Tapdisk says so of raw parents.
    let is_raw = id == [0; 16];
    Ok(Parent {
        names,
        driver: Some(if is_raw { "aio" } else { "vhd" }.into()),
        id: (!is_raw).then(|| spelled(id)),
        other_id: None,
    })
}

/// Returns the identity of an image.
pub async fn id(storage: &impl Storage) -> Result<[u8; 16], Failure> {
    Ok(VhdImage::read(storage).await?.footer.id())
}

/// An identity in the usual form, as it is in [`Parent::id`].
pub fn spelled(id: [u8; 16]) -> String {
    let number = u128::from_be_bytes(id);
    format!(
        "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
        number >> 96,
        (number >> 80) & 0xffff,
        (number >> 64) & 0xffff,
        (number >> 48) & 0xffff,
        number & 0xffff_ffff_ffff
    )
}
