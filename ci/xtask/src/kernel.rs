// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Selection of the stock kernel for all builds and tests.
//!
//! The archive keeps several releases side by side for a while. One is chosen by its exact release, which then names
//! every artefact that depends on it, so that an update of the archive does not change a build.

use crate::cache::Artefact;
use crate::{build, host, run};
use anyhow::{bail, Context, Result};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

/// The kernel series that the module is known to work with, the preferred one first. Their differences are in
/// `xenbus/src/linux/versions.rs`; the top-level Kbuild has an equal list.
pub(crate) const SERIES: &[&str] = &["7.3", "7.2"];

/// A kernel of the target suite, as dom0 has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dom0Kernel {
    /// The kernel of the archive.
    Stock,
    /// Built from the stock kernel's source, with the kernel's own checks (`ci/recipes/kernel-checked.config`). Its
    /// release is equal.
    Checked,
}

/// Value of `--kernel`; empty for the default.
static REQUEST: OnceLock<String> = OnceLock::new();

/// Takes the value of `--kernel`: a series such as `7.3`, or a version such as `7.3.4`.
pub(crate) fn request(version: &str) -> Result<()> {
    check(version)?;
    // Main sets it once.
    let _first = REQUEST.set(version.to_string());
    Ok(())
}

fn check(version: &str) -> Result<()> {
    let known = SERIES.iter().any(|series| is_of(version, series));
    if version.is_empty() || known {
        return Ok(());
    }
    bail!(
        "Linux {version} is not a kernel that this module is known to work with: choose one of {}, \
         or make it work (xenbus/src/linux/versions.rs) and add it to ci/xtask/src/kernel.rs and Kbuild",
        SERIES.join(", ")
    )
}

/// Returns true if `version` is `series` or one of its versions.
pub(crate) fn is_of(version: &str, series: &str) -> bool {
    version
        .strip_prefix(series)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// Returns true if the archive has packages of a stock kernel of this series now.
pub(crate) fn offered(series: &str) -> Result<bool> {
    let dir = build::repository()?.join("target/kernels-offered");
    run::remove_tree(&dir)?;
    fs::create_dir_all(&dir)?;
    let names = archive(&dir, &dir.join("log"))?;
    Ok(has_series(&names, series))
}

/// Returns the release of the stock kernel, such as `7.3.4+deb13-amd64`. The first call queries the archive.
pub(crate) fn release() -> Result<String> {
    let request = REQUEST.get().map_or("", String::as_str);
    let known = SERIES.join(" ");
    let dir = Artefact {
        name: "kernel-choice",
        title: "the choice of the kernel",
        about: "5 s",
        inputs: vec![host::SUITE, &known, request],
    }
    .get(|dir, log| {
        let names = archive(dir, log)?;
        let release = choose(&names, request)?;
        Ok(fs::write(dir.join("release"), release)?)
    })?;
    Ok(fs::read_to_string(dir.join("release"))?)
}

/// Returns the names of the kernel packages in the archive, one a line.
fn archive(dir: &Path, log: &Path) -> Result<String> {
    host::prepare()?;
    let sources = dir.join("sources.list");
    fs::write(&sources, host::sources()?)?;
    let lists = dir.join("lists");
    fs::create_dir_all(lists.join("partial"))?;
    // Use only the program of this host's apt, neither its sources nor its lists.
    let options = |command: &mut Command| {
        for (key, value) in [
            ("Dir::Etc::SourceList", sources.as_path()),
            ("Dir::Etc::SourceParts", Path::new("/dev/null")),
            ("Dir::State::Lists", &lists),
            ("Dir::Cache", dir),
        ] {
            command.arg("-o").arg(format!("{key}={}", value.display()));
        }
    };
    let mut update = Command::new("apt-get");
    options(&mut update);
    run::logged(update.args(["-q", "update"]), log)?;
    let mut names = Command::new("apt-cache");
    options(&mut names);
    let out = names.args(["pkgnames", "linux-"]).output()?;
    anyhow::ensure!(
        out.status.success(),
        "apt-cache cannot list the kernels of the archive: {}",
        String::from_utf8_lossy(&out.stderr).trim()
    );
    for rest in ["lists", "pkgcache.bin", "srcpkgcache.bin"] {
        let path = dir.join(rest);
        if path.exists() {
            run::remove_tree(&path)?;
        }
    }
    Ok(String::from_utf8(out.stdout)?)
}

/// Returns true if there are headers of the series. [`choose`] reports other missing packages.
fn has_series(names: &str, series: &str) -> bool {
    let mut releases = names
        .lines()
        .filter_map(|name| name.strip_prefix("linux-headers-"))
        .filter(|release| release.ends_with("-amd64") && !flavoured(release));
    releases.any(|release| is_of(release, series))
}

/// Returns the newest release of the requested version that has headers, an image and its source.
fn choose(names: &str, request: &str) -> Result<String> {
    let asked = [request];
    let wanted: &[&str] = if request.is_empty() { SERIES } else { &asked };
    let has = |name: String| names.lines().any(|line| line == name);
    let releases = names
        .lines()
        .filter_map(|name| name.strip_prefix("linux-headers-"))
        .filter(|release| release.ends_with("-amd64") && !flavoured(release));
    let mut complete: Vec<(Vec<u32>, &str)> = releases
        .filter(|release| has(format!("linux-binary-{release}")))
        .filter_map(|release| Some((numbers(release)?, release)))
        .filter(|(numbers, _)| {
            let series = numbers.iter().take(2).map(u32::to_string);
            has(format!(
                "linux-source-{}",
                series.collect::<Vec<_>>().join(".")
            ))
        })
        .collect();
    complete.sort();
    wanted
        .iter()
        .find_map(|version| {
            let version = numbers(version)?;
            let fits = |(numbers, _): &&(Vec<u32>, &str)| numbers.starts_with(&version);
            complete.iter().rev().find(fits)
        })
        .map(|(_, release)| (*release).to_string())
        .with_context(|| {
            let there: Vec<&str> = complete.iter().map(|(_, release)| *release).collect();
            format!(
                "the archive has no stock kernel {} for {}; it has {}",
                wanted.join(" or "),
                host::SUITE,
                if there.is_empty() {
                    "none".into()
                } else {
                    there.join(", ")
                }
            )
        })
}

/// Returns true for kernels of another kind, such as `7.3.4+deb13-cloud-amd64`.
fn flavoured(release: &str) -> bool {
    release.matches('-').count() > 1
}

/// Returns the numbers of a version, such as 7, 3, 4 of `7.3.4+deb13-amd64`.
fn numbers(version: &str) -> Option<Vec<u32>> {
    let end = version.find(|c: char| !c.is_ascii_digit() && c != '.');
    version[..end.unwrap_or(version.len())]
        .split('.')
        .map(|number| number.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARCHIVE: &str = "linux-source-7.2\nlinux-source-7.3\nlinux-source-6.12
linux-headers-7.2.9+deb13-amd64\nlinux-binary-7.2.9+deb13-amd64
linux-headers-7.2.12+deb13-amd64\nlinux-binary-7.2.12+deb13-amd64
linux-headers-7.2.13+deb13-cloud-amd64\nlinux-binary-7.2.13+deb13-cloud-amd64
linux-headers-7.3.4+deb13-amd64\nlinux-binary-7.3.4+deb13-amd64
linux-headers-7.3.5+deb13-amd64
linux-headers-7.4.1+deb13-amd64\nlinux-binary-7.4.1+deb13-amd64\nlinux-headers-amd64";

    #[test]
    fn the_newest_complete_release_of_a_series_is_taken() {
        assert_eq!(choose(ARCHIVE, "7.2").unwrap(), "7.2.12+deb13-amd64");
        assert_eq!(choose(ARCHIVE, "7.2.9").unwrap(), "7.2.9+deb13-amd64");
        // 7.3.5 has no image yet, and 7.4 is unknown.
        assert_eq!(choose(ARCHIVE, "").unwrap(), "7.3.4+deb13-amd64");
    }

    #[test]
    fn a_series_that_is_not_complete_is_there_all_the_same() {
        assert!(has_series(ARCHIVE, "7.2") && has_series(ARCHIVE, "7.4"));
        assert!(!has_series(ARCHIVE, "7.1") && !has_series(ARCHIVE, "6.12"));
    }

    #[test]
    fn without_the_preferred_series_the_next_one_serves() {
        let older = ARCHIVE.replace("linux-source-7.3\n", "");
        assert_eq!(choose(&older, "").unwrap(), "7.2.12+deb13-amd64");
        let error = choose(&older, "7.3").unwrap_err().to_string();
        assert!(error.contains("no stock kernel 7.3"), "{error}");
        assert!(error.contains("7.2.12+deb13-amd64"), "{error}");
    }

    #[test]
    fn an_unknown_kernel_is_one_clear_sentence() {
        for good in ["", "7.2", "7.3", "7.3.4"] {
            check(good).unwrap();
        }
        for bad in ["7.4", "7.31", "6.12", "x"] {
            let error = check(bad).unwrap_err().to_string();
            assert!(error.starts_with(&format!("Linux {bad} is not")), "{error}");
        }
    }

    #[test]
    fn the_list_of_kernels_is_that_of_kbuild() {
        let kbuild = include_str!("../../../Kbuild");
        let list = kbuild
            .lines()
            .find_map(|line| line.strip_prefix("known-kernels := "))
            .unwrap();
        let mut known: Vec<&str> = list.split_whitespace().collect();
        known.reverse();
        assert_eq!(known, SERIES);
    }
}
