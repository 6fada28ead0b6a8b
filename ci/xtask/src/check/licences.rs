// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Licences: a header on each source, and dependencies that may be linked. A quick stand-in for
//! cargo-deny, which takes minutes to install and runs in the nightly lane.

use super::source::Source;
use crate::{build, run};
use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::BTreeMap;

const DENY: &str = include_str!("../../../../deny.toml");

/// The endings of files that must carry a licence header.
const WITH_HEADER: &[&str] = &[
    ".rs",
    ".c",
    ".h",
    ".sh",
    ".py",
    ".hook",
    ".packages",
    ".conf",
];

/// The sources whose first two lines hold no SPDX identifier.
pub(super) fn without_header(sources: &[Source]) -> Vec<String> {
    sources
        .iter()
        .filter(|source| {
            WITH_HEADER
                .iter()
                .any(|ending| source.path.ends_with(ending))
        })
        .filter(|source| {
            !source
                .text
                .lines()
                .take(2)
                .any(|line| line.contains("SPDX-License-Identifier: "))
        })
        .map(|source| {
            format!(
                "{}: no SPDX-License-Identifier in its first two lines",
                source.path
            )
        })
        .collect()
}

/// The dependencies' licences are allowed, and no crate is there in two versions.
pub(super) fn check() -> Result<()> {
    let mut cargo = build::cargo();
    cargo.args(["metadata", "--locked", "--format-version", "1"]);
    // Crates for other systems are never built, so they need not even be downloaded.
    cargo
        .args(["--filter-platform", build::TARGET])
        .current_dir(build::repository()?);
    let metadata: Value = serde_json::from_str(&run::output(&mut cargo)?)?;
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata has no packages")?;
    let packages: Vec<Package<'_>> = packages.iter().filter_map(Package::foreign).collect();
    super::none(complaints(
        &packages,
        &list(DENY, "allow"),
        &list(DENY, "skip"),
    ))
}

struct Package<'a> {
    name: &'a str,
    version: &'a str,
    licence: &'a str,
}

impl<'a> Package<'a> {
    /// A package of a registry; ours have no source.
    fn foreign(value: &'a Value) -> Option<Self> {
        value["source"].as_str()?;
        Some(Package {
            name: value["name"].as_str()?,
            version: value["version"].as_str()?,
            licence: value["license"].as_str().unwrap_or(""),
        })
    }
}

fn complaints(packages: &[Package<'_>], allowed: &[&str], twice: &[&str]) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in packages {
        versions
            .entry(package.name)
            .or_default()
            .push(package.version);
        if !permits(package.licence, allowed) {
            complaints.push(format!(
                "{} {} has the licence \"{}\", which deny.toml does not allow",
                package.name, package.version, package.licence
            ));
        }
    }
    for (name, versions) in versions {
        if versions.len() > 1 && !twice.contains(&name) {
            complaints.push(format!(
                "{name} is there as {}: use one version, or name it in deny.toml's skip list",
                versions.join(" and ")
            ));
        }
    }
    complaints
}

/// An SPDX expression can be met with the allowed licences. OR binds weaker than AND.
fn permits(expression: &str, allowed: &[&str]) -> bool {
    let plain = expression.replace('/', " OR ").replace(['(', ')'], " ");
    // With parentheses the precedence differs; then every licence that is named must be allowed.
    let words = |text: &str, by: &str| -> Vec<String> {
        text.split(by).map(|w| w.trim().to_string()).collect()
    };
    let known = |licence: &String| allowed.contains(&licence.as_str());
    if expression.contains('(') && expression.contains(" AND ") {
        return words(&plain, " AND ")
            .iter()
            .all(|part| words(part, " OR ").iter().any(known));
    }
    words(&plain, " OR ")
        .iter()
        .any(|part| words(part, " AND ").iter().all(known))
}

/// The strings of the list `key = [...]` in deny.toml.
fn list<'a>(toml: &'a str, key: &str) -> Vec<&'a str> {
    let start = format!("{key} = [");
    let lines = toml.lines().skip_while(|line| !line.starts_with(&start));
    let mut found = Vec::new();
    for line in lines {
        let line = line.split('#').next().unwrap_or("");
        found.extend(line.split('"').skip(1).step_by(2));
        if line.contains(']') {
            break;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{complaints, list, permits, without_header, Package, Source};

    fn package<'a>(name: &'a str, version: &'a str, licence: &'a str) -> Package<'a> {
        Package {
            name,
            version,
            licence,
        }
    }

    #[test]
    fn file_without_a_header_is_found() {
        let file = |text: &str| Source {
            path: "a/b.rs".into(),
            text: text.into(),
        };
        assert_eq!(without_header(&[file("//! Docs.\n")]).len(), 1);
        assert!(without_header(&[file("// SPDX-License-Identifier: MIT\n")]).is_empty());
    }

    #[test]
    fn forbidden_licence_is_found() {
        assert_eq!(
            complaints(&[package("a", "1", "GPL-3.0-only")], &["MIT"], &[]).len(),
            1
        );
        assert_eq!(complaints(&[package("a", "1", "")], &["MIT"], &[]).len(), 1);
    }

    #[test]
    fn crate_in_two_versions_is_found() {
        let two = [package("a", "1", "MIT"), package("a", "2", "MIT")];
        assert_eq!(complaints(&two, &["MIT"], &[]).len(), 1);
        assert!(complaints(&two, &["MIT"], &["a"]).is_empty());
    }

    #[test]
    fn expressions_are_understood() {
        assert!(permits("MIT OR X", &["MIT"]));
        assert!(permits("X/MIT", &["MIT"]));
        assert!(!permits("MIT AND X", &["MIT"]));
        assert!(permits("(MIT OR X) AND Y", &["MIT", "Y"]));
        assert!(!permits("(MIT OR X) AND Y", &["MIT"]));
    }

    #[test]
    fn lists_are_read() {
        assert_eq!(
            list("allow = [\n  \"A\", # \"C\"\n  \"B\",\n]\n", "allow"),
            ["A", "B"]
        );
        assert_eq!(list("skip = []\n", "skip"), [""; 0]);
    }
}
