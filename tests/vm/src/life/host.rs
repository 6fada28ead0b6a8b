// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The host as its administrator sees it: apt, systemd, and which driver serves.

use crate::sh::{self, Output};
use crate::{sys, tap};
use anyhow::{ensure, Context, Result};
use std::process::{Child, Command};
use std::time::Duration;

/// A boot, and what apt does, take long in emulation.
const LONG: Duration = Duration::from_secs(600);
/// systemd starts the supervisor again within this time.
const LIMIT: Duration = Duration::from_secs(120);
/// The folder that apt installs from, as it is indexed.
const INDEX: &str = "/t/repository/Packages";
/// The package of the programs.
const PROGRAMS: &str = "xen-blkback-rs";

/// The package of the module.
fn of_module() -> Result<String> {
    let release = sh::run(&["uname", "-r"])?;
    Ok(format!("{PROGRAMS}-modules-{}", release.trim()))
}

/// The two versions that there are: this one and the next.
pub(super) fn versions() -> Result<[String; 2]> {
    let index = sh::get(INDEX)?;
    let of_programs = index.split("\n\n").filter(|its| {
        its.lines()
            .any(|line| line == format!("Package: {PROGRAMS}"))
    });
    let mut versions: Vec<String> = of_programs
        .filter_map(|its| its.lines().find_map(|line| line.strip_prefix("Version: ")))
        .map(str::to_owned)
        .collect();
    versions.sort();
    let count = versions.len();
    <[String; 2]>::try_from(versions)
        .ok()
        .with_context(|| format!("{INDEX} has {count} versions of {PROGRAMS}"))
}

/// apt-get without questions.
const APT: &[&str] = &[
    "env",
    "DEBIAN_FRONTEND=noninteractive",
    "apt-get",
    "--yes",
    "--quiet",
    "-o",
    "Dpkg::Use-Pty=0",
];

/// Runs apt-get.
pub(super) fn apt(arguments: &[&str]) -> Result<Output> {
    sh::status(&[APT, arguments].concat(), LONG)
}

/// Runs apt-get, which must succeed; returns its output.
pub(super) fn apt_does(arguments: &[&str]) -> Result<String> {
    succeeded(apt(arguments)?, &format!("apt-get {}", arguments.join(" ")))
}

/// Returns the output of a program, which must have succeeded.
fn succeeded(done: Output, what: &str) -> Result<String> {
    ensure!(
        done.rc == 0,
        "{what} failed: {}",
        sh::tail(&done.text, 2000)
    );
    Ok(done.text)
}

/// Lets dpkg finish an interrupted run, as apt-get advises; returns the output.
pub(super) fn dpkg_ends() -> Result<String> {
    let done = sh::status(&["dpkg", "--configure", "-a"], LONG)?;
    succeeded(done, "dpkg --configure -a")
}

/// Starts apt-get without waiting, for a caller that acts during that.
pub(super) fn apt_begins(arguments: &[&str]) -> Result<Child> {
    let mut command = Command::new(APT[0]);
    command.args(&APT[1..]).args(arguments);
    command.spawn().context("cannot start apt-get")
}

/// Returns apt's names for both packages in a version.
pub(super) fn both(version: &str) -> Result<[String; 2]> {
    Ok(packages()?.map(|package| format!("{package}={version}")))
}

/// The names of both packages.
pub(super) fn packages() -> Result<[String; 2]> {
    Ok([PROGRAMS.to_owned(), of_module()?])
}

/// Waits until systemd has started all units, none of which may have failed.
pub(super) fn is_up() -> Result<()> {
    sh::wait_for("the end of the boot", LONG, || {
        let state = sh::status(&["systemctl", "is-system-running"], LONG)?;
        Ok(matches!(state.stdout.trim(), "running" | "degraded"))
    })?;
    nothing_failed()
}

/// No unit of systemd has failed.
pub(super) fn nothing_failed() -> Result<()> {
    let failed = sh::run(&[
        "systemctl",
        "list-units",
        "--failed",
        "--plain",
        "--no-legend",
    ])?;
    let first = failed.split_whitespace().next();
    let Some(unit) = first else {
        return Ok(());
    };
    let said = sh::run(&["journalctl", "--no-pager", "-n", "20", "-u", unit])?;
    anyhow::bail!("units have failed: {failed}: {}", sh::tail(&said, 1000))
}

/// Returns a property of a unit from systemd.
pub(super) fn property(unit: &str, name: &str) -> Result<String> {
    let said = sh::run(&["systemctl", "show", "--value", "-p", name, unit])?;
    Ok(said.trim().to_owned())
}

/// Whether a unit is active.
pub(super) fn is_active(unit: &str) -> Result<bool> {
    Ok(property(unit, "ActiveState")? == "active")
}

/// Checks that the exposure of a unit, as systemd rates it in tenths, is at most `most`.
pub(super) fn is_hardened(unit: &str, most: u32) -> Result<()> {
    let most = format!("--threshold={most}");
    let analyze = ["systemd-analyze", "security", "--no-pager", &most, unit];
    let said = sh::status(&analyze, LONG)?;
    ensure!(
        said.rc == 0,
        "{unit} has more than {most}: {}",
        sh::tail(&said.text, 400)
    );
    Ok(())
}

/// The process of the supervisor.
pub(super) fn supervisor() -> Result<u32> {
    let pid = property("blktapctrl.service", "MainPID")?;
    let pid = pid.parse().ok().filter(|pid| *pid != 0);
    pid.context("systemd runs no blktapctrl.service")
}

/// Kills the supervisor, and waits until systemd has started another one, which answers.
pub(super) fn replace_supervisor() -> Result<()> {
    let old = supervisor()?;
    sys::kill(old, libc::SIGKILL)?;
    sh::wait_for("another supervisor", LIMIT, || {
        Ok(supervisor().is_ok_and(|pid| pid != old))
    })?;
    tap::wait_supervisor()
}
