// SPDX-License-Identifier: MIT OR Apache-2.0
//! The driver that serves, and the one that the administrator has chosen.

use super::{bad, ok, warn, Finding};
use crate::host::{vbd, Host};
use std::path::PathBuf;

/// Where it is decided that our driver serves: by xen-blkback-rs(8), or by an installation without it.
const DECIDED: [&str; 2] = [
    "/etc/modprobe.d/xen-blkback-rs.conf",
    "/usr/lib/modprobe.d/xen-blkback-rs.conf",
];

/// Folders of settings of modprobe.
const SETTINGS: [&str; 4] = [
    "/etc/modprobe.d",
    "/run/modprobe.d",
    "/usr/lib/modprobe.d",
    "/lib/modprobe.d",
];

/// A driver that may be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Driver {
    Ours,
    C,
    None,
}

impl Driver {
    /// Returns the name, for a message.
    pub(super) fn name(self) -> &'static str {
        match self {
            Driver::Ours => "xen-blkback-rs",
            Driver::C => "the C driver xen-blkback",
            Driver::None => "no driver",
        }
    }

    /// That of a module's name; nothing if it is of something else.
    pub(super) fn named(module: &str) -> Option<Driver> {
        match module.replace('_', "-").as_str() {
            "xen-blkback-rs" => Some(Driver::Ours),
            "xen-blkback" => Some(Driver::C),
            _ => None,
        }
    }
}

fn loaded(host: &Host) -> Driver {
    let is_loaded = |module: &str| host.path("/sys/module").join(module).exists();
    match (is_loaded("xen_blkback_rs"), is_loaded("xen_blkback")) {
        (true, _) => Driver::Ours,
        (false, true) => Driver::C,
        (false, false) => Driver::None,
    }
}

/// True if it is that one.
pub(super) fn is_loaded(host: &Host, driver: Driver) -> bool {
    loaded(host) == driver
}

fn is_decided(host: &Host) -> bool {
    DECIDED.iter().any(|path| host.path(path).exists())
}

/// The driver that is to serve.
pub(super) fn decided(host: &Host) -> Driver {
    match is_decided(host) {
        true => Driver::Ours,
        false => Driver::C,
    }
}

/// The release of the kernel that runs.
pub(super) fn release(host: &Host) -> Option<String> {
    host.optional(&host.path("/proc/sys/kernel/osrelease"))
}

/// Our module for a kernel, if it has one.
pub(super) fn module_file(host: &Host, release: &str) -> Option<PathBuf> {
    let folder = host.path(format!("/lib/modules/{release}"));
    let modules = host.optional(&folder.join("modules.dep"))?;
    let mut files = modules.lines().filter_map(|line| line.split(':').next());
    let is_ours = |file: &&str| {
        let name = file.rsplit('/').next().unwrap_or_default();
        name.starts_with("xen-blkback-rs.ko")
    };
    files.find(is_ours).map(|file| folder.join(file))
}

/// True if our driver serves, or is to.
pub(crate) fn is_ours(host: &Host) -> bool {
    loaded(host) == Driver::Ours || is_decided(host)
}

/// Everything about drivers.
pub(super) fn all(host: &Host) -> Vec<Finding> {
    let mut findings = vec![module(host), serving(host)];
    findings.extend(settings(host));
    findings.extend(without_driver(host));
    findings
}

/// Whether this kernel has our module.
fn module(host: &Host) -> Finding {
    let Some(release) = release(host) else {
        return warn(
            "kernel",
            "its release cannot be read",
            "mount -t proc proc /proc",
        );
    };
    if module_file(host, &release).is_some() {
        return ok("kernel", format!("{release} has the module xen-blkback-rs"));
    }
    let what = format!("{release} has no module xen-blkback-rs");
    let remedy = format!("apt install xen-blkback-rs-modules-{release}; or depmod, if it is there");
    match (is_decided(host), loaded(host)) {
        // It was loaded from somewhere else.
        (_, Driver::Ours) => warn("kernel", format!("{what}, and one is loaded"), remedy),
        (true, _) => bad(
            "kernel",
            format!("{what}: the C driver serves instead"),
            remedy,
        ),
        (false, _) => ok("kernel", what),
    }
}

/// Whether the driver is loaded that was decided for.
fn serving(host: &Host) -> Finding {
    match (loaded(host), is_decided(host)) {
        (Driver::Ours, true) => ok("driver", "xen-blkback-rs is loaded, as it is decided"),
        (Driver::C, false) => ok("driver", "the C driver is loaded, as it is decided"),
        (Driver::Ours, false) => warn(
            "driver",
            "xen-blkback-rs is loaded, and the C driver is decided for",
            "`xen-blkback-rs enable`; else `xen-blkback-rs takeover --to xen-blkback`, while guests work, or the next boot",
        ),
        (Driver::C, true) => warn(
            "driver",
            "the C driver is loaded, and xen-blkback-rs is decided for",
            "`xen-blkback-rs takeover`, while guests work, or the next boot",
        ),
        (Driver::None, true) => warn("driver", "no driver is loaded", "modprobe xen-blkback-rs"),
        (Driver::None, false) => warn("driver", "no driver is loaded", "modprobe xen-blkback"),
    }
}

/// Settings of modprobe that keep our driver away, and those that lead nowhere.
fn settings(host: &Host) -> Vec<Finding> {
    let mut findings = Vec::new();
    for path in DECIDED {
        let path = host.path(path);
        if path.is_symlink() && !path.exists() {
            let what = format!("{} leads nowhere", path.display());
            findings.push(bad(
                "modprobe",
                what,
                "`xen-blkback-rs enable`, or `xen-blkback-rs disable`",
            ));
        }
    }
    for folder in SETTINGS {
        let folder = host.path(folder);
        let names = host.names(&folder).into_iter();
        for name in names.filter(|name| name.ends_with(".conf")) {
            let path = folder.join(name);
            let text = host.optional(&path).unwrap_or_default();
            if let Some(line) = text.lines().find(|line| keeps_away(line)) {
                let what = format!("{} keeps xen-blkback-rs away: {line}", path.display());
                findings.push(bad("modprobe", what, "remove that line"));
            }
        }
    }
    if findings.is_empty() {
        findings.push(ok("modprobe", "nothing keeps a driver away"));
    }
    findings
}

/// Whether a line prevents our driver from being loaded on request.
fn keeps_away(line: &str) -> bool {
    let mut words = line.split_whitespace();
    let command = words.next();
    let name = words.next().unwrap_or_default().replace('_', "-");
    name == "xen-blkback-rs" && matches!(command, Some("blacklist" | "install"))
}

/// Disks of guests that no driver has. Those of blktap's kind may be another program's.
fn without_driver(host: &Host) -> Vec<Finding> {
    let vbds = vbd::all(host).into_iter();
    let alone = vbds.filter(|vbd| vbd.driver.is_none() && vbd.path.starts_with("backend/vbd/"));
    alone
        .map(|vbd| {
            let what = format!("disk {} of guest {} has no driver", vbd.vdev, vbd.guest);
            bad("disks", what, "modprobe xen-blkback")
        })
        .collect()
}
