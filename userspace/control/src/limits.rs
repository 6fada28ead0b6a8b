// SPDX-License-Identifier: MIT OR Apache-2.0
//! How much a guest may do with a disk.

use crate::Failure;
use serde::{Deserialize, Serialize};
use std::fmt;

/// How much a guest may have a disk do in a second. A number that is 0 limits nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Bytes that are read or written, or made zeroes; a discard counts as 4 KiB for each 4 MiB begun.
    pub bytes: u64,
    /// Requests.
    pub requests: u32,
    /// Seconds of it that may be done at once by a disk that did nothing before.
    pub burst_s: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes: 0,
            requests: 0,
            burst_s: 1,
        }
    }
}

impl Limits {
    /// Bytes in a second at least: the largest request must not take so long that its process seems to hang.
    pub const LEAST_BYTES: u64 = 1 << 20;
    /// Requests in a second at least.
    pub const LEAST_REQUESTS: u32 = 10;
    /// Seconds of a burst at most.
    pub const LONGEST_S: u32 = 3600;

    /// Whether no limit is set.
    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// There is one.
    #[must_use]
    pub fn any(&self) -> bool {
        self.bytes != 0 || self.requests != 0
    }

    /// # Errors
    /// A guest could not work with it.
    pub fn check(&self) -> Result<(), Failure> {
        if self.bytes != 0 && self.bytes < Self::LEAST_BYTES {
            return Err(Failure::invalid(format!(
                "{} bytes in a second are too few: at least 1M, or 0 for as many as there are",
                self.bytes
            )));
        }
        if self.requests != 0 && self.requests < Self::LEAST_REQUESTS {
            return Err(Failure::invalid(format!(
                "{} requests in a second are too few: at least {}, or 0 for as many as there are",
                self.requests,
                Self::LEAST_REQUESTS
            )));
        }
        if !(1..=Self::LONGEST_S).contains(&self.burst_s) {
            return Err(Failure::invalid(format!(
                "a burst of {} s is not possible: 1 to {} s",
                self.burst_s,
                Self::LONGEST_S
            )));
        }
        Ok(())
    }
}

impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.any() {
            return f.write_str("none");
        }
        let mut before = "";
        if self.bytes != 0 {
            write!(f, "bps={}", self.bytes)?;
            before = " ";
        }
        if self.requests != 0 {
            write!(f, "{before}iops={}", self.requests)?;
            before = " ";
        }
        write!(f, "{before}burst={}s", self.burst_s)
    }
}

#[cfg(test)]
mod tests {
    use super::Limits;

    #[test]
    fn limits_that_a_guest_can_work_with() {
        let limits = |bytes, requests, burst_s| Limits {
            bytes,
            requests,
            burst_s,
        };
        for good in [limits(0, 0, 1), limits(1 << 20, 10, 3600), limits(0, 10, 1)] {
            assert_eq!(good.check(), Ok(()));
        }
        for bad in [
            limits(1, 0, 1),
            limits(0, 9, 1),
            limits(0, 0, 0),
            limits(0, 0, 3601),
        ] {
            assert!(bad.check().is_err(), "{bad}");
        }
        assert_eq!(
            limits(1 << 20, 10, 2).to_string(),
            "bps=1048576 iops=10 burst=2s"
        );
        assert_eq!(limits(0, 10, 1).to_string(), "iops=10 burst=1s");
        assert_eq!(Limits::default().to_string(), "none");
        assert!(!Limits::default().any());
    }
}
