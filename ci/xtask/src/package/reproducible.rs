// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Reproducibility: another build of a commit must give bit-identical packages.

use crate::{build, run};
use anyhow::{ensure, Context, Result};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Makes the packages once more, from a clone in another folder, and compares them with those in `out`.
pub(crate) fn made_again(out: &Path) -> Result<()> {
    let repository = build::repository()?;
    let place = repository.join("target/package-again");
    if place.exists() {
        run::remove_tree(&place)?;
    }
    // A clone has only committed files, and only these have a version.
    let mut changes = Command::new("git");
    changes.args(["status", "--porcelain", "--untracked-files=no"]);
    let changes = run::output(changes.current_dir(&repository))?;
    ensure!(
        changes.is_empty(),
        "commit these first, packages are made of a commit:\n{changes}"
    );
    let checkout = place.join("a-folder-with-a-longer-name");
    let mut clone = Command::new("git");
    clone
        .args(["clone", "--quiet"])
        .arg(&repository)
        .arg(&checkout);
    run::output(&mut clone)?;
    let mut make = Command::new("cargo");
    make.args(["xtask", "package", "--out", "target/packages"])
        .env_remove("CARGO_TARGET_DIR")
        .current_dir(&checkout);
    run::logged(&mut make, &place.join("log"))?;
    compare(out, &checkout.join("target/packages"))?;
    run::remove_tree(&place)
}

/// Checks that both folders have files of equal names and bytes.
fn compare(first: &Path, second: &Path) -> Result<()> {
    let names = names(first)?;
    ensure!(!names.is_empty(), "there is nothing in {}", first.display());
    let others = self::names(second)?;
    ensure!(names == others, "other packages: {names:?}, {others:?}");
    for name in names {
        let (one, other) = (first.join(&name), second.join(&name));
        ensure!(
            fs::read(&one)? == fs::read(&other)?,
            "two builds of one commit are not the same: see `diffoscope {} {}`",
            one.display(),
            other.display()
        );
    }
    Ok(())
}

fn names(folder: &Path) -> Result<BTreeSet<OsString>> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    entries.map(|entry| Ok(entry?.file_name())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_found() {
        let folder = std::env::temp_dir().join(format!("xtask-again-{}", std::process::id()));
        let side = |name: &str, files: &[(&str, &str)]| {
            let side = folder.join(name);
            fs::create_dir_all(&side).unwrap();
            for (name, text) in files {
                fs::write(side.join(name), text).unwrap();
            }
            side
        };
        let first = side("first", &[("a.deb", "a"), ("b.deb", "b")]);
        let same = side("same", &[("a.deb", "a"), ("b.deb", "b")]);
        let fewer = side("fewer", &[("a.deb", "a")]);
        let other = side("other", &[("a.deb", "a"), ("b.deb", "c")]);
        assert!(compare(&first, &same).is_ok());
        let said = |side| compare(&first, side).unwrap_err().to_string();
        assert!(said(&fewer).contains("other packages"));
        assert!(said(&other).contains("b.deb"));
        assert!(compare(&side("none", &[]), &same).is_err());
        fs::remove_dir_all(&folder).unwrap();
    }
}
