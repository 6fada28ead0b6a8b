// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Debian packages of the build: debhelper makes them from the staged files and `ci/packaging/debian`.

pub(crate) mod checks;
mod commit;
mod copyright;
mod debian;
mod module_source;
pub(crate) mod repository;
pub(crate) mod reproducible;

use crate::root::Root;
use crate::{artifacts, build, install, run};
use anyhow::{ensure, Context, Result};
use commit::Commit;
use std::fs;
use std::path::{Path, PathBuf};

/// Builds everything and makes the packages in `out`; returns their paths.
pub(crate) fn all(out: &Path) -> Result<Vec<PathBuf>> {
    made("package", &Commit::checked_out()?, out, |_| Ok(()))
}

/// Makes the packages as a newer version with another build of the module, to which tests upgrade a host.
pub(crate) fn next(out: &Path) -> Result<Vec<PathBuf>> {
    let mut commit = Commit::checked_out()?;
    commit.version.push_str("+next");
    made("package-next", &commit, out, |staged| {
        let release = artifacts::release(&artifacts::build_root()?)?;
        let module = format!("usr/lib/modules/{release}/updates/xen-blkback-rs.ko");
        as_another_build(&staged.join(module))
    })
}

/// Bytes in front of the identifier of a build: sizes, a type, and the name `GNU`.
const IDENTIFIER: &[u8] = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0";

/// Gives a module the identifier of another build.
fn as_another_build(module: &Path) -> Result<()> {
    let mut bytes = fs::read(module)?;
    let mut notes = bytes
        .windows(IDENTIFIER.len())
        .enumerate()
        .filter(|(_, at)| *at == IDENTIFIER);
    let (note, _) = notes.next().context("the module has no identifier")?;
    ensure!(notes.next().is_none(), "the module has two identifiers");
    let first = bytes.get_mut(note + IDENTIFIER.len());
    *first.context("the identifier is cut off")? ^= 0xff;
    fs::write(module, bytes).with_context(|| format!("cannot write {}", module.display()))
}

/// Makes packages of the build, after `change` has seen their files.
fn made(
    name: &str,
    commit: &Commit,
    out: &Path,
    change: impl FnOnce(&Path) -> Result<()>,
) -> Result<Vec<PathBuf>> {
    let built = build::all()?;
    let work = build::repository()?.join("target").join(name);
    if work.exists() {
        run::remove_tree(&work)?;
    }
    let tree = work.join("tree");
    install::for_package(&built.module, &built.debuggable, &tree.join("staged"))?;
    change(&tree.join("staged"))?;
    fs::create_dir_all(tree.join("debian"))?;
    module_source::to(&tree.join("staged"), &commit.version)?;
    debian::describe(&tree.join("debian"), commit)?;
    let mut make = Root::new(&artifacts::package_root()?)
        .bind(&work, "/mnt/a")
        .script("cd /mnt/a/tree && debian/rules binary");
    make.env("SOURCE_DATE_EPOCH", &commit.seconds);
    run::logged(&mut make, &work.join("log"))?;
    collect(&work, out)
}

/// Moves the packages from where debhelper leaves them.
fn collect(from: &Path, out: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let mut packages = Vec::new();
    for entry in fs::read_dir(from)? {
        let file = entry?.path();
        if file.extension().is_some_and(|extension| extension == "deb") {
            let name = file.file_name().context("a file has a name")?;
            let place = out.join(name);
            // The folder may be on another file system.
            fs::copy(&file, &place).with_context(|| format!("cannot write {}", place.display()))?;
            fs::remove_file(&file)?;
            packages.push(place);
        }
    }
    packages.sort();
    Ok(packages)
}
