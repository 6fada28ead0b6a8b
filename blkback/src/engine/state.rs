// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The state of an engine. Each step of a pass is a file that works on it.

use crate::engine::backend::Backend;
use crate::engine::batch::Batch;
use crate::engine::blocks::BlockGroup;
use crate::engine::gathering::RequestGathering;
use crate::engine::mappings::{Mapping, Mappings};
use crate::engine::parked::Parked;
use crate::engine::requests::{PendingRequest, Requests};
use crate::engine::segments::{SegmentEntry, Segments, TableShape};
use crate::engine::stats::{QueueLoad, Stats};
use crate::engine::timing::clock::PassClock;
use crate::engine::timing::latency::Latencies;
use crate::engine::transfers::{Fetch, Transfers};
use crate::ring::abi::Protocol;
use crate::ring::grants::Grants;
use crate::ring::index::BackRing;
use crate::ring::request::RequestLimits;
use crate::ring::shared_ring::SharedRing;

/// Settings that are fixed for the life of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Layout of the slots.
    pub protocol: Protocol,
    /// Largest number of segments for which data is copied; larger requests are mapped.
    pub copy_max_segments: u16,
    /// The guest grants persistently: all pages are mapped if there is room, and stay mapped.
    pub keeps_grants: bool,
}

/// The memory of an engine, allocated by the code that connects it.
#[derive(Debug)]
pub struct EngineTables<'a> {
    /// An entry for each slot of the ring.
    pub slots: &'a mut [PendingRequest],
    /// An entry for each data page, and, where pages come and go, an additional one for each segment of the largest
    /// request.
    pub entries: &'a mut [SegmentEntry],
    /// A group for each 512 pages that can have memory.
    pub groups: &'a mut [BlockGroup],
    /// An entry for each page at which guest pages are mapped.
    pub mappings: &'a mut [Mapping],
    /// An entry for each descriptor buffer that is to be used, at least one.
    pub fetches: &'a mut [Option<Fetch>],
    /// The engine's counters; it sets them to zero.
    pub stats: &'a mut Stats,
    /// The engine's histograms of how long I/O takes, while counting is on.
    pub latencies: &'a mut Latencies,
}

/// The data path of one queue.
#[derive(Debug)]
pub struct Engine<'a, R, G, B> {
    pub(super) ring: BackRing<R>,
    pub(super) requests: Requests<'a>,
    pub(super) transfers: Transfers<'a, G>,
    pub(super) backend: B,
    pub(super) config: Config,
    pub(super) limits: RequestLimits,
    /// A checked request for which there was no room.
    pub(super) parked: Option<Parked>,
    /// Requests that the backend gets in the next step.
    pub(super) batch: Batch,
    /// A barrier is being executed: no request may pass it.
    pub(super) barrier: bool,
    /// Stalled requests may find copy pages in the next pass.
    pub(super) retry: bool,
    /// The queue is being torn down: a discard ends with the piece that is running.
    pub(super) closing: bool,
    pub(super) clock: PassClock,
    pub(super) gathering: RequestGathering,
    /// If a request waits for pages: the time up to which its wait is counted already.
    pub(super) short_since: Option<u64>,
    pub(super) stats: &'a mut Stats,
    pub(super) latencies: &'a mut Latencies,
}

impl<'a, R: SharedRing, G: Grants, B: Backend> Engine<'a, R, G, B> {
    /// Makes the engine of an attached ring.
    ///
    /// The tables are for the pages of `shape`. The larger of both pools must be able to hold the largest request that
    /// `limits` allows; one that fits neither pool is answered with an error. Where pages come and go, at least
    /// [`Self::OWN`] pages always have memory.
    pub fn new(
        ring: BackRing<R>,
        grants: G,
        backend: B,
        tables: EngineTables<'a>,
        shape: TableShape,
        config: Config,
        limits: RequestLimits,
    ) -> Self {
        let segments = Segments::new(tables.entries, tables.groups, shape);
        let mappings = Mappings::new(tables.mappings, shape.copy, config.keeps_grants);
        *tables.stats = Stats::default();
        Self {
            ring,
            requests: Requests::new(tables.slots, segments),
            transfers: Transfers::new(grants, mappings, tables.fetches),
            backend,
            config,
            limits,
            parked: None,
            batch: Batch::default(),
            barrier: false,
            retry: false,
            closing: false,
            clock: PassClock::default(),
            gathering: RequestGathering::default(),
            short_since: None,
            stats: tables.stats,
            latencies: tables.latencies,
        }
    }

    /// Returns the counters.
    pub fn stats(&self) -> &Stats {
        self.stats
    }

    /// Returns the histograms of how long I/O took while counting was on.
    pub fn latencies(&mut self) -> &mut Latencies {
        self.latencies
    }

    /// Returns the number of requests that are taken and not answered.
    pub fn in_flight(&self) -> u16 {
        self.requests
            .used()
            .saturating_add(u16::from(self.parked.is_some()))
    }

    /// Returns the queue's state at this moment.
    pub fn flight(&self) -> QueueLoad {
        QueueLoad {
            requests: self.in_flight(),
            oldest: self.requests.oldest_start(),
            kept: self.kept(),
        }
    }

    /// Changes the size of the disk; requests that are checked from now on must fit into it.
    pub fn set_sectors(&mut self, sectors: u64) {
        self.limits.sectors = sectors;
    }

    pub(super) fn can_take(&self) -> bool {
        self.is_open() && self.ring.unanswered() < self.ring.size()
    }

    /// Reports whether a request can be taken as soon as the ring has room for its answer.
    pub(super) fn is_open(&self) -> bool {
        !self.barrier
            && self.parked.is_none()
            && self.requests.stalled.is_empty()
            && !self.ring.is_broken()
    }
}
