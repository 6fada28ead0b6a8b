// SPDX-License-Identifier: MIT OR Apache-2.0
//! Records that are not understood: the parts of them that are, so that no other disk gets their files.

use super::{DiskPart, KnownProcess, Leased, NextImage, PartRole};
use crate::image::Identity;
use control::supervisor::{Mode, Policy};
use control::tapdisk::Open;
use serde::Deserialize;
use serde_json::Value;
use std::path::PathBuf;

/// A record that is not understood.
#[derive(Clone, Debug)]
pub struct UnreadRecord {
    /// The disk that its name says.
    pub minor: Option<u32>,
    /// Reason for which it is not understood.
    pub why: String,
    /// The understood part of it.
    pub peek: Box<RecordPeek>,
}

/// The understood part of a record that as a whole is not.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RecordPeek {
    /// As in a record.
    pub open: Option<Open>,
    /// As in a record.
    pub identity: Option<Identity>,
    /// As in a record; of what is not understood, what it is.
    pub parts: Vec<DiskPart>,
    /// As in a record.
    pub files: Vec<PathBuf>,
    /// As in a record, and what its image is though the rest is not understood.
    pub next: Option<PeekNext>,
    /// As in a record.
    pub mode: Option<Mode>,
    /// As in a record.
    pub policy: Option<Policy>,
    /// As in a record.
    pub vbd: Option<String>,
    /// As in a record.
    pub process: Option<KnownProcess>,
    /// As in a record.
    pub lease: Option<String>,
    /// As in a record.
    pub reserved: bool,
    /// As in a record.
    pub leases: Vec<Leased>,
}

/// The understood part of the image to which an unpause leads.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct PeekNext {
    /// As in a record.
    pub open: Option<Open>,
    /// As in a record.
    pub identity: Option<Identity>,
    /// As in a record.
    pub parts: Vec<DiskPart>,
    /// As in a record.
    pub files: Vec<PathBuf>,
}

impl From<NextImage> for PeekNext {
    fn from(next: NextImage) -> PeekNext {
        PeekNext {
            open: Some(next.open),
            identity: next.identity,
            parts: next.parts,
            files: next.files,
        }
    }
}

/// The parts that a record or what it leads to says. A part that is not understood counts as writable, and no other
/// disk gets it.
fn parts(value: &Value) -> Vec<DiskPart> {
    let part = |value: &Value| {
        let unknown = || DiskPart {
            role: PartRole::Extent,
            path: PathBuf::new(),
            identity: value
                .get("identity")
                .and_then(|identity| serde_json::from_value(identity.clone()).ok()),
            born: None,
            mode: Mode::Write,
            locked: false,
        };
        serde_json::from_value(value.clone()).unwrap_or_else(|_| unknown())
    };
    let all = value.get("parts").and_then(Value::as_array);
    all.into_iter().flatten().map(part).collect()
}

impl RecordPeek {
    /// All that its process may have beside the image.
    pub fn all_parts(&self) -> impl Iterator<Item = &DiskPart> {
        let next = self.next.iter().flat_map(|next| &next.parts);
        self.parts.iter().chain(next)
    }

    pub(super) fn of(value: &Value) -> RecordPeek {
        fn field<T: serde::de::DeserializeOwned>(value: &Value, name: &str) -> Option<T> {
            serde_json::from_value(value.get(name)?.clone()).ok()
        }
        RecordPeek {
            open: field(value, "open"),
            identity: field(value, "identity"),
            parts: parts(value),
            files: field(value, "files").unwrap_or_default(),
            next: value
                .get("next")
                .filter(|next| next.is_object())
                .map(|next| PeekNext {
                    open: field(next, "open"),
                    identity: field(next, "identity"),
                    parts: parts(next),
                    files: field(next, "files").unwrap_or_default(),
                }),
            mode: field(value, "mode"),
            policy: field(value, "policy"),
            vbd: field(value, "vbd"),
            process: field(value, "process"),
            lease: field(value, "lease"),
            reserved: field(value, "reserved").unwrap_or_default(),
            leases: field(value, "leases").unwrap_or_default(),
        }
    }
}
