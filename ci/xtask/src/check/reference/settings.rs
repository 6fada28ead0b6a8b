// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Tables of names that the source declares: parameters of the module with their defaults, files of a disk in sysfs,
//! and words of targets.

use super::super::source::Source;
use super::{cells, quoted};
use anyhow::{ensure, Context, Result};
use std::collections::{BTreeMap, BTreeSet};

const MODULE: &str = "blkback/src/blkback_main.rs";
const SHIM: &str = "xenbus/shim/shim.c";
/// Beginning of the paths of the sources that name the kinds of targets.
const TARGET: &str = "userspace/control/src/target";
const PARAMETERS: &str = "docs/reference/module-parameters.md";
const PARAMETERS_MANUAL: &str = "ci/packaging/xen-blkback-rs.7";
const STATISTICS: &str = "docs/reference/statistics.md";
/// Pages that explain every kind of target.
const TARGETS: [&str; 4] = [
    "docs/reference/targets.md",
    "ci/packaging/tapdisk.8",
    "userspace/tapdisk/src/main.rs",
    "userspace/tap-ctl/src/cli/notes.rs",
];

pub(super) fn complaints(sources: &[Source]) -> Result<Vec<String>> {
    let mut complaints = parameters(sources)?;
    complaints.extend(statistics(sources)?);
    complaints.extend(kinds(sources)?);
    Ok(complaints)
}

fn text<'s>(sources: &'s [Source], path: &str) -> Result<&'s str> {
    let source = sources.iter().find(|source| source.path == path);
    Ok(&source.with_context(|| format!("{path} is missing"))?.text)
}

/// Compares the parameters of the module, and their defaults, with the page's.
fn parameters(sources: &[Source]) -> Result<Vec<String>> {
    let mut declared = of_module(text(sources, MODULE)?);
    declared.extend(of_shim(text(sources, SHIM)?));
    ensure!(!declared.is_empty(), "no parameter of the module was found");
    let page = in_table(text(sources, PARAMETERS)?);
    let manual = in_manual(text(sources, PARAMETERS_MANUAL)?);
    let mut complaints = Vec::new();
    for (path, listed) in [(PARAMETERS, page), (PARAMETERS_MANUAL, manual)] {
        complaints.extend(compared(path, declared.keys(), listed.keys()));
        for (name, default) in &declared {
            let shown = listed.get(name).filter(|shown| *shown != default);
            complaints.extend(
                shown.map(|shown| format!("{path}: {name} has the default {default}, not {shown}")),
            );
        }
    }
    Ok(complaints)
}

/// Returns the parameters of a page's table, with their defaults.
fn in_table(page: &str) -> BTreeMap<String, String> {
    let rows = page.lines().filter_map(cells);
    let listed = rows.filter_map(|row| {
        let name = row.first()?.strip_prefix('`')?.strip_suffix('`')?;
        Some((name.to_string(), row.get(1)?.to_string()))
    });
    listed.collect()
}

/// Returns the parameters of the manual page, with their defaults.
fn in_manual(page: &str) -> BTreeMap<String, String> {
    let listed = super::items(page, "PARAMETERS", ".It Cm ").map(|item| {
        match item.split_once(" Pq default ") {
            Some((name, default)) => (name.to_string(), default.to_string()),
            None => (item.to_string(), "-".to_string()),
        }
    });
    listed.collect()
}

/// Returns the parameters that the module declares in Rust, with their defaults.
fn of_module(text: &str) -> BTreeMap<String, String> {
    let behind = text
        .split_once("params: {")
        .map_or("", |(_, behind)| behind);
    let mut declared = BTreeMap::new();
    let mut name = None;
    for line in behind.lines().map(str::trim) {
        if line == "}" {
            break;
        }
        if let Some((left, _)) = line.strip_suffix('{').and_then(|line| line.split_once(':')) {
            name = Some(left.to_string());
        } else if let Some(default) = line.strip_prefix("default: ") {
            let default = default.trim_end_matches(',').to_string();
            declared.extend(name.take().map(|name| (name, default)));
        }
    }
    declared
}

/// Returns the parameters that the shim declares in C. One that is only read has no default.
fn of_shim(text: &str) -> BTreeMap<String, String> {
    let mut declared = BTreeMap::new();
    for rest in text.split("\nmodule_param(").skip(1) {
        let arguments = rest.split(')').next().unwrap_or_default();
        let arguments: Vec<&str> = arguments.split(',').map(str::trim).collect();
        let [name, kind, mode] = arguments[..] else {
            continue;
        };
        let set = text.split_once(&format!(" {name} = "));
        let set = set.and_then(|(_, value)| Some(value.split_once(';')?.0));
        let default = match (mode, kind, set) {
            ("0444", _, _) => "-",
            (_, "bool", Some("true")) => "Y",
            (_, "bool", _) => "N",
            (_, _, set) => set.unwrap_or("0"),
        };
        declared.insert(name.to_string(), default.to_string());
    }
    declared
}

/// Compares the files of a disk in sysfs with the page's.
fn statistics(sources: &[Source]) -> Result<Vec<String>> {
    let shim = text(sources, SHIM)?;
    let mut declared = BTreeSet::new();
    for (mark, end) in [("STAT(", ")"), ("DEVICE_ATTR_RO(", ")")] {
        for rest in shim.split(mark).skip(1) {
            let name = rest.split(end).next().unwrap_or_default();
            // The parameters of macros are no names.
            if !["name", "STAT"].contains(&name)
                && name.chars().all(|c| c.is_alphanumeric() || c == '_')
            {
                declared.insert(name.to_string());
            }
        }
    }
    ensure!(!declared.is_empty(), "no file of sysfs was found");
    let rows = text(sources, STATISTICS)?.lines().filter_map(cells);
    let first = rows.filter_map(|row| row.first().copied());
    let names = first.flat_map(|cell| quoted(cell).into_iter().map(|(_, name)| name));
    let listed: BTreeSet<String> = names
        .map(|name| name.trim_start_matches("statistics/").to_string())
        .collect();
    Ok(compared(STATISTICS, declared.iter(), listed.iter()))
}

/// Complains of pages about targets that leave out a kind.
fn kinds(sources: &[Source]) -> Result<Vec<String>> {
    let of_target = |source: &&Source| source.path.starts_with(TARGET);
    let table = |source: &'_ Source| {
        let (_, behind) = source.text.split_once("macro_rules! driver_table {")?;
        Some(behind.split_once("\n}\n")?.0.to_string())
    };
    let table = sources.iter().filter(of_target).find_map(table);
    let lines = table.iter().flat_map(|table| table.lines());
    let lines: Vec<&str> = lines.map(str::trim).collect();
    let names = lines.iter().filter(|line| !line.starts_with("//"));
    let names: String = names.copied().collect();
    let kinds: Vec<&str> = names.split('"').skip(1).step_by(2).collect();
    ensure!(!kinds.is_empty(), "no kind of target is in {TARGET}");
    let mut complaints = Vec::new();
    for page in TARGETS {
        let text = text(sources, page)?;
        let missing = kinds
            .iter()
            .filter(|kind| !text.contains(&format!("{kind}:")));
        complaints.extend(missing.map(|kind| format!("{page}: it leaves out targets of {kind}:")));
    }
    Ok(complaints)
}

fn compared<'n>(
    page: &str,
    declared: impl Iterator<Item = &'n String>,
    listed: impl Iterator<Item = &'n String>,
) -> Vec<String> {
    let (declared, listed): (BTreeSet<_>, BTreeSet<_>) = (declared.collect(), listed.collect());
    let missing = declared.difference(&listed);
    let mut complaints: Vec<String> = missing
        .map(|name| format!("{page}: it leaves out {name}"))
        .collect();
    complaints.extend(
        listed
            .difference(&declared)
            .map(|name| format!("{page}: the source has no {name}")),
    );
    complaints
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUST: &str = "module! {\n    params: {\n        queues: u32 {\n            default: 0,\n            description: \"a: {\",\n        },\n    },\n}\n";
    const C: &str = "static bool kept = true;\nmodule_param(kept, bool, 0644);\nstatic unsigned int used;\nmodule_param(used, uint, 0444);\nstatic unsigned int most = 256;\nmodule_param(most, uint, 0644);\n#define X(STAT) STAT(reads) STAT(writes)\nstatic DEVICE_ATTR_RO(name);\nstatic DEVICE_ATTR_RO(mode);\n";
    const PAGE: &str = "| parameter | default |\n|---|---|\n| `queues` | 0 |\n| `kept` | Y |\n| `used` | - |\n| `most` | 256 |\n";
    const MANUAL: &str = ".Sh NAME\n.It Cm none\n.Sh PARAMETERS\n.It Cm queues Pq default 0\n.It Cm kept Pq default Y\n.It Cm used\n.It Cm most Pq default 256\n.Sh FILES\n";
    const FILES: &str = "| `mode` | w |\n| `statistics/reads`, `writes` | b |\n";
    const KINDS: &str =
        "macro_rules! driver_table {\n raw {\n /// No \"kind\".\n A \"aio\" RAW;\n }\n B \"ram\" MEMORY;\n}\n";

    fn sources(page: &str, files: &str, help: &str) -> Vec<Source> {
        let mut sources = vec![
            Source::of(MODULE, RUST),
            Source::of(SHIM, C),
            Source::of(PARAMETERS, page),
            Source::of(PARAMETERS_MANUAL, MANUAL),
            Source::of(STATISTICS, files),
            Source::of("userspace/control/src/target/driver.rs", KINDS),
        ];
        sources.extend(TARGETS.map(|path| Source::of(path, help)));
        sources
    }

    #[test]
    fn pages_that_agree_are_sound() {
        let found = complaints(&sources(PAGE, FILES, "aio:A ram:B")).unwrap();
        assert!(found.is_empty(), "{found:?}");
    }

    #[test]
    fn each_fault_of_a_page_is_found() {
        let planted = PAGE
            .replace("`kept` | Y", "`kept` | N")
            .replace("`most`", "`least`");
        let found = complaints(&sources(
            &planted,
            "| `mode`, `reads`, `planted` | w |\n",
            "aio:A",
        ))
        .unwrap();
        for complaint in [
            "module-parameters.md: it leaves out most",
            "module-parameters.md: the source has no least",
            "kept has the default Y, not N",
            "statistics.md: it leaves out writes",
            "statistics.md: the source has no planted",
            "targets.md: it leaves out targets of ram:",
        ] {
            assert!(
                found.iter().any(|one| one.ends_with(complaint)),
                "{complaint}: {found:?}"
            );
        }
        assert_eq!(found.len(), 5 + TARGETS.len());
    }

    #[test]
    fn a_fault_of_the_manual_page_is_found() {
        let mut planted = sources(PAGE, FILES, "aio:A ram:B");
        planted[3].text = MANUAL.replace("default 256", "default 255");
        let found = complaints(&planted).unwrap();
        assert_eq!(
            found,
            ["ci/packaging/xen-blkback-rs.7: most has the default 256, not 255"]
        );
    }

    #[test]
    fn sources_without_names_are_no_agreement() {
        let mut empty = sources(PAGE, FILES, "");
        empty[1].text.clear();
        assert!(complaints(&empty).is_err());
        assert!(complaints(&[]).is_err());
    }
}
