// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images whose content goes to the one below.

use crate::bench::{has_qemu, places, qemu_name, Bench};
use crate::wrong::lock;
use diskio::LockKind;
use std::os::unix::fs::PermissionsExt;

const SIZE: u64 = 24 << 20;

/// `top` over `mid`, and that over `base` if its kind can be; each with something of its own. `before` is what `top`
/// shows.
fn chain(bench: &Bench, mid: &str, top: &str, seed: u64) {
    bench.sparse("base", SIZE, &places(seed, SIZE, 30), seed);
    std::fs::copy(bench.path("base"), bench.path("raw")).unwrap();
    let mut below = "aio:base".to_string();
    for (name, kind, seed) in [("mid", mid, seed + 1), ("top", top, seed + 2)] {
        for (at, len) in places(seed, SIZE, 12) {
            bench.poke("raw", at, &vec![seed as u8; len as usize]);
        }
        // Zeroes over what is below.
        for (at, len) in places(seed + 10, SIZE, 6) {
            bench.poke("raw", at, &vec![0; len as usize]);
        }
        let to = format!("{kind}:{name}");
        let parent = match kind {
            "aio" | "vmdk" => String::new(),
            _ => format!("--parent {below}"),
        };
        bench.good(&format!("convert --parent-kind aio aio:raw {to} {parent}"));
        below = to;
    }
    bench.good("convert aio:raw aio:before");
}

#[test]
fn the_image_below_becomes_the_disk() {
    for (seed, (mid, top)) in [
        ("aio", "qcow2"),
        ("qcow2", "qcow2"),
        ("vhd", "qcow2"),
        ("vmdk", "qcow2"),
        ("aio", "qcow"),
        ("aio", "vhd"),
        ("vhd", "vhd"),
    ]
    .into_iter()
    .enumerate()
    {
        let bench = Bench::new();
        chain(&bench, mid, top, seed as u64);
        let own = bench.bytes("top");
        let done = bench.json(&format!("commit {top}:top --parent-kind aio"));
        assert!(done["written"].as_u64().unwrap() > 0, "{done}");
        assert_eq!(done["marked"], false, "{done}");
        assert!(
            bench.bytes("top") == own,
            "{top}: what is committed changed"
        );
        std::fs::remove_file(bench.path("top")).unwrap();
        bench.good(&format!("compare --strict aio:before {mid}:mid"));
        bench.good(&format!("check {mid}:mid"));
        if has_qemu("the_image_below_becomes_the_disk") && mid != "vhd" {
            let format = qemu_name(mid);
            bench.qemu(&format!("qemu-img compare -f raw -F {format} before mid"));
        }
    }
}

/// Whenever it dies, the image is still the disk.
#[test]
fn a_death_leaves_the_disk_to_the_image() {
    for (mid, top) in [("aio", "qcow2"), ("qcow2", "qcow2"), ("vhd", "vhd")] {
        let bench = Bench::new();
        bench.sparse("raw", 256 << 20, &[(1 << 20, 96 << 20)], 6);
        bench.good(&format!("create {mid}:mid 256M"));
        bench.good(&format!("convert aio:raw {top}:top --parent {mid}:mid"));
        bench.kill(&format!("commit {top}:top"), "mid", 20 << 20);
        bench.good(&format!("compare --strict aio:raw {top}:top"));
        bench.good(&format!("commit {top}:top"));
        std::fs::remove_file(bench.path("top")).unwrap();
        bench.good(&format!("compare --strict aio:raw {mid}:mid"));
    }
}

#[test]
fn what_cannot_be_committed_is_named() {
    let bench = Bench::new();
    bench.sparse("base", 1 << 20, &[(0, 4096)], 2);
    bench.good("create qcow2:a --parent aio:base");
    bench.good("create qcow2:alone 1M");
    bench.good("create qcow2:larger 2M --parent aio:base");
    bench.good("create qcow2:shorter 512K --parent aio:base");
    bench.good("create vmdk:n 1M");
    bench.good("create vmdk:m --parent vmdk:n");
    for (status, line, why) in [
        (2, "commit aio:base", "only qcow2, qcow and VHD"),
        (2, "commit vmdk:m", "tapimg convert"),
        (2, "commit qcow2:alone", "no backing image"),
        (6, "commit qcow2:larger", "tapimg resize"),
        (6, "commit qcow2:shorter", "tapimg resize"),
    ] {
        let said = bench.bad(status, line);
        assert!(said.contains(why), "{line}: {said}");
    }
    if has_qemu("what_cannot_be_committed_is_named") {
        bench.good("create qcow2:s --parent aio:base");
        bench.qemu("qemu-img snapshot -c one s");
        let before = bench.bytes("base");
        let said = bench.bad(2, "commit qcow2:s");
        assert!(said.contains("1 snapshots"), "{said}");
        assert!(bench.bytes("base") == before, "it was written");
    }
    // Another image that is in use has it as its backing image.
    let _held = lock(&bench, "base", LockKind::Read);
    let said = bench.bad(3, "commit qcow2:a");
    assert!(said.contains("/base is in use"), "{said}");
}

#[test]
fn a_mark_is_told() {
    let bench = Bench::new();
    bench.sparse("base", 1 << 20, &[(0, 4096)], 2);
    bench.good("create qcow2:a --parent aio:base");
    let mode = std::fs::Permissions::from_mode(0o444);
    std::fs::set_permissions(bench.path("base"), mode).unwrap();
    if !rustix::process::geteuid().is_root() {
        let said = bench.bad(6, "commit qcow2:a");
        assert!(said.contains("base"), "{said}");
        return;
    }
    assert!(bench.good("commit qcow2:a").contains("chmod u+w"));
}
