// SPDX-License-Identifier: MIT OR Apache-2.0
//! Files that the configuration of a disk names with a word, such as `key=` and `tls-ca=`. The supervisor opens them and
//! does not look into them: they are read by the disk's process alone.

use crate::apart::{apart, LIMIT};
use crate::image::Opened;
use control::{Code, Failure, Target};
use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::process::geteuid;
use std::path::Path;

/// What nobody but the owner and the group of a secret may do, and not even that to change it.
const OTHERS: u32 = 0o027;

/// Who may know what is in a file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// Anybody: a certificate is shown to whoever asks.
    Public,
    /// Nobody but who is trusted with all disks.
    Secret,
}

/// Opens the file at `path`, which `target` names with a word, for reading.
///
/// # Errors
/// None is named, there is none, it is no file, or it has to be a secret and is none.
pub(super) async fn open(
    target: &Target,
    word: &'static str,
    path: Option<&Path>,
    content: Content,
) -> Result<Opened, Failure> {
    let path = path.ok_or_else(|| {
        Failure::new(
            Code::Denied,
            format!("{target} does not say {word}=, so there is none"),
        )
    })?;
    let place = path.to_path_buf();
    apart(path, LIMIT, move || {
        let what = format!("cannot use {}, which {word}= names", place.display());
        // A pipe would be waited for.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let opened = rustix::fs::open(&place, flags, Mode::empty());
        let fd = opened.map_err(|error| Failure::system(&what, &error.into()))?;
        let stat = rustix::fs::fstat(&fd).map_err(|error| Failure::system(&what, &error.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Failure::invalid(format!("{what}: it is no regular file")));
        }
        if content == Content::Secret {
            must_be_secret(&stat)
                .map_err(|why| Failure::new(Code::Denied, format!("{what}: {why}")))?;
        }
        Ok(Opened::from(fd))
    })
    .await
}

/// Only who is trusted with all disks can have read a key, or put another one there.
fn must_be_secret(file: &Stat) -> Result<(), String> {
    if file.st_uid != geteuid().as_raw() {
        return Err(format!(
            "it belongs to the user {}: make it root's with chown root",
            file.st_uid
        ));
    }
    match file.st_mode & OTHERS {
        0 => Ok(()),
        _ => Err(
            "others may read it, or its group may write it: chmod 600 it, and use another key, because this one may be \
             known"
                .into(),
        ),
    }
}
