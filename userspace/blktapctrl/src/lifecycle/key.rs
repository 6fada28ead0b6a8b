// SPDX-License-Identifier: MIT OR Apache-2.0
//! Keys of images that are encrypted.

use super::named;
use crate::image::Opened;
use control::{Failure, Secrecy, Target};

/// Opens the file with the key of an image, for reading.
///
/// # Errors
/// None is said, there is none, or it is no secret.
pub(super) async fn open(target: &Target) -> Result<Opened, Failure> {
    named::open(target, "key", target.key(), Secrecy::Secret).await
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
