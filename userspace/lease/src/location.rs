// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kind of lease that an image has, and its place.

use crate::lock::Lock;
use crate::record::RecordLease;
use crate::{reservation, sanlock, Lease, LeaseClaim};
use control::{Failure, LeaseKind};
use std::path::{Path, PathBuf};

/// An image, and where its lease is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseLocation {
    /// The image.
    pub image: PathBuf,
    /// The record, if its lease has one.
    pub record: Option<PathBuf>,
}

/// Where the lease of an image is.
#[must_use]
pub fn place(kind: &LeaseKind, image: &Path) -> LeaseLocation {
    let record = match kind {
        LeaseKind::Lock | LeaseKind::Reservation | LeaseKind::Sanlock(_) => None,
        LeaseKind::Record(Some(path)) => Some(path.clone()),
        LeaseKind::Record(None) => {
            let mut name = image.as_os_str().to_owned();
            name.push(".lease");
            Some(name.into())
        }
    };
    LeaseLocation {
        image: image.into(),
        record,
    }
}

/// Opens the lease of an image for `claim`; takes nothing.
///
/// # Errors
/// It cannot be opened.
pub fn open(kind: &LeaseKind, image: &Path, claim: LeaseClaim) -> Result<Box<dyn Lease>, Failure> {
    let place = place(kind, image);
    match kind {
        LeaseKind::Reservation => return reservation::open(image, claim),
        LeaseKind::Sanlock(resource) => return Ok(sanlock::open(resource, image, claim)),
        LeaseKind::Lock | LeaseKind::Record(_) => {}
    }
    match place.record {
        None => Ok(Box::new(Lock::open(&place.image, claim)?)),
        Some(record) => Ok(Box::new(RecordLease::open(&record, &place.image, claim)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::{place, LeaseKind};
    use std::path::Path;

    #[test]
    fn a_record_is_beside_its_image() {
        let image = Path::new("/srv/a.img");
        let beside = place(&LeaseKind::Record(None), image);
        assert_eq!(beside.record.unwrap(), Path::new("/srv/a.img.lease"));
        let elsewhere: LeaseKind = "record:/srv/b".parse().unwrap();
        assert_eq!(
            place(&elsewhere, image).record.unwrap(),
            Path::new("/srv/b")
        );
        assert_eq!(place(&LeaseKind::Lock, image).record, None);
        assert_eq!(place(&LeaseKind::Reservation, image).record, None);
    }
}
