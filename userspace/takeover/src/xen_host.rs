// SPDX-License-Identifier: MIT OR Apache-2.0
//! The running host: sysfs, xenstore, xl, and the devices of Xen.

use crate::modules;
use rustix::fs::{flock, FlockOperation};
use std::cell::{Cell, RefCell};
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};
use takeover::rings::{Grants, RingHead};
use takeover::{BackendDriver, BegunAttempt, BusDevice, Host, Modules, OfferedLimits};
use xenstore_rs::unix::XsUnix;
use xenstore_rs::Xs;

/// The bus of backends.
const BUS: &str = "/sys/bus/xen-backend";
/// Where what has begun is remembered, until the next boot.
const FOLDER: &str = "/run/xen-blkback-rs";
/// Pages that guests have granted.
const GRANTS: &str = "/dev/xen/gntdev";
/// Nodes of tap disks, and what their supervisor writes down.
const NODES: &str = "/dev/xentap";
const DISKS: &str = "/run/xentap/disks";
/// Time for a driver to let go of a disk, of which nothing is under way.
const LET_GO: Duration = Duration::from_secs(10);

/// The host on which this runs.
pub(crate) struct XenHost {
    store: XsUnix,
    grants: RefCell<Option<Grants>>,
    begun: PathBuf,
    /// A copy of the module that was loaded before the installed one was.
    copy: PathBuf,
    signals: OwnedFd,
    interrupted: Cell<bool>,
    start: Instant,
    /// Held so that no other process does this at the same time.
    _lock: File,
}

impl XenHost {
    /// The host; a signal that would end this program only says that it is to end from now on.
    pub(crate) fn new() -> io::Result<XenHost> {
        let named = |what: &'static str| {
            move |error: io::Error| io::Error::new(error.kind(), format!("{what}: {error}"))
        };
        let signals = diskio::signals(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP])?;
        fs::create_dir_all(FOLDER).map_err(named(FOLDER))?;
        let lock = File::create(Path::new(FOLDER).join("takeover.lock")).map_err(named(FOLDER))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            io::Error::other("another takeover is under way: wait until it is over")
        })?;
        Ok(XenHost {
            store: XsUnix::new().map_err(named("xenstore"))?,
            grants: RefCell::default(),
            begun: Path::new(FOLDER).join("takeover.json"),
            copy: Path::new(FOLDER).join("loaded.ko"),
            signals,
            interrupted: Cell::new(false),
            start: Instant::now(),
            _lock: lock,
        })
    }

    fn put(&self, driver: BackendDriver, file: &str, device: &BusDevice) -> io::Result<()> {
        let path = format!("{BUS}/drivers/{}/{file}", driver.bus_name());
        let name = device.name.clone();
        let (done, result) = mpsc::channel();
        // The write waits for the lock of the device, which another process may hold for long.
        thread::spawn(move || {
            // The receiver is gone if the write took too long.
            let _ = done.send(fs::write(path, name));
        });
        result.recv_timeout(LET_GO).unwrap_or_else(|_| {
            Err(io::Error::new(
                ErrorKind::TimedOut,
                format!("{file} has not ended in {LET_GO:?}, and may end later"),
            ))
        })
    }
}

/// Whether there is a node, or the record of a disk, which has no node while it is parked.
fn has_tap_disks() -> io::Result<bool> {
    for folder in [NODES, DISKS] {
        let Some(entries) = or_none(fs::read_dir(folder))? else {
            continue;
        };
        for entry in entries {
            if entry?.file_name() != "control" {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// That there is no such thing is no error.
fn or_none<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn run(program: &str, arguments: &[&str]) -> io::Result<()> {
    output(program, arguments).map(drop)
}

/// Runs a program, and returns what it prints.
pub(crate) fn output(program: &str, arguments: &[&str]) -> io::Result<String> {
    let mut command = Command::new(program);
    // A key that is pressed to end us must not end it.
    command.args(arguments).process_group(0);
    let output = command.output();
    let output =
        output.map_err(|error| io::Error::new(error.kind(), format!("{program}: {error}")))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(io::Error::other(format!(
            "{program} {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        ))),
    }
}

impl Host for XenHost {
    fn devices(&self) -> io::Result<Vec<(BusDevice, Option<BackendDriver>)>> {
        let mut all = Vec::new();
        let Some(entries) = or_none(fs::read_dir(Path::new(BUS).join("devices")))? else {
            return Ok(all);
        };
        for entry in entries {
            if let Some(device) = BusDevice::named(&entry?.file_name().to_string_lossy()) {
                let driver = self.driver(&device)?;
                all.push((device, driver));
            }
        }
        Ok(all)
    }

    fn driver(&self, device: &BusDevice) -> io::Result<Option<BackendDriver>> {
        let link = format!("{BUS}/devices/{}/driver", device.name);
        let name = or_none(fs::read_link(link))?;
        let name = name.as_deref().and_then(Path::file_name);
        let is_its = |driver: &BackendDriver| name.is_some_and(|name| name == driver.bus_name());
        Ok(BackendDriver::ALL.into_iter().find(is_its))
    }

    fn read(&self, key: &str) -> io::Result<Option<String>> {
        Ok(or_none(self.store.read(key))?.map(String::from))
    }

    fn write(&self, key: &str, value: &str) -> io::Result<()> {
        self.store.write(key, value)
    }

    fn renew(&self, device: &BusDevice) -> io::Result<bool> {
        let is_going = || {
            let online = self.read(&device.back("online"))?;
            Ok::<_, io::Error>(online.is_some_and(|online| online.trim() == "0"))
        };
        if is_going()? {
            return Ok(false);
        }
        let state = device.back("state");
        // None that a backend has by itself. With 1 a driver would take the device for one that has gone.
        self.write(&state, "3")?;
        let is_going = is_going()?;
        if is_going {
            // This restores the state that the toolstack wrote in between.
            self.write(&state, "5")?;
        }
        Ok(!is_going)
    }

    fn load(&self, driver: BackendDriver) -> io::Result<()> {
        // A module that was loaded from a file is unknown to modprobe.
        if modules::is_loaded(driver)? {
            return Ok(());
        }
        // The settings of this package put one driver in the place of the other.
        let loaded = run("modprobe", &["--ignore-install", driver.module()]);
        loaded.map_err(modules::explained)
    }

    fn unload(&self, driver: BackendDriver) -> io::Result<()> {
        run("rmmod", &[driver.module()])
    }

    fn is_loaded(&self, driver: BackendDriver) -> io::Result<bool> {
        modules::is_loaded(driver)
    }

    fn modules(&self) -> io::Result<Modules> {
        modules::compare(&self.copy)
    }

    fn has_other_copy(&self) -> bool {
        modules::is_another(&self.copy)
    }

    fn load_back(&self) -> io::Result<()> {
        let installed = modules::installed()?;
        let mut arguments = vec![self.copy.to_string_lossy().into_owned()];
        arguments.extend(installed.parameters);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        run("insmod", &arguments).map_err(modules::explained)
    }

    fn set_autoprobe(&self, is_on: bool) -> io::Result<()> {
        let path = format!("{BUS}/drivers_autoprobe");
        let set = fs::write(&path, if is_on { "1" } else { "0" });
        set.map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))
    }

    fn ask_supervisor(&self) -> io::Result<()> {
        match has_tap_disks()? {
            true => run("tap-ctl", &["list"]),
            false => Ok(()),
        }
    }

    fn park(&self) -> io::Result<()> {
        match has_tap_disks()? {
            true => run("tap-ctl", &["park"]),
            false => Ok(()),
        }
    }

    fn unpark(&self) -> io::Result<()> {
        match has_tap_disks()? {
            true => run("tap-ctl", &["unpark"]),
            false => Ok(()),
        }
    }

    fn limits(&self, driver: BackendDriver) -> OfferedLimits {
        let folder = format!(
            "/sys/module/{}/parameters",
            driver.module().replace('-', "_")
        );
        let number = |name: &str| {
            let text = fs::read_to_string(Path::new(&folder).join(name)).ok()?;
            text.trim().parse().ok()
        };
        OfferedLimits {
            queues: number("max_queues").filter(|queues| *queues > 0),
            ring_order: number("max_ring_page_order"),
            segments: number("max_indirect_segments"),
        }
    }

    fn pause(&self, domid: u16) -> io::Result<()> {
        run("xl", &["pause", &domid.to_string()])
    }

    fn unpause(&self, domid: u16) -> io::Result<()> {
        run("xl", &["unpause", &domid.to_string()])
    }

    fn ring(&self, domid: u16, reference: u32) -> io::Result<RingHead> {
        let mut grants = self.grants.borrow_mut();
        if grants.is_none() {
            run("modprobe", &["xen-gntdev"])?;
            let opened = Grants::open(Path::new(GRANTS));
            *grants = Some(
                opened
                    .map_err(|error| io::Error::new(error.kind(), format!("{GRANTS}: {error}")))?,
            );
        }
        let opened = grants.as_ref().ok_or(ErrorKind::NotFound)?;
        opened.head(domid, reference)
    }

    fn unbind(&self, driver: BackendDriver, device: &BusDevice) -> io::Result<()> {
        self.put(driver, "unbind", device)
    }

    fn bind(&self, driver: BackendDriver, device: &BusDevice) -> io::Result<()> {
        self.put(driver, "bind", device)
    }

    fn remember(&self, begun: Option<&BegunAttempt>) -> io::Result<()> {
        let Some(begun) = begun else {
            return or_none(fs::remove_file(&self.begun)).map(drop);
        };
        let part = self.begun.with_extension("new");
        fs::write(&part, serde_json::to_vec(begun)?)?;
        fs::rename(part, &self.begun)
    }

    fn remembered(&self) -> io::Result<Option<BegunAttempt>> {
        let Some(bytes) = or_none(fs::read(&self.begun))? else {
            return Ok(None);
        };
        serde_json::from_slice(&bytes).map(Some).map_err(|error| {
            io::Error::other(format!(
                "{} cannot be understood ({error}): see to the guest it names, and remove it",
                self.begun.display()
            ))
        })
    }

    fn sleep(&self, time: Duration) {
        thread::sleep(time);
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn is_interrupted(&self) -> bool {
        use rustix::event::{poll, PollFd, PollFlags, Timespec};
        let mut asked = [PollFd::new(&self.signals, PollFlags::IN)];
        let at_once = Timespec::default();
        let came = poll(&mut asked, Some(&at_once)).is_ok_and(|count| count > 0);
        self.interrupted.set(self.interrupted.get() || came);
        self.interrupted.get()
    }
}
