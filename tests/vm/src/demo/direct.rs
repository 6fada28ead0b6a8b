// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The third part of the story: the kernel serves a file in passthrough, and for a minute there is no process at all.

use super::tap::slowest;
use super::FIO;
use crate::cases;
use crate::console::GuestJob;
use crate::guest::Guest;
use crate::report::CaseReport;
use crate::tap::{disk, ServedDisk};
use crate::{sh, sys};
use anyhow::{ensure, Context, Result};
use ring::tap::abi::STATE_LIVE;
use std::time::{Duration, Instant};

/// Part of the image that the guest fills and the case compares.
pub(super) const USED_MIB: u32 = 8;
/// Time without a process.
const AWAY: Duration = Duration::from_secs(60);
/// A request that waited for a process would have taken longer.
const LONGEST_MS: u64 = 20_000;

/// The supervisor, which does nothing until this is dropped.
struct Halted(u32);

impl Halted {
    fn new() -> Result<Self> {
        let pids = sh::run(&["busybox", "pidof", "blktapctrl"])?;
        let pid = pids.trim().parse();
        let pid = pid.with_context(|| format!("the supervisor should be one process: {pids}"))?;
        sys::kill(pid, libc::SIGSTOP).context("cannot stop the supervisor")?;
        Ok(Self(pid))
    }
}

impl Drop for Halted {
    fn drop(&mut self) {
        if let Err(error) = sys::kill(self.0, libc::SIGCONT) {
            eprintln!("the supervisor stays stopped: {error}");
        }
    }
}

pub(super) fn tell(report: &mut CaseReport, guest: &Guest, file: &str) -> Result<()> {
    let specification = disk(&format!("aio:{file}"), "xvdb", "w");
    let disk = ServedDisk::attach(guest, &specification)?;
    let load = guest.start(&job())?;
    sh::wait_for("requests that the kernel executes", FIO, || {
        Ok(disk.info()?.direct > 100)
    })?;
    report.say(&format!(
        "the same file as {specification}: the kernel reads, writes and flushes it by itself, tapdisk {} looks on",
        disk.pid()?
    ))?;
    let supervisor = Halted::new()?;
    let old = disk.kill()?;
    sh::wait_for("the end of the process", FIO, || {
        Ok(disk.info()?.state != STATE_LIVE)
    })?;
    let before = disk.info()?;
    let begun = Instant::now();
    while begun.elapsed() < AWAY {
        let executed = disk.info()?.direct;
        sh::wait_for("requests without a process", FIO, || {
            let info = disk.info()?;
            ensure!(info.state != STATE_LIVE, "a process has come: {info:?}");
            Ok(info.direct > executed)
        })?;
    }
    let count = disk.info()?.direct - before.direct;
    report.say(&format!(
        "kill -9 {old}, and the supervisor stands still for {} s: the guest's load went on, {count} requests without a process",
        AWAY.as_secs()
    ))?;
    drop(supervisor);
    let (next, _) = disk.wait_replaced(old)?;
    let longest = end(guest, load)?;
    ensure!(
        longest < LONGEST_MS,
        "a request waited {longest} ms: for a process"
    );
    report.say(&format!(
        "tapdisk {next} serves now; fio flushed and verified all along: no error; the longest that a request waited was {longest} ms"
    ))?;
    cases::compare(guest, "xvdb", file, USED_MIB)?;
    disk.detach(guest)?;
    report.say("guest and dom0 read the same from the file")
}

/// Ends that load, which must have seen no error; returns the milliseconds that its slowest request took.
pub(super) fn end(guest: &Guest, load: GuestJob) -> Result<u64> {
    guest.run("touch /tmp/stop")?;
    slowest(guest, load)
}

/// Returns a load of writes that are flushed and verified, until `/tmp/stop` exists.
pub(super) fn job() -> String {
    format!(
        "rm -f /tmp/stop; while [ ! -e /tmp/stop ]; do fio --name=v --filename=/dev/xvdb --size={USED_MIB}m --bssplit=4k/60:64k/40 \
         --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite --verify=crc32c --verify_fatal=1 --do_verify=1 \
         --serialize_overlap=1 --fsync=32 --number_ios=120 --output-format=json || exit 1; done"
    )
}
