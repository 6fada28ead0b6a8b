// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The folder that a test machine finds at /t.

use crate::artifacts::Machines;
use crate::root::Root;
use crate::{artifacts, build, install, run};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Makes the index of the modules with the payload's modules added, because that takes long in dom0 under emulation.
const DEPMOD: &str = r#"
release=$(cat /kernel-release)
work=$(mktemp -d)
mkdir -p "$work/usr/lib/modules" "$work/usr/lib/depmod.d"
ln -s usr/lib "$work/lib"
cp -as "/usr/lib/modules/$release" "$work/usr/lib/modules/"
cp -a "/mnt/a/usr/lib/modules/$release/." "$work/usr/lib/modules/$release/"
depmod -b "$work" "$release"
find "$work/usr/lib/modules/$release" -maxdepth 1 -type f -name 'modules.*' \
	-exec cp -t "/mnt/a/usr/lib/modules/$release/" {} +
rm -r "$work"
"#;

/// Makes a payload named `name`, whose `/t/run` is the shell script `script`.
pub(crate) fn new(name: &str, script: &str) -> Result<PathBuf> {
    let dir = build::repository()?
        .join("target/vm")
        .join(format!("{name}.payload"));
    run::remove_tree(&dir)?;
    fs::create_dir_all(&dir)?;
    let file = dir.join("run");
    fs::write(&file, format!("#!/bin/bash\n{script}"))?;
    run::shown(Command::new("chmod").arg("+x").arg(&file))?;
    Ok(dir)
}

/// Adds the files of a package; dom0 copies them over its root before it loads a driver.
pub(crate) fn add_installed(
    payload: &Path,
    machines: &Machines,
    module: &Path,
    programs: Option<&Path>,
) -> Result<()> {
    let overlay = payload.join("overlay");
    install::to(module, programs, &overlay)?;
    let root = machines.root()?.bind(&overlay, "/mnt/a");
    run::shown(&mut root.script(DEPMOD)).context("cannot index the modules of the payload")
}

/// Adds a program as /t/NAME.
pub(crate) fn add_program(payload: &Path, program: &Path) -> Result<()> {
    let name = program.file_name().context("a program has a name")?;
    fs::copy(program, payload.join(name)).with_context(|| {
        format!(
            "cannot copy {}: does the workspace have it?",
            program.display()
        )
    })?;
    Ok(())
}

/// Adds a guest as /t/guest: its kernel, and its initramfs with `agent` as the first process.
pub(crate) fn add_guest(payload: &Path, machines: &Machines, agent: &Path) -> Result<()> {
    let guest = payload.join("guest");
    fs::create_dir_all(&guest)?;
    fs::copy(&machines.guest_kernel, guest.join("vmlinuz"))?;
    let added = guest.join("added");
    fs::create_dir_all(&added)?;
    fs::copy(agent, added.join("agent"))?;
    // The kernel unpacks one archive after the other.
    let script = "cd /mnt/b/added && chmod +x agent && echo agent | cpio -o -H newc -R 0:0 --quiet >../agent.cpio
        cat /mnt/a/guest.cpio ../agent.cpio | gzip -1 >../guest.cpio.gz
        rm ../agent.cpio";
    let root = Root::new(&machines.build_root)
        .bind_read_only(&machines.guest, "/mnt/a")
        .bind(&guest, "/mnt/b");
    run::shown(&mut root.script(script)).context("cannot pack the guest's initramfs")?;
    run::remove_tree(&added)
}

/// Adds QEMU's guest agent for guests that want it, beside the guest.
pub(crate) fn add_guest_agent(payload: &Path, machines: &Machines) -> Result<()> {
    let archive = artifacts::guest_agent(&machines.build_root)?;
    let name = archive.file_name().context("an archive has a name")?;
    fs::copy(&archive, payload.join("guest").join(name))
        .with_context(|| format!("cannot copy {}", archive.display()))?;
    Ok(())
}
