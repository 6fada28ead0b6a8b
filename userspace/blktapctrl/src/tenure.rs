// SPDX-License-Identifier: MIT OR Apache-2.0
//! The lease of an image that this host has.

use lease::{Keeper, Kind};
use std::path::PathBuf;
use std::sync::Arc;

/// A lease that is held, and kept.
#[derive(Clone, Debug)]
pub struct Tenure {
    /// Who keeps it.
    pub keeper: Arc<Keeper>,
    /// What it is of.
    pub image: PathBuf,
    /// How hosts agree about it.
    pub kind: Kind,
}
