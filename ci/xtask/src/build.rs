// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Building the kernel module and the programs.

use crate::kernel::Dom0Kernel;
use crate::root::Root;
use crate::steps::{self, RunningStep, StepKind};
use crate::{artifacts, cache, run};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The target of programs that run in dom0.
pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Returns the root of the checkout.
pub(crate) fn repository() -> Result<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    dir.canonicalize()
        .context("the checkout that this program was built from is gone: build it again")
}

/// Result of a build.
#[derive(Debug)]
pub(crate) struct BuildResult {
    /// The module.
    pub(crate) module: PathBuf,
    /// The folder with the programs.
    pub(crate) programs: PathBuf,
    /// The folder with these programs and their debug information.
    pub(crate) debuggable: PathBuf,
}

/// Builds everything.
pub(crate) fn all() -> Result<BuildResult> {
    let debuggable = debuggable()?;
    Ok(BuildResult {
        programs: stripped(&debuggable)?,
        debuggable,
        module: module()?,
    })
}

/// Builds the kernel module and returns the path of the .ko. The compiler's messages are shown.
pub(crate) fn module() -> Result<PathBuf> {
    module_for(Dom0Kernel::Stock)
}

/// Builds the module like [`module`], for this kernel.
pub(crate) fn module_for(kernel: Dom0Kernel) -> Result<PathBuf> {
    let name = match kernel {
        Dom0Kernel::Stock => "module",
        Dom0Kernel::Checked => "module-checked",
    };
    compile(name, &repository()?, kernel, &[])
}

/// Builds the module like [`module`], from the Kbuild in `source`.
pub(crate) fn module_of(source: &Path) -> Result<PathBuf> {
    compile("module", source, Dom0Kernel::Stock, &[])
}

/// Builds the module so that it wastes the driver's savings; only the gate of the bench uses it.
pub(crate) fn wasteful_module() -> Result<PathBuf> {
    planted("module-wasteful", "bench_wasteful")
}

/// Builds the module with faults that the tests must find (`blkback/src/fault_injection.rs`).
pub(crate) fn faulty_module() -> Result<PathBuf> {
    planted("module-faulty", "planted_faults")
}

/// Builds the module of the checkout with this cfg; such a build is never shipped.
fn planted(name: &str, cfg: &str) -> Result<PathBuf> {
    let flag = format!("RUSTFLAGS_MODULE=--cfg={cfg}");
    compile(name, &repository()?, Dom0Kernel::Stock, &[&flag])
}

/// Builds the module of `source` in the folder of objects `name`, with more words for make.
fn compile(name: &str, source: &Path, kernel: Dom0Kernel, flags: &[&str]) -> Result<PathBuf> {
    let objects = objects(name, source, kernel)?;
    let _lock = cache::lock(&objects.with_extension("lock"))?;
    let _step = RunningStep::begin(StepKind::Build, name, &format!("compiling {name}"));
    run::shown(make(source, &objects, kernel)?.args(flags))?;
    let module = objects.join("xen-blkback-rs.ko");
    anyhow::ensure!(
        module.exists(),
        "Kbuild made no xen-blkback-rs.ko: the top-level Kbuild must say obj-m := xen-blkback-rs.o"
    );
    Ok(module)
}

/// Returns clippy's messages about the module. The build uses clippy, which changes the generated code, so the result
/// is never loaded.
pub(crate) fn clippy_messages() -> Result<String> {
    let source = repository()?;
    let objects = objects("module-clippy", &source, Dom0Kernel::Stock)?;
    let _lock = cache::lock(&objects.with_extension("lock"))?;
    // Up to date files would not be checked, and their warnings would be lost.
    run::remove_tree(&objects)?;
    fs::create_dir_all(&objects)?;
    let _step = RunningStep::begin(
        StepKind::Build,
        "clippy of the module",
        "looking at the module with clippy",
    );
    let out = make(&source, &objects, Dom0Kernel::Stock)?
        .arg("CLIPPY=1")
        .output()?;
    let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).replace("/mnt/b/", "");
    anyhow::ensure!(
        out.status.success(),
        "the module does not build with clippy:\n{text}"
    );
    Ok(text)
}

/// Returns the folder for the objects of a build, which depend on the path of the checkout and on the tree that they
/// are built against.
fn objects(name: &str, source: &Path, kernel: Dom0Kernel) -> Result<PathBuf> {
    let tree = artifacts::kernel_tree(&artifacts::build_root()?, kernel)?;
    let key = cache::key(&[&source.to_string_lossy(), &tree.to_string_lossy()]);
    let objects = cache::dir()?.join(format!("{name}-{key}"));
    fs::create_dir_all(&objects)?;
    Ok(objects)
}

/// Returns the make that builds the module of `source` into `objects`.
fn make(source: &Path, objects: &Path, kernel: Dom0Kernel) -> Result<Command> {
    let build_root = artifacts::build_root()?;
    let root = Root::new(&build_root)
        .bind_read_only(&artifacts::kernel_tree(&build_root, kernel)?, "/mnt/a")
        .bind_read_only(source, "/mnt/b")
        .bind(objects, "/mnt/c");
    Ok(kmake(&root))
}

/// Returns the make that builds a module in a root that has the kernel's tree at `/mnt/a`, the source at `/mnt/b` and
/// the objects at `/mnt/c`.
pub(crate) fn kmake(root: &Root) -> Command {
    let mut make = root.command("/mnt/a/kmake");
    make.args(["-s", "M=/mnt/b", "MO=/mnt/c"]);
    // Type information for tracers needs the kernel's unstripped image, which Debian does not ship.
    make.args(["CONFIG_DEBUG_INFO_BTF_MODULES=", "modules"]);
    make
}

/// Builds the programs statically linked, so that they run in dom0 whatever libc the host has. Returns their folder,
/// without debug information, which is the larger part.
pub(crate) fn programs() -> Result<PathBuf> {
    stripped(&debuggable()?)
}

fn stripped(built: &Path) -> Result<PathBuf> {
    let stripped = built.with_file_name("stripped");
    fs::create_dir_all(&stripped)?;
    let _lock = cache::lock(&stripped.with_extension("lock"))?;
    for program in program_files(built)? {
        let place = stripped.join(program.file_name().context("a program has a name")?);
        // Another process may be copying the existing one.
        let new = place.with_extension("new");
        let mut strip = Command::new("strip");
        run::shown(strip.arg("--strip-debug").arg("-o").args([&new, &program]))?;
        fs::rename(&new, &place)?;
    }
    Ok(stripped)
}

/// Builds the programs with debug information; returns their folder.
fn debuggable() -> Result<PathBuf> {
    let repository = repository()?;
    // A folder of its own, because other flags would make cargo rebuild everything each time.
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
    // The debug information of a crate's C code must not contain that path either.
    let of_c = format!("-ffile-prefix-map={}={CRATES}", home()?.display());
    cargo
        .env("CFLAGS", of_c)
        .env("CARGO_ENCODED_RUSTFLAGS", flags()?.join("\x1f"))
        .env(
            "RUSTC_WORKSPACE_WRAPPER",
            repository.join("ci/rustc-of-workspace"),
        )
        .env("CARGO_PROFILE_RELEASE_DEBUG", "line-tables-only")
        .current_dir(&repository);
    let _step = RunningStep::begin(StepKind::Build, "programs", "compiling the programs");
    run::shown(&mut cargo)?;
    Ok(target.join(TARGET).join("release"))
}

/// Path of other projects' crates in the programs' debug information.
const CRATES: &str = "/usr/src/cargo";

/// Returns the path of the crates.
pub(crate) fn home() -> Result<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    home.context("neither CARGO_HOME nor HOME says where cargo keeps its crates")
}

/// Flags of the compiler for all crates. They are equal in all checkouts, so that a folder of objects can be copied to
/// another one; `ci/rustc-of-workspace` adds the flag that is not.
fn flags() -> Result<Vec<String>> {
    let home = home()?;
    Ok(vec![
        "-Ctarget-feature=+crt-static".into(),
        format!("--remap-path-prefix={}={CRATES}", home.display()),
    ])
}

/// Returns the cargo that started this program, without its settings for this program.
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

/// Copies the results of a build into `dir`: the module and the programs.
pub(crate) fn copy_to(built: &BuildResult, dir: &Path) -> Result<()> {
    fs::create_dir_all(dir)?;
    fs::copy(&built.module, dir.join("xen-blkback-rs.ko"))?;
    for program in program_files(&built.programs)? {
        let name = program.file_name().context("a program has a name")?;
        fs::copy(&program, dir.join(name))?;
    }
    Ok(())
}

/// Returns the executables in a cargo output folder.
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
