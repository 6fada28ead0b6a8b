// SPDX-License-Identifier: MIT OR Apache-2.0
//! How hosts agree which of them writes an image, in the syntax of a configuration: `lease=record`.

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
    /// By a resource of sanlock, which every host that reaches the image runs.
    Sanlock(Box<SanlockResource>),
}

impl LeaseKind {
    /// Returns true if the host has the lease: its disks are one to the storage, and the end of a supervisor changes
    /// nothing.
    #[must_use]
    pub fn is_of_host(&self) -> bool {
        matches!(self, Self::Reservation | Self::Sanlock(_))
    }
}

/// A resource of sanlock: the argument of `sanlock direct init -r`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SanlockResource {
    /// The lockspace, which each host has joined under a number of its own.
    pub lockspace: String,
    /// Its own name.
    pub name: String,
    /// Where it is: a file or a block device that all hosts reach by this path.
    pub path: PathBuf,
    /// And where there.
    pub offset: u64,
}

impl SanlockResource {
    /// Bytes of the names that sanlock has room for.
    const NAME: usize = 48;
    /// Bytes of the paths that it has room for, with a zero at the end.
    const PATH: usize = 1024;
    /// Offsets are multiples of this: the least that sanlock takes for a resource.
    const ALIGN: u64 = 1 << 20;

    /// Reads `LOCKSPACE:NAME:/PATH` or `LOCKSPACE:NAME:/PATH:OFFSET`. A path may have colons, as those of mounts do.
    fn parse(text: &str) -> Result<SanlockResource, String> {
        let mut words = text.splitn(3, ':');
        let (Some(lockspace), Some(name), Some(place)) = (words.next(), words.next(), words.next())
        else {
            return Err("write sanlock:LOCKSPACE:RESOURCE:/PATH, or :OFFSET behind it".into());
        };
        for word in [lockspace, name] {
            let is_name = (1..=Self::NAME).contains(&word.len());
            if !is_name || !word.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(format!(
                    "'{word}' is no name of sanlock's: it has 1 to {} letters and digits",
                    Self::NAME
                ));
            }
        }
        let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let (path, offset) = match place.rsplit_once(':') {
            Some((path, digits)) if is_number(digits) => (path, digits),
            _ => (place, "0"),
        };
        if !path.starts_with('/') || path.contains('\0') || path.len() >= Self::PATH {
            return Err(format!("'{path}' is no absolute path"));
        }
        let offset = offset.parse().ok();
        let offset = offset.filter(|offset| offset % Self::ALIGN == 0);
        let offset = offset.ok_or("an offset is a multiple of 1048576")?;
        Ok(SanlockResource {
            lockspace: lockspace.into(),
            name: name.into(),
            path: path.into(),
            offset,
        })
    }
}

impl fmt::Display for SanlockResource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (lockspace, name, path) = (&self.lockspace, &self.name, self.path.display());
        write!(f, "{lockspace}:{name}:{path}:{}", self.offset)
    }
}

impl fmt::Display for LeaseKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lock => f.write_str("lock"),
            Self::Record(None) => f.write_str("record"),
            Self::Reservation => f.write_str("reservation"),
            Self::Record(Some(path)) => write!(f, "record:{}", path.display()),
            Self::Sanlock(resource) => write!(f, "sanlock:{resource}"),
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
            Some(("sanlock", resource)) => SanlockResource::parse(resource)
                .map(|resource| Self::Sanlock(Box::new(resource)))
                .map_err(|why| Failure::invalid(format!("lease={text}: {why}"))),
            _ => Err(Failure::invalid(format!(
                "'{text}' is no lease: use lock, record, record:/PATH, reservation or \
                 sanlock:LOCKSPACE:RESOURCE:/PATH"
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

    #[test]
    fn a_resource_of_sanlock_is_read_as_it_is_written() {
        let read = |text: &str| text.parse::<LeaseKind>();
        for (text, path, offset) in [
            (
                "sanlock:vms:a:/dev/vg/leases:3145728",
                "/dev/vg/leases",
                3 << 20,
            ),
            ("sanlock:vms:a:/srv/leases", "/srv/leases", 0),
            (
                "sanlock:vms:a:/mnt/nas:_vms/leases",
                "/mnt/nas:_vms/leases",
                0,
            ),
            ("sanlock:vms:a:/mnt/nas:7:1048576", "/mnt/nas:7", 1 << 20),
        ] {
            let kind = read(text).unwrap();
            let LeaseKind::Sanlock(found) = &kind else {
                panic!("{text}: {kind}");
            };
            assert_eq!((&found.lockspace[..], &found.name[..]), ("vms", "a"));
            assert_eq!((found.path.to_str().unwrap(), found.offset), (path, offset));
            assert_eq!(read(&kind.to_string()).unwrap(), kind);
        }
        let long = format!("sanlock:{}:a:/l", "x".repeat(49));
        let deep = format!("sanlock:vms:a:/{}", "x".repeat(1023));
        for (text, word) in [
            ("sanlock:", "write sanlock:"),
            ("sanlock:vms:a", "write sanlock:"),
            ("sanlock::a:/l", "no name"),
            ("sanlock:vms::/l", "no name"),
            ("sanlock:my vms:a:/l", "no name"),
            ("sanlock:vms:a:l", "no absolute path"),
            ("sanlock:vms:a:/l\0", "no absolute path"),
            ("sanlock:vms:a:/l:512", "a multiple"),
            ("sanlock:vms:a:/l:99999999999999999999", "a multiple"),
            (&long, "no name"),
            (&deep, "no absolute path"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.message.contains(word), "{text}: {error}");
        }
    }
}
