// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! bonnie++ on ext4.
//!
//! It runs in a group of processes with little memory: the page cache could hold the whole file
//! otherwise, and half of the columns would be of the cache.

use crate::jobs::Job;
use crate::mark::Marks;
use crate::sample::{self, Place};
use anyhow::{Context, Result};
use serde_json::{json, Map, Value};
use std::collections::BTreeMap;

/// What the file and everything else of bonnie++ may keep in memory.
const MEMORY_MIB: u32 = 48;
/// The size of the file that is moved byte by byte: a system call each, so it is small.
const BYTES_MIB: u32 = 1;
/// How a line of results begins: the version of its format.
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

/// Measures on `device`; what was on it is lost.
pub(crate) fn measure(
    place: &mut Place<'_>,
    job: &Job,
    device: &str,
    marks: &mut Marks,
) -> Result<Map<String, Value>> {
    let (run, line) = sample::printed(place, &command(device, job.count), LINE, marks)?;
    let columns = parse(&line)
        .with_context(|| format!("bonnie++ printed a line of an unknown format: {line}"))?;
    let mut value = Map::new();
    value.insert("long".into(), run.whole(job.total(job.count)));
    value.insert("figures".into(), json!(columns));
    Ok(value)
}

fn command(device: &str, mib: u32) -> String {
    let group = "/sys/fs/cgroup";
    let ram = mib / 2;
    format!(
        "set -e; mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 {device} >&2; mkdir -p /tmp/bonnie; \
         mount -t ext4 {device} /tmp/bonnie; [ -e {group}/cgroup.procs ] || mount -t cgroup2 none {group}; \
         echo +memory >{group}/cgroup.subtree_control; mkdir -p {group}/bonnie; \
         echo {MEMORY_MIB}M >{group}/bonnie/memory.max; \
         sh -c 'echo $$ >{group}/bonnie/cgroup.procs; exec bonnie++ -q -u 0:0 -d /tmp/bonnie -s {mib} -r {ram} \
         -f{BYTES_MIB} -n 1 -m bench' 2>/tmp/bonnie.err || {{ cat /tmp/bonnie.err; false; }}; umount /tmp/bonnie; set +e"
    )
}

/// The columns that were measured; `+++++` stands for one that took less than half a second.
fn parse(line: &str) -> Option<BTreeMap<&'static str, f64>> {
    let fields: Vec<&str> = line.trim().split(',').collect();
    let mut found = BTreeMap::new();
    for (name, index) in COLUMNS {
        let field = fields.get(index)?;
        if let Ok(value) = field.parse::<f64>() {
            found.insert(name, value);
        } else if !field.starts_with('+') {
            return None;
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn columns_of_a_line() {
        let mut fields = vec!["0"; 40];
        (fields[0], fields[9], fields[13]) = ("1.98", "123", "+++++");
        let found = parse(&fields.join(",")).unwrap();
        assert_eq!(found["out chr K/s"], 123.0);
        assert!(!found.contains_key("rewrite K/s"));
        assert_eq!(parse("1.98,2.00a,too short"), None);
    }
}
