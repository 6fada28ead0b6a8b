// SPDX-License-Identifier: MIT OR Apache-2.0
//! Context of a line of the log.

use control::Failure;
use std::io;

/// Context of a line of the log: its disk, guest, process and error. Each part that is known is a field of the journal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogContext {
    /// The node of the disk.
    pub minor: Option<u32>,
    /// The guest that has it.
    pub domid: Option<u32>,
    /// The name of the guest.
    pub guest: Option<String>,
    /// Name of the disk in the guest.
    pub vdev: Option<String>,
    /// Target that is served.
    pub target: Option<String>,
    /// The process that serves it, or that this is about.
    pub pid: Option<u32>,
    /// The number of the system's error.
    pub errno: Option<i32>,
    /// The kind of the event.
    pub event: Option<String>,
    /// The number of the event.
    pub number: Option<u64>,
}

impl LogContext {
    /// A disk of which nothing else is known.
    #[must_use]
    pub fn disk(minor: u32) -> LogContext {
        LogContext {
            minor: Some(minor),
            ..LogContext::default()
        }
    }

    /// A process without a disk.
    #[must_use]
    pub fn process(pid: u32) -> LogContext {
        LogContext::default().of(pid)
    }

    /// Adds the process.
    #[must_use]
    pub fn of(self, pid: u32) -> LogContext {
        LogContext {
            pid: Some(pid),
            ..self
        }
    }

    /// Adds the error number of a failure.
    #[must_use]
    pub fn failed(self, failure: &Failure) -> LogContext {
        LogContext {
            errno: failure.errno,
            ..self
        }
    }

    /// Adds the number of a system error.
    #[must_use]
    pub fn because(self, error: &io::Error) -> LogContext {
        LogContext {
            errno: error.raw_os_error(),
            ..self
        }
    }

    /// Adds the guest and the disk that a backend's directory in xenstore names.
    #[must_use]
    pub fn at(self, vbd: &str) -> LogContext {
        let mut names = vbd.trim_end_matches('/').rsplit('/');
        let devid: Option<u32> = names.next().and_then(|name| name.parse().ok());
        LogContext {
            vdev: devid.map(control::vdev),
            domid: names.next().and_then(|name| name.parse().ok()),
            ..self
        }
    }
}

impl From<&LogContext> for LogContext {
    fn from(about: &LogContext) -> LogContext {
        about.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::LogContext;

    #[test]
    fn a_directory_names_guest_and_disk() {
        for (vbd, domid, vdev) in [
            ("backend/vbd/3/51712", Some(3), Some("xvda")),
            (
                "/local/domain/0/backend/vbd3/12/2048",
                Some(12),
                Some("sda"),
            ),
            ("backend/vbd/3/x", Some(3), None),
            ("backend/vbd/x/7", None, Some("7")),
            ("", None, None),
        ] {
            let about = LogContext::disk(4).at(vbd);
            let found = (about.minor, about.domid, about.vdev.as_deref());
            assert_eq!(found, (Some(4), domid, vdev), "{vbd}");
        }
    }
}
