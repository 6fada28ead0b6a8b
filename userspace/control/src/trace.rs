// SPDX-License-Identifier: MIT OR Apache-2.0
//! Traces of the requests of a disk's guest.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Destination of a trace. Of the file, see the crate `trace`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceTo {
    /// The file, where nothing is.
    pub path: PathBuf,
    /// The trace also has the data of writes.
    #[serde(default)]
    pub data: bool,
    /// Bytes of the file: what is older is lost.
    pub size: u64,
}

/// A running trace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tracing {
    /// The file.
    pub path: PathBuf,
    /// The trace also has the data of writes.
    pub data: bool,
    /// Bytes of the file.
    pub size: u64,
    /// When it began, in milliseconds since 1970.
    pub at_ms: u64,
}
