// SPDX-License-Identifier: MIT OR Apache-2.0
//! The lease of an image that this host has.

use control::Target;
use lease::LeaseRenewer;
use std::sync::Arc;

/// A lease that is held, and kept.
#[derive(Clone, Debug)]
pub struct HeldLease {
    /// Renews the lease.
    pub keeper: Arc<LeaseRenewer>,
    /// The image, and the kind of its lease.
    pub target: Target,
}
