// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Files that a package installs.

use crate::{artifacts, build, run};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A program that is installed in dom0; the others are tests.
pub(crate) struct Program {
    pub(crate) name: &'static str,
    /// Its folder.
    place: &'static str,
}

/// Programs for people.
const COMMANDS: &str = "usr/bin";
/// Programs that only other programs start. They are not on the PATH, where xapi has programs with these names.
const DAEMONS: &str = "usr/libexec/xen-blkback-rs";

/// Returns a program with its folder.
const fn program(name: &'static str, place: &'static str) -> Program {
    Program { name, place }
}

pub(crate) const PROGRAMS: &[Program] = &[
    program("tapdisk", DAEMONS),
    program("blktapctrl", DAEMONS),
    program("tap-ctl", COMMANDS),
    program("tapimg", COMMANDS),
    program("xen-blkback-takeover", COMMANDS),
];

/// A file of ci/packaging.
struct PackagedFile {
    /// Path after the installation.
    place: &'static str,
    text: &'static str,
    executable: bool,
}

/// Defines a file of ci/packaging: its place, its name there, and `x` if it is a program.
macro_rules! packaged {
    ($place:literal, $name:literal) => {
        packaged!($place, $name, false)
    };
    ($place:literal, $name:literal, x) => {
        packaged!($place, $name, true)
    };
    ($place:literal, $name:literal, $executable:literal) => {
        PackagedFile {
            place: $place,
            text: include_str!(concat!("../../packaging/", $name)),
            executable: $executable,
        }
    };
}

/// Files that belong to the module.
const WITH_MODULE: &[PackagedFile] = &[
    packaged!(
        "usr/lib/modprobe.d/xen-blkback-rs.conf",
        "xen-blkback-rs.conf"
    ),
    packaged!("usr/share/man/man7/xen-blkback-rs.7", "xen-blkback-rs.7"),
];

/// Files with which a package selects the driver: there the settings are not in their place at once.
const WITH_PACKAGE: &[PackagedFile] = &[
    packaged!("usr/sbin/xen-blkback-rs", "xen-blkback-rs", x),
    packaged!("usr/share/man/man8/xen-blkback-rs.8", "xen-blkback-rs.8"),
];
/// Path of the settings in a package, from which [`WITH_PACKAGE`] copies them to their place.
const SETTINGS: &str = "usr/share/xen-blkback-rs/modprobe.conf";

/// Files that belong to the programs.
const WITH_PROGRAMS: &[PackagedFile] = &[
    packaged!("etc/xen/scripts/block-tap-rs", "block-tap-rs", x),
    packaged!("etc/xen/scripts/block-or-tap", "block-or-tap", x),
    packaged!(
        "etc/xen/scripts/block-shared-storage",
        "block-shared-storage"
    ),
    packaged!("etc/xen/scripts/block-shared-rbd", "block-shared-rbd"),
    packaged!("etc/xen/scripts/block-shared-drbd", "block-shared-drbd"),
    packaged!("etc/default/xentap", "xentap.default"),
    packaged!("usr/sbin/xentap-block", "xentap-block", x),
    packaged!(
        "usr/lib/systemd/system/blktapctrl.service",
        "blktapctrl.service"
    ),
    packaged!(
        "usr/lib/systemd/system/blktapctrl.socket",
        "blktapctrl.socket"
    ),
    packaged!(
        "usr/lib/systemd/system/xentap-guests.service",
        "xentap-guests.service"
    ),
    packaged!(
        "usr/lib/systemd/system/xentap-devd.service",
        "xentap-devd.service"
    ),
    packaged!(
        "usr/lib/systemd/system/xentap-metrics.service",
        "xentap-metrics.service"
    ),
    packaged!(
        "usr/lib/systemd/system/xentap-metrics.timer",
        "xentap-metrics.timer"
    ),
    packaged!(
        "usr/share/xen-blkback-rs/prometheus-alerts.yml",
        "xentap-alerts.yml"
    ),
    packaged!(
        "usr/share/xen-blkback-rs/grafana-dashboard.json",
        "xentap-dashboard.json"
    ),
    packaged!("usr/lib/udev/rules.d/60-xentap.rules", "60-xentap.rules"),
    packaged!("usr/lib/sysusers.d/xentap.conf", "xentap.sysusers"),
    packaged!("usr/lib/tmpfiles.d/xentap.conf", "xentap.tmpfiles"),
    packaged!("usr/share/man/man8/blktapctrl.8", "blktapctrl.8"),
    packaged!("usr/share/man/man8/tapdisk.8", "tapdisk.8"),
    packaged!("usr/share/man/man8/block-tap-rs.8", "block-tap-rs.8"),
    packaged!("usr/share/man/man8/xentap-block.8", "xentap-block.8"),
];

/// Programs that generate their own manual pages and completions.
const TELLING: &[&str] = &["tap-ctl", "tapimg", "xen-blkback-takeover"];

/// Files that they generate, and their paths.
fn generated(program: &str) -> [(&'static str, String); 4] {
    let share = |place: &str| format!("usr/share/{place}");
    [
        ("man", share(&format!("man/man8/{program}.8"))),
        (
            "bash",
            share(&format!("bash-completion/completions/{program}")),
        ),
        ("zsh", share(&format!("zsh/vendor-completions/_{program}"))),
        (
            "fish",
            share(&format!("fish/vendor_completions.d/{program}.fish")),
        ),
    ]
}

/// Installs the module, and the programs of the folder `programs`, below `dir`, which stands for `/`.
pub(crate) fn to(module: &Path, programs: Option<&Path>, dir: &Path) -> Result<()> {
    let release = artifacts::release(&artifacts::build_root()?)?;
    put(
        module,
        &dir.join(format!(
            "usr/lib/modules/{release}/updates/xen-blkback-rs.ko"
        )),
    )?;
    write_all(WITH_MODULE, dir)?;
    if let Some(programs) = programs {
        add_programs(&build::program_files(programs)?, dir)?;
    }
    // Only root may write files that root reads and runs, whatever the umask of this process is.
    let folders = ["usr", "etc"].map(|name| dir.join(name));
    run::shown(
        Command::new("chmod")
            .args(["-R", "u=rwX,go=rX"])
            .args(folders.iter().filter(|folder| folder.exists())),
    )
}

/// Installs like [`to`], for packages: the selected driver stays until an administrator changes it.
pub(crate) fn for_package(module: &Path, programs: &Path, dir: &Path) -> Result<()> {
    to(module, Some(programs), dir)?;
    write_all(WITH_PACKAGE, dir)?;
    let (settings, place) = (dir.join(WITH_MODULE[0].place), dir.join(SETTINGS));
    fs::create_dir_all(place.parent().context("a place is in a folder")?)?;
    fs::rename(&settings, &place)
        .with_context(|| format!("cannot move {} to {}", settings.display(), place.display()))
}

fn add_programs(programs: &[PathBuf], dir: &Path) -> Result<()> {
    for program in programs {
        if let Some(its) = PROGRAMS.iter().find(|its| program.ends_with(its.name)) {
            put(program, &dir.join(its.place).join(its.name))?;
        }
    }
    write_all(WITH_PROGRAMS, dir)?;
    for program in TELLING {
        let file = dir.join(COMMANDS).join(program);
        for (what, place) in generated(program) {
            let text = run::output(Command::new(&file).args(["generate", what]))
                .with_context(|| format!("{program} does not generate {what}"))?;
            write(&dir.join(place), &text)?;
        }
    }
    Ok(())
}

fn write_all(files: &[PackagedFile], dir: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    for file in files {
        let place = dir.join(file.place);
        write(&place, file.text)?;
        if file.executable {
            fs::set_permissions(&place, fs::Permissions::from_mode(0o755))?;
        }
    }
    Ok(())
}

fn write(place: &Path, text: &str) -> Result<()> {
    let folder = place.parent().context("a place is in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    fs::write(place, text).with_context(|| format!("cannot write {}", place.display()))
}

fn put(file: &Path, place: &Path) -> Result<()> {
    let folder = place.parent().context("a place is in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    fs::copy(file, place).with_context(|| format!("cannot install {}", file.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{
        generated, PackagedFile, PROGRAMS, SETTINGS, TELLING, WITH_MODULE, WITH_PACKAGE,
        WITH_PROGRAMS,
    };

    fn file(ending: &str) -> &'static PackagedFile {
        let mut all = WITH_MODULE.iter().chain(WITH_PROGRAMS);
        all.find(|file| file.place.ends_with(ending))
            .expect("it is installed")
    }

    #[test]
    fn c_driver_is_kept_away_where_ours_is() {
        let text = file("xen-blkback-rs.conf").text;
        let line = text.lines().find(|line| !line.starts_with('#'));
        let (ours, otherwise) = line
            .and_then(|line| line.strip_prefix("install xen-blkback "))
            .and_then(|commands| commands.split_once(" || "))
            .expect("it is one command, and another one if that fails");
        assert!(ours.contains("modprobe -q xen-blkback-rs "));
        assert!(otherwise.contains("modprobe --ignore-install xen-blkback "));
        // Aliases belong to the modules: here they would apply even without such a module.
        assert!(!text.contains("\nalias ") && !text.contains("\nblacklist "));
    }

    /// The settings have the name under which the selection of a driver finds them.
    #[test]
    fn settings_are_where_the_decision_looks_for_them() {
        let program = WITH_PACKAGE.first().expect("there is one").text;
        assert!(program.contains(&format!("/{SETTINGS}}}")));
        assert!(WITH_MODULE[0]
            .place
            .ends_with("modprobe.d/xen-blkback-rs.conf"));
    }

    #[test]
    fn every_program_has_a_manual_page() {
        for program in PROGRAMS {
            let name = program.name;
            let page = format!("usr/share/man/man8/{name}.8");
            let is_told =
                TELLING.contains(&name) && generated(name).iter().any(|(_, place)| *place == page);
            let is_written = WITH_PROGRAMS.iter().any(|file| file.place == page);
            assert!(is_told != is_written, "{name}");
        }
    }

    /// Returns the path of an installed program.
    fn installed(name: &str) -> String {
        let mut programs = PROGRAMS.iter();
        let program = programs.find(|program| program.name == name);
        let program = program.expect("it is installed");
        format!("/{}/{name}", program.place)
    }

    /// Daemons are not started by name, and xapi's programs have equal names.
    #[test]
    fn no_daemon_is_on_the_path() {
        for daemon in ["tapdisk", "blktapctrl"] {
            let place = installed(daemon);
            let folder = place.rsplit_once('/').map(|(folder, _)| folder);
            let on_path = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"];
            assert!(!folder.is_none_or(|it| on_path.contains(&it)), "{place}");
        }
    }

    /// Files that start a daemon, or search for one, use the path where it is installed.
    #[test]
    fn daemons_are_started_where_they_are_installed() {
        let named = |line: String, text: &str| text.lines().any(|its| its.trim() == line);
        let (supervisor, tapdisk) = (installed("blktapctrl"), installed("tapdisk"));
        let unit = file("blktapctrl.service").text;
        assert!(named(format!("ExecStart={supervisor} --foreground"), unit));
        const OTHERS: &str = include_str!("../../../userspace/control/src/installed.rs");
        let constant = |name, path| format!("pub const {name}: &str = \"{path}\";");
        assert!(named(constant("SUPERVISOR", &supervisor), OTHERS));
        assert!(named(constant("TAPDISK", &tapdisk), OTHERS));
        let init = include_str!("../../recipes/dom0-init.sh");
        assert!(named(format!("supervisor={supervisor}"), init));
        for (page, path) in [("blktapctrl.8", supervisor), ("tapdisk.8", tapdisk)] {
            assert!(named(format!(".Nm {path}"), file(page).text), "{page}");
        }
    }

    #[test]
    fn every_program_is_packaged() {
        let packaged = include_str!("../../packaging/debian/xen-blkback-rs.install");
        for program in PROGRAMS {
            let mut folders = packaged.lines();
            assert!(
                folders.any(|folder| program.place.starts_with(folder)),
                "{}",
                program.name
            );
        }
    }

    #[test]
    fn scripts_can_be_run() {
        for file in WITH_MODULE.iter().chain(WITH_PROGRAMS) {
            assert_eq!(
                file.executable,
                file.text.starts_with("#!"),
                "{}",
                file.place
            );
        }
    }

    /// Scripts source their parts from their own folder.
    #[test]
    fn parts_of_scripts_are_beside_them() {
        let here = "etc/xen/scripts/";
        let parts = |text: &'static str| -> Vec<&str> {
            let lines = text.lines().map(str::trim);
            lines
                .filter_map(|line| {
                    line.strip_prefix(". \"$dir/block-shared-")?
                        .strip_suffix('"')
                })
                .collect()
        };
        let scripts = WITH_PROGRAMS
            .iter()
            .filter(|file| file.place.starts_with(here));
        let mut found = 0;
        for part in scripts.flat_map(|file| parts(file.text)) {
            // Engines by their names in targets.
            let names: &[&str] = if part.contains('$') {
                &["rbd", "drbd"]
            } else {
                &[part]
            };
            for name in names {
                let place = format!("{here}block-shared-{name}");
                assert!(
                    WITH_PROGRAMS.iter().any(|file| file.place == place),
                    "{place}"
                );
                found += 1;
            }
        }
        assert!(found >= 4, "{found}");
    }

    /// Returns the value of a setting in a unit.
    fn setting(unit: &str, name: &str) -> Option<&'static str> {
        let lines = file(unit).text.lines();
        let mut values = lines.filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        values.next()
    }

    /// A stop of the supervisor, or of the unit with its control groups, must not remove the disks of running guests.
    #[test]
    fn disks_outlive_the_units() {
        for unit in ["blktapctrl.service", "xentap-guests.service"] {
            assert_eq!(setting(unit, "KillMode"), Some("process"), "{unit}");
        }
        let groups = |name| setting("xentap-guests.service", name);
        assert_eq!(groups("OOMPolicy"), Some("continue"));
        // Nothing restarts it, because that would change the groups of running guests.
        assert_eq!(groups("Restart"), None);
        assert_eq!(groups("TasksMax"), Some("infinity"));
        // A limit for the whole group would also apply to the disks' processes.
        let whole = [
            "BPF",
            "CPU",
            "Device",
            "IO",
            "IP",
            "Memory",
            "PrivateDevices",
            "ProtectClock",
            "RestrictFileSystems",
            "RestrictNetworkInterfaces",
            "Socket",
        ];
        let lines = file("xentap-guests.service").text.lines();
        let kept = lines.filter(|line| !line.starts_with("MemoryDenyWriteExecute="));
        let bad: Vec<&str> = kept
            .filter(|line| whole.iter().any(|it| line.starts_with(it)))
            .collect();
        assert_eq!(bad, Vec::<&str>::new());
        let rules = include_str!("../../packaging/debian/rules");
        let apart =
            "dh_installsystemd --package=xen-blkback-rs --no-stop-on-upgrade xentap-guests.service";
        assert!(rules.lines().any(|line| line.trim() == apart));
    }

    /// The groups of guests are by default below the unit that has the controller for them, and not below that of the
    /// supervisor, which is restarted while guests run.
    #[test]
    fn groups_of_guests_are_in_the_unit_that_is_for_them() {
        let default = setting("blktapctrl.service", "Environment");
        let place = default.and_then(|line| line.strip_prefix("XENTAP_CGROUP="));
        let place = place.expect("it is in the unit").replace("%%", "%");
        let parent = "/sys/fs/cgroup/system.slice/xentap-guests.service";
        assert_eq!(place, format!("{parent}/guest-%d"));
        let groups = |name| setting("xentap-guests.service", name);
        assert_eq!(groups("Delegate"), Some("io"));
        assert!(groups("DelegateSubgroup").is_some(), "nobody may be above");
        assert_eq!(
            setting("blktapctrl.service", "Wants"),
            Some("xentap-guests.service")
        );
        // The value that an administrator sees is the effective one: an empty value would mean none.
        let settings = file("default/xentap").text;
        let shown = format!("#XENTAP_CGROUP=\"{place}\"");
        let mut lines = settings.lines();
        let line = lines.find(|line| line.trim_start_matches('#').starts_with("XENTAP_CGROUP"));
        assert_eq!(line, Some(shown.as_str()));
        let page = file("blktapctrl.8").text;
        assert!(page.contains(&format!("{parent}/guest-%d")));
    }

    /// Requests wait while the supervisor restarts, because the socket unit owns the socket.
    #[test]
    fn the_socket_outlives_the_supervisor() {
        let unit = file("blktapctrl.service").text;
        for line in ["Requires=blktapctrl.socket", "StandardInput=socket"] {
            assert!(unit.lines().any(|its| its == line), "{line}");
        }
        let socket = file("blktapctrl.socket").text;
        // Where the supervisor does not start, no client may wait for it.
        let conditions = |text: &'static str| -> Vec<&str> {
            let lines = text.lines();
            lines.filter(|line| line.starts_with("Condition")).collect()
        };
        assert_eq!(conditions(unit), conditions(socket));
        let place = "ListenStream=/run/xentap/control.sock";
        assert!(socket.lines().any(|its| its == place));
    }
}

#[cfg(test)]
mod parameters {
    //! The manual page has the defaults of the module.

    use std::collections::BTreeMap;

    const MODULE: &str = include_str!("../../../blkback/src/blkback_main.rs");
    const SHIM: &str = include_str!("../../../xenbus/shim/shim.c");
    const PAGE: &str = include_str!("../../packaging/xen-blkback-rs.7");

    /// Returns name and default of each parameter in `module!`.
    fn of_module(source: &str) -> BTreeMap<&str, &str> {
        let mut name = "";
        let mut found = BTreeMap::new();
        for line in source.lines().map(str::trim) {
            if let Some((before, "u32 {")) = line.split_once(": ") {
                name = before;
            } else if let Some(default) = line.strip_prefix("default: ") {
                found.insert(name, default.trim_end_matches(','));
            }
        }
        found
    }

    /// Returns name and default of each parameter that is declared in C, because it is writable.
    fn of_shim(source: &str) -> BTreeMap<&str, &str> {
        let writable = source.lines().filter_map(|line| {
            let rest = line.strip_prefix("module_param(")?;
            let name = |kind| rest.strip_suffix(kind);
            name(", uint, 0644);").or(name(", bool, 0644);"))
        });
        let default = |name: &str| {
            source.lines().find_map(|line| {
                let kinds = ["static unsigned int ", "static bool "];
                let rest = kinds.iter().find_map(|kind| line.strip_prefix(kind))?;
                let rest = rest.strip_prefix(name)?.trim_end_matches(';');
                // In the form in which the kernel shows it.
                Some(match rest.strip_prefix(" = ").unwrap_or("0") {
                    "true" => "Y",
                    number => number,
                })
            })
        };
        writable
            .map(|name| (name, default(name).unwrap_or("")))
            .collect()
    }

    /// Returns name and default of each parameter in the manual page.
    fn of_page(page: &str) -> BTreeMap<&str, &str> {
        page.lines()
            .filter_map(|line| line.strip_prefix(".It Cm ")?.split_once(" Pq default "))
            .collect()
    }

    #[test]
    fn the_manual_page_has_the_defaults_of_the_module() {
        let mut module = of_module(MODULE);
        module.extend(of_shim(SHIM));
        assert!(module.len() > 5, "{module:?}");
        assert_eq!(of_page(PAGE), module);
    }
}
