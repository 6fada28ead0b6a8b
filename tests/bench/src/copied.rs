// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A file is copied to the disk: it is mounted, written, and unmounted, as dm-userspace was measured.

use crate::jobs::Job;
use crate::mark::Marks;
use crate::sample::{self, Place};
use anyhow::Result;
use serde_json::{Map, Value};

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
) -> Result<Map<String, Value>> {
    place.run(&format!(
        "set -e; mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 {device} >&2; mkdir -p {MOUNT}; \
         dd if=/dev/urandom of={FILE} bs=1M count={}; sync; set +e",
        job.count
    ))?;
    let copy = format!(
        "mount -t ext4 {device} {MOUNT} && cp {FILE} {MOUNT}/ && umount {MOUNT} && echo {LINE}"
    );
    let (run, _) = sample::printed(place, &copy, LINE, marks)?;
    place.run(&format!("rm {FILE}"))?;
    let long = run.whole(job.total(job.count));
    Ok([("long".to_owned(), long)].into_iter().collect())
}
