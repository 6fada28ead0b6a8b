// SPDX-License-Identifier: MIT OR Apache-2.0
//! It is written down what the guest of a disk asks for.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Where that is to be written down. Of the file, see the crate `trace`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceTo {
    /// The file, where nothing is.
    pub path: PathBuf,
    /// What is written to the disk, too.
    #[serde(default)]
    pub data: bool,
    /// Bytes of the file: what is older is lost.
    pub size: u64,
}

/// Where it is written down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tracing {
    /// The file.
    pub path: PathBuf,
    /// What is written to the disk, too.
    pub data: bool,
    /// Bytes of the file.
    pub size: u64,
    /// When it began, in milliseconds since 1970.
    pub at_ms: u64,
}
