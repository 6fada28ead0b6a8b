// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Counters of one queue, and its state at this moment.
//!
//! The first seven have the names and the meaning of the C driver's sysfs files. All are
//! monotonic for the life of the queue.

use crate::engine::timing::times::Times;

/// Counters of one queue. Sectors are 512 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Times that a request had to wait: for pages, for a number, or, as a barrier, for all before it.
    pub oo_req: u64,
    /// Reads started.
    pub rd_req: u64,
    /// Writes started.
    pub wr_req: u64,
    /// Flushes and barriers started.
    pub f_req: u64,
    /// Discards started.
    pub ds_req: u64,
    /// Sectors read.
    pub rd_sect: u64,
    /// Sectors written.
    pub wr_sect: u64,
    /// Requests refused by validation.
    pub refused: u64,
    /// Requests answered with an error after they were accepted.
    pub failed: u64,
    /// Requests whose pages were mapped instead of copied.
    pub mapped: u64,
    /// Passes over the ring.
    pub passes: u64,
    /// Events sent to the frontend.
    pub notified: u64,
    /// Number and duration of I/Os.
    pub times: Times,
    /// Nanoseconds for which requests waited for pages, and made all requests behind them wait.
    pub page_wait_ns: u64,
    /// Pieces beyond the first, of requests that were done in pieces for want of pages.
    pub pieces: u64,
    /// Passes that found the ring full: the guest could not ask for more.
    pub ring_full: u64,
}

/// State of a queue at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLoad {
    /// Requests that are taken and not answered.
    pub requests: u16,
    /// When the backend got the oldest request that it has, in nanoseconds.
    pub oldest: Option<u64>,
    /// Pages of the guest that stay mapped, in use or not.
    pub kept: u16,
}
