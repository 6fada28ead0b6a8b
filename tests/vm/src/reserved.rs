// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Storage with persistent reservations, which this machine reaches as two hosts do: one medium behind a target of the
//! kernel's own, and two disks that are two initiators to it.

use crate::backing::NullBlk;
use crate::sh;
use anyhow::{bail, ensure, Context, Result};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

const SCSI: &str = "/sys/kernel/config/target";
const NVME: &str = "/sys/kernel/config/nvmet";
const APPEARS: Duration = Duration::from_secs(30);
static NEXT: AtomicU32 = AtomicU32::new(1);

/// A storage, and how it is taken down again.
pub(crate) struct Reserved {
    /// The two disks.
    pub(crate) disks: [String; 2],
    /// The device behind both.
    pub(crate) medium: NullBlk,
    undo: Vec<Undo>,
}

enum Undo {
    Remove(PathBuf),
    Unlink(PathBuf),
    Write(PathBuf, &'static str),
}

/// Objects that were made, and their clean-up if a later step fails.
#[derive(Default)]
struct Making(Vec<Undo>);

impl Making {
    fn folder(&mut self, path: impl Into<PathBuf>) -> Result<PathBuf> {
        let path = path.into();
        fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        self.0.push(Undo::Remove(path.clone()));
        Ok(path)
    }

    fn link(&mut self, to: &Path, path: PathBuf) -> Result<()> {
        symlink(to, &path).with_context(|| format!("cannot link {}", path.display()))?;
        self.0.push(Undo::Unlink(path));
        Ok(())
    }
}

fn undo(done: Vec<Undo>) -> Result<()> {
    for step in done.into_iter().rev() {
        match step {
            Undo::Remove(path) => fs::remove_dir(&path)
                .with_context(|| format!("cannot remove {}", path.display()))?,
            Undo::Unlink(path) => fs::remove_file(&path)
                .with_context(|| format!("cannot unlink {}", path.display()))?,
            Undo::Write(path, value) => sh::put(path, value)?,
        }
    }
    Ok(())
}

impl Reserved {
    /// Makes a SCSI disk of `mib` MiB, with the kernel's target and its loopback: two targets, each with an initiator.
    pub(crate) fn scsi(mib: u32) -> Result<Reserved> {
        Self::make(mib, scsi)
    }

    /// Makes an NVMe namespace of `mib` MiB, with the kernel's target and its loopback: two hosts.
    pub(crate) fn nvme(mib: u32) -> Result<Reserved> {
        Self::make(mib, nvme)
    }

    fn make(
        mib: u32,
        how: impl Fn(&NullBlk, &mut Making) -> Result<[String; 2]>,
    ) -> Result<Reserved> {
        let medium = NullBlk::create(mib, &[])?;
        let mut made = Making::default();
        match how(&medium, &mut made) {
            Ok(disks) => Ok(Reserved {
                disks,
                medium,
                undo: made.0,
            }),
            Err(error) => {
                undo(made.0)?;
                medium.remove()?;
                Err(error)
            }
        }
    }

    /// Takes it down.
    pub(crate) fn remove(self) -> Result<()> {
        undo(self.undo)?;
        self.medium.remove()
    }
}

fn scsi(medium: &NullBlk, made: &mut Making) -> Result<[String; 2]> {
    for module in [
        "target_core_mod",
        "target_core_iblock",
        "tcm_loop",
        "sd_mod",
    ] {
        sh::modprobe(module, &[])?;
    }
    // Folder for the target's list of registrations; without it the target refuses each registration.
    let root = sh::get(format!("{SCSI}/dbroot"))?;
    fs::create_dir_all(format!("{root}/pr")).context("cannot make the target's folder")?;
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let adapter = made.folder(format!("{SCSI}/core/iblock_{number}"))?;
    let store = made.folder(adapter.join("vmtest"))?;
    sh::put(
        store.join("control"),
        &format!("udev_path={}", medium.path()),
    )?;
    sh::put(store.join("enable"), "1")?;
    sh::put(
        store.join("wwn/vpd_unit_serial"),
        &format!("vmtest{number}"),
    )?;
    let fabric = Path::new(SCSI).join("loopback");
    if !fabric.exists() {
        made.folder(&fabric)?;
    }
    let first = loopback(&store, number, 1, made)?;
    let second = loopback(&store, number, 2, made)?;
    Ok([first, second])
}

/// A target with an initiator of its own; the disk that the initiator finds.
fn loopback(store: &Path, number: u32, which: u32, made: &mut Making) -> Result<String> {
    let fabric = Path::new(SCSI).join("loopback");
    let target = made.folder(fabric.join(format!("naa.5001405{which:01x}{number:08x}")))?;
    let group = made.folder(target.join("tpgt_1"))?;
    sh::put(
        group.join("nexus"),
        &format!("naa.6001405{which:01x}{number:08x}"),
    )?;
    made.0.push(Undo::Write(group.join("nexus"), "NULL"));
    let unit = made.folder(group.join("lun/lun_0"))?;
    made.link(store, unit.join("vmtest"))?;
    // HOST:CHANNEL:TARGET
    let address = sh::get(group.join("address"))?;
    let folder = format!("/sys/class/scsi_device/{address}:0/device/block");
    let mut disk = None;
    sh::wait_for("a SCSI disk of the target", APPEARS, || {
        disk = only_entry(&folder)?.filter(|disk| is_there(disk));
        Ok(disk.is_some())
    })?;
    disk.context("no disk")
}

/// A node appears a moment before it can be opened.
fn is_there(device: &str) -> bool {
    fs::File::open(device).is_ok()
}

/// Returns `/dev/` and the name of the only entry in a folder of sysfs.
fn only_entry(folder: &str) -> Result<Option<String>> {
    if !Path::new(folder).exists() {
        return Ok(None);
    }
    let entry = fs::read_dir(folder)?.next().transpose()?;
    Ok(entry.map(|entry| format!("/dev/{}", entry.file_name().to_string_lossy())))
}

fn nvme(medium: &NullBlk, made: &mut Making) -> Result<[String; 2]> {
    // Otherwise both hosts would be two paths of one disk.
    sh::modprobe("nvme-core", &["multipath=N"])?;
    let joins = sh::get("/sys/module/nvme_core/parameters/multipath")?;
    ensure!(joins == "N", "nvme_core was loaded before, and joins paths");
    sh::modprobe("nvmet", &[])?;
    sh::modprobe("nvme-loop", &[])?;
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("vmtest{number}");
    let system = made.folder(format!("{NVME}/subsystems/{name}"))?;
    sh::put(system.join("attr_allow_any_host"), "1")?;
    let space = made.folder(system.join("namespaces/1"))?;
    sh::put(space.join("device_path"), &medium.path())?;
    sh::put(space.join("resv_enable"), "1")?;
    sh::put(space.join("enable"), "1")?;
    made.0.push(Undo::Write(space.join("enable"), "0"));
    let port = made.folder(format!("{NVME}/ports/{number}"))?;
    sh::put(port.join("addr_trtype"), "loop")?;
    made.link(&system, port.join("subsystems").join(&name))?;
    let first = host(&name, 1, made)?;
    let second = host(&name, 2, made)?;
    Ok([first, second])
}

/// Connects as a host of its own; the disk that it finds.
fn host(name: &str, which: u32, made: &mut Making) -> Result<String> {
    use std::io::{Read, Write};
    let id = format!("00000000-0000-4000-8000-00000000000{which}");
    let mut control = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/nvme-fabrics")
        .context("cannot open /dev/nvme-fabrics")?;
    let wanted = format!(
        "transport=loop,nqn={name},hostnqn=nqn.2014-08.org.nvmexpress:uuid:{id},hostid={id}"
    );
    control
        .write_all(wanted.as_bytes())
        .with_context(|| format!("cannot connect with {wanted}"))?;
    let mut said = String::new();
    control.read_to_string(&mut said)?;
    let instance = said
        .split(',')
        .find_map(|word| word.trim().strip_prefix("instance="))
        .with_context(|| format!("the kernel says {said:?}"))?
        .to_owned();
    let control = PathBuf::from(format!("/sys/class/nvme/nvme{instance}"));
    made.0
        .push(Undo::Write(control.join("delete_controller"), "1"));
    let mut disk = None;
    sh::wait_for("an NVMe disk", APPEARS, || {
        for entry in fs::read_dir(&control)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let device = format!("/dev/{name}");
            if name.starts_with("nvme") && is_there(&device) {
                disk = Some(device);
            }
        }
        Ok(disk.is_some())
    })?;
    match disk {
        Some(disk) => Ok(disk),
        None => bail!("no disk"),
    }
}
