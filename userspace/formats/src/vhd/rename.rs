// SPDX-License-Identifier: MIT OR Apache-2.0
//! Changing the parent of a differencing VHD.

use super::create::locators;
use super::footer::VhdKind;
use super::image::VhdImage;
use super::ParentOf;
use crate::field::{failed, refused};
use crate::Storage;
use control::Failure;
use diskio::{Bytes, Errno};

/// Changes the parent. The image must not be in use. Its own sectors do not change, so it holds the same disk only if
/// the new parent equals the old one wherever the image has no data.
///
/// The paths are durable behind everything else before the header, which is one write, leads to them.
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
    let work = async {
        let at = storage.size()?.next_multiple_of(4096);
        let mut bytes = Vec::new();
        let paths = locators(&parent.path, at, &mut bytes);
        bytes.extend(footer.bytes());
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
