// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Complete: note what the backend has done.

use crate::engine::backend::Backend;
use crate::engine::parts::Engine;
use crate::engine::requests::Requests;

impl<R, G, B: Backend> Engine<'_, R, G, B> {
    pub(super) fn complete(&mut self) {
        complete(&mut self.requests, &mut self.backend);
    }
}

/// Has requests whose I/O is done wait for their answer.
pub(super) fn complete(requests: &mut Requests<'_>, backend: &mut impl Backend) {
    backend.reap(|tag, status| {
        // A completion for anything else is not ours to act on.
        if let Some(handle) = requests.complete(tag, status) {
            requests.push_completed(handle);
        }
    });
}
