// SPDX-License-Identifier: GPL-2.0-only

//! Module parameters, limited to the range that the protocol and the memory allow.

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
/// Data pages that a queue always has: enough for the engine to serve any request.
const OWN: u32 = 16;

/// Processors that ran when the module was loaded.
static PROCESSORS: Atomic<u32> = Atomic::new(1);

/// Records the number of processors, before the first call of [`max_queues`]. The number stays fixed, because the
/// arenas of tap disks are made for that number of queues. It counts the processors that run, because hosts that can
/// add processors have hundreds of possible ones.
pub(crate) fn note_processors() {
    PROCESSORS.store(online_processors(), Relaxed);
}

/// Returns the number of queues offered to a frontend.
pub(crate) fn max_queues() -> u32 {
    match parameter(module_parameters::max_queues.value()) {
        0 => PROCESSORS.load(Relaxed).clamp(1, QUEUES),
        n => n.min(QUEUES),
    }
}

/// Returns the ring order offered to a frontend.
pub(crate) fn max_ring_order() -> u8 {
    // CAST: at most `MAX_RING_ORDER`.
    parameter(module_parameters::max_ring_page_order.value()).min(u32::from(MAX_RING_ORDER)) as u8
}

/// Segments of an indirect request at most, whatever the parameter says.
pub(crate) const MOST_SEGMENTS: u16 = SEGMENTS_PER_INDIRECT_PAGE;

/// Returns the number of segments of an indirect request offered to a frontend; 0 offers no indirect requests.
pub(crate) fn max_indirect_segments() -> u16 {
    let wanted = parameter(module_parameters::max_indirect_segments.value());
    // CAST: not more than a `u16`.
    wanted.min(MOST_SEGMENTS.into()) as u16
}

/// Returns the number of segments up to which data is copied; larger requests are mapped.
pub(crate) fn copy_max_segments() -> u16 {
    if !crate::linux::is_pv_domain() {
        // In a domain that is not PV each map and unmap changes the second-stage page tables separately, so all data is
        // copied.
        return u16::MAX;
    }
    // CAST: at most 65535.
    parameter(module_parameters::copy_max_segments.value()).min(u32::from(u16::MAX)) as u16
}

/// Reports whether the pages of guests with persistent grants stay mapped.
pub(crate) fn keeps_grants() -> bool {
    // Only measured in a PV domain.
    crate::linux::is_pv_domain() && bounds::feature_persistent()
}

/// Returns the ring layout for a frontend that names none.
pub(crate) fn default_protocol() -> Protocol {
    // The C driver uses the 32-bit layout on x86, contrary to Xen's header, and frontends rely on that.
    if parameter(module_parameters::native_protocol.value()) == 0 && cfg!(target_arch = "x86_64") {
        Protocol::Abi32
    } else {
        Protocol::Abi64
    }
}

/// Writes the effective parameters into the kernel's log: a value that is too large counts as the largest one allowed.
pub(crate) fn tell() {
    pr_info!(
        "loaded: max_queues {}, max_ring_page_order {}, max_indirect_segments {}, copy_max_segments {}, feature_persistent {}, poll_us {}, halt_us {}\n",
        max_queues(),
        max_ring_order(),
        max_indirect_segments(),
        copy_max_segments(),
        u32::from(keeps_grants()),
        poll_nanoseconds() / 1000,
        halt_nanoseconds() / 1000
    );
}

/// A build that is never shipped: it polls for requests at any cost and notifies for each answer, and the gate of
/// `tests/bench` must find it too slow.
pub(crate) const WASTEFUL: bool = cfg!(bench_wasteful);

/// Value of `poll_us` that an administrator has not changed.
const POLL_US: u32 = 20;

/// Reports whether queues poll while a process executes requests, which is faster and costs dom0 twice the time: they do
/// if an administrator has raised `poll_us`.
pub(crate) fn polls_for_processes() -> bool {
    parameter(module_parameters::poll_us.value()) > POLL_US
}

/// Returns the cost of a queue's sleep, in nanoseconds of polling.
pub(crate) fn poll_nanoseconds() -> u64 {
    /// Largest value in microseconds, because a longer poll no longer waits for the next request.
    const MOST: u32 = 1000;
    let microseconds = if WASTEFUL {
        MOST
    } else {
        parameter(module_parameters::poll_us.value()).min(MOST)
    };
    u64::from(microseconds).saturating_mul(1000)
}

/// Returns the longest mean of a queue's waits for which its thread halts the processor itself, in nanoseconds.
pub(crate) fn halt_nanoseconds() -> u64 {
    /// Largest value in microseconds, because longer waits are dear by their length and not by their ends.
    const MOST: u32 = 4000;
    if !cfg!(target_arch = "x86_64") {
        // Not tried on others.
        return 0;
    }
    u64::from(parameter(module_parameters::halt_us.value()).min(MOST)).saturating_mul(1000)
}

/// Returns the number of pages of one guest that all its queues together may map.
pub(crate) fn domain_mappings() -> u32 {
    parameter(module_parameters::domain_mappings.value())
}

/// Data pages of one queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PoolSizes {
    /// Pages that have memory while the queue is busy, at most.
    pub(crate) copy: u16,
    /// Those of them that always have memory.
    pub(crate) own: u16,
    /// Pages at which guest pages are mapped.
    pub(crate) map: u16,
    /// Segments that a request can have beyond the ones in work.
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

/// Returns the data pages of a queue with `slots` slots in its ring. `keeps_grants`: the guest grants persistently;
/// `segments`: segments of the guest's largest indirect request.
///
/// Each pool that is used can hold the largest request; beyond that each slot can have as many pages as the requests
/// that Linux guests send by default, at most 32 segments. All but a few of the pages are borrowed while they are
/// needed.
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
            // A Linux frontend takes the pages for data and those for the descriptors of large requests from one pool.
            most if keeps_grants => size(33, most),
            most if !copies_all => size(16, most),
            _ => 0,
        },
    }
}
