// SPDX-License-Identifier: MIT OR Apache-2.0
//! Compressed images, by the judgement of QEMU.

use crate::bench::{has_qemu, noise, Bench};
use serde_json::Value;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};

const SIZE: u64 = 40 << 20;

/// A disk with text, which becomes smaller, noise, which does not, and holes.
fn disk(bench: &Bench, name: &str) {
    let mut file = File::create(bench.path(name)).unwrap();
    file.set_len(SIZE - 512).unwrap();
    let mut put = |at: u64, bytes: &[u8]| {
        file.seek(SeekFrom::Start(at)).unwrap();
        file.write_all(bytes).unwrap();
    };
    let text = |len: usize| -> Vec<u8> { (0..len).map(|at| (at / 5 % 97) as u8 + 1).collect() };
    put(0, &text(5 << 20));
    put(8 << 20, &noise(1, 3 << 20));
    // A sector alone, and the last one.
    put((16 << 20) + 512 * 77, &text(512));
    put((20 << 20) + 512, &noise(2, 40_000));
    put((20 << 20) + 100_352, &text(3 << 20));
    put(SIZE - 1024, &text(512));
}

#[test]
fn qemu_reads_what_is_compressed() {
    if !has_qemu("qemu_reads_what_is_compressed") {
        return;
    }
    for (options, method) in [
        ("--compress", "zlib"),
        ("--compress=zlib --cluster-size 4K", "zlib"),
        ("--compress=zlib --cluster-size 2M", "zlib"),
        ("--compress --subclusters", "zlib"),
        ("--compress=zstd", "zstd"),
        ("--compress=zstd --cluster-size 4K", "zstd"),
    ] {
        let bench = Bench::new();
        disk(&bench, "raw");
        bench.good(&format!("convert aio:raw qcow2:a {options}"));
        bench.qemu("qemu-img check -f qcow2 a");
        bench.qemu("qemu-img compare -f raw -F qcow2 raw a");
        bench.good("compare --strict aio:raw qcow2:a");
        bench.good("check --data qcow2:a");
        let info = bench.qemu("qemu-img info --output=json -f qcow2 a");
        let info: Value = serde_json::from_str(&info).unwrap();
        let its = &info["format-specific"]["data"]["compression-type"];
        assert_eq!(its, method, "{options}: {info}");
        // Of 11 MiB, 3 MiB of noise stay, and 8 MiB of text become little.
        let (own, all) = (bench.allocated("a"), 8 << 20);
        assert!(own < all, "{options}: {own}");
        // Both write to it.
        bench.qemu_write("a", "write -q -P 7 1M 100k");
        bench.shell("dd if=/dev/zero bs=1k count=100 status=none | tr '\\0' '\\7' | dd of=raw bs=1M seek=1 conv=notrunc status=none");
        bench.good("compare --strict aio:raw qcow2:a");
        bench.good("create qcow2:child --parent qcow2:a");
        bench.qemu_write("child", "write -q -P 9 2M 300k");
        bench.good("convert qcow2:child aio:now");
        bench.good("commit qcow2:child");
        bench.qemu("qemu-img check -f qcow2 a");
        bench.qemu("qemu-img compare -f raw -F qcow2 now a");
    }
}

/// As small as QEMU makes it, so that no space is lost between clusters.
#[test]
fn a_compressed_image_is_as_small_as_qemu_makes_it() {
    if !has_qemu("a_compressed_image_is_as_small_as_qemu_makes_it") {
        return;
    }
    let bench = Bench::new();
    // Words, as files of text have them: about a half is left.
    const WORDS: usize = 8 << 20;
    let mut words = Vec::new();
    let mut state = 5_u64;
    while words.len() < WORDS {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(99);
        words.extend_from_slice(format!("{:x} ", state >> 44 & 0xfff).as_bytes());
    }
    words.truncate(WORDS);
    std::fs::write(bench.path("raw"), words).unwrap();
    for (ours, qemu, share) in [("zlib", "zlib", 102), ("zstd", "zstd", 140)] {
        bench.good(&format!(
            "convert --force aio:raw qcow2:a --compress={ours}"
        ));
        bench.qemu(&format!(
            "qemu-img convert -c -f raw -O qcow2 -o compression_type={qemu} raw b"
        ));
        let (own, other) = (bench.allocated("a"), bench.allocated("b"));
        assert!(own * 100 <= other * share, "{ours}: {own} and {other}");
        bench.qemu("qemu-img compare -f raw -F qcow2 raw a");
    }
}

#[test]
fn a_child_gets_compressed_differences() {
    if !has_qemu("a_child_gets_compressed_differences") {
        return;
    }
    let bench = Bench::new();
    disk(&bench, "base");
    // One change, and zeroes where the base has text; the base is longer than the disk.
    bench.shell("cp base raw && truncate -s 39M raw && fallocate -p -o 1M -l 1M raw");
    bench.poke("raw", 30 << 20, b"changed");
    for options in ["--compress", "--compress=zstd --subclusters"] {
        bench.good(&format!(
            "convert --force aio:raw qcow2:a --parent aio:base {options}"
        ));
        bench.qemu("qemu-img check -f qcow2 a");
        bench.qemu("qemu-img compare -f raw -F qcow2 raw a");
        bench.good("compare --strict aio:raw qcow2:a");
        assert!(bench.allocated("a") < 2 << 20, "{}", bench.allocated("a"));
    }
}

/// With one table and with several, and a part of a grain at the end.
#[test]
fn qemu_reads_a_stream_of_grains() {
    if !has_qemu("qemu_reads_a_stream_of_grains") {
        return;
    }
    let bench = Bench::new();
    disk(&bench, "raw");
    bench.good("convert aio:raw vmdk:a.vmdk --compress");
    let info = bench.qemu("qemu-img info --output=json -f vmdk a.vmdk");
    let info: Value = serde_json::from_str(&info).unwrap();
    let its = &info["format-specific"]["data"]["create-type"];
    assert_eq!(its, "streamOptimized", "{info}");
    bench.qemu("qemu-img check -f vmdk a.vmdk");
    bench.qemu("qemu-img compare -f raw -F vmdk raw a.vmdk");
    bench.good("compare --strict aio:raw vmdk:a.vmdk");
    bench.good("check --data vmdk:a.vmdk");
    assert!(bench.allocated("a.vmdk") < 5 << 20);
    // An empty disk, and one whose first tables are empty.
    bench.shell("truncate -s 200M empty && cp --sparse=always empty late");
    bench.poke("late", 150 << 20, b"late");
    for name in ["empty", "late"] {
        bench.good(&format!("convert aio:{name} vmdk:{name}.vmdk --compress"));
        bench.qemu(&format!(
            "qemu-img compare -f raw -F vmdk {name} {name}.vmdk"
        ));
        bench.good(&format!("compare --strict aio:{name} vmdk:{name}.vmdk"));
        assert!(bench.allocated(&format!("{name}.vmdk")) < 1 << 20);
    }
    // It is read as a stream, too: the markers lead from one grain to the next.
    markers(&bench.bytes("a.vmdk"));
}

/// Follows the markers from the first grain to the end of the stream, as readers of appliances do.
fn markers(bytes: &[u8]) {
    let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let (mut at, mut last, mut grains, mut tables) = (128 * 512, None, 0, 0);
    loop {
        let (value, size) = (long(at), word(at + 8) as usize);
        if size > 0 {
            assert!(last < Some(value), "grains are in their order");
            (last, grains) = (Some(value), grains + 1);
            let zlib = &bytes[at + 12..at + 12 + size];
            assert_eq!(zlib[0] & 0xf, 8, "deflate");
            at += (12 + size).next_multiple_of(512);
            continue;
        }
        match word(at + 12) {
            0 => break,
            1 => tables += 1,
            2 => assert_eq!(value, 1, "sectors of the directory"),
            3 => assert_eq!(&bytes[at + 512..at + 516], b"KDMV"),
            other => panic!("a marker of type {other}"),
        }
        at += 512 + value as usize * 512;
    }
    assert_eq!(at + 512, bytes.len(), "nothing is behind the end");
    assert!(grains > 100 && tables == 2, "{grains} {tables}");
}

#[test]
fn what_cannot_be_compressed_is_refused() {
    let bench = Bench::new();
    bench.sparse("raw", 1 << 20, &[(0, 4096)], 1);
    for (line, why) in [
        (
            "convert aio:raw vhd:a --compress",
            "only qcow2 images and VMDKs",
        ),
        (
            "convert aio:raw aio:a --compress",
            "only qcow2 images and VMDKs",
        ),
        ("convert aio:raw vmdk:a --compress=zstd", "zlib only"),
        (
            "convert aio:raw qcow2:a --compress --damaged",
            "second step",
        ),
        ("convert aio:raw qcow2:a --compress=lzma", "lzma"),
    ] {
        let said = bench.bad(2, line);
        assert!(said.contains(why), "{line}: {said}");
    }
    bench.good("create vmdk:base 1M");
    let said = bench.bad(2, "convert aio:raw vmdk:a --compress --parent vmdk:base");
    assert!(said.contains("has no parent"), "{said}");
    assert_eq!(bench.files(), ["base", "raw"]);
}
