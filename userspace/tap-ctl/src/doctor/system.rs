// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether this is a domain of Xen that can serve disks, and what tap disks need of it.

use super::{bad, ok, warn, wrong, Finding};
use crate::host::Host;
use control::installed::{SUPERVISOR, TAPDISK};
use control::{Code, Failure};
use std::fs;

/// The gates to the hypervisor and to the other domains.
pub(super) fn xen(host: &Host) -> Vec<Finding> {
    let kind = host.optional(&host.path("/sys/hypervisor/type"));
    if kind.as_deref() != Some("xen") {
        let what = "this kernel does not run on Xen";
        return vec![bad(
            "xen",
            what,
            "boot Xen, with this kernel as dom0 (xen.gz in the boot loader)",
        )];
    }
    let version = |name: &str| host.optional(&host.path(format!("/sys/hypervisor/version/{name}")));
    let parts = [version("major"), version("minor")].map(|part| part.unwrap_or("?".into()));
    let extra = version("extra").unwrap_or_default();
    let mut findings = vec![
        ok("xen", format!("Xen {}.{}{extra}", parts[0], parts[1])),
        guests(host),
    ];
    findings.extend(domain(host));
    findings.extend([
        node(
            host,
            "/dev/xen/xenbus",
            "xenstore is not reached",
            "modprobe xen-xenbus-frontend, and start xenstored",
        ),
        node(
            host,
            "/dev/xen/evtchn",
            "programs get no events",
            "modprobe xen-evtchn",
        ),
        bus(host),
    ]);
    findings
}

/// Which kinds of guests the hypervisor runs.
fn guests(host: &Host) -> Finding {
    let text = host.optional(&host.path("/sys/hypervisor/properties/capabilities"));
    match text.as_deref() {
        None | Some("") => warn(
            "hypervisor",
            "it does not say which guests it can run",
            "see xl info: the line xen_caps",
        ),
        Some(text) if text.contains("hvm-") => {
            ok("hypervisor", format!("PV and HVM guests: {text}"))
        }
        Some(text) => warn(
            "hypervisor",
            format!("PV guests only: {text}"),
            "for HVM and PVH guests turn on virtualisation in the firmware",
        ),
    }
}

/// Whether xenfs is mounted, which domain this is, and who runs the scripts in one that is not dom0.
fn domain(host: &Host) -> Vec<Finding> {
    match host.optional(&host.path("/proc/xen/capabilities")) {
        None => vec![warn(
            "domain",
            "there is no /proc/xen/capabilities, which Xen's tools look for",
            "mount -t xenfs xenfs /proc/xen (proc-xen.mount)",
        )],
        Some(text) if text.contains("control_d") => vec![ok("domain", "dom0")],
        Some(_) => vec![
            ok("domain", "not dom0: disks are served as by a driver domain"),
            devd(host),
        ],
    }
}

/// Checks the program that runs the scripts for the disks of other guests, which xl does in dom0.
fn devd(host: &Host) -> Finding {
    let folder = host.path("/proc");
    let is_devd = |process: &String| {
        let process = folder.join(process);
        let line = host.optional(&process.join("cmdline")).unwrap_or_default();
        // It may have ended meanwhile.
        host.forget(&process);
        let mut words = line.split('\0');
        let program = words.next().and_then(|path| path.rsplit('/').next());
        program == Some("xl") && words.next() == Some("devd")
    };
    let mut names = host.names(&folder).into_iter();
    let found = names.find(|name| name.parse::<u32>().is_ok() && is_devd(name));
    match found {
        Some(process) => ok("scripts", format!("xl devd runs them: process {process}")),
        None => warn(
            "scripts",
            "no xl devd runs here, so guests get no disks of this domain",
            "systemctl enable --now xentap-devd.service",
        ),
    }
}

fn node(host: &Host, path: &'static str, otherwise: &str, remedy: &str) -> Finding {
    match host.path(path).exists() {
        true => ok("gates", format!("{path} is there")),
        false => bad("gates", format!("there is no {path}: {otherwise}"), remedy),
    }
}

fn bus(host: &Host) -> Finding {
    let path = "/sys/bus/xen-backend";
    match host.path(path).exists() {
        true => ok("gates", format!("{path} is there")),
        false => bad(
            "gates",
            format!("there is no {path}: this kernel serves no guests"),
            "use a kernel with CONFIG_XEN_BACKEND",
        ),
    }
}

/// Checks the system for the needs of tap disks.
pub(super) fn tap(host: &Host) -> Vec<Finding> {
    let mut findings = vec![user(host)];
    for program in [SUPERVISOR, TAPDISK] {
        findings.push(executable(host, "programs", program));
    }
    findings.push(executable(host, "scripts", "/etc/xen/scripts/block-tap-rs"));
    findings.push(xen_script(host));
    // The permissions that they have at most: more would let others at the guests' data.
    for (path, most) in [
        ("/run/xentap", 0o711),
        ("/run/xentap/disks", 0o700),
        ("/run/xentap/tapdisk", 0o700),
        ("/run/xentap/control.sock", 0o700),
        ("/dev/xentap/control", 0o600),
    ] {
        findings.push(match wrong(host, path, most) {
            None => ok("permissions", format!("{path} is root's")),
            Some(what) => bad("permissions", what, remedy_of(path)),
        });
    }
    findings
}

fn remedy_of(path: &str) -> &'static str {
    match path {
        "/dev/xentap/control" => {
            "modprobe xen-blkback-rs; udevadm control --reload; udevadm trigger"
        }
        "/run/xentap/control.sock" => "systemctl restart blktapctrl.socket",
        _ => "systemd-tmpfiles --create xentap.conf",
    }
}

/// The user that the processes of disks are.
fn user(host: &Host) -> Finding {
    let users = host.text(&host.path("/etc/passwd")).unwrap_or_default();
    let line = users.lines().find_map(|line| line.strip_prefix("xentap:"));
    match line.and_then(|line| line.split(':').nth(1)) {
        None => bad(
            "user",
            "there is no user xentap for the disks' processes",
            "systemd-sysusers",
        ),
        Some("0") => bad(
            "user",
            "xentap is root: a process that a guest misleads could do anything",
            "give xentap a number of its own in /etc/passwd",
        ),
        Some(number) => ok("user", format!("xentap is {number}")),
    }
}

fn executable(host: &Host, about: &'static str, path: &str) -> Finding {
    use std::os::unix::fs::PermissionsExt;
    let remedy = "install the package xen-blkback-rs again";
    match fs::metadata(host.path(path)) {
        Ok(data) if data.permissions().mode() & 0o111 != 0 => ok(about, format!("{path} is there")),
        Ok(_) => bad(
            about,
            format!("{path} cannot be run"),
            format!("chmod 755 {path}"),
        ),
        Err(error) => bad(about, format!("cannot find {path}: {error}"), remedy),
    }
}

/// Checks which program serves disks that name no script.
fn xen_script(host: &Host) -> Finding {
    let folder = host.path("/etc/xen/scripts");
    let script = folder.join("block");
    let again = "install the package of Xen's tools again";
    let is_ours = fs::read_link(&script).is_ok_and(|target| target.ends_with("block-or-tap"));
    if !is_ours {
        return match script.exists() {
            true => ok(
                "scripts",
                "files are served by Xen's script (xentap-block(8))",
            ),
            false => bad(
                "scripts",
                "there is no /etc/xen/scripts/block: disks without a script are refused",
                again,
            ),
        };
    }
    // A target that is no file is left to Xen's own script.
    match (script.exists(), folder.join("block.xen").exists()) {
        (true, true) => ok("scripts", "files are served by tapdisk (xentap-block(8))"),
        (false, _) => bad(
            "scripts",
            "/etc/xen/scripts/block leads to block-or-tap, which is not there",
            "install the package xen-blkback-rs again",
        ),
        (true, false) => bad(
            "scripts",
            "/etc/xen/scripts/block.xen is missing: phy disks are refused",
            again,
        ),
    }
}

/// Whether the supervisor answers, and is the one that is installed.
pub(super) fn supervisor(answer: Result<String, Failure>) -> Finding {
    let ours = env!("CARGO_PKG_VERSION");
    match answer {
        Ok(program) if program.split(' ').next_back() == Some(ours) => {
            ok("supervisor", format!("{program} answers"))
        }
        Ok(program) => warn(
            "supervisor",
            format!("{program} answers, and {ours} is installed"),
            "systemctl restart blktapctrl: the disks are served on",
        ),
        Err(failure) if failure.code == Code::Denied => {
            warn("supervisor", failure.to_string(), "be root")
        }
        Err(failure) => bad(
            "supervisor",
            format!("blktapctrl does not answer, so no process that dies is replaced: {failure}"),
            "systemctl start blktapctrl",
        ),
    }
}
