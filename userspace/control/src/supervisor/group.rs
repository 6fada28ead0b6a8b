// SPDX-License-Identifier: MIT OR Apache-2.0
//! Groups of disks that share limits, as the supervisor tells of them.

use crate::{GroupName, GroupRate, Limits};
use serde::{Deserialize, Serialize};

/// Changes of the limits of a group. The rest stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GroupChanges {
    /// As [`Limits::bytes`].
    pub bytes: Option<u64>,
    /// As [`Limits::requests`].
    pub requests: Option<u32>,
    /// As [`Limits::burst_s`].
    pub burst_s: Option<u32>,
}

impl GroupChanges {
    /// The limits with these changes.
    #[must_use]
    pub fn of(&self, limits: Limits) -> Limits {
        Limits {
            bytes: self.bytes.unwrap_or(limits.bytes),
            requests: self.requests.unwrap_or(limits.requests),
            burst_s: self.burst_s.unwrap_or(limits.burst_s),
        }
    }
}

/// A group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Its name.
    pub name: GroupName,
    /// Limits of all its disks together.
    pub limits: Limits,
    /// Its disks.
    pub members: Vec<Member>,
    /// Bytes that its disks have read and written in it since the supervisor was started.
    pub bytes: u64,
    /// Requests of that.
    pub requests: u64,
}

/// A disk of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its number.
    pub minor: u32,
    /// Its present pace; nothing if it has no process that could do I/O.
    pub pace: Option<GroupRate>,
    /// Bytes in a second that it has done of late.
    pub bytes: u64,
    /// Thousandths of requests in a second that it has done of late.
    pub milli_requests: u64,
    /// The disk would do more if it had a larger share.
    pub lacks: bool,
}
