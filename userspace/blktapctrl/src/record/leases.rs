// SPDX-License-Identifier: MIT OR Apache-2.0
//! Leases of a disk's images that this host has for the disk, or may have.
//!
//! Each is on record from before the request to the storage until after its release, whatever its kind. The supervisor
//! that finds the record gives it up, or continues with it, whoever took it.

use super::Record;
use control::tapdisk::Open;
use control::{LeaseKind, Target};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// How far a lease has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hold {
    /// The supervisor has requested it from the storage. No process may do I/O under it yet.
    Taking,
    /// This host has it.
    Held,
    /// The lease is being given up: the image is closed, and no process opens it before that is done.
    Leaving,
}

/// Lease of one image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leased {
    /// The image, and the kind of its lease.
    pub target: Target,
    /// How far it has come.
    pub hold: Hold,
}

/// Returns the target that a disk is to open, if its image needs a lease.
#[must_use]
pub fn leased(open: &Open) -> Option<&Target> {
    let is_alone = *open.target.lease() != LeaseKind::Lock && !open.read_only && !open.shared;
    let target = Some(&open.target).filter(|_| is_alone);
    target.filter(|target| target.path().is_some())
}

/// The image of a target that has a lease.
#[must_use]
pub fn image_of(target: &Target) -> &Path {
    target.path().unwrap_or(Path::new(""))
}

/// Both targets name the same lease.
#[must_use]
pub fn is_one_lease(one: &Target, other: &Target) -> bool {
    (one.lease(), one.path()) == (other.lease(), other.path())
}

impl Record {
    /// All leases that this host has for the disk, or may have.
    #[must_use]
    pub fn leases(&self) -> &[Leased] {
        &self.leases
    }

    /// Number by which hosts and supervisors know this disk as the holder of its leases.
    #[must_use]
    pub fn token(&self) -> Option<&str> {
        self.lease.as_deref()
    }

    /// How far the lease of a target has come; nothing if this host does not have it.
    #[must_use]
    pub fn hold(&self, target: &Target) -> Option<Hold> {
        let mut all = self.leases.iter();
        let its = all.find(|leased| is_one_lease(&leased.target, target));
        its.map(|leased| leased.hold)
    }

    /// Records that the supervisor is about to request a lease under this token.
    pub fn take_lease(&mut self, token: String, target: &Target) {
        self.lease = Some(token);
        if self.hold(target) != Some(Hold::Held) {
            self.set_hold(target, Hold::Taking);
        }
    }

    /// A lease has come this far.
    pub fn set_hold(&mut self, target: &Target, hold: Hold) {
        let mut all = self.leases.iter_mut();
        match all.find(|leased| is_one_lease(&leased.target, target)) {
            Some(leased) => leased.hold = hold,
            None => self.leases.push(Leased {
                target: target.clone(),
                hold,
            }),
        }
    }

    /// This host does not have a lease any more.
    pub fn drop_lease(&mut self, target: &Target) {
        self.leases
            .retain(|leased| !is_one_lease(&leased.target, target));
        if self.leases.is_empty() {
            self.lease = None;
        }
    }

    /// This host has a lease that is the host's, which no other disk of it may take too. A disk that finds it lost
    /// stops.
    #[must_use]
    pub fn is_reserved(&self) -> bool {
        self.leases
            .iter()
            .any(|leased| leased.hold == Hold::Held && leased.target.lease().is_of_host())
    }

    /// Continues with the leases of a record of which this could be understood.
    pub fn inherit_leases(&mut self, token: Option<String>, reserved: bool, all: Vec<Leased>) {
        (self.lease, self.reserved, self.leases) = (token, reserved, all);
        self.understand_leases();
    }

    /// Learns from what a supervisor wrote that knows the token and `reserved` alone, before this one or after it.
    pub(super) fn understand_leases(&mut self) {
        let reserved = std::mem::take(&mut self.reserved);
        if self.lease.is_none() {
            self.leases.clear();
            return;
        }
        let next = self.next.as_ref().map(|next| &next.open);
        let opens = self.open.iter().chain(next);
        let targets: Vec<Target> = opens.filter_map(leased).cloned().collect();
        for target in targets {
            let is_of_host = target.lease().is_of_host();
            let hold = match self.hold(&target) {
                Some(Hold::Held) | None if is_of_host && !reserved => Hold::Taking,
                Some(hold) if !is_of_host || !reserved => hold,
                _ => Hold::Held,
            };
            self.set_hold(&target, hold);
        }
    }
}
