// SPDX-License-Identifier: MIT OR Apache-2.0
//! The short way of a read or write that is one operation of the storage, and that no other part of this process wants to
//! know of: the request waits in a table for the operation, and no task is made for it.

use super::{Failed, Server};
use crate::ranges::{Range, RangeClaim, Source};
use diskio::{op_result, Bytes, Errno, ResultMailbox, Writing};
use drivers::PlaceHold;
use std::cell::RefCell;
use std::rc::Rc;
use tapdev::{Kind, Request};

/// A read or write under way.
#[derive(Debug)]
struct QuickIo {
    request: Request,
    claim: RangeClaim,
    writing: Writing,
    hold: PlaceHold,
}

/// The reads and writes on the short way.
#[derive(Debug, Default)]
pub(super) struct QuickTable {
    /// By tag.
    under_way: RefCell<Vec<Option<QuickIo>>>,
    ended: ResultMailbox,
    /// Results that are being looked at; kept for its memory.
    results: RefCell<Vec<(u64, i32)>>,
}

impl QuickTable {
    fn is_free(&self, tag: u16) -> bool {
        let under_way = self.under_way.borrow();
        under_way.get(usize::from(tag)).is_none_or(Option::is_none)
    }

    fn put(&self, tag: u16, quick: QuickIo) {
        let (mut under_way, tag) = (self.under_way.borrow_mut(), usize::from(tag));
        if under_way.len() <= tag {
            under_way.resize_with(tag + 1, || None);
        }
        under_way[tag] = Some(quick);
    }

    fn take(&self, tag: u64) -> Option<QuickIo> {
        let tag = usize::try_from(tag).ok()?;
        self.under_way.borrow_mut().get_mut(tag)?.take()
    }
}

impl Server {
    /// Begins a read or write at once, if it may take the short way. Else nothing has happened, and the request is returned.
    pub(super) fn begin_quick(&self, request: Request) -> Option<Request> {
        let writes = match request.kind {
            Kind::Read => false,
            Kind::Write => true,
            Kind::Flush | Kind::Discard { .. } | Kind::WriteZeroes => return Some(request),
        };
        let is_plain = !request.preflush && !request.fua;
        let is_alone = !self.tracing.is_on()
            && self.terms.throttle.is_open()
            && self.ranges.is_free_for_guest()
            && (!writes || (self.twin.borrow().is_none() && self.notes.borrow().is_none()));
        let may_begin = is_plain && is_alone && self.quick.is_free(request.tag());
        if !may_begin || self.check(&request).is_err() {
            return Some(request);
        }
        let offset = request.offset;
        let begun = request.data.as_ref().and_then(|data| match writes {
            true => self.disk.begin_write(offset, &Bytes::from(data.clone())),
            false => self.disk.begin_read(offset, data),
        });
        let Some(io) = begun else {
            return Some(request);
        };
        let range = Range {
            from: offset,
            end: offset.saturating_add(request.len),
            writes,
        };
        let tag = request.tag();
        let hold = io.deliver_to(&self.quick.ended, tag.into());
        self.in_flight.set(self.in_flight.get() + 1);
        self.quick.put(
            tag,
            QuickIo {
                claim: self.ranges.enter(Source::Guest, range),
                writing: self.terms.lost.write(),
                request,
                hold,
            },
        );
        None
    }

    /// Completes the requests on the short way whose operations have ended.
    pub(super) fn end_quick(self: &Rc<Self>) {
        let mut results = self.quick.results.take();
        self.quick.ended.take(&mut results);
        for (tag, result) in results.drain(..) {
            if let Some(quick) = self.quick.take(tag) {
                self.end(quick, result);
                self.in_flight.set(self.in_flight.get() - 1);
            }
        }
        self.quick.results.replace(results);
    }

    fn end(self: &Rc<Self>, quick: QuickIo, result: i32) {
        let QuickIo {
            request,
            claim,
            writing,
            hold,
        } = quick;
        // The operation has ended.
        drop(hold);
        let executed = match op_result(result) {
            Ok(done) if u64::from(done) == request.len => {
                if request.kind == Kind::Write {
                    self.terms.lost.acknowledge(writing);
                }
                Ok(())
            }
            // The whole request once more, in as many operations as it takes. Its range stays claimed.
            Ok(_) | Err(Errno::INTR | Errno::AGAIN) => {
                let hold = self.hold();
                self.runtime.tasks.spawn(async move {
                    let server = &hold.0;
                    let executed = server.execute_alone(&request).await;
                    drop(claim);
                    server.link.commit(server.complete(&request, executed));
                });
                return;
            }
            Err(error) => Err(Failed::alone(error)),
        };
        drop(claim);
        self.link.commit(self.complete(&request, executed));
    }
}
