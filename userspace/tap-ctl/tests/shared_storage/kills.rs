// SPDX-License-Identifier: MIT OR Apache-2.0
//! A script that is killed at any moment leaves nothing, or what the next one cleans up.

use crate::host::{GuestDisk, HostFolder, SharedCluster};
use std::hash::{BuildHasher, Hasher, RandomState};

/// A cluster, a host, and a disk on `target`.
fn bed(target: &str) -> (SharedCluster, HostFolder, GuestDisk) {
    let cluster = SharedCluster::new();
    let host = cluster.host("alpha");
    host.guest(3, "web", "uuid-web");
    let disk = host.disk(3, 51712, target, "w");
    (cluster, host, disk)
}

/// Runs a verb and kills the script at this moment; false if it ends before.
fn killed(host: &HostFolder, verb: &str, disk: &GuestDisk, moment: usize) -> bool {
    std::fs::write(host.path("moments"), "0\n").expect("a file");
    host.script(
        "block-tap-rs",
        verb,
        disk,
        &[("BED_KILL", &moment.to_string())],
    );
    host.path("killed").exists()
}

/// True if nothing of the disk is left.
fn is_clean(cluster: &SharedCluster, host: &HostFolder) -> bool {
    host.mappings().is_empty()
        && host.records().is_empty()
        && cluster.watchers("vms/web").is_empty()
        && cluster.read("drbd/r0/role.alpha") == "Secondary"
}

/// Returns the first moment, and the number of moments between two kills. A script has up to forty moments, and each
/// needs a script or two more: a run takes some by chance, and with `MOMENTS=all` each of them.
fn steps(verb: &str) -> (usize, usize) {
    let step = if verb == "remove" { 2 } else { 8 };
    if std::env::var("MOMENTS").is_ok_and(|text| text == "all") {
        return (1, 1);
    }
    // CAST: only its lowest bits count.
    let chance = RandomState::new().build_hasher().finish() as usize;
    (1 + chance % step, step)
}

/// Kills `verb` at moments, and returns the last one that came. `after` sees each outcome.
fn sweep(
    target: &str,
    verb: &str,
    after: impl Fn(usize, &SharedCluster, &HostFolder, &GuestDisk),
) -> usize {
    let (first, step) = steps(verb);
    let mut last = 0;
    for moment in (first..).step_by(step) {
        let (cluster, host, disk) = bed(target);
        if verb == "remove" {
            host.attach(&disk);
        }
        if !killed(&host, verb, &disk, moment) {
            return last;
        }
        after(moment, &cluster, &host, &disk);
        last = moment;
    }
    unreachable!("a script ends")
}

#[test]
fn add_that_is_killed_is_removed() {
    // Fewer than these by one step, as the last one that is taken may be so far from the end.
    for (target, least) in [("rbd:vms/web", 22), ("drbd:r0", 12)] {
        let moments = sweep(target, "add", |moment, cluster, host, disk| {
            host.detach(disk);
            assert!(
                is_clean(cluster, host),
                "{target} {moment}: {:?}",
                host.records()
            );
            host.detach(disk);
        });
        assert!(moments >= least, "{target}: only {moments} moments");
    }
}

#[test]
fn add_that_is_killed_is_done_by_the_next_one() {
    for target in ["rbd:vms/web", "drbd:r0"] {
        sweep(target, "add", |moment, cluster, host, disk| {
            host.attach(disk);
            assert_eq!(host.records().len(), 1, "{target} {moment}");
            assert!(host.mappings().len() <= 1, "{target} {moment}");
            host.detach(disk);
            assert!(is_clean(cluster, host), "{target} {moment}");
        });
    }
}

/// The guest of the killed script is gone, with its directory: the next guest on the image gets it.
#[test]
fn add_that_is_killed_is_in_nobodys_way() {
    for target in ["rbd:vms/web", "drbd:r0"] {
        sweep(target, "add", |moment, cluster, host, disk| {
            host.forget(disk);
            host.guest(4, "db", "uuid-db");
            let other = host.disk(4, 51712, target, "w");
            host.attach(&other);
            assert_eq!(host.records(), ["vbd-4-51712"], "{target} {moment}");
            host.detach(&other);
            assert!(is_clean(cluster, host), "{target} {moment}");
        });
    }
}

#[test]
fn remove_that_is_killed_is_done_by_the_next_one() {
    for target in ["rbd:vms/web", "drbd:r0"] {
        let moments = sweep(target, "remove", |moment, cluster, host, disk| {
            host.detach(disk);
            assert!(is_clean(cluster, host), "{target} {moment}");
        });
        assert!(moments >= 3, "{target}: only {moments} moments");
    }
}

/// A program of the killed script still runs, and maps the image or promotes the resource when the next script has come.
#[test]
fn next_script_waits_for_the_program_of_a_killed_one() {
    for (target, words) in [
        ("rbd:vms/web", "device-map"),
        ("drbd:r0", "drbdadm-primary"),
    ] {
        let (cluster, host, disk) = bed(target);
        host.add_that_its_program_outlives(&disk, words);
        host.detach(&disk);
        host.wait_for_its_program();
        assert!(is_clean(&cluster, &host), "{target}");
        let (cluster, host, disk) = bed(target);
        host.add_that_its_program_outlives(&disk, words);
        host.attach(&disk);
        host.wait_for_its_program();
        host.detach(&disk);
        assert!(is_clean(&cluster, &host), "{target}");
    }
}
