// SPDX-License-Identifier: MIT OR Apache-2.0
//! Files that the configuration of a disk names with a word, such as `key=` and `tls-ca=`. The supervisor opens them and
//! does not look into them: they are read by the disk's process alone.

use crate::blocking_io::{blocking_io, LIMIT};
use crate::image::Opened;
use control::{open_named, Code, Failure, FileSecrecy, Target};
use std::path::Path;

/// Opens the file at `path`, which `target` names with a word, for reading.
///
/// # Errors
/// None is named, there is none, it is no file, others could have changed it, or it has to be a secret and is none.
pub(super) async fn open(
    target: &Target,
    word: &'static str,
    path: Option<&Path>,
    secrecy: FileSecrecy,
) -> Result<Opened, Failure> {
    let path = path.ok_or_else(|| {
        Failure::new(
            Code::Denied,
            format!("{target} does not say {word}=, so there is none"),
        )
    })?;
    let place = path.to_path_buf();
    blocking_io(path, LIMIT, move || {
        open_named(&place, word, secrecy).map(Opened::from)
    })
    .await
}
