// SPDX-License-Identifier: MIT OR Apache-2.0
//! Options of an export.

use std::time::Duration;

/// Bytes of answered changes that the driver keeps in memory at most.
pub const UNFLUSHED: usize = 16 << 20;
/// Time in which a server that has closed its connection may still execute requests from it.
const CLOSED: Duration = Duration::from_secs(10);
/// Time in which a server may still execute requests from a connection that was given up: they may still be on their
/// way.
const GIVEN_UP: Duration = Duration::from_millis(crate::driver::SETTLE_MS as u64);
/// Time between attempts to connect, the first and the longest one.
pub const PAUSES: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];

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
    /// Times to wait before a lost connection is replaced: for tests.
    pub settle: RetryTimes,
    /// Bytes of answered changes after which the driver flushes, even if the guest does not: for tests, less than
    /// [`UNFLUSHED`].
    pub unflushed: usize,
}

/// Times until a lost connection is replaced.
#[derive(Clone, Copy, Debug)]
pub struct RetryTimes {
    /// After the server has closed it, if the fate of a change is unknown.
    pub closed: Duration,
    /// After this client has given it up, if the fate of a change is unknown.
    pub given_up: Duration,
    /// Between two attempts, the first time and the longest time.
    pub pauses: [Duration; 2],
}

impl RetryTimes {
    /// Returns the times for a server behind a network: another machine in between may have closed the connection.
    pub fn network() -> Self {
        Self {
            closed: GIVEN_UP,
            given_up: GIVEN_UP,
            pauses: PAUSES,
        }
    }
}

impl Default for RetryTimes {
    fn default() -> Self {
        Self {
            closed: CLOSED,
            given_up: GIVEN_UP,
            pauses: PAUSES,
        }
    }
}
