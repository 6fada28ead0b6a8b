// SPDX-License-Identifier: MIT OR Apache-2.0
//! Larger and smaller disks, and images with backing images.

use crate::bench::{has_qemu, places, qemu_name, Bench};
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
    bench.good("convert aio:a qcow2:b");
    let said = bench.bad(2, "resize qcow2:b 1M --shrink --lose-data");
    assert!(said.contains("only a raw file"), "{said}");
    for kind in ["vmdk", "qcow"] {
        bench.good(&format!("create {kind}:{kind} 1M"));
        let said = bench.bad(2, &format!("resize {kind}:{kind} 2M"));
        assert!(said.contains("convert it to qcow2"), "{said}");
    }
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
