// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests that do not come from the guest: those of NBD clients, and of jobs.
//!
//! Each claims its range as the guest's requests do, so all that overlap take effect in the order of their arrival;
//! while the disk is paused they wait.

use crate::server::Failed;
use crate::tracer::TracedRequest;
use crate::{Server, Session};
use control::tapdisk::Call;
use diskio::{Bytes, Data, Errno, SeenErrors};
use drivers::{Attributes, Extent};
use std::rc::Rc;
use trace::{Flags, Operation};

/// Operation of a request.
#[derive(Clone, Debug)]
pub(crate) enum InternalWork {
    Read(Data),
    Write(Bytes),
    Flush,
    Discard,
    WriteZeroes,
}

/// A request.
#[derive(Clone, Debug)]
pub(crate) struct InternalRequest {
    pub(crate) work: InternalWork,
    /// Bytes from the beginning of the disk.
    pub(crate) offset: u64,
    /// Bytes; those of the data, if there are any.
    pub(crate) len: u64,
    /// True if the change must be durable before the answer.
    pub(crate) fua: bool,
}

impl InternalRequest {
    /// Executes it for `by`, as often as the disk was stopped because of it.
    pub(crate) async fn perform(&self, session: &Session, by: &SeenErrors) -> Result<(), Errno> {
        loop {
            let server = session.running().await;
            let _hold = server.hold();
            self.check(&server)?;
            let Err(failed) = self.execute(&server, by).await else {
                return Ok(());
            };
            if !server.failed(self.call(), self.offset, self.len, failed) {
                return Err(failed.error);
            }
        }
    }

    /// Executes it once, on a server that is held.
    pub(crate) async fn execute(&self, server: &Rc<Server>, by: &SeenErrors) -> Result<(), Failed> {
        let _claim = match self.work {
            InternalWork::Flush => None,
            _ => {
                let claim = server.claim(self.offset, self.len, self.changes());
                Some(claim.await)
            }
        };
        let work = self.execute_alone(server, by);
        server.tracing.around(|| self.asked(), work).await
    }

    /// Executes it. Nothing that overlaps is in its way.
    async fn execute_alone(&self, server: &Rc<Server>, by: &SeenErrors) -> Result<(), Failed> {
        if matches!(self.work, InternalWork::Flush) {
            return server.flush(by).await;
        }
        let (offset, len) = (self.offset, self.len);
        let disk = server.disk();
        let how = Attributes {
            fua: self.fua,
            ..Attributes::default()
        };
        let work = async {
            match &self.work {
                InternalWork::Read(data) => disk.read(offset, data.clone()).await,
                InternalWork::Write(data) => server.write(offset, data.clone(), how).await,
                InternalWork::Flush => Ok(()),
                InternalWork::Discard => server.discard(offset, len, how).await,
                InternalWork::WriteZeroes => server.write_zeroes(offset, len, how).await,
            }
        };
        match self.changes() {
            true => server.changing(how.fua, work).await,
            false => work.await.map_err(Failed::alone),
        }
    }

    /// Refuses requests that are invalid for this disk.
    fn check(&self, server: &Server) -> Result<(), Errno> {
        if matches!(self.work, InternalWork::Flush) {
            return Ok(());
        }
        if self.changes() && server.is_read_only() {
            return Err(Errno::PERM);
        }
        check(server, self.offset, self.len)
    }

    /// Returns true if it changes the disk.
    fn changes(&self) -> bool {
        matches!(
            self.work,
            InternalWork::Write(_) | InternalWork::Discard | InternalWork::WriteZeroes
        )
    }

    /// Returns the request's entry in a trace.
    fn asked(&self) -> TracedRequest {
        let (operation, data) = match &self.work {
            InternalWork::Read(_) => (Operation::Read, None),
            InternalWork::Write(data) => (Operation::Write, Some(data.clone())),
            InternalWork::Flush => (Operation::Flush, None),
            InternalWork::Discard => (Operation::Discard, None),
            InternalWork::WriteZeroes => (Operation::Zeroes, None),
        };
        TracedRequest {
            operation,
            offset: self.offset,
            len: self.len,
            flags: Flags {
                fua: self.fua,
                client: true,
                ..Flags::default()
            },
            data,
        }
    }

    pub(crate) fn call(&self) -> Call {
        match self.work {
            InternalWork::Read(_) => Call::Read,
            InternalWork::Write(_) => Call::Write,
            InternalWork::Flush => Call::Flush,
            InternalWork::Discard => Call::Discard,
            InternalWork::WriteZeroes => Call::Zeroes,
        }
    }
}

/// Up to `most` extents in a row, which need not reach the end of the range.
pub(crate) async fn extents(
    session: &Session,
    offset: u64,
    len: u64,
    most: usize,
) -> Result<Vec<Extent>, Errno> {
    let server = session.running().await;
    let _hold = server.hold();
    check(&server, offset, len)?;
    let mut all = Vec::new();
    let mut done = 0;
    while done < len && all.len() < most {
        let found = server.disk().extents(offset + done, len - done).await?;
        done += found.iter().map(|extent| extent.len).sum::<u64>();
        all.extend(found);
    }
    all.truncate(most);
    Ok(all)
}

/// The range is whole blocks of the disk.
pub(crate) fn check(server: &Server, offset: u64, len: u64) -> Result<(), Errno> {
    let block = u64::from(server.block());
    let end = offset.checked_add(len).ok_or(Errno::INVAL)?;
    let is_whole = offset % block == 0 && len % block == 0;
    match len > 0 && is_whole && end <= server.size() {
        true => Ok(()),
        false => Err(Errno::INVAL),
    }
}
