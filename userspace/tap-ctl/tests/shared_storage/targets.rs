// SPDX-License-Identifier: MIT OR Apache-2.0
//! Targets: which are whose, and odd names.

use crate::host::SharedCluster;

#[test]
fn odd_names_are_refused_before_any_program_sees_them() {
    let cluster = SharedCluster::new();
    let host = cluster.host("alpha");
    host.guest(3, "web", "uuid-web");
    let odd = [
        "rbd:web",
        "rbd:vms/",
        "rbd:/web",
        "rbd:vms/a/b/c",
        "rbd:-vms/web",
        "rbd:vms/--force",
        "rbd:vms/web@-x",
        "rbd:vms/web@",
        "rbd:vms/web@a@b",
        "rbd:vms/we b",
        "rbd:vms/web$(touch /tmp/x)",
        "rbd:vms/web;x",
        "rbd:vms/web,x",
        "rbd:vms/*",
        "id=xen,rbd:vms/w'eb",
        "id=-x,rbd:vms/web",
        "id=a b,rbd:vms/web",
        "id=client.xen,rbd:vms/web",
        "conf=ceph.conf,rbd:vms/web",
        "keyring=key,rbd:vms/web",
        "bps=20M,rbd:vms/web",
        "lease=record:/dev/x,rbd:vms/web",
        "options=secret=AQ,rbd:vms/web",
        "options=queue_depth=1,key=x,rbd:vms/web",
        "options=name=x,rbd:vms/web",
        "options=ro,rbd:vms/web",
        "options=a b,rbd:vms/web",
        "options=_pool_ns=x,rbd:vms/web",
        "options=nocrc,rbd:vms/web",
        "options=nocrc,ms_mode=crc,rbd:vms/web",
        "drbd:",
        "drbd:all",
        "drbd:--force",
        "drbd:r0/x",
        "drbd:r 0",
        "id=x,drbd:r0",
    ];
    for target in odd {
        let disk = host.disk(3, 51712, target, "w");
        let why = host.refused(&disk);
        assert!(
            !why.contains("failed; error detected") && why.len() > 20,
            "{target}: {why}"
        );
    }
    let calls = host.calls();
    let of_storage = |line: &&str| line.starts_with("rbd ") || line.starts_with("drbdadm ");
    assert_eq!(calls.lines().find(of_storage), None);
}

/// Files may have `,rbd:` in their names, and lease= may have a colon.
#[test]
fn other_targets_stay_with_their_process() {
    let cluster = SharedCluster::new();
    let host = cluster.host("alpha");
    host.guest(3, "web", "uuid-web");
    for target in [
        "aio:/srv/a,rbd:b.img",
        "bps=20M,aio:/srv/a,rbd:b.img",
        "lease=record:/dev/san/l,aio:/dev/san/a,drbd:b",
        "qcow2:/srv/rbd:x",
    ] {
        let disk = host.disk(3, 51712, target, "w");
        host.add(&disk);
        let last = host.calls();
        let asked =
            format!("tap-ctl probe --vbd /local/domain/0/backend/vbd/3/51712 --mode w -a {target}");
        assert!(last.contains(&asked), "{target}: {last}");
    }
}

/// After `xentap-block enable`, disks with `script=block` come to `block-or-tap`.
#[test]
fn script_block_passes_shared_storage_on() {
    let cluster = SharedCluster::new();
    let host = cluster.host("alpha");
    host.guest(3, "web", "uuid-web");
    let disk = host.disk(3, 51712, "id=admin,rbd:vms/web", "w");
    host.script("block-or-tap", "add", &disk, &[]);
    assert_eq!(
        host.of(&disk, "hotplug-status"),
        "connected",
        "{}",
        host.of(&disk, "hotplug-error")
    );
    // Its directory is gone, the record is not.
    host.forget(&disk);
    let said = host.script("block-or-tap", "remove", &disk, &[]);
    assert!(said.status.success() && said.stdout.is_empty(), "{said:?}");
    assert!(host.mappings().is_empty() && host.records().is_empty());
    let disk = host.disk(3, 51728, "drbd:r0", "w");
    host.script("block-or-tap", "add", &disk, &[]);
    assert_eq!(host.of(&disk, "physical-device-path"), "/dev/drbd0");
    for target in ["/dev/vg/lv", "vg/rbd:x", "/dev/mapper/a,rbd:b"] {
        let disk = host.disk(3, 51744, target, "w");
        let said = host.script("block-or-tap", "add", &disk, &[]);
        assert_eq!(
            String::from_utf8_lossy(&said.stdout),
            "block.xen\n",
            "{target}"
        );
    }
}

#[test]
fn time_that_is_no_number_is_named() {
    let cluster = SharedCluster::new();
    let host = cluster.host("alpha");
    let disk = host.disk(3, 51712, "rbd:vms/web", "w");
    for time in ["30s", "0", "-1", "x y"] {
        host.script("block-tap-rs", "add", &disk, &[("STORAGE_TIMEOUT", time)]);
        let why = host.of(&disk, "hotplug-error");
        assert!(
            why.contains(&format!("STORAGE_TIMEOUT=\"{time}\"")),
            "{why}"
        );
    }
}

/// libxl makes another kind of device for `backendtype=tap`, which has no block device.
#[test]
fn device_of_blktap_is_refused() {
    let cluster = SharedCluster::new();
    let host = cluster.host("alpha");
    let disk = host.disk(3, 51712, "rbd:vms/web", "w");
    host.script("block-tap-rs", "add", &disk, &[("XENBUS_TYPE", "vbd3")]);
    let why = host.of(&disk, "hotplug-error");
    assert!(why.contains("leave backendtype= away"), "{why}");
    assert!(host.mappings().is_empty());
}
