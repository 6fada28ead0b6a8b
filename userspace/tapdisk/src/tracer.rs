// SPDX-License-Identifier: MIT OR Apache-2.0
//! Trace of the disk's requests, for an administrator who wants one.
//!
//! A request is in the file of the trace before it is executed, by one plain write that leaves it in the kernel's page
//! cache: so it outlives this process. Requests wait for the storage of the trace only if that cache is full. A trace
//! that cannot be stored ends, and the disk is served without it.

use crate::io_errors::wait;
use crate::server::{now_ns, Failed};
use control::stats::Stats;
use control::Failure;
use diskio::{Bytes, Errno};
use std::cell::RefCell;
use std::fs::File;
use std::future::{poll_fn, Future};
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::task::{Poll, Waker};
use trace::{Flags, Operation, TraceEntry, Writer, BLOCK};

/// Request to the disk.
#[derive(Clone, Debug)]
pub(crate) struct TracedRequest {
    pub(crate) operation: Operation,
    /// Offset on the disk, in bytes.
    pub(crate) offset: u64,
    /// Bytes.
    pub(crate) len: u64,
    pub(crate) flags: Flags,
    /// Data of a write.
    pub(crate) data: Option<Bytes>,
}

/// Traces of this process that have ended with an error.
#[derive(Debug)]
pub(crate) struct EndedTraces {
    stats: Rc<RefCell<Stats>>,
    /// The last one, until there is another trace.
    why: RefCell<Option<String>>,
    waiting: RefCell<Vec<Waker>>,
}

impl EndedTraces {
    /// Counts them.
    pub(crate) fn new(stats: &Rc<RefCell<Stats>>) -> Rc<Self> {
        Rc::new(Self {
            stats: stats.clone(),
            why: RefCell::default(),
            waiting: RefCell::default(),
        })
    }

    /// DirtyBitmap that one has ended.
    pub(crate) fn tell(&self, why: String) {
        diskio::say!("tapdisk: the trace has ended: {why}");
        self.stats.borrow_mut().failed_traces += 1;
        self.why.replace(Some(why));
        for waker in self.waiting.take() {
            waker.wake();
        }
    }

    /// There is another one, or none.
    pub(crate) fn clear(&self) {
        self.why.replace(None);
    }

    /// Waits until one has ended.
    pub(crate) async fn why(&self) -> String {
        poll_fn(|cx| match &*self.why.borrow() {
            Some(why) => Poll::Ready(why.clone()),
            None => {
                wait(&mut self.waiting.borrow_mut(), cx.waker());
                Poll::Pending
            }
        })
        .await
    }
}

/// Trace that requests are recorded in.
#[derive(Debug)]
pub(crate) struct Tracer {
    /// `None` if the trace has ended.
    writer: RefCell<Option<Writer>>,
    ended: Rc<EndedTraces>,
}

impl Tracer {
    /// Continues the trace of the previous process, for a disk of `size` bytes.
    ///
    /// # Errors
    /// The file is no trace, or cannot be read or written.
    pub(crate) fn resume(
        file: OwnedFd,
        size: u64,
        ended: &Rc<EndedTraces>,
    ) -> Result<Rc<Self>, Failure> {
        let mut writer = Writer::resume(File::from(file))?;
        let opened = writer.opened(size / BLOCK, now_ns());
        opened.map_err(|error| Failure::system("cannot write the trace", &error))?;
        Ok(Rc::new(Self {
            writer: RefCell::new(Some(writer)),
            ended: ended.clone(),
        }))
    }

    fn is_on(&self) -> bool {
        self.writer.borrow().is_some()
    }

    /// Something is about to be done. Returns its number.
    fn begin(&self, asked: &TracedRequest) -> Option<u64> {
        let entry = TraceEntry {
            operation: asked.operation,
            sector: asked.offset / BLOCK,
            sectors: asked.len / BLOCK,
            flags: asked.flags,
        };
        self.with(|writer| match &asked.data {
            Some(data) => writer.begin(entry, now_ns(), data.len(), |to| data.read(0, to)),
            None => writer.begin(entry, now_ns(), 0, |_| ()),
        })
    }

    /// Records the end of a request.
    fn end(&self, number: u64, result: Result<(), Errno>) {
        // CAST: numbers of errors are positive.
        let errno = result.map_or_else(|error| error.raw_os_error() as u32, |()| 0);
        self.with(|writer| writer.end(number, errno, now_ns()));
    }

    fn settle(&self) {
        self.with(Writer::settle);
    }

    /// Writes; the trace ends with the first error.
    fn with<T>(&self, write: impl FnOnce(&mut Writer) -> io::Result<T>) -> Option<T> {
        let mut place = self.writer.borrow_mut();
        match write(place.as_mut()?) {
            Ok(value) => Some(value),
            Err(error) => {
                *place = None;
                self.ended
                    .tell(format!("cannot write to its file: {error}"));
                None
            }
        }
    }
}

/// The trace of a disk, if there is one.
#[derive(Debug, Default)]
pub(crate) struct Tracing(RefCell<Option<Rc<Tracer>>>);

impl Tracing {
    /// Sets the trace for later requests, or none.
    pub(crate) fn set(&self, tracer: Option<Rc<Tracer>>) {
        if let Some(before) = self.0.replace(tracer) {
            before.settle();
        }
    }

    /// Returns true if requests are traced.
    pub(crate) fn is_on(&self) -> bool {
        let tracer = self.0.borrow();
        tracer.as_ref().is_some_and(|tracer| tracer.is_on())
    }

    /// All that is known by now is in the file.
    pub(crate) fn settle(&self) {
        if let Some(tracer) = &*self.0.borrow() {
            tracer.settle();
        }
    }

    /// Executes `work`, and records its request. An earlier request that overlaps it is over.
    pub(crate) async fn around(
        &self,
        asked: impl FnOnce() -> TracedRequest,
        work: impl Future<Output = Result<(), Failed>>,
    ) -> Result<(), Failed> {
        let tracer = self.0.borrow().clone();
        let number = tracer.as_ref().and_then(|tracer| tracer.begin(&asked()));
        let done = work.await;
        if let (Some(tracer), Some(number)) = (tracer, number) {
            tracer.end(number, done.map_err(|failed| failed.error));
        }
        done
    }
}
