// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Many disks that appear and disappear at once.
//!
//! xl attaches one disk after the other, and its own work is many times that of the drivers. So this module first
//! writes the keys of all disks without the states; one write of all states then makes the disks appear, and another
//! one makes them disappear.

use crate::backends::RequiredDriver;
use crate::guest::RunningGuest;
use crate::sh;
use anyhow::{Context, Result};
use std::os::linux::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

/// Interval at which the guest checks for its disks, in seconds of the machine's time.
const LOOK: &str = "0.002";
/// States of a device in xenstore.
const INITIALISING: &str = "1";
const CLOSING: &str = "5";

/// Some disks of the guest.
#[derive(Debug)]
pub(crate) struct GuestDisks {
    domid: String,
    /// The part of the backend's path that names the type of backend.
    kind: &'static str,
    numbers: Vec<u32>,
    /// Number of disks that the guest had before.
    before: usize,
}

impl GuestDisks {
    /// Writes the keys of these devices as a toolstack does, except the states.
    pub(crate) fn prepare(
        guest: &mut RunningGuest,
        nodes: &[String],
        driver: RequiredDriver,
    ) -> Result<GuestDisks> {
        let before = guest.run("set -- /sys/block/xvd*; [ -e $1 ] || shift; echo $#")?;
        let disks = GuestDisks {
            domid: guest.domid().to_owned(),
            kind: if driver == RequiredDriver::None {
                "qdisk"
            } else {
                "vbd"
            },
            numbers: (0..).map(number).take(nodes.len()).collect(),
            before: before
                .trim()
                .parse()
                .context("the guest cannot count its disks")?,
        };
        let mut words = vec!["xenstore-write".to_owned()];
        for (number, node) in disks.numbers.iter().zip(nodes) {
            words.extend(disks.keys(*number, node)?);
        }
        run(&words)?;
        // Each side may write its own directory and read the other's.
        let (back, front) = (disks.backends(), disks.frontends());
        let reader = format!("r{}", disks.domid);
        let owner = format!("n{}", disks.domid);
        sh::run(&["xenstore-chmod", "-r", &back, "n0", &reader])?;
        sh::run(&["xenstore-chmod", "-r", &front, &owner, "r0"])?;
        Ok(disks)
    }

    fn backends(&self) -> String {
        format!("/local/domain/0/backend/{}/{}", self.kind, self.domid)
    }

    fn frontends(&self) -> String {
        format!("/local/domain/{}/device/vbd", self.domid)
    }

    /// Returns keys and values of one disk.
    fn keys(&self, number: u32, node: &str) -> Result<Vec<String>> {
        let device = std::fs::metadata(node)
            .with_context(|| format!("cannot find {node}"))?
            .st_rdev();
        let (major, minor) = (device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xfff00);
        let back = format!("{}/{number}", self.backends());
        let front = format!("{}/{number}", self.frontends());
        let params = if self.kind == "qdisk" {
            format!("aio:{node}")
        } else {
            node.to_owned()
        };
        let physical = format!("{major:x}:{minor:x}");
        let dev = format!("d{number}");
        let number = number.to_string();
        let both = [
            (&back, "frontend", front.as_str()),
            (&back, "frontend-id", &self.domid),
            (&back, "online", "1"),
            (&back, "removable", "0"),
            (&back, "bootable", "1"),
            (&back, "dev", &dev),
            (
                &back,
                "type",
                if self.kind == "qdisk" { "qdisk" } else { "phy" },
            ),
            (&back, "mode", "w"),
            (&back, "device-type", "disk"),
            (&back, "discard-enable", "1"),
            (&back, "direct-io-safe", "0"),
            (&back, "params", &params),
            (&back, "physical-device", &physical),
            (&front, "backend", &back),
            (&front, "backend-id", "0"),
            (&front, "virtual-device", &number),
            (&front, "device-type", "disk"),
        ];
        let pairs = both
            .iter()
            .flat_map(|(dir, key, value)| [format!("{dir}/{key}"), (*value).to_owned()]);
        Ok(pairs.collect())
    }

    /// Returns the numbers of the disks.
    pub(crate) fn numbers(&self) -> &[u32] {
        &self.numbers
    }

    /// Returns the disks in the guest.
    pub(crate) fn in_guest(&self) -> Vec<String> {
        (0..self.numbers.len()).map(name).collect()
    }

    /// Makes them appear, and returns when the guest has all of them.
    pub(crate) fn appear(&self, guest: &mut RunningGuest) -> Result<()> {
        self.write_states(INITIALISING, true)?;
        self.wait_in_guest(guest, "-lt", self.before + self.numbers.len())
            .context("not all disks appeared in the guest")
    }

    /// Makes them disappear, and returns when neither side has them any more.
    pub(crate) fn go(&self, guest: &mut RunningGuest) -> Result<()> {
        self.write_states(CLOSING, false)?;
        if self.kind == "qdisk" {
            self.wait_for_qemu()?;
        } else {
            self.wait_for_driver()?;
        }
        // The guest keeps a closed disk until its directory is removed.
        let mut words = vec!["xenstore-rm".to_owned()];
        let fronts = self.numbers.iter();
        words.extend(fronts.map(|number| format!("{}/{number}", self.frontends())));
        run(&words)?;
        self.wait_in_guest(guest, "-gt", self.before)
            .context("not all disks went away in the guest")
    }

    fn wait_for_driver(&self) -> Result<()> {
        let devices = self
            .numbers
            .iter()
            .map(|number| format!("/sys/bus/xen-backend/devices/vbd-{}-{number}", self.domid));
        let mut left: Vec<String> = devices.collect();
        sh::wait_every(Duration::from_millis(2), "the removal of the disks", || {
            // One check in each turn while there is one, because checks cost time, too.
            while left
                .last()
                .is_some_and(|device| !Path::new(device).exists())
            {
                left.pop();
            }
            Ok(left.is_empty())
        })
    }

    /// Waits until QEMU has removed the directories of its disks.
    fn wait_for_qemu(&self) -> Result<()> {
        let line = format!("xenstore-list {} 2>/dev/null || true", self.backends());
        let ours: Vec<String> = self.numbers.iter().map(u32::to_string).collect();
        sh::wait_every(
            Duration::from_millis(50),
            "QEMU's removal of the disks",
            || {
                let there = sh::shell(&line)?;
                Ok(!there.lines().any(|name| ours.iter().any(|our| our == name)))
            },
        )
    }

    /// Removes the remaining keys in xenstore.
    pub(crate) fn forget(self) -> Result<()> {
        if self.kind == "vbd" {
            let mut words = vec!["xenstore-rm".to_owned()];
            let backs = self.numbers.iter();
            words.extend(backs.map(|number| format!("{}/{number}", self.backends())));
            run(&words)?;
        }
        dom0::udev::settle()
    }

    fn write_states(&self, state: &str, both: bool) -> Result<()> {
        let mut words = vec!["xenstore-write".to_owned()];
        for number in &self.numbers {
            let back = format!("{}/{number}", self.backends());
            if both {
                words.extend([format!("{}/{number}/state", self.frontends()), state.into()]);
            } else {
                words.extend([format!("{back}/online"), "0".into()]);
            }
            words.extend([format!("{back}/state"), state.into()]);
        }
        run(&words)
    }

    /// Waits in the guest while `compare` holds between the number of its disks and `count`. The shell does it without
    /// another process, so that waiting costs little.
    fn wait_in_guest(&self, guest: &mut RunningGuest, compare: &str, count: usize) -> Result<()> {
        let line = format!(
            "[ -p /tmp/never ] || mkfifo /tmp/never; exec 9<>/tmp/never; n=0; \
             while set -- /sys/block/xvd*; [ -e $1 ] || shift; [ $# {compare} {count} ]; do \
             n=$((n+1)); [ $n -le 15000 ] || exit 1; read -t {LOOK} x <&9; done; true"
        );
        guest.run(&line).map(drop)
    }
}

fn run(words: &[String]) -> Result<()> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    sh::run(&words).map(drop)
}

/// Returns the number of a disk; from the 17th on Xen uses another scheme.
pub(crate) fn number(index: u32) -> u32 {
    if index < 16 {
        202 << 8 | index << 4
    } else {
        1 << 28 | index << 8
    }
}

/// Returns its device node in the guest.
pub(crate) fn name(index: usize) -> String {
    let letter = |index: usize| char::from(b'a' + u8::try_from(index % 26).unwrap_or(0));
    match index / 26 {
        0 => format!("/dev/xvd{}", letter(index)),
        more => format!("/dev/xvd{}{}", letter(more - 1), letter(index)),
    }
}

#[cfg(test)]
mod tests {
    use super::{name, number};

    #[test]
    fn disks_have_the_numbers_and_names_of_linux() {
        assert_eq!((number(0), number(1)), (51712, 51728));
        assert_eq!(number(16), 0x1000_1000);
        assert_eq!(name(0), "/dev/xvda");
        assert_eq!(name(25), "/dev/xvdz");
        assert_eq!(name(26), "/dev/xvdaa");
        assert_eq!(name(63), "/dev/xvdbl");
    }
}
