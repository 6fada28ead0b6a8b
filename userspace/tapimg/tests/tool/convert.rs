// SPDX-License-Identifier: MIT OR Apache-2.0
//! Copies of a disk in other images.

use crate::bench::{has_qemu, places, qemu_name, Bench};
use rustix::process::Signal;

const SIZE: u64 = (24 << 20) + 3 * 512;

/// Through all formats and back. Each step is what QEMU reads, too.
#[test]
fn content_survives_all_formats() {
    if !has_qemu("content_survives_all_formats") {
        return;
    }
    for seed in [3, 77] {
        let bench = Bench::new();
        bench.sparse("first", SIZE, &places(seed, SIZE, 40), seed);
        // Zeroes that are data, and a small hole.
        bench.poke("first", 20 << 20, &[0; 300_000]);
        let mut before = ("aio", "first".to_string());
        let steps = [
            ("qcow2", ""),
            ("vhd", ""),
            ("vmdk", ""),
            ("qcow", ""),
            ("vhd", "--fixed"),
        ];
        let steps = steps
            .into_iter()
            .chain([("qcow2", "--subclusters"), ("aio", "")]);
        for (number, (kind, options)) in steps.enumerate() {
            let to = format!("{number}.{kind}");
            bench.good(&format!(
                "convert {}:{} {kind}:{to} {options}",
                before.0, before.1
            ));
            let format = qemu_name(kind);
            if matches!(kind, "qcow2" | "vmdk") {
                bench.qemu(&format!("qemu-img check -f {format} {to}"));
            }
            bench.good(&format!("check --data {kind}:{to}"));
            bench.qemu(&format!("qemu-img compare -f raw -F {format} first {to}"));
            bench.good(&format!("compare --strict aio:first {kind}:{to}"));
            before = (kind, to);
        }
        assert!(
            bench.bytes("first") == bench.bytes(&before.1),
            "seed {seed}"
        );
        let files = bench.files().len();
        assert_eq!(files, 8, "nothing is left over: {:?}", bench.files());
    }
}

#[test]
fn what_qemu_makes_is_read() {
    if !has_qemu("what_qemu_makes_is_read") {
        return;
    }
    let bench = Bench::new();
    bench.sparse("first", SIZE, &places(9, SIZE, 30), 9);
    for (kind, options) in [
        ("qcow2", "-o cluster_size=4096"),
        ("qcow2", "-c"),
        ("qcow2", "-c -o compression_type=zstd"),
        ("qcow2", "-o compat=0.10"),
        ("qcow", ""),
        ("vhd", "-o force_size=on"),
        ("vhd", "-o subformat=fixed,force_size=on"),
        ("vhdx", ""),
        ("vhdx", "-o subformat=fixed"),
        ("vhdx", "-o block_size=1M,log_size=2M"),
        ("vmdk", ""),
        ("vmdk", "-o subformat=streamOptimized"),
        ("vmdk", "-o subformat=twoGbMaxExtentSparse"),
        ("vmdk", "-o subformat=monolithicFlat"),
    ] {
        let format = qemu_name(kind);
        bench.qemu(&format!(
            "qemu-img convert -f raw -O {format} {options} first a.{kind}"
        ));
        let info = bench.json(&format!("info {kind}:a.{kind}"));
        assert_eq!(info[0]["size"], SIZE, "{kind} {options}: {info}");
        bench.good(&format!("compare --strict aio:first {kind}:a.{kind}"));
        bench.good(&format!("check --data {kind}:a.{kind}"));
        bench.good(&format!("convert {kind}:a.{kind} aio:back --force"));
        assert!(
            bench.bytes("back") == bench.bytes("first"),
            "{kind} {options}"
        );
    }
}

#[test]
fn holes_stay_holes() {
    let bench = Bench::new();
    let data = [
        (1 << 20, 1 << 20),
        (512 << 20, 4096),
        ((1 << 30) - 4096, 4096),
    ];
    bench.sparse("first", 1 << 30, &data, 4);
    // Zeroes that take space become holes.
    bench.poke("first", 600 << 20, &vec![0; 8 << 20]);
    assert!(bench.allocated("first") > 9 << 20);
    let mut from = "aio:first".to_string();
    for kind in ["aio", "qcow2", "vhd", "vmdk", "qcow", "aio"] {
        let to = format!("{kind}.{}", from.len());
        bench.good(&format!("convert {from} {kind}:{to}"));
        let space = bench.allocated(&to);
        assert!(space < 9 << 20, "{kind}: {space}");
        from = format!("{kind}:{to}");
    }
    bench.good(&format!("compare aio:first {from}"));
    let map = bench.json("map aio:aio.9");
    let first = &map["extents"][0];
    assert_eq!(
        (&first["content"], &first["length"]),
        (&"hole".into(), &(1 << 20).into()),
        "{map}"
    );
}

#[test]
fn only_what_differs_from_a_parent_is_written() {
    if !has_qemu("only_what_differs_from_a_parent_is_written") {
        return;
    }
    let bench = Bench::new();
    let size = 32 << 20;
    bench.sparse("base", 24 << 20, &[(0, 16 << 20)], 5);
    // As the base, but for something new, something that became zeroes, and a tail.
    bench.sparse("now", size, &[(0, 16 << 20), (30 << 20, 65536)], 5);
    bench.poke("now", 5 << 20, b"changed");
    bench.poke("now", 9 << 20, &[0; 1 << 20]);
    for (kind, parent) in [
        ("qcow2", "aio:base"),
        ("vhd", "aio:base"),
        ("qcow", "aio:base"),
    ] {
        let child = format!("child.{kind}");
        bench.good(&format!(
            "convert --parent-kind aio aio:now {kind}:{child} --parent {parent}"
        ));
        bench.good(&format!(
            "compare --strict --parent-kind aio aio:now {kind}:{child}"
        ));
        let space = bench.allocated(&child);
        assert!(space < 3 << 20, "{kind}: {space}");
    }
    bench.qemu("qemu-img check -f qcow2 child.qcow2");
    bench.qemu("qemu-img compare -f raw -F qcow2 now child.qcow2");
    let map = bench.json("map --layer qcow2:child.qcow2");
    let below: u64 = map["extents"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|extent| extent["content"] == "below")
        .map(|extent| extent["length"].as_u64().unwrap())
        .sum();
    assert!(below > 28 << 20, "{map}");
}

#[test]
fn a_snapshot_is_read() {
    if !has_qemu("a_snapshot_is_read") {
        return;
    }
    let bench = Bench::new();
    bench.sparse("then", SIZE, &places(11, SIZE, 10), 11);
    bench.qemu("qemu-img convert -f raw -O qcow2 then a");
    bench.qemu("qemu-img snapshot -c before a");
    let write = ["-f", "qcow2", "-c", "write -P 7 0 3M", "a"];
    let done = std::process::Command::new("qemu-io")
        .args(write)
        .current_dir(bench.path(""))
        .output();
    assert!(done.unwrap().status.success());
    let info = bench.json("info qcow2:a");
    assert_eq!(info[0]["snapshots"][0]["name"], "before", "{info}");
    bench.bad(1, "compare aio:then qcow2:a");
    bench.good("convert --snapshot before qcow2:a aio:back");
    assert!(bench.bytes("back") == bench.bytes("then"));
    let said = bench.bad(6, "convert --snapshot none qcow2:a aio:other");
    assert!(said.contains("none"), "{said}");
    assert!(!bench.path("other").exists());
    bench.bad(2, "convert --snapshot before aio:then aio:other");
}

/// An early end of the work leaves no part of an image under its name.
#[test]
fn a_signal_leaves_nothing() {
    for (signal, is_clean) in [
        (Signal::INT, true),
        (Signal::TERM, true),
        (Signal::KILL, false),
    ] {
        let bench = Bench::new();
        // So much that it is not done when its file is there.
        bench.sparse("first", 1 << 30, &[(0, 192 << 20)], 6);
        bench.sparse("old", 1 << 20, &[(0, 4096)], 7);
        let old = bench.bytes("old");
        let begun = bench.path("old.unfinished");
        let said = bench.end("convert aio:first qcow2:old --force", signal, || {
            begun.exists()
        });
        assert!(bench.bytes("old") == old, "{signal:?}: {said:?}");
        if is_clean {
            assert_eq!(said.status, Some(6), "{signal:?}: {said:?}");
            assert!(
                said.err.contains("ended by a signal") && said.err.contains("old is as it was"),
                "{said:?}"
            );
            assert_eq!(bench.files(), ["first", "old"], "{signal:?}");
        }
        // A file of a process that was killed is no obstacle.
        bench.good("create qcow2:old 1M --force");
        assert_eq!(bench.files(), ["first", "old"], "{signal:?}");
    }
}

#[test]
fn progress_is_told_to_who_wants_it() {
    let bench = Bench::new();
    bench.sparse("first", 8 << 20, &[(0, 1 << 20)], 8);
    let quiet = bench.run("convert aio:first qcow2:a");
    assert_eq!(quiet.err, "");
    let told = bench.run("convert aio:first qcow2:b --progress");
    assert!(told.err.contains("100 %  8 MiB of 8 MiB"), "{told:?}");
    assert_eq!(told.out, "");
}
