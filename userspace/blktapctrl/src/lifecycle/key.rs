// SPDX-License-Identifier: MIT OR Apache-2.0
//! Keys of images that are encrypted. The supervisor opens the file with one and does not look into it: it is read by the
//! disk's process alone.

use super::server::named_file;
use crate::image::Opened;
use control::{Code, Failure, Target};
use rustix::fs::Stat;
use rustix::process::geteuid;

/// What nobody but the owner and the group may do, and not even that to change the file.
const OTHERS: u32 = 0o027;

/// Opens the file with the key of an image, for reading.
///
/// # Errors
/// None is said, there is none, or it is no secret.
pub(super) async fn open(target: &Target) -> Result<Opened, Failure> {
    let path = target.key().ok_or_else(|| {
        Failure::new(
            Code::Denied,
            format!("{target} does not say key=, so there is none"),
        )
    })?;
    named_file(path, "key", is_secret).await
}

/// Only who is trusted with all disks can have read a key, or put another one there.
fn is_secret(file: &Stat) -> Result<(), String> {
    if file.st_uid != geteuid().as_raw() {
        return Err(format!(
            "it belongs to the user {}: make it root's with chown root",
            file.st_uid
        ));
    }
    match file.st_mode & OTHERS {
        0 => Ok(()),
        _ => Err("others may read it, or its group may write it: chmod 600 it, and give the image another key".into()),
    }
}

/// What a guest writes to an encrypted image is not to be written to another one that is not encrypted, unless somebody
/// names that as a copy.
///
/// # Errors
/// The image is encrypted.
pub(super) fn must_stay_secret(target: &Target, place: &str) -> Result<(), Failure> {
    match target.key() {
        None => Ok(()),
        Some(_) => Err(Failure::unsupported(format!(
            "{target} is encrypted, and {place} is not: what the guest writes would be there for anybody to read; copy \
             the disk with tap-ctl mirror to an image that you choose"
        ))),
    }
}
