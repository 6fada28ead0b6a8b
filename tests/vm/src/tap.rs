// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Tap disks as an administrator has them: the supervisor, its command line, and the processes.

use crate::guest::{AttachedVbd, Guest, RUN_DIR};
use crate::node::ControlNode;
use crate::{sh, sys, xs};
use anyhow::{bail, ensure, Context, Result};
use control::installed::SUPERVISOR;
use ring::tap::abi::{Info, STATE_LIVE};
use serde_json::Value;
use std::env;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Socket of the supervisor.
const SOCKET: &str = "/run/xentap/control.sock";
/// A process is replaced in a tenth of a second on a real host; this is an emulated one.
const REPLACED: Duration = Duration::from_secs(30);

/// The supervisor, started as on a host without systemd.
pub(crate) struct RunningSupervisor(Child);

impl RunningSupervisor {
    /// Starts it and waits until it answers.
    pub(crate) fn start() -> Result<RunningSupervisor> {
        RunningSupervisor::start_with(&[])
    }

    /// Starts it with more settings: names of its environment, and their values.
    pub(crate) fn start_with(settings: &[(&str, &str)]) -> Result<RunningSupervisor> {
        let log = log_of("blktapctrl")?;
        let child = Command::new(SUPERVISOR)
            .arg("--foreground")
            // The process does not see requests that the kernel serves in passthrough, and most cases are about the
            // process.
            .env(
                "XENTAP_DIRECT",
                env::var("XENTAP_DIRECT").unwrap_or("no".into()),
            )
            .envs(settings.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("cannot start blktapctrl: is it installed?")?;
        let mut supervisor = RunningSupervisor(child);
        sh::wait_for("an answer of blktapctrl", Duration::from_secs(30), || {
            if let Some(status) = supervisor.0.try_wait()? {
                bail!("blktapctrl ended ({status}): {}", log_tail()?);
            }
            Ok(is_supervised())
        })?;
        Ok(supervisor)
    }

    /// Returns true if it has not ended.
    pub(crate) fn is_running(&mut self) -> Result<bool> {
        Ok(self.0.try_wait()?.is_none())
    }

    /// Ends it in the orderly way; the processes of disks stay.
    pub(crate) fn stop(self) -> Result<()> {
        self.end(libc::SIGTERM)
    }

    /// Ends it as a crash does.
    pub(crate) fn kill(self) -> Result<()> {
        self.end(libc::SIGKILL)
    }

    fn end(mut self, signal: libc::c_int) -> Result<()> {
        sys::kill(self.0.id(), signal).context("cannot end blktapctrl")?;
        sh::wait_for("the end of blktapctrl", Duration::from_secs(20), || {
            Ok(self.0.try_wait()?.is_some())
        })
    }
}

/// True if a supervisor listens.
fn is_supervised() -> bool {
    UnixStream::connect(SOCKET).is_ok()
}

/// Waits for the supervisor that was started when the machine booted.
pub(crate) fn wait_supervisor() -> Result<()> {
    sh::wait_for("an answer of blktapctrl", Duration::from_secs(30), || {
        Ok(is_supervised())
    })
}

/// Ends the supervisor that was started when the machine booted: cases start their own, which they
/// can kill.
pub(crate) fn end_supervisor() -> Result<()> {
    wait_supervisor()?;
    sh::run(&["busybox", "killall", "blktapctrl"])?;
    sh::wait_for("the end of blktapctrl", Duration::from_secs(20), || {
        Ok(crate::leaks::processes("blktapctrl")? == 0)
    })
}

/// Returns the path of a program's log.
pub(crate) fn path_of(program: &str) -> String {
    format!("{RUN_DIR}/{program}.log")
}

/// The log of a program, to add to.
pub(crate) fn log_of(program: &str) -> Result<File> {
    fs::create_dir_all(RUN_DIR).context("cannot create the directory for logs")?;
    let log = File::options()
        .append(true)
        .create(true)
        .open(path_of(program));
    log.with_context(|| format!("cannot open the log of {program}"))
}

/// Returns the end of the supervisor's log.
pub(crate) fn log_tail() -> Result<String> {
    Ok(sh::tail(&sh::get(path_of("blktapctrl"))?, 1200))
}

/// Runs tap-ctl and returns its output.
pub(crate) fn ctl(arguments: &[&str]) -> Result<String> {
    let mut argv = vec!["tap-ctl"];
    argv.extend(arguments);
    sh::run(&argv)
}

/// Runs tap-ctl and returns its output as a value.
pub(crate) fn ctl_json(arguments: &[&str]) -> Result<Value> {
    let text = ctl(&[&["--json"], arguments].concat())?;
    serde_json::from_str(&text).with_context(|| {
        format!(
            "`tap-ctl --json {}` printed no JSON: {text}",
            arguments.join(" ")
        )
    })
}

/// A disk in xl's syntax that the script `block-tap-rs` attaches.
pub(crate) fn disk(target: &str, vdev: &str, access: &str) -> String {
    format!("format=raw, vdev={vdev}, access={access}, script=block-tap-rs, target={target}")
}

/// Makes an empty image of `mib` MiB in a file system.
pub(crate) fn image(name: &str, mib: u32) -> Result<String> {
    const FOLDER: &str = "/srv/vmtest";
    fs::create_dir_all(FOLDER).context("cannot make the folder for images")?;
    let path = format!("{FOLDER}/{name}");
    let file = File::create(&path).with_context(|| format!("cannot make {path}"))?;
    file.set_len(u64::from(mib) << 20)
        .with_context(|| format!("cannot size {path}"))?;
    Ok(path)
}

/// A disk that a tapdisk serves to a guest.
pub(crate) struct ServedDisk {
    /// The device.
    pub(crate) vbd: AttachedVbd,
    /// Number of the node.
    pub(crate) minor: u32,
}

impl ServedDisk {
    /// Attaches a disk.
    pub(crate) fn attach(guest: &Guest, specification: &str) -> Result<ServedDisk> {
        let vbd = guest.attach(specification).map_err(|error| {
            let log = log_tail().unwrap_or_default();
            error.context(format!("blktapctrl says: {log}"))
        })?;
        ServedDisk::of(vbd)
    }

    /// Finds the tap disk of an attached device.
    pub(crate) fn of(vbd: AttachedVbd) -> Result<ServedDisk> {
        let minor = xs::number(&format!("{}/tap-minor", vbd.backend))?;
        Ok(ServedDisk {
            vbd,
            minor: u32::try_from(minor).context("`tap-minor` is too large")?,
        })
    }

    /// Returns the kernel's information about the disk.
    pub(crate) fn info(&self) -> Result<Info> {
        let info = ControlNode::open()?.query(self.minor)?;
        info.with_context(|| format!("the kernel has no tap disk {}", self.minor))
    }

    /// The process that serves it now.
    pub(crate) fn pid(&self) -> Result<u32> {
        let info = self.info()?;
        ensure!(
            info.state == STATE_LIVE && info.pid != 0,
            "no process serves tap disk {}: {info:?}",
            self.minor
        );
        Ok(info.pid)
    }

    /// Kills the process and returns its number.
    pub(crate) fn kill(&self) -> Result<u32> {
        let pid = self.pid()?;
        ensure!(
            Path::new(&format!("/proc/{pid}/comm")).exists(),
            "the process {pid} of tap disk {} is not there",
            self.minor
        );
        self.signal(pid, libc::SIGKILL)?;
        Ok(pid)
    }

    /// Sends a signal to a process of the disk.
    pub(crate) fn signal(&self, pid: u32, signal: libc::c_int) -> Result<()> {
        sys::kill(pid, signal).with_context(|| format!("cannot send a signal to tapdisk {pid}"))
    }

    /// Waits until another process than `old` serves the disk; returns it and how long it took.
    pub(crate) fn wait_replaced(&self, old: u32) -> Result<(u32, Duration)> {
        let (begun, mut pid) = (Instant::now(), 0);
        let replaced = sh::wait_for("another process for the disk", REPLACED, || {
            let info = self.info()?;
            pid = info.pid;
            Ok(info.state == STATE_LIVE && pid != old && pid != 0)
        });
        replaced.with_context(|| {
            let log = log_tail().unwrap_or_default();
            format!("the kernel says {:?}; blktapctrl says: {log}", self.info())
        })?;
        Ok((pid, begun.elapsed()))
    }

    /// Kills the process and waits for the next one.
    pub(crate) fn replace(&self) -> Result<Duration> {
        let old = self.kill()?;
        Ok(self.wait_replaced(old)?.1)
    }

    /// Detaches the disk and checks that the kernel has forgotten it.
    pub(crate) fn detach(self, guest: &Guest) -> Result<()> {
        guest.detach(&self.vbd)?;
        self.wait_gone()
    }

    /// Destroys the guest, and waits until nothing of the disk is left.
    pub(crate) fn goes_with(&self, guest: Guest) -> Result<()> {
        guest.destroy()?;
        self.vbd.wait_gone()?;
        self.wait_gone()
    }

    /// Waits until neither kernel nor supervisor knows the disk.
    pub(crate) fn wait_gone(&self) -> Result<()> {
        let (control, record) = (
            ControlNode::open()?,
            format!("/run/xentap/disks/{}.json", self.minor),
        );
        sh::wait_for(
            &format!("the end of tap disk {}", self.minor),
            Duration::from_secs(20),
            || Ok(control.query(self.minor)?.is_none() && !Path::new(&record).exists()),
        )
    }
}

/// The events of the supervisor: those that it keeps, then those to come.
pub(crate) struct EventLog {
    program: Child,
    lines: Receiver<String>,
    /// When it began to listen, in milliseconds since 1970. Older events may be about another disk of that number.
    since_ms: u128,
}

impl EventLog {
    /// Begins to listen.
    pub(crate) fn follow() -> Result<EventLog> {
        let since_ms = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
        let mut program = Command::new("tap-ctl")
            .args(["--json", "events", "--after", "0"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start tap-ctl")?;
        let output = program
            .stdout
            .take()
            .context("tap-ctl has no standard output")?;
        let (sender, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(EventLog {
            program,
            lines,
            since_ms,
        })
    }

    /// Waits for an event of this name about a disk and returns its content. Events before it are not looked at again.
    pub(crate) fn wait_for(&self, name: &str, minor: u32, limit: Duration) -> Result<Value> {
        let events = self.wait_for_all(&[(name, minor)], limit)?;
        Ok(events.into_iter().next().unwrap_or_default())
    }

    /// Waits for one event of each name and disk, in any order, and returns their contents in the order in which they came.
    pub(crate) fn wait_for_all(
        &self,
        wanted: &[(&str, u32)],
        limit: Duration,
    ) -> Result<Vec<Value>> {
        let (deadline, mut seen) = (Instant::now() + limit, Vec::new());
        let (mut wanted, mut found) = (wanted.to_vec(), Vec::new());
        while let Some((name, minor)) = wanted.first() {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = self.lines.recv_timeout(left) else {
                bail!(
                    "no event `{name}` of disk {minor} came within {} s, only {seen:?}",
                    limit.as_secs()
                );
            };
            let event: Value = serde_json::from_str(&line).context("an event is no JSON")?;
            let is_new = event["at_ms"]
                .as_u64()
                .is_some_and(|at| u128::from(at) >= self.since_ms);
            let is_it = |(name, minor): &(&str, u32)| {
                event["minor"].as_u64() == Some((*minor).into())
                    && event["what"]["event"].as_str() == Some(name)
            };
            match wanted.iter().position(is_it).filter(|_| is_new) {
                Some(at) => {
                    wanted.remove(at);
                    found.push(event["what"].clone());
                }
                None => seen.push(line),
            }
        }
        Ok(found)
    }
}

impl Drop for EventLog {
    fn drop(&mut self) {
        if let Err(error) = self.program.kill().and_then(|()| self.program.wait()) {
            eprintln!("vmtest: cannot end tap-ctl: {error}");
        }
    }
}
