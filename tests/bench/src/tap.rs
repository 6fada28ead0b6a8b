// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Disks that a process serves: the supervisor, and how soon it replaces a process that dies.

use crate::guest::Guest;
use crate::jobs::Job;
use crate::mark::Marks;
use crate::sample::{self, Place};
use crate::sh;
use anyhow::{bail, ensure, Context, Result};
use ring::tap::abi::{Info, STATE_LIVE};
use rustix::process::{kill_process, Pid, Signal};
use serde_json::{json, Map, Value};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tapdev::control::Control;

/// Options of each disk that the hotplug script makes.
const SETTINGS: &str = "/etc/default/xentap";
/// Where the supervisor listens.
const SOCKET: &str = "/run/xentap/control.sock";
/// How often is looked whether a request was answered. The whole takes less than 20 ms.
const LOOK: Duration = Duration::from_micros(250);

/// A disk as `xl` wants it.
pub(crate) fn disk(target: &str) -> String {
    format!("script=block-tap-rs,vdev=xvda,access=rw,target={target}")
}

/// The supervisor, while disks of processes are measured.
#[derive(Debug)]
pub(crate) struct Supervisor(Child);

impl Supervisor {
    /// Starts it; processes will use this engine.
    pub(crate) fn start(engine: &str) -> Result<Supervisor> {
        sh::put(SETTINGS, &format!("CREATE_OPTIONS='--engine {engine}'\n"))?;
        let child = Command::new("blktapctrl")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start blktapctrl: is it installed?")?;
        let mut supervisor = Supervisor(child);
        sh::wait_for("an answer of blktapctrl", || {
            let ended = supervisor.0.try_wait()?;
            ensure!(ended.is_none(), "blktapctrl has ended: {ended:?}");
            Ok(std::os::unix::net::UnixStream::connect(SOCKET).is_ok())
        })?;
        Ok(supervisor)
    }

    /// Ends it. Its disks must be gone.
    pub(crate) fn stop(mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }
}

/// Ends the supervisor that the machine has started: it would be measured with every backend.
pub(crate) fn end_supervisor() -> Result<()> {
    sh::run(&["busybox", "killall", "-9", "blktapctrl"]).map(drop)
}

/// How long the guest waits for its disk when the process that serves it is killed. The speed is that
/// of the first death: from the second one in a minute on the supervisor waits before it starts another
/// process. The instructions and events of such a run are those of the load too.
pub(crate) fn measure(
    place: &mut Place<'_>,
    number: u32,
    job: &Job,
    marks: &mut Marks,
) -> Result<Map<String, Value>> {
    let Place::Guest(guest) = place else {
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

/// How long the guest waits for its disk at most while that is handed to a new process: the longest time in
/// which no request was answered. Of that, nobody serves the disk for as long as the supervisor says.
pub(crate) fn measure_handoff(
    place: &mut Place<'_>,
    number: u32,
    job: &Job,
    marks: &mut Marks,
) -> Result<Map<String, Value>> {
    let Place::Guest(guest) = place else {
        bail!("only a guest waits for a process");
    };
    let mut pauses = Vec::new();
    let run = sample::around(guest, marks, |guest| {
        pauses = handoffs(guest, number, job.count)?;
        Ok(())
    })?;
    let most = |of: fn(&Pause) -> f64| pauses.iter().map(of).fold(0.0, f64::max);
    let longest = most(|pause| pause.guest);
    let mut value = Map::new();
    let handoffs = job.total(job.count);
    value.insert(
        "long".into(),
        run.json(handoffs, 1.0 / longest, longest * 1e6),
    );
    let unserved = most(|pause| pause.unserved);
    let figures = json!({"ms, longest": longest * 1e3, "ms, nobody serves": unserved * 1e3});
    value.insert("figures".into(), figures);
    Ok(value)
}

/// One hand-off, in seconds.
struct Pause {
    /// Without an answer to the guest.
    guest: f64,
    /// As the supervisor says.
    unserved: f64,
}

fn handoffs(guest: &mut Guest, number: u32, handoffs: u32) -> Result<Vec<Pause>> {
    let reads = start_reads(guest, number)?;
    let mut pauses = Vec::new();
    for _ in 0..handoffs {
        wait_reads(&reads, 100)?;
        pauses.push(handoff(&reads)?);
    }
    end_reads(guest)?;
    Ok(pauses)
}

/// Looks at the answers all the time while the disk is handed over.
fn handoff(reads: &str) -> Result<Pause> {
    let mut command = Command::new("tap-ctl")
        .args(["--json", "handoff", "0"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start tap-ctl: is it installed?")?;
    let (mut last, mut longest) = (answered(reads)?, 0.0_f64);
    let mut since = std::time::Instant::now();
    loop {
        let ended = command.try_wait()?.is_some();
        let now = answered(reads)?;
        if now != last || ended {
            longest = longest.max(since.elapsed().as_secs_f64());
            (last, since) = (now, std::time::Instant::now());
        }
        if ended {
            break;
        }
        std::thread::sleep(LOOK);
    }
    let output = command.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "the disk was not handed over: {text}"
    );
    let told: Value = serde_json::from_str(&text).context("tap-ctl printed no JSON")?;
    let unserved = told["pause_us"].as_f64();
    Ok(Pause {
        guest: longest,
        unserved: unserved.with_context(|| format!("no pause in {told}"))? / 1e6,
    })
}

/// The one disk that a process serves.
fn served(control: &Control) -> Result<Info> {
    let info = control.query(0)?;
    info.context("the kernel has no tap disk")
}

/// Kills the process so many times while the guest reads, and waits each time until the next process
/// has answered a request. Returns the seconds of each.
fn deaths(guest: &mut Guest, number: u32, deaths: u32) -> Result<Vec<f64>> {
    let reads = start_reads(guest, number)?;
    let (control, mut seconds) = (Control::open()?, Vec::new());
    for _ in 0..deaths {
        wait_reads(&reads, 100)?;
        seconds.push(death(&control, &reads)?);
    }
    end_reads(guest)?;
    Ok(seconds)
}

/// Has the guest read one block after the other; returns where the driver counts that.
fn start_reads(guest: &mut Guest, number: u32) -> Result<String> {
    guest.run(
        "fio --name=load --filename=/dev/xvda --direct=1 --rw=randread --bs=4k --ioengine=libaio \
         --iodepth=1 --time_based --runtime=3600 >/tmp/load 2>&1 & echo $! >/tmp/load.pid",
    )?;
    Ok(format!(
        "/sys/bus/xen-backend/devices/vbd-{}-{number}/statistics/rd_req",
        guest.domid()
    ))
}

/// Ends that; the guest must not have seen an error.
fn end_reads(guest: &mut Guest) -> Result<()> {
    // fio says how many errors it saw when it is ended.
    guest
        .run(
            "kill -TERM $(cat /tmp/load.pid); until grep -q 'err=' /tmp/load; do usleep 10000; done; \
             grep -q 'err= 0' /tmp/load || { cat /tmp/load; false; }",
        )
        .context("the guest saw that its process was another one")?;
    Ok(())
}

/// One death: the seconds until the next process has answered.
fn death(control: &Control, reads: &str) -> Result<f64> {
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
    // What it answers first is what its predecessor left behind.
    wait_reads(reads, 1)?;
    Ok(begun.elapsed().as_secs_f64())
}

/// Waits until so many more reads were answered than now.
fn wait_reads(file: &str, more: u64) -> Result<()> {
    let wanted = answered(file)? + more;
    sh::wait_every(LOOK, "answers to the guest", || {
        Ok(answered(file)? >= wanted)
    })
}

/// Reads that were answered.
fn answered(file: &str) -> Result<u64> {
    let text = sh::get(file)?;
    text.trim()
        .parse()
        .with_context(|| format!("the driver counts `{text}` reads"))
}
