// SPDX-License-Identifier: GPL-2.0-only

//! `xen-blkback-rs`: the Xen block backend.
//!
//! This root only names the parts and registers the driver. Reading order along the data path:
//! `vbd` (a device and its life), `connection` and `queue` (its rings and their threads),
//! `engine` (what one pass over a ring does), `backing` (what is needed of a disk), `phy` (the block
//! device behind it).

// The modules below that host programs share contain more than this module uses.
#[allow(dead_code, unreachable_pub)]
#[path = "../../ring/src/ring/mod.rs"]
mod ring;

#[allow(dead_code, unreachable_pub)]
#[path = "../../xenbus/src/proto/mod.rs"]
mod proto;

#[path = "../../xenbus/src/linux/mod.rs"]
mod linux;

// The only place that names it: the rest of this folder knows a disk as a `BackingDisk`.
#[path = "../../blktap-kmod/src/mod.rs"]
mod tap;

mod advertise;
mod backing;
mod blocking_backend;
mod bus;
mod connect_error;
#[allow(dead_code, unreachable_pub)]
mod connect_retry;
mod connection;
mod disk;
#[allow(dead_code, unreachable_pub)]
mod due;
#[allow(dead_code, unreachable_pub)]
mod engine;
mod events;
mod fault_injection;
mod halt;
#[allow(dead_code, unreachable_pub)]
mod halt_estimator;
mod idle_reclaim;
mod lent_engine;
mod mapping_room;
mod memory;
#[allow(dead_code, unreachable_pub)]
mod memory_quota;
mod params;
mod phy;
mod poll;
#[allow(dead_code, unreachable_pub)]
mod poll_estimator;
mod queue;
#[allow(unreachable_pub)]
mod running_mean;
mod storage;
mod totals;
mod vbd;

use kernel::prelude::*;
use linux::debug::Debug;
use linux::task::workqueue::WorkQueues;
use linux::xen::claims::Claims;
use linux::xen::driver::Adapter;
use linux::xen::store::Transactions;
use linux::xen::watch::Watches;
use memory::DiskMemory;

module! {
    type: Blkback,
    name: "xen_blkback_rs",
    authors: ["The xen-blkback-rs founders"],
    description: "Xen block backend",
    license: "GPL",
    alias: ["xen-backend:vbd", "xen-backend:vbd3"],
    params: {
        max_queues: u32 {
            default: 0,
            description: "Queues offered to each frontend, at most 64 (0: one per CPU)",
        },
        max_ring_page_order: u32 {
            default: 4,
            description: "Largest ring offered, as a power of two of pages, at most 4",
        },
        max_indirect_segments: u32 {
            default: 256,
            description: "Segments of an indirect request offered, at most 512 (0: none)",
        },
        copy_max_segments: u32 {
            default: 512,
            description: "Requests up to so many segments are copied, larger ones are mapped",
        },
        copy_pages: u32 {
            default: 1024,
            description: "Most data pages of each queue; all but a few are borrowed while it is busy",
        },
        map_pages: u32 {
            default: 1056,
            description: "Most pages of each queue at which guest pages are mapped",
        },
        domain_mappings: u32 {
            default: 67584,
            description: "Pages of one guest that its queues may map in all; beyond it they copy",
        },
        poll_us: u32 {
            default: 20,
            description: "Microseconds of looking for requests that a sleep of a queue is worth (0: do not look)",
        },
        halt_us: u32 {
            default: 500,
            description: "A queue whose waits are shorter, in microseconds, halts the processor itself (0: never)",
        },
        native_protocol: u32 {
            default: 0,
            description: "Layout of frontends that name none: 0 is x86_32 as in the C driver, 1 is native",
        },
    },
}

/// The loaded module. The fields are dropped in this order: first no device is left, then no event, then no disk
/// that a process serves, then no work.
#[pin_data]
struct Blkback {
    #[pin]
    driver: kernel::driver::Registration<Adapter<bus::VbdDriver<tap::TapTable>>>,
    watches: Watches,
    debug: Debug,
    nodes: tap::Nodes,
    tap: tap::TapTable,
    queues: WorkQueues,
    transactions: Transactions,
    claims: Claims,
    memory: DiskMemory,
}

impl kernel::InPlaceModule for Blkback {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            // Before anything else: without Xen there is nothing to do, and nothing is to be seen of it. Fields above
            // the driver are ready before it, because the bus may probe a device at once.
            memory: linux::needs_xen()
                .inspect(|()| params::note_processors())
                .and_then(|()| DiskMemory::new())?,
            claims: Claims::new()?,
            transactions: Transactions::new()?,
            debug: Debug::new()?,
            queues: WorkQueues::new()?,
            tap: tap::TapTable::new()?,
            // If the rest fails, this goes before the work that events queue.
            watches: Watches::new()?,
            driver <- kernel::driver::Registration::new(c"xen-blkback-rs", module),
            nodes: tap::Nodes::new().inspect(|_| params::tell())?,
        })
    }
}
