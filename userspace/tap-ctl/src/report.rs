// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl report`: the facts that are needed to find a fault of this host, in one text.
//!
//! The report does not wait for hung parts: programs have a limit, and the reason of a failure stands in the place of
//! the output.

use crate::host::Host;
use crate::program::{output, LIMIT};
use crate::status::Watch;
use crate::time::{now_ms, utc};
use crate::{cli, doctor, Cli, Error};
use control::supervisor::{Filter, Reply, Request, Which};
use control::{json_line, shown_lines, Channel, Code, Failure};
use serde::Serialize;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

/// How long blktapctrl may take for an answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// First lines of the report.
const HEAD: &str = "\
This is what tap-ctl report has found. It names disks, images, guests and this host, and holds nothing of what is on the
disks. Read it before you give it to others.
";

/// Files of the host, with all that is in a folder.
const FILES: &[&str] = &[
    "/proc/sys/kernel/osrelease",
    "/proc/cmdline",
    "/proc/meminfo",
    "/proc/loadavg",
    "/proc/pressure/io",
    "/proc/pressure/memory",
    "/proc/pressure/cpu",
    "/sys/hypervisor/type",
    "/sys/hypervisor/version",
    "/sys/module/xen_blkback_rs/version",
    "/sys/module/xen_blkback_rs/parameters",
    "/sys/module/xen_blkback/parameters",
    "/etc/modprobe.d/xen-blkback-rs.conf",
    "/etc/default/xentap",
    "/run/xentap/disks",
];

/// Programs that know more, and their arguments.
const PROGRAMS: &[&[&str]] = &[
    &["xl", "info"],
    &["xl", "list", "-v"],
    &["xenstore-ls", "-f", "backend/vbd"],
    &["xenstore-ls", "-f", "backend/vbd3"],
    &["dmesg"],
    &["lsblk", "-t"],
    &["losetup", "--list"],
    &[
        "journalctl",
        "--no-pager",
        "-b",
        "-n",
        "2000",
        "-u",
        "blktapctrl",
    ],
    &["journalctl", "--no-pager", "-b", "-n", "2000", "-k"],
];

/// Writes it, and says what is looked at meanwhile.
pub(crate) fn run(cli: &Cli, asked: &cli::Report) -> Result<(), Error> {
    // Before the work of a minute, not after it.
    if let Some(path) = asked.output.as_ref().filter(|path| path.exists()) {
        let why = format!("{} is there already: choose another name", path.display());
        return Err(Failure::new(Code::Exists, why).into());
    }
    let mut parts = Parts {
        parts: Vec::new(),
        tells: io::stderr().is_terminal(),
    };
    let host = Host::at(&cli.root);
    parts.add("tap-ctl", || {
        let now = utc(now_ms());
        format!("tap-ctl {} at {now}", env!("CARGO_PKG_VERSION"))
    });
    parts.add("tap-ctl doctor", || doctor::told(cli));
    parts.add("tap-ctl status --json", || {
        let watch = Watch::new(cli, &asked.watch);
        let (before, now) = watch.looks();
        json(&watch.report(&before, &now))
    });
    supervisor(&mut parts, &cli.socket);
    files(&mut parts, &host);
    // Their output is about the running host, even if files are read elsewhere.
    if cli.root == Path::new("/") {
        for words in PROGRAMS {
            parts.add(&words.join(" "), || program(words));
        }
    }
    parts.end();
    let text = match cli.json {
        true => json_line(&parts.report()).map_err(io::Error::other)? + "\n",
        false => shown_lines(&parts.text()).into_owned(),
    };
    match &asked.output {
        None => Ok(io::stdout().write_all(text.as_bytes())?),
        Some(path) => {
            // Others need not know what this host serves.
            let mut options = File::options();
            let file = options.write(true).create_new(true).mode(0o600).open(path);
            let written = file.and_then(|mut file| file.write_all(text.as_bytes()));
            written.map_err(|error| {
                Failure::system(format!("cannot write {}", path.display()), &error)
            })?;
            Ok(writeln!(
                io::stderr(),
                "tap-ctl: written to {}",
                path.display()
            )?)
        }
    }
}

/// The report of a host.
#[derive(Debug, Serialize)]
pub(crate) struct HostReport<'a> {
    /// Always `report`.
    is: &'static str,
    /// Version of this form: 1.
    version: u32,
    /// Its parts, in the order in which they were read.
    parts: &'a [ReportPart],
}

/// A part of a report.
#[derive(Debug, Serialize)]
pub(crate) struct ReportPart {
    /// The file or the command.
    title: String,
    /// Its text, or the reason why there is none.
    text: String,
}

/// The report so far.
struct Parts {
    parts: Vec<ReportPart>,
    /// A person waits at a terminal.
    tells: bool,
}

impl Parts {
    fn add(&mut self, title: &str, look: impl FnOnce() -> String) {
        self.tell(&format!("\r\x1b[Kreading {}", control::shown(title)));
        self.parts.push(ReportPart {
            title: title.to_owned(),
            text: look().trim_end().to_owned(),
        });
    }

    /// Removes the line for the person who waits.
    fn end(&self) {
        self.tell("\r\x1b[K");
    }

    fn tell(&self, line: &str) {
        if self.tells {
            // The report does not depend on it.
            let _ = write!(io::stderr(), "{line}");
        }
    }

    fn report(&self) -> HostReport<'_> {
        HostReport {
            is: "report",
            version: 1,
            parts: &self.parts,
        }
    }

    fn text(&self) -> String {
        let parts = self.parts.iter();
        let parts = parts.map(|part| format!("\n== {}\n{}\n", part.title, part.text));
        HEAD.to_owned() + &parts.collect::<String>()
    }
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string_pretty(value).unwrap_or_else(|error| error.to_string())
}

/// Adds the answers of blktapctrl about itself and all disks.
fn supervisor(parts: &mut Parts, socket: &Path) {
    let ask = |request: Request| -> Result<Reply, Failure> {
        let mut channel = Channel::connect(socket)?;
        channel.set_timeout(Some(PATIENCE))?;
        channel.ask(request, &[])
    };
    let told = |answer: Result<Reply, Failure>| {
        answer.map_or_else(|no| no.to_string(), |reply| json(&reply))
    };
    parts.add("blktapctrl", || told(ask(Request::Ping)));
    let disks = ask(Request::List(Filter::default()));
    let minors: Vec<u32> = match &disks {
        Ok(Reply::Disks { disks }) => disks.iter().filter_map(|disk| disk.minor).collect(),
        _ => Vec::new(),
    };
    parts.add("blktapctrl: disks", || told(disks));
    for minor in minors {
        let which = || Which {
            minor: Some(minor),
            ..Which::default()
        };
        parts.add(&format!("blktapctrl: statistics of disk {minor}"), || {
            told(ask(Request::Stats(which())))
        });
        parts.add(
            &format!("blktapctrl: dirty bitmaps of disk {minor}"),
            || told(ask(Request::Marks(which()))),
        );
    }
}

fn files(parts: &mut Parts, host: &Host) {
    for path in FILES {
        let here = host.path(path);
        if !here.is_dir() {
            parts.add(path, || {
                host.optional(&here)
                    .unwrap_or_else(|| "it is not there".into())
            });
            continue;
        }
        for name in host.names(&here) {
            let text = || host.optional(&here.join(&name)).unwrap_or_default();
            parts.add(&format!("{path}/{name}"), text);
        }
    }
    let unread = host.take_unread();
    if !unread.is_empty() {
        parts.add("unreadable files", || json(&unread));
    }
}

/// Returns the output of a program, or the failure.
fn program(words: &[&str]) -> String {
    match output(words, LIMIT) {
        Ok(said) => {
            let (text, errors) = (
                String::from_utf8_lossy(&said.stdout),
                String::from_utf8_lossy(&said.stderr),
            );
            let end = if said.status.success() {
                String::new()
            } else {
                format!("\n{}", said.status)
            };
            format!("{text}{errors}{end}")
        }
        Err(error) => format!("cannot run {}: {error}", words[0]),
    }
}

#[cfg(test)]
mod tests {
    use super::{files, program, supervisor, Parts, FILES};
    use crate::host::made::Made;
    use std::path::Path;

    fn parts() -> Parts {
        Parts {
            parts: Vec::new(),
            tells: false,
        }
    }

    #[test]
    fn what_is_there_is_told_and_what_is_not_too() {
        let made = Made::new();
        made.file("/proc/sys/kernel/osrelease", "7.3-amd64\n");
        made.file("/sys/module/xen_blkback_rs/parameters/max_queues", "4\n");
        made.file("/run/xentap/disks/0.json", "{\"minor\":0}\n");
        let mut found = parts();
        files(&mut found, &made.host());
        for wanted in [
            "== /proc/sys/kernel/osrelease\n7.3-amd64\n",
            "== /sys/module/xen_blkback_rs/parameters/max_queues\n4\n",
            "== /run/xentap/disks/0.json\n{\"minor\":0}\n",
            "== /proc/cmdline\nit is not there\n",
        ] {
            assert!(
                found.text().contains(wanted),
                "{wanted} of {}",
                found.text()
            );
        }
        assert!(FILES.iter().all(|path| path.starts_with('/')));
    }

    /// Tests that a report shows failures, because a host on which nothing answers is the one that needs a report.
    #[test]
    fn what_does_not_answer_is_told_in_its_place() {
        let mut found = parts();
        supervisor(&mut found, Path::new("/nowhere/control.sock"));
        assert!(found.text().contains("== blktapctrl\n"), "{}", found.text());
        assert!(
            found.text().contains("/nowhere/control.sock"),
            "{}",
            found.text()
        );
        assert!(program(&["false"]).contains("exit status: 1"));
        assert!(program(&["no-such-program-here"]).contains("no-such-program-here"));
        assert_eq!(program(&["echo", "hello"]).trim(), "hello");
    }
}
