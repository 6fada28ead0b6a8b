// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The backend in a driver domain: a guest that has a disk of dom0's and serves another guest from it.
//!
//! The driver domain boots as all guests do and then works in dom0's root, which it has as a read-only disk: the
//! module, the programs and the scripts are the installed ones, and `xl devd` does there what xl does in dom0. One that
//! has a system of its own, with packages: `life.domain_pv` and `life.domain_pvh`.

use super::{Case, Context, Needs};
use crate::driver_domain::{serves_both, DriverDomain, NAME};
use crate::guest::{Config, Guest, Kind};
use crate::{hotplug, sh, Driver};
use anyhow::{ensure, Context as _, Result};
use control::installed::SUPERVISOR;

/// dom0's root file system.
const ROOT: &str = "/dev/vda";

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
struct Domain {
    guest: Guest,
}

impl Domain {
    fn start(context: &mut Context, kind: Kind, storage: &str) -> Result<Domain> {
        let root = read_only_root(context)?;
        let mut config = Config::new(NAME, kind, 1);
        config.is_driver_domain = true;
        config.disks = vec![
            hotplug::disk(&root, "xvda", "r")?,
            hotplug::disk(storage, "xvdb", "w")?,
        ];
        let domain = Domain {
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
    let domain = Domain::start(context, kind, &storage.path())?;
    let served = serves_both(&domain, &mut |text| context.note(text));
    served.with_context(|| domain.logs())?;
    domain.guest.destroy()
}
