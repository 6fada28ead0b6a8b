// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The backend in a driver domain: a guest that has a disk of dom0's and serves another guest from it.
//!
//! The driver domain boots as all guests do and then works in dom0's root, which it has as a read-only disk: the
//! module, the programs and the scripts are the installed ones, and `xl devd` does there what xl does in dom0. For a
//! driver domain with a system of its own, with packages, see `life.domain_pv` and `life.domain_pvh`.

use super::basic::{verify_job, FIO};
use super::{Case, Context, SharedGuest};
use crate::driver_domain::{nothing_left, serves_both, DriverDomain, DEVICE, NAME};
use crate::guest::{AttachedVbd, Config, Guest, GuestKind, RUN_DIR};
use crate::{hotplug, sh, xs, TestedDriver};
use anyhow::{ensure, Context as _, Result};
use control::installed::SUPERVISOR;
use std::time::Duration;

/// dom0's root file system.
const ROOT: &str = "/dev/vda";

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let case = |name, about, run: fn(&mut Context) -> Result<()>| {
        Case::new(name, about, SharedGuest::Nothing, run)
            .no_leaks()
            .nightly()
    };
    vec![
        case(
            "domain.pv",
            "a PV driver domain serves phy and tap disks to another guest, and a tapdisk is killed there",
            |context| serve(context, GuestKind::Pv),
        ),
        case(
            "domain.pvh",
            "the same with a PVH driver domain",
            |context| serve(context, GuestKind::Pvh),
        ),
        case(
            "domain.small_maptrack",
            "three guests keep their pages mapped in a driver domain with room for few mappings: each connects and works",
            small_maptrack,
        ),
        case(
            "domain.many",
            "a driver domain serves as many disks as xenstore's quotas leave room for, which connect at the same moment; \
             the C driver tries as well",
            many,
        ),
    ]
}

/// Disks of the other guest, if the daemon of xenstore gives a domain room for their keys.
const MANY: usize = 60;
/// Disks for whose keys the usual quota of 1000 has room.
const USUAL: usize = 34;
/// The time for all of them to be attached, and to connect.
const ALL: Duration = Duration::from_secs(300);
/// The time for the C driver, which may run out of watches: then the others never connect.
const SOME: Duration = Duration::from_secs(60);

/// A driver domain with a disk of its own to serve from, `/dev/xvdb`.
struct Domain {
    guest: Guest,
}

impl Domain {
    fn start(context: &mut Context, kind: GuestKind, storage: &str) -> Result<Domain> {
        Domain::start_with(
            context,
            Config::new(NAME, kind, 1),
            &[storage],
            TestedDriver::Rs,
        )
    }

    /// Starts this guest as a driver domain with these devices of dom0 as `/dev/xvdb` and so on, which `driver` serves.
    fn start_with(
        context: &mut Context,
        mut config: Config,
        devices: &[&str],
        driver: TestedDriver,
    ) -> Result<Domain> {
        let root = read_only_root(context)?;
        config.is_driver_domain = true;
        config.disks = vec![hotplug::disk(&root, "xvda", "r")?];
        for (device, vdev) in devices.iter().zip(["xvdb", "xvdc", "xvdd"]) {
            config.disks.push(hotplug::disk(device, vdev, "w")?);
        }
        let domain = Domain {
            guest: Guest::create(config)?,
        };
        domain.enter()?;
        domain.load(driver)?;
        domain.run("xl devd")?;
        Ok(domain)
    }

    /// Prepares dom0's root in the domain, so that programs can run there.
    fn enter(&self) -> Result<()> {
        // Data that was stored in the root must be on the disk before it is read there, journal and all.
        sh::run(&["fsfreeze", "--freeze", "/"])?;
        let mounted = self
            .guest
            .run("mkdir -p /r && mount -t ext4 -o ro,noload /dev/xvda /r");
        sh::run(&["fsfreeze", "--unfreeze", "/"])?;
        mounted?;
        self.guest.run(
            "set -e; ln -s /proc/self/fd /dev/fd; for l in stdin/0 stdout/1 stderr/2; do ln -s /proc/self/fd/${l#*/} /dev/${l%/*}; done; \
             for d in run tmp var/log var/lib/xen var/lib/xenstored; do [ ! -d /r/$d ] || mount -t tmpfs tmpfs /r/$d; done; \
             mkdir -p /r/run/lock /r/run/xen /r/var/log/xen; for d in dev proc sys; do mount -o bind /$d /r/$d; done; \
             mkdir -p /dev/shm; mount -t xenfs xenfs /r/proc/xen",
        )?;
        self.run("for m in xen-evtchn xen-gntdev xen-gntalloc xen-privcmd; do modprobe $m; done")?;
        Ok(())
    }

    /// Loads this driver, and starts the supervisor if it is ours.
    fn load(&self, driver: TestedDriver) -> Result<()> {
        // The package's configuration of modprobe lets the name of the C driver load ours.
        self.run(&format!("modprobe --ignore-install {}", driver.module()))?;
        if driver == TestedDriver::Rs {
            self.run(&format!("systemd-sysusers /usr/lib/sysusers.d/xentap.conf; ({SUPERVISOR} --foreground >/var/log/blktapctrl.log 2>&1 &)"))?;
        }
        Ok(())
    }
}

impl DriverDomain for Domain {
    fn guest(&self) -> &Guest {
        &self.guest
    }

    /// Runs a command in dom0's root.
    fn run(&self, command: &str) -> Result<String> {
        ensure!(
            !command.contains('\''),
            "it is quoted by the shell: {command}"
        );
        self.guest.run(&format!(
            "PATH=/usr/sbin:/usr/bin:/sbin:/bin TERM=dumb chroot /r /bin/bash -c '{command}'"
        ))
    }

    /// Its root is read-only.
    fn image(&self) -> &'static str {
        "/tmp/a.img"
    }

    fn logs(&self) -> String {
        let look = "tail -n 20 /var/log/xen/* /var/log/blktapctrl.log; dmesg | tail -n 20; cat /proc/modules | grep xen";
        self.run(look).unwrap_or_else(|error| format!("{error:#}"))
    }
}

/// Makes a device of dom0's root that the supervisor does not recognise as mounted in dom0.
fn read_only_root(context: &mut Context) -> Result<String> {
    sh::modprobe("loop", &[])?;
    let device = sh::run(&["losetup", "--show", "--find", "--read-only", ROOT])?;
    let device = device.trim().to_owned();
    let theirs = device.clone();
    context.at_end(format!("detach {device}"), move || {
        sh::run(&["losetup", "--detach", &theirs]).map(drop)
    });
    Ok(device)
}

/// Guests that keep their pages mapped in one driver domain.
const KEEPERS: usize = 3;
/// Mappings for which that domain has room, with one frame. A guest keeps more than that under load.
const ROOM: u64 = 256;

fn small_maptrack(context: &mut Context) -> Result<()> {
    let mut devices = Vec::new();
    for _ in 0..KEEPERS {
        devices.push(context.null_blk(64, &[])?.path());
    }
    let mut config = Config::new(NAME, GuestKind::Pv, 1);
    config.maptrack_frames = Some(1);
    let devices: Vec<&str> = devices.iter().map(String::as_str).collect();
    let domain = Domain::start_with(context, config, &devices, TestedDriver::Rs)?;
    let served = serve_keepers(&domain, context);
    served.with_context(|| domain.logs())?;
    domain.guest.destroy()
}

/// Guests begin one after the other, and each fills the table before the next one connects.
fn serve_keepers(domain: &Domain, context: &mut Context) -> Result<()> {
    let job = verify_job("/dev/xvda", 16, 100, 512);
    let mut guests = Vec::new();
    for (number, device) in ["xvdb", "xvdc", "xvdd"].iter().enumerate() {
        let mut config = Config::new(&format!("front{number}"), GuestKind::Pv, 1);
        config.memory = 256;
        config.disks = vec![format!(
            "format=raw, vdev=xvda, access=w, backend={NAME}, backendtype=phy, target=/dev/{device}"
        )];
        let guest = Guest::create(config)?;
        guest.run_for(&job, FIO)?;
        let vbd = AttachedVbd::of_backend(domain.guest.domid, guest.domid, "xvda")?;
        let kept = format!("cat {}/statistics/kept_pages", vbd.sysfs().display());
        let kept: u64 = domain.run(&kept)?.trim().parse()?;
        context.note(&format!(
            "front{number} works; {kept} of its pages stay mapped"
        ))?;
        ensure!(
            number > 0 || kept > ROOM / 2,
            "the first guest keeps {kept} pages and leaves room for others: this shows nothing"
        );
        guests.push(guest);
    }
    for guest in guests {
        guest.run_for(&job, FIO)?;
        guest.destroy()?;
    }
    Ok(())
}

fn serve(context: &mut Context, kind: GuestKind) -> Result<()> {
    let storage = context.null_blk(64, &[])?;
    let domain = Domain::start(context, kind, &storage.path())?;
    let served = serves_both(&domain, &mut |text| context.note(text));
    served.with_context(|| domain.logs())?;
    domain.guest.destroy()
}

/// Names of so many disks: `xvda` to `xvdz`, then `xvdaa` and so on.
fn vdevs(count: usize) -> Vec<String> {
    let letters = || (b'a'..=b'z').map(char::from);
    let one = letters().map(|last| format!("xvd{last}"));
    let two = letters().flat_map(|first| letters().map(move |last| format!("xvd{first}{last}")));
    one.chain(two).take(count).collect()
}

/// Lets a domain have more keys than usual, which the daemon in C can do; returns for how many disks there is room.
fn room_for_keys() -> Result<usize> {
    const KEYS: &str = "10000";
    let ask = |words: &[&str]| {
        let line = [&["xenstore-control", "quota"], words].concat();
        sh::status(&line, Duration::from_secs(10))
    };
    ask(&["set", "nodes", KEYS])?;
    // The daemon in OCaml answers "OK" to whatever it does not know.
    let is_changed = ask(&[])?.text.contains(KEYS);
    Ok(if is_changed { MANY } else { USUAL })
}

fn many(context: &mut Context) -> Result<()> {
    let storage = context.null_blk(64, &[])?;
    let vdevs = vdevs(room_for_keys()?);
    for driver in [TestedDriver::Rs, TestedDriver::C] {
        let config = Config::new(NAME, GuestKind::Pv, 1);
        let domain = Domain::start_with(context, config, &[&storage.path()], driver)?;
        let limit = match driver {
            TestedDriver::Rs => ALL,
            TestedDriver::C => SOME,
        };
        let served = serves_many(&domain, &vdevs, limit);
        let served = match (served, driver) {
            (served, TestedDriver::Rs) => {
                served.with_context(|| format!("{}\n{}", domain.logs(), quotas(&domain)))?
            }
            (Ok(served), TestedDriver::C) => served,
            // The case compares: a quota that is too small for the C driver is a result.
            (Err(error), TestedDriver::C) => format!("not served: {error:#}\n{}", quotas(&domain)),
        };
        context.note(&format!("{}: {served}", driver.module()))?;
        domain.guest.destroy()?;
    }
    Ok(())
}

/// The quotas of xenstore, and how much of each the driver domain uses.
fn quotas(domain: &Domain) -> String {
    let domid = domain.guest.domid.to_string();
    let ask = |words: &[&str]| {
        let line = [&["xenstore-control", "quota"], words].concat();
        sh::status(&line, Duration::from_secs(10))
            .map_or_else(|error| format!("{error:#}"), |said| said.text)
    };
    format!("{}\n{}\n{}", ask(&[]), ask(&[&domid]), ask(&["max"]))
}

/// Serves all these disks of one guest, which looks for them when it boots and connects them within `limit`.
fn serves_many(domain: &Domain, vdevs: &[String], limit: Duration) -> Result<String> {
    // xl in dom0 names it; `xl devd` runs it in the domain.
    let script = format!("/r{RUN_DIR}/{}", hotplug::NAME);
    let copy = format!("mkdir -p /r{RUN_DIR} && cp /agent {script} && chmod 755 {script}");
    domain.guest.run(&copy)?;
    let mut config = Config::new("front", GuestKind::Pv, 1);
    // blkfront allocates the pages of all requests of a disk when it connects.
    config.memory = 768;
    let disk = |vdev: &String| {
        let disk = hotplug::disk(DEVICE, vdev, "r")?;
        Ok(format!("backend={NAME}, {disk}"))
    };
    config.disks = vdevs.iter().map(disk).collect::<Result<_>>()?;
    let guest = Guest::create(config)?;
    let back = domain.guest.domid;
    let disks = vdevs
        .iter()
        .map(|vdev| AttachedVbd::of_backend(back, guest.domid, vdev))
        .collect::<Result<Vec<_>>>()?;
    let mut late = Vec::new();
    let connected = sh::wait_for("the connection of all disks", limit, || {
        late.clear();
        for disk in &disks {
            let state = xs::read(&format!("{}/state", disk.backend))?;
            if state.as_deref() != Some("4") {
                late.push(format!("{} {}", disk.vdev, state.unwrap_or_default()));
            }
        }
        Ok(late.is_empty())
    });
    connected.with_context(|| {
        let (count, all) = (late.len(), disks.len());
        format!(
            "{count} of {all} disks are not connected: {}",
            late.join(", ")
        )
    })?;
    let read = format!(
        "for d in {}; do dd if=/dev/$d of=/dev/null bs=64k count=4 2>/dev/null || {{ echo $d; exit 1; }}; done",
        vdevs.join(" ")
    );
    guest.run_for(&read, ALL)?;
    let keys = xs::count(&format!("/local/domain/{back}"))?;
    let note = format!("{} disks, {keys} keys of the driver domain", vdevs.len());
    guest.destroy()?;
    nothing_left(domain)?;
    Ok(note)
}
