// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Requirements of the host: root, a few packages, and its sources of packages.

use anyhow::{bail, Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

/// The Debian release of the target.
pub(crate) const SUITE: &str = "trixie";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A program that the host needs, and its package.
const NEEDS: &[(&str, &str)] = &[
    ("mmdebstrap", "mmdebstrap"),
    ("unshare", "util-linux"),
    ("setpriv", "util-linux"),
    ("tar", "tar"),
    ("git", "git"),
    ("dpkg-deb", "dpkg"),
    ("gpg", "gpg"),
];

/// The process must stop with exit code 3, because the host lacks something that only its administrator can provide.
#[derive(Debug)]
pub(crate) struct HostLacks(pub(crate) String);

impl std::fmt::Display for HostLacks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for HostLacks {}

/// Ensures that the host has the programs for the artefacts: installs missing ones as root, otherwise reports the
/// command to type.
pub(crate) fn prepare() -> Result<()> {
    packages()?;
    // A container may prevent even root from mounting.
    let mut probe = Command::new("unshare");
    let out = probe
        .args(["-m", "mount", "--make-rprivate", "/"])
        .output()?;
    if out.status.success() {
        return Ok(());
    }
    bail!(HostLacks(format!(
        "no file system can be mounted here ({}); in a container, start it with --privileged",
        String::from_utf8_lossy(&out.stderr).trim()
    )))
}

/// References for the tests on the host: Xen's own headers and a compiler to read them, QEMU's tools for images, clients
/// of NBD servers, a backup program with a repository, and a tool that shows which pages of a file are in memory.
const TEST_NEEDS: &[(&str, &str)] = &[
    ("/usr/bin/cc", "gcc"),
    ("/usr/include/xen/io/blkif.h", "libxen-dev"),
    ("/usr/bin/qemu-img", "qemu-utils"),
    ("/usr/bin/nbdinfo", "libnbd-bin"),
    ("/usr/bin/fio", "fio"),
    ("/usr/bin/restic", "restic"),
    ("/usr/bin/fincore", "util-linux-extra"),
];

/// Folder in `target` where packages are unpacked without an installation. The tests look there.
const UNPACKED: &str = "target/host-tools";
/// The daemon of sanlock there, and its packages. An installation would start it on this machine, with a watchdog that
/// resets a machine which stops it.
const SANLOCK: (&str, &str) = ("usr/sbin/sanlock", "sanlock libsanlock1");

/// Installs these references, as root; otherwise the tests skip themselves and report the reason.
pub(crate) fn for_tests() -> Result<()> {
    let missing: Vec<&str> = TEST_NEEDS
        .iter()
        .filter(|(file, _)| !Path::new(file).exists())
        .map(|(_, package)| *package)
        .collect();
    if missing.is_empty() || !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    install(&missing.join(" "))
}

/// Provides the daemon of sanlock, for its tests.
pub(crate) fn for_sanlock() -> Result<()> {
    unpack(SANLOCK)
}

/// Unpacks packages with a program, if that does not exist there yet.
fn unpack((program, packages): (&str, &str)) -> Result<()> {
    let folder = crate::build::repository()?.join(UNPACKED);
    if folder.join(program).exists() {
        return Ok(());
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    eprintln!("unpacking {packages} in {} ...", folder.display());
    // Lists of packages may be old or missing; only root can update them.
    let script = format!(
        "rm -f *.deb; apt-get download -qq {packages} || {{ apt-get update -qq && apt-get download -qq {packages}; }} || exit; \
         for file in *.deb; do dpkg-deb -x \"$file\" . || exit; done; rm -f *.deb"
    );
    crate::run::shown(
        Command::new("sh")
            .current_dir(&folder)
            .args(["-c", &script])
            .stdin(std::process::Stdio::null()),
    )
    .with_context(|| format!("the host has no {packages} and apt-get did not fetch them"))
}

/// Two artefacts are built concurrently, and apt-get does not wait for itself.
static INSTALLING: Mutex<()> = Mutex::new(());

fn packages() -> Result<()> {
    let _alone = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
    let mut missing: Vec<&str> = NEEDS
        .iter()
        .filter(|(program, _)| find(program).is_none())
        .map(|(_, package)| *package)
        .collect();
    if !Path::new(KEYRING).exists() {
        missing.push("debian-archive-keyring");
    }
    let root = nix::unistd::geteuid().is_root();
    if missing.is_empty() {
        return if root {
            Ok(())
        } else {
            Err(HostLacks(need_root()).into())
        };
    }
    let packages = missing.join(" ");
    if !root {
        bail!(HostLacks(format!(
            "the host lacks {packages}; run: sudo apt-get install -y --no-install-recommends {packages}"
        )));
    }
    install(&packages)
}

fn install(packages: &str) -> Result<()> {
    eprintln!("installing {packages} on the host ...");
    let script = format!(
        "apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
         apt-get install -y -qq --no-install-recommends {packages} >/dev/null"
    );
    crate::run::shown(
        Command::new("sh")
            .args(["-c", &script])
            .stdin(std::process::Stdio::null()),
    )
    .with_context(|| format!("the host lacks {packages} and apt-get did not install it"))
}

fn need_root() -> String {
    "the build root is entered with chroot, which needs root; run: sudo -E env PATH=\"$PATH\" cargo xtask ..."
        .into()
}

/// Returns the full path of a program.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// Returns the lines of a sources.list for the target suite, from the mirrors that this host uses.
pub(crate) fn sources() -> Result<String> {
    sources_of(SUITE, &["", "-updates", "-backports"])
}

/// Returns the lines of a sources.list for these variants of another suite, and its security updates.
pub(crate) fn sources_of(suite: &str, variants: &[&str]) -> Result<String> {
    let mut text = String::new();
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(dir) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(dir.flatten().map(|entry| entry.path()));
    }
    files.sort();
    for file in files {
        let known = file
            .extension()
            .is_some_and(|e| e == "list" || e == "sources");
        if known && file.exists() {
            text.push_str(&fs::read_to_string(&file)?);
            text.push_str("\n\n");
        }
    }
    let (main, security) = mirrors(&text).context(
        "no Debian mirror found in /etc/apt: give the host a Debian entry in /etc/apt/sources.list",
    )?;
    let line =
        |mirror: &str, suite: String| format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n");
    let mut lines: String = variants
        .iter()
        .map(|suffix| line(&main, format!("{suite}{suffix}")))
        .collect();
    if let Some(security) = security {
        lines.push_str(&line(&security, format!("{suite}-security")));
    }
    Ok(lines)
}

/// Returns the mirror of Debian itself and that of its security updates, from the text of apt's sources in either
/// format.
fn mirrors(text: &str) -> Option<(String, Option<String>)> {
    let mut main = None;
    let mut security = None;
    let mut note = |uri: &str, suite: &str| {
        let suite = suite.trim_end_matches('/');
        if suite.ends_with("-security") {
            security.get_or_insert_with(|| uri.to_string());
        } else if DEBIAN.contains(&suite) {
            main.get_or_insert_with(|| uri.to_string());
        }
    };
    for stanza in text.split("\n\n") {
        let (mut uri, mut suites) = ("", "");
        for line in stanza.lines().map(str::trim) {
            if let Some(value) = line.strip_prefix("URIs:") {
                uri = value.split_whitespace().next().unwrap_or("");
            } else if let Some(value) = line.strip_prefix("Suites:") {
                suites = value;
            } else if let Some(rest) = line.strip_prefix("deb ") {
                let rest = rest.trim();
                let rest = if rest.starts_with('[') {
                    rest.split_once(']').map_or("", |p| p.1)
                } else {
                    rest
                };
                let mut words = rest.split_whitespace();
                if let (Some(uri), Some(suite)) = (words.next(), words.next()) {
                    note(uri, suite);
                }
            }
        }
        if !uri.is_empty() {
            suites.split_whitespace().for_each(|suite| note(uri, suite));
        }
    }
    main.map(|main| (main, security))
}

const DEBIAN: &[&str] = &[
    "bookworm",
    "trixie",
    "forky",
    "sid",
    "stable",
    "testing",
    "unstable",
    "oldstable",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_are_read_from_both_formats() {
        let new = "Types: deb\nURIs: http://m/debian\nSuites: trixie trixie-updates\n\n\
                   Types: deb\nURIs: http://m/sec\nSuites: trixie-security\n";
        let old = "deb http://other/x stable-thing main\n# deb http://no/ trixie main\n\
                   deb [arch=amd64] http://m/debian bookworm main\ndeb http://m/sec bookworm-security main\n";
        let want = Some((
            "http://m/debian".to_string(),
            Some("http://m/sec".to_string()),
        ));
        assert_eq!(mirrors(new), want);
        assert_eq!(mirrors(old), want);
    }

    #[test]
    fn foreign_sources_are_no_debian_mirror() {
        assert_eq!(mirrors("deb http://m/node nodistro main\n"), None);
    }
}
