// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Tests that take too long for each change.

use super::{build, e2e, host};
use crate::arm64;
use crate::demo::{self, Story};
use crate::tally::TestTally;
use anyhow::{ensure, Result};
use clap::ValueEnum;

/// A part of the lane, which boots a machine of its own.
#[derive(Clone, Copy)]
enum LanePart {
    /// Tests that are not cases of `vmtest`.
    Own(fn(&mut TestTally, Option<u64>) -> Result<()>),
    /// The long cases of these groups.
    Long(&'static str),
    /// The long cases that no other part names.
    Rest,
}

const PARTS: &[(&str, LanePart)] = &[
    ("fuzz", LanePart::Own(e2e::fuzz)),
    ("fuzz-tap", LanePart::Own(e2e::fuzz_tap)),
    ("mapped", LanePart::Own(e2e::mapped)),
    // A hundred deaths of a process.
    ("deaths", LanePart::Long("tap.s12*")),
    // Leaks that must not add up: many disks at once, and one after the other.
    (
        "many",
        LanePart::Long("lifecycle.*,memory.*,tap.cycles,tap.disks*"),
    ),
    // Guests that move, and disks that are handed over.
    ("moves", LanePart::Long("migrate.*,handoff.*")),
    // Other tests of disks with passthrough.
    ("direct", LanePart::Own(e2e::direct)),
    // Thirty nights of backups, and what a guest's agent does for them.
    ("backups", LanePart::Long("backup.*")),
    // Leases, which need real time.
    ("leases", LanePart::Long("lease.*")),
    // The daemons of sanlock, which take long.
    ("sanlock", LanePart::Own(host::sanlock)),
    // Many more random cases than each change has.
    ("seeds", LanePart::Own(host::seeds)),
    // Images with a wrong word, and the data that their repair preserves.
    ("repairs", LanePart::Own(host::repairs)),
    // A hotplug script that is killed at each of its steps.
    ("kills", LanePart::Own(host::kills)),
    // Time and memory of conversions, beside those of QEMU.
    ("conversions", LanePart::Own(host::conversions)),
    // Guests with other kernels than dom0's.
    ("guests", LanePart::Own(e2e::guests)),
    // The daemon of xenstore in C; all others have the one in OCaml.
    ("xenstored", LanePart::Own(e2e::xenstored)),
    // A PVH dom0.
    ("pvh", LanePart::Own(e2e::pvh)),
    // Packages on a host with systemd.
    ("life", LanePart::Own(e2e::life)),
    // Two machines at once.
    ("hosts", LanePart::Own(e2e::hosts)),
    // A cluster of Ceph, and a host with disks on it.
    ("ceph", LanePart::Own(e2e::ceph)),
    // A kernel with its own checks.
    (
        "debug",
        LanePart::Own(|tally, seed| e2e::debug(tally, super::ALL, seed)),
    ),
    // Both stories of the demonstration, to their ends.
    ("demo", LanePart::Own(demo)),
    // Other kernels that are known to work.
    ("kernels", LanePart::Own(build::other_kernels)),
    // Another processor.
    ("arm64", LanePart::Own(arm64::tests)),
    // A build of the module on a host without this project's tools.
    ("packages", LanePart::Own(build::long)),
    // Other shapes, formats, orders and entry points.
    ("variants", LanePart::Rest),
];

/// Runs the part that `only` names, or all parts.
pub(super) fn tests(tally: &mut TestTally, only: &str, seed: Option<u64>) -> Result<()> {
    let wanted = |name| only == super::ALL || only == name;
    let parts: Vec<_> = PARTS.iter().filter(|part| wanted(part.0)).collect();
    ensure!(
        !parts.is_empty(),
        "there is no part `{only}` of the lane nightly: choose from {}",
        names().join(", ")
    );
    parts.into_iter().try_for_each(|(name, part)| match part {
        LanePart::Own(run) => run(tally, seed),
        LanePart::Long(groups) => e2e::long(tally, name, groups, "", seed),
        LanePart::Rest => e2e::long(tally, name, super::ALL, &named(), seed),
    })
}

/// Shows each story of the demonstration.
fn demo(tally: &mut TestTally, _seed: Option<u64>) -> Result<()> {
    for story in Story::value_variants() {
        tally.check(&format!("demo.{}", story.name()), demo::tell(*story));
    }
    Ok(())
}

/// Returns the groups that have a part of their own.
fn named() -> String {
    let groups = PARTS.iter().filter_map(|(_, part)| match part {
        LanePart::Long(groups) => Some(*groups),
        LanePart::Own(_) | LanePart::Rest => None,
    });
    groups.collect::<Vec<_>>().join(",")
}

fn names() -> Vec<&'static str> {
    PARTS.iter().map(|part| part.0).collect()
}

#[cfg(test)]
mod tests {
    use super::names;

    /// Returns the parts that the workflow file runs, from its line `part: [a, b]`.
    fn scheduled() -> Vec<&'static str> {
        const WORKFLOW: &str = include_str!("../../../../.github/workflows/tests.yml");
        let line = WORKFLOW
            .lines()
            .find_map(|line| line.trim().strip_prefix("part: ["))
            .unwrap();
        line.trim_end_matches(']').split(", ").collect()
    }

    #[test]
    fn each_part_is_scheduled() {
        assert_eq!(scheduled(), names());
    }

    #[test]
    fn each_part_is_explained() {
        const GUIDE: &str = include_str!("../../../../CONTRIBUTING.md");
        let (_, behind) = GUIDE.split_once("--lane nightly --only ").unwrap();
        let line = behind.lines().next().unwrap();
        let mut listed: Vec<&str> = line
            .split(|c: char| c != '-' && !c.is_alphanumeric())
            .collect();
        listed.retain(|word| !word.is_empty());
        for name in names() {
            assert!(listed.contains(&name), "{name}: {line}");
        }
    }
}
