// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Fetch: copy the descriptors of indirect requests in, and check the segments in them.
//!
//! The hypervisor copies the descriptors of many requests at once. If the page with the descriptors stays mapped
//! (`mappings`), they are read from it directly instead.

use crate::engine::backend::Backend;
use crate::engine::requests::Requests;
use crate::engine::state::Engine;
use crate::ring::grants::Grants;
use crate::ring::numbers::QueueTag;
use crate::ring::request::{Indirect, RequestLimits};
use crate::ring::response::ResponseStatus;
use crate::ring::shared_ring::SharedRing;

impl<R: SharedRing, G: Grants, B: Backend> Engine<'_, R, G, B> {
    pub(super) fn fetch(&mut self) {
        if !self.transfers.is_fetching() {
            return;
        }
        let (limits, refused) = (&self.limits, &mut self.stats.refused);
        self.transfers
            .run_fetches(&mut self.requests, |requests, fetch, grants, buffer| {
                if !fill(requests, fetch.tag, &fetch.request, grants, buffer, limits) {
                    *refused = refused.wrapping_add(1);
                }
            });
    }

    /// Brings the segments of a request in, now or in the next [`fetch`](Self::fetch).
    pub(super) fn fetch_soon(&mut self, tag: QueueTag, request: &Indirect) {
        let Some(buffer) = self.transfers.read_kept(request) else {
            return self.transfers.fetch(&mut self.requests.slots, tag, request);
        };
        let (requests, grants) = (&mut self.requests, &self.transfers.grants);
        if !fill(requests, tag, request, grants, buffer, &self.limits) {
            self.stats.refused = self.stats.refused.wrapping_add(1);
        }
    }
}

/// Gives a request its segments; false if one of them is not well-formed.
fn fill<G: Grants>(
    requests: &mut Requests<'_>,
    tag: QueueTag,
    indirect: &Indirect,
    grants: &G,
    buffer: u8,
    limits: &RequestLimits,
) -> bool {
    let segments = &mut requests.segments;
    let Some(request) = requests.slots.get_mut(tag) else {
        return true;
    };
    if request.status != ResponseStatus::Okay {
        return true;
    }
    let (mut at, mut sectors, mut now) = (request.head, 0u64, request.count);
    let raw = grants.descriptor(buffer).iter().copied();
    let checked = indirect.check_segments(raw, limits, |segment| {
        if now > 0 {
            now = now.wrapping_sub(1);
            sectors = sectors.wrapping_add(u64::from(segment.sectors()));
        }
        at = segments.fill(at, segment);
    });
    request.sectors = sectors;
    match checked {
        Ok(()) => true,
        Err(reject) => {
            request.status = reject.response.status;
            false
        }
    }
}
