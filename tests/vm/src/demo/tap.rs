// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The second part of the story: a process serves a disk, is killed, and the guest only waits.

use super::{direct, FIO};
use crate::cases;
use crate::console::GuestJob;
use crate::guest::Guest;
use crate::report::CaseReport;
use crate::tap::{disk, image, wait_supervisor, ServedDisk};
use crate::{sh, sys};
use anyhow::{ensure, Context, Result};
use std::time::Duration;

const IMAGE_MIB: u32 = 64;
/// Part of the image that the guest fills and the case compares.
const USED_MIB: u32 = 16;
const DEATHS: usize = 3;

/// Tells it to the end, and that of a [file that the kernel serves](super::direct), and leaves nothing behind.
pub(super) fn tell(report: &mut CaseReport, guest: &Guest) -> Result<()> {
    report.say("now a disk that a process of dom0 serves, from a file")?;
    let file = image("demo.img", IMAGE_MIB)?;
    let result = with_file(report, guest, &file).and_then(|()| direct::tell(report, guest, &file));
    std::fs::remove_file(&file).context("cannot remove the image")?;
    result
}

fn with_file(report: &mut CaseReport, guest: &Guest, file: &str) -> Result<()> {
    wait_supervisor()?;
    // A death of the process would not stop requests that the kernel executes in passthrough.
    let specification = disk(&format!("direct=no,aio:{file}"), "xvdb", "w");
    let disk = ServedDisk::attach(guest, &specification)?;
    let user = sh::run(&["stat", "-c", "%U", &format!("/proc/{}", disk.pid()?)])?;
    report.say(&format!(
        "the guest gets {specification}; tapdisk {} serves it, as the user {}, without any privilege",
        disk.pid()?,
        user.trim()
    ))?;
    let longest = load(report, guest, &disk)?;
    let kernel = disk.info()?;
    report.say(&format!(
        "fio wrote mixed sizes all along and verified their crc32c: no error; the longest that a request waited was {longest} ms"
    ))?;
    ensure!(
        kernel.replayed > 0,
        "no process was killed while it had requests: the load was too small"
    );
    report.say(&format!(
        "{} requests that the killed processes had not answered were executed again, in their order",
        kernel.replayed
    ))?;
    cases::compare(guest, "xvdb", file, USED_MIB)?;
    disk.detach(guest)?;
    report.say("guest and dom0 read the same from the file; it is detached, no process and no node is left")
}

/// Kills the process in the middle of verified writes, again and again; returns the milliseconds that
/// the slowest request of the guest took.
fn load(report: &mut CaseReport, guest: &Guest, disk: &ServedDisk) -> Result<u64> {
    let job = cases::verify_job("/dev/xvdb", USED_MIB, 1500, 512).replace("terse", "json");
    let job = guest.start(&job)?;
    for _ in 0..DEATHS {
        let before = disk.info()?.committed;
        let (mut pid, mut held) = (0, 0);
        sh::wait_for("requests at the process", Duration::from_secs(60), || {
            let info = disk.info()?;
            (pid, held) = (info.pid, info.delivered);
            Ok(info.committed > before + 100 && held > 0)
        })?;
        sys::kill(pid, libc::SIGKILL).context("cannot kill tapdisk")?;
        let (next, took) = disk.wait_replaced(pid)?;
        report.say(&format!(
            "kill -9 {pid}, which had {held} requests of the guest: tapdisk {next} serves after {} ms",
            took.as_millis()
        ))?;
    }
    slowest(guest, job)
}

/// Waits for a load, which must have seen no error; milliseconds of its slowest request.
pub(super) fn slowest(guest: &Guest, job: GuestJob) -> Result<u64> {
    let done = guest.wait(job, FIO)?;
    ensure!(
        done.rc == 0,
        "fio failed in the guest: {}",
        sh::tail(&done.text, 400)
    );
    longest(&done.text)
}

/// Milliseconds of the slowest request in the JSON of one fio, or of several.
fn longest(text: &str) -> Result<u64> {
    let json = text
        .find('{')
        .map(|at| &text[at..])
        .context("fio printed no JSON")?;
    let mut slowest = None;
    for run in serde_json::Deserializer::from_str(json).into_iter::<serde_json::Value>() {
        let run = run.context("fio printed broken JSON")?;
        let kinds = ["read", "write"].into_iter();
        let here = kinds.filter_map(|kind| run["jobs"][0][kind]["lat_ns"]["max"].as_u64());
        slowest = slowest.max(here.max());
    }
    Ok(slowest.context("fio printed no latency")? / 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::longest;

    #[test]
    fn slowest_request_of_either_kind() {
        let text = "note\n{\"jobs\":[{\"read\":{\"lat_ns\":{\"max\":3000000}},\"write\":{\"lat_ns\":{\"max\":7900000}}}]}";
        assert_eq!(longest(text).unwrap(), 7);
        let later = text.replace("7900000", "9100000").replace("note", "");
        assert_eq!(longest(&format!("{text}{later}")).unwrap(), 9);
        assert!(longest(&format!("{text}killed")).is_err());
        assert!(longest("fio failed").is_err());
    }
}
