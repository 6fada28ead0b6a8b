// SPDX-License-Identifier: MIT OR Apache-2.0
//! The initramfs, which the kernel uses before its root file system: a driver in it is loaded as it was when the
//! initramfs was made, with the settings of that time.
//!
//! The program of its maker lists its contents; the maker's settings name the drivers that it loads.

use super::driver::{decided, module_file, release, Driver};
use super::{ok, warn, Finding};
use crate::host::Host;
use crate::program::{output, LIMIT};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

const ABOUT: &str = "initramfs";

/// Where it is, before the kernel's release and behind that.
const IMAGES: [(&str, &str); 2] = [("/boot/initrd.img-", ""), ("/boot/initramfs-", ".img")];

/// Settings of initramfs-tools, a module a line.
const EARLY: &str = "/etc/initramfs-tools/modules";
/// Settings of dracut, and folders of such.
const DRACUT: [&str; 3] = [
    "/etc/dracut.conf",
    "/etc/dracut.conf.d",
    "/usr/lib/dracut/dracut.conf.d",
];

/// Program that makes the initramfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Maker {
    InitramfsTools,
    Dracut,
}

impl Maker {
    const ALL: [Maker; 2] = [Maker::InitramfsTools, Maker::Dracut];

    /// The program that says what is in there.
    fn lister(self) -> &'static str {
        match self {
            Maker::InitramfsTools => "lsinitramfs",
            Maker::Dracut => "lsinitrd",
        }
    }

    /// Returns the command that makes it again.
    fn again(self, release: &str) -> String {
        match self {
            Maker::InitramfsTools => format!("update-initramfs -u -k {release}"),
            Maker::Dracut => format!("dracut -f --kver {release}"),
        }
    }
}

/// Contents of an initramfs, or the reason why they are unknown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ListedFiles {
    /// The program for this initramfs says so.
    By(Maker, String),
    /// No program can look into it.
    Nobody,
    /// The program has failed.
    Failed(String),
}

/// Asks a program of this host.
pub(super) fn list(image: &Path) -> ListedFiles {
    let asked = |maker: Maker| asked(maker, maker.lister(), image, LIMIT);
    Maker::ALL
        .into_iter()
        .find_map(asked)
        .unwrap_or(ListedFiles::Nobody)
}

/// Returns the output of a program; nothing if the program is not installed.
fn asked(maker: Maker, lister: &str, image: &Path, limit: Duration) -> Option<ListedFiles> {
    // As timeout(1) says it.
    const LASTED: i32 = 124;
    const NOT_THERE: i32 = 127;
    let said = match output(&[lister.as_ref(), image.as_os_str()], limit) {
        Ok(said) => said,
        Err(error) => return Some(ListedFiles::Failed(format!("cannot run {lister}: {error}"))),
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    Some(match said.status.code() {
        Some(0) => ListedFiles::By(maker, text(&said.stdout)),
        Some(NOT_THERE) => return None,
        Some(LASTED) => ListedFiles::Failed(format!("{lister} did not come to an end")),
        _ => ListedFiles::Failed(format!(
            "{lister} has failed ({}): {}",
            said.status,
            text(&said.stderr)
        )),
    })
}

/// Checks the initramfs of the running kernel.
pub(super) fn look(host: &Host, list: impl Fn(&Path) -> ListedFiles) -> Vec<Finding> {
    // The check of the kernel reports an unreadable release.
    let Some(release) = release(host) else {
        return Vec::new();
    };
    let images = IMAGES.map(|(before, behind)| format!("{before}{release}{behind}"));
    let images = images.into_iter();
    let Some(name) = images.into_iter().find(|image| host.path(image).exists()) else {
        let what = format!("/boot has none for {release}");
        return vec![ok(ABOUT, what)];
    };
    let path = host.path(&name);
    let (maker, listing) = match list(&path) {
        ListedFiles::By(maker, listing) => (maker, listing),
        ListedFiles::Nobody => {
            let what =
                format!("{name} was not looked into: there is neither lsinitramfs nor lsinitrd");
            return vec![ok(ABOUT, what)];
        }
        ListedFiles::Failed(why) => {
            let what = format!("{name} was not looked into: {why}");
            let remedy = "be root, and try that program by hand";
            return vec![warn(ABOUT, what, remedy)];
        }
    };
    let image = InitramfsImage {
        name,
        path,
        again: maker.again(&release),
        release,
        content: Content::of(&listing),
    };
    let mut findings: Vec<Finding> = image.loads(host).into_iter().collect();
    findings.extend(image.is_old(host));
    if findings.is_empty() {
        let what = format!("{} {}", image.name, image.content.told());
        findings.push(ok(ABOUT, what));
    }
    findings
}

/// Relevant contents of an initramfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Content {
    has_c: bool,
    has_ours: bool,
    /// That whoever asks for the C driver gets ours.
    has_settings: bool,
}

impl Content {
    /// Of a list of names, or of lines with a name as `ls -l` has them.
    fn of(listing: &str) -> Content {
        let has = |is: fn(&str) -> bool| listing.split_whitespace().any(is);
        Content {
            has_c: has(|path| is_module(path, "xen-blkback.ko")),
            has_ours: has(|path| is_module(path, "xen-blkback-rs.ko")),
            has_settings: has(|path| path.ends_with("modprobe.d/xen-blkback-rs.conf")),
        }
    }

    /// Returns the driver that is loaded from it on a request for this one.
    fn serves(self, asked: Driver) -> Driver {
        let leads_to_ours = asked == Driver::Ours || self.has_settings;
        match (leads_to_ours && self.has_ours, asked) {
            (true, _) => Driver::Ours,
            (false, Driver::C) if self.has_c => Driver::C,
            _ => Driver::None,
        }
    }

    fn told(self) -> &'static str {
        match (self.has_ours, self.has_c) {
            (true, _) => "has this xen-blkback-rs, as it is decided",
            (false, true) => "has the C driver, which nothing loads from there",
            (false, false) => "has no driver of disks",
        }
    }
}

/// Whether a path leads to this module, packed or not.
fn is_module(path: &str, name: &str) -> bool {
    let file = path.rsplit('/').next().unwrap_or_default();
    file.starts_with(name)
}

/// An initramfs.
struct InitramfsImage {
    name: String,
    path: PathBuf,
    release: String,
    content: Content,
    /// Command that makes it again.
    again: String,
}

impl InitramfsImage {
    /// Returns the problem with the driver that is loaded from it.
    fn loads(&self, host: &Host) -> Option<Finding> {
        let (wanted, name, again) = (decided(host), &self.name, &self.again);
        for (place, asked) in early(host) {
            let loaded = self.content.serves(asked);
            if !matches!(loaded, Driver::None) && loaded != wanted {
                let what = format!(
                    "{name} loads {} early, because {place} names {}, and {} is decided for",
                    loaded.name(),
                    asked.name(),
                    wanted.name()
                );
                let remedy = format!(
                    "name {} there instead, or none; then {again}",
                    wanted.name()
                );
                return Some(warn(ABOUT, what, remedy));
            }
        }
        match (wanted, self.content) {
            (
                Driver::Ours,
                Content {
                    has_c: true,
                    has_settings: false,
                    ..
                },
            ) => {
                let what = format!("{name} has xen-blkback and no settings that lead to xen-blkback-rs, so who asks for a driver from there gets the C driver");
                Some(warn(ABOUT, what, again))
            }
            (
                Driver::C,
                Content {
                    has_ours: true,
                    has_settings: true,
                    ..
                },
            ) => {
                let what = format!("{name} has xen-blkback-rs and the settings that lead to it, and the C driver is decided for");
                Some(warn(ABOUT, what, again))
            }
            _ => None,
        }
    }

    /// Whether our module in there is another one than that of the root file system.
    fn is_old(&self, host: &Host) -> Option<Finding> {
        if !self.content.has_ours {
            return None;
        }
        let (name, release) = (&self.name, &self.release);
        let Some(file) = module_file(host, release) else {
            let what =
                format!("{name} has a module xen-blkback-rs, and /lib/modules/{release} has none");
            return Some(warn(ABOUT, what, &self.again));
        };
        match is_older(&self.path, &file) {
            Ok(false) => None,
            Ok(true) => {
                let what = format!(
                    "{name} is older than {}, so it contains an earlier xen-blkback-rs",
                    file.display()
                );
                Some(warn(ABOUT, what, &self.again))
            }
            Err(error) => {
                let what = format!("cannot compare {name} with {}: {error}", file.display());
                Some(warn(ABOUT, what, "be root, and depmod"))
            }
        }
    }
}

/// Whether an initramfs was made before a module came to its place. A package keeps the time at which the module was
/// built, so it is that of the change of the file that counts. Contents cannot be compared: dracut strips them.
fn is_older(image: &Path, module: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let (image, module) = (fs::metadata(image)?, fs::metadata(module)?);
    let written = (image.mtime(), image.mtime_nsec());
    Ok(written < (module.ctime(), module.ctime_nsec()))
}

/// Returns the drivers that are loaded from it at boot, and the places that name them.
fn early(host: &Host) -> Vec<(String, Driver)> {
    let mut found = Vec::new();
    let mut add = |place: &str, line: &str| {
        let words = line.split(|letter: char| !letter.is_alphanumeric() && !"-_".contains(letter));
        let drivers = words.filter_map(Driver::named);
        found.extend(drivers.map(|driver| (place.to_owned(), driver)));
    };
    for line in lines(host, EARLY) {
        add(EARLY, &line);
    }
    for place in DRACUT {
        let is_folder = host.path(place).is_dir();
        let files = match is_folder {
            true => host
                .names(&host.path(place))
                .into_iter()
                .map(|name| format!("{place}/{name}"))
                .collect(),
            false => vec![place.to_owned()],
        };
        for file in files {
            let forced = lines(host, &file).into_iter();
            for line in forced.filter(|line| line.starts_with("force_drivers")) {
                add(&file, &line);
            }
        }
    }
    let command = host
        .optional(&host.path("/proc/cmdline"))
        .unwrap_or_default();
    let words = command.split_whitespace();
    for names in words.filter_map(|word| word.strip_prefix("rd.driver.pre=")) {
        add("the kernel's command line", names);
    }
    found
}

/// The lines of a file that are no comments; none if it is not there.
fn lines(host: &Host, path: &str) -> Vec<String> {
    let text = host.optional(&host.path(path)).unwrap_or_default();
    let lines = text.lines().map(|line| line.trim().to_owned());
    lines.filter(|line| !line.starts_with('#')).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::well;
    use super::{asked, look, Content, Finding, ListedFiles, Maker};
    use crate::doctor::FindingGrade;
    use crate::host::made::Made;
    use std::fs::{remove_file, File};
    use std::time::{Duration, SystemTime};

    const IMAGE: &str = "/boot/initrd.img-7.2-amd64";
    const MODULE: &str = "/lib/modules/7.2-amd64/updates/xen-blkback-rs.ko";
    const C: &str =
        "usr/lib/modules/7.2-amd64/kernel/drivers/block/xen-blkback/xen-blkback.ko.xz\n";
    const OURS: &str = "usr/lib/modules/7.2-amd64/updates/xen-blkback-rs.ko\n";
    const SETTINGS: &str = "etc/modprobe.d/xen-blkback-rs.conf\n";
    const ENABLED: &str = "/etc/modprobe.d/xen-blkback-rs.conf";

    /// A host with our module and an initramfs that is newer.
    fn host() -> Made {
        let made = well();
        made.file(MODULE, "a module").file(IMAGE, "packed");
        packed_at(&made, SystemTime::now() + Duration::from_secs(60));
        made
    }

    fn packed_at(made: &Made, when: SystemTime) {
        let image = File::options().write(true).open(made.host().path(IMAGE));
        image
            .and_then(|image| image.set_modified(when))
            .expect("its time");
    }

    fn found(made: &Made, listing: &str) -> Vec<Finding> {
        look(&made.host(), |image| {
            assert_eq!(image, made.host().path(IMAGE));
            ListedFiles::By(Maker::InitramfsTools, listing.into())
        })
    }

    /// The one thing that is wrong.
    #[track_caller]
    fn wrong(made: &Made, listing: &str, what: &str) {
        let found = found(made, listing);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].what.contains(what), "{found:?}");
        assert_eq!(found[0].grade, FindingGrade::Warn, "{found:?}");
        let remedy = found[0].remedy.as_deref().unwrap_or_default();
        assert!(
            remedy.ends_with("update-initramfs -u -k 7.2-amd64"),
            "{remedy}"
        );
    }

    #[track_caller]
    fn well_with(made: &Made, listing: &str) {
        let found = found(made, listing);
        assert!(
            found.iter().all(|one| one.grade == FindingGrade::Ok),
            "{found:?}"
        );
        assert_eq!(found.len(), 1, "{found:?}");
    }

    #[test]
    fn lists_of_both_programs_are_read() {
        let long = "Image: /boot/initrd.img-7.2: 30M\n\
            -rw-r--r--   1 root     root        51234 Jan  1  1970 usr/lib/modules/7.2/updates/xen-blkback-rs.ko.zst\n\
            lrwxrwxrwx   1 root     root           11 Jan  1  1970 etc/modprobe.d/xen-blkback-rs.conf -> ../x.conf\n";
        let expected = Content {
            has_c: false,
            has_ours: true,
            has_settings: true,
        };
        assert_eq!(Content::of(long), expected);
        assert_eq!(Content::of(&format!("{OURS}{SETTINGS}")), expected);
        let c = Content {
            has_c: true,
            has_ours: false,
            has_settings: false,
        };
        assert_eq!(Content::of(C), c);
    }

    #[test]
    fn a_driver_that_is_decided_for_may_be_in_there() {
        for listing in [
            "",
            SETTINGS,
            &format!("{C}{SETTINGS}"),
            &format!("{C}{OURS}{SETTINGS}"),
            OURS,
        ] {
            well_with(&host(), listing);
        }
        // A comment has no effect.
        let made = host();
        made.file("/etc/initramfs-tools/modules", "# xen-blkback\n");
        made.file("/etc/dracut.conf", "#force_drivers+=xen-blkback\n");
        well_with(&made, &format!("{C}{SETTINGS}"));
        // The settings have it loaded early.
        made.file(
            "/etc/initramfs-tools/modules",
            "# xen-blkback\nxen_blkback\n",
        );
        well_with(&made, &format!("{C}{OURS}{SETTINGS}"));
    }

    #[test]
    fn the_c_driver_without_settings_that_lead_to_ours_is_told() {
        wrong(&host(), C, "no settings that lead to xen-blkback-rs");
        wrong(
            &host(),
            &format!("{C}{OURS}"),
            "no settings that lead to xen-blkback-rs",
        );
        let made = host();
        remove_file(made.host().path(ENABLED)).expect("disabled");
        well_with(&made, C);
        wrong(
            &made,
            &format!("{C}{OURS}{SETTINGS}"),
            "the C driver is decided for",
        );
    }

    #[test]
    fn what_is_loaded_early_against_the_decision_is_told_with_its_place() {
        for (place, text) in [
            ("/etc/initramfs-tools/modules", "loop\nxen-blkback\n"),
            ("/etc/dracut.conf", "force_drivers+=\" xen-blkback \"\n"),
            (
                "/etc/dracut.conf.d/x.conf",
                "force_drivers+=\"nvme xen_blkback\"\n",
            ),
        ] {
            let made = host();
            made.file(place, text);
            // Ours is not in there, so the settings do not help.
            let what = format!("loads the C driver xen-blkback early, because {place} names");
            wrong(&made, &format!("{C}{SETTINGS}"), &what);
        }
        let made = host();
        made.file("/proc/cmdline", "quiet rd.driver.pre=nvme,xen_blkback\n");
        wrong(&made, C, "because the kernel's command line names");
        made.file("/proc/cmdline", "quiet\n");
        made.file("/etc/initramfs-tools/modules", "xen-blkback-rs\n");
        remove_file(made.host().path(ENABLED)).expect("disabled");
        wrong(&made, OURS, "loads xen-blkback-rs early");
        // A module that is only added is not loaded, and one that is not in the image cannot be.
        made.file("/etc/dracut.conf", "add_drivers+=\" xen-blkback-rs \"\n");
        well_with(&made, C);
    }

    #[test]
    fn an_earlier_copy_of_our_module_is_told() {
        let made = host();
        packed_at(&made, SystemTime::now() - Duration::from_secs(3600));
        wrong(&made, &format!("{OURS}{SETTINGS}"), "contains an earlier");
        well_with(&made, &format!("{C}{SETTINGS}"));
        made.file("/lib/modules/7.2-amd64/modules.dep", "kernel/a.ko:\n");
        wrong(&made, OURS, "/lib/modules/7.2-amd64 has none");
    }

    #[test]
    fn what_is_not_looked_into_is_told() {
        let one = |made: &Made, listed: ListedFiles| {
            let mut found = look(&made.host(), |_| listed.clone());
            assert_eq!(found.len(), 1);
            found.remove(0)
        };
        let made = host();
        let nobody = one(&made, ListedFiles::Nobody);
        assert!(nobody
            .what
            .contains("was not looked into: there is neither"));
        assert_eq!(nobody.grade, FindingGrade::Ok);
        let failed = one(&made, ListedFiles::Failed("no such luck".into()));
        assert!(failed.what.ends_with("was not looked into: no such luck"));
        assert_eq!(failed.grade, FindingGrade::Warn);
        remove_file(made.host().path(IMAGE)).expect("removed");
        let none = one(&made, ListedFiles::Nobody);
        assert_eq!(none.what, "/boot has none for 7.2-amd64");
        made.file("/boot/initramfs-7.2-amd64.img", "");
        let dracut = one(&made, ListedFiles::By(Maker::Dracut, C.into()));
        assert_eq!(dracut.remedy.as_deref(), Some("dracut -f --kver 7.2-amd64"));
    }

    /// Programs that every host has stand for those of an initramfs.
    #[test]
    fn a_program_that_fails_or_hangs_is_told() {
        let made = Made::new();
        made.file("/image", C);
        let image = made.host().path("/image");
        let ask = |program, image, limit| asked(Maker::Dracut, program, image, limit);
        let long = Duration::from_secs(60);
        let expected = Some(ListedFiles::By(Maker::Dracut, C.trim().into()));
        assert_eq!(ask("cat", &image, long), expected);
        assert_eq!(ask("no-such-program-here", &image, long), None);
        let nowhere = made.host().path("/nowhere");
        let Some(ListedFiles::Failed(why)) = ask("cat", &nowhere, long) else {
            panic!("there is no such file");
        };
        assert!(
            why.contains("cat has failed") && why.contains("/nowhere"),
            "{why}"
        );
        // `sleep` takes the name as a time.
        let hung = ask("sleep", "infinity".as_ref(), Duration::from_millis(1));
        assert_eq!(
            hung,
            Some(ListedFiles::Failed("sleep did not come to an end".into()))
        );
    }
}
