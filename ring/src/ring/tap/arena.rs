// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The size of a disk's arena, and what its queues offer of it.
//!
//! A guest that is restored on another host keeps requests of the size that the first host offered, and Linux's
//! frontend stops the guest if the second one offers less. So the offer is the same on every host.

use crate::ring::tap::checked::MAX_ARENA_KIB;
use crate::ring::tap::shadow::MAX_QUEUES;

/// KiB of a page.
const PAGE_KIB: u32 = 4;
/// Default size of an arena in KiB.
const USUAL_KIB: u32 = 2 << 10;
/// Segments of Linux's largest request with default settings: every disk offers them.
const USUAL_SEGMENTS: u16 = 32;
/// Queues of a disk on the largest host.
const QUEUES: u16 = MAX_QUEUES as u16;
/// Segments of the largest request that is not indirect: each queue must hold them.
pub const MIN_SEGMENTS: u16 = 11;
/// Maximum number of segments of a request: the stride of the segment table.
pub const MAX_SEGMENTS: u16 = 256;

/// Returns the number of pages of an arena, from the size that its creator requested, on a host that offers
/// `max_queues` queues: enough for the requests that a disk [offers](offered) on every host.
pub fn pages(asked_kib: Option<u32>, max_queues: u32) -> u16 {
    let least = max_queues
        .min(QUEUES.into())
        .saturating_mul(USUAL_SEGMENTS.into())
        .saturating_mul(PAGE_KIB)
        .div_ceil(1024)
        .saturating_mul(1024);
    let kib = asked_kib.unwrap_or(USUAL_KIB).max(least).min(MAX_ARENA_KIB);
    // CAST: at most 16384.
    (kib / PAGE_KIB) as u16
}

/// Returns the number of segments of an indirect request that a disk with this arena offers: the number that each queue
/// of the largest host can hold, so that no host offers fewer.
pub fn offered(pages: u16) -> u16 {
    (pages / QUEUES).clamp(USUAL_SEGMENTS, MAX_SEGMENTS)
}

/// Returns the part of `total` that each of `queues` queues gets.
pub fn share(total: u16, queues: u32) -> u16 {
    // CAST: not more than `total`.
    u32::from(total).checked_div(queues).unwrap_or(0) as u16
}
