// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Debian packages of what is built: debhelper makes them of the staged files and `ci/packaging/debian`.

pub(crate) mod again;
mod commit;
mod copyright;
mod debian;
mod module_source;
pub(crate) mod tried;

use crate::root::Root;
use crate::{build, install, recipes, run};
use anyhow::{Context, Result};
use commit::Commit;
use std::fs;
use std::path::{Path, PathBuf};

/// Builds everything and makes the packages in `out`; returns their paths.
pub(crate) fn all(out: &Path) -> Result<Vec<PathBuf>> {
    let built = build::all()?;
    let work = build::repository()?.join("target/package");
    if work.exists() {
        run::remove_tree(&work)?;
    }
    let tree = work.join("tree");
    install::for_package(&built.module, &built.debuggable, &tree.join("staged"))?;
    fs::create_dir_all(tree.join("debian"))?;
    let commit = Commit::checked_out()?;
    module_source::to(&tree.join("staged"), &commit.version)?;
    debian::describe(&tree.join("debian"), &commit)?;
    let mut make = Root::new(&recipes::package_root()?)
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
            // It may be another file system.
            fs::copy(&file, &place).with_context(|| format!("cannot write {}", place.display()))?;
            fs::remove_file(&file)?;
            packages.push(place);
        }
    }
    packages.sort();
    Ok(packages)
}
