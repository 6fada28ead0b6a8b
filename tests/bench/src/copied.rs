// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Copy of a file to the disk: it is mounted, written, and unmounted, as in the measurements of dm-userspace.

use crate::jobs::BenchJob;
use crate::mark::Marks;
use crate::sample::{self, JobPlace, MKFS};
use anyhow::Result;
use serde_json::Value;

/// The copied file, in memory.
const FILE: &str = "/tmp/copied.from";
const MOUNT: &str = "/tmp/copied";
/// Word that is printed at the end.
const LINE: &str = "copied";

/// Measures on `device`, and destroys its content.
pub(crate) fn measure(
    place: &mut JobPlace<'_>,
    job: &BenchJob,
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
