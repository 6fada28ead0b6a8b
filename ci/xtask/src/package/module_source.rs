// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The source of the module, for hosts that build it for their own kernels.

use crate::{build, run};
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Files that Kbuild reads, and their licences.
const SOURCE: &[&str] = &[
    "Kbuild",
    "LICENSES",
    "blkback/src",
    "blktap-kmod/src",
    "ring/include",
    "ring/src",
    "xenbus/shim",
    "xenbus/src",
];

/// Further files: name there and text.
const BESIDE: &[(&str, &str)] = &[
    ("prepare", include_str!("../../../packaging/dkms/prepare")),
    (
        "kernel-tree.sh",
        include_str!("../../../recipes/kernel-tree.sh"),
    ),
];

const DEPMOD: &str = include_str!("../../../packaging/dkms/depmod.conf");

/// Copies the source below `dir`, which stands for `/`.
pub(super) fn to(dir: &Path, version: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let place = dir.join(format!("usr/src/xen-blkback-rs-{version}"));
    let repository = build::repository()?;
    let mut git = Command::new("git");
    git.args(["ls-files", "--"]).args(SOURCE);
    for name in run::output(git.current_dir(&repository))?.lines() {
        write(
            &place.join(name),
            &fs::read_to_string(repository.join(name))?,
        )?;
    }
    for (name, text) in BESIDE {
        let file = place.join(name);
        write(&file, text)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
    }
    write(&dir.join("usr/lib/depmod.d/xen-blkback-rs.conf"), DEPMOD)
}

fn write(file: &Path, text: &str) -> Result<()> {
    let folder = file.parent().context("a file is in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}
