// SPDX-License-Identifier: MIT OR Apache-2.0
//! How hosts agree about who writes an image, as it is written in a configuration: `lease=record`.

use crate::Failure;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// How hosts agree about who writes an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum LeaseKind {
    /// By the lock of the image itself, and nothing else: what every tapdisk does anyway. Enough for an
    /// image that no other host reaches, or where the file system's locks are those of all hosts.
    #[default]
    Lock,
    /// By a record, in a file beside the image or at another place that all hosts reach by this path.
    Record(Option<PathBuf>),
    /// By a persistent reservation of the disk that the image is: its storage refuses all others' writes.
    Reservation,
}

impl fmt::Display for LeaseKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lock => f.write_str("lock"),
            Self::Record(None) => f.write_str("record"),
            Self::Reservation => f.write_str("reservation"),
            Self::Record(Some(path)) => write!(f, "record:{}", path.display()),
        }
    }
}

impl FromStr for LeaseKind {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        match text.split_once(':') {
            None if text == "lock" => Ok(Self::Lock),
            None if text == "record" => Ok(Self::Record(None)),
            None if text == "reservation" => Ok(Self::Reservation),
            Some(("record", path)) if path.starts_with('/') && !path.contains(['\0', ',']) => {
                Ok(Self::Record(Some(path.into())))
            }
            _ => Err(Failure::invalid(format!(
                "'{text}' is no lease: use lock, record, record:/PATH or reservation"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::LeaseKind;

    #[test]
    fn a_kind_is_read_as_it_is_written() {
        for text in ["lock", "record", "record:/srv/leases/a", "reservation"] {
            assert_eq!(text.parse::<LeaseKind>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "none",
            "record:",
            "record:a",
            "record:/a,b",
            "lock:/a",
            "reservation:/a",
        ] {
            let error = text.parse::<LeaseKind>().unwrap_err();
            assert!(error.message.contains("use lock, record"), "{error}");
        }
    }
}
