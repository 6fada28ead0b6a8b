// SPDX-License-Identifier: MIT OR Apache-2.0
//! The short way of a read or write that is one operation of the storage, and that no other part of this process wants to
//! know of: its task only waits for the operation.

use super::{Failed, Server};
use crate::ranges::{Range, RangeClaim, Source};
use diskio::{Bytes, Errno, Pending, Writing};
use tapdev::abi::Completion;
use tapdev::{Kind, Request};

/// A read or write under way.
#[derive(Debug)]
pub(super) struct QuickIo {
    claim: RangeClaim,
    io: Pending,
    writing: Writing,
}

impl Server {
    /// Begins a read or write at once, if it may take the short way. Else nothing has happened.
    pub(super) fn begin_quick(&self, request: &Request) -> Option<QuickIo> {
        let writes = match request.kind {
            Kind::Read => false,
            Kind::Write => true,
            Kind::Flush | Kind::Discard { .. } | Kind::WriteZeroes => return None,
        };
        let is_plain = !request.preflush && !request.fua;
        let is_alone = !self.tracing.is_on()
            && self.terms.throttle.is_open()
            && self.ranges.is_free_for_guest()
            && (!writes || (self.twin.borrow().is_none() && self.notes.borrow().is_none()));
        if !is_plain || !is_alone || self.check(request).is_err() {
            return None;
        }
        let (offset, data) = (request.offset, request.data.as_ref()?);
        let io = match writes {
            true => self.disk.begin_write(offset, &Bytes::from(data.clone())),
            false => self.disk.begin_read(offset, data),
        }?;
        let range = Range {
            from: offset,
            end: offset.saturating_add(request.len),
            writes,
        };
        Some(QuickIo {
            claim: self.ranges.enter(Source::Guest, range),
            io,
            writing: self.terms.lost.write(),
        })
    }

    /// Returns the completion of a request that took the short way.
    pub(super) async fn serve_quick(&self, request: &Request, quick: QuickIo) -> Completion {
        let QuickIo { claim, io, writing } = quick;
        let executed = match io.await {
            Ok(done) if u64::from(done) == request.len => {
                if request.kind == Kind::Write {
                    self.terms.lost.acknowledge(writing);
                }
                Ok(())
            }
            // The whole request once more, in as many operations as it takes. Its range stays claimed.
            Ok(_) | Err(Errno::INTR | Errno::AGAIN) => Box::pin(self.execute_alone(request)).await,
            Err(error) => Err(Failed::alone(error)),
        };
        drop(claim);
        self.complete(request, executed)
    }
}
