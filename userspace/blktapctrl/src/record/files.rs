// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where records are.

use super::{Record, UnreadRecord};
use crate::folder::{self, Folder};
use std::io;
use std::path::PathBuf;

/// Where records are. Behind a trait so that a test can let it fail.
pub trait Records {
    /// Writes the record of a disk.
    ///
    /// # Errors
    /// It cannot be; the earlier one is still there.
    fn write(&self, record: &Record) -> io::Result<()>;

    /// Removes the record of a disk; success if there is none.
    ///
    /// # Errors
    /// It cannot be.
    fn remove(&self, minor: u32) -> io::Result<()>;

    /// All of them.
    ///
    /// # Errors
    /// The folder with the records cannot be read.
    fn all(&self) -> io::Result<Vec<Result<Record, UnreadRecord>>>;
}

/// Records as files of the folder.
#[derive(Clone, Debug)]
pub struct Files(pub Folder);

impl Records for Files {
    fn write(&self, record: &Record) -> io::Result<()> {
        record.write(&self.0.disk(record.minor))
    }

    fn remove(&self, minor: u32) -> io::Result<()> {
        folder::remove(&self.0.disk(minor))
    }

    fn all(&self) -> io::Result<Vec<Result<Record, UnreadRecord>>> {
        let files = folder::files(&self.0.disks(), "json")?;
        Ok(files
            .iter()
            .map(|path: &PathBuf| Record::read(path))
            .collect())
    }
}
