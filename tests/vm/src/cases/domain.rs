// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The backend in a driver domain: a guest that has a disk of dom0's and serves another guest from it.
//!
//! The driver domain boots as all guests do and then works in dom0's root, which it has as a read-only disk: the
//! module, the programs and the scripts are the installed ones, and `xl devd` does there what xl does in dom0.

use super::basic::{verify_job, FIO};
use super::tap::{end_load, start_load};
use super::{Case, Context, Needs};
use crate::guest::{Config, Guest, Kind, Vbd};
use crate::{hotplug, sh, xs, Driver};
use anyhow::{ensure, Context as _, Result};
use control::installed::SUPERVISOR;
use std::time::Duration;

/// The name of the driver domain, as configurations of guests say it.
const NAME: &str = "back";
/// dom0's root file system.
const ROOT: &str = "/dev/vda";
const LIMIT: Duration = Duration::from_secs(120);

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let case = |name, about, run: fn(&mut Context) -> Result<()>| {
        Case::new(name, about, Needs::Nothing, run)
            .no_leaks()
            .nightly()
    };
    vec![
        case(
            "domain.pv",
            "a PV driver domain serves phy and tap disks to another guest, and a tapdisk is killed there",
            |context| serve(context, Kind::Pv),
        ),
        case(
            "domain.pvh",
            "the same with a PVH driver domain",
            |context| serve(context, Kind::Pvh),
        ),
    ]
}

/// A driver domain with a disk of its own to serve from, `/dev/xvdb`.
struct DriverDomain {
    guest: Guest,
}

impl DriverDomain {
    fn start(context: &mut Context, kind: Kind, storage: &str) -> Result<DriverDomain> {
        let root = read_only_root(context)?;
        let mut config = Config::new(NAME, kind, 1);
        config.is_driver_domain = true;
        config.disks = vec![
            hotplug::disk(&root, "xvda", "r")?,
            hotplug::disk(storage, "xvdb", "w")?,
        ];
        let domain = DriverDomain {
            guest: Guest::create(config)?,
        };
        domain.enter()?;
        Ok(domain)
    }

    /// Makes dom0's root one in which programs can run.
    fn enter(&self) -> Result<()> {
        // What was written to the root is on the disk before it is read there, journal and all.
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
        self.run(&format!("modprobe {}", Driver::Rs.module()))?;
        self.run(&format!("systemd-sysusers /usr/lib/sysusers.d/xentap.conf; ({SUPERVISOR} --foreground >/var/log/blktapctrl.log 2>&1 &)"))?;
        self.run("xl devd")?;
        Ok(())
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

    /// A disk of this domain for another guest, in xl's syntax.
    fn disk(&self, what: &str, vdev: &str) -> String {
        format!("format=raw, vdev={vdev}, access=w, backend={NAME}, {what}")
    }

    /// What says why a disk is not there.
    fn logs(&self) -> String {
        let look = "tail -n 20 /var/log/xen/* /var/log/blktapctrl.log; dmesg | tail -n 20; cat /proc/modules | grep xen";
        self.run(look).unwrap_or_else(|error| format!("{error:#}"))
    }

    /// Fails unless our driver serves this disk there.
    fn check_driver(&self, vbd: &Vbd) -> Result<()> {
        let serving = self
            .guest
            .run(&format!("readlink {}/driver", vbd.sysfs().display()))?;
        let name = serving.trim().rsplit('/').next();
        ensure!(
            name == Some(Driver::Rs.bus_name()),
            "{serving} serves {} in {NAME}",
            vbd.backend
        );
        Ok(())
    }

    /// Waits until some writes were answered.
    fn wait_load(&self, vbd: &Vbd) -> Result<()> {
        let file = format!("{}/statistics/wr_done", vbd.sysfs().display());
        let done =
            || -> Result<u64> { Ok(self.guest.run(&format!("cat {file}"))?.trim().parse()?) };
        let before = done()?;
        sh::wait_for("a load on the disk", LIMIT, || Ok(done()? > before + 100))
    }

    /// Waits until nothing of a disk is left there.
    fn wait_gone(&self, vbd: &Vbd) -> Result<()> {
        sh::wait_for("the end of a disk in the driver domain", LIMIT, || {
            let there = self
                .guest
                .status(&format!("[ -e {} ]", vbd.sysfs().display()))?;
            Ok(there.rc != 0 && xs::read(&format!("{}/state", vbd.backend))?.is_none())
        })
    }
}

/// dom0's root as a device of which nobody thinks that dom0 has mounted it.
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

fn serve(context: &mut Context, kind: Kind) -> Result<()> {
    let storage = context.null_blk(64, &[])?;
    let domain = DriverDomain::start(context, kind, &storage.path())?;
    let served = served(context, &domain);
    served.with_context(|| domain.logs())?;
    domain.guest.destroy()
}

fn served(context: &mut Context, domain: &DriverDomain) -> Result<()> {
    let mut config = Config::new("front", Kind::Pv, 1);
    config.disks = vec![domain.disk("backendtype=phy, target=/dev/xvdb", "xvda")];
    let guest = Guest::create(config)?;
    let phy = Vbd::of_backend(domain.guest.domid, guest.domid, "xvda")?;
    domain.check_driver(&phy)?;
    guest.run_for(&verify_job("/dev/xvda", 16, 100, 512), FIO)?;
    context.note("phy: verified")?;

    domain.run("truncate -s 32M /tmp/a.img")?;
    let tap = domain.disk("script=block-tap-rs, target=aio:/tmp/a.img", "xvdb");
    sh::run_for(
        &["xl", "block-attach", &guest.domid.to_string(), &tap],
        LIMIT,
    )?;
    let tap = Vbd::of_backend(domain.guest.domid, guest.domid, "xvdb")?;
    domain.check_driver(&tap)?;
    guest.wait_disk("xvdb")?;
    let load = start_load(&guest)?;
    for _ in 0..3 {
        domain.wait_load(&tap)?;
        domain.run("pkill -KILL tapdisk")?;
    }
    domain.wait_load(&tap)?;
    context.note(&end_load(&guest, load)?)?;
    sh::run_for(
        &["xl", "block-detach", &guest.domid.to_string(), "xvdb"],
        LIMIT,
    )?;
    domain.wait_gone(&tap)?;
    guest.destroy()?;
    domain.wait_gone(&phy)
}
