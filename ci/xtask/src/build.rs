// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Building the kernel module and the programs.

use crate::root::Root;
use crate::{cache, recipes, run};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The target of programs that run in dom0.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The checkout.
pub(crate) fn repository() -> Result<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    dir.canonicalize()
        .context("the checkout that this program was built from is gone: build it again")
}

/// What a build made.
#[derive(Debug)]
pub(crate) struct Built {
    /// The module.
    pub(crate) module: PathBuf,
    /// The folder with the programs.
    pub(crate) programs: PathBuf,
}

/// Builds everything.
pub(crate) fn all() -> Result<Built> {
    Ok(Built {
        programs: programs()?,
        module: module(Flavour::Plain)?,
    })
}

/// How Kbuild is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flavour {
    /// The module as it is shipped.
    Plain,
    /// With clippy as the compiler. It changes the code that is made, so this is never loaded.
    Clippy,
}

/// Builds the kernel module and returns the path of the .ko. The compiler's messages are shown.
pub(crate) fn module(flavour: Flavour) -> Result<PathBuf> {
    module_of(&repository()?, flavour)
}

/// As [`module`], from the Kbuild in `source`.
pub(crate) fn module_of(source: &Path, flavour: Flavour) -> Result<PathBuf> {
    let build_root = recipes::build_root()?;
    let tree = recipes::kernel_tree(&build_root)?;
    let name = match flavour {
        Flavour::Plain => "module",
        Flavour::Clippy => "module-clippy",
    };
    // The objects depend on where the checkout is and on the tree they are built against.
    let source_text = source.to_string_lossy();
    let tree_text = tree.to_string_lossy();
    let objects = cache::dir()?.join(format!(
        "{name}-{}",
        cache::key(&[&source_text, &tree_text])
    ));
    fs::create_dir_all(&objects)?;
    let _lock = cache::lock(&objects.join(".lock"))?;
    let root = Root::new(&build_root)
        .bind_read_only(&tree, "/mnt/a")
        .bind_read_only(source, "/mnt/b")
        .bind(&objects, "/mnt/c");
    let mut make = root.command("/mnt/a/kmake");
    make.args(["-s", "M=/mnt/b", "MO=/mnt/c"]);
    if flavour == Flavour::Clippy {
        make.arg("CLIPPY=1");
    }
    run::shown(make.arg("modules"))?;
    let module = objects.join("xen-blkback-rs.ko");
    anyhow::ensure!(
        module.exists(),
        "Kbuild made no xen-blkback-rs.ko: the top-level Kbuild must say obj-m := xen-blkback-rs.o"
    );
    Ok(module)
}

/// Builds the programs so that they run in dom0 whatever libc the host has: statically linked.
/// Returns the folder that holds them.
pub(crate) fn programs() -> Result<PathBuf> {
    let repository = repository()?;
    // A folder of its own: other flags would make cargo build everything again each time.
    let target = repository.join("target/dom0");
    let mut cargo = cargo();
    cargo.args([
        "build",
        "--quiet",
        "--locked",
        "--release",
        "--workspace",
        "--bins",
        "--exclude",
        "xtask",
    ]);
    cargo
        .args(["--target", TARGET, "--target-dir"])
        .arg(&target);
    cargo
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .current_dir(&repository);
    run::shown(&mut cargo)?;
    Ok(target.join(TARGET).join("release"))
}

/// The cargo that started us, without what it told us about ourselves.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") || text == "CARGO"
        {
            command.env_remove(&name);
        }
    }
    command
}

/// Copies what a build made into `dir`: the module and the programs.
pub(crate) fn copy_to(built: &Built, dir: &Path) -> Result<()> {
    fs::create_dir_all(dir)?;
    fs::copy(&built.module, dir.join("xen-blkback-rs.ko"))?;
    for program in program_files(&built.programs)? {
        let name = program.file_name().context("a program has a name")?;
        fs::copy(&program, dir.join(name))?;
    }
    Ok(())
}

/// The executables in a cargo output folder.
pub(crate) fn program_files(dir: &Path) -> Result<Vec<PathBuf>> {
    use std::os::unix::fs::PermissionsExt;
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let executable = path.metadata()?.permissions().mode() & 0o111 != 0;
        if path.is_file() && executable && path.extension().is_none() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
