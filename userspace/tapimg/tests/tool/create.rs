// SPDX-License-Identifier: MIT OR Apache-2.0
//! New images.

use crate::bench::{has_qemu, Bench};
use serde_json::Value;

const SIZE: u64 = 40 << 20;

fn qemu_info(bench: &Bench, format: &str, name: &str) -> Value {
    let text = bench.qemu(&format!("qemu-img info --output=json -f {format} {name}"));
    serde_json::from_str(&text).unwrap()
}

#[test]
fn qemu_knows_what_is_made() {
    if !has_qemu("qemu_knows_what_is_made") {
        return;
    }
    for (kind, format, options) in [
        ("aio", "raw", ""),
        ("qcow2", "qcow2", ""),
        ("qcow2", "qcow2", "--cluster-size 128K --subclusters"),
        ("qcow2", "qcow2", "--cluster-size 512"),
        ("qcow", "qcow", ""),
        ("vhd", "vpc", ""),
        ("vhd", "vpc", "--fixed"),
        ("vmdk", "vmdk", ""),
    ] {
        let bench = Bench::new();
        bench.good(&format!("create {kind}:a {SIZE} {options}"));
        let info = qemu_info(&bench, format, "a");
        assert_eq!(info["virtual-size"], SIZE, "{kind} {options}: {info}");
        assert!(bench.allocated("a") < 1 << 20, "{kind} {options}");
        if matches!(format, "qcow2" | "vmdk") {
            bench.qemu(&format!("qemu-img check -f {format} a"));
        }
        bench.qemu(&format!("qemu-io -f {format} -c {} a", "flush"));
        let own = bench.json(&format!("info {kind}:a"));
        assert_eq!(own[0]["size"], SIZE, "{own}");
        assert_eq!(own[0]["problems"], Value::Array(vec![]), "{own}");
        assert_eq!(bench.files(), ["a"]);
    }
}

#[test]
fn a_child_has_the_content_of_its_parent() {
    if !has_qemu("a_child_has_the_content_of_its_parent") {
        return;
    }
    for (parent, child) in [
        ("aio", "qcow2"),
        ("vhd", "qcow2"),
        ("qcow2", "qcow2"),
        ("vmdk", "qcow2"),
        ("vhd", "vhd"),
        ("aio", "vhd"),
        ("vmdk", "vmdk"),
        ("aio", "qcow"),
    ] {
        let bench = Bench::new();
        bench.sparse("raw", SIZE, &[(0, 70000), (8 << 20, 5 << 20)], 1);
        bench.good(&format!("convert aio:raw {parent}:parent"));
        bench.good(&format!("create {child}:child --parent {parent}:parent"));
        let same = format!("compare --strict --parent-kind aio aio:raw {child}:child");
        bench.good(&same);
        let info = bench
            .run(&format!("--parent-kind aio info --chain {child}:child"))
            .out;
        assert!(
            info.contains("parent: ") && info.contains(&format!("image: {parent}:")),
            "{info}"
        );
        // QEMU does not know raw parents of a VHD, nor any; of others it finds them.
        if child != "vhd" {
            let format = crate::bench::qemu_name(child);
            let own = qemu_info(&bench, format, "child");
            assert_eq!(own["backing-filename"], "parent", "{own}");
            if child != "qcow" {
                bench.qemu(&format!("qemu-img compare -f raw -F {format} raw child"));
            }
        }
    }
}

#[test]
fn what_is_there_is_not_replaced() {
    let bench = Bench::new();
    bench.sparse("a", 1 << 20, &[(0, 4096)], 2);
    let before = bench.bytes("a");
    let said = bench.bad(6, "create qcow2:a 1M");
    assert!(
        said.contains("--force") && said.contains("/a is there already"),
        "{said}"
    );
    assert!(bench.bytes("a") == before);
    bench.good("create qcow2:a 1M --force");
    assert!(bench.bytes("a").starts_with(b"QFI\xfb"));
    assert_eq!(bench.files(), ["a"]);
}

#[test]
fn a_link_stays_and_rights_stay() {
    use std::os::unix::fs::{symlink, PermissionsExt};
    let bench = Bench::new();
    bench.sparse("a", 1 << 20, &[], 2);
    let rights = std::fs::Permissions::from_mode(0o640);
    std::fs::set_permissions(bench.path("a"), rights).unwrap();
    symlink("a", bench.path("link")).unwrap();
    bench.good("create qcow2:link 1M --force");
    assert!(bench.bytes("a").starts_with(b"QFI\xfb"));
    assert!(bench.path("link").is_symlink());
    let mode = std::fs::metadata(bench.path("a"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o640);
    bench.good("create qcow2:new 1M");
    let mode = std::fs::metadata(bench.path("new"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o077, 0, "a guest's data is nobody else's");
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_touched() {
    let bench = Bench::new();
    bench.sparse("base", 1 << 20, &[], 2);
    for line in [
        "create qcow2:a",
        "create aio:a 1M --cluster-size 64K",
        "create qcow2:a 1M --cluster-size 3K",
        "create qcow2:a 1M --fixed",
        "create vhd:a 1M --subclusters",
        "create vmdk:a --parent aio:base",
        "create vhd:a --parent qcow2:base --fixed",
        "create aio:a --parent aio:base",
        "create qcow2:base --parent aio:base --force",
        "convert aio:base aio:base --force",
        "create a 1M",
    ] {
        let said = bench.bad(2, line);
        assert!(!said.is_empty());
        assert_eq!(bench.files(), ["base"], "{line}");
    }
    let said = bench.bad(2, "create vhd:a 3T");
    assert!(said.contains("nothing was made"), "{said}");
    assert_eq!(bench.files(), ["base"]);
    bench.bad(4, "create qcow2:a --parent aio:none");
}

#[test]
fn sizes_are_written_as_people_write_them() {
    let bench = Bench::new();
    for (text, bytes) in [("1.5G", 3 << 29), ("10MiB", 10 << 20), ("+10M", 0)] {
        let made = bench.run(&format!("create qcow2:a {text} --force"));
        match bytes {
            0 => assert!(
                made.status == Some(2) && made.err.contains("--parent"),
                "{made:?}"
            ),
            _ => assert_eq!(bench.json("info qcow2:a")[0]["size"], bytes, "{text}"),
        }
    }
    let made = bench.json("create qcow2:b +1.5M --parent qcow2:a");
    assert_eq!(made["size"], (10 << 20) + (3 << 19), "{made}");
    assert_eq!(
        bench.json("info qcow2:b")[0]["size"],
        made["size"],
        "{made}"
    );
    bench.good("resize qcow2:b +512KiB");
    assert_eq!(bench.json("info qcow2:b")[0]["size"], 12 << 20);
}

#[test]
fn programs_learn_what_was_made() {
    let bench = Bench::new();
    bench.sparse("raw", SIZE, &[(0, 1 << 20)], 3);
    let made = bench.json("create vhd:base 40M");
    let path = bench.path("base").display().to_string();
    assert_eq!(made["image"], format!("vhd:{path}"), "{made}");
    assert_eq!(
        (&made["kind"], &made["path"]),
        (&"vhd".into(), &path.into())
    );
    assert_eq!(made["size"], SIZE, "{made}");
    let done = bench.json("convert aio:raw qcow2:child --parent vhd:base");
    assert_eq!(done["size"], SIZE, "{done}");
    let names = ["from", "image", "parent"].map(|key| done[key].as_str().unwrap_or_default());
    for (name, end) in names.into_iter().zip(["/raw", "/child", "/base"]) {
        assert!(name.ends_with(end), "{done}");
    }
    assert_eq!(done["allocated"], bench.allocated("child"), "{done}");
    assert_eq!(done["file_size"], bench.bytes("child").len(), "{done}");
    assert_eq!(done["lost"], Value::Null, "{done}");
    // A person reads the exit status.
    assert_eq!(bench.good("convert aio:raw vhd:b"), "");
    assert_eq!(bench.good("create qcow:c 1M"), "");
}

/// The answer has the ranges that --damaged leaves out, as stderr has them.
#[test]
fn programs_learn_what_was_lost() {
    let bench = Bench::new();
    bench.sparse("raw", SIZE, &[(0, 4 << 20)], 5);
    bench.good("convert aio:raw qcow2:a");
    let len = bench.bytes("a").len() as u64;
    bench.shell(&format!("truncate -s {} a", len - (1 << 20)));
    let done = bench.json("convert --damaged qcow2:a aio:b");
    let lost = done["lost"].as_u64().expect("bytes that are lost");
    assert!((1 << 20..2 << 20).contains(&lost), "{done}");
    let listed = done["lost_at"].as_array().expect("ranges");
    let sum: u64 = listed.iter().map(|range| range[1].as_u64().unwrap()).sum();
    assert_eq!(sum, lost, "{done}");
    assert_eq!(bench.json("convert --damaged aio:raw aio:c")["lost"], 0);
}
