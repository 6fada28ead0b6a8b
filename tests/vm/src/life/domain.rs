// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A driver domain with a system of its own: Debian from a copy of the host's disk, with the packages that apt has
//! installed there. Nothing is done in it but what README.md tells its administrator; all else systemd starts.

use super::{host, Chapter, LifeStory};
use crate::backing::NullBlk;
use crate::cases::outlive_emulator;
use crate::driver_domain::{serves_both, DriverDomain, NAME};
use crate::guest::{Config, Guest, GuestKind};
use crate::TestedDriver;
use anyhow::{ensure, Context, Result};
use std::time::Duration;

/// The copy of the host's disk. Both domains have it, one after the other.
const ROOT: &str = "/dev/vdc";
/// Size of the device of the phy disk, in MiB.
const DEVICE_MIB: u32 = 64;
/// The unit that runs the scripts for the disks of other guests.
const SCRIPTS: &str = "xentap-devd.service";
/// A boot and a shutdown take long in emulation.
const LONG: Duration = Duration::from_secs(300);

pub(super) fn chapters() -> Vec<Chapter> {
    vec![
        Chapter {
            name: "life.domain_pv",
            about: "a PV guest with the same packages is made a driver domain, and serves phy and tap disks",
            tell: |story| {
                host::is_up()?;
                let role = Role {
                    kind: GuestKind::Pv,
                    is_new: true,
                };
                told(story, role)
            },
        },
        Chapter {
            name: "life.domain_pvh",
            about: "as a PVH guest it boots, and serves without a word to anybody",
            tell: |story| {
                let role = Role {
                    kind: GuestKind::Pvh,
                    is_new: false,
                };
                told(story, role)
            },
        },
    ]
}

/// Role of a driver domain.
#[derive(Clone, Copy)]
struct Role {
    kind: GuestKind,
    /// Whether its system is not set up as a driver domain yet.
    is_new: bool,
}

/// Tells how a domain serves.
fn told(story: &mut LifeStory, role: Role) -> Result<()> {
    outlive_emulator(
        story,
        |story| serves(story, role),
        |story, death| story.report.emulator(&format!("{NAME}: {death}")),
    )
}

fn serves(story: &mut LifeStory, role: Role) -> Result<()> {
    let storage = NullBlk::create(DEVICE_MIB, &[])?;
    let served = with_storage(story, role, &storage);
    let removed = storage.remove();
    served.and(removed)
}

fn with_storage(story: &mut LifeStory, role: Role, storage: &NullBlk) -> Result<()> {
    let domain = Domain::boot(role.kind, storage)?;
    let served = (|| {
        domain.is_up()?;
        if role.is_new {
            domain.is_made_one()?;
        }
        domain.is_complete()?;
        serves_both(&domain, &mut |text| story.report.note(text))?;
        domain.is_complete().context("after it has served")
    })();
    served.with_context(|| domain.logs())?;
    domain.power_off()
}

/// The driver domain. Its disk to serve from is `/dev/xvdb`.
struct Domain {
    guest: Guest,
}

impl Domain {
    fn boot(kind: GuestKind, storage: &NullBlk) -> Result<Domain> {
        let mut config = Config::new(NAME, kind, 1);
        config.is_driver_domain = true;
        config.memory = 512;
        // The console is the agent's, and the test is the host's.
        config.cmdline =
            "root=/dev/xvda systemd.show_status=error systemd.mask=serial-getty@hvc0.service \
             systemd.mask=host-test.service"
                .into();
        config.disks = vec![
            format!("phy:{ROOT},xvda,w"),
            format!("phy:{},xvdb,w", storage.path()),
        ];
        let guest = Guest::create(config)?;
        Ok(Domain { guest })
    }

    /// Waits until systemd has started all.
    fn is_up(&self) -> Result<()> {
        let ended = "systemctl is-system-running --wait";
        self.guest.status_for(ended, LONG).map(drop)
    }

    /// Follows README.md's instructions for an administrator, once.
    fn is_made_one(&self) -> Result<()> {
        let enable = format!("systemctl enable --now {SCRIPTS}");
        self.run(&enable).map(drop)
    }

    /// Checks that all units for serving disks run, without help, and that none has failed.
    fn is_complete(&self) -> Result<()> {
        let failed = self.run("systemctl list-units --failed --plain --no-legend")?;
        ensure!(failed.trim().is_empty(), "units have failed: {failed}");
        for unit in ["blktapctrl.service", "blktapctrl.socket", SCRIPTS] {
            let state = self.run(&format!("systemctl is-active {unit}"));
            state.with_context(|| format!("{unit} is not active"))?;
        }
        let said = self.run("xen-blkback-rs status")?;
        let serving = format!("serving: {}", TestedDriver::Rs.module());
        ensure!(
            said.lines().any(|line| line == serving),
            "another driver is loaded: {said}"
        );
        self.run("tap-ctl doctor")
            .context("the doctor finds something")?;
        let (signs, answers) = self.guest.trouble();
        ensure!(
            signs.is_empty(),
            "its kernel complains: {}",
            signs.join("; ")
        );
        answers
    }

    /// Shuts it down as an administrator does, so that the next boot finds its disk in order.
    fn power_off(self) -> Result<()> {
        self.guest.start("systemctl poweroff")?;
        self.guest.wait_gone(LONG)?;
        self.guest.give_up()
    }
}

impl DriverDomain for Domain {
    fn guest(&self) -> &Guest {
        &self.guest
    }

    fn run(&self, command: &str) -> Result<String> {
        self.guest.run(command)
    }

    fn image(&self) -> &'static str {
        "/srv/a.img"
    }

    fn logs(&self) -> String {
        let look = "systemctl list-units --failed; journalctl -b --no-pager -n 30 -u blktapctrl -u xentap-devd -u xen; \
             tail -n 20 /var/log/xen/*; dmesg | tail -n 20; grep xen /proc/modules";
        self.run(look).unwrap_or_else(|error| format!("{error:#}"))
    }
}
