// SPDX-License-Identifier: GPL-2.0-only

//! A disk as the device to which it is bound sees it.

use super::backend::TapQueue;
use super::disk::TapDisk;
use super::queue_slice::QueueSlice;
use super::registry;
use crate::backing::{
    Attachment, BackingDisk, BlockLimits, Drain, QueueBackends, QueueNeeds, QueuePart, TapStatus,
    Unavailable,
};
use crate::connect_error::ConnectError;
use crate::connection::Connect;
use crate::engine::{Mapping, SegmentEntry};
use crate::linux::memory::data::DataPages;
use crate::linux::xen::grant::GuestGrants;
use crate::memory::Lease;
use crate::params;
use crate::ring::tap::abi::{STATE_FENCING, STATE_LIVE};
use crate::ring::tap::arena::{self, share, MAX_SEGMENTS, MIN_SEGMENTS};
use kernel::prelude::*;
use kernel::sync::{Arc, UniqueArc};

/// Nanoseconds that a draining queue waits for a process that lives.
const DRAIN_NS: u64 = 5_000_000_000;

/// A disk bound to a device; dropping it sets the disk free.
///
/// # Invariants
///
/// If `bound`, the disk is attached to the device for which this was made.
pub(crate) struct Binding {
    disk: Arc<TapDisk>,
    writable: bool,
    bound: bool,
}

/// Attaches a disk to a device. May sleep.
pub(super) fn attach(minor: u32, attachment: Attachment) -> Result<Arc<dyn Connect>, Unavailable> {
    let disk = registry::find(minor).ok_or(Unavailable::Missing)?;
    let binding = Binding {
        disk: disk.clone(),
        writable: attachment.writable,
        bound: false,
    };
    // Before the disk is bound, so that nothing has to be taken back.
    let mut binding =
        UniqueArc::new(binding, GFP_KERNEL).map_err(|error| Unavailable::Failed(error.into()))?;
    let mut inner = disk.inner.lock();
    if disk.is_destroyed() {
        return Err(Unavailable::Missing);
    }
    if let Some(other) = &inner.attachment {
        let (domain, device) = (other.domain, other.device);
        let before = inner.refused.replace(attachment.events);
        drop(inner);
        // Not under the lock: it may be the last reference.
        drop(before);
        return Err(Unavailable::Attached { domain, device });
    }
    inner.attachment = Some(attachment);
    drop(inner);
    // INVARIANT: It just became that.
    binding.bound = true;
    let binding: Arc<Binding> = binding.into();
    Ok(binding)
}

impl Drop for Binding {
    fn drop(&mut self) {
        if !self.bound {
            return;
        }
        let (attachment, refused) = {
            let mut inner = self.disk.inner.lock();
            (inner.attachment.take(), inner.refused.take())
        };
        if let Some(events) = refused {
            events.disk_available();
        }
        drop(attachment);
    }
}

impl BackingDisk for Binding {
    fn limits(&self) -> BlockLimits {
        let params = self.disk.inner.lock().params;
        let discard = params.and_then(|params| params.discard);
        BlockLimits {
            sectors: params.map_or(0, |params| params.sectors),
            logical_block: params.map_or(512, |params| params.logical_block),
            physical_block: params.map_or(512, |params| params.physical_block),
            discard_granularity: discard.map(|discard| discard.granularity),
            discard_alignment: discard.map_or(0, |discard| discard.alignment),
            secure_erase: discard.is_some_and(|discard| discard.secure),
            write_cache: params.is_some_and(|params| params.write_cache),
            read_only: params.is_none_or(|params| params.read_only),
            removable: false,
            cdrom: false,
        }
    }

    fn sectors(&self) -> u64 {
        self.disk.sectors()
    }

    fn is_writable(&self) -> bool {
        self.writable
    }

    fn number(&self) -> u32 {
        self.disk.number
    }

    fn is_ready(&self) -> bool {
        self.disk.inner.lock().is_ready()
    }

    fn status(&self) -> Option<TapStatus> {
        Some(match self.disk.inner.lock().shadow.state() {
            STATE_LIVE => TapStatus::Live,
            STATE_FENCING => TapStatus::Fencing,
            _ => TapStatus::Recovering,
        })
    }

    fn keeps_grants(&self) -> bool {
        params::keeps_grants() && self.disk.may_use_mapped()
    }

    fn offered_segments(&self) -> u16 {
        arena::offered(self.disk.areas.arena_pages())
    }

    fn prepare(&self) -> Result<(), ConnectError> {
        // Only the process sees the disk in this domain: there is no cache of it.
        if self.writable && self.limits().read_only {
            return Err(ConnectError::Step(READ_ONLY, EROFS));
        }
        Ok(())
    }
}

impl QueueBackends for Binding {
    type Backend = TapQueue;

    fn max_segments(&self, queues: u32) -> u16 {
        share(self.disk.areas.arena_pages(), queues).min(MAX_SEGMENTS)
    }

    fn queue(
        self: &Arc<Self>,
        needs: &QueueNeeds<'_>,
    ) -> Result<QueuePart<TapQueue>, ConnectError> {
        let areas = &self.disk.areas;
        let index = u16::try_from(needs.index).map_err(|_| too_small())?;
        let pages = share(areas.arena_pages(), needs.queues);
        let depth = share(areas.tags(), needs.queues).min(needs.depth);
        if pages < MIN_SEGMENTS || depth == 0 {
            return Err(too_small());
        }
        let no_memory = |error| ConnectError::Step(NO_MEMORY, error);
        let first_page = index.wrapping_mul(pages);
        let lease = self.mappings(needs);
        let map = lease.as_ref().map_or(0, |(count, _)| *count);
        let own = DataPages::of_arena(areas.arena(), first_page, pages, map)
            .and_then(crate::tap::shared)
            .map_err(no_memory)?;
        let place = QueueSlice {
            index,
            first_tag: index.wrapping_mul(share(areas.tags(), needs.queues)),
            first_page,
            depth,
        };
        let lease = lease.map(|(_, lease)| lease);
        let wake_event = needs.wake_event.clone();
        let backend =
            TapQueue::new(self.disk.clone(), wake_event, place, &own, lease).map_err(|error| {
                match error {
                    error if error == EBUSY => ConnectError::Step(NOT_READY, error),
                    error => no_memory(error),
                }
            })?;
        Ok(QueuePart {
            backend,
            pages: own,
            own_pages: pages,
            rest: 0,
            memory_kib: u64::from(pages).wrapping_mul(4),
            depth,
        })
    }

    fn drain(&self) -> Drain {
        // Without a process there is nothing to wait for but what the queues execute: the disk keeps what is
        // delivered.
        let inner = self.disk.inner.lock();
        let ends = inner.is_live() || inner.shadow.executing() > 0 || inner.shadow.has_express();
        Drain::Detachable {
            timeout_ns: if ends { DRAIN_NS } else { 0 },
        }
    }
}

impl Binding {
    /// Pages at which a queue can map those of its guest, and what counts them: for what it executes itself. Mappings
    /// are a matter of speed: without room for them everything is copied.
    // Not part of its caller, so that both have small frames.
    #[inline(never)]
    fn mappings(&self, needs: &QueueNeeds<'_>) -> Option<(u16, Lease)> {
        if !needs.keeps_grants || !self.disk.has_backings() {
            return None;
        }
        let count = params::pool_sizes(needs.depth.into(), true, needs.segments).map;
        let each = size_of::<Mapping>().saturating_add(size_of::<SegmentEntry>());
        let bytes = usize::from(count).saturating_mul(each);
        let bytes = bytes.saturating_add(GuestGrants::bytes(count));
        let mut lease = Lease::new(needs.domain, bytes, needs.reservation).ok()?;
        let reserved = lease.reserve_mappings(count.into(), params::domain_mappings());
        reserved.then_some((count, lease))
    }
}

const READ_ONLY: &str = "the disk is read-only: attach it with mode r";
const NO_MEMORY: &str = "there is not enough memory for the queues";
const NOT_READY: &str =
    "the process that serves the disk still has requests of an earlier connection";

fn too_small() -> ConnectError {
    ConnectError::Step(
        "the disk's arena is too small for so many queues: make the disk with a larger one, or set max_queues",
        EINVAL,
    )
}
