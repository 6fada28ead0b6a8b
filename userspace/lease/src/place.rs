// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which lease an image has, and where that is.

use crate::lock::Lock;
use crate::record::Recorded;
use crate::{Claim, Lease};
use control::Failure;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// How hosts agree about who writes an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum Kind {
    /// By the lock of the image itself, and nothing else: what every tapdisk does anyway. Enough for an
    /// image that no other host reaches, or where the file system's locks are those of all hosts.
    #[default]
    Lock,
    /// By a record, in a file beside the image or at another place that all hosts reach by this path.
    Record(Option<PathBuf>),
}

impl Kind {
    /// Where the lease of an image is, if not in the image.
    #[must_use]
    pub fn place(&self, image: &Path) -> Place {
        let record = match self {
            Kind::Lock => None,
            Kind::Record(Some(path)) => Some(path.clone()),
            Kind::Record(None) => {
                let mut name = image.as_os_str().to_owned();
                name.push(".lease");
                Some(name.into())
            }
        };
        Place {
            image: image.into(),
            record,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Lock => f.write_str("lock"),
            Kind::Record(None) => f.write_str("record"),
            Kind::Record(Some(path)) => write!(f, "record:{}", path.display()),
        }
    }
}

impl FromStr for Kind {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Kind, Failure> {
        match text.split_once(':') {
            None if text == "lock" => Ok(Kind::Lock),
            None if text == "record" => Ok(Kind::Record(None)),
            Some(("record", path)) if path.starts_with('/') && !path.contains(['\0', ',']) => {
                Ok(Kind::Record(Some(path.into())))
            }
            _ => Err(Failure::invalid(format!(
                "'{text}' is no lease: use lock, record or record:/PATH"
            ))),
        }
    }
}

/// An image, and where its lease is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The image.
    pub image: PathBuf,
    /// The record, if its lease has one.
    pub record: Option<PathBuf>,
}

/// Opens the lease of an image for `claim`; takes nothing.
///
/// # Errors
/// It cannot be opened.
pub fn open(kind: &Kind, image: &Path, claim: Claim) -> Result<Box<dyn Lease>, Failure> {
    let place = kind.place(image);
    match place.record {
        None => Ok(Box::new(Lock::open(&place.image, claim)?)),
        Some(record) => Ok(Box::new(Recorded::open(&record, &place.image, claim)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::Kind;
    use std::path::Path;

    #[test]
    fn a_kind_is_read_as_it_is_written() {
        for text in ["lock", "record", "record:/srv/leases/a"] {
            assert_eq!(text.parse::<Kind>().unwrap().to_string(), text);
        }
        for text in ["", "none", "record:", "record:a", "record:/a,b", "lock:/a"] {
            let error = text.parse::<Kind>().unwrap_err();
            assert!(error.message.contains("use lock, record"), "{error}");
        }
    }

    #[test]
    fn a_record_is_beside_its_image() {
        let image = Path::new("/srv/a.img");
        let place = Kind::Record(None).place(image);
        assert_eq!(place.record.unwrap(), Path::new("/srv/a.img.lease"));
        let elsewhere: Kind = "record:/srv/b".parse().unwrap();
        assert_eq!(elsewhere.place(image).record.unwrap(), Path::new("/srv/b"));
        assert_eq!(Kind::Lock.place(image).record, None);
    }
}
