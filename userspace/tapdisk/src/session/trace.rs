// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tracing of the disk's requests while an administrator wants it.

use super::Session;
use crate::tracer::Tracer;
use control::tapdisk::{Open, Reply, RequestedFile};
use control::Failure;
use std::os::fd::OwnedFd;
use std::rc::Rc;

impl Session {
    /// The trace of the process before. If it is gone, the disk is served without it, and the supervisor learns of
    /// that.
    pub(super) async fn find_tracer(&self, open: &Open, size: u64) -> Option<Rc<Tracer>> {
        self.untraced.clear();
        if !open.trace {
            return None;
        }
        let given = self.needs.ask(RequestedFile::Trace).await;
        match given.and_then(|given| Tracer::resume(given.fd, size, &self.untraced)) {
            Ok(tracer) => Some(tracer),
            Err(failure) => {
                self.untraced.tell(failure.message);
                None
            }
        }
    }

    /// Traces requests to `file` from now on, or ends the trace if there is none. Earlier requests are over then, so
    /// the trace has all later changes of the disk.
    pub(super) async fn set_trace(
        &self,
        on: bool,
        file: Option<OwnedFd>,
    ) -> Result<Reply, Failure> {
        if on != file.is_some() {
            return Err(Failure::invalid(
                "a trace is a descriptor, and none ends it",
            ));
        }
        self.untraced.clear();
        if !on && self.server().is_none() {
            // No image is served, and the next open says whether its disk is traced.
            return Ok(Reply::Done);
        }
        self.while_still(&self.traced, on, |server, open| {
            let resume = |file| Tracer::resume(file, server.size(), &self.untraced);
            let tracer = file.map(resume).transpose()?;
            open.trace = on;
            server.tracing.set(tracer);
            Ok(())
        })
        .await
    }
}
