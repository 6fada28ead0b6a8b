// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The module and the programs for arm64, compiled on amd64; tests of what both share run in QEMU's emulation of a
//! process. No machine is booted.

use crate::cache::{self, Artefact};
use crate::root::Root;
use crate::tally::TestTally;
use crate::{artifacts, build, host, kernel, run};
use anyhow::{ensure, Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const KERNEL_PACKAGES: &str = include_str!("../../recipes/arm64-kernel.packages");
const KERNEL_HOOK: &str = include_str!("../../recipes/arm64-kernel.hook");
const PROGRAMS_PACKAGES: &str = include_str!("../../recipes/arm64-programs.packages");
const TARGET: &str = "aarch64-unknown-linux-gnu";
/// Crates whose tests have no other program to call.
const TESTED: &[&str] = &["ring", "xenbus", "blkback"];

/// Builds all, and runs the tests.
pub(crate) fn tests(tally: &mut TestTally, _seed: Option<u64>) -> Result<()> {
    tally.check("arm64.module", module().map(drop));
    let root = programs_root()?;
    let programs = ["check", "--workspace", "--exclude", "xtask", "--bins"];
    tally.check("arm64.programs", cargo(&root, &programs));
    let of = TESTED.iter().flat_map(|name| ["-p", name]);
    let tests: Vec<_> = ["test", "--lib", "--tests"].into_iter().chain(of).collect();
    tally.check("arm64.tests", cargo(&root, &tests));
    Ok(())
}

/// Returns the release of the stock kernel for arm64.
fn release() -> Result<String> {
    let release = kernel::release()?;
    let version = release
        .strip_suffix("-amd64")
        .with_context(|| format!("{release} is no kernel for amd64"))?;
    Ok(format!("{version}-arm64"))
}

/// Returns a Debian tree with the compilers of the stock kernel, its configuration and its source.
fn kernel_root() -> Result<PathBuf> {
    host::prepare()?;
    let release = release()?;
    Artefact {
        name: "arm64-kernel-root",
        title: "the build root of the module for arm64",
        about: "3 min",
        inputs: vec![host::SUITE, KERNEL_PACKAGES, KERNEL_HOOK, &release],
    }
    .get(|dir, log| {
        let hook = Some((KERNEL_HOOK, release.as_str()));
        artifacts::debian_for_arm64(dir, log, KERNEL_PACKAGES, hook)
    })
}

/// Returns a Debian tree with a compiler for programs: newer than the kernel's.
fn programs_root() -> Result<PathBuf> {
    host::prepare()?;
    Artefact {
        name: "arm64-programs-root",
        title: "the build root of the programs for arm64",
        about: "2 min",
        inputs: vec![host::SUITE, PROGRAMS_PACKAGES],
    }
    .get(|dir, log| {
        artifacts::debian_for_arm64(dir, log, PROGRAMS_PACKAGES, None)?;
        for place in ["mnt/a", "mnt/b", "mnt/c"] {
            fs::create_dir_all(dir.join(place))?;
        }
        Ok(())
    })
}

/// Returns the tree that the module is compiled against.
fn tree(root: &Path) -> Result<PathBuf> {
    let id = artifacts::folder_name(root)?;
    Artefact {
        name: "kernel-tree-arm64",
        title: "the Rust tree of the kernel for arm64",
        about: "2 min",
        inputs: vec![&id, artifacts::KERNEL_TREE],
    }
    .get(|dir, log| {
        let root = Root::new(root).bind(dir, "/mnt/a");
        let mut script = root.script(artifacts::KERNEL_TREE);
        run::logged(script.args(["kernel-tree", &release()?, "/mnt/a"]), log)
    })
}

/// Compiles and links the module, whose symbols must all be exported by the stock kernel; returns its path.
fn module() -> Result<PathBuf> {
    let source = build::repository()?;
    let root = kernel_root()?;
    let tree = tree(&root)?;
    let objects = source.join("target/arm64/module");
    fs::create_dir_all(&objects)?;
    let _lock = cache::lock(&objects.with_extension("lock"))?;
    let root = Root::new(&root)
        .bind_read_only(&tree, "/mnt/a")
        .bind_read_only(&source, "/mnt/b")
        .bind(&objects, "/mnt/c");
    run::shown(&mut build::kmake(&root))?;
    let module = objects.join("xen-blkback-rs.ko");
    ensure!(module.exists(), "Kbuild made no {}", module.display());
    Ok(module)
}

/// Runs cargo for arm64. The crates are those that the host's cargo has fetched.
fn cargo(root: &Path, words: &[&str]) -> Result<()> {
    let source = build::repository()?;
    let mut fetch = Command::new("cargo");
    run::shown(
        fetch
            .args(["fetch", "--locked", "--quiet"])
            .current_dir(&source),
    )?;
    let target = source.join("target/arm64/programs");
    fs::create_dir_all(&target)?;
    let root = Root::new(root)
        .bind(&build::home()?, "/mnt/a")
        .bind_read_only(&source, "/mnt/b")
        .bind(&target, "/mnt/c");
    let mut cargo = root.script("cd /mnt/b && exec cargo \"$@\"");
    cargo
        .args(["cargo", words.first().context("cargo has a verb")?])
        .args(["--locked", "--offline", "--target", TARGET])
        .args(words.iter().skip(1));
    for (name, value) in [
        ("CARGO_HOME", "/mnt/a"),
        ("CARGO_TARGET_DIR", "/mnt/c"),
        ("CARGO_INCREMENTAL", "0"),
        ("CC", "gcc-14"),
        ("CC_aarch64_unknown_linux_gnu", "aarch64-linux-gnu-gcc-14"),
        ("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_LINKER", "gcc-14"),
        (
            "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER",
            "aarch64-linux-gnu-gcc-14",
        ),
        (
            "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER",
            "qemu-aarch64 -L /usr/aarch64-linux-gnu",
        ),
    ] {
        cargo.env(name, value);
    }
    run::shown(&mut cargo)
}
