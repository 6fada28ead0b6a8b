// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl doctor`: whether a host has what serving disks needs.

mod configurations;
mod driver;
mod initramfs;
mod signature;
mod system;
#[cfg(test)]
mod tests;

use crate::host::Host;
use crate::{print, Cli, Error};
use control::supervisor::{Reply, Request};
use control::{Channel, ExitStatus, Failure};
pub(crate) use driver::is_ours;
use initramfs::ListedFiles;
use serde::Serialize;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// How good something is, from which the exit code follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
enum FindingGrade {
    /// As it should be.
    Ok,
    /// An administrator should look at it.
    Warn,
    /// Disks are not served with it.
    Bad,
}

impl FindingGrade {
    fn name(self) -> &'static str {
        match self {
            FindingGrade::Ok => "ok",
            FindingGrade::Warn => "warn",
            FindingGrade::Bad => "bad",
        }
    }

    fn exit_status(self) -> ExitStatus {
        match self {
            FindingGrade::Ok => ExitStatus::Done,
            FindingGrade::Warn => ExitStatus::Found,
            FindingGrade::Bad => ExitStatus::GuestWaits,
        }
    }
}

/// A finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    /// Subject of the check.
    about: &'static str,
    /// How good it is.
    grade: FindingGrade,
    /// Description of the finding.
    what: String,
    /// Remedy.
    remedy: Option<String>,
}

/// Makes a finding that is as it should be.
fn ok(about: &'static str, what: impl Into<String>) -> Finding {
    Finding {
        about,
        grade: FindingGrade::Ok,
        what: what.into(),
        remedy: None,
    }
}

/// Makes a finding at which an administrator should look.
fn warn(about: &'static str, what: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding {
        grade: FindingGrade::Warn,
        remedy: Some(remedy.into()),
        ..ok(about, what)
    }
}

/// Makes a finding with which disks cannot be served.
fn bad(about: &'static str, what: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding {
        grade: FindingGrade::Bad,
        ..warn(about, what, remedy)
    }
}

/// Everything that was found.
#[derive(Debug, Serialize)]
struct Report {
    /// The worst of it.
    grade: FindingGrade,
    /// The findings, in the order of the checks.
    findings: Vec<Finding>,
}

/// Looks at the host.
pub(crate) fn run(cli: &Cli) -> Result<ExitCode, Error> {
    let host = Host::at(&cli.root);
    let report = report(&host, || ask(&cli.socket), initramfs::list);
    if cli.json {
        print(&report)?;
    } else {
        crate::say(&text(&report))?;
    }
    Ok(report.grade.exit_status().into())
}

/// Returns the findings, as text for people.
pub(crate) fn told(cli: &Cli) -> String {
    text(&report(
        &Host::at(&cli.root),
        || ask(&cli.socket),
        initramfs::list,
    ))
}

/// Asks blktapctrl for its version.
fn ask(socket: &Path) -> Result<String, Failure> {
    let mut channel = Channel::connect(socket)?;
    channel.set_timeout(Some(Duration::from_secs(5)))?;
    match channel.ask(Request::Ping, &[])? {
        Reply::Process(process) => Ok(process.program),
        _ => Err(Failure::invalid("blktapctrl answered something else")),
    }
}

fn report(
    host: &Host,
    supervisor: impl FnOnce() -> Result<String, Failure>,
    list: impl Fn(&Path) -> ListedFiles,
) -> Report {
    let mut findings = system::xen(host);
    findings.extend(driver::all(host));
    findings.extend(initramfs::look(host, list));
    findings.extend(signature::look(host));
    if driver::is_ours(host) {
        findings.extend(system::tap(host));
        findings.push(system::supervisor(supervisor()));
        findings.extend(configurations::look(host));
    } else {
        findings.push(ok(
            "tap disks",
            "there are none: xen-blkback-rs neither serves nor is decided for",
        ));
    }
    let unread = host.take_unread();
    findings.extend(unread.into_iter().map(|file| {
        let what = format!("cannot read {}: {}", file.path.display(), file.why);
        warn(
            "files",
            what,
            "be root, and look at the kernel messages (dmesg)",
        )
    }));
    let grades = findings.iter().map(|finding| finding.grade);
    Report {
        grade: grades.max().unwrap_or(FindingGrade::Ok),
        findings,
    }
}

fn text(report: &Report) -> String {
    let line = |finding: &Finding| {
        let Finding {
            about,
            grade,
            what,
            remedy,
        } = finding;
        let remedy = remedy
            .as_ref()
            .map(|remedy| format!("      do: {remedy}\n"));
        format!(
            "{:4}  {about}: {what}\n{}",
            grade.name(),
            remedy.unwrap_or_default()
        )
    };
    report.findings.iter().map(line).collect()
}

/// Returns the problem of a file or folder of root; nothing if it exists, only root may write it, and its permissions
/// go no further than `most`.
fn wrong(host: &Host, path: &str, most: u32) -> Option<String> {
    let data = match host.path(path).metadata() {
        Ok(data) => data,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Some(format!("{path} is not there"))
        }
        Err(error) => return Some(format!("cannot look at {path}: {error}")),
    };
    // Of a tree that a test made it is the test.
    let root = host.path("/").metadata().map_or(0, |data| data.uid());
    if data.uid() != root {
        return Some(format!(
            "{path} belongs to user {}, not to root",
            data.uid()
        ));
    }
    let mode = data.mode() & 0o777;
    let more = mode & !most;
    (more != 0).then(|| format!("{path} has the permissions {mode:o}, which others may use"))
}
