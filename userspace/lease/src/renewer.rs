// SPDX-License-Identifier: MIT OR Apache-2.0
//! A thread that keeps a lease until it is given up or lost.

use crate::{Grant, Lease, Term};
use control::{Code, Failure};
use std::io;
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Bytes of the thread's stack.
const STACK: usize = 256 << 10;

/// Order to the thread.
enum RenewerOrder {
    GiveUp(Sender<Result<(), Failure>>),
    LeaveHeld,
}

/// News to the holder of a lease, from the thread that keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RenewerNews {
    /// The term is longer now: until this time of [`now`](crate::now).
    Kept(Duration),
    /// A heartbeat failed; the next one follows before the term ends, or after.
    Missed(Failure),
    /// Another host has it, or may: there will be no further heartbeat. The disk is to stop for good.
    Lost(Failure),
}

/// Keeps a lease. Dropping it ends the heartbeats and leaves the lease held, as the death of the process
/// would.
#[derive(Debug)]
pub struct LeaseRenewer {
    errands: Sender<RenewerOrder>,
    term: Term,
    generation: u64,
    thread: Option<JoinHandle<Box<dyn Lease>>>,
}

impl LeaseRenewer {
    /// Keeps a lease that was just taken or resumed, and tells what becomes of it. `tell` is called on the
    /// thread that keeps it, and must not wait for anything.
    ///
    /// # Errors
    /// There can be no further thread.
    pub fn start(
        lease: Box<dyn Lease>,
        grant: &Grant,
        tell: impl FnMut(RenewerNews) + Send + 'static,
    ) -> io::Result<LeaseRenewer> {
        let (errands, queue) = channel();
        let term = grant.term.clone();
        let builder = thread::Builder::new().name("lease".into());
        let its = term.clone();
        let thread = builder
            .stack_size(STACK)
            .spawn(move || keep(lease, &its, &queue, tell))?;
        Ok(LeaseRenewer {
            errands,
            term,
            generation: grant.generation,
            thread: Some(thread),
        })
    }

    /// Until when the holder may do I/O.
    #[must_use]
    pub fn term(&self) -> &Term {
        &self.term
    }

    /// The generation that is kept.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Returns true if the lease was given up or lost.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Gives it up; all I/O of its holder has ended and is durable. Waits for the storage. If that fails the heartbeats
    /// continue, so that the caller can try again.
    ///
    /// # Errors
    /// As [`Lease::give_up`].
    pub fn give_up(&self) -> Result<(), Failure> {
        let (sender, answer) = channel();
        let gone = || {
            Failure::new(
                Code::Gone,
                "the lease is not kept any more: it was given up or lost",
            )
        };
        self.errands
            .send(RenewerOrder::GiveUp(sender))
            .map_err(|_| gone())?;
        answer.recv().map_err(|_| gone())?
    }
}

impl Drop for LeaseRenewer {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.errands.send(RenewerOrder::LeaveHeld);
        // Not waited for: its storage may hang.
        drop(self.thread.take());
    }
}

fn keep(
    mut lease: Box<dyn Lease>,
    term: &Term,
    errands: &Receiver<RenewerOrder>,
    mut tell: impl FnMut(RenewerNews),
) -> Box<dyn Lease> {
    loop {
        let errand = match lease.beat() {
            Some(beat) => errands.recv_timeout(beat),
            None => errands.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match errand {
            Ok(RenewerOrder::GiveUp(answer)) => {
                let result = lease.give_up();
                let is_over = match &result {
                    Ok(()) => true,
                    Err(failure) => failure.code == Code::Gone,
                };
                // The asker may have ended.
                let _ = answer.send(result);
                if is_over {
                    return lease;
                }
            }
            Ok(RenewerOrder::LeaveHeld) | Err(RecvTimeoutError::Disconnected) => return lease,
            Err(RecvTimeoutError::Timeout) => match lease.keep() {
                Ok(()) => tell(RenewerNews::Kept(term.until())),
                Err(failure) if failure.code == Code::Gone => {
                    term.end();
                    tell(RenewerNews::Lost(failure));
                    return lease;
                }
                Err(failure) => tell(RenewerNews::Missed(failure)),
            },
        }
    }
}
