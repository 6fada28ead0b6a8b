// SPDX-License-Identifier: MIT OR Apache-2.0
//! Larger and smaller disks, and images with backing images.

use crate::bench::{has_qemu, places, qemu_name, Bench};
use rustix::process::Signal;
use serde_json::Value;

const SIZE: u64 = 8 << 20;

#[test]
fn disks_grow_by_zeroes() {
    if !has_qemu("disks_grow_by_zeroes") {
        return;
    }
    for (kind, options) in [
        ("aio", ""),
        ("qcow2", ""),
        ("qcow2", "--cluster-size 512"),
        ("vhd", ""),
        ("vhd", "--fixed"),
    ] {
        let bench = Bench::new();
        bench.sparse("raw", SIZE, &places(1, SIZE, 20), 1);
        bench.good(&format!("convert aio:raw {kind}:a {options}"));
        let done = bench.json(&format!("resize {kind}:a 20M"));
        assert_eq!(
            (&done["old_size"], &done["size"]),
            (&SIZE.into(), &(20 << 20).into()),
            "{done}"
        );
        bench.good(&format!("compare aio:raw {kind}:a"));
        bench.good(&format!("check --data {kind}:a"));
        let format = qemu_name(kind);
        let info = bench.qemu(&format!("qemu-img info --output=json -f {format} a"));
        let info: Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["virtual-size"], 20 << 20, "{kind} {options}: {info}");
        bench.qemu(&format!("qemu-img compare -f raw -F {format} raw a"));
        if kind == "qcow2" {
            bench.qemu("qemu-img check -f qcow2 a");
            // The driver sees the new size that QEMU has set.
            bench.qemu("qemu-img resize -q -f qcow2 a 30M");
            let info = bench.json("info qcow2:a");
            assert_eq!(info[0]["size"], 30 << 20, "{info}");
        }
    }
}

#[test]
fn what_is_below_stays_hidden() {
    let bench = Bench::new();
    bench.sparse("base", SIZE, &[(0, SIZE)], 2);
    bench.good("create qcow2:a 4M --parent aio:base");
    bench.good("convert qcow2:a aio:before");
    bench.good("resize qcow2:a 8M");
    bench.good("compare aio:before qcow2:a");
    bench.good("create vhd:b 4M --parent aio:base");
    let said = bench.bad(6, "resize vhd:b 8M");
    assert!(said.contains("would show what is behind"), "{said}");
    let info = bench.json("info vhd:b");
    assert_eq!(info[0]["size"], 4 << 20, "{info}");
}

#[test]
fn data_is_not_cut_off_unasked() {
    let bench = Bench::new();
    bench.sparse("a", SIZE, &[(0, 1 << 20), (6 << 20, 8192)], 3);
    let before = bench.bytes("a");
    let said = bench.bad(2, "resize aio:a 7M");
    assert!(said.contains("--shrink"), "{said}");
    let said = bench.bad(6, "resize aio:a 4M --shrink");
    assert!(
        said.contains("8 KiB of data behind byte 4194304, the first at byte 6291456"),
        "{said}"
    );
    assert!(bench.bytes("a") == before);
    bench.good("resize aio:a 7M --shrink");
    assert!(bench.bytes("a") == before[..7 << 20]);
    let done = bench.json("resize aio:a 4M --shrink --lose-data");
    assert_eq!(done["lost"], 8192, "{done}");
    assert!(bench.bytes("a") == before[..4 << 20]);
    bench.good("convert aio:a vhd:b");
    let said = bench.bad(2, "resize vhd:b 1M --shrink --lose-data");
    assert!(said.contains("only a raw file"), "{said}");
    for kind in ["vmdk", "qcow"] {
        bench.good(&format!("create {kind}:{kind} 1M"));
        let said = bench.bad(2, &format!("resize {kind}:{kind} 2M"));
        assert!(said.contains("convert it to qcow2"), "{said}");
    }
}

/// QEMU finds no fault in what is left, space is given back, and the old content does not come back when the disk grows.
#[test]
fn a_qcow2_image_becomes_smaller() {
    if !has_qemu("a_qcow2_image_becomes_smaller") {
        return;
    }
    // Sizes inside of a cluster, at its end, and of one and of several L2 tables.
    for (options, size, cut) in [
        ("", SIZE, (3 << 20) + 512),
        ("", SIZE, 4 << 20),
        ("-o cluster_size=512", SIZE, (1 << 20) + 1024),
        ("-o cluster_size=512", SIZE, 512),
        ("-o compat=0.10", SIZE, 5 << 20),
        ("-o extended_l2=on", SIZE, (2 << 20) + 4096),
        ("-o data_file=data,data_file_raw=on", SIZE, (2 << 20) + 512),
        ("-c", SIZE, (2 << 20) + 512),
    ] {
        let bench = Bench::new();
        bench.sparse("raw", size, &[(0, size)], 5);
        bench.qemu(&format!("qemu-img convert -f raw -O qcow2 {options} raw a"));
        let said = bench.bad(6, &format!("resize qcow2:a {cut} --shrink"));
        assert!(said.contains("of data behind byte"), "{options}: {said}");
        bench.good("compare --strict aio:raw qcow2:a");
        let before = bench.allocated("a");
        let done = bench.json(&format!("resize qcow2:a {cut} --shrink --lose-data"));
        assert_eq!(done["lost"], size - cut, "{options}: {done}");
        bench.qemu("qemu-img check -f qcow2 a");
        bench.shell(&format!("truncate -s {cut} raw"));
        bench.good("compare --strict aio:raw qcow2:a");
        bench.qemu("qemu-img compare -f raw -F qcow2 raw a");
        if options.contains("data_file") {
            assert_eq!(bench.bytes("data").len() as u64, cut);
        } else {
            assert!(bench.allocated("a") < before, "{options}");
        }
        // By QEMU and by us.
        bench.shell("cp a b && cp raw twin");
        bench.qemu(&format!("qemu-img resize -q -f qcow2 a {size}"));
        bench.shell(&format!("truncate -s {size} raw"));
        bench.qemu("qemu-img compare -f raw -F qcow2 raw a");
        if options.contains("data_file") {
            continue;
        }
        bench.good(&format!("resize qcow2:b {size}"));
        bench.qemu("qemu-img compare -f raw -F qcow2 raw b");
        bench.qemu("qemu-img check -f qcow2 b");
    }
}

/// Half a sector would be no disk, and neither the image nor its child forgets the size of its sectors.
#[test]
fn a_smaller_disk_keeps_its_sectors() {
    let bench = Bench::new();
    bench.good("create qcow2:base 8M --sector-size 4096");
    bench.good("create qcow2:child --parent qcow2:base");
    for image in ["base", "child"] {
        let said = bench.bad(6, &format!("resize qcow2:{image} 1049088 --shrink"));
        assert!(said.contains("sectors of 4096"), "{said}");
        let facts = bench.json(&format!("info qcow2:{image}"));
        assert_eq!(facts[0]["size"], SIZE, "{facts}");
    }
    bench.good("resize qcow2:child 1M --shrink");
    bench.good("resize qcow2:base 2M --shrink");
    for (image, size) in [("base", 2 << 20), ("child", 1 << 20)] {
        let facts = bench.json(&format!("info qcow2:{image}"));
        assert_eq!(facts[0]["size"], size, "{facts}");
        assert_eq!(facts[0]["sector_size"], 4096, "{facts}");
    }
}

/// Zeroes are no loss, and a child does not show more of its parent.
#[test]
fn what_is_cut_off_is_looked_at() {
    if !has_qemu("what_is_cut_off_is_looked_at") {
        return;
    }
    for compat in ["0.10", "1.1"] {
        let bench = Bench::new();
        bench.sparse("base", SIZE, &[(0, 1 << 20), (6 << 20, 1 << 20)], 6);
        bench.qemu(&format!(
            "qemu-img create -q -f qcow2 -o compat={compat} -b base -F raw a 8M"
        ));
        let said = bench.bad(6, "resize qcow2:a 5M --shrink");
        assert!(said.contains("1 MiB of data behind byte 5242880"), "{said}");
        bench.qemu_write("a", "write -z 6M 1M");
        bench.good("resize qcow2:a 5M --shrink");
        bench.qemu("qemu-img check -f qcow2 a");
        // The parent has something there that the disk must not show.
        bench.good("resize qcow2:a 8M");
        bench.qemu("qemu-img check -f qcow2 a");
        bench.shell("cp base raw && fallocate -p -o 6M -l 1M raw");
        bench.good("compare --strict aio:raw qcow2:a");
        bench.qemu("qemu-img compare -f raw -F qcow2 raw a");
        bench.qemu("qemu-img snapshot -c one a");
        let said = bench.bad(6, "resize qcow2:a 1M --shrink --lose-data");
        assert!(said.contains("qemu-img snapshot -d"), "{said}");
    }
}

/// A process that is killed when the disk is smaller leaves the new one, with clusters behind its end, which do not come
/// back when it grows.
#[test]
fn a_death_leaves_a_sound_image() {
    if !has_qemu("a_death_leaves_a_sound_image") {
        return;
    }
    let bench = Bench::new();
    bench.sparse("raw", SIZE, &[(0, SIZE)], 8);
    bench.qemu("qemu-img convert -f raw -O qcow2 -o cluster_size=512 raw a");
    let line = "resize qcow2:a 1M --shrink --lose-data";
    let is_cut = || bench.peek("a", 24) == 1 << 20;
    bench.end(line, Signal::KILL, is_cut);
    bench.shell("truncate -s 1M raw");
    bench.good("compare --strict aio:raw qcow2:a");
    bench.good("check qcow2:a");
    bench.qemu("qemu-img compare -f raw -F qcow2 raw a");
    bench.good("resize qcow2:a 8M");
    bench.shell("truncate -s 8M raw");
    bench.qemu("qemu-img compare -f raw -F qcow2 raw a");
    bench.good("check --repair qcow2:a");
    bench.qemu("qemu-img check -f qcow2 a");
}

#[test]
fn snapshots_without_a_size_keep_theirs() {
    if !has_qemu("snapshots_without_a_size_keep_theirs") {
        return;
    }
    let bench = Bench::new();
    bench.qemu("qemu-img create -q -f qcow2 -o compat=0.10 a 1M");
    bench.qemu("qemu-img snapshot -c one a");
    let said = bench.bad(6, "resize qcow2:a 2M");
    assert!(said.contains("compat=1.1"), "{said}");
}

#[test]
fn an_overlay_goes_on_from_an_image() {
    let bench = Bench::new();
    bench.sparse("base", SIZE, &places(4, SIZE, 10), 4);
    let done = bench.json("snapshot aio:base qcow2:a");
    assert!(
        done["overlay"].as_str().unwrap().starts_with("qcow2:"),
        "{done}"
    );
    bench.good("snapshot qcow2:a qcow2:b");
    bench.good("compare --strict aio:base qcow2:b");
    let said = bench.bad(6, "snapshot qcow2:a qcow2:b");
    assert!(said.contains("is there already"), "{said}");
    let said = bench.bad(2, "snapshot aio:base");
    assert!(said.contains("name the image to make"), "{said}");
    assert_eq!(
        bench.json("snapshot qcow2:b")["snapshots"],
        Value::Array(vec![])
    );
}

#[test]
fn snapshots_are_listed() {
    if !has_qemu("snapshots_are_listed") {
        return;
    }
    let bench = Bench::new();
    bench.good("create qcow2:a 1M");
    bench.qemu("qemu-img snapshot -c one a");
    bench.qemu("qemu-img snapshot -c two a");
    let all = bench.json("snapshot qcow2:a");
    assert_eq!(all["snapshots"][1]["name"], "two", "{all}");
    assert!(bench.good("snapshot qcow2:a").contains("1 \"one\", 1 MiB"));
}
