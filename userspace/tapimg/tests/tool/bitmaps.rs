// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dirty bitmaps that QEMU keeps in qcow2 images: listed, and right after writes by this program, by QEMU's judgement.

use crate::bench::{has_qemu, places, Bench};
use rustix::process::Signal;
use serde_json::Value;
use std::collections::BTreeSet;

const SIZE: u64 = 64 << 20;
const GRANULE: u64 = 64 << 10;

/// An image with a bitmap that records, and one that is disabled.
fn image(bench: &Bench, options: &str) {
    bench.qemu(&format!("qemu-img create -q -f qcow2 {options} a {SIZE}"));
    bench.qemu(&format!("qemu-img bitmap --add -g {GRANULE} -f qcow2 a on"));
    bench.qemu("qemu-img bitmap --add -g 4096 --disable -f qcow2 a off");
    bench.qemu_write("a", "write -P 5 5M 100k");
}

/// Granules of which QEMU says that they are dirty.
fn dirty(bench: &Bench, name: &str, bitmap: &str) -> BTreeSet<u64> {
    let socket = bench.path("socket");
    bench.shell(&format!(
        "qemu-nbd -r -f qcow2 -B {bitmap} -k {0} --fork --pid-file=pid {name}",
        socket.display()
    ));
    let opts = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}",
        socket.display()
    );
    let text = bench.qemu(&format!("qemu-img map --output=json --image-opts {opts}"));
    bench.shell("kill $(cat pid); while test -e socket; do sleep 0.01; done; rm -f pid");
    let all: Value = serde_json::from_str(&text).unwrap();
    let mut granules = BTreeSet::new();
    for extent in all.as_array().unwrap() {
        if extent["data"] == false {
            let (at, len) = (&extent["start"], &extent["length"]);
            let (at, len) = (at.as_u64().unwrap(), len.as_u64().unwrap());
            granules.extend(at / GRANULE..(at + len).div_ceil(GRANULE));
        }
    }
    granules
}

/// The granules that ranges touch.
fn touched(ranges: &[(u64, u64)]) -> BTreeSet<u64> {
    let each = ranges.iter();
    each.flat_map(|(at, len)| at / GRANULE..(at + len).div_ceil(GRANULE))
        .collect()
}

/// The flags of each bitmap, as QEMU names them.
fn flags(bench: &Bench, name: &str) -> Vec<(String, BTreeSet<String>)> {
    let info = bench.qemu(&format!("qemu-img info --output=json -f qcow2 {name}"));
    let info: Value = serde_json::from_str(&info).unwrap();
    let all = &info["format-specific"]["data"]["bitmaps"];
    let all = all.as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap().to_string();
    all.iter()
        .map(|one| {
            let flags = one["flags"].as_array().unwrap().iter().map(text);
            (text(&one["name"]), flags.collect())
        })
        .collect()
}

/// A bitmap and its flags.
fn named(name: &str, flags: &[&str]) -> (String, BTreeSet<String>) {
    let flags = flags.iter().map(|flag| flag.to_string());
    (name.into(), flags.collect())
}

#[test]
fn bitmaps_are_listed() {
    if !has_qemu("bitmaps_are_listed") {
        return;
    }
    let bench = Bench::new();
    image(&bench, "");
    let info = bench.json("info qcow2:a");
    let expected: Value = serde_json::json!([
        { "name": "on", "granularity": GRANULE, "recording": true, "consistent": true },
        { "name": "off", "granularity": 4096, "recording": false, "consistent": true },
    ]);
    assert_eq!(info[0]["bitmaps"], expected, "{info}");
    let text = bench.good("info qcow2:a");
    assert!(
        text.contains("dirty bitmap: \"on\", a bit for 64 KiB, records writes"),
        "{text}"
    );
    // A directory that cannot be keeps nothing from being served.
    let head = bench.bytes("a");
    let extension = 0x2385_2875_u32.to_be_bytes();
    let at = head
        .windows(4)
        .position(|bytes| bytes == extension)
        .unwrap();
    let directory = bench.peek("a", at as u64 + 24);
    bench.poke("a", directory + 16, &[9]);
    let info = bench.json("info qcow2:a");
    assert_eq!(info[0]["problems"], Value::Array(vec![]), "{info}");
    assert!(info[0]["notes"].to_string().contains("bitmaps"), "{info}");
}

/// The bitmaps of an image have all that a commit writes into it, with clusters of any size.
#[test]
fn writes_are_noted() {
    if !has_qemu("writes_are_noted") {
        return;
    }
    for (options, seed) in [
        ("", 1),
        ("-o cluster_size=512", 2),
        ("-o extended_l2=on", 3),
        ("-o refcount_bits=64", 4),
        ("-o data_file=data", 5),
    ] {
        let bench = Bench::new();
        image(&bench, options);
        let before = touched(&[(5 << 20, 100 << 10)]);
        assert_eq!(dirty(&bench, "a", "on"), before, "{options}");
        bench.good("create qcow2:child --parent qcow2:a --cluster-size 512");
        // Data over all of the disk, and zeroes.
        let ranges = places(seed, SIZE, 40);
        for (at, len) in &ranges {
            bench.qemu_write("child", &format!("write -q -P 9 {at} {len}"));
        }
        bench.qemu_write("child", "write -q -z 5M 1M");
        bench.good("convert qcow2:child aio:expected");
        bench.good("commit qcow2:child");
        bench.qemu("qemu-img compare -f qcow2 -F raw a expected");
        bench.qemu("qemu-img check -f qcow2 a");
        let mut expected = touched(&ranges);
        expected.extend(touched(&[(5 << 20, 1 << 20)]));
        assert_eq!(dirty(&bench, "a", "on"), expected, "{options}");
        assert_eq!(dirty(&bench, "a", "off"), BTreeSet::new());
        let flags = flags(&bench, "a");
        assert_eq!(flags, [named("on", &["auto"]), named("off", &[])]);
        bench.good("check qcow2:a");
    }
}

/// A process that dies leaves a bitmap that says of itself that it is void, and that stays so.
#[test]
fn a_death_makes_a_bitmap_void() {
    if !has_qemu("a_death_makes_a_bitmap_void") {
        return;
    }
    let bench = Bench::new();
    image(&bench, "");
    bench.good("create qcow2:child --parent qcow2:a");
    bench.qemu_write("child", "write -q -P 9 8M 40M");
    bench.kill("commit qcow2:child", "a", 8 << 20);
    for _ in 0..2 {
        assert_eq!(flags(&bench, "a")[0], named("on", &["in-use", "auto"]));
        let info = bench.json("info qcow2:a");
        assert_eq!(info[0]["bitmaps"][0]["consistent"], false, "{info}");
        assert_eq!(info[0]["bitmaps"][1]["consistent"], true, "{info}");
        // Done again, and it is not void any less.
        bench.good("commit qcow2:child");
    }
    bench.qemu("qemu-img compare -f qcow2 -F qcow2 a child");
    bench.qemu("qemu-img bitmap --remove -f qcow2 a on");
    // Clusters that the dead process had prepared.
    bench.good("check --repair qcow2:a");
    bench.qemu("qemu-img check -f qcow2 a");
}

/// Tables get the length that the disk has, in all directions, and QEMU still records.
#[test]
fn bitmaps_change_their_size_with_the_disk() {
    if !has_qemu("bitmaps_change_their_size_with_the_disk") {
        return;
    }
    for options in ["-o cluster_size=4096", ""] {
        let bench = Bench::new();
        image(&bench, options);
        let mut expected = touched(&[(5 << 20, 100 << 10)]);
        // With the smaller clusters a table entry of the disabled bitmap stands for 128 MiB, and a cluster of them for
        // 64 GiB.
        for size in ["65M", "1G", "100G", "90G", "2G", "10M"] {
            let loses = if size == "10M" { "--lose-data" } else { "" };
            let shrink = match size {
                "90G" | "2G" | "10M" => format!("--shrink {loses}"),
                _ => String::new(),
            };
            bench.good(&format!("resize qcow2:a {size} {shrink}"));
            bench.qemu("qemu-img check -f qcow2 a");
            assert_eq!(flags(&bench, "a")[0], named("on", &["auto"]), "{size}");
            bench.qemu_write("a", "write -q -P 6 9M 64k");
            expected.extend(touched(&[(9 << 20, 64 << 10)]));
            assert_eq!(dirty(&bench, "a", "on"), expected, "{options} {size}");
        }
    }
}

/// A bitmap whose table lies in the data of the disk is not kept, and no write goes there.
#[test]
fn bits_are_not_written_over_anything_else() {
    if !has_qemu("bits_are_not_written_over_anything_else") {
        return;
    }
    let bench = Bench::new();
    image(&bench, "");
    let head = bench.bytes("a");
    let extension = 0x2385_2875_u32.to_be_bytes();
    let at = head
        .windows(4)
        .position(|bytes| bytes == extension)
        .unwrap();
    let directory = bench.peek("a", at as u64 + 24);
    let l1 = bench.peek("a", 40);
    let table = bench.peek("a", directory);
    // The bits would be written into the L1 table.
    bench.poke("a", table, &l1.to_be_bytes());
    bench.good("create qcow2:child --parent qcow2:a");
    bench.qemu_write("child", "write -q -P 9 8M 1M");
    bench.good("convert qcow2:child aio:expected");
    let said = bench.run("commit qcow2:child");
    assert_eq!(said.status, Some(0), "{said:?}");
    assert!(said.err.contains("dirty bitmaps are void"), "{said:?}");
    bench.good("compare --strict aio:expected qcow2:a");
    let info = bench.json("info qcow2:a");
    assert_eq!(info[0]["bitmaps"][0]["consistent"], false, "{info}");
}

/// A second process never sees a bitmap that claims to be right while the disk changes.
#[test]
fn a_bitmap_is_marked_before_the_first_write() {
    if !has_qemu("a_bitmap_is_marked_before_the_first_write") {
        return;
    }
    let bench = Bench::new();
    image(&bench, "");
    bench.good("create qcow2:child --parent qcow2:a");
    bench.qemu_write("child", "write -q -P 9 8M 40M");
    let head = bench.bytes("a");
    let extension = 0x2385_2875_u32.to_be_bytes();
    let at = head
        .windows(4)
        .position(|bytes| bytes == extension)
        .unwrap();
    let directory = bench.peek("a", at as u64 + 24);
    let marked = || bench.peek("a", directory + 8) & 1 != 0;
    assert!(!marked());
    let end = bench.end("commit qcow2:child", Signal::KILL, marked);
    assert_eq!(end.status, None, "{end:?}");
    assert!(marked());
}
