// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! What can be done to the shadow of a tap disk and to its model.

use ring::response::Status;
use ring::tap::abi;
use ring::tap::checked::{Fence, Outcome};
use ring::tap::extent::{Access, Sectors};
use ring::tap::shadow::Request;

/// What is done to a shadow. An `ago` is how many openers earlier the process is that calls.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// A queue posts a request.
    Post(u16, u16, Request),
    /// The process fetches at most so many; and with its `ago`.
    Deliver(usize, u64),
    /// It commits a tag: with its generation or one beside it; and with its `ago`.
    Commit(u16, Outcome, u32, u64),
    /// It says any 16 bytes, as a completion; and with its `ago`.
    Say([u8; 16], u64),
    /// It asks whether there is something to fetch.
    Look,
    /// A queue takes at most so many results.
    Reap(u16, usize),
    /// A process opens the disk.
    Open,
    /// So many deaths at a request are enough.
    Limit(u8),
    /// It says that the last death was no fault of a request; and with its `ago`.
    Excuse(u64),
    /// It says when its I/O is over after its end; and with its `ago`.
    Claim(Fence, u64),
    /// It starts it; and with its `ago`.
    Start(u64),
    /// It is gone.
    Close,
    /// No I/O of it is to be seen.
    Quiet,
    /// So many milliseconds pass.
    Pass(u32),
    /// A queue begins to close.
    Withdraw(u16),
    /// A queue is gone.
    Orphan(u16),
    /// The time without a process is over: at most so many fail.
    Fail(usize),
    /// A queue posts a request, and begins it if it can.
    Begin(u16, u16, Request),
    /// A queue begins at most so many that waited.
    Resume(u16, usize),
    /// A queue has executed a tag, with this result.
    End(u16, Status),
    /// The process says that a range is in a backing, or [`ZEROES`](super::ZEROES); it knows that many changes less than there were.
    Set(Sectors, Access, u16, u32),
    /// It says that much of what requests are near to is in a backing, but in parts that lie in another order.
    Scatter(u16),
    /// It says that a flush is one of the backing.
    SetFlush,
    /// It takes a range back.
    Recall(Sectors),
    /// The disk gets a backing.
    Add(u16),
    /// The disk loses a backing.
    Remove(u16),
}

/// After the end of a process its I/O is over.
pub const OVER: [Step; 3] = [Step::Quiet, Step::Pass(abi::MAX_SETTLE_MS), Step::Quiet];
