// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The life cycle of a guest, through xl.

use crate::console::{CommandResult, Console, GuestJob};
use crate::{sh, splat, xs};
use anyhow::{bail, Context, Result};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Folder of the tests' payload in dom0.
pub(crate) const PAYLOAD: &str = "/t/guest";
/// The initramfs there.
const INITRAMFS: &str = "guest.cpio.gz";
/// The kernel's command line. An error in a guest ends it, with its reason on the console.
pub(crate) const CMDLINE: &str = "console=hvc0 loglevel=5 panic=1 oops=panic panic_on_warn=1";
/// Folder of configurations, logs and saved guests.
pub(crate) const RUN_DIR: &str = "/run/vmtest";
/// A boot takes a few seconds; on a loaded host many times that.
const BOOT: Duration = Duration::from_secs(300);
/// The limit for a quick command of the guest.
pub(crate) const COMMAND: Duration = Duration::from_secs(120);
/// The limit for xl.
const XL: Duration = Duration::from_secs(90);

/// Virtualisation of a guest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum GuestKind {
    /// Paravirtualised.
    Pv,
    /// Hardware virtualised, without an emulated machine.
    Pvh,
    /// Hardware virtualised, with a machine that QEMU emulates and a BIOS in it.
    Hvm,
}

/// Source of the guest's kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Boot {
    /// xl reads it from the payload of the tests.
    Payload,
    /// Its first disk: pygrub reads it there in dom0, or the BIOS of an HVM guest does.
    Disk,
}

/// Configuration of a guest.
#[derive(Clone)]
pub(crate) struct Config {
    /// Its name, unique in the machine.
    pub(crate) name: String,
    /// Virtualisation of the guest.
    pub(crate) kind: GuestKind,
    /// Source of its kernel.
    pub(crate) boot: Boot,
    /// Virtual CPUs; the frontend asks for at most one queue for each.
    pub(crate) vcpus: u32,
    /// More words for the kernel's command line, such as `xen_blkfront.max_queues=2`.
    pub(crate) cmdline: String,
    /// Its memory, in MiB.
    pub(crate) memory: u32,
    /// Disks in xl's syntax.
    pub(crate) disks: Vec<String>,
    /// Whether it serves disks of other guests.
    pub(crate) is_driver_domain: bool,
    /// Frames of 256 entries in Xen's table of what it has mapped of other guests; Xen's default without a value.
    pub(crate) maptrack_frames: Option<u32>,
    /// Whether xl starts it again when it has rebooted or crashed.
    pub(crate) starts_again: bool,
    /// Socket of dom0 for QEMU's guest agent, whose program the guest then has.
    pub(crate) agent: Option<String>,
}

impl Config {
    /// A guest without disks.
    pub(crate) fn new(name: &str, kind: GuestKind, vcpus: u32) -> Config {
        Config {
            name: name.to_owned(),
            kind,
            boot: Boot::Payload,
            vcpus,
            cmdline: String::new(),
            memory: 384,
            disks: Vec::new(),
            is_driver_domain: false,
            maptrack_frames: None,
            starts_again: false,
            agent: None,
        }
    }

    /// Writes down the same guest with this name and these disks, as it is to be on another side; returns the file.
    pub(crate) fn written_with(&self, name: &str, disks: &[&str]) -> Result<String> {
        let there = Config {
            name: name.to_owned(),
            disks: disks.iter().map(|&disk| disk.to_owned()).collect(),
            ..self.clone()
        };
        let path = format!("{RUN_DIR}/{name}-there.cfg");
        std::fs::write(&path, there.text()).with_context(|| format!("cannot write {path}"))?;
        Ok(path)
    }

    fn text(&self) -> String {
        let kind = match self.kind {
            GuestKind::Pv => "pv",
            GuestKind::Pvh => "pvh",
            GuestKind::Hvm => "hvm",
        };
        let again = match self.starts_again {
            true => "restart",
            false => "destroy",
        };
        let disks = self
            .disks
            .iter()
            .map(|disk| format!("'{disk}'"))
            .collect::<Vec<_>>()
            .join(", ");
        let maptrack = self.maptrack_frames.map_or_else(String::new, |frames| {
            format!("max_maptrack_frames = {frames}\n")
        });
        let channel = self.agent.as_ref().map_or_else(String::new, |path| {
            format!("channel = ['name=org.qemu.guest_agent.0,connection=socket,path={path}']\n")
        });
        format!(
            "{maptrack}{channel}name = '{}'\ntype = '{kind}'\n{}memory = {}\nvcpus = {}\n\
             on_poweroff = 'destroy'\non_reboot = '{again}'\non_crash = '{again}'\ndisk = [{disks}]\nvif = []\n\
             tsc_mode = 'native'\ndriver_domain = {}\n",
            self.name, self.boot_text(), self.memory, self.vcpus, u8::from(self.is_driver_domain)
        )
    }

    fn boot_text(&self) -> String {
        match (self.boot, self.kind) {
            (Boot::Payload, kind) => format!(
                "{}kernel = '{PAYLOAD}/vmlinuz'\nramdisk = '{}'\nextra = '{CMDLINE} {}'\n",
                match kind {
                    GuestKind::Hvm => "vga = 'none'\n",
                    GuestKind::Pv | GuestKind::Pvh => "",
                },
                self.ramdisk().display(),
                self.cmdline
            ),
            // The BIOS reads an IDE disk sector by sector: minutes in emulation, for a kernel.
            (Boot::Disk, GuestKind::Hvm) => format!(
                "hdtype = 'ahci'\nvga = 'none'\nserial = 'file:{}'\n",
                serial_path(&self.name).display()
            ),
            (Boot::Disk, _) => "bootloader = 'pygrub'\n".to_owned(),
        }
    }

    /// Returns the path of its initramfs.
    fn ramdisk(&self) -> PathBuf {
        match self.agent {
            None => Path::new(PAYLOAD).join(INITRAMFS),
            Some(_) => Path::new(RUN_DIR).join(format!("{}.cpio.gz", self.name)),
        }
    }

    /// Makes the initramfs, if the guest has more programs than others. The kernel unpacks one archive after the other.
    fn make_ramdisk(&self) -> Result<()> {
        let archives = match self.agent {
            None => return Ok(()),
            Some(_) => [INITRAMFS, "qemu-ga.cpio.gz"],
        };
        let mut all = Vec::new();
        for name in archives {
            let path = Path::new(PAYLOAD).join(name);
            let archive = std::fs::read(&path);
            all.extend(archive.with_context(|| format!("cannot read {}", path.display()))?);
        }
        let path = self.ramdisk();
        std::fs::write(&path, all).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Removes an initramfs that was made, which is in memory, when xl has read it.
    fn remove_ramdisk(&self) -> Result<()> {
        let path = self.ramdisk();
        match self.agent {
            None => Ok(()),
            Some(_) => std::fs::remove_file(&path)
                .with_context(|| format!("cannot remove {}", path.display())),
        }
    }
}

/// Trouble in the logs of guests that have ended.
static TROUBLE: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn keep(signs: Vec<String>) {
    let mut all = TROUBLE.lock().unwrap_or_else(PoisonError::into_inner);
    all.extend(signs);
}

/// Trouble in the guests that ended since the last call.
pub(crate) fn take_trouble() -> Vec<String> {
    std::mem::take(&mut TROUBLE.lock().unwrap_or_else(PoisonError::into_inner))
}

/// The number of the domain that was made last, of those that exist.
pub(crate) fn newest_domain() -> Result<u32> {
    let names = xs::list("/local/domain")?;
    let numbers = names.iter().filter_map(|name| name.parse().ok());
    Ok(numbers.max().unwrap_or(0))
}

/// A running guest. Dropping it destroys the domain.
pub(crate) struct Guest {
    /// Configuration of the guest.
    pub(crate) config: Config,
    /// Its domain number.
    pub(crate) domid: u32,
    /// Its console.
    pub(crate) console: Console,
    alive: bool,
}

impl Guest {
    /// Creates the domain and waits for its agent.
    pub(crate) fn create(config: Config) -> Result<Guest> {
        std::fs::create_dir_all(RUN_DIR).context("cannot create the directory for guests")?;
        for file in ["vmlinuz", INITRAMFS] {
            if !Path::new(PAYLOAD).join(file).exists() {
                bail!("{PAYLOAD}/{file} is missing: put it into the payload of the machine");
            }
        }
        let path = format!("{RUN_DIR}/{}.cfg", config.name);
        std::fs::write(&path, config.text()).with_context(|| format!("cannot write {path}"))?;
        config.make_ramdisk()?;
        let created = sh::run_for(&["xl", "create", &path], XL);
        config.remove_ramdisk()?;
        created?;
        Guest::connect(config, 1)
    }

    /// Talks to a domain that was just created or restored.
    fn connect(config: Config, first_job: u64) -> Result<Guest> {
        let domid: u32 = sh::run(&["xl", "domid", &config.name])?
            .trim()
            .parse()
            .context("`xl domid` printed no number")?;
        let key = format!("/local/domain/{domid}/console/tty");
        let mut tty = None;
        sh::wait_for("the console of the guest", Duration::from_secs(20), || {
            tty = xs::read(&key)?.filter(|path| !path.is_empty());
            Ok(tty.is_some())
        })?;
        let log = log_path(&config.name);
        let opened = Console::open(&tty.unwrap_or_default(), &log, first_job);
        let console = match opened {
            Ok(console) => console,
            Err(error) => {
                sh::run_for(&["xl", "destroy", &config.name], XL)
                    .context("the guest has no console and cannot be destroyed")?;
                return Err(error);
            }
        };
        let guest = Guest {
            config,
            domid,
            console,
            alive: true,
        };
        guest
            .console
            .wait_agent(BOOT)
            .with_context(|| guest.processors())?;
        Ok(guest)
    }

    /// Returns the state of the guest's processors, twice: halted, or the running code.
    fn processors(&self) -> String {
        let look = format!(
            "xl vcpu-list {0} | tail -n +2; /usr/lib/xen-*/bin/xenctx {0} | head -n 8",
            self.domid
        );
        let text = sh::shell(&format!("{look}; {look}"))
            .unwrap_or_else(|error| format!("they cannot be looked at: {error:#}"));
        format!("the guest's processors: {}", sh::tail(&text, 2000))
    }

    /// Runs a command that must succeed and returns its output.
    pub(crate) fn run(&self, command: &str) -> Result<String> {
        self.run_for(command, COMMAND)
    }

    /// Runs a command that must succeed, with a time limit of the caller.
    pub(crate) fn run_for(&self, command: &str, limit: Duration) -> Result<String> {
        let done = self.status_for(command, limit)?;
        if done.rc != 0 {
            bail!(
                "`{command}` in guest {} failed with status {}: {}",
                self.config.name,
                done.rc,
                sh::tail(&done.text, 600)
            );
        }
        Ok(done.text)
    }

    /// Runs a command, whatever its status.
    pub(crate) fn status(&self, command: &str) -> Result<CommandResult> {
        self.status_for(command, COMMAND)
    }

    /// Runs a command, with a time limit of the caller.
    pub(crate) fn status_for(&self, command: &str, limit: Duration) -> Result<CommandResult> {
        let job = self.console.start(command)?;
        self.console.wait(job, limit)
    }

    /// Starts a command that runs beside others.
    pub(crate) fn start(&self, command: &str) -> Result<GuestJob> {
        self.console.start(command)
    }

    /// Waits for a command that was started.
    pub(crate) fn wait(&self, job: GuestJob, limit: Duration) -> Result<CommandResult> {
        self.console.wait(job, limit)
    }

    /// Attaches a disk (`phy:/dev/nullb0,xvda,w`) and waits until the guest has it.
    pub(crate) fn attach(&self, disk: &str) -> Result<AttachedVbd> {
        sh::run_for(&["xl", "block-attach", &self.domid.to_string(), disk], XL)?;
        let vbd = AttachedVbd::of(self.domid, disk)?;
        self.wait_disk(&vbd.vdev)?;
        Ok(vbd)
    }

    /// Waits until the guest has a disk.
    pub(crate) fn wait_disk(&self, vdev: &str) -> Result<()> {
        self.run(&format!("n=0; while [ ! -b /dev/{0} ]; do n=$((n+1)); [ $n -le 300 ] || {{ echo /dev/{0} did not appear; exit 1; }}; usleep 50000; done", vdev)).map(drop)
    }

    /// Detaches a disk in the orderly way and waits until nothing of it is left.
    pub(crate) fn detach(&self, vbd: &AttachedVbd) -> Result<()> {
        sh::run_for(
            &["xl", "block-detach", &self.domid.to_string(), &vbd.vdev],
            XL,
        )?;
        vbd.wait_gone()
    }

    /// Returns the number of the domain's disks in xenstore.
    pub(crate) fn disks(&self) -> Result<usize> {
        Ok(xs::list(&format!("/local/domain/{}/device/vbd", self.domid))?.len())
    }

    /// Takes every disk away after a failed case; an error when the guest cannot be used any more.
    pub(crate) fn clean(&self) -> Result<()> {
        let text = self.run("killall fio >/dev/null 2>&1; umount /mnt >/dev/null 2>&1; cat /proc/sys/kernel/tainted")?;
        let tainted: u64 = text
            .trim()
            .parse()
            .context("the guest's taint is no number")?;
        // Bit 7: the kernel died; bit 9: it warned.
        if tainted & (1 << 7 | 1 << 9) != 0 {
            bail!("guest {} has had a kernel problem", self.config.name);
        }
        let id = self.domid.to_string();
        for devid in xs::list(&format!("/local/domain/{id}/device/vbd"))? {
            sh::run_for(&["xl", "block-detach", &id, &devid, "--force"], XL)?;
        }
        sh::wait_for(
            "the end of the guest's disks",
            Duration::from_secs(20),
            || Ok(self.disks()? == 0),
        )
    }

    /// Returns signs of trouble in the console's output since the last call.
    fn console_trouble(&self) -> Vec<String> {
        let lines = self.console.take_kernel_lines();
        self.signs(&lines.join("\n"))
    }

    fn signs(&self, text: &str) -> Vec<String> {
        splat::in_kernel(&format!("guest {}", self.config.name), text.lines())
    }

    /// Signs of trouble in the guest's log since the last look; an error if the agent is silent.
    fn log_trouble(&self) -> Result<Vec<String>> {
        let text = self.run_for("dmesg -c", COMMAND);
        let text = text.with_context(|| format!("guest {} does not answer", self.config.name))?;
        Ok(self.signs(&text))
    }

    /// Returns signs of trouble in the guest's kernel log since the last call, and whether the guest answers.
    pub(crate) fn trouble(&self) -> (Vec<String>, Result<()>) {
        let (mut signs, mut answers) = (self.console_trouble(), Ok(()));
        match self.log_trouble() {
            Ok(more) => signs.extend(more),
            Err(error) => answers = Err(error),
        }
        (signs, answers)
    }

    /// Returns true if the domain still exists.
    fn is_there(&self) -> Result<bool> {
        let name = xs::read(&format!("/local/domain/{}/name", self.domid))?;
        Ok(name.is_some() && !self.console.is_closed())
    }

    /// Destroys the domain and waits until the hypervisor has released it. The messages of its kernel are judged with
    /// the case.
    pub(crate) fn destroy(mut self) -> Result<()> {
        let answers = match self.is_there()? {
            true => self.log_trouble(),
            false => Ok(Vec::new()),
        };
        match answers {
            Ok(signs) => keep(signs),
            // The guest may have ended in between; an existing guest must answer.
            Err(error) if self.is_there()? => return Err(error),
            Err(_) => (),
        }
        self.end()
    }

    /// Destroys a domain that may not answer.
    pub(crate) fn give_up(mut self) -> Result<()> {
        self.end()
    }

    /// Keeps the console's output for the verdict on the case.
    fn keep_trouble(&self) {
        keep(self.console_trouble());
    }

    fn end(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.alive) {
            return Ok(());
        }
        let ended = self.end_domain();
        // The console's last words come before it closes.
        self.keep_trouble();
        ended
    }

    fn end_domain(&self) -> Result<()> {
        let id = self.domid.to_string();
        if sh::status(&["xl", "list", &id], XL)?.rc == 0 {
            sh::run_for(&["xl", "destroy", &id], XL)?;
        }
        self.wait_gone(Duration::from_secs(60))
    }

    /// Waits until the hypervisor has released the domain.
    pub(crate) fn wait_gone(&self, limit: Duration) -> Result<()> {
        let id = self.domid.to_string();
        sh::wait_for(&format!("the end of domain {id}"), limit, || {
            Ok(sh::status(&["xl", "list", &id], XL)?.rc != 0)
        })
    }

    /// Saves the guest to a file; the domain is gone afterwards.
    pub(crate) fn save(mut self, path: &str) -> Result<SavedGuest> {
        sh::run_for(
            &["xl", "save", &self.domid.to_string(), path],
            Duration::from_secs(240),
        )?;
        self.keep_trouble();
        self.alive = false;
        Ok(SavedGuest {
            config: self.config.clone(),
            path: path.to_owned(),
            next_job: self.console.next_job(),
        })
    }

    /// Gives up the handle of a guest that has left this host; returns its configuration, and the number of its next
    /// command.
    pub(crate) fn left(mut self) -> (Config, u64) {
        self.keep_trouble();
        self.alive = false;
        (self.config.clone(), self.console.next_job())
    }

    /// Finds a guest that has come from another host; `jobs` are commands that run.
    pub(crate) fn arrived(config: Config, next_job: u64, jobs: &[GuestJob]) -> Result<Guest> {
        let guest = Guest::connect(config, next_job)?;
        jobs.iter().for_each(|&job| guest.console.adopt(job));
        Ok(guest)
    }

    /// Moves the guest to another domain of this host, as to another host; `jobs` are commands that run.
    pub(crate) fn migrate(self, jobs: &[GuestJob]) -> Result<Guest> {
        self.migrate_with(&[], jobs)
    }

    /// Moves the guest to another domain that has these disks.
    pub(crate) fn migrate_to(self, disks: &[&str], jobs: &[GuestJob]) -> Result<Guest> {
        let path = self.config.written_with(&self.config.name, disks)?;
        self.migrate_with(&["-C", &path], jobs)
    }

    fn migrate_with(self, options: &[&str], jobs: &[GuestJob]) -> Result<Guest> {
        let id = self.domid.to_string();
        let there = ["-s", "", &id, "xl migrate-receive"];
        let command = [&["xl", "migrate"], options, &there].concat();
        sh::run_for(&command, Duration::from_secs(240))?;
        let (config, next_job) = self.left();
        Guest::arrived(config, next_job, jobs)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("vmtest: guest {}: {error:#}", self.config.name);
        }
    }
}

/// A guest in a file.
pub(crate) struct SavedGuest {
    config: Config,
    path: String,
    next_job: u64,
}

impl SavedGuest {
    /// Brings the guest back; `jobs` are commands that were running when it was saved.
    pub(crate) fn restore(self, jobs: &[GuestJob]) -> Result<Guest> {
        sh::run_for(&["xl", "restore", &self.path], Duration::from_secs(240))?;
        Guest::arrived(self.config, self.next_job, jobs)
    }
}

/// The file that keeps everything a guest of this name printed.
pub(crate) fn log_path(name: &str) -> PathBuf {
    Path::new(RUN_DIR).join(format!("{name}.log"))
}

/// Returns the file with the output of an HVM guest before it had its console.
pub(crate) fn serial_path(name: &str) -> PathBuf {
    Path::new(RUN_DIR).join(format!("{name}.serial"))
}

/// Types of backends in xenstore whose frontend is a disk: `vbd3` is that of `backendtype=tap`.
pub(crate) const KINDS: [&str; 2] = ["vbd", "vbd3"];

/// An attached disk.
pub(crate) struct AttachedVbd {
    /// The guest's name of the disk.
    pub(crate) vdev: String,
    /// The backend's directory in xenstore.
    pub(crate) backend: String,
    /// The frontend's directory in xenstore.
    pub(crate) frontend: String,
    /// The backend's name on its bus.
    name: String,
}

impl AttachedVbd {
    /// Finds the disk that xl made from a specification, with its backend in dom0.
    pub(crate) fn of(domid: u32, disk: &str) -> Result<AttachedVbd> {
        AttachedVbd::of_backend(0, domid, disk)
    }

    /// Finds the disk with its backend in the domain `back`.
    pub(crate) fn of_backend(back: u32, domid: u32, disk: &str) -> Result<AttachedVbd> {
        let vdev = disk.split(',').find_map(|part| {
            part.trim()
                .strip_prefix("vdev=")
                .or(part.trim().starts_with("xvd").then(|| part.trim()))
        });
        let vdev = vdev
            .with_context(|| format!("`{disk}` names no xvd device"))?
            .to_owned();
        for kind in KINDS {
            let base = format!("/local/domain/{back}/backend/{kind}/{domid}");
            for devid in xs::list(&base)? {
                if xs::read(&format!("{base}/{devid}/dev"))?.as_deref() == Some(&vdev) {
                    let frontend = format!("/local/domain/{domid}/device/vbd/{devid}");
                    return Ok(AttachedVbd {
                        vdev,
                        backend: format!("{base}/{devid}"),
                        frontend,
                        name: format!("{kind}-{domid}-{devid}"),
                    });
                }
            }
        }
        bail!("xenstore has no disk {vdev} of domain {domid} among the backends {KINDS:?}")
    }

    /// The backend's device in sysfs.
    pub(crate) fn sysfs(&self) -> PathBuf {
        Path::new("/sys/bus/xen-backend/devices").join(&self.name)
    }

    /// The name of the driver that serves the disk.
    pub(crate) fn driver(&self) -> Result<String> {
        let link = self.sysfs().join("driver");
        let target = std::fs::read_link(&link)
            .with_context(|| format!("no driver serves {}", self.backend))?;
        Ok(target
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned())
    }

    /// Describes the disk for a message: the state of both ends and the backend's counters.
    pub(crate) fn describe(&self) -> String {
        let state = |dir: &str| match xs::read(&format!("{dir}/state")) {
            Ok(state) => state.unwrap_or_else(|| "none".into()),
            Err(error) => format!("{error:#}"),
        };
        let mut text = format!(
            "{}: state {}, its frontend's {}",
            self.vdev,
            state(&self.backend),
            state(&self.frontend)
        );
        for name in ["rd_req", "rd_done", "wr_req", "wr_done", "f_req", "f_done"] {
            match self.statistic(name) {
                Ok(number) => text += &format!(", {name} {number}"),
                Err(error) => return format!("{text}, {error:#}"),
            }
        }
        text
    }

    /// A number of the backend's statistics.
    pub(crate) fn statistic(&self, name: &str) -> Result<u64> {
        self.number(&format!("statistics/{name}"))
    }

    /// A number in the backend's directory of sysfs.
    pub(crate) fn number(&self, file: &str) -> Result<u64> {
        let text = sh::get(self.sysfs().join(file))?;
        text.parse()
            .with_context(|| format!("{file} is `{text}`, not a number"))
    }

    /// Waits until neither sysfs nor xenstore knows the disk.
    pub(crate) fn wait_gone(&self) -> Result<()> {
        sh::wait_for(
            &format!("the removal of {}", self.backend),
            Duration::from_secs(30),
            || Ok(!self.sysfs().exists() && xs::read(&format!("{}/state", self.backend))?.is_none()),
        )
    }
}
