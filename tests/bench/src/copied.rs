// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A file is copied to the disk: it is mounted, written, and unmounted, as dm-userspace was measured.

use crate::jobs::Job;
use crate::mark::Marks;
use crate::sample::{self, Place, MKFS};
use anyhow::Result;
use serde_json::Value;

/// What is copied, in memory.
const FILE: &str = "/tmp/copied.from";
const MOUNT: &str = "/tmp/copied";
/// What is printed at the end.
const LINE: &str = "copied";

/// Measures on `device`; what was on it is lost.
pub(crate) fn measure(
    place: &mut Place<'_>,
    job: &Job,
    device: &str,
    marks: &mut Marks,
) -> Result<Value> {
    place.run(&format!(
        "set -e; {MKFS} {device} >&2; mkdir -p {MOUNT}; \
         dd if=/dev/urandom of={FILE} bs=1M count={}; sync; set +e",
        job.count
    ))?;
    let copy = format!(
        "mount -t ext4 {device} {MOUNT} && cp {FILE} {MOUNT}/ && umount {MOUNT} && echo {LINE}"
    );
    let (run, _) = sample::printed(place, &copy, LINE, marks)?;
    place.run(&format!("rm {FILE}"))?;
    Ok(run.whole(job.total(job.count)))
}
