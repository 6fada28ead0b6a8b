// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Checks of the packages in a folder.

use super::repository;
use crate::root::Root;
use crate::{artifacts, build, run};
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;

const LIFE: &str = include_str!("../../../recipes/package-life.sh");
const BESIDE_XEN: &str = include_str!("../../../recipes/package-beside-xen.sh");
const REPOSITORY: &str = include_str!("../../../recipes/package-repository.sh");
const DKMS: &str = include_str!("../../../recipes/package-dkms.sh");

/// Runs Debian's checker on the packages in `out`.
pub(crate) fn judged(out: &Path) -> Result<()> {
    let mut lintian = Root::new(&artifacts::package_root()?)
        .bind_read_only(out, "/mnt/a")
        .script(
            "cd /mnt/a && lintian --allow-root --fail-on error,warning --tag-display-limit 0 *.deb",
        );
    run::output(&mut lintian).map(drop)
}

/// Installs, changes and removes the packages in `out` on a temporary tree.
pub(crate) fn live(out: &Path) -> Result<()> {
    on_a_tree(out, LIFE)
}

/// Upgrades and removes Xen's package beside those in `out`, on a temporary tree.
pub(crate) fn beside_xen(out: &Path) -> Result<()> {
    on_a_tree(out, BESIDE_XEN)
}

/// Makes a signed repository of the packages in `out`, and reads it as a host does.
pub(crate) fn repository(out: &Path) -> Result<()> {
    let place = build::repository()?.join("target/package-repository");
    if place.exists() {
        run::remove_tree(&place)?;
    }
    let folder = place.join("repository");
    fs::create_dir_all(&folder)?;
    for entry in fs::read_dir(out)? {
        let package = entry?.path();
        let name = package.file_name().context("a file has a name")?;
        fs::copy(&package, folder.join(name))?;
    }
    let keys = place.join("keys");
    let key = repository::key_for_tests(&keys)?;
    repository::sign(&folder, &key, "file:/srv/repository")?;
    on_a_tree(&folder, REPOSITORY)?;
    run::remove_tree(&place)
}

fn on_a_tree(out: &Path, text: &str) -> Result<()> {
    let release = artifacts::release(&artifacts::build_root()?)?;
    let root = Root::new(&artifacts::package_root()?).bind_read_only(out, "/mnt/a");
    let mut script = root.thrown_away().command("sh");
    script.args(["-c", text, "package", &release]);
    run::output(&mut script).map(drop)
}

/// Builds the module from the package of its source in `out` on a host with the kernel's headers.
pub(crate) fn dkms(out: &Path) -> Result<()> {
    // The tree of a kernel is too large for memory.
    let builds = build::repository()?.join("target/package-dkms");
    if builds.exists() {
        run::remove_tree(&builds)?;
    }
    fs::create_dir_all(&builds)?;
    let release = artifacts::release(&artifacts::build_root()?)?;
    let root = Root::new(&artifacts::dkms_root()?)
        .bind_read_only(out, "/mnt/a")
        .bind(&builds, "/var/lib/dkms");
    let mut script = root.thrown_away().command("sh");
    script.args(["-c", DKMS, "package-dkms", &release]);
    run::output(&mut script)?;
    run::remove_tree(&builds)
}
