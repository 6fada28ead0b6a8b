// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests that a server has answered and may still lose: changes since the last flush.

use super::connection::NbdRequest;
use diskio::Bytes;
use std::collections::VecDeque;

/// Bytes that a request counts beside its data.
const HEAD: usize = 128;

/// Bytes that are kept for a request.
fn held(request: &NbdRequest) -> usize {
    HEAD + request.payload.as_ref().map_or(0, Bytes::len)
}

/// A place in a [`RequestLog`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Mark(u64);

/// Requests in the order of their answers.
#[derive(Debug, Default)]
pub(super) struct RequestLog {
    requests: VecDeque<NbdRequest>,
    /// Number of requests that were removed.
    before: u64,
    bytes: usize,
}

impl RequestLog {
    /// Adds an answered request that changed the export. A durable request is kept, too, behind others: if an earlier
    /// one were executed again, it would undo this one.
    pub(super) fn note(&mut self, request: &NbdRequest, is_durable: bool) {
        if !is_durable || !self.requests.is_empty() {
            self.bytes += held(request);
            self.requests.push_back(request.clone());
        }
    }

    /// Everything until now.
    pub(super) fn mark(&self) -> Mark {
        // CAST: they are in memory.
        Mark(self.before + self.requests.len() as u64)
    }

    /// Drops the requests before `mark`, which are durable.
    pub(super) fn forget(&mut self, mark: Mark) {
        while Mark(self.before) < mark {
            let Some(request) = self.requests.pop_front() else {
                return;
            };
            self.bytes -= held(&request);
            self.before += 1;
        }
    }

    /// Returns the requests to execute again, in order.
    pub(super) fn all(&self) -> Vec<NbdRequest> {
        self.requests.iter().cloned().collect()
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}
