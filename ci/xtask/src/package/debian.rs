// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The folder `debian`: the description of the packages for debhelper.

use super::commit::Commit;
use super::copyright;
use crate::{artifacts, kernel};
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;

/// The files in the folder `debian`, by name; `@RELEASE@` in names and texts is the kernel's.
const DEBIAN: &[(&str, &str)] = &[
    (
        "control",
        include_str!("../../../packaging/debian/control.in"),
    ),
    ("rules", include_str!("../../../packaging/debian/rules")),
    (
        "xen-blkback-rs.install",
        include_str!("../../../packaging/debian/xen-blkback-rs.install"),
    ),
    (
        "xen-blkback-rs.postinst",
        include_str!("../../../packaging/debian/xen-blkback-rs.postinst"),
    ),
    (
        "xen-blkback-rs.prerm",
        include_str!("../../../packaging/debian/xen-blkback-rs.prerm"),
    ),
    (
        "xen-blkback-rs.lintian-overrides",
        include_str!("../../../packaging/debian/xen-blkback-rs.lintian-overrides"),
    ),
    (
        "xen-blkback-rs-modules-@RELEASE@.lintian-overrides",
        include_str!("../../../packaging/debian/modules.lintian-overrides.in"),
    ),
    (
        "xen-blkback-rs-modules-@RELEASE@.install",
        "usr/lib/modules\n",
    ),
    (
        "xen-blkback-rs-modules-@RELEASE@-dbg.lintian-overrides",
        include_str!("../../../packaging/debian/modules.lintian-overrides.in"),
    ),
    (
        "xen-blkback-rs-modules-@RELEASE@-dbg.install",
        "usr/lib/debug\n",
    ),
    (
        "xen-blkback-rs-modules-@RELEASE@.preinst",
        include_str!("../../../packaging/debian/modules.preinst.in"),
    ),
    (
        "xen-blkback-rs-modules-@RELEASE@.postinst",
        include_str!("../../../packaging/debian/modules.postinst.in"),
    ),
    (
        "xen-blkback-rs-modules-@RELEASE@.postrm",
        include_str!("../../../packaging/debian/modules.postinst.in"),
    ),
    ("xen-blkback-rs-dkms.install", "usr/src\nusr/lib/depmod.d\n"),
    (
        "xen-blkback-rs-dkms.dkms",
        include_str!("../../../packaging/dkms/dkms.conf"),
    ),
];

/// Writes the folder `debian`.
pub(super) fn describe(debian: &Path, commit: &Commit) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let release = artifacts::release(&artifacts::build_root()?)?;
    for (name, text) in DEBIAN {
        let place = debian.join(name.replace("@RELEASE@", &release));
        let text = filled(text, &release, commit);
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
    Ok(fs::write(debian.join("copyright"), copyright::text()?)?)
}

/// Replaces words such as `@RELEASE@` in a text.
fn filled(text: &str, release: &str, commit: &Commit) -> String {
    let series = |each: fn(&str) -> String, between: &str| {
        let all: Vec<String> = kernel::SERIES.iter().map(|series| each(series)).collect();
        all.join(between)
    };
    text.replace("@RELEASE@", release)
        .replace("@MAINTAINER@", &commit.author)
        .replace("@VERSION@", &commit.version)
        .replace("@SERIES@", &series(|its| its.replace('.', "\\."), "|"))
        .replace(
            "@SOURCES@",
            &series(|its| format!("linux-source-{its}"), " | "),
        )
}

#[cfg(test)]
mod tests {
    use super::{filled, Commit, DEBIAN};

    const RECIPE: &str = include_str!("../../../recipes/dkms-root.packages");

    fn text(name: &str) -> String {
        let (_, text) = DEBIAN
            .iter()
            .find(|(its, _)| *its == name)
            .expect("it is there");
        let commit = Commit {
            version: "1.0".into(),
            seconds: String::new(),
            date: String::new(),
            author: "Some Body <some@body>".into(),
        };
        filled(text, "7.3.4-amd64", &commit)
    }

    #[test]
    fn nothing_is_left_to_fill_in() {
        for (name, _) in DEBIAN {
            let text = text(name);
            let left = text.split_whitespace().find(|word| {
                let word =
                    word.trim_matches(|byte: char| !byte.is_ascii_uppercase() && byte != '@');
                word.len() > 2 && word.starts_with('@') && word.ends_with('@')
            });
            assert_eq!(left, None, "{name}");
        }
    }

    #[test]
    fn kernels_that_are_not_known_are_passed_by() {
        let conf = text("xen-blkback-rs-dkms.dkms");
        assert!(
            conf.contains("BUILD_EXCLUSIVE_KERNEL=\"^(7\\.3|7\\.2)\\.\""),
            "{conf}"
        );
    }

    /// The test of the module's source package runs on a tree without other packages.
    #[test]
    fn the_tree_for_dkms_has_what_the_package_depends_on() {
        let control = text("control");
        let of_dkms = control
            .split("Package: ")
            .find(|its| its.starts_with("xen-blkback-rs-dkms\n"));
        let depends = of_dkms.and_then(|its| its.split("Depends: ").nth(1)?.lines().next());
        let depends = depends.expect("it depends on something").split(", ");
        let named = depends.filter(|its| !its.starts_with("linux-source") && !its.starts_with('$'));
        let recipe = RECIPE.lines().filter(|line| !line.starts_with('#'));
        let installed: Vec<&str> = recipe.flat_map(str::split_whitespace).collect();
        // debhelper adds dkms.
        assert_eq!(installed, Vec::from_iter(["dkms"].into_iter().chain(named)));
    }
}
