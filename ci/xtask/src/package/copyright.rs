// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The file `copyright`: parts of the programs, their holders, and their licences.

use crate::{build, install, run};
use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

/// Entries for this project, and for parts in other languages than Rust.
const OURS: &str = include_str!("../../../packaging/debian/copyright.in");

/// Licences whose texts Debian has in /usr/share/common-licenses, with their names there.
const COMMON: &[(&str, &str)] = &[
    ("Apache-2.0", "Apache-2.0"),
    ("GPL-2.0-only", "GPL-2"),
    ("GPL-3.0-only", "GPL-3"),
    ("LGPL-2.1-or-later", "LGPL-2.1"),
];

/// Other licences, and a crate under each that has the text.
const TEXTS: &[(&str, &str, &str)] = &[
    ("0BSD", "adler2", "LICENSE-0BSD"),
    (
        "Apache-2.0-with-LLVM-exception",
        "rustix",
        "LICENSE-Apache-2.0_WITH_LLVM-exception",
    ),
    ("BSD-2-Clause", "zerocopy", "LICENSE-BSD"),
    ("BSD-3-Clause", "seccompiler", "LICENSE-BSD-3-Clause"),
    ("BSL-1.0", "ryu", "LICENSE-BOOST"),
    ("ISC", "rustls", "LICENSE-ISC"),
    ("MIT", "bitflags", "LICENSE-MIT"),
    ("Unicode-3.0", "unicode-ident", "LICENSE-UNICODE"),
    ("Unlicense", "memchr", "UNLICENSE"),
    ("Zlib", "miniz_oxide", "LICENSE-ZLIB.md"),
];

/// Start of the exception in the text of a licence with one.
const EXCEPTION: &str = "--- LLVM Exceptions";

/// A crate, by its name and version.
type CrateId = (String, String);

/// Description of a crate by its manifest.
#[derive(Debug, Default)]
struct CrateManifest {
    licence: String,
    holders: BTreeSet<String>,
    folder: PathBuf,
    /// The programs that contain it.
    programs: BTreeSet<&'static str>,
}

/// Returns the whole text.
pub(super) fn text() -> Result<String> {
    let parts = parts()?;
    let mut text = OURS.to_owned();
    for ((name, version), part) in &parts {
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "\nFiles: vendor/{name}-{version}/*\nCopyright: {}\nLicense: {}\nComment: In {}.\n",
            lines(&part.holders),
            part.licence,
            Vec::from_iter(part.programs.iter().copied()).join(", "),
        );
    }
    let licences: BTreeSet<String> = text
        .lines()
        .filter_map(|line| line.strip_prefix("License: "))
        .flat_map(names)
        .map(str::to_owned)
        .collect();
    for licence in licences {
        let _ = write!(
            text,
            "\nLicense: {licence}\n{}",
            indented(&full(&licence, &parts)?)
        );
    }
    Ok(text)
}

/// Returns the crates of other projects in the programs.
fn parts() -> Result<BTreeMap<CrateId, CrateManifest>> {
    let described = described()?;
    let mut parts: BTreeMap<CrateId, CrateManifest> = BTreeMap::new();
    for program in install::PROGRAMS.iter().map(|program| program.name) {
        for id in contained(program)? {
            if let Some(part) = parts.get_mut(&id) {
                part.programs.insert(program);
                continue;
            }
            let (name, version) = &id;
            let about = described
                .get(&id)
                .with_context(|| format!("cargo does not describe {name} {version}"))?;
            let part = CrateManifest {
                programs: [program].into(),
                ..part(name, about)?
            };
            parts.insert(id, part);
        }
    }
    Ok(parts)
}

/// Returns the crates of other projects in a program.
fn contained(program: &str) -> Result<BTreeSet<CrateId>> {
    let mut tree = build::cargo();
    tree.args(["tree", "--locked", "--edges", "normal", "--prefix", "none"]);
    tree.args(["--format", "{p}", "--target", build::TARGET]);
    tree.args(["--package", program]);
    let text = run::output(tree.current_dir(build::repository()?))?;
    // Crates of this workspace show their folder.
    let others = text.lines().filter(|line| !line.contains(" (/"));
    Ok(others.filter_map(id).collect())
}

/// Returns the crate in a line such as `serde v1.0.2 (proc-macro)`.
fn id(line: &str) -> Option<CrateId> {
    let mut words = line.split(' ');
    let name = words.next()?;
    let version = words.next()?.strip_prefix('v')?;
    Some((name.into(), version.into()))
}

/// Returns all crates of the workspace's dependency graph, as cargo describes them.
fn described() -> Result<BTreeMap<CrateId, Value>> {
    let mut cargo = build::cargo();
    cargo.args(["metadata", "--locked", "--format-version", "1"]);
    cargo.args(["--filter-platform", build::TARGET]);
    let text = run::output(cargo.current_dir(build::repository()?))?;
    let mut all: Value = serde_json::from_str(&text)?;
    let packages = all["packages"].as_array_mut().map(std::mem::take);
    let word = |about: &Value, key: &str| about[key].as_str().unwrap_or_default().to_owned();
    let packages = packages.context("cargo describes no crates")?.into_iter();
    Ok(packages
        .map(|about| ((word(&about, "name"), word(&about, "version")), about))
        .collect())
}

fn part(name: &str, about: &Value) -> Result<CrateManifest> {
    let licence = about["license"].as_str();
    let manifest = about["manifest_path"].as_str().map(Path::new);
    let folder = manifest.and_then(Path::parent);
    let folder = folder.with_context(|| format!("cargo does not say where {name} is"))?;
    let mut holders = BTreeSet::new();
    for entry in fs::read_dir(folder)? {
        let file = entry?.path();
        if file.is_file() && says_whose(&file) {
            let text = String::from_utf8_lossy(&fs::read(&file)?).into_owned();
            holders.extend(text.lines().filter_map(holder));
        }
    }
    if holders.is_empty() {
        let authors = about["authors"].as_array().into_iter().flatten();
        holders.extend(authors.filter_map(Value::as_str).map(str::to_owned));
    }
    if holders.is_empty() {
        holders.insert(format!("the contributors of {name}"));
    }
    Ok(CrateManifest {
        licence: expression(licence.with_context(|| format!("{name} names no licence"))?),
        holders,
        folder: folder.into(),
        ..CrateManifest::default()
    })
}

fn says_whose(file: &Path) -> bool {
    let name = file.file_name().unwrap_or_default();
    let name = name.to_string_lossy().to_uppercase();
    ["LICEN", "COPYING", "COPYRIGHT", "NOTICE", "UNLICEN"]
        .iter()
        .any(|start| name.starts_with(start))
}

/// Returns the holder in a line such as `Copyright (c) 2014 Jane Doe`; `None` for templates and other sentences.
fn holder(line: &str) -> Option<String> {
    let line = line.trim_start_matches(|byte: char| !byte.is_ascii_alphanumeric());
    let rest = line
        .strip_prefix("Portions ")
        .unwrap_or(line)
        .strip_prefix("Copyright ")?
        .trim();
    let is_marked = ["(c)", "(C)", "©"]
        .iter()
        .any(|mark| rest.starts_with(mark));
    let rest = rest.trim_start_matches(['(', 'c', 'C', ')', '©', ' ']);
    let is_dated = rest
        .trim_start_matches('[')
        .starts_with(|byte: char| byte.is_ascii_digit());
    // The holder of a licence's text is not the holder of the work under it, as with the GPL.
    let is_somebody = !rest.contains(['<', '{']) || rest.contains('@');
    let is_text = rest.contains("Free Software Foundation");
    (is_somebody && !is_text && (is_marked || is_dated)).then(|| rest.replace(['[', ']'], ""))
}

/// Returns a licence in Debian's form.
fn expression(spdx: &str) -> String {
    spdx.replace('/', " OR ")
        .replace(" WITH LLVM-exception", "-with-LLVM-exception")
        .replace(") AND ", "), and ")
        .replace(" AND ", " and ")
        .replace(" OR ", " or ")
        .replace(['(', ')'], "")
}

/// Returns the licences in an expression.
fn names(expression: &str) -> impl Iterator<Item = &str> {
    let words = expression.split([' ', ',']);
    words.filter(|word| !["", "and", "or"].contains(word))
}

/// Returns the text of a licence, or its place.
fn full(licence: &str, parts: &BTreeMap<CrateId, CrateManifest>) -> Result<String> {
    let common = |licence| {
        let (_, file) = COMMON.iter().find(|(name, _)| *name == licence)?;
        Some(format!(
            "On Debian systems the text is in /usr/share/common-licenses/{file}.\n"
        ))
    };
    if let Some(place) = common(licence) {
        return Ok(place);
    }
    let (_, name, file) = TEXTS
        .iter()
        .find(|(name, _, _)| *name == licence)
        .with_context(|| {
            format!(
                "the text of the licence {licence} is not known: add it to package/copyright.rs"
            )
        })?;
    let part = parts.iter().find(|((its, _), _)| its == name);
    let (_, part) = part.with_context(|| {
        format!("no program contains {name}, which had the text of the licence {licence}: take it from another crate in package/copyright.rs")
    })?;
    let file = part.folder.join(file);
    let text =
        fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    // A licence without its exception is another licence.
    let without = licence.strip_suffix("-with-LLVM-exception");
    Ok(
        match (without.and_then(common), text.split_once(EXCEPTION)) {
            (Some(place), Some((_, exception))) => format!("{place}\n{EXCEPTION}{exception}"),
            _ => text,
        },
    )
}

/// Returns a text as a field's continuation.
fn indented(text: &str) -> String {
    let mut indented = String::new();
    for line in text.trim().lines().map(str::trim_end) {
        let line = if line.is_empty() { "." } else { line };
        let _ = writeln!(indented, " {line}");
    }
    indented
}

/// Returns one holder a line.
fn lines(holders: &BTreeSet<String>) -> String {
    Vec::from_iter(holders.iter().map(String::as_str)).join("\n           ")
}

#[cfg(test)]
mod tests {
    use super::{expression, holder, id, indented, names};

    #[test]
    fn crates_are_read_from_a_tree() {
        let id = |line| id(line).map(|(name, version)| format!("{name} {version}"));
        assert_eq!(id("serde v1.0.2"), Some("serde 1.0.2".into()));
        assert_eq!(
            id("serde_derive v1.0.2 (proc-macro) (*)"),
            Some("serde_derive 1.0.2".into())
        );
        assert_eq!(id(""), None);
    }

    #[test]
    fn holders_are_told_from_other_lines() {
        for (line, who) in [
            ("Copyright (c) 2014 Somebody", "2014 Somebody"),
            ("   Copyright 2019 Some Body", "2019 Some Body"),
            (
                "// Copyright (c) Individual contributors",
                "Individual contributors",
            ),
            ("Copyright [2017] [Some Body]", "2017 Some Body"),
            (
                "Copyright (C) Some Body <some@body>",
                "Some Body <some@body>",
            ),
            (
                "Copyright © 1991-2023 Unicode, Inc.",
                "1991-2023 Unicode, Inc.",
            ),
        ] {
            assert_eq!(holder(line).as_deref(), Some(who), "{line}");
        }
        for line in [
            "Copyright [yyyy] [name of copyright owner]",
            "Copyright (C) <year> <name of author>",
            "Copyright (C) 2007 Free Software Foundation, Inc.",
            "copyright notice that is included",
            "Copyright and Related Rights",
        ] {
            assert_eq!(holder(line), None, "{line}");
        }
    }

    #[test]
    fn licences_are_written_as_debian_does() {
        let text = expression("(MIT OR Apache-2.0) AND Unicode-3.0");
        assert_eq!(text, "MIT or Apache-2.0, and Unicode-3.0");
        assert_eq!(
            Vec::from_iter(names(&text)),
            ["MIT", "Apache-2.0", "Unicode-3.0"]
        );
        assert_eq!(
            expression("Apache-2.0 WITH LLVM-exception OR MIT"),
            "Apache-2.0-with-LLVM-exception or MIT"
        );
        assert_eq!(expression("MIT/Apache-2.0"), "MIT or Apache-2.0");
    }

    #[test]
    fn empty_lines_are_dots() {
        assert_eq!(indented("\na\n\n b\n"), " a\n .\n  b\n");
    }
}
