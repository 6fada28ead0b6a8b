// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! What happened to both.

/// What happened in a run; the callers check that runs are not vacuous.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// Requests posted.
    pub posted: u64,
    /// Deliveries.
    pub delivered: u64,
    /// Those of requests that were delivered before.
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
    /// Requests that failed because nobody served them, or their queue closed.
    pub failed: u64,
    /// Requests that failed because processes died of them.
    pub poisoned: u64,
    /// Claims of processes that were served, and were not from then on.
    pub claimed_again: u64,
    /// Claims of processes that were served on.
    pub widened: u64,
    /// Looks at which I/O of a dead process could still go on where nobody sees it.
    pub unsettled: u64,
    /// Requests that failed because nobody can know whether they are over.
    pub lost: u64,
    /// Requests that a queue began at once.
    pub begun: u64,
    /// Of these, those that overlapped others that queues executed.
    pub begun_beside: u64,
    /// Those that were in more than one part.
    pub begun_in_parts: u64,
    /// Of those that were begun, those that read zeroes.
    pub begun_with_zeroes: u64,
    /// Requests that a queue began when they had waited for others.
    pub resumed: u64,
    /// Of those that it was to begin, those that were not mapped any more.
    pub missed: u64,
    /// Requests that a queue executed.
    pub executed: u64,
    /// Requests that failed there.
    pub redone: u64,
}
