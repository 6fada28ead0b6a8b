// SPDX-License-Identifier: MIT OR Apache-2.0
//! Groups of disks that share limits, and what their disks did of them.

use super::exposition::{Labels, Text};
use super::Table;
use crate::sample::HostSample;
use control::supervisor::Group;

const GROUPS: Table<Group> = &[
    (
        (
            "xen_disk_group_disks",
            "gauge",
            "Disks of a group that share limits.",
        ),
        |group| group.members.len() as f64,
    ),
    (
        (
            "xen_disk_group_lacking_disks",
            "gauge",
            "Disks of a group that would do more with a larger limit.",
        ),
        |group| group.members.iter().filter(|member| member.lacks).count() as f64,
    ),
    (
        (
            "xen_disk_group_limit_bytes_per_second",
            "gauge",
            "Bytes that a group may read and write in a second; 0 without a limit.",
        ),
        |group| group.limits.bytes as f64,
    ),
    (
        (
            "xen_disk_group_limit_requests_per_second",
            "gauge",
            "Requests that a group may have executed in a second; 0 without a limit.",
        ),
        |group| f64::from(group.limits.requests),
    ),
    (
        (
            "xen_disk_group_bytes_total",
            "counter",
            "Bytes that the disks of a group have read and written in it since blktapctrl was started.",
        ),
        |group| group.bytes as f64,
    ),
    (
        (
            "xen_disk_group_requests_total",
            "counter",
            "Requests of the disks of a group since blktapctrl was started.",
        ),
        |group| group.requests as f64,
    ),
];

/// Tells of them, if there are any.
pub(super) fn tell(text: &mut Text, look: &HostSample) {
    if look.groups.is_empty() {
        return;
    }
    for (family, value) in GROUPS {
        text.family(*family);
        for group in &look.groups {
            let labels = Labels::default().with("group", Some(group.name.to_string()));
            text.sample(&labels, value(group));
        }
    }
}
