// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Building the kernel module and the programs.

use crate::kernel::Kernel;
use crate::root::Root;
use crate::steps::{self, Kind, Step};
use crate::{cache, recipes, run};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The target of programs that run in dom0.
pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";

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
    /// The folder with the same programs and what debuggers need.
    pub(crate) debuggable: PathBuf,
}

/// Builds everything.
pub(crate) fn all() -> Result<Built> {
    let debuggable = debuggable()?;
    Ok(Built {
        programs: stripped(&debuggable)?,
        debuggable,
        module: module()?,
    })
}

/// Builds the kernel module and returns the path of the .ko. The compiler's messages are shown.
pub(crate) fn module() -> Result<PathBuf> {
    module_for(Kernel::Stock)
}

/// As [`module`], for this kernel.
pub(crate) fn module_for(kernel: Kernel) -> Result<PathBuf> {
    let name = match kernel {
        Kernel::Stock => "module",
        Kernel::Checked => "module-checked",
    };
    compile(name, &repository()?, kernel, &[])
}

/// As [`module`], from the Kbuild in `source`.
pub(crate) fn module_of(source: &Path) -> Result<PathBuf> {
    compile("module", source, Kernel::Stock, &[])
}

/// The build of the checkout that wastes what the driver saves; only the gate of the bench uses it.
pub(crate) fn wasteful_module() -> Result<PathBuf> {
    planted("module-wasteful", "bench_wasteful")
}

/// The build of the checkout with faults that the tests must find (`blkback/src/planted.rs`).
pub(crate) fn faulty_module() -> Result<PathBuf> {
    planted("module-faulty", "planted_faults")
}

/// A build of the checkout that is never shipped, with this cfg.
fn planted(name: &str, cfg: &str) -> Result<PathBuf> {
    let flag = format!("RUSTFLAGS_MODULE=--cfg={cfg}");
    compile(name, &repository()?, Kernel::Stock, &[&flag])
}

/// Builds the module of `source` in the folder of objects `name`, with more words for make.
fn compile(name: &str, source: &Path, kernel: Kernel, flags: &[&str]) -> Result<PathBuf> {
    let objects = objects(name, source, kernel)?;
    let _lock = cache::lock(&objects.with_extension("lock"))?;
    let _step = Step::begin(Kind::Build, name, &format!("compiling {name}"));
    run::shown(make(source, &objects, kernel)?.args(flags))?;
    let module = objects.join("xen-blkback-rs.ko");
    anyhow::ensure!(
        module.exists(),
        "Kbuild made no xen-blkback-rs.ko: the top-level Kbuild must say obj-m := xen-blkback-rs.o"
    );
    Ok(module)
}

/// All that clippy says of the module. It compiles with clippy, which changes the code that is
/// made, so the result is never loaded.
pub(crate) fn clippy_messages() -> Result<String> {
    let source = repository()?;
    let objects = objects("module-clippy", &source, Kernel::Stock)?;
    let _lock = cache::lock(&objects.with_extension("lock"))?;
    // What is up to date would not be looked at, and its warnings would be lost.
    run::remove_tree(&objects)?;
    fs::create_dir_all(&objects)?;
    let _step = Step::begin(
        Kind::Build,
        "clippy of the module",
        "looking at the module with clippy",
    );
    let out = make(&source, &objects, Kernel::Stock)?
        .arg("CLIPPY=1")
        .output()?;
    let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).replace("/mnt/b/", "");
    anyhow::ensure!(
        out.status.success(),
        "the module does not build with clippy:\n{text}"
    );
    Ok(text)
}

/// The folder for the objects of a build: they depend on where the checkout is and on the tree
/// they are built against.
fn objects(name: &str, source: &Path, kernel: Kernel) -> Result<PathBuf> {
    let tree = recipes::kernel_tree(&recipes::build_root()?, kernel)?;
    let key = cache::key(&[&source.to_string_lossy(), &tree.to_string_lossy()]);
    let objects = cache::dir()?.join(format!("{name}-{key}"));
    fs::create_dir_all(&objects)?;
    Ok(objects)
}

/// The make that builds the module of `source` into `objects`.
fn make(source: &Path, objects: &Path, kernel: Kernel) -> Result<Command> {
    let build_root = recipes::build_root()?;
    let root = Root::new(&build_root)
        .bind_read_only(&recipes::kernel_tree(&build_root, kernel)?, "/mnt/a")
        .bind_read_only(source, "/mnt/b")
        .bind(objects, "/mnt/c");
    let mut make = root.command("/mnt/a/kmake");
    make.args(["-s", "M=/mnt/b", "MO=/mnt/c"]);
    // Type information for tracers needs the kernel's unstripped image, which nobody has.
    make.args(["CONFIG_DEBUG_INFO_BTF_MODULES=", "modules"]);
    Ok(make)
}

/// Builds the programs so that they run in dom0 whatever libc the host has: statically linked.
/// Returns the folder that holds them, without what debuggers need: that is the larger part.
pub(crate) fn programs() -> Result<PathBuf> {
    stripped(&debuggable()?)
}

fn stripped(built: &Path) -> Result<PathBuf> {
    let stripped = built.with_file_name("stripped");
    fs::create_dir_all(&stripped)?;
    let _lock = cache::lock(&stripped.with_extension("lock"))?;
    for program in program_files(built)? {
        let place = stripped.join(program.file_name().context("a program has a name")?);
        // Somebody may be copying the one that is there.
        let new = place.with_extension("new");
        let mut strip = Command::new("strip");
        run::shown(strip.arg("--strip-debug").arg("-o").args([&new, &program]))?;
        fs::rename(&new, &place)?;
    }
    Ok(stripped)
}

/// Builds the programs with what debuggers need; returns the folder that holds them.
fn debuggable() -> Result<PathBuf> {
    let repository = repository()?;
    // A folder of its own: other flags would make cargo build everything again each time.
    let target = repository.join("target/dom0");
    let mut cargo = cargo();
    cargo.args([
        "build",
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
    if !steps::cargo_shows_itself() {
        cargo.arg("--quiet");
    }
    // What is C in a crate, with what debuggers need of it, is not to tell that either.
    let of_c = format!("-ffile-prefix-map={}={CRATES}", home()?.display());
    cargo
        .env("CFLAGS", of_c)
        .env("CARGO_ENCODED_RUSTFLAGS", flags(&repository)?.join("\x1f"))
        .env("CARGO_PROFILE_RELEASE_DEBUG", "line-tables-only")
        .current_dir(&repository);
    let _step = Step::begin(Kind::Build, "programs", "compiling the programs");
    run::shown(&mut cargo)?;
    Ok(target.join(TARGET).join("release"))
}

/// Where the crates of others are, as the programs have it.
const CRATES: &str = "/usr/src/cargo";

/// Where they are.
fn home() -> Result<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    home.context("neither CARGO_HOME nor HOME says where cargo keeps its crates")
}

/// The compiler's flags. Programs are the same wherever they are built, so they tell nothing of where that was.
fn flags(repository: &Path) -> Result<Vec<String>> {
    let told = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
    Ok(vec![
        "-Ctarget-feature=+crt-static".into(),
        told(&home()?, CRATES),
        // The last one that fits counts.
        told(repository, "/usr/src/xen-blkback-rs"),
    ])
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
