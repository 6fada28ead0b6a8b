// SPDX-License-Identifier: MIT OR Apache-2.0
//! Facts that tools ask for about an image that is not served.

use super::check::{self, Findings};
use super::content::ClusterFile;
use super::header::{Qcow2Header, CORRUPT, DIRTY};
use super::Qcow2;
use crate::field::refused;
use crate::{ImageParts, Options, Storage};
use control::Failure;
use diskio::Errno;

impl Qcow2Header {
    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        self.geometry.cluster()
    }

    /// Clusters have parts.
    pub fn has_subclusters(&self) -> bool {
        self.geometry.extended
    }

    /// True if the image was not closed, so that its refcounts may be wrong.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & DIRTY != 0
    }

    /// A program has marked the image as damaged, so it must not be changed.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & CORRUPT != 0
    }
}

/// Compares all refcounts of an image that is not in use with the users of its clusters; with `repair` they are
/// corrected, and the messages say what was wrong. Backing images are not checked.
pub async fn check<S: Storage>(file: &S, name: &str, repair: bool) -> Result<Findings, Failure> {
    let options = Options {
        writable: repair,
        ..Options::new(name)
    };
    let said = |failure| options.named(failure);
    let header = super::header(file).await.map_err(said)?;
    if repair && header.is_corrupt() {
        return Err(said(refused(
            "the header says that the image is corrupt, so that refcounts may not be all that is wrong: repair it with qemu-img check -r all",
        )));
    }
    let alone = Qcow2::new(file.clone(), ImageParts::default(), options.clone());
    // Nothing that is encrypted is looked at.
    let content = ClusterFile::Plain(file.clone());
    let image = alone.image_of(&header, content).await.map_err(said)?;
    let others = check::others(file, &header).await.map_err(said)?;
    let failed = |error: Errno| Failure::system("cannot check the refcounts", &error.into());
    let done = match repair {
        true => image.repair(&others).await,
        false => image.check(&others).await.map_err(failed),
    };
    done.map_err(said)
}
