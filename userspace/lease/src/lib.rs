// SPDX-License-Identifier: MIT OR Apache-2.0
//! The lease of an image: of all hosts that reach it, one may write it.
//!
//! A [`Lease`] is opened without being taken ([`open`]), looked at ([`Lease::inspect`]), taken with a
//! bounded wait ([`Lease::take`]), kept by a heartbeat ([`Lease::keep`]) and given up ([`Lease::give_up`]).
//! Calls block, because storage does: they belong on a thread of their own, and a [`LeaseRenewer`] is one that
//! does nothing but keep a lease.
//!
//! # Duties of the holder
//!
//! - **Ask [`Term::is_over`] before each I/O on the image**, reading included. When it is over, hold requests and do
//!   not fail them: the storage may answer again, and the [`LeaseRenewer`] continues with its generation if no other host has
//!   taken the lease in the meantime. The term is a time of this host's own clock, so it ends without a message: also
//!   when the keeper of the lease has died, or the host was stopped and resumes.
//! - **Stop for good when the lease is lost** ([`RenewerNews::Lost`]), because another host has a later generation. The disk
//!   is to be paused, and no new request is to reach the image.
//! - **Give it up only when all of its I/O has ended and is durable**, because the next holder writes at once.
//! - The keeper of the lease and the process that does I/O may be two: [`Term::until`] is a time that both know
//!   ([`now`]), so a heartbeat has to send one number only.
//! - A process that ends without giving it up leaves it held. Its successor for that disk on that host continues with
//!   [`Lease::resume`], which needs the generation and the [`LeaseClaim::token`] of the first.
//!
//! # Drivers
//!
//! [`Kind::Record`] is a small file beside the image ([`mod@record`] says by which rules, and what they rest on).
//! [`Kind::Reservation`] is one of the storage itself ([`mod@reservation`]): its term has no end, because what a holder
//! does that has lost it the storage refuses. [`Kind::Sanlock`] is a resource of sanlock ([`mod@sanlock`]).
//! [`Kind::Lock`] is the lock that every tapdisk takes on its image anyway: it is as good as the file system's locks
//! are between hosts.
#![forbid(unsafe_code)]

mod block_on;
mod host;
mod lease_term;
mod location;
mod lock;
pub mod record;
mod renewer;
pub mod reservation;
pub mod sanlock;
#[cfg(test)]
mod sim;
mod timestamps;

pub use control::LeaseKind as Kind;
pub use host::{Host, LeaseClaim, Token};
pub use lease_term::{now, Term};
pub use location::{open, place, LeaseLocation};
pub use renewer::{LeaseRenewer, RenewerNews};
pub use timestamps::date;

use control::Failure;
use serde::Serialize;
use std::fmt;
use std::time::Duration;

/// The visible holder of a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Holder {
    /// The name of its host; an `id-` of five digits where that is all that is known.
    pub host: String,
    /// Its host's `/etc/machine-id`; zeroes if the driver does not know.
    pub machine: String,
    /// Which disk has it, in the words of its host.
    pub disk: String,
    /// How often the lease had been taken when it was.
    pub generation: u64,
    /// Since when, in milliseconds since 1970 by the holder's clock: for people, and compared with nothing.
    pub since_ms: u64,
    /// The holder is this host, in the present boot.
    pub is_here: bool,
    /// The key under which the storage has it, if it has one. The generation is the same number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The host as sanlock knows it, if it is of that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sanlock: Option<Owner>,
}

/// A host of a lockspace of sanlock's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Owner {
    /// Its number there.
    pub host_id: u64,
    /// How often a host had joined under this number when it took the lease.
    pub generation: u64,
    /// `live`, `failing`, `dead`, `gone` (it has left, or joined anew) or `unknown`, as this host sees it.
    pub state: String,
}

/// State of a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum LeaseView {
    /// The image has no owner.
    Free {
        /// How often it was taken.
        generation: u64,
        /// The last holder, that gave it up or broke it.
        last: Option<Holder>,
    },
    /// A host is about to have it, and writes nothing yet.
    Claimed(Holder),
    /// A host has it.
    Held(Holder),
}

/// A lease that is held.
#[derive(Clone, Debug)]
pub struct Grant {
    /// How often it was taken, this time included.
    pub generation: u64,
    /// Until when its holder may do I/O.
    pub term: Term,
}

/// The operator says that the holder's host is dead: that it was powered off, or that nothing of its I/O
/// can reach the storage any more for another reason. No program can know that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HolderIsDead {
    /// The generation of the holder that is meant, or its key as a number: what was true of one is not of who came
    /// after it.
    pub generation: u64,
}

/// A lease of one image. Each call does its I/O and returns; no work continues after it.
pub trait Lease: Send + fmt::Debug {
    /// Who has it? Changes nothing.
    ///
    /// # Errors
    /// It cannot be read, or was made by a program that is newer.
    fn inspect(&mut self) -> Result<LeaseView, Failure>;

    /// Takes it; waits so long for who has it.
    ///
    /// # Errors
    /// [`Busy`](control::Code::Busy): another disk or host has it; the sentence names the holder, the time, and the
    /// remedy.
    fn take(&mut self, wait: Duration) -> Result<Grant, Failure>;

    /// Continues with the lease of an earlier process for this disk on this host since it was booted: that process has
    /// ended, and so has its I/O.
    ///
    /// # Errors
    /// Another holder has it.
    fn resume(&mut self, generation: u64) -> Result<Grant, Failure>;

    /// A heartbeat: makes the term longer. To be done every [`beat`](Self::beat).
    ///
    /// # Errors
    /// [`Gone`](control::Code::Gone): it is lost. Any other: try again, the term lasts to its end.
    fn keep(&mut self) -> Result<(), Failure>;

    /// Time between two heartbeats; nothing if it needs none.
    fn beat(&self) -> Option<Duration>;

    /// Whether breaking it watches first, for some seconds, whether its holder lives.
    fn watches(&self) -> bool {
        false
    }

    /// Gives it up. The term is over before another host can take it.
    ///
    /// # Errors
    /// It may still be this host's: try again. [`Gone`](control::Code::Gone): it was lost before.
    fn give_up(&mut self) -> Result<(), Failure>;

    /// Lets go of what is left of a lease that is lost: its holder has stopped, and nothing of its I/O is under way.
    /// Until then sanlock takes the host for one that writes, and has it reset.
    ///
    /// # Errors
    /// It is not let go of: try again.
    fn settle(&mut self) -> Result<(), Failure> {
        Ok(())
    }

    /// Takes it away from a holder who is dead, and leaves it free. Watches for a while whether he is, or has the
    /// storage end what he has under way, and returns who it was.
    ///
    /// # Errors
    /// [`Busy`](control::Code::Busy): he lives.
    fn break_off(&mut self, confirmed: HolderIsDead) -> Result<Option<Holder>, Failure>;
}
