// SPDX-License-Identifier: MIT OR Apache-2.0
//! Hosts that lack something, each made as files.

use super::initramfs::ListedFiles;
use super::{report, text, Finding, FindingGrade, Report};
use crate::host::made::{phy, Made};
use control::installed::{SUPERVISOR, TAPDISK};
use control::{Code, Failure};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

fn mode<'a>(made: &'a Made, path: &str, mode: u32) -> &'a Made {
    let path = made.host().path(path);
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("changed");
    made
}

/// A host where our driver serves and all is well.
pub(super) fn well() -> Made {
    let made = Made::new();
    for (path, text) in [
        ("/sys/hypervisor/type", "xen\n"),
        ("/sys/hypervisor/version/major", "4\n"),
        ("/sys/hypervisor/version/minor", "20\n"),
        ("/sys/hypervisor/version/extra", ".0\n"),
        (
            "/sys/hypervisor/properties/capabilities",
            "xen-3.0-x86_64 hvm-3.0-x86_64\n",
        ),
        ("/proc/xen/capabilities", "control_d\n"),
        ("/proc/sys/kernel/osrelease", "7.2-amd64\n"),
        (
            "/lib/modules/7.2-amd64/modules.dep",
            "kernel/a.ko:\nupdates/xen-blkback-rs.ko:\n",
        ),
        ("/sys/module/xen_blkback_rs/refcnt", "1\n"),
        ("/sys/bus/xen-backend/drivers_autoprobe", "1\n"),
        (
            "/etc/modprobe.d/xen-blkback-rs.conf",
            "install xen-blkback /sbin/modprobe -q xen-blkback-rs\n",
        ),
        (
            "/etc/passwd",
            "root:x:0:0::/:/bin/sh\nxentap:x:998:998::/:/usr/sbin/nologin\n",
        ),
        ("/etc/xen/scripts/block", "#!/bin/sh\n"),
    ] {
        made.file(path, text);
    }
    for (path, its) in [
        ("/dev/xen/xenbus", 0o600),
        ("/dev/xen/evtchn", 0o600),
        ("/dev/xentap/control", 0o600),
        ("/run/xentap/control.sock", 0o600),
        ("/run/xentap/disks/0.json", 0o600),
        ("/run/xentap/tapdisk/0.sock", 0o600),
        (SUPERVISOR, 0o755),
        (TAPDISK, 0o755),
        ("/etc/xen/scripts/block-tap-rs", 0o755),
    ] {
        made.file(path, "");
        mode(&made, path, its);
    }
    mode(&made, "/run/xentap", 0o711);
    mode(&made, "/run/xentap/disks", 0o700);
    mode(&made, "/run/xentap/tapdisk", 0o700);
    made
}

fn answer() -> Result<String, Failure> {
    Ok(format!("blktapctrl {}", env!("CARGO_PKG_VERSION")))
}

/// No program says what is in an initramfs.
fn nobody(_: &Path) -> ListedFiles {
    ListedFiles::Nobody
}

fn seen(made: &Made) -> Report {
    report(&made.host(), answer, nobody)
}

/// Returns the findings that are not as they should be.
fn trouble(report: &Report) -> Vec<&Finding> {
    let all = report.findings.iter();
    all.filter(|finding| finding.grade != FindingGrade::Ok)
        .collect()
}

#[test]
fn a_host_that_is_well_has_nothing_to_do() {
    let report = seen(&well());
    assert_eq!(trouble(&report), Vec::<&Finding>::new());
    assert_eq!(
        (report.grade, report.grade.exit_status()),
        (FindingGrade::Ok, control::ExitStatus::Done)
    );
    let text = text(&report);
    assert!(text.contains("ok    xen: Xen 4.20.0\n"), "{text}");
}

/// Each lack is named once, with a remedy.
#[test]
fn what_is_missing_is_named_with_a_remedy() {
    type Break = for<'a> fn(&'a Made) -> &'a Made;
    let remove = |made: &Made, path: &str| {
        let path = made.host().path(path);
        let removed = match path.is_dir() {
            true => fs::remove_dir_all(path),
            false => fs::remove_file(path),
        };
        removed.expect("removed");
    };
    let gone: [(&str, FindingGrade, &str); 9] = [
        ("/proc/xen", FindingGrade::Warn, "mount -t xenfs"),
        ("/dev/xen/xenbus", FindingGrade::Bad, "xenstored"),
        ("/sys/hypervisor/properties", FindingGrade::Warn, "xen_caps"),
        (
            "/sys/module/xen_blkback_rs",
            FindingGrade::Warn,
            "modprobe xen-blkback-rs",
        ),
        ("/lib/modules", FindingGrade::Warn, "depmod"),
        (TAPDISK, FindingGrade::Bad, "xen-blkback-rs again"),
        ("/etc/xen/scripts/block", FindingGrade::Bad, "Xen's tools"),
        ("/dev/xentap", FindingGrade::Bad, "udevadm"),
        ("/run/xentap/disks", FindingGrade::Bad, "systemd-tmpfiles"),
    ];
    for (path, grade, remedy) in gone {
        let made = well();
        remove(&made, path);
        expect(&made, grade, remedy, path);
    }
    let broken: [(Break, FindingGrade, &str); 8] = [
        (
            |made| made.file("/etc/passwd", "root:x:0:0\n"),
            FindingGrade::Bad,
            "systemd-sysusers",
        ),
        (
            |made| made.file("/etc/passwd", "xentap:x:0:0\n"),
            FindingGrade::Bad,
            "number of its own",
        ),
        (
            |made| mode(made, "/run/xentap/disks", 0o755),
            FindingGrade::Bad,
            "systemd-tmpfiles",
        ),
        (
            |made| mode(made, TAPDISK, 0o644),
            FindingGrade::Bad,
            "chmod 755",
        ),
        (
            |made| made.file("/etc/modprobe.d/x.conf", "blacklist xen_blkback_rs\n"),
            FindingGrade::Bad,
            "remove that line",
        ),
        (
            |made| made.link("/etc/xen/scripts/block", "block-or-tap"),
            FindingGrade::Bad,
            "xen-blkback-rs again",
        ),
        (
            |made| made.file("/sys/bus/xen-backend/devices/vbd-3-51712/state", "InitWait"),
            FindingGrade::Bad,
            "modprobe xen-blkback",
        ),
        (
            |made| made.unreadable("/etc/modprobe.d/y.conf"),
            FindingGrade::Warn,
            "be root",
        ),
    ];
    for (change, grade, remedy) in broken {
        let made = well();
        change(&made);
        expect(&made, grade, remedy, remedy);
    }
}

fn expect(made: &Made, grade: FindingGrade, remedy: &str, case: &str) {
    let report = seen(made);
    let trouble = trouble(&report);
    assert_eq!(trouble.len(), 1, "{case}: {trouble:?}");
    assert_eq!((report.grade, trouble[0].grade), (grade, grade), "{case}");
    let told = trouble[0].remedy.as_deref().unwrap_or("");
    assert!(told.contains(remedy), "{case}: {told}");
}

#[test]
fn in_a_driver_domain_somebody_runs_the_scripts() {
    const REMEDY: &str = "xentap-devd.service";
    let made = well();
    made.file("/proc/xen/capabilities", "");
    // Others have the word, too.
    made.file("/proc/7/cmdline", "less\0devd\0")
        .file("/proc/8/cmdline", "xl\0create\0devd\0")
        .file("/proc/9/cmdline", "");
    expect(&made, FindingGrade::Warn, REMEDY, "nobody does");
    made.file("/proc/10/cmdline", "/usr/lib/xen-4.20/bin/xl\0devd\0-F\0");
    assert_eq!(trouble(&seen(&made)), Vec::<&Finding>::new());
    // In dom0 xl does by itself.
    let dom0 = well();
    assert_eq!(trouble(&seen(&dom0)), Vec::<&Finding>::new());
}

#[test]
fn the_driver_that_is_decided_for_is_the_one_that_serves() {
    let made = well();
    fs::remove_dir_all(made.host().path("/sys/module/xen_blkback_rs")).expect("removed");
    made.file("/sys/module/xen_blkback/refcnt", "1\n");
    expect(
        &made,
        FindingGrade::Warn,
        "`xen-blkback-rs takeover`, while guests work",
        "C is loaded",
    );
    // A host of the C driver needs nothing of what tap disks need.
    fs::remove_file(made.host().path("/etc/modprobe.d/xen-blkback-rs.conf")).expect("removed");
    for path in ["/run", "/dev/xentap", "/usr/libexec"] {
        fs::remove_dir_all(made.host().path(path)).expect("removed");
    }
    phy(&made, "vbd-1-51712", "8:0");
    assert_eq!(trouble(&seen(&made)), Vec::<&Finding>::new());
    made.link("/etc/modprobe.d/xen-blkback-rs.conf", "/nowhere");
    expect(
        &made,
        FindingGrade::Bad,
        "xen-blkback-rs enable",
        "a link to nowhere",
    );
}

#[test]
fn a_kernel_that_demands_a_signature_is_told_of_a_module_without_one() {
    const MODULE: &str = "/lib/modules/7.2-amd64/updates/xen-blkback-rs.ko";
    let unsigned = "code that is longer than what is looked for at its end";
    let signed = "code~Module signature appended~\n";
    let lockdown = (
        "/sys/kernel/security/lockdown",
        "none [integrity] confidentiality\n",
    );
    let enforced = ("/sys/module/module/parameters/sig_enforce", "Y\n");
    let locked = |(path, text): (&str, &str), module: &str| {
        let made = well();
        made.file(path, text).file(MODULE, module);
        made
    };
    // A loaded module was accepted by the kernel.
    let made = locked(lockdown, unsigned);
    assert_eq!(trouble(&seen(&made)), Vec::<&Finding>::new());
    for (demand, module, grade, words) in [
        (
            lockdown,
            unsigned,
            FindingGrade::Bad,
            "is not signed: the C driver serves instead",
        ),
        (enforced, unsigned, FindingGrade::Bad, "module.sig_enforce"),
        (enforced, "", FindingGrade::Bad, "is not signed"),
        // Whether the kernel knows the key only it can tell.
        (
            lockdown,
            signed,
            FindingGrade::Warn,
            "xen-blkback-rs is not loaded",
        ),
    ] {
        let made = locked(demand, module);
        fs::remove_dir_all(made.host().path("/sys/module/xen_blkback_rs")).expect("removed");
        made.file("/sys/module/xen_blkback/refcnt", "1\n");
        let report = seen(&made);
        let all = trouble(&report);
        let its = all.iter().find(|finding| finding.about == "signature");
        let its = its.unwrap_or_else(|| panic!("{words}: {all:?}"));
        assert_eq!(its.grade, grade, "{its:?}");
        assert!(its.what.contains(words), "{its:?}");
        let remedy = its.remedy.as_deref().unwrap_or("");
        assert!(remedy.contains("SECURE BOOT"), "{its:?}");
        // An administrator who has decided for the C driver gets no warning.
        fs::remove_file(made.host().path("/etc/modprobe.d/xen-blkback-rs.conf")).expect("removed");
        assert_eq!(trouble(&seen(&made)), Vec::<&Finding>::new());
    }
    for loads_all in [
        (
            "/sys/kernel/security/lockdown",
            "[none] integrity confidentiality\n",
        ),
        ("/sys/module/module/parameters/sig_enforce", "N\n"),
    ] {
        let made = locked(loads_all, unsigned);
        fs::remove_dir_all(made.host().path("/sys/module/xen_blkback_rs")).expect("removed");
        let report = seen(&made);
        assert!(
            trouble(&report)
                .iter()
                .all(|finding| finding.about == "driver"),
            "{report:?}"
        );
    }
}

#[test]
fn the_initramfs_is_looked_into() {
    let made = well();
    made.file("/boot/initrd.img-7.2-amd64", "packed");
    let list = |_: &Path| ListedFiles::Failed("no such luck".into());
    let report = report(&made.host(), answer, list);
    assert_eq!(report.grade, FindingGrade::Warn);
    let what = &trouble(&report)[0].what;
    assert!(what.contains("no such luck"), "{what}");
}

#[test]
fn a_supervisor_that_is_silent_or_old_is_named() {
    let made = well();
    let silent = || Err(Failure::new(Code::Gone, "no such file"));
    assert_eq!(
        report(&made.host(), silent, nobody).grade,
        FindingGrade::Bad
    );
    let old = || Ok("blktapctrl 0.0.1".to_owned());
    assert_eq!(report(&made.host(), old, nobody).grade, FindingGrade::Warn);
}

#[test]
fn a_host_without_xen_is_told_so_and_no_panic() {
    let report = seen(&Made::new());
    assert_eq!(report.grade, FindingGrade::Bad);
    assert!(report.findings[0].what.contains("does not run on Xen"));
    let json = serde_json::to_value(&report).expect("json");
    assert_eq!(
        (&json["grade"], &json["findings"][0]["about"]),
        (&"bad".into(), &"xen".into())
    );
}
