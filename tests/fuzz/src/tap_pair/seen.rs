// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Events of both sides.

/// Counts of events in a run; the callers check that runs are not vacuous.
#[derive(Clone, Copy, Debug, Default)]
pub struct TapEvents {
    /// Requests posted.
    pub posted: u64,
    /// Deliveries.
    pub delivered: u64,
    /// Deliveries of requests that were delivered before.
    pub replayed: u64,
    /// Requests that waited for others when the process got all that it could.
    pub blocked: u64,
    /// Completions that gave a request its result.
    pub committed: u64,
    /// Requests that were returned.
    pub returned: u64,
    /// Requests without a queue that were released.
    pub released: u64,
    /// Completions that named no delivery.
    pub refused: u64,
    /// Completions that were malformed.
    pub malformed: u64,
    /// Processes that were fenced, with requests or without.
    pub deaths: u64,
    /// Requests that failed because no process served them, or their queue closed.
    pub failed: u64,
    /// Requests that failed because processes died of them.
    pub poisoned: u64,
    /// Claims of served processes that ended their service.
    pub claimed_again: u64,
    /// Claims of processes that were served on.
    pub widened: u64,
    /// Checks at which a remote server could still execute I/O of a dead process.
    pub unsettled: u64,
    /// Requests that failed because the end of their I/O cannot be known.
    pub lost: u64,
    /// Requests that a queue began at once.
    pub begun: u64,
    /// Requests among them that overlapped others that queues executed.
    pub begun_beside: u64,
    /// Requests among them that were in more than one part.
    pub begun_in_parts: u64,
    /// Requests among them that read zeroes.
    pub begun_with_zeroes: u64,
    /// Requests that a queue began when they had waited for others.
    pub resumed: u64,
    /// Requests that a queue was to begin and that were not mapped any more.
    pub missed: u64,
    /// Requests that a queue executed.
    pub executed: u64,
    /// Requests among them that failed.
    pub redone: u64,
}
