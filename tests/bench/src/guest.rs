// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The guest that loads the disks: xl, and commands over its console.
//!
//! The agent of the end to end tests answers there: `RUN id command` gives `OUT id text` and, at the
//! end, `DONE id status`; `PING n` gives `PONG n`.

use crate::monitor::Monitor;
use crate::sh;
use anyhow::{bail, ensure, Context, Result};
use serde_json::{json, Value};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

const DIR: &str = "/run/bench";
const NAME: &str = "bench";
/// An unused disk, because xl starts the process that serves qdisk only with a guest that has one.
const IDLE: &str = "/run/bench/idle.img";

/// Commands that show the cause when a command of the guest hangs.
const STATE: &str = "xl vcpu-list; tail -n 5 /var/log/xen/guest-bench.log; \
     grep -E 'blk|xencons|evtchn' /proc/interrupts; xenstore-ls /local/domain/0/backend/vbd | grep -E 'state|dev ='; \
     head /sys/bus/xen-backend/devices/vbd-*/statistics/*_req";

/// Properties of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GuestShape {
    /// Run as PVH, not as PV.
    pub(crate) pvh: bool,
    /// An unused disk of qdisk.
    pub(crate) idle_qdisk: bool,
    /// Number of processors, and the number of the first one.
    pub(crate) processors: u32,
    pub(crate) first: u32,
}

/// A running guest.
pub(crate) struct RunningGuest {
    shape: GuestShape,
    domid: String,
    tty: File,
    lines: Receiver<String>,
    next: u64,
}

impl RunningGuest {
    /// Starts the guest.
    pub(crate) fn create(shape: GuestShape) -> Result<RunningGuest> {
        RunningGuest::start(shape)
            .with_context(|| format!("the guest does not start; the logs say: {}", logs()))
    }

    fn start(shape: GuestShape) -> Result<RunningGuest> {
        let (processors, first) = (shape.processors, shape.first);
        let kind = if shape.pvh { "pvh" } else { "pv" };
        std::fs::create_dir_all(DIR)?;
        File::create(IDLE)?.set_len(1 << 20)?;
        let disk = if shape.idle_qdisk {
            format!("'format=raw,backendtype=qdisk,vdev=xvdzz,access=rw,target={IDLE}'")
        } else {
            String::new()
        };
        let places: Vec<String> = (0..processors)
            .map(|index| (first + index).to_string())
            .collect();
        let config = format!(
            "name = '{NAME}'\ntype = '{kind}'\nkernel = '/t/guest/vmlinuz'\nramdisk = '/t/guest/guest.cpio.gz'\n\
             memory = 448\nvcpus = {processors}\ncpus = {places:?}\ntsc_mode = 'native'\nextra = 'console=hvc0 earlyprintk=xen loglevel=4 panic=1'\n\
             on_poweroff = 'destroy'\non_reboot = 'destroy'\non_crash = 'destroy'\nvif = []\ndisk = [{disk}]\n"
        );
        let path = format!("{DIR}/guest.cfg");
        sh::put(&path, &config)?;
        sh::run(&["xl", "create", &path])?;
        RunningGuest::connect(shape, 1)
    }

    /// Connects to the domain that has the name now; `next` is the number of the next command.
    fn connect(shape: GuestShape, next: u64) -> Result<RunningGuest> {
        let domid = sh::run(&["xl", "domid", NAME])?.trim().to_owned();
        let key = format!("/local/domain/{domid}/console/tty");
        let mut tty = String::new();
        sh::wait_for("the console of the guest", || {
            tty = sh::shell(&format!("xenstore-read {key} 2>/dev/null || true"))?
                .trim()
                .to_owned();
            Ok(!tty.is_empty())
        })?;
        let tty = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&tty)
            .with_context(|| format!("cannot open the guest's console {tty}"))?;
        let lines = listen(tty.try_clone()?);
        let mut guest = RunningGuest {
            shape,
            domid,
            tty,
            lines,
            next,
        };
        guest.wait_agent()?;
        Ok(guest)
    }

    fn wait_agent(&mut self) -> Result<()> {
        let deadline = Instant::now() + sh::LIMIT;
        while Instant::now() < deadline {
            writeln!(self.tty, "PING 1")?;
            let until = Instant::now() + Duration::from_secs(1);
            while let Some(line) = self.line(until)? {
                if line == "PONG 1" {
                    return Ok(());
                }
            }
        }
        bail!("the guest's agent did not answer: was /t/guest packed with it?")
    }

    /// Returns the next line of the console, or `None` at the deadline.
    fn line(&self, deadline: Instant) -> Result<Option<String>> {
        let rest = deadline.saturating_duration_since(Instant::now());
        match self.lines.recv_timeout(rest) {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("the guest went away"),
        }
    }

    /// Runs a command that must succeed and returns its output.
    pub(crate) fn run(&mut self, command: &str) -> Result<String> {
        let id = self.next;
        self.next += 1;
        writeln!(self.tty, "RUN {id} {command}").context("cannot write to the guest's console")?;
        let (out, done) = (format!("OUT {id} "), format!("DONE {id} "));
        let mut text = String::new();
        let deadline = Instant::now() + sh::LIMIT;
        loop {
            let Some(line) = self.line(deadline)? else {
                let state = sh::shell(STATE).unwrap_or_else(|error| format!("{error:#}"));
                bail!("`{command}` did not end in the guest; so far it said: {text}; dom0 sees: {state}");
            };
            if let Some(status) = line.strip_prefix(&done) {
                ensure!(
                    status == "0",
                    "`{command}` failed in the guest with status {status}: {text}"
                );
                return Ok(text);
            }
            if let Some(said) = line.strip_prefix(&out) {
                text.push_str(said);
                text.push('\n');
            }
        }
    }

    /// Attaches a disk and waits until the guest has it as this device.
    pub(crate) fn attach(&mut self, disk: &str, device: &str) -> Result<()> {
        sh::run(&["xl", "block-attach", &self.domid, disk])?;
        self.run(&format!(
            "n=0; while [ ! -b {device} ]; do n=$((n+1)); [ $n -le 600 ] || exit 1; usleep 50000; done",
        ))
        .with_context(|| {
            format!("the disk {device} did not appear in the guest; the logs say: {}", logs())
        })?;
        dom0::udev::settle()
    }

    /// Makes QEMU open the store of a disk once more, past dom0's page cache. Xen's word for that, `direct-io-safe`,
    /// makes it ask for Linux AIO too, which Debian's QEMU for Xen is built without: such a disk never appears there.
    /// So this function changes the disk through the monitor, and QEMU uses its threads.
    pub(crate) fn make_direct(&self, store: &str) -> Result<()> {
        let mut monitor = Monitor::open(&self.domid)?;
        let node = raw_node(&mut monitor, store)?;
        let node = node.with_context(|| format!("QEMU has not opened {store}"))?;
        let file = json!({"driver": "host_device", "filename": store, "locking": "off"});
        let options = json!({
            "driver": "raw", "node-name": node, "file": file,
            "discard": "unmap", "cache": {"direct": true},
        });
        monitor.command("blockdev-reopen", json!({ "options": [options] }))?;
        let nodes = monitor.command("query-named-block-nodes", json!({}))?;
        let mut nodes = nodes.as_array().into_iter().flatten();
        let is_file = |node: &Value| node["drv"] == "host_device" && node["file"] == store;
        ensure!(
            nodes.any(|node| is_file(node) && node["cache"]["direct"] == true),
            "QEMU still uses dom0's page cache for {store}"
        );
        Ok(())
    }

    /// Makes QEMU serve a disk, which it has opened on `opened`, from an export at this socket.
    pub(crate) fn exchange(&self, opened: &str, socket: &str) -> Result<()> {
        let mut monitor = Monitor::open(&self.domid)?;
        let node = raw_node(&mut monitor, opened)?;
        let node = node.with_context(|| format!("QEMU has not opened {opened}"))?;
        let direct = json!({"direct": true});
        let other = json!({
            "driver": "nbd", "node-name": OTHER, "server": {"type": "unix", "path": socket},
            "export": "disk", "cache": direct,
        });
        monitor.command("blockdev-add", other)?;
        let options = json!({
            "driver": "raw", "node-name": node, "file": OTHER, "discard": "unmap", "cache": direct,
        });
        monitor.command("blockdev-reopen", json!({ "options": [options] }))?;
        ensure!(
            raw_node(&mut monitor, opened)?.is_none(),
            "QEMU still serves the disk from {opened}"
        );
        Ok(())
    }

    /// Makes QEMU close the store that it used instead of a disk that is gone.
    pub(crate) fn forget_exchanged(&self) -> Result<()> {
        let mut monitor = Monitor::open(&self.domid)?;
        monitor.command("blockdev-del", json!({"node-name": OTHER}))?;
        Ok(())
    }

    /// Returns its domain number.
    pub(crate) fn domid(&self) -> &str {
        &self.domid
    }

    /// Returns the driver that serves the disk of this number.
    pub(crate) fn server(&self, number: u32) -> Option<String> {
        let link = format!(
            "/sys/bus/xen-backend/devices/vbd-{}-{number}/driver",
            self.domid
        );
        let target = std::fs::read_link(link).ok()?;
        Some(target.file_name()?.to_string_lossy().into_owned())
    }

    /// Detaches the disk of this number and waits until it is gone everywhere.
    pub(crate) fn detach(&mut self, number: u32, device: &str) -> Result<()> {
        let vdev = device.trim_start_matches("/dev/");
        sh::run(&["xl", "block-detach", &self.domid, vdev])?;
        let sysfs = format!("/sys/bus/xen-backend/devices/vbd-{}-{number}", self.domid);
        sh::wait_for("the removal of the disk", || {
            Ok(!std::path::Path::new(&sysfs).exists())
        })?;
        self.run(&format!(
            "n=0; while [ -b {device} ]; do n=$((n+1)); [ $n -le 600 ] || exit 1; usleep 50000; done",
        ))
        .with_context(|| format!("the disk {device} did not go away in the guest"))?;
        dom0::udev::settle()
    }

    /// Continues with the domain to which the guest was moved.
    pub(crate) fn follow(&mut self) -> Result<()> {
        *self = RunningGuest::connect(self.shape, self.next)?;
        Ok(())
    }

    /// Returns its properties.
    pub(crate) fn shape(&self) -> GuestShape {
        self.shape
    }

    /// Ends the guest.
    pub(crate) fn destroy(&self) -> Result<()> {
        sh::run(&["xl", "destroy", &self.domid])?;
        dom0::udev::settle()
    }
}

/// Returns the ends of the logs about the guest.
fn logs() -> String {
    let line = "tail -n 12 /var/log/xen/guest-bench.log /var/log/xen/qemu-dm-bench.log \
                /var/log/xen/xl-bench.log /tmp/bench.err 2>&1 || true";
    sh::shell(line).unwrap_or_else(|error| format!("{error:#}"))
}

/// Returns the lines of the console, as they arrive.
fn listen(tty: File) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(tty).split(b'\n') {
            // The console ends with the guest, and the receiver with the program.
            let Ok(line) = line else { return };
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send(text).is_err() {
                return;
            }
        }
    });
    receiver
}

/// The node of QEMU that serves a disk instead of xl's.
const OTHER: &str = "bench-export";

/// Returns the name of the node of QEMU that serves a disk on this store.
fn raw_node(monitor: &mut Monitor, store: &str) -> Result<Option<Value>> {
    let nodes = monitor.command("query-named-block-nodes", json!({}))?;
    let is_store = |node: &&Value| node["drv"] == "raw" && node["file"] == store;
    let node = nodes.as_array().into_iter().flatten().find(is_store);
    Ok(node.map(|node| node["node-name"].clone()))
}
