// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! What a package would install.

use crate::{build, recipes, run};
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;
use std::process::Command;

const MODPROBE: &str = include_str!("../../packaging/xen-blkback-rs.conf");

/// The programs of a dom0 that are installed; the others are tests.
const PROGRAMS: &[&str] = &["tapdisk", "blktapctrl", "tap-ctl"];

/// Installs the module, and the programs of the folder `programs`, below `dir`, which stands for `/`.
pub(crate) fn to(module: &Path, programs: Option<&Path>, dir: &Path) -> Result<()> {
    let release = recipes::release(&recipes::build_root()?)?;
    put(
        module,
        &dir.join(format!(
            "usr/lib/modules/{release}/updates/xen-blkback-rs.ko"
        )),
    )?;
    for program in programs
        .map(build::program_files)
        .transpose()?
        .unwrap_or_default()
    {
        if let Some(name) = PROGRAMS.iter().find(|name| program.ends_with(name)) {
            put(&program, &dir.join("usr/bin").join(name))?;
        }
    }
    let conf = dir.join("usr/lib/modprobe.d");
    fs::create_dir_all(&conf)?;
    fs::write(conf.join("xen-blkback-rs.conf"), MODPROBE)?;
    // Only root writes to what the module loader reads, whatever our umask is.
    run::shown(
        Command::new("chmod")
            .args(["-R", "u=rwX,go=rX"])
            .arg(dir.join("usr")),
    )
}

fn put(file: &Path, place: &Path) -> Result<()> {
    let folder = place.parent().context("a place is in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    fs::copy(file, place).with_context(|| format!("cannot install {}", file.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::MODPROBE;

    #[test]
    fn c_driver_is_kept_away() {
        let lines: Vec<&str> = MODPROBE.lines().collect();
        assert!(lines.contains(&"blacklist xen-blkback"));
        assert!(lines.contains(&"alias xen-backend:vbd xen-blkback-rs"));
        assert!(lines
            .iter()
            .any(|l| l.starts_with("install xen-blkback /sbin/modprobe xen-blkback-rs")));
    }
}
