// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! bonnie++ on ext4.
//!
//! bonnie++ runs in a control group with little memory, because the page cache could hold the whole file otherwise, and
//! half of the columns would measure the cache. The writer may fill most of that memory before it must wait, and
//! writeback begins early, because with the kernel's usual limits the writer sometimes sleeps for two seconds, whatever
//! the disk.

use crate::jobs::BenchJob;
use crate::mark::Marks;
use crate::sample::{self, JobPlace, MKFS};
use anyhow::{Context, Result};
use serde_json::{json, Map, Value};
use std::collections::BTreeMap;

/// Memory limit of the file's page cache and everything else of bonnie++.
const MEMORY_MIB: u32 = 48;
/// Share of that memory in percent that may be dirty: when the writer must wait, and when writeback begins.
const DIRTY: [u32; 2] = [90, 5];
/// Default values of the kernel for [`DIRTY`].
const DIRTY_USUAL: [u32; 2] = [20, 10];
/// Number of seeks of 8 KiB blocks. With bonnie++'s own 8192 the faster half of the backends has no figure.
const SEEKS: u32 = 24_576;
/// Size of the file for byte by byte I/O: each byte is a system call, so it is small.
const BYTES_MIB: u32 = 1;
/// Start of a line of results: the version of its format.
const LINE: &str = "1.98,";

/// Columns of such a line: the first field counts from zero, and the processor's share follows.
const COLUMNS: [(&str, usize); 7] = [
    ("out chr K/s", 9),
    ("out blk K/s", 11),
    ("rewrite K/s", 13),
    ("in chr K/s", 15),
    ("in blk K/s", 17),
    ("seeks /s", 19),
    ("create /s", 26),
];

/// Measures on `device`, and destroys its content. Byte by byte I/O runs only with `with_bytes`, in a separate run,
/// because it measures system calls of the guest and not the disk; it is not part of the speed.
pub(crate) fn measure(
    place: &mut JobPlace<'_>,
    job: &BenchJob,
    device: &str,
    with_bytes: bool,
    marks: &mut Marks,
) -> Result<Map<String, Value>> {
    let size = format!("-s {}:8k:{SEEKS} -r {} -f -n 1", job.count, job.count / 2);
    let (run, line) = sample::printed(place, &command(device, &size), LINE, marks)?;
    let mut columns = parse(&line)?;
    if with_bytes {
        let size = format!("-s {0} -r {BYTES_MIB} -f{BYTES_MIB} -n 0", 2 * BYTES_MIB);
        let (_, line) = sample::printed(place, &command(device, &size), LINE, marks)?;
        columns.extend(parse(&line)?);
    }
    let mut value = Map::new();
    value.insert("long".into(), run.whole(job.total(job.count)));
    value.insert("figures".into(), json!(columns));
    Ok(value)
}

/// Returns the command that makes a file system on `device`, and runs bonnie++ with the options `size` on it.
fn command(device: &str, size: &str) -> String {
    let group = "/sys/fs/cgroup";
    let limits = |[most, early]: [u32; 2]| {
        format!("echo {most} >/proc/sys/vm/dirty_ratio; echo {early} >/proc/sys/vm/dirty_background_ratio")
    };
    let (set, reset) = (limits(DIRTY), limits(DIRTY_USUAL));
    format!(
        "set -e; {set}; {MKFS} {device} >&2; mkdir -p /tmp/bonnie; \
         mount -t ext4 {device} /tmp/bonnie; [ -e {group}/cgroup.procs ] || mount -t cgroup2 none {group}; \
         echo +memory >{group}/cgroup.subtree_control; mkdir -p {group}/bonnie; \
         echo {MEMORY_MIB}M >{group}/bonnie/memory.max; \
         sh -c 'echo $$ >{group}/bonnie/cgroup.procs; exec bonnie++ -q -u 0:0 -d /tmp/bonnie {size} \
         -m bench' 2>/tmp/bonnie.err || {{ cat /tmp/bonnie.err; false; }}; umount /tmp/bonnie; {reset}; set +e"
    )
}

/// Returns the measured columns: an empty one was not requested, and `+++++` stands for one that took less than half a
/// second.
fn parse(line: &str) -> Result<BTreeMap<&'static str, f64>> {
    let fields: Vec<&str> = line.trim().split(',').collect();
    let unknown = || format!("bonnie++ printed a line of an unknown format: {line}");
    let mut found = BTreeMap::new();
    for (name, index) in COLUMNS {
        let field = fields.get(index).with_context(unknown)?;
        if !field.is_empty() && !field.starts_with('+') {
            found.insert(name, field.parse().with_context(unknown)?);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn columns_of_a_line() {
        let mut fields = vec![""; 40];
        (fields[0], fields[9], fields[13]) = ("1.98", "123", "+++++");
        let found = parse(&fields.join(",")).unwrap();
        assert_eq!(found["out chr K/s"], 123.0);
        assert_eq!(found.len(), 1);
        assert!(parse("1.98,2.00a,too short").is_err());
        fields[11] = "many";
        assert!(parse(&fields.join(",")).is_err());
    }
}
