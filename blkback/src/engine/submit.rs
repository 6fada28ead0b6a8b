// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Submit: give the requests whose data is in place to the backend, as one batch.

use crate::engine::backend::{Backend, Io, IoKind};
use crate::engine::requests::PendingRequest;
use crate::engine::state::Engine;
use crate::engine::stats::Stats;
use crate::ring::grants::Grants;
use crate::ring::response::ResponseStatus;
use crate::ring::shared_ring::SharedRing;

/// Most sectors (512 bytes) of a discard that the backend gets at once: 1 GiB. A discard may cover the whole disk; in
/// pieces it can be interleaved and torn down.
const DISCARD_CHUNK: u64 = 1 << 21;

impl<R: SharedRing, G: Grants, B: Backend> Engine<'_, R, G, B> {
    pub(super) fn submit(&mut self) {
        let mut batch = core::mem::take(&mut self.batch);
        if batch.is_empty() && self.requests.taken.is_empty() {
            return;
        }
        let now = batch.begin(|| self.clock.look(&self.backend));
        while let Some(handle) = self.requests.pop_taken() {
            let request = self.requests.of_mut(&handle);
            if request.status == ResponseStatus::Okay {
                if !request.counted {
                    add(self.stats, request);
                    // Segments that are still left are counted when their piece begins.
                    request.counted = request.left == 0;
                }
                let since = request.since;
                self.note_pages(since, now);
                batch.add(self.requests.start(handle, now));
            } else {
                self.requests.push_completed(handle.fail());
            }
        }
        let Some(first) = batch.first() else {
            return;
        };
        let requests = &self.requests;
        let ios = requests.from(first).filter_map(|tag| {
            let request = requests.get(tag)?;
            Some(Io {
                tag,
                kind: request.kind,
                sector: request.sector,
                sectors: request.piece(),
                since: request.since,
                segments: &requests.segments,
                pool: request.pool,
                head: request.head,
                count: request.count,
            })
        });
        self.backend.submit(batch.count(), ios);
    }
}

impl PendingRequest {
    /// Returns the sectors (512 bytes) that the backend gets at once.
    pub(super) fn piece(&self) -> u64 {
        match self.kind {
            IoKind::Discard { .. } => self.sectors.min(DISCARD_CHUNK),
            _ => self.sectors,
        }
    }
}

pub(super) fn add(stats: &mut Stats, request: &PendingRequest) {
    let (requests, sectors) = match request.kind {
        IoKind::Read => (&mut stats.rd_req, &mut stats.rd_sect),
        IoKind::Write => (&mut stats.wr_req, &mut stats.wr_sect),
        IoKind::Flush | IoKind::PreFlushWrite | IoKind::BarrierWrite => {
            (&mut stats.f_req, &mut stats.wr_sect)
        }
        // Counted when it was taken: it is submitted in pieces.
        IoKind::Discard { .. } => return,
    };
    *requests = requests.wrapping_add(u64::from(!request.continued));
    *sectors = sectors.wrapping_add(request.sectors);
}
