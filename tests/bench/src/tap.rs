// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Disks that a process serves: the supervisor, and the time until it replaces a dead process.

use crate::guest::RunningGuest;
use crate::jobs::BenchJob;
use crate::mark::Marks;
use crate::reads::{Reads, LOOK};
use crate::sample::{self, JobPlace};
use crate::sh;
use anyhow::{bail, ensure, Context, Result};
use ring::tap::abi::{Info, STATE_LIVE};
use rustix::process::{kill_process, Pid, Signal};
use serde_json::{json, Map, Value};
use std::process::{Child, Command, Stdio};
use tapdev::control::Control;

/// Options of each disk that the hotplug script creates.
const SETTINGS: &str = "/etc/default/xentap";
/// Socket of the supervisor.
const SOCKET: &str = "/run/xentap/control.sock";
/// Returns a disk in xl's syntax, by its name in the guest.
pub(crate) fn disk(target: &str, vdev: &str) -> String {
    format!("script=block-tap-rs,vdev={vdev},access=rw,target={target}")
}

/// The supervisor, while disks of processes are measured.
#[derive(Debug)]
pub(crate) struct BenchSupervisor(Child);

impl BenchSupervisor {
    /// Starts it; its processes use this engine.
    pub(crate) fn start(engine: &str) -> Result<BenchSupervisor> {
        sh::put(SETTINGS, &format!("CREATE_OPTIONS='--engine {engine}'\n"))?;
        let child = Command::new(control::installed::SUPERVISOR)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start blktapctrl: is it installed?")?;
        let mut supervisor = BenchSupervisor(child);
        sh::wait_for("an answer of blktapctrl", || {
            let ended = supervisor.0.try_wait()?;
            ensure!(ended.is_none(), "blktapctrl has ended: {ended:?}");
            Ok(std::os::unix::net::UnixStream::connect(SOCKET).is_ok())
        })?;
        Ok(supervisor)
    }

    /// Stops it. Its disks must be gone.
    pub(crate) fn stop(mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }
}

/// Stops the supervisor that the machine has started, because it would disturb every measurement.
pub(crate) fn end_supervisor() -> Result<()> {
    sh::run(&["busybox", "killall", "-9", "blktapctrl"]).map(drop)
}

/// Measures how long the guest waits for its disk when the process that serves it is killed. The speed is that of the
/// first death, because the supervisor delays the restart from the second death in a minute on. The instructions and
/// events of such a run include those of the load.
pub(crate) fn measure(
    place: &mut JobPlace<'_>,
    number: u32,
    job: &BenchJob,
    marks: &mut Marks,
) -> Result<Map<String, Value>> {
    let JobPlace::Guest(guest) = place else {
        bail!("only a guest waits for a process");
    };
    let mut seconds = Vec::new();
    let run = sample::around(guest, marks, |guest| {
        seconds = deaths(guest, number, job.count)?;
        Ok(())
    })?;
    let (first, longest) = (seconds[0], seconds.iter().copied().fold(0.0, f64::max));
    let mut value = Map::new();
    let deaths = job.total(job.count);
    value.insert("long".into(), run.json(deaths, 1.0 / first, first * 1e6));
    let figures = json!({"ms, first death": first * 1e3, "ms, longest": longest * 1e3});
    value.insert("figures".into(), figures);
    Ok(value)
}

/// Returns the only disk that a process serves.
fn served(control: &Control) -> Result<Info> {
    let info = control.query(0)?;
    info.context("the kernel has no tap disk")
}

/// Kills the process `deaths` times while the guest reads, and waits each time until the next process has answered a
/// request. Returns the seconds of each.
fn deaths(guest: &mut RunningGuest, number: u32, deaths: u32) -> Result<Vec<f64>> {
    let reads = Reads::start(guest, number)?;
    let (control, mut seconds) = (Control::open()?, Vec::new());
    for _ in 0..deaths {
        reads.wait(100)?;
        seconds.push(death(&control, &reads)?);
    }
    reads.end(guest)?;
    Ok(seconds)
}

/// Measures one death: the seconds until the next process has answered.
fn death(control: &Control, reads: &Reads) -> Result<f64> {
    let old = served(control)?;
    ensure!(
        old.state == STATE_LIVE && old.pid != 0,
        "no process serves the disk: {old:?}"
    );
    let pid = i32::try_from(old.pid).ok().and_then(Pid::from_raw);
    let begun = std::time::Instant::now();
    kill_process(pid.context("a process has a number")?, Signal::KILL)?;
    sh::wait_every(LOOK, "the next process of the disk", || {
        let info = served(control)?;
        Ok(info.state == STATE_LIVE && info.pid != old.pid)
    })?;
    // It first answers the requests that its predecessor left.
    reads.wait(1)?;
    Ok(begun.elapsed().as_secs_f64())
}
