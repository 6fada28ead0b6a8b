// SPDX-License-Identifier: MIT OR Apache-2.0
//! Limits that several disks share: a group, and the part of its limits that a disk has for a while.

use crate::changed::{is_name, LONGEST_NAME};
use crate::text::as_text;
use crate::{Failure, Limits};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// The name of a group, which is chosen by who makes it: 1 to 64 letters, digits, dots, dashes and underscores. It does
/// not begin with a dot, and `none` is no group.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GroupName(String);

impl FromStr for GroupName {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        match is_name(text) && !text.starts_with('.') && text != InGroup::NONE {
            true => Ok(Self(text.into())),
            false => Err(Failure::invalid(format!(
                "{text:?} is no name of a group: use 1 to {} letters, digits, dots, dashes and underscores, not \
                 '{}', and no dot in front",
                LONGEST_NAME,
                InGroup::NONE
            ))),
        }
    }
}

as_text!(GroupName);

impl fmt::Display for GroupName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// In which group a disk is to be, if in any.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum InGroup {
    /// In none.
    None,
    /// In this one.
    Named(GroupName),
}

impl InGroup {
    /// Word for a disk that is in no group.
    const NONE: &str = "none";
}

impl FromStr for InGroup {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        match text {
            Self::NONE => Ok(Self::None),
            name => name.parse().map(Self::Named),
        }
    }
}

impl fmt::Display for InGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str(Self::NONE),
            Self::Named(name) => name.fmt(f),
        }
    }
}

as_text!(InGroup);

/// How much may be done in a second. An absent limit is none; 0 allows nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GroupRate {
    /// Bytes that are read or written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Thousandths of requests: of ten requests in a second many disks have a part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub milli_requests: Option<u64>,
}

/// Units of one request in a [`GroupRate`].
pub const MILLI: u64 = 1000;

impl RateShare {
    /// Returns the pace at that time.
    pub fn pace_at(&self, now: Duration) -> GroupRate {
        match now {
            now if now < self.until => self.pace,
            now if now < self.from => self.pace.least(&self.after),
            _ => self.after,
        }
    }
}

impl GroupRate {
    /// Returns the lower limits of both.
    fn least(&self, other: &Self) -> Self {
        let least = |one: Option<u64>, other: Option<u64>| match (one, other) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        Self {
            bytes: least(self.bytes, other.bytes),
            milli_requests: least(self.milli_requests, other.milli_requests),
        }
    }

    /// All of these limits.
    pub fn of(limits: &Limits) -> Self {
        let requests = u64::from(limits.requests).saturating_mul(MILLI);
        Self {
            bytes: Some(limits.bytes).filter(|bytes| *bytes != 0),
            milli_requests: Some(requests).filter(|requests| *requests != 0),
        }
    }
}

/// The part of a group's limits that a disk has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateShare {
    /// Pace at first.
    pub pace: GroupRate,
    /// End of that pace, if no other share arrives: a time of `CLOCK_MONOTONIC`.
    pub until: Duration,
    /// Final pace, if no other share arrives, because no supervisor divides the group any more.
    pub after: GroupRate,
    /// Start of `after`. In between the lower of both paces holds, because the shares of others end at other times.
    pub from: Duration,
    /// Seconds of it that may be done at once by a disk that did nothing before.
    pub burst_s: u32,
}

/// Use of its disk's shares by a process, since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ShareUsage {
    /// Requests that began or wait for that.
    pub came: u64,
    /// Requests that began.
    pub requests: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// A request had to wait for bytes since the last answer.
    pub lacks_bytes: bool,
    /// A request had to wait because of the number of requests since the last answer.
    pub lacks_requests: bool,
}

#[cfg(test)]
mod tests {
    use super::{GroupName, GroupRate, InGroup, RateShare};
    use crate::Limits;
    use std::time::Duration;

    #[test]
    fn a_name_is_one_word_and_a_file() {
        for good in ["a", "customer-7_all.1", &"x".repeat(64)] {
            assert_eq!(good.parse::<GroupName>().expect("a name").to_string(), good);
            let named = good.parse::<InGroup>().expect("a group");
            assert_eq!(serde_json::to_value(named).expect("json"), good);
        }
        for bad in [
            "",
            "none",
            ".",
            "..",
            ".a",
            "a b",
            "a/b",
            "a,b",
            "ä",
            &"x".repeat(65),
        ] {
            let failure = bad.parse::<GroupName>().expect_err("no name");
            assert!(failure.message.contains("letters"), "{failure}");
            assert!(serde_json::from_value::<GroupName>(bad.into()).is_err());
        }
        assert_eq!("none".parse::<InGroup>(), Ok(InGroup::None));
        assert_eq!(serde_json::to_value(InGroup::None).expect("json"), "none");
    }

    #[test]
    fn a_share_ends_in_two_steps() {
        let pace = |bytes, milli| GroupRate {
            bytes,
            milli_requests: milli,
        };
        let share = RateShare {
            pace: pace(Some(9), Some(2)),
            until: Duration::from_secs(3),
            after: pace(Some(5), Some(5)),
            from: Duration::from_secs(4),
            burst_s: 1,
        };
        for (second, expected) in [
            (2, share.pace),
            (3, pace(Some(5), Some(2))),
            (4, share.after),
        ] {
            assert_eq!(share.pace_at(Duration::from_secs(second)), expected);
        }
        assert_eq!(
            pace(None, Some(1)).least(&pace(Some(2), None)),
            pace(Some(2), Some(1))
        );
    }

    #[test]
    fn no_limit_is_no_pace() {
        let limits = Limits {
            bytes: 0,
            requests: 7,
            burst_s: 2,
        };
        let pace = GroupRate {
            bytes: None,
            milli_requests: Some(7000),
        };
        assert_eq!(GroupRate::of(&limits), pace);
        assert_eq!(GroupRate::of(&Limits::default()), GroupRate::default());
    }
}
