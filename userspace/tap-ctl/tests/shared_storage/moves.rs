// SPDX-License-Identifier: MIT OR Apache-2.0
//! Two hosts and one image of Ceph: one writer, and a guest that moves.

use crate::host::{HostFolder, SharedCluster};

const IMAGE: &str = "vms/web";

/// A cluster, alpha with a running guest, and beta, where xl has begun to receive it as `name`.
fn moving(target: &str, name: &str) -> (SharedCluster, HostFolder, HostFolder) {
    let cluster = SharedCluster::new();
    let (alpha, beta) = (cluster.host("alpha"), cluster.host("beta"));
    alpha.guest(3, "web", "uuid-web");
    alpha.attach(&alpha.disk(3, 51712, target, "w"));
    beta.guest(7, name, "uuid-web");
    (cluster, alpha, beta)
}

#[test]
fn image_moves_with_its_guest() {
    let (cluster, alpha, beta) = moving("rbd:vms/web", "web--incoming");
    let disk = beta.disk(7, 51712, "rbd:vms/web", "w");
    beta.attach(&disk);
    assert_eq!(cluster.watchers(IMAGE).len(), 2);
    // The new host has the lock.
    let lock = cluster.read("images/vms/web/lock");
    let mine = beta.path("sys/bus/rbd/devices/0/client_id");
    let mine = std::fs::read_to_string(mine).expect("it is mapped");
    assert!(
        mine.trim()
            .ends_with(lock.split(' ').next().expect("a client")),
        "{mine} {lock}"
    );
    alpha.detach(&alpha.disk(3, 51712, "rbd:vms/web", "w"));
    assert_eq!(cluster.watchers(IMAGE), [format!("beta:0/{}", &lock[..3])]);
    assert_eq!(cluster.read("images/vms/web/meta.xen.guest"), "uuid-web");
    // And back.
    alpha.guest(9, "web--incoming", "uuid-web");
    alpha.attach(&alpha.disk(9, 51712, "rbd:vms/web", "w"));
    beta.detach(&disk);
    assert_eq!(cluster.watchers(IMAGE).len(), 1);
}

#[test]
fn second_start_of_the_guest_is_no_move() {
    // A fixed uuid= in the configuration is the same on both hosts.
    let (cluster, _alpha, beta) = moving("rbd:vms/web", "web");
    let disk = beta.disk(7, 51712, "rbd:vms/web", "w");
    let why = beta.refused(&disk);
    assert!(
        why.contains("in use at alpha:0/101") && why.contains("uuid-web"),
        "{why}"
    );
    assert!(
        why.contains("`tap-ctl lease break rbd:vms/web --holder-is-dead CLIENT`"),
        "{why}"
    );
    assert_eq!(beta.of(&disk, "hotplug-status"), "busy");
    assert!(
        !beta.calls().contains("device map"),
        "it was not even mapped"
    );
    assert_eq!(cluster.watchers(IMAGE).len(), 1);
    // libvirt gives incoming guests their final name; an administrator can say so.
    beta.script("block-tap-rs", "add", &disk, &[("MOVES_BY_UUID", "yes")]);
    assert_eq!(beta.of(&disk, "hotplug-status"), "connected");
}

#[test]
fn another_guest_that_arrives_is_refused() {
    let (cluster, _alpha, beta) = moving("rbd:vms/web", "web--incoming");
    beta.guest(8, "db--incoming", "uuid-db");
    let why = beta.refused(&beta.disk(8, 51712, "rbd:vms/web", "w"));
    assert!(
        why.contains("for the guest with the UUID uuid-web"),
        "{why}"
    );
    assert_eq!(cluster.watchers(IMAGE).len(), 1);
}

#[test]
fn two_other_writers_are_no_source() {
    let (cluster, _alpha, beta) = moving("rbd:vms/web", "web--incoming");
    cluster.write("images/vms/web/watchers/77", "gamma:0/77\n");
    let why = beta.refused(&beta.disk(7, 51712, "rbd:vms/web", "w"));
    assert!(
        why.contains("2 clients") && why.contains("`rbd status vms/web`"),
        "{why}"
    );
}

#[test]
fn exclusive_image_does_not_move() {
    let target = "options=exclusive,rbd:vms/web";
    let (cluster, _alpha, beta) = moving(target, "web--incoming");
    cluster.write("images/vms/web/meta.xen.guest", "uuid-web\n");
    let why = beta.refused(&beta.disk(7, 51712, "rbd:vms/web", "w"));
    assert!(why.contains("option exclusive"), "{why}");
    assert_eq!(cluster.watchers(IMAGE).len(), 1);
}

/// A host sees no watcher, maps, and only then sees the one that began at the same time.
#[test]
fn of_two_that_begin_at_once_the_later_one_gives_up() {
    let cluster = SharedCluster::new();
    let (alpha, beta) = (cluster.host("alpha"), cluster.host("beta"));
    alpha.guest(3, "web", "uuid-web");
    beta.guest(4, "db", "uuid-db");
    let theirs = alpha.disk(3, 51712, "rbd:vms/web", "w");
    alpha.attach(&theirs);
    // Beta's first look is from before that.
    let mine = beta.disk(4, 51712, "rbd:vms/web", "w");
    let settings = [("BED_BLIND", "1")];
    beta.script("block-tap-rs", "add", &mine, &settings);
    let why = beta.of(&mine, "hotplug-error");
    assert!(beta.calls().contains("device map"), "it did not get so far");
    assert!(why.contains("in use at alpha:0/101"), "{why}");
    assert!(beta.mappings().is_empty() && beta.records().is_empty());
    assert_eq!(cluster.watchers(IMAGE).len(), 1);
    assert_eq!(cluster.read("images/vms/web/meta.xen.guest"), "uuid-web");
}

/// A guest that moves on its host has both disks on one device, until the last one is gone.
#[test]
fn move_on_one_host_shares_the_device() {
    let cluster = SharedCluster::new();
    let alpha = cluster.host("alpha");
    alpha.guest(3, "web", "uuid-web");
    alpha.guest(4, "web--incoming", "uuid-web");
    let old = alpha.disk(3, 51712, "rbd:vms/web", "w");
    let new = alpha.disk(4, 51712, "rbd:vms/web", "w");
    assert_eq!(alpha.attach(&old), "/dev/rbd0");
    assert_eq!(alpha.attach(&new), "/dev/rbd0");
    assert_eq!(alpha.mappings(), ["0"]);
    alpha.detach(&old);
    assert_eq!(alpha.mappings(), ["0"], "the other disk uses it");
    alpha.detach(&new);
    assert!(alpha.mappings().is_empty() && alpha.records().is_empty());
}

/// A guest that was destroyed without its script leaves a record; the next disk on the image takes its mapping away.
#[test]
fn record_of_a_disk_that_is_gone_is_cleaned_up() {
    let cluster = SharedCluster::new();
    let alpha = cluster.host("alpha");
    alpha.guest(3, "web", "uuid-web");
    let old = alpha.disk(3, 51712, "rbd:vms/web", "w");
    alpha.attach(&old);
    alpha.forget(&old);
    alpha.guest(4, "db", "uuid-db");
    alpha.attach(&alpha.disk(4, 51712, "rbd:vms/web", "w"));
    assert_eq!(alpha.mappings().len(), 1);
    assert_eq!(alpha.records(), ["vbd-4-51712"]);
}

/// QEMU of the guest 3 in its stub domain has the disk as well.
#[test]
fn stub_domain_shares_the_device_of_its_guest() {
    let cluster = SharedCluster::new();
    let alpha = cluster.host("alpha");
    alpha.guest(3, "web", "uuid-web");
    alpha.guest(4, "web-dm", "uuid-dm");
    alpha.key("/local/domain/4/target", "3");
    for target in ["rbd:vms/web", "drbd:r0"] {
        let device = alpha.attach(&alpha.disk(4, 51712, target, "w"));
        assert_eq!(alpha.attach(&alpha.disk(3, 51712, target, "w")), device);
        alpha.detach(&alpha.disk(4, 51712, target, "w"));
        alpha.detach(&alpha.disk(3, 51712, target, "w"));
    }
    assert!(alpha.mappings().is_empty());
}
