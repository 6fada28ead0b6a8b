// SPDX-License-Identifier: MIT OR Apache-2.0
//! Keys of images that are encrypted.

use super::credentials;
use crate::image::Opened;
use control::{Failure, FileSecrecy, Target};

/// Opens the file with the key of an image, for reading.
///
/// # Errors
/// The target names none, there is none, or others may read it.
pub(super) async fn open(target: &Target) -> Result<Opened, Failure> {
    credentials::open(target, "key", target.key(), FileSecrecy::Secret).await
}

/// Refuses to put the guest's data of an encrypted image into an unencrypted one; only an explicit copy (mirror) may do
/// that.
///
/// # Errors
/// The image is encrypted.
pub(super) fn must_stay_secret(target: &Target, place: &str) -> Result<(), Failure> {
    match target.key() {
        None => Ok(()),
        Some(_) => Err(Failure::unsupported(format!(
            "{target} is encrypted, and {place} is not: the guest's data would be readable there; copy \
             the disk to an image that you choose: `tap-ctl mirror -m MINOR IMAGE`"
        ))),
    }
}
