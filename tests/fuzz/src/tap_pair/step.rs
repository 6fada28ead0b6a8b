// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Steps of the shadow of a tap disk and of its model.

use ring::response::ResponseStatus;
use ring::tap::abi;
use ring::tap::checked::{Fence, RequestOutcome};
use ring::tap::extent::{ExtentAccess, Sectors};
use ring::tap::shadow::PostedRequest;

/// A step of a shadow. `ago` is the number of openers between the calling process and the newest one.
#[derive(Clone, Copy, Debug)]
pub enum ShadowStep {
    /// A queue posts a request.
    Post(u16, u16, PostedRequest),
    /// The process fetches at most this number; and its `ago`.
    Deliver(usize, u64),
    /// The process commits a tag: with its generation or one beside it; and its `ago`.
    Commit(u16, RequestOutcome, u32, u64),
    /// The process sends any 16 bytes as a completion; and its `ago`.
    Say([u8; 16], u64),
    /// The process checks whether there is a request to fetch.
    Look,
    /// A queue takes at most this number of results.
    Reap(u16, usize),
    /// A process opens the disk.
    Open,
    /// A request fails after this number of deaths.
    Limit(u8),
    /// The process declares that no request caused the last death; and its `ago`.
    Excuse(u64),
    /// The process claims when its I/O is over after its end; and its `ago`.
    Claim(Fence, u64),
    /// The process starts the disk; and its `ago`.
    Start(u64),
    /// The process is gone.
    Close,
    /// No I/O of the process is visible.
    Quiet,
    /// This number of milliseconds passes.
    Pass(u32),
    /// A queue begins to close.
    Withdraw(u16),
    /// A queue is gone.
    Orphan(u16),
    /// The time without a process is over: at most this number of requests fail.
    Fail(usize),
    /// A queue posts a request, and begins it if it can.
    Begin(u16, u16, PostedRequest),
    /// A queue begins at most this number of waiting requests.
    Resume(u16, usize),
    /// A queue has executed a tag, with this result.
    End(u16, ResponseStatus),
    /// The process maps a range to a backing, or to [`ZEROES`](super::ZEROES), with a generation that is this many
    /// changes old.
    Set(Sectors, ExtentAccess, u16, u32),
    /// The process maps much of the range of most requests to a backing, but in parts that are in another order.
    Scatter(u16),
    /// The process declares a flush of the disk a flush of the backing.
    SetFlush,
    /// The process recalls a range.
    Recall(Sectors),
    /// The disk gets a backing.
    Add(u16),
    /// The disk loses a backing.
    Remove(u16),
}

/// Steps after which the I/O of a dead process is over.
pub const OVER: [ShadowStep; 3] = [
    ShadowStep::Quiet,
    ShadowStep::Pass(abi::MAX_SETTLE_MS),
    ShadowStep::Quiet,
];
