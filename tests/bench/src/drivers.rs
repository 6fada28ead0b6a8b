// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Drivers in the kernel that serve the disks.

use crate::backends::RequiredDriver;
use crate::sh;
use anyhow::Result;
use std::path::Path;

const WASTEFUL: &str = "/t/wasteful.ko";
/// The drivers that are compared, as modules.
const MODULES: [&str; 2] = ["xen_blkback_rs", "xen_blkback"];
/// Drivers must load and unload on command, not when a disk appears.
const NO_ALIASES: &str = "blacklist xen-blkback\nblacklist xen-blkback-rs\n";

/// The loaded driver.
#[derive(Debug)]
pub(crate) struct Drivers {
    ours: String,
    loaded: RequiredDriver,
}

impl Drivers {
    /// Creates the value. No driver may be loaded yet: the machine boots with `noblkback`.
    pub(crate) fn new(ours: &str) -> Result<Drivers> {
        std::fs::create_dir_all("/etc/modprobe.d")?;
        sh::put("/etc/modprobe.d/bench.conf", NO_ALIASES)?;
        Ok(Drivers {
            ours: ours.to_owned(),
            loaded: RequiredDriver::None,
        })
    }

    /// Replaces the loaded driver by `wanted`. No disk may be attached.
    pub(crate) fn switch(&mut self, wanted: RequiredDriver) -> Result<()> {
        if self.loaded == wanted {
            return Ok(());
        }
        self.unload()?;
        let name = match wanted {
            RequiredDriver::Ours(parameters) => {
                let mut words = vec!["insmod", &self.ours];
                words.extend(parameters.split_whitespace());
                sh::run(&words)?;
                "xen-blkback-rs"
            }
            RequiredDriver::Wasteful => {
                sh::run(&["insmod", WASTEFUL])?;
                "xen-blkback-rs"
            }
            RequiredDriver::C(parameter) => {
                sh::run(&["modprobe", "xen-blkback", parameter])?;
                "vbd"
            }
            RequiredDriver::None => return Ok(()),
        };
        self.loaded = wanted;
        let dir = Path::new("/sys/bus/xen-backend/drivers").join(name);
        sh::wait_for("the registration of the driver", || Ok(dir.exists()))
    }

    /// Unloads the driver, so that the next one sees the current number of processors.
    pub(crate) fn unload(&mut self) -> Result<()> {
        match std::mem::replace(&mut self.loaded, RequiredDriver::None) {
            RequiredDriver::Ours(_) | RequiredDriver::Wasteful => {
                sh::run(&["rmmod", "xen_blkback_rs"])?
            }
            RequiredDriver::C(_) => sh::run(&["rmmod", "xen_blkback"])?,
            RequiredDriver::None => String::new(),
        };
        Ok(())
    }

    /// Returns the functions of the kernel and of the modules of [`MODULES`], and their addresses.
    pub(crate) fn functions() -> Result<Vec<(String, String)>> {
        let text = sh::get("/proc/kallsyms")?;
        Ok(text.lines().filter_map(function).collect())
    }

    /// Returns the modules of dom0 and the addresses of their text.
    pub(crate) fn places() -> Result<Vec<(String, String)>> {
        let text = sh::get("/proc/modules")?;
        Ok(text.lines().filter_map(place).collect())
    }
}

/// `NAME SIZE USES DEPENDENTS STATE ADDRESS`
fn place(line: &str) -> Option<(String, String)> {
    let mut words = line.split_whitespace();
    let name = words.next()?.to_owned();
    let address = words.nth(4)?.trim_start_matches("0x").to_owned();
    Some((name, address))
}

/// `ADDRESS TYPE NAME\t[MODULE]`; without a module for the kernel's own.
fn function(line: &str) -> Option<(String, String)> {
    let (symbol, module) = line.split_once("\t[").unwrap_or((line, ""));
    if !module.is_empty() && !MODULES.contains(&module.trim_end_matches(']')) {
        return None;
    }
    let mut words = symbol.split_whitespace();
    let (address, kind, name) = (words.next()?, words.next()?, words.next()?);
    kind.eq_ignore_ascii_case("t")
        .then(|| (name.to_owned(), address.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::{function, place};

    #[test]
    fn function_of_a_driver() {
        let line = "ffffffffc0a11010 t submit\t[xen_blkback_rs]";
        let found = function(line).unwrap();
        assert_eq!(found, ("submit".into(), "ffffffffc0a11010".into()));
        let of_kernel = function("ffffffff81011010 T schedule").unwrap();
        assert_eq!(of_kernel, ("schedule".into(), "ffffffff81011010".into()));
        assert_eq!(function("ffffffffc0a11010 t submit\t[null_blk]"), None);
        assert_eq!(function("ffffffffc0a11010 d data\t[xen_blkback_rs]"), None);
        assert_eq!(function("ffffffff82000000 D jiffies"), None);
    }

    #[test]
    fn place_of_a_module() {
        let line = "null_blk 98304 1 - Live 0xffffffffc0a11000 (E)";
        let found = place(line).unwrap();
        assert_eq!(found, ("null_blk".into(), "ffffffffc0a11000".into()));
    }
}
