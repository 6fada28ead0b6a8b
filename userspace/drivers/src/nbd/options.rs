// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is wanted of an export.

use std::time::Duration;

/// How long a server that has closed its connection may go on with what it took from it.
const CLOSED: Duration = Duration::from_secs(10);
/// The same for one that was given up: what it was sent may still be on its way.
const GIVEN_UP: Duration = Duration::from_millis(crate::driver::SETTLE_MS as u64);

/// What is wanted of an export.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its name.
    pub export: String,
    /// What to call it in messages.
    pub name: String,
    /// It is to be written.
    pub writable: bool,
    /// The name or address that the server proves to have. Nothing is said to a server that does not; without a name
    /// here, nothing is encrypted.
    pub tls: Option<String>,
    /// How long is waited for what may be executed late: for tests.
    pub settle: Settle,
}

/// How long is waited until a lost connection is replaced, if it is not known what became of a change.
#[derive(Clone, Copy, Debug)]
pub struct Settle {
    /// Where the server has closed it.
    pub closed: Duration,
    /// Where it was given up.
    pub given_up: Duration,
}

impl Settle {
    /// For a server behind a network: who closes a connection may be something in between.
    pub fn network() -> Self {
        Self {
            closed: GIVEN_UP,
            given_up: GIVEN_UP,
        }
    }
}

impl Default for Settle {
    fn default() -> Self {
        Self {
            closed: CLOSED,
            given_up: GIVEN_UP,
        }
    }
}
