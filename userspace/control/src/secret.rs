// SPDX-License-Identifier: MIT OR Apache-2.0
//! Files that are named with a word before an image or an export, such as `key=` and `tls-ca=`, and who must not have
//! had them in hand. This code reads none of their contents.

use crate::{Code, Failure};
use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::process::geteuid;
use std::os::fd::OwnedFd;
use std::path::Path;

/// Permission bits that a secret must not have: all of others, and write permission of its group.
const OTHERS: u32 = 0o027;
/// Permission bits that no such file may have: write permission of anyone but its owner.
const CHANGE: u32 = 0o022;

/// Whether the contents of a file are secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSecrecy {
    /// A certificate, which a connection shows to its peer. But a user who can change it decides which servers a disk
    /// trusts.
    Public,
    /// A key, readable only for users that are trusted with all disks.
    Secret,
}

/// Opens the file at `path`, which is named with `word`, for reading.
///
/// # Errors
/// There is none, it is no file, others could have changed it, or it has to be a secret and is none.
pub fn open_named(path: &Path, word: &str, secrecy: FileSecrecy) -> Result<OwnedFd, Failure> {
    let what = format!("cannot use {}, which {word}= names", path.display());
    // A pipe would be waited for.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = rustix::fs::open(path, flags, Mode::empty());
    let fd = opened.map_err(|error| Failure::system(&what, &error.into()))?;
    let stat = rustix::fs::fstat(&fd).map_err(|error| Failure::system(&what, &error.into()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Failure::invalid(format!("{what}: it is no regular file")));
    }
    let checked = match secrecy {
        FileSecrecy::Secret => must_be_secret(&stat),
        FileSecrecy::Public => must_be_ours(&stat),
    };
    checked.map_err(|why| Failure::new(Code::Denied, format!("{what}: {why}")))?;
    Ok(fd)
}

/// Only who is trusted with all disks can have written it.
fn must_be_ours(file: &Stat) -> Result<(), String> {
    let (owner, own) = (file.st_uid, geteuid().as_raw());
    // Those that the system brings along are root's, whoever uses them.
    if owner != own && owner != 0 {
        return Err(format!(
            "it belongs to the user {owner}, who can change it: see that it is right, and give it to the user {own} with \
             chown {own}"
        ));
    }
    match file.st_mode & CHANGE {
        0 => Ok(()),
        _ => Err("others may change it: see that it is right, and chmod go-w it".into()),
    }
}

/// Only who is trusted with all disks can have read a key, or put another one there.
fn must_be_secret(file: &Stat) -> Result<(), String> {
    let (owner, own) = (file.st_uid, geteuid().as_raw());
    if owner != own {
        return Err(format!(
            "it belongs to the user {owner}: give it to the user {own}, who uses it, with chown {own}"
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
