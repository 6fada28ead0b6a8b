// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Dependencies point down only: over the manifests, `#[path]` lines and `crate::` paths; between the
//! areas, and between the files of those that are large.

use super::source::{self, Source};
use anyhow::Result;

/// A part of the project: its name, its folders, and the areas that it may use besides itself. The first folder that
/// matches decides.
const AREAS: &[(&str, &str, &[&str])] = &[
    ("ring", "ring/", &[]),
    ("xenbus::proto", "xenbus/src/proto/", &["ring"]),
    (
        "xenbus::kernel",
        "xenbus/src/linux/",
        &["ring", "xenbus::proto"],
    ),
    (
        "xenbus",
        "xenbus/",
        &["ring", "xenbus::proto", "xenbus::kernel"],
    ),
    (
        "blktap-kmod",
        "blktap-kmod/",
        &[
            "ring",
            "xenbus",
            "xenbus::proto",
            "xenbus::kernel",
            "blkback",
        ],
    ),
    (
        "blkback",
        "blkback/",
        &["ring", "xenbus", "xenbus::proto", "xenbus::kernel"],
    ),
    ("diskio", "userspace/io/", &[]),
    ("tapdev", "userspace/tapdev/", &["ring", "diskio"]),
    ("seeds", "tests/seeds/", &[]),
    // Reads the sources of all programs, whose tests use it.
    ("recommended", "tests/recommended/", &[]),
    // Reads the pages that tests of programs compare with output.
    ("jsonpages", "tests/jsonpages/", &[]),
    (
        "userspace",
        "userspace/",
        &[
            "ring",
            "diskio",
            "tapdev",
            "recommended",
            "jsonpages",
            "seeds",
        ],
    ),
    ("trouble", "tests/trouble/", &[]),
    ("xtask", "ci/", &["trouble"]),
    (
        "tests",
        "tests/",
        &[
            "ring",
            "xenbus",
            "xenbus::proto",
            "blkback",
            "blktap-kmod",
            "diskio",
            "tapdev",
            "seeds",
            "trouble",
            "userspace",
        ],
    ),
];

/// The root file of the module: it alone uses both data paths. It declares the names under which `crate::` finds the
/// trees in the module.
const MODULE_ROOT: &str = "blkback/src/blkback_main.rs";

/// Folders whose files and folders have layers, from the lowest to the highest. Each uses only files below its own
/// layer.
const LAYERED: &[(&str, &[&[&str]])] = &[
    ("blkback/src/", BLKBACK),
    ("userspace/blktapctrl/src/", SUPERVISOR),
];

const BLKBACK: &[&[&str]] = &[
    &["due", "connect_retry", "running_mean"],
    &[
        "connect_error",
        "engine",
        "events",
        "mapping_room",
        "params",
        "fault_injection",
        "halt_estimator",
        "memory_quota",
        "poll_estimator",
    ],
    &["memory"],
    &["backing", "halt", "poll", "totals"],
    &[
        "advertise",
        "blocking_backend",
        "idle_reclaim",
        "lent_engine",
        "phy",
    ],
    &["queue"],
    &["connection"],
    &["disk"],
    &["storage"],
    &["vbd"],
    &["bus"],
];

const SUPERVISOR: &[&[&str]] = &[
    &["log"],
    &[
        "backoff",
        "blocking_io",
        "folder",
        "process_stats",
        "rpc_client",
        "slow_request",
        "store",
        "systemd",
    ],
    &["bitmap_files", "groups", "image", "quota"],
    &["kernel"],
    &["domains", "held_lease", "nodes", "ram_files"],
    &["overlay", "record"],
    &["traces"],
    &["process", "state"],
    &["disk"],
    &["events"],
    &["registry"],
    &["admission"],
    &["lifecycle"],
    &["recovery", "watch", "watchdog"],
    &["rpc_handlers"],
    &["server"],
];

/// The areas that the module contains.
const IN_MODULE: &[&str] = &[
    "ring",
    "xenbus::proto",
    "xenbus::kernel",
    "blkback",
    "blktap-kmod",
];

/// Names of the module's parts, as `crate::NAME`, and the areas they belong to.
type Names<'a> = Vec<(&'a str, &'static str)>;

pub(super) fn check(sources: &[Source]) -> Result<()> {
    super::none(complaints(sources))
}

fn complaints(sources: &[Source]) -> Vec<String> {
    let root = sources.iter().find(|source| source.path == MODULE_ROOT);
    let names = root.map(module_names).unwrap_or_default();
    let mut complaints = Vec::new();
    for file in sources {
        let Some((name, _, allowed)) = area_of(&file.path) else {
            continue;
        };
        if file.path == MODULE_ROOT {
            continue;
        }
        complaints.extend(climbs(file));
        let names = if IN_MODULE.contains(name) {
            names.as_slice()
        } else {
            &[]
        };
        for (number, used) in uses(file, names) {
            if used != *name && !allowed.contains(&used) {
                complaints.push(format!(
                    "{}:{number}: {name} must not depend on {used}: dependencies point down only",
                    file.path
                ));
            }
        }
    }
    complaints
}

/// Returns the lines at which a file of a layered folder uses files that are not below it.
fn climbs(file: &Source) -> Vec<String> {
    let inside = |(folder, layers): &(&str, &'static [&'static [&'static str]])| {
        Some((file.path.strip_prefix(folder)?, *layers))
    };
    let Some((rest, layers)) = LAYERED.iter().find_map(inside) else {
        return Vec::new();
    };
    let own = rest.split(['/', '.']).next().unwrap_or(rest);
    if matches!(own, "lib" | "main") || !file.path.ends_with(".rs") {
        return Vec::new();
    }
    let layer = |name: &str| layers.iter().position(|layer| layer.contains(&name));
    let Some(here) = layer(own) else {
        return vec![format!(
            "{}: say in ci/xtask/src/check/direction.rs in which layer it is",
            file.path
        )];
    };
    let code = source::code(&file.text);
    let lines = (1..).zip(code.lines());
    lines
        .flat_map(|(number, line)| first_names(line).map(move |name| (number, name)))
        .filter(|(_, name)| *name != own && layer(name).is_some_and(|there| there >= here))
        .map(|(number, name)| {
            format!(
                "{}:{number}: {own} must not use {name}, which is not below it",
                file.path
            )
        })
        .collect()
}

fn area_of(path: &str) -> Option<&'static (&'static str, &'static str, &'static [&'static str])> {
    // The tests of a crate may use what all tests share.
    let path = if path.contains("/tests/") {
        "tests/"
    } else {
        path
    };
    AREAS.iter().find(|(_, folder, _)| path.starts_with(folder))
}

/// Returns the modules that the root declares, with the areas of their files.
fn module_names(root: &Source) -> Names<'_> {
    let folder = root.path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let mut path = None;
    let mut names = Vec::new();
    for line in root.text.lines() {
        let words = line.strip_prefix("pub(crate) ").unwrap_or(line);
        if let Some(target) = quoted_after(line, "#[path = ") {
            path = Some(target);
        } else if let Some(name) = words
            .strip_prefix("mod ")
            .and_then(|rest| rest.strip_suffix(';'))
        {
            let place = resolve(folder, path.take().unwrap_or("."));
            names.extend(area_of(&format!("{place}/")).map(|area| (name, area.0)));
        }
    }
    names
}

/// Returns the areas that a file uses, each with the number of the line.
fn uses(file: &Source, names: &[(&str, &'static str)]) -> Vec<(usize, &'static str)> {
    let folder = file.path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let in_manifest = file.path.ends_with("Cargo.toml");
    if !in_manifest && !file.path.ends_with(".rs") {
        return Vec::new();
    }
    let code = source::code(&file.text);
    let mut uses = Vec::new();
    for (number, (line, code)) in file.text.lines().zip(code.lines()).enumerate() {
        let line = line.trim();
        let target = if in_manifest {
            // A path without `..` is in the crate itself: that of a test or a program.
            quoted_after(line, "path = ")
                .filter(|path| path.starts_with(".."))
                .map(|path| format!("{path}/"))
        } else if code.contains("#[path") {
            quoted_after(line, "#[path = ").map(str::to_string)
        } else {
            None
        };
        if let Some(area) = target.and_then(|target| area_of(&resolve(folder, &target))) {
            uses.push((number + 1, area.0));
        }
        if !in_manifest {
            uses.extend(crate_paths(code, names).map(|area| (number + 1, area)));
        }
    }
    uses
}

/// Returns the areas that the `crate::` paths of a line name.
fn crate_paths<'a>(
    line: &'a str,
    names: &'a [(&str, &'static str)],
) -> impl Iterator<Item = &'static str> + 'a {
    first_names(line).filter_map(|first| {
        names
            .iter()
            .find(|(name, _)| *name == first)
            .map(|(_, area)| *area)
    })
}

/// Returns the first names of the `crate::` paths of a line.
fn first_names(line: &str) -> impl Iterator<Item = &str> {
    line.match_indices("crate::").filter_map(|(at, word)| {
        line[at + word.len()..]
            .split(|c: char| !c.is_alphanumeric() && c != '_')
            .next()
    })
}

fn quoted_after<'a>(line: &'a str, mark: &str) -> Option<&'a str> {
    line.split_once(mark)?
        .1
        .strip_prefix('"')?
        .split('"')
        .next()
}

/// Returns `folder/target` without `..`.
fn resolve(folder: &str, target: &str) -> String {
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in target.split('/') {
        match part {
            ".." => drop(parts.pop()),
            "." => {}
            part => parts.push(part),
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::{complaints, Source};

    fn found(path: &str, text: &str) -> usize {
        complaints(&[Source::of(path, text)]).len()
    }

    #[test]
    fn upward_dependency_in_a_manifest_is_found() {
        assert_eq!(
            found(
                "ring/Cargo.toml",
                "[dependencies]\nxenbus = { path = \"../xenbus\" }\n"
            ),
            1
        );
        assert_eq!(
            found("xenbus/Cargo.toml", "ring = { path = \"../ring\" }\n"),
            0
        );
        assert_eq!(
            found("ci/xtask/Cargo.toml", "ring = { path = \"../../ring\" }\n"),
            1
        );
    }

    #[test]
    fn place_of_a_test_is_no_dependency() {
        let manifest = "[[test]]\npath = \"tests/all/main.rs\"\n";
        assert_eq!(found("userspace/a/Cargo.toml", manifest), 0);
        let tests = "sim = { path = \"../../tests/sim\" }\n";
        assert_eq!(found("userspace/a/Cargo.toml", tests), 1);
    }

    #[test]
    fn upward_path_attribute_is_found() {
        assert_eq!(
            found(
                "xenbus/src/proto/mod.rs",
                "#[path = \"../../../blkback/vbd.rs\"]\nmod vbd;\n"
            ),
            1
        );
        assert_eq!(
            found(
                "blkback/vbd.rs",
                "#[path = \"../ring/src/ring/mod.rs\"]\nmod ring;\n"
            ),
            0
        );
    }

    #[test]
    fn file_that_uses_a_higher_layer_is_found() {
        let connection = "blkback/src/connection.rs";
        assert_eq!(found(connection, "use crate::vbd::Vbd;\n"), 1);
        assert_eq!(found(connection, "use crate::queue::Queue;\n"), 0);
        assert_eq!(found(connection, "// use crate::vbd::Vbd;\n"), 0);
        let engine = "blkback/src/engine/pass.rs";
        assert_eq!(found(engine, "use crate::engine::slots::Slots;\n"), 0);
        assert_eq!(found(engine, "use crate::backing::Drain;\n"), 1);
        assert_eq!(
            found(
                "blkback/src/phy.rs",
                "use crate::advertise::publish_state;\n"
            ),
            1
        );
        assert_eq!(found("blkback/src/nowhere.rs", ""), 1);
        let registry = "userspace/blktapctrl/src/registry/list.rs";
        assert_eq!(found(registry, "use crate::lifecycle::Lifecycle;\n"), 1);
        assert_eq!(found(registry, "use crate::disk::Disk;\n"), 0);
    }

    #[test]
    fn tests_of_a_crate_may_use_what_tests_share() {
        assert_eq!(
            found(
                "ring/tests/main.rs",
                "#[path = \"../../tests/fuzz/a.rs\"]\nmod a;\n"
            ),
            0
        );
        assert_eq!(
            found(
                "ring/src/main.rs",
                "#[path = \"../../tests/fuzz/a.rs\"]\nmod a;\n"
            ),
            1
        );
    }

    #[test]
    fn upward_crate_path_is_found() {
        let root = "#[path = \"../../xenbus/src/proto/mod.rs\"]\nmod proto;\n#[allow(dead_code)]\n\
                    #[path = \"../../xenbus/src/linux/mod.rs\"]\nmod linux;\nmod vbd;\n\
                    #[path = \"../../blktap-kmod/src/mod.rs\"]\nmod tap;\n";
        let found = |path: &str, text: &str| {
            complaints(&[Source::of(super::MODULE_ROOT, root), Source::of(path, text)]).len()
        };
        assert_eq!(found("blkback/src/vbd.rs", "use crate::tap::Disk;\n"), 1);
        assert_eq!(
            found(
                "xenbus/src/proto/keys.rs",
                "use crate::linux::xen::store;\n"
            ),
            1
        );
        assert_eq!(
            found("xenbus/src/linux/block/bio.rs", "crate::vbd::poke();\n"),
            1
        );
        assert_eq!(
            found(
                "blkback/src/vbd.rs",
                "use crate::linux::xen::store; use crate::proto::key;\n"
            ),
            0
        );
        assert_eq!(
            found("tests/sim/src/a.rs", "use crate::linux::xen::store;\n"),
            0
        );
    }
}
