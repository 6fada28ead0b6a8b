// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the guest of a disk has written since a moment that has a name.

use crate::text::as_text;
use crate::Failure;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Marks that a disk has at most.
pub const MAX_MARKS: usize = 8;

/// Most bytes of a name that a user chooses.
pub(crate) const LONGEST_NAME: usize = 64;

/// Whether a text can be such a name: letters, digits, dots, dashes and underscores.
pub(crate) fn is_name(text: &str) -> bool {
    let is_of_names = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    (1..=LONGEST_NAME).contains(&text.len()) && text.chars().all(is_of_names)
}

/// The name of a mark, which is chosen by who sets it: 1 to 64 letters, digits, dots, dashes and underscores.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MarkName(String);

impl FromStr for MarkName {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        if is_name(text) {
            return Ok(Self(text.into()));
        }
        Err(Failure::invalid(format!(
            "{text:?} is no name of a dirty bitmap: use 1 to {} letters, digits, dots, dashes and underscores",
            LONGEST_NAME
        )))
    }
}

as_text!(MarkName);

impl fmt::Display for MarkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A moment from which on a dirty bitmap records the guest's writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Its name.
    pub name: MarkName,
    /// Its number: another one of the same name has another. 0 if the supervisor is older and does not say.
    #[serde(default)]
    pub number: u64,
    /// When it was, in milliseconds since 1970.
    pub at_ms: u64,
    /// Bytes of the disk for each bit.
    pub unit: u64,
}

/// A part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// Parts of the disk that may have changed since a mark, in ascending order and apart from each other. The rest has not
/// changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// Number of the mark: another one of the same name has another.
    pub mark: u64,
    /// Bytes of the disk.
    pub size: u64,
    /// The parts.
    pub extents: Vec<Extent>,
    /// These are not all: from where to ask for more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::MarkName;

    #[test]
    fn a_name_is_one_word() {
        for good in ["a", "2026-11-25_full.1", &"x".repeat(64)] {
            assert_eq!(good.parse::<MarkName>().expect("a name").to_string(), good);
        }
        for bad in ["", "a b", "a/b", "ä", "a\n", &"x".repeat(65)] {
            let failure = bad.parse::<MarkName>().expect_err("no name");
            assert!(failure.message.contains("letters"), "{failure}");
            assert!(serde_json::from_value::<MarkName>(bad.into()).is_err());
        }
    }
}
