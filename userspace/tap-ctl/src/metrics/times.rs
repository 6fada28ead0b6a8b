// SPDX-License-Identifier: MIT OR Apache-2.0
//! The driver's times of requests and of their waits, for phy and tap disks.

use super::exposition::Text;
use super::{disks, labels, MetricFamily};
use crate::host::vbd::{Operation, Vbd};
use crate::sample::{HostSample, SampledDisk};
use std::time::Duration;

/// The value that a family has of a disk, if the driver counts that.
type IfCounted = fn(&Vbd) -> Option<f64>;

/// Families of disks.
const COUNTED: &[(MetricFamily, IfCounted)] = &[
    (
        (
            "xen_disk_in_flight",
            "gauge",
            "Requests of the guest that are taken and not answered.",
        ),
        |vbd| Some(vbd.in_flight()? as f64),
    ),
    (
        (
            "xen_disk_oldest_seconds",
            "gauge",
            "Age of the oldest request that the storage, or the process, has not answered.",
        ),
        |vbd| Some(vbd.oldest()?.as_secs_f64()),
    ),
    (
        (
            "xen_disk_page_wait_seconds_total",
            "counter",
            "Time for which requests waited for pages, added up over the queues.",
        ),
        |vbd| Some(vbd.page_wait()?.as_secs_f64()),
    ),
    (
        (
            "xen_disk_pieces_total",
            "counter",
            "Pieces beyond the first of requests that were split because pages were short.",
        ),
        |vbd| Some(vbd.counted("pieces")? as f64),
    ),
    (
        ("xen_disk_passes_total", "counter", "Passes over the rings."),
        |vbd| Some(vbd.counted("passes")? as f64),
    ),
    (
        (
            "xen_disk_ring_full_total",
            "counter",
            "Passes that found a ring full, so that the guest could queue no more.",
        ),
        |vbd| Some(vbd.counted("ring_full")? as f64),
    ),
    (
        (
            "xen_disk_ring_slots",
            "gauge",
            "Requests for which the rings have room.",
        ),
        |vbd| Some(vbd.counted("ring_slots")? as f64),
    ),
];

/// The value that a family has of an operation.
type OfOperation = fn(u64, Duration) -> f64;

/// Families of operations: what has ended, and what that took.
const ENDED: [(MetricFamily, OfOperation); 2] = [
    (
        (
            "xen_disk_completed_total",
            "counter",
            "I/Os that the storage, or the process, has answered; a request that was split counts once for each piece.",
        ),
        |done, _| done as f64,
    ),
    (
        (
            "xen_disk_time_seconds_total",
            "counter",
            "Sum of the times of these I/Os: divided by xen_disk_completed_total it is the mean.",
        ),
        |_, took| took.as_secs_f64(),
    ),
];

/// Tells all of it.
pub(super) fn tell(text: &mut Text, look: &HostSample) {
    for (family, value) in COUNTED {
        disks(text, *family, look, |disk| value(disk.vbd.as_ref()?));
    }
    for (family, value) in ENDED {
        text.family(family);
        for (disk, operation) in pairs(look) {
            let took = disk.vbd.as_ref().and_then(|vbd| vbd.took(operation));
            if let Some((done, took)) = took {
                let labels = labels(disk).with("operation", Some(operation.name().into()));
                text.sample(&labels, value(done, took));
            }
        }
    }
}

/// Each disk with each operation.
fn pairs(look: &HostSample) -> impl Iterator<Item = (&SampledDisk, Operation)> {
    let each = |disk| Operation::ALL.into_iter().map(move |it| (disk, it));
    look.disks.iter().flat_map(each)
}
