// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! What the disks stand on, and who serves them.

use crate::backends::{Driver, Store};
use crate::sh;
use anyhow::Result;
use std::path::Path;

const SIZE_MIB: u32 = 256;
const NULL_BLK: &str = "/sys/kernel/config/nullb/bench";
const WASTEFUL: &str = "/t/wasteful.ko";
const FILE: &str = "/dev/shm/bench.img";
/// The drivers must come and go when we say so, not when a disk appears.
const NO_ALIASES: &str = "blacklist xen-blkback\nblacklist xen-blkback-rs\n";

/// The stores, written full: a page that was never written would be cheaper to read.
#[derive(Debug)]
pub(crate) struct Stores {
    memory: String,
    of_loop: Option<String>,
}

impl Stores {
    /// Makes what `wanted` asks for.
    pub(crate) fn create(wanted: &[Store]) -> Result<Stores> {
        let memory = null_blk()?;
        fill(&memory)?;
        let of_loop = if wanted.contains(&Store::Loop) {
            Some(loop_device()?)
        } else {
            None
        };
        Ok(Stores { memory, of_loop })
    }

    /// The device node of a store.
    pub(crate) fn path(&self, store: Store) -> &str {
        match store {
            Store::Memory => &self.memory,
            Store::Loop => self.of_loop.as_deref().unwrap_or("/dev/loop0"),
        }
    }
}

fn null_blk() -> Result<String> {
    sh::run(&["modprobe", "null_blk", "nr_devices=0"])?;
    if !Path::new("/sys/kernel/config/nullb").exists() {
        sh::run(&["mount", "-t", "configfs", "none", "/sys/kernel/config"])?;
    }
    let dir = Path::new(NULL_BLK);
    std::fs::create_dir(dir)?;
    sh::put(dir.join("size"), &SIZE_MIB.to_string())?;
    sh::put(dir.join("memory_backed"), "1")?;
    sh::put(dir.join("power"), "1")?;
    // Since Linux 6.11 the disk bears the name of the directory, before that it is numbered.
    let names = ["/dev/bench", "/dev/nullb0"];
    let there = || names.into_iter().find(|name| Path::new(name).exists());
    sh::wait_for("the device node of null_blk", || Ok(there().is_some()))?;
    Ok(there().unwrap_or(names[0]).to_owned())
}

fn loop_device() -> Result<String> {
    sh::run(&["modprobe", "loop"])?;
    sh::run(&[
        "dd",
        "if=/dev/zero",
        &format!("of={FILE}"),
        "bs=1M",
        &format!("count={SIZE_MIB}"),
        "status=none",
    ])?;
    Ok(sh::run(&["losetup", "--find", "--show", FILE])?
        .trim()
        .to_owned())
}

fn fill(device: &str) -> Result<()> {
    let count = format!("count={SIZE_MIB}");
    sh::run(&[
        "dd",
        "if=/dev/zero",
        &format!("of={device}"),
        "bs=1M",
        &count,
        "oflag=direct",
        "status=none",
    ])
    .map(drop)
}

/// Which driver is loaded.
#[derive(Debug)]
pub(crate) struct Drivers {
    ours: String,
    loaded: Driver,
}

impl Drivers {
    /// Nothing may be loaded yet: the machine boots with `noblkback`.
    pub(crate) fn new(ours: &str) -> Result<Drivers> {
        std::fs::create_dir_all("/etc/modprobe.d")?;
        sh::put("/etc/modprobe.d/bench.conf", NO_ALIASES)?;
        Ok(Drivers {
            ours: ours.to_owned(),
            loaded: Driver::None,
        })
    }

    /// Puts `wanted` in place of what was there. No disk may be attached.
    pub(crate) fn switch(&mut self, wanted: Driver) -> Result<()> {
        if self.loaded == wanted {
            return Ok(());
        }
        match self.loaded {
            Driver::Ours | Driver::Wasteful => sh::run(&["rmmod", "xen_blkback_rs"])?,
            Driver::C(_) => sh::run(&["rmmod", "xen_blkback"])?,
            Driver::None => String::new(),
        };
        self.loaded = Driver::None;
        let name = match wanted {
            Driver::Ours | Driver::Wasteful => {
                let file = match wanted {
                    Driver::Wasteful => WASTEFUL,
                    _ => &self.ours,
                };
                sh::run(&["insmod", file])?;
                "xen-blkback-rs"
            }
            Driver::C(parameter) => {
                sh::run(&["modprobe", "xen-blkback", parameter])?;
                "vbd"
            }
            Driver::None => return Ok(()),
        };
        self.loaded = wanted;
        let dir = Path::new("/sys/bus/xen-backend/drivers").join(name);
        sh::wait_for("the registration of the driver", || Ok(dir.exists()))
    }

    /// The modules of dom0 and where their text begins.
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

#[cfg(test)]
mod tests {
    use super::place;

    #[test]
    fn place_of_a_module() {
        let line = "null_blk 98304 1 - Live 0xffffffffc0a11000 (E)";
        let found = place(line).unwrap();
        assert_eq!(found, ("null_blk".into(), "ffffffffc0a11000".into()));
    }
}
