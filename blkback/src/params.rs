// SPDX-License-Identifier: GPL-2.0-only

//! Module parameters, clamped to what the protocol and the memory allow.

use crate::linux::bounds;
use crate::linux::online_processors;
use crate::linux::versions::parameter;
use crate::module_parameters;
use crate::ring::abi::{Protocol, MAX_RING_ORDER, SEGMENTS_PER_INDIRECT_PAGE};
use kernel::prelude::*;
use kernel::sync::atomic::{ordering::Relaxed, Atomic};

/// Queues that a frontend may have at most, whatever the parameter says.
pub(crate) const QUEUES: u32 = 64;
/// Data pages of one queue at most, whatever the parameters say.
const PAGES: u32 = 8192;
/// Data pages that a queue has for ever: what the engine needs for any request.
const OWN: u32 = 16;

/// Processors that ran when the module was loaded.
static PROCESSORS: Atomic<u32> = Atomic::new(1);

/// Notes how many processors there are, before anything asks for [`max_queues`]. It stays at that: the arenas of tap
/// disks are made for as many queues. Not how many there could be, which is hundreds on hosts that can add some.
pub(crate) fn note_processors() {
    PROCESSORS.store(online_processors(), Relaxed);
}

/// Queues offered to a frontend.
pub(crate) fn max_queues() -> u32 {
    match parameter(module_parameters::max_queues.value()) {
        0 => PROCESSORS.load(Relaxed).clamp(1, QUEUES),
        n => n.min(QUEUES),
    }
}

/// Ring order offered to a frontend.
pub(crate) fn max_ring_order() -> u8 {
    // CAST: at most `MAX_RING_ORDER`.
    parameter(module_parameters::max_ring_page_order.value()).min(u32::from(MAX_RING_ORDER)) as u8
}

/// Segments of an indirect request at most, whatever the parameter says.
pub(crate) const MOST_SEGMENTS: u16 = SEGMENTS_PER_INDIRECT_PAGE;

/// Segments of an indirect request offered to a frontend; 0 offers no indirect requests.
pub(crate) fn max_indirect_segments() -> u16 {
    let wanted = parameter(module_parameters::max_indirect_segments.value());
    // CAST: not more than a `u16`.
    wanted.min(MOST_SEGMENTS.into()) as u16
}

/// Segments up to which data is copied; larger requests are mapped.
pub(crate) fn copy_max_segments() -> u16 {
    if !crate::linux::is_pv_domain() {
        // Each map and unmap would change the second stage tables on its own.
        return u16::MAX;
    }
    // CAST: at most 65535.
    parameter(module_parameters::copy_max_segments.value()).min(u32::from(u16::MAX)) as u16
}

/// Pages of guests that keep them granted stay mapped.
pub(crate) fn keeps_grants() -> bool {
    // Elsewhere nobody has measured it.
    crate::linux::is_pv_domain() && bounds::feature_persistent()
}

/// The layout of a frontend that does not name its own.
pub(crate) fn default_protocol() -> Protocol {
    // The C driver takes 32 bits on x86, against the header; frontends rely on it.
    if parameter(module_parameters::native_protocol.value()) == 0 && cfg!(target_arch = "x86_64") {
        Protocol::Abi32
    } else {
        Protocol::Abi64
    }
}

/// Writes into the kernel's log what the parameters come to: what is too large counts as the largest.
pub(crate) fn tell() {
    pr_info!(
        "loaded: max_queues {}, max_ring_page_order {}, max_indirect_segments {}, copy_max_segments {}, feature_persistent {}, poll_us {}\n",
        max_queues(),
        max_ring_order(),
        max_indirect_segments(),
        copy_max_segments(),
        u32::from(keeps_grants()),
        poll_nanoseconds() / 1000
    );
}

/// A build that is never shipped: it looks for requests whatever that costs and notifies for each,
/// and the gate of `tests/bench` must find it too dear.
pub(crate) const WASTEFUL: bool = cfg!(bench_wasteful);

/// What a sleep of a queue is worth, in nanoseconds of looking for requests.
pub(crate) fn poll_nanoseconds() -> u64 {
    /// More than that is no waiting for the next request any more.
    const MOST: u32 = 1000;
    let microseconds = if WASTEFUL {
        MOST
    } else {
        parameter(module_parameters::poll_us.value()).min(MOST)
    };
    u64::from(microseconds).saturating_mul(1000)
}

/// Pages of one guest that all its queues together may map.
pub(crate) fn domain_mappings() -> u32 {
    parameter(module_parameters::domain_mappings.value())
}

/// Data pages of one queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PoolSizes {
    /// Pages that have memory while the queue is busy, at most.
    pub(crate) copy: u16,
    /// Of them, those that always have it.
    pub(crate) own: u16,
    /// Pages at which guest pages are mapped.
    pub(crate) map: u16,
    /// Segments that a request can have beyond those that are being worked on.
    pub(crate) rest: u16,
}

impl PoolSizes {
    /// Entries of the segment table.
    pub(crate) fn entries(&self) -> usize {
        [self.copy, self.map, self.rest]
            .into_iter()
            .fold(0, |sum, part| sum.wrapping_add(usize::from(part)))
    }
}

/// Data pages of a queue whose ring has so many slots, of a guest that keeps its pages granted or does not and whose
/// largest indirect request has so many segments.
///
/// Each pool that is used can hold the largest request; beyond that each slot can have as many pages
/// as the requests have that Linux guests send by default: 32 segments at most. All but a few of
/// them are borrowed while they are needed.
pub(crate) fn pool_sizes(slots: u32, keeps_grants: bool, segments: u16) -> PoolSizes {
    let largest = u32::from(segments).max(11);
    let size = |per_slot: u32, most: u32| {
        let pages = slots.saturating_mul(per_slot).min(most.min(PAGES));
        // CAST: at most `PAGES`.
        pages.max(largest).max(OWN).saturating_add(7) as u16 & !7
    };
    let most = parameter(module_parameters::copy_pages.value());
    let copies_all = u32::from(copy_max_segments()) >= largest;
    PoolSizes {
        copy: size(if copies_all || keeps_grants { 32 } else { 4 }, most),
        // CAST: 16.
        own: OWN as u16,
        rest: largest as u16,
        map: match parameter(module_parameters::map_pages.value()) {
            // Linux lends the pages for its data and those for the descriptors of its large requests from one stock.
            most if keeps_grants => size(33, most),
            most if !copies_all => size(16, most),
            _ => 0,
        },
    }
}
