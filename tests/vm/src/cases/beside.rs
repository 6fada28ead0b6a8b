// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Disks of the kind `vbd3` that a program beside us serves: the case plays that program.

use super::{load_driver, Case, Context, SharedGuest};
use crate::{sh, xs, TestedDriver};
use anyhow::{ensure, Result};
use std::path::PathBuf;
use std::time::Duration;

/// Folder of the frontends: not below `device`, where the kernel would make devices of them.
const FRONTENDS: &str = "/local/domain/0/vmtest";
const BACKENDS: &str = "/local/domain/0/backend";
/// An answer of the driver comes within this time.
const SOON: Duration = Duration::from_secs(20);

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    vec![Case::new(
        "tap.beside",
        "a disk of the kind vbd3 that another program serves is left alone, and ours is served",
        SharedGuest::Nothing,
        beside,
    )
    .supervised()
    .no_leaks()
    .nightly()]
}

/// A disk both of whose ends this case plays.
struct Played {
    back: String,
    front: String,
    device: PathBuf,
}

impl Played {
    /// Makes both directories, and waits until the bus knows the device.
    fn make(kind: &str, number: u32, keys: &[(&str, &str)]) -> Result<Played> {
        let played = Played {
            back: format!("{BACKENDS}/{kind}/0/{number}"),
            front: format!("{FRONTENDS}/{number}"),
            device: format!("/sys/bus/xen-backend/devices/{kind}-0-{number}").into(),
        };
        let front = [
            ("backend", played.back.as_str()),
            ("backend-id", "0"),
            ("state", "1"),
        ];
        let back = [
            ("frontend", played.front.as_str()),
            ("frontend-id", "0"),
            ("online", "1"),
            ("mode", "w"),
            ("state", "1"),
        ];
        write(&played.front, &front)?;
        write(&played.back, &[&back[..], keys].concat())?;
        sh::wait_for("the device", SOON, || Ok(played.device.exists()))?;
        Ok(played)
    }

    fn remove(self) -> Result<()> {
        xs::remove(&self.back)?;
        xs::remove(&self.front)?;
        sh::wait_for("the end of the device", SOON, || Ok(!self.device.exists()))
    }

    /// Returns everything below both directories, and the reports about the device.
    fn all(&self) -> Result<Vec<(String, Option<String>)>> {
        let errors = self.back.replace("/backend/", "/error/backend/");
        let mut all = Vec::new();
        for directory in [&self.back, &self.front, &errors] {
            for name in xs::list(directory)? {
                let path = format!("{directory}/{name}");
                let value = xs::read(&path)?;
                all.push((path, value));
            }
        }
        Ok(all)
    }

    fn state(&self) -> String {
        format!("{}/state", self.back)
    }
}

fn write(directory: &str, keys: &[(&str, &str)]) -> Result<()> {
    let paths = keys.iter().map(|(name, _)| format!("{directory}/{name}"));
    let paths: Vec<String> = paths.collect();
    let values = keys.iter().map(|(_, value)| *value);
    let pairs: Vec<(&str, &str)> = paths.iter().map(String::as_str).zip(values).collect();
    xs::write(&pairs)
}

/// Waits until driver and supervisor have seen the earlier changes of xenstore: the driver serves a later disk, and the
/// supervisor has named itself as the server of another one.
fn settle(number: u32) -> Result<()> {
    let later = Played::make("vbd", number, &[])?;
    xs::wait_value(&later.state(), "2", SOON)?;
    later.remove()?;
    let script = ("script", "/etc/xen/scripts/block-tap-rs");
    let later = Played::make("vbd3", number, &[script])?;
    xs::wait_value(&later.state(), "2", SOON)?;
    let server = format!("{}/tap-server", later.back);
    xs::wait_value(&server, "blktapctrl", SOON)?;
    later.remove()
}

fn beside(context: &mut Context) -> Result<()> {
    let theirs: [(&str, &[(&str, &str)]); 3] = [
        (
            "another script",
            &[("script", "/etc/xen/scripts/other"), ("params", "aio:/a")],
        ),
        ("no format of ours", &[("params", "vdi:/srv/a.vdi")]),
        (
            "another server, in our words",
            &[("params", "aio:/srv/a.img"), ("tap-server", "other")],
        ),
    ];
    for (number, (what, keys)) in (9000..).zip(theirs) {
        left_alone(number, keys).map_err(|error| error.context(what))?;
    }
    // A driver that is loaded later takes its own devices, and no others. The supervisor has the driver's control node
    // open.
    context.take_supervisor()?.stop()?;
    sh::run(&["rmmod", TestedDriver::Rs.sys_module()])?;
    // udev would load the driver for the new devices, at any time and without this case's parameters.
    let resume = || sh::run(&["udevadm", "control", "--start-exec-queue"]).map(drop);
    sh::run(&["udevadm", "control", "--stop-exec-queue"])?;
    context.at_end("let udev go on", resume);
    let foreign = Played::make("vbd3", 9000, theirs[0].1)?;
    let ours = Played::make("vbd3", 9001, &[("tap-server", "blktapctrl")])?;
    let before = foreign.all()?;
    load_driver(TestedDriver::Rs)?;
    resume()?;
    xs::wait_value(&ours.state(), "2", SOON)?;
    context.supervise(true)?;
    settle(9100)?;
    let now = foreign.all()?;
    ensure!(now == before, "{now:?} is not {before:?}");
    foreign.remove()?;
    ours.remove()
}

/// Plays the life of a foreign disk, in whose directories only its two ends may write.
fn left_alone(number: u32, keys: &[(&str, &str)]) -> Result<()> {
    let disk = Played::make("vbd3", number, keys)?;
    let named = ("physical-device", "1:0");
    let steps: [(&str, (&str, &str)); 8] = [
        (&disk.back, ("state", "2")),
        (&disk.back, named),
        (&disk.front, ("state", "3")),
        (&disk.back, ("state", "4")),
        (&disk.front, ("state", "4")),
        (&disk.front, ("state", "5")),
        (&disk.back, ("state", "5")),
        (&disk.front, ("state", "6")),
    ];
    settle(number + 100)?;
    let mut before = disk.all()?;
    ensure!(
        before.contains(&(disk.state(), Some("1".into()))),
        "the driver has offered it: {before:?}"
    );
    for (directory, (name, value)) in steps {
        write(directory, &[(name, value)])?;
        let path = format!("{directory}/{name}");
        before.retain(|(known, _)| *known != path);
        before.push((path, Some(value.into())));
        settle(number + 100)?;
        let mut now = disk.all()?;
        now.sort();
        before.sort();
        ensure!(now == before, "{now:?} is not {before:?}");
    }
    disk.remove()
}
