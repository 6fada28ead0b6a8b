// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images of Ceph: attached, detached, and refused by name.

use crate::host::{HostFolder, SharedCluster};
use std::fs;
use std::os::unix::fs::{symlink, PermissionsExt};

/// A cluster and a host with the guest 3.
fn beds() -> (SharedCluster, HostFolder) {
    let cluster = SharedCluster::new();
    let host = cluster.host("alpha");
    host.guest(3, "web", "uuid-web");
    host.guest(4, "db", "uuid-db");
    (cluster, host)
}

#[test]
fn image_is_attached_as_a_device_and_detached() {
    let (cluster, host) = beds();
    let disk = host.disk(3, 51712, "rbd:vms/web", "w");
    assert_eq!(host.attach(&disk), "/dev/rbd0");
    assert_eq!(host.of(&disk, "physical-device"), "fb:0");
    assert_eq!(host.records(), ["vbd-3-51712"]);
    assert_eq!(cluster.watchers("vms/web").len(), 1);
    assert_eq!(cluster.read("images/vms/web/meta.xen.guest"), "uuid-web");
    // xl may call twice.
    assert_eq!(host.attach(&disk), "/dev/rbd0");
    assert_eq!(host.mappings(), ["0"]);
    host.detach(&disk);
    assert!(host.mappings().is_empty() && host.records().is_empty());
    assert!(cluster.watchers("vms/web").is_empty());
    host.detach(&disk);
}

#[test]
fn record_is_for_root_only() {
    let (_cluster, host) = beds();
    host.attach(&host.disk(3, 51712, "rbd:vms/web", "w"));
    let mode = |name: &str| {
        let found = fs::metadata(host.path(name)).expect("it is there");
        found.permissions().mode() & 0o777
    };
    assert_eq!(mode("run/mapped"), 0o700);
}

#[test]
fn disk_is_detached_without_its_directory() {
    let (_cluster, host) = beds();
    let disk = host.disk(3, 51712, "rbd:vms/web", "w");
    host.attach(&disk);
    host.forget(&disk);
    host.detach(&disk);
    assert!(host.mappings().is_empty() && host.records().is_empty());
    // `fatal` would have made it anew.
    assert_eq!(host.of(&disk, "hotplug-status"), "");
}

#[test]
fn namespaces_snapshots_and_the_words_in_front_reach_rbd() {
    let (cluster, host) = beds();
    cluster.image("vms/blue/web", "layering,exclusive-lock");
    let keyring = host.path("key");
    fs::write(&keyring, "[client.xen]\n").expect("a file");
    fs::set_permissions(&keyring, fs::Permissions::from_mode(0o600)).expect("a file");
    let conf = host.path("ceph.conf");
    fs::write(&conf, "").expect("a file");
    let target = format!(
        "tap:conf={},id=xen,keyring={},options=queue_depth=256,ms_mode=secure,rbd:vms/blue/web@daily",
        conf.display(),
        keyring.display()
    );
    host.attach(&host.disk(3, 51712, &target, "r"));
    let calls = host.calls();
    let map = calls.lines().find(|line| line.contains("device map"));
    let access = format!(
        "--conf {} --id xen --keyring {}",
        conf.display(),
        keyring.display()
    );
    let map = map.expect("it was mapped");
    assert!(
        map.starts_with(&format!(
            "rbd {access} device map --options ms_mode=prefer-crc,"
        )),
        "{map}"
    );
    assert!(
        map.ends_with(",queue_depth=256,ms_mode=secure --read-only vms/blue/web@daily"),
        "{map}"
    );
}

#[test]
fn readers_share_an_image_and_writers_do_not() {
    let (cluster, host) = beds();
    let reader = host.disk(3, 51712, "rbd:vms/web", "r");
    host.attach(&reader);
    host.attach(&host.disk(4, 51712, "rbd:vms/web", "r"));
    assert!(cluster.watchers("vms/web").is_empty());
    let why = host.refused(&host.disk(4, 51728, "rbd:vms/web", "w"));
    assert!(
        why.contains("backend/vbd/3/51712") || why.contains("backend/vbd/4/51712"),
        "{why}"
    );
    let (_cluster, host) = beds();
    host.attach(&host.disk(3, 51712, "rbd:vms/web", "w"));
    for mode in ["w", "r"] {
        let other = host.disk(4, 51712, "rbd:vms/web", mode);
        let why = host.refused(&other);
        assert!(
            why.contains("backend/vbd/3/51712") && why.contains("`xl block-detach"),
            "{why}"
        );
        assert_eq!(host.of(&other, "hotplug-status"), "busy");
    }
}

#[test]
fn mapping_that_no_script_made_is_refused_and_stays() {
    let (_cluster, host) = beds();
    let disk = host.disk(3, 51712, "rbd:vms/web", "w");
    host.attach(&disk);
    // The record is lost, as if an administrator had mapped the image.
    fs::remove_file(host.path("run/mapped/vbd-3-51712")).expect("a file");
    let why = host.refused(&host.disk(4, 51712, "rbd:vms/web", "w"));
    assert!(why.contains("`rbd device unmap /dev/rbd0`"), "{why}");
    assert_eq!(host.mappings(), ["0"]);
}

#[test]
fn what_fails_is_refused_by_name_with_a_remedy() {
    let connect = "rbd: couldn't connect to the cluster!";
    let cases = [
        ("info", 2, "rbd: error opening pool 'vms': (2) No such file or directory".into(), "no pool vms", "`ceph osd pool ls`"),
        ("info", 2, "rbd: error opening image web: (2) No such file or directory".into(), "no image web", "`rbd ls vms`"),
        ("info", 2, "rbd: namespace 'blue' does not exist.".into(), "no namespace", "`rbd namespace ls vms`"),
        ("info", 2, "error setting snapshot context: (2) No such file or directory".into(), "no snapshot", "`rbd snap ls vms/web`"),
        ("info", 5, format!("auth: error parsing file /etc/k: error setting modifier for [client.xen] type=key val=x: Malformed input\nauth: failed to load /etc/k: (5) Input/output error\nmonclient: keyring not found\n{connect}"), "has no key in it", "`ceph auth get client.admin -o"),
        ("info", 2, format!("auth: unable to find a keyring on /etc/ceph/x: (2) No such file or directory\n{connect}"), "no key for client.admin", "`ceph auth get client.admin -o /etc/ceph/ceph.client.admin.keyring`"),
        ("info", 13, format!("monclient(hunting): handle_auth_bad_method server allowed_methods [2] but i only support [2]\n{connect}"), "refuses the key", "`ceph auth get client.admin -o"),
        ("info", 2, format!("unable to get monitor info from DNS SRV with service name: ceph-mon\n{connect}"), "does not know the monitors", "`ceph config generate-minimal-conf`"),
        ("info", 1, "rbd: error opening image web: (1) Operation not permitted".into(), "may not do this", "`ceph auth caps client.admin mon 'profile rbd' osd 'profile rbd pool=vms'`"),
        ("device-map", 6, "rbd: sysfs write failed\nRBD image feature set mismatch. You can disable features\nrbd: map failed: (6) No such device or address".into(), "lacks features", "`rbd feature disable vms/web FEATURE`"),
        ("device-map", 22, "rbd: failed to get mon address (possible ms_mode mismatch)\nrbd: map failed: (22) Invalid argument".into(), "ms_mode", "options=ms_mode=legacy,"),
        ("device-map", 22, "rbd: unknown map option 'wrong'\nrbd: couldn't parse map options".into(), "unknown map option 'wrong'", "`man rbd`"),
        ("device-map", 22, "rbd: invalid ms_mode value 'wrong'\nrbd: couldn't parse map options".into(), "invalid ms_mode value 'wrong'", "`man rbd`"),
        ("device-map", 22, "rbd: sysfs write failed\nrbd: map failed: (22) Invalid argument".into(), "the kernel does not know an option", "`dmesg`"),
        ("device-map", 30, "rbd: map failed: (30) Read-only file system".into(), "option exclusive", "stop the guest there"),
        ("device-map", 108, "rbd: map failed: (108) Cannot send after transport endpoint shutdown".into(), "blocklist", "`ceph osd blocklist ls`"),
        ("device-map", 110, "rbd: map failed: (110) Connection timed out".into(), "no answer", "`ceph -s`"),
        ("status", 5, "rbd: something else: (5) Input/output error".into(), "rbd status failed (5)", "(5) Input/output error"),
        ("image-meta-set", 1, "rbd: setting metadata failed: (1) Operation not permitted".into(), "rbd image-meta set", "`ceph auth caps client.admin"),
        ("modprobe", 1, String::new(), "no module rbd", "`modprobe rbd`"),
    ];
    for (verb, status, complaint, name, remedy) in cases {
        let (cluster, host) = beds();
        host.fail(verb, status, &complaint);
        let disk = host.disk(3, 51712, "rbd:vms/web", "w");
        let why = host.refused(&disk);
        assert!(
            why.contains(name) && why.contains(remedy),
            "{verb} {complaint}: {why}"
        );
        assert!(cluster.watchers("vms/web").is_empty(), "{verb}");
        // The next attempt finds nothing in its way.
        host.mend(verb);
        host.attach(&disk);
    }
}

#[test]
fn cluster_that_does_not_answer_is_named_after_a_time() {
    for verb in ["info", "status", "device-map"] {
        let (_cluster, host) = beds();
        host.hang(verb);
        host.limit(6);
        let why = host.refused(&host.disk(3, 51712, "rbd:vms/web", "w"));
        assert!(
            why.contains("did not answer in 6 s") && why.contains("`ceph -s`"),
            "{verb}: {why}"
        );
    }
}

#[test]
fn rbd_that_is_not_installed_is_named_with_its_package() {
    let (_cluster, host) = beds();
    // Programs of the test, and then those of this machine, but rbd.
    let bin = host.path("without");
    fs::create_dir(&bin).expect("a folder");
    for folder in [host.path("bin"), "/usr/bin".into(), "/bin".into()] {
        for entry in fs::read_dir(folder).expect("programs") {
            let entry = entry.expect("an entry");
            let link = bin.join(entry.file_name());
            if entry.file_name() != "rbd" && fs::symlink_metadata(&link).is_err() {
                symlink(entry.path(), link).expect("a link");
            }
        }
    }
    let disk = host.disk(3, 51712, "rbd:vms/web", "w");
    let path = bin.display().to_string();
    host.script("block-tap-rs", "add", &disk, &[("PATH", &path)]);
    let why = host.of(&disk, "hotplug-error");
    assert!(why.contains("`apt install ceph-common`"), "{why}");
}

#[test]
fn features_that_the_kernel_lacks_are_named_before_it_maps() {
    let (cluster, host) = beds();
    cluster.image(
        "vms/web",
        "layering,exclusive-lock,object-map,fast-diff,journaling",
    );
    let disk = host.disk(3, 51712, "rbd:vms/web", "w");
    let why = host.refused(&disk);
    assert!(
        why.contains("`rbd feature disable vms/web journaling`"),
        "{why}"
    );
    assert!(!host.calls().contains("device map"));
    cluster.image("vms/web", "layering");
    let why = host.refused(&disk);
    assert!(
        why.contains("`rbd feature enable vms/web exclusive-lock`"),
        "{why}"
    );
    // A reader takes no lock.
    host.attach(&host.disk(3, 51712, "rbd:vms/web", "r"));
}

#[test]
fn snapshot_is_not_attached_for_writing() {
    let (_cluster, host) = beds();
    let why = host.refused(&host.disk(3, 51712, "rbd:vms/web@daily", "w"));
    assert!(why.contains("access=ro"), "{why}");
}

#[test]
fn keyring_that_others_read_is_refused() {
    let (_cluster, host) = beds();
    let keyring = host.path("key");
    let disk = host.disk(
        3,
        51712,
        &format!("keyring={},rbd:vms/web", keyring.display()),
        "w",
    );
    let why = host.refused(&disk);
    assert!(why.contains("is not there"), "{why}");
    fs::write(&keyring, "").expect("a file");
    for mode in [0o644, 0o640, 0o604] {
        fs::set_permissions(&keyring, fs::Permissions::from_mode(mode)).expect("a file");
        let why = host.refused(&disk);
        assert!(
            why.contains(&format!("`chmod 600 {}`", keyring.display())),
            "{mode:o} {why}"
        );
    }
    assert!(!host.calls().contains("\nrbd "), "{}", host.calls());
}

#[test]
fn busy_device_is_waited_for_and_never_forced() {
    let (_cluster, host) = beds();
    let disk = host.disk(3, 51712, "rbd:vms/web", "w");
    host.attach(&disk);
    fs::create_dir(host.path("busy")).expect("a folder");
    fs::write(host.path("busy/rbd0"), "").expect("a file");
    host.limit(4);
    let said = host.remove(&disk);
    assert!(!said.status.success());
    let log = host.log();
    assert!(
        log.contains("waiting: /dev/rbd0") && log.contains("`fuser -v /dev/rbd0`"),
        "{log}"
    );
    assert!(
        log.contains("XENBUS_PATH=/local/domain/0/backend/vbd/3/51712"),
        "{log}"
    );
    assert!(!host.calls().contains("force"));
    assert_eq!(host.records(), ["vbd-3-51712"]);
    fs::remove_file(host.path("busy/rbd0")).expect("a file");
    host.detach(&disk);
    assert!(host.mappings().is_empty() && host.records().is_empty());
}

#[test]
fn device_that_was_unmapped_by_hand_is_no_error() {
    let (_cluster, host) = beds();
    let disk = host.disk(3, 51712, "rbd:vms/web", "w");
    host.attach(&disk);
    fs::remove_dir_all(host.path("sys/bus/rbd/devices/0")).expect("a folder");
    host.detach(&disk);
    assert!(host.records().is_empty());
}

#[test]
fn number_that_another_image_got_is_not_unmapped() {
    let (cluster, host) = beds();
    cluster.image("vms/db", "layering,exclusive-lock");
    let disk = host.disk(3, 51712, "rbd:vms/web", "w");
    host.attach(&disk);
    fs::write(host.path("sys/bus/rbd/devices/0/name"), "db\n").expect("a file");
    host.detach(&disk);
    assert_eq!(host.mappings(), ["0"]);
}

#[test]
fn disk_that_is_closed_in_between_leaves_nothing() {
    let (_cluster, host) = beds();
    let disk = host.disk(3, 51712, "rbd:vms/web", "w");
    host.key("/local/domain/0/backend/vbd/3/51712/state", "5");
    let why = host.refused(&disk);
    assert!(why.contains("closed or removed"), "{why}");
}

/// A mode for all mappings, such as encryption, is the administrator's.
#[test]
fn mode_that_ceph_conf_has_for_all_mappings_wins() {
    let modes = [
        (None, "ms_mode=prefer-crc,mount_timeout="),
        (Some("queue_depth=64"), "ms_mode=prefer-crc,mount_timeout="),
        (Some("ms_mode=secure"), "mount_timeout="),
    ];
    for (configured, begin) in modes {
        let (_cluster, host) = beds();
        if let Some(options) = configured {
            fs::write(host.path("map_options"), options).expect("a file");
        }
        host.attach(&host.disk(3, 51712, "rbd:vms/web", "w"));
        let map = format!("device map --options {begin}");
        assert!(host.calls().contains(&map), "{configured:?}");
    }
}
