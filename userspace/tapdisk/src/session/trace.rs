// SPDX-License-Identifier: MIT OR Apache-2.0
//! It is written down what is asked of the disk, as long as somebody wants to know.

use super::Session;
use crate::tracer::Tracer;
use control::tapdisk::{Needed, Open, Reply};
use control::Failure;
use std::os::fd::OwnedFd;
use std::rc::Rc;

impl Session {
    /// The trace of the process before. The disk is served without it if there is none any more, which is told.
    pub(super) async fn find_tracer(&self, open: &Open, size: u64) -> Option<Rc<Tracer>> {
        self.untraced.clear();
        if !open.trace {
            return None;
        }
        let given = self.needs.ask(Needed::Trace).await;
        match given.and_then(|given| Tracer::resume(given.fd, size, &self.untraced)) {
            Ok(tracer) => Some(tracer),
            Err(failure) => {
                self.untraced.tell(failure.message);
                None
            }
        }
    }

    /// From now on it is written down in `file` what is asked of the disk, and nowhere without one. What is under way is
    /// over then: so all that the disk becomes after this moment is in the trace.
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
            // Nothing is served, and what is to be served next says whether that is traced.
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
