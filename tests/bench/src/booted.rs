// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! What a guest does with its disk when it boots for the first time: it mounts a system, reads its files here and there,
//! which notes when they were read, and writes its first log.

use crate::jobs::Job;
use crate::mark::Marks;
use crate::sample::{self, Place, MKFS};
use crate::sh;
use anyhow::Result;
use serde_json::Value;

/// MiB of files that the system has.
pub(crate) const SYSTEM_MIB: u32 = 60;
const MOUNT: &str = "/tmp/booted";
/// The files in the order in which they are read.
const LIST: &str = "list";
/// What is printed at the end.
const LINE: &str = "booted";

/// Makes a system of dom0's own files on a device.
pub(crate) fn put_system(device: &str) -> Result<()> {
    let all = "/tmp/booted.list";
    sh::shell(&format!(
        "set -e; {MKFS} {device}; mkdir -p {MOUNT}; mount -t ext4 {device} {MOUNT}; cd /; \
         find usr -xdev -type f -size -2048k -printf '%s %p\\n' | LC_ALL=C sort -k2 | \
         awk '{{ sum += $1; if (sum > {SYSTEM_MIB} * 1048576) exit; print $2 }}' >{all}; \
         tar -cf - -T {all} | tar -xf - -C {MOUNT}; shuf --random-source={all} {all} >{MOUNT}/{LIST}; \
         umount {MOUNT}"
    ))
    .map(drop)
}

/// Measures on `device`, which has such a system.
pub(crate) fn measure(
    place: &mut Place<'_>,
    job: &Job,
    device: &str,
    marks: &mut Marks,
) -> Result<Value> {
    let boot = format!(
        "mkdir -p {MOUNT}; mount -t ext4 {device} {MOUNT} && cd {MOUNT} && xargs cat <{LIST} | wc -c >&2 && \
         dd if=/dev/urandom of=log bs=64k count=16 conv=fsync 2>/dev/null && cd / && umount {MOUNT} && echo {LINE}"
    );
    let (run, _) = sample::printed(place, &boot, LINE, marks)?;
    Ok(run.whole(job.total(job.count)))
}
