// SPDX-License-Identifier: MIT OR Apache-2.0
//! Resources of DRBD: Primary while a disk is on them, and on two hosts only while a guest moves.

use crate::host::{HostFolder, SharedCluster};
use std::fs;

fn beds() -> (SharedCluster, HostFolder, HostFolder) {
    let cluster = SharedCluster::new();
    let (alpha, beta) = (cluster.host("alpha"), cluster.host("beta"));
    for host in [&alpha, &beta] {
        host.guest(3, "web", "uuid-web");
    }
    (cluster, alpha, beta)
}

#[test]
fn resource_is_primary_while_a_disk_is_on_it() {
    for is9 in [false, true] {
        let (cluster, alpha, _beta) = beds();
        if is9 {
            cluster.write("drbd/r0/is9", "");
        }
        let disk = alpha.disk(3, 51712, "drbd:r0", "w");
        assert_eq!(alpha.attach(&disk), "/dev/drbd0");
        assert_eq!(cluster.read("drbd/r0/role.alpha"), "Primary");
        alpha.detach(&disk);
        assert_eq!(cluster.read("drbd/r0/role.alpha"), "Secondary");
        alpha.detach(&disk);
    }
}

#[test]
fn volumes_of_a_resource_are_named_and_share_its_role() {
    let (cluster, alpha, _beta) = beds();
    cluster.write("drbd/r0/volumes", "0 10\n1 11\n");
    let why = alpha.refused(&alpha.disk(3, 51712, "drbd:r0", "w"));
    assert!(
        why.contains("2 volumes") && why.contains("drbd:r0/0"),
        "{why}"
    );
    let why = alpha.refused(&alpha.disk(3, 51712, "drbd:r0/7", "w"));
    assert!(why.contains("no volume 7"), "{why}");
    let (one, other) = (
        alpha.disk(3, 51712, "drbd:r0/0", "w"),
        alpha.disk(3, 51728, "drbd:r0/1", "w"),
    );
    assert_eq!(alpha.attach(&one), "/dev/drbd10");
    assert_eq!(alpha.attach(&other), "/dev/drbd11");
    alpha.detach(&one);
    assert_eq!(
        cluster.read("drbd/r0/role.alpha"),
        "Primary",
        "the other volume is in use"
    );
    alpha.detach(&other);
    assert_eq!(cluster.read("drbd/r0/role.alpha"), "Secondary");
}

#[test]
fn states_that_must_not_be_primary_are_named_with_commands() {
    let cases = [
        (
            "connection",
            "StandAlone",
            "`drbdadm connect --discard-my-data r0`",
        ),
        ("connection", "Unconfigured", "`drbdadm up r0`"),
        ("disk.alpha", "Inconsistent", "`drbdadm wait-sync r0`"),
        ("disk.alpha", "Outdated", "`drbdadm connect r0`"),
        ("disk.alpha", "Diskless", "`drbdadm attach r0`"),
        ("disk.alpha", "Attaching", "`drbdadm status r0`"),
    ];
    for (file, state, remedy) in cases {
        let (cluster, alpha, _beta) = beds();
        cluster.write(&format!("drbd/r0/{file}"), &format!("{state}\n"));
        let why = alpha.refused(&alpha.disk(3, 51712, "drbd:r0", "w"));
        assert!(why.contains(remedy), "{state}: {why}");
        assert!(
            state == "Unconfigured" || why.contains(state),
            "{state}: {why}"
        );
        assert_eq!(cluster.read("drbd/r0/role.alpha"), "Secondary", "{state}");
        assert!(!alpha.calls().contains("--force"));
    }
}

#[test]
fn client_of_linstor_works_on_its_peers_disk() {
    let (cluster, alpha, _beta) = beds();
    cluster.write("drbd/r0/is9", "");
    cluster.write("drbd/r0/disk.alpha", "Diskless\n");
    alpha.attach(&alpha.disk(3, 51712, "drbd:r0", "w"));
}

/// The peer is dead: this host has the newest data.
#[test]
fn resource_without_its_peer_is_served() {
    let (cluster, alpha, _beta) = beds();
    cluster.write("drbd/r0/connection", "WFConnection\n");
    alpha.attach(&alpha.disk(3, 51712, "drbd:r0", "w"));
}

#[test]
fn failures_of_drbdadm_are_named() {
    let (_cluster, alpha, _beta) = beds();
    let why = alpha.refused(&alpha.disk(3, 51712, "drbd:r9", "w"));
    assert!(
        why.contains("no resource r9") && why.contains("`drbdadm sh-resources`"),
        "{why}"
    );
    let cases = [
        (
            "drbdadm-primary",
            "State change failed: (-7) Refusing to be Primary while peer is not outdated",
            "fenced",
        ),
        ("drbdadm-role", "r0: No such resource", "`drbdadm up r0`"),
        ("drbdadm-primary", "something else", "something else"),
        (
            "drbdadm-primary",
            "(-1) Multiple primaries not allowed by config",
            "stop its guest",
        ),
        ("modprobe", "", "`modprobe drbd`"),
    ];
    for (verb, complaint, name) in cases {
        let (_cluster, alpha, _beta) = beds();
        alpha.fail(verb, 11, complaint);
        let disk = alpha.disk(3, 51712, "drbd:r0", "w");
        let why = alpha.refused(&disk);
        assert!(why.contains(name), "{complaint}: {why}");
        alpha.mend(verb);
        alpha.attach(&disk);
    }
    let (_cluster, alpha, _beta) = beds();
    alpha.hang("drbdadm-role");
    alpha.limit(6);
    let why = alpha.refused(&alpha.disk(3, 51712, "drbd:r0", "w"));
    assert!(why.contains("did not answer in 6 s"), "{why}");
}

#[test]
fn resource_that_is_primary_for_others_is_refused() {
    let (cluster, alpha, beta) = beds();
    beta.attach(&beta.disk(3, 51712, "drbd:r0", "w"));
    let why = alpha.refused(&alpha.disk(3, 51712, "drbd:r0", "w"));
    assert!(why.contains("Primary on another host"), "{why}");
    assert_eq!(cluster.read("drbd/r0/two.alpha"), "no");
    let (cluster, alpha, _beta) = beds();
    cluster.write("drbd/r0/role.alpha", "Primary\n");
    let why = alpha.refused(&alpha.disk(3, 51712, "drbd:r0", "w"));
    assert!(
        why.contains("not by this script") && why.contains("`drbdadm secondary r0`"),
        "{why}"
    );
    assert_eq!(
        cluster.read("drbd/r0/role.alpha"),
        "Primary",
        "its user keeps it"
    );
}

#[test]
fn two_hosts_are_primary_only_while_a_guest_moves() {
    for (is9, configured) in [(false, false), (true, false), (false, true)] {
        let (cluster, alpha, beta) = beds();
        if is9 {
            cluster.write("drbd/r0/is9", "");
        }
        if configured {
            cluster.write("drbd/r0/two", "");
            cluster.write("drbd/r0/two.alpha", "yes\n");
            cluster.write("drbd/r0/two.beta", "yes\n");
        }
        let here = alpha.disk(3, 51712, "drbd:r0", "w");
        alpha.attach(&here);
        beta.guest(7, "web--incoming", "uuid-web");
        let there = beta.disk(7, 51712, "drbd:r0", "w");
        beta.attach(&there);
        let roles = || {
            [
                cluster.read("drbd/r0/role.alpha"),
                cluster.read("drbd/r0/role.beta"),
            ]
        };
        assert_eq!(roles(), ["Primary", "Primary"]);
        alpha.detach(&here);
        assert_eq!(roles(), ["Secondary", "Primary"]);
        let allowed = if configured { "yes" } else { "no" };
        for host in ["alpha", "beta"] {
            assert_eq!(cluster.read(&format!("drbd/r0/two.{host}")), allowed);
        }
    }
}

/// The guest stays on its host: the destination takes back what it has allowed.
#[test]
fn move_that_fails_leaves_one_primary() {
    let (cluster, alpha, beta) = beds();
    alpha.attach(&alpha.disk(3, 51712, "drbd:r0", "w"));
    beta.guest(7, "web--incoming", "uuid-web");
    beta.fail("drbdadm-primary", 17, "no");
    beta.refused(&beta.disk(7, 51712, "drbd:r0", "w"));
    assert_eq!(cluster.read("drbd/r0/role.alpha"), "Primary");
    for host in ["alpha", "beta"] {
        assert_eq!(cluster.read(&format!("drbd/r0/two.{host}")), "no", "{host}");
    }
}

#[test]
fn device_that_is_open_is_waited_for() {
    let (cluster, alpha, _beta) = beds();
    let disk = alpha.disk(3, 51712, "drbd:r0", "w");
    alpha.attach(&disk);
    fs::create_dir(alpha.path("busy")).expect("a folder");
    fs::write(alpha.path("busy/r0"), "").expect("a file");
    alpha.limit(4);
    assert!(!alpha.remove(&disk).status.success());
    let log = alpha.log();
    assert!(
        log.contains("waiting: /dev/drbd0") && log.contains("`fuser -v /dev/drbd0`"),
        "{log}"
    );
    assert_eq!(alpha.records(), ["vbd-3-51712"]);
    fs::remove_file(alpha.path("busy/r0")).expect("a file");
    alpha.detach(&disk);
    assert_eq!(cluster.read("drbd/r0/role.alpha"), "Secondary");
}

#[test]
fn readers_share_a_device_and_writers_do_not() {
    let (_cluster, alpha, _beta) = beds();
    alpha.guest(4, "db", "uuid-db");
    alpha.attach(&alpha.disk(3, 51712, "drbd:r0", "r"));
    alpha.attach(&alpha.disk(4, 51712, "drbd:r0", "r"));
    let why = alpha.refused(&alpha.disk(4, 51728, "drbd:r0", "w"));
    assert!(why.contains("backend/vbd/"), "{why}");
}

/// An administrator has taken the resource down, or out of the configuration, under the disk.
#[test]
fn resource_that_is_gone_is_detached() {
    for complaint in [
        "r0: No such resource",
        "'r0' not defined in your config (for this host).",
    ] {
        let (_cluster, alpha, _beta) = beds();
        let disk = alpha.disk(3, 51712, "drbd:r0", "w");
        alpha.attach(&disk);
        alpha.fail("drbdadm-secondary", 10, complaint);
        alpha.detach(&disk);
        assert!(alpha.records().is_empty(), "{complaint}");
    }
}
