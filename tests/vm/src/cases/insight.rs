// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Files in debugfs and trace points of a disk.

use super::{Case, Context, SharedGuest};
use crate::guest::{AttachedVbd, Guest};
use crate::{hotplug, sh};
use anyhow::{ensure, Context as _, Result};
use std::path::{Path, PathBuf};

const EVENTS: &str = "/sys/kernel/debug/tracing/events/xen_blkback_rs/enable";
const TRACE: &str = "/sys/kernel/debug/tracing/trace";
/// Reads of the cases.
const READS: usize = 40;

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let ours = |case: Case| Case { ours: true, ..case };
    vec![
        ours(Case::new(
            "ops.latency",
            "debugfs counts how long I/O takes while that is wanted, and shows each queue",
            SharedGuest::Pv,
            latency,
        )),
        ours(Case::new(
            "ops.traced",
            "trace points tell of each I/O that the disk has and is through with",
            SharedGuest::Pv,
            traced,
        )),
    ]
}

fn folder(guest: &Guest, vbd: &AttachedVbd) -> Result<PathBuf> {
    let number = vbd.backend.rsplit('/').next();
    let number = number.context("a backend's directory has a name")?;
    let name = format!("vbd-{}-{number}", guest.domid);
    Ok(Path::new("/sys/kernel/debug/xen-blkback-rs").join(name))
}

fn read_blocks(guest: &Guest) -> Result<()> {
    let dd = format!("dd if=/dev/xvda of=/dev/null bs=4k count={READS} iflag=direct");
    guest.run(&dd).map(drop)
}

/// Returns the numbers of reads, writes, flushes and discards in a table of latencies, and those of times in the ring,
/// of waits for pages, and of answers.
fn sums(table: &str) -> Result<[u64; 7]> {
    let mut sums = [0; 7];
    for line in table.lines().skip(2) {
        let counts = line.split_whitespace().skip(1);
        for (sum, count) in sums.iter_mut().zip(counts) {
            *sum += count
                .parse::<u64>()
                .with_context(|| format!("no table of latencies: {table}"))?;
        }
    }
    Ok(sums)
}

fn latency(context: &mut Context) -> Result<()> {
    let device = context.null_blk(32, &[])?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    let folder = folder(guest, &vbd)?;
    let table = || sh::get(folder.join("latency"));
    ensure!(
        table()?.starts_with("counting off") && sums(&table()?)? == [0; 7],
        "it is counted unasked: {}",
        table()?
    );
    sh::put(folder.join("latency"), "1")?;
    read_blocks(guest)?;
    let counted = sums(&table()?)?;
    ensure!(
        counted[0] >= READS as u64 && counted[1] == 0,
        "{READS} reads are counted as: {}",
        table()?
    );
    let [_, _, _, _, ring, pages, answers] = counted;
    ensure!(
        ring > 0 && pages >= READS as u64 && answers >= READS as u64,
        "what is before {READS} reads and after them is counted as: {}",
        table()?
    );
    sh::put(folder.join("latency"), "0")?;
    // A pass that has begun may still count.
    read_blocks(guest)?;
    let before = sums(&table()?)?;
    read_blocks(guest)?;
    ensure!(sums(&table()?)? == before, "it is counted on: {}", table()?);
    ensure!(
        std::fs::write(folder.join("latency"), "x").is_err(),
        "`x` is taken for a switch"
    );
    let queues = sh::get(folder.join("queues"))?;
    let asked = queues.lines().skip(1).filter_map(|line| {
        let reads = line.split_whitespace().nth(3)?;
        reads.parse::<u64>().ok()
    });
    let asked: Vec<u64> = asked.collect();
    ensure!(
        asked.len() > 1 && asked.iter().sum::<u64>() >= 3 * READS as u64,
        "the queues of a guest with two processors are: {queues}"
    );
    guest.detach(&vbd)?;
    ensure!(!folder.exists(), "{} is left behind", folder.display());
    Ok(())
}

fn traced(context: &mut Context) -> Result<()> {
    let device = context.null_blk(32, &[])?;
    context.at_end("end the trace", || sh::put(EVENTS, "0"));
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    sh::put(TRACE, "")?;
    sh::put(EVENTS, "1")?;
    read_blocks(guest)?;
    sh::put(EVENTS, "0")?;
    let trace = sh::get(TRACE)?;
    let whose = format!(": vbd-{}-", guest.domid);
    let of = |event: &str| {
        let event = format!(" {event}{whose}");
        trace.lines().filter(move |line| line.contains(&event))
    };
    for block in 0..READS {
        let sector = format!(" op=read sector={} sectors=8", block * 8);
        ensure!(
            of("xbr_submit").any(|line| line.ends_with(&sector)),
            "no {sector} in: {}",
            sh::tail(&trace, 2000)
        );
    }
    let (submitted, completed) = (of("xbr_submit").count(), of("xbr_complete").count());
    ensure!(
        submitted == completed && of("xbr_pass").any(|line| line.contains("answered=1 notify=1")),
        "{submitted} are submitted and {completed} completed: {}",
        sh::tail(&trace, 2000)
    );
    guest.detach(&vbd)
}
