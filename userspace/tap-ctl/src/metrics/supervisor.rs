// SPDX-License-Identifier: MIT OR Apache-2.0
//! Counters of blktapctrl about itself since its start: events, traces and lines that it lost.

use super::exposition::{Labels, Text};
use super::Table;
use crate::sample::HostSample;
use control::supervisor::Counted;

const COUNTED: Table<Counted> = &[
    (
        (
            "xen_disk_events_lost_total",
            "counter",
            "Events that a subscriber did not get, because they were not kept for so long.",
        ),
        |counted| counted.events_lost as f64,
    ),
    (
        (
            "xen_disk_traces_failed_total",
            "counter",
            "Traces of disks that ended without a command.",
        ),
        |counted| counted.traces_failed as f64,
    ),
    (
        (
            "xen_disk_log_lines_suppressed_total",
            "counter",
            "Lines that blktapctrl left out of its log, because there were too many or its reader did not take them.",
        ),
        |counted| counted.lines_suppressed as f64,
    ),
];

/// Adds the counters, if blktapctrl sent them.
pub(super) fn tell(text: &mut Text, look: &HostSample) {
    let Some(counted) = &look.counted else {
        return;
    };
    for (family, value) in COUNTED {
        text.family(*family);
        text.sample(&Labels::default(), value(counted));
    }
}
