// SPDX-License-Identifier: MIT OR Apache-2.0
//! Changing the parent of a differencing VHD.

use super::create::locators;
use super::footer::VhdKind;
use super::front;
use super::header::NameRoom;
use super::image::VhdImage;
use super::ParentOf;
use crate::field::{failed, refused};
use crate::Storage;
use control::Failure;
use diskio::{Bytes, Errno};

/// Changes the parent. The image must not be in use. Its own sectors do not change, so it holds the same disk only if
/// the new parent equals the old one wherever the image has no data.
///
/// The paths are durable in another place than the old ones before the header, which is one write, leads to them.
///
/// # Errors
/// The image has no parent, there is no room for the paths, or the storage fails.
pub async fn set_parent(storage: &impl Storage, parent: &ParentOf) -> Result<(), Failure> {
    let VhdImage { footer, header } = VhdImage::read(storage).await?;
    let Some(mut header) = header.filter(|_| footer.kind == VhdKind::Differencing) else {
        return Err(refused(
            "the VHD is no differencing disk, and cannot become one: create one: `tapimg create NEW --parent IMAGE`",
        ));
    };
    if parent.path.is_empty() {
        return Err(Failure::invalid("the parent's name is empty"));
    }
    if storage.is_fixed() {
        return Err(refused(
            "a VHD on a device has no room for other names: copy it: `tapimg convert IMAGE NEW --parent OTHER`",
        ));
    }
    // In front of the blocks, where blktap's programs want them, and beside the old ones.
    let paths = locators(&parent.path, 0, &mut Vec::new());
    let len: u64 = paths.iter().map(|path| path.room).sum();
    let tables = front::tables_end(storage, &footer, &header).await?;
    let at = slot(tables, header.names()?, len);
    front::clear(storage, &footer, &header, at.saturating_add(len)).await?;
    let work = async {
        let mut bytes = Vec::new();
        let paths = locators(&parent.path, at, &mut bytes);
        storage.write(at, Bytes::copied(&bytes)?).await?;
        storage.flush().await?;
        header.set_parent(parent.id, &parent.path, paths);
        let head = Bytes::copied(header.bytes())?;
        storage.write(footer.header, head).await?;
        storage.flush().await
    };
    let done: Result<(), Errno> = work.await;
    done.map_err(failed("cannot name the VHD's parent"))
}

/// Returns the first place behind the byte `begin` for `len` bytes, beside all that are there.
fn slot(begin: u64, mut names: Vec<NameRoom>, len: u64) -> u64 {
    names.sort_unstable_by_key(|name| name.at);
    let mut at = begin;
    for name in names {
        if at.saturating_add(len) <= name.at {
            break;
        }
        at = at.max(name.end().next_multiple_of(512));
    }
    at
}

#[cfg(test)]
mod tests {
    use super::slot;
    use crate::vhd::header::NameRoom;

    #[test]
    fn names_go_beside_the_old_ones() {
        let name = |at, len| NameRoom { number: 0, at, len };
        for (names, expected) in [
            (vec![], 1024),
            (vec![name(1024, 512), name(1536, 512)], 2048),
            (vec![name(2560, 512), name(2048, 512)], 1024),
            (vec![name(1536, 512)], 2048),
            (vec![name(100, 512)], 1024),
            (vec![name(1 << 60, 512)], 1024),
        ] {
            assert_eq!(slot(1024, names.clone(), 1024), expected, "{names:?}");
        }
    }
}
