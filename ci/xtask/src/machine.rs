// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A test machine: Xen and dom0 in QEMU, without hardware virtualisation, from one command line. A machine without Xen
//! stands beside the tested one.
//!
//! A payload folder reaches dom0 as /t, and dom0 runs /t/run and powers off. This module gets the lines that /t/run
//! writes to the device named by $REPORT; the consoles go to a log of their own, and a sign of a kernel fault in it
//! fails the run whatever was reported.

mod cable;

use crate::artifacts::Machines;
use crate::kernel::Dom0Kernel;
use crate::root::Root;
use crate::steps::{RunningStep, StepKind};
use crate::stolen::{StealWatch, StolenTime};
use crate::{build, cache, run};
use anyhow::{bail, ensure, Context, Result};
pub(crate) use cable::{HostCable, MachineHost};
use nix::fcntl::Flock;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// Turns silent faults in dom0's kernel into a crash. Not for measurements.
const CHECKS: &str = "kfence.sample_interval=50 slab_debug=FZPU panic_on_warn=1 oops=panic hung_task_panic=1 panic=-1";

/// Number of times that a machine may be booted until dom0 runs /t/run, see [`trouble::breakpoint`].
const BOOTS: u32 = 3;

/// Returns the MiB of dom0's memory.
const fn dom0_memory(kernel: Dom0Kernel) -> u32 {
    match kernel {
        Dom0Kernel::Stock => 1536,
        // It keeps records of all its memory.
        Dom0Kernel::Checked => 3072,
    }
}

/// MiB for guests, and for Xen itself.
const GUESTS_MEMORY: u32 = 2560;

/// MiB of a machine without Xen.
const BARE_MEMORY: u32 = 2048;

/// Machine to boot, and its settings.
#[derive(Debug)]
pub(crate) struct Machine {
    /// Names the folder of the logs.
    pub(crate) name: String,
    /// Processors.
    pub(crate) smp: u32,
    /// Time is counted in instructions, so that figures repeat on any host.
    pub(crate) icount: bool,
    /// More words for Xen's command line.
    pub(crate) xen_args: String,
    /// More words for dom0's command line.
    pub(crate) dom0_args: String,
    /// Kind of virtual machine that dom0 is.
    pub(crate) dom0: Dom0,
    /// With the kernel's run-time checks, see `CHECKS`.
    pub(crate) checks: bool,
    /// More disks (raw images); they are vdc, vdd, ...
    pub(crate) disks: Vec<PathBuf>,
    /// The disk of its root; without one, changes to the root are discarded.
    pub(crate) root: Option<PathBuf>,
    /// The network to another machine.
    pub(crate) cable: Option<HostCable>,
    /// A plugin for QEMU; its output is `plugin.out` beside the console log.
    pub(crate) plugin: Option<PathBuf>,
    /// More arguments for the plugin.
    pub(crate) plugin_args: String,
    /// After this long the machine is killed, and the run fails.
    pub(crate) timeout: Duration,
}

/// Kind of virtual machine that dom0 is on Xen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dom0 {
    /// PV: dom0 knows its machine addresses.
    Pv,
    /// PVH: dom0 does not know its machine addresses, so its devices need an IOMMU.
    Pvh,
    /// There is no Xen: the kernel has the machine.
    Bare,
}

impl Dom0 {
    /// Returns the IOMMU. Xen finds that of Intel also with a processor of AMD, and QEMU offers it only for q35.
    fn iommu(self) -> Option<&'static str> {
        match self {
            Dom0::Pv | Dom0::Bare => None,
            Dom0::Pvh => Some("intel-iommu,intremap=off"),
        }
    }

    /// Returns the option that puts a virtio device behind it.
    fn behind(self) -> &'static str {
        match self {
            Dom0::Pv | Dom0::Bare => "",
            Dom0::Pvh => ",iommu_platform=on,disable-legacy=on",
        }
    }

    /// Returns the option for Xen's command line.
    fn word(self) -> &'static str {
        match self {
            Dom0::Pv | Dom0::Bare => "",
            Dom0::Pvh => "dom0=pvh",
        }
    }

    /// Returns the words for its kernel's command line.
    fn console(self) -> &'static str {
        match self {
            Dom0::Pv | Dom0::Pvh => "console=hvc0",
            Dom0::Bare => "console=ttyS0 noxen",
        }
    }
}

/// Result of a run.
#[derive(Debug)]
pub(crate) struct RunOutcome {
    /// The console log.
    pub(crate) console: PathBuf,
    /// Lines of it that no healthy run has.
    pub(crate) splats: Vec<String>,
    /// How the machine ended.
    pub(crate) end: MachineEnd,
    /// Until this is dropped no other run of this name begins, which would remove the logs.
    _folder: Option<Flock<File>>,
}

/// End of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum MachineEnd {
    /// dom0's /t/run ended, and dom0 went down in order.
    Orderly,
    /// dom0 went down before the end of /t/run.
    Early,
    /// The machine was killed after this many seconds.
    Killed(u64),
    /// QEMU itself failed, or another process killed it; with its output.
    Failed(String),
}

/// One boot of a machine, to its end.
struct MachineRun {
    /// /t/run has reported a line.
    reported: bool,
    /// The time limit, if the machine reached it and was killed.
    killed: Option<Duration>,
    /// How QEMU failed, or was killed.
    failure: Option<String>,
    stolen: StolenTime,
}

impl MachineRun {
    /// Returns how the machine ended, by its console.
    fn end(self, log: &str) -> MachineEnd {
        match (self.killed, self.failure) {
            (Some(limit), _) => MachineEnd::Killed(limit.as_secs()),
            (None, Some(failure)) => MachineEnd::Failed(failure),
            (None, None) if log.contains("dom0: /t/run ended with") => MachineEnd::Orderly,
            (None, None) => MachineEnd::Early,
        }
    }
}

impl RunOutcome {
    /// Returns an error about a fault outside of the reported tests.
    pub(crate) fn verdict(&self) -> Result<()> {
        if let Some(first) = self.splats.first() {
            bail!(
                "a kernel or Xen complained ({} lines), first: {first}; the whole log is {}",
                self.splats.len(),
                self.console.display()
            );
        }
        let what = match &self.end {
            MachineEnd::Orderly => return Ok(()),
            MachineEnd::Early => "dom0 went down before its work was done".to_string(),
            MachineEnd::Killed(seconds) => {
                format!("the machine was not done after {seconds} s and was killed")
            }
            MachineEnd::Failed(how) => format!("QEMU failed ({how})"),
        };
        let log = String::from_utf8_lossy(&fs::read(&self.console)?).into_owned();
        bail!(
            "{what}; the log is {}, its last lines are:\n{}",
            self.console.display(),
            run::tail(&log, 15)
        )
    }
}

impl Machine {
    /// Returns a machine with the usual settings.
    pub(crate) fn new(name: &str) -> Self {
        Machine {
            name: name.into(),
            smp: 2,
            icount: false,
            xen_args: String::new(),
            dom0_args: String::new(),
            dom0: Dom0::Pv,
            checks: true,
            disks: Vec::new(),
            root: None,
            cable: None,
            plugin: None,
            plugin_args: String::new(),
            timeout: Duration::from_secs(600),
        }
    }

    /// Boots with `payload` at /t; each reported line goes to `on_line` as it arrives.
    pub(crate) fn run(
        &self,
        machines: &Machines,
        payload: &Path,
        mut on_line: impl FnMut(&str),
    ) -> Result<RunOutcome> {
        let (dir, folder) = self.prepare(payload)?;
        let _one_at_a_time = self.turn()?;
        let console = dir.join("console.log");
        let mut boots = 1;
        let (run, log) = loop {
            let run = self.once(machines, &dir, &console, &mut on_line)?;
            let log = String::from_utf8_lossy(&fs::read(&console)?).into_owned();
            match trouble::breakpoint::stale(&log) {
                Some(line) if !run.reported && boots < BOOTS => {
                    let kept = dir.join(format!("console-{boots}.log"));
                    fs::rename(&console, &kept)?;
                    println!(
                        "        QEMU killed dom0 while it booted, with a breakpoint that was gone ({line}): boots again; the log is {}",
                        kept.display()
                    );
                    boots += 1;
                }
                _ => break (run, log),
            }
        };
        let (judged, excused) = run.stolen.without_stalls(&log);
        if excused > 0 {
            println!("        the host had no processor for the machine, whose kernels report {excused} stalls: not counted");
        }
        Ok(RunOutcome {
            splats: trouble::in_console(&judged)
                .into_iter()
                .map(str::to_owned)
                .collect(),
            end: run.end(&log),
            console,
            _folder: Some(folder),
        })
    }

    /// Boots once, and waits for the end.
    fn once(
        &self,
        machines: &Machines,
        dir: &Path,
        console: &Path,
        on_line: &mut impl FnMut(&str),
    ) -> Result<MachineRun> {
        let mut qemu = self.qemu(machines, dir);
        qemu.args(["-monitor", "none", "-serial", "file:/mnt/b/console.log"]);
        qemu.args(["-chardev", "stdio,id=report,signal=off"]);
        // The port would treat a closed standard input as an absent host, so it stays open.
        qemu.stdin(Stdio::piped()).stdout(Stdio::piped());
        qemu.stderr(File::create(dir.join("qemu.log"))?);
        let mut child = run::start(&mut qemu)?;
        let watch = StealWatch::start(child.id(), console.to_owned());
        let lines = reader(&mut child)?;
        let start = Instant::now();
        let step = |kind, doing: &str| {
            RunningStep::begin(
                kind,
                &self.name,
                &format!("{doing} the machine {}", self.name),
            )
        };
        let mut step_now = step(StepKind::Boot, "booting");
        let mut reported = false;
        let timed_out = loop {
            match lines.recv_timeout(self.timeout.saturating_sub(start.elapsed())) {
                Ok(line) => {
                    if !reported {
                        drop(step_now);
                        step_now = step(StepKind::Machine, "waiting for");
                    }
                    reported = true;
                    on_line(&line);
                }
                Err(RecvTimeoutError::Disconnected) => break false,
                Err(RecvTimeoutError::Timeout) => break true,
            }
        };
        if timed_out {
            child.kill()?;
        }
        let status = child.wait()?;
        drop(step_now);
        let complaint = fs::read_to_string(dir.join("qemu.log"))?;
        let failure = match complaint.trim() {
            "" => status.to_string(),
            complaint => format!("{status}: {complaint}"),
        };
        // The lines reported so far may be useful.
        ensure!(
            timed_out || reported || status.success(),
            "QEMU failed ({failure})"
        );
        Ok(MachineRun {
            reported,
            killed: timed_out.then_some(self.timeout),
            failure: (!status.success()).then_some(failure),
            stolen: watch.stop(),
        })
    }

    /// Boots with dom0's console on the terminal.
    pub(crate) fn run_on_terminal(&self, machines: &Machines, payload: &Path) -> Result<()> {
        let (dir, _folder) = self.prepare(payload)?;
        let _one_at_a_time = self.turn()?;
        let mut qemu = self.qemu(machines, &dir);
        qemu.args([
            "-serial",
            "mon:stdio",
            "-chardev",
            "file,id=report,path=/mnt/b/report",
        ]);
        run::shown(&mut qemu)
    }

    /// Waits until no other machine with this kind of clock runs. A machine whose time is counted in instructions is
    /// not disturbed by other programs, and uses the processors that they leave idle.
    fn turn(&self) -> Result<Flock<File>> {
        let name = match self.icount {
            true => "machine-counted.lock",
            false => "machine.lock",
        };
        cache::lock(&cache::dir()?.join(name))
    }

    /// Makes the folder of the run, with the payload as a disk; no other run may use it until the lock is released.
    pub(crate) fn prepare(&self, payload: &Path) -> Result<(PathBuf, Flock<File>)> {
        ensure!(
            self.disks.len() + usize::from(self.root.is_some()) <= 2,
            "a machine takes two more disks at most, its root among them"
        );
        let all = build::repository()?.join("target/vm");
        fs::create_dir_all(&all)?;
        let dir = all.join(&self.name);
        let lock = cache::lock(&all.join(format!("{}.lock", self.name)))?;
        run::remove_tree(&dir)?;
        fs::create_dir_all(&dir)?;
        let tar = dir.join("payload.tar");
        run::shown(
            Command::new("tar")
                .args(["--owner=0", "--group=0", "-cf"])
                .arg(&tar)
                .arg("-C")
                .arg(payload)
                .arg("."),
        )?;
        // A disk is made of whole sectors.
        let size = fs::metadata(&tar)?.len().next_multiple_of(4096);
        File::options().write(true).open(&tar)?.set_len(size)?;
        if let Some(plugin) = &self.plugin {
            fs::copy(plugin, dir.join("plugin.so")).context("cannot copy QEMU's plugin")?;
        }
        Ok((dir, lock))
    }

    pub(crate) fn qemu(&self, machines: &Machines, dir: &Path) -> Command {
        let mut root = Root::new(&machines.build_root)
            .bind_read_only(&machines.dom0, "/mnt/a")
            .bind(dir, "/mnt/b");
        // The build root has two more mount points for folders of disks.
        let mut places = ["/mnt/c", "/mnt/d"].into_iter();
        let sharing = match &self.cable {
            Some(cable) => {
                root = root.bind(&cable.folder, HostCable::PLACE);
                ",file.locking=off"
            }
            None => "",
        };
        let mut shown = |disk: &Path| {
            let place = places.next().unwrap_or_default();
            let name = disk.file_name().unwrap_or_default().to_string_lossy();
            let folder = disk.parent().unwrap_or(Path::new("/"));
            root = root.clone().bind(folder, place);
            format!("file={place}/{name},format=raw,cache=unsafe{sharing}")
        };
        let first = match &self.root {
            Some(root) => shown(root),
            None => "file=/mnt/a/dom0.img,format=raw,cache=unsafe,snapshot=on".into(),
        };
        let payload = "file=/mnt/b/payload.tar,format=raw,readonly=on".into();
        let mut disks = vec![first, payload];
        disks.extend(self.disks.iter().map(|disk| shown(disk)));
        let mut qemu = root.command("nice");
        let memory = match self.dom0 {
            Dom0::Pv | Dom0::Pvh => dom0_memory(machines.kernel) + GUESTS_MEMORY,
            Dom0::Bare => BARE_MEMORY,
        };
        // The clock of a machine runs while it waits for the host, and so do time limits (40 s of libxl for a script),
        // so it has priority over compilers. Counted time stands still then, so such a machine needs none.
        let class = if self.icount { "0" } else { "-15" };
        qemu.args(["-n", class, "qemu-system-x86_64"]);
        qemu.args([
            "-M",
            "q35",
            "-m",
            &memory.to_string(),
            "-smp",
            &self.smp.to_string(),
            "-display",
            "none",
            "-no-reboot",
        ]);
        match self.dom0 {
            Dom0::Pv | Dom0::Pvh => self.add_xen(&mut qemu, machines.kernel),
            Dom0::Bare => self.add_kernel(&mut qemu),
        }
        let behind = self.dom0.behind();
        if let Some(iommu) = self.dom0.iommu() {
            // Before the devices behind it.
            qemu.args(["-device", iommu]);
        }
        for (number, disk) in disks.iter().enumerate() {
            let drive = format!("if=none,id=disk{number},{disk}");
            let device = format!("virtio-blk-pci,drive=disk{number}{behind}");
            qemu.args(["-drive", &drive, "-device", &device]);
        }
        if let Some(HostCable { host, .. }) = &self.cable {
            let card = format!("{}{behind}", host.card());
            qemu.args(["-netdev", &host.network(), "-device", &card]);
        }
        if self.plugin.is_some() {
            let mut plugin = String::from("/mnt/b/plugin.so,out=/mnt/b/plugin.out");
            if !self.plugin_args.is_empty() {
                plugin = format!("{plugin},{}", self.plugin_args);
            }
            qemu.args(["-plugin", &plugin]);
        }
        qemu.args(["-device", &format!("virtio-serial-pci{behind}")]);
        qemu.args(["-device", "virtserialport,chardev=report,name=report"]);
        qemu
    }

    /// Adds the processors, Xen, and dom0's kernel.
    fn add_xen(&self, qemu: &mut Command, kernel: Dom0Kernel) {
        // rdrand: without it the hotplug scripts wait a minute for entropy.
        qemu.args(["-cpu", "qemu64,+svm,+npt,+rdrand,+rdseed"]);
        if self.icount {
            qemu.args([
                "-accel",
                "tcg,thread=single,tb-size=512",
                "-icount",
                "shift=0,sleep=off",
            ]);
        } else {
            // One thread for all processors never killed a guest (0 of 15), but is too slow for the tests. With threads
            // and two busy loops beside it QEMU 10.0.13 killed 1 PVH guest of 7 and 11.1.3 killed 4 of 15; without the
            // loops none of 7 (tests/trouble recognises such deaths).
            qemu.args(["-accel", "tcg,thread=multi,tb-size=512"]);
        }
        qemu.args([
            "-kernel",
            "/mnt/a/xen",
            "-append",
            &self.xen_command_line(kernel),
        ]);
        let dom0 = format!(
            "/mnt/a/vmlinuz {},/mnt/a/dom0.cpio",
            self.dom0_command_line()
        );
        qemu.args(["-initrd", &dom0]);
    }

    /// Adds the processors and the kernel of a machine without Xen.
    fn add_kernel(&self, qemu: &mut Command) {
        // Emulated as the others: what /dev/kvm offers in a virtual machine need not run a stock kernel. Ceph's daemons
        // have instructions that no processor of 64 bits lacked for ten years, but qemu64 does.
        qemu.args(["-cpu", "max", "-accel", "tcg,thread=multi,tb-size=512"]);
        qemu.args(["-kernel", "/mnt/a/vmlinuz", "-initrd", "/mnt/a/dom0.cpio"]);
        qemu.args(["-append", &self.dom0_command_line()]);
    }

    fn xen_command_line(&self, kernel: Dom0Kernel) -> String {
        // Xen's log must keep the output of one whole test, because grants are counted by printing them.
        let dom0 = dom0_memory(kernel);
        let mut line =
            format!("console=com1 com1=115200,8n1 conring_size=1M dom0_mem={dom0}M,max:{dom0}M");
        if self.icount {
            line.push_str(" bootscrub=off");
        }
        join(join(line, self.dom0.word()), &self.xen_args)
    }

    fn dom0_command_line(&self) -> String {
        let line = format!("{} root=/dev/vda", self.dom0.console());
        let line = join(line, if self.checks { CHECKS } else { "panic=-1" });
        let line = join(
            line,
            self.cable.as_ref().map_or("", |cable| cable.host.word()),
        );
        join(line, &self.dom0_args)
    }
}

fn join(line: String, more: &str) -> String {
    if more.is_empty() {
        line
    } else {
        format!("{line} {more}")
    }
}

/// Returns the lines of the child's standard output, as they arrive.
fn reader(child: &mut Child) -> Result<Receiver<String>> {
    let out = child
        .stdout
        .take()
        .context("the machine has no report channel")?;
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(out).split(b'\n') {
            // A read error and a receiver that went away both mean that the run is over; the exit status and the
            // console show the reason.
            let Ok(line) = line else { return };
            let text = String::from_utf8_lossy(&line)
                .trim_end_matches('\r')
                .to_string();
            if sender.send(text).is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_are_on_unless_told_otherwise() {
        let mut machine = Machine::new("x");
        assert!(machine.dom0_command_line().contains("panic_on_warn=1"));
        machine.checks = false;
        machine.dom0_args = "noblkback".into();
        assert_eq!(
            machine.dom0_command_line(),
            "console=hvc0 root=/dev/vda panic=-1 noblkback"
        );
    }

    #[test]
    fn splat_or_early_death_fails_a_run() {
        let console = std::env::temp_dir().join(format!("xtask-console-{}", std::process::id()));
        fs::write(&console, "").unwrap();
        let outcome = |splats: &[&str], end| RunOutcome {
            console: console.clone(),
            splats: splats.iter().map(ToString::to_string).collect(),
            end,
            _folder: None,
        };
        assert!(outcome(&[], MachineEnd::Orderly).verdict().is_ok());
        assert!(outcome(&["BUG: x"], MachineEnd::Orderly).verdict().is_err());
        assert!(outcome(&[], MachineEnd::Early).verdict().is_err());
        assert!(outcome(&[], MachineEnd::Killed(9)).verdict().is_err());
        let failed = outcome(&[], MachineEnd::Failed("signal: 9".into())).verdict();
        assert!(failed.unwrap_err().to_string().contains("signal: 9"));
        fs::remove_file(console).unwrap();
    }
}
