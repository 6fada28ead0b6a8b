// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Debian packages of what is built: debhelper makes them of the staged files and `ci/packaging/debian`.

use crate::root::Root;
use crate::{build, install, recipes, run};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The files in the folder `debian`, by their names there; `@RELEASE@` in names and texts is the kernel's.
const DEBIAN: &[(&str, &str)] = &[
    ("control", include_str!("../../packaging/debian/control.in")),
    ("rules", include_str!("../../packaging/debian/rules")),
    (
        "copyright",
        include_str!("../../packaging/debian/copyright"),
    ),
    (
        "xen-blkback-rs.install",
        include_str!("../../packaging/debian/xen-blkback-rs.install"),
    ),
    (
        "xen-blkback-rs.prerm",
        include_str!("../../packaging/debian/xen-blkback-rs.prerm"),
    ),
    (
        "xen-blkback-rs.lintian-overrides",
        include_str!("../../packaging/debian/xen-blkback-rs.lintian-overrides"),
    ),
    (
        "xen-blkback-rs-modules-@RELEASE@.lintian-overrides",
        include_str!("../../packaging/debian/modules.lintian-overrides.in"),
    ),
    (
        "xen-blkback-rs-modules-@RELEASE@.install",
        "usr/lib/modules\n",
    ),
    (
        "xen-blkback-rs-modules-@RELEASE@.postinst",
        include_str!("../../packaging/debian/modules.postinst.in"),
    ),
    (
        "xen-blkback-rs-modules-@RELEASE@.postrm",
        include_str!("../../packaging/debian/modules.postinst.in"),
    ),
];

/// Programs whose parts are listed with their licences.
const PROGRAMS: &[&str] = &["blktapctrl", "tapdisk", "tap-ctl", "tapimg"];

const LIFE: &str = include_str!("../../recipes/package-life.sh");
const BESIDE_XEN: &str = include_str!("../../recipes/package-beside-xen.sh");

/// Builds everything and makes the packages in `out`; returns their paths.
pub(crate) fn all(out: &Path) -> Result<Vec<PathBuf>> {
    let built = build::all()?;
    let work = build::repository()?.join("target/package");
    if work.exists() {
        run::remove_tree(&work)?;
    }
    let tree = work.join("tree");
    install::for_package(&built.module, &built.programs, &tree.join("staged"))?;
    fs::create_dir_all(tree.join("debian"))?;
    let release = recipes::release(&recipes::build_root()?)?;
    let commit = Commit::checked_out()?;
    describe(&tree.join("debian"), &release, &commit)?;
    let mut make = Root::new(&recipes::package_root()?)
        .bind(&work, "/mnt/a")
        .script("cd /mnt/a/tree && debian/rules binary");
    make.env("SOURCE_DATE_EPOCH", &commit.seconds);
    run::logged(&mut make, &work.join("log"))?;
    collect(&work, out)
}

/// What Debian's checker says against the packages in `out`.
pub(crate) fn judged(out: &Path) -> Result<()> {
    let mut lintian = Root::new(&recipes::package_root()?)
        .bind_read_only(out, "/mnt/a")
        .script(
            "cd /mnt/a && lintian --allow-root --fail-on error,warning --tag-display-limit 0 *.deb",
        );
    run::output(&mut lintian).map(drop)
}

/// Installs, changes and removes the packages in `out` on a tree that is gone afterwards.
pub(crate) fn live(out: &Path) -> Result<()> {
    tried(out, LIFE)
}

/// Upgrades and removes Xen's package beside those in `out`, on a tree that is gone afterwards.
pub(crate) fn beside_xen(out: &Path) -> Result<()> {
    tried(out, BESIDE_XEN)
}

fn tried(out: &Path, text: &str) -> Result<()> {
    let release = recipes::release(&recipes::build_root()?)?;
    let root = Root::new(&recipes::package_root()?).bind_read_only(out, "/mnt/a");
    let mut script = root.thrown_away().command("sh");
    script.args(["-c", text, "package", &release]);
    run::output(&mut script).map(drop)
}

/// The commit that is packaged.
struct Commit {
    version: String,
    /// When it was made, in seconds since 1970 and as a changelog has it.
    seconds: String,
    date: String,
    author: String,
}

impl Commit {
    fn checked_out() -> Result<Commit> {
        let repository = build::repository()?;
        let ask = |format: &str, date: &str| -> Result<String> {
            let mut git = Command::new("git");
            git.args(["log", "-1", &format!("--format={format}")]);
            git.arg(format!("--date=format:{date}"))
                .env("TZ", "UTC")
                .current_dir(&repository);
            let text = run::output(&mut git).context("only a git checkout has a version")?;
            Ok(text.trim().to_string())
        };
        Ok(Commit {
            version: ask(
                concat!(env!("CARGO_PKG_VERSION"), "~git%cd.%h"),
                "%Y%m%d%H%M",
            )?,
            seconds: ask("%ct", "")?,
            date: ask("%cD", "")?,
            author: ask("%an <%ae>", "")?,
        })
    }
}

/// Writes the folder `debian`.
fn describe(debian: &Path, release: &str, commit: &Commit) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    for (name, text) in DEBIAN {
        let place = debian.join(name.replace("@RELEASE@", release));
        let text = text
            .replace("@RELEASE@", release)
            .replace("@MAINTAINER@", &commit.author);
        fs::write(&place, &text).with_context(|| format!("cannot write {}", place.display()))?;
        if text.starts_with("#!") {
            fs::set_permissions(&place, fs::Permissions::from_mode(0o755))?;
        }
    }
    let changelog = format!(
        "xen-blkback-rs ({}) unstable; urgency=medium\n\n  * As in the repository.\n\n -- {}  {}\n",
        commit.version, commit.author, commit.date
    );
    fs::write(debian.join("changelog"), changelog)?;
    fs::write(debian.join("xen-blkback-rs.docs"), "debian/crates\n")?;
    fs::write(debian.join("crates"), crates()?)?;
    Ok(())
}

/// What the programs contain: each crate with its version and its licence.
fn crates() -> Result<String> {
    let mut tree = build::cargo();
    tree.args(["tree", "--locked", "--edges", "normal", "--prefix", "none"]);
    tree.args(["--format", "{p} {l}"]);
    for program in PROGRAMS {
        tree.args(["--package", program]);
    }
    let text = run::output(tree.current_dir(build::repository()?))?;
    // Of our own the folder is told, which is nobody's business.
    let mut lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.contains(" (/") && !line.ends_with("(*)"))
        .collect();
    lines.sort_unstable();
    lines.dedup();
    Ok(lines.join("\n") + "\n")
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
