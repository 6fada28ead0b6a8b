// SPDX-License-Identifier: MIT OR Apache-2.0
//! Options of an export.

use std::time::Duration;

/// Time in which a server that has closed its connection may still execute requests from it.
const CLOSED: Duration = Duration::from_secs(10);
/// Time in which a server may still execute requests from a connection that was given up: they may still be on their
/// way.
const GIVEN_UP: Duration = Duration::from_millis(crate::driver::SETTLE_MS as u64);

/// Options of an export.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the export.
    pub export: String,
    /// Name of the disk in messages.
    pub name: String,
    /// True if the disk may be changed.
    pub writable: bool,
    /// Name or address that the server's certificate must have. The client sends nothing to a server without that
    /// proof; without a name here, the connection is not encrypted.
    pub tls: Option<String>,
    /// Time to wait for changes that may be executed late: for tests.
    pub settle: Settle,
}

/// Time until a lost connection is replaced, if the fate of a change is unknown.
#[derive(Clone, Copy, Debug)]
pub struct Settle {
    /// After the server has closed it.
    pub closed: Duration,
    /// After this client has given it up.
    pub given_up: Duration,
}

impl Settle {
    /// Returns the times for a server behind a network: another machine in between may have closed the connection.
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
