// SPDX-License-Identifier: MIT OR Apache-2.0
//! Logical sectors of 4096 bytes, in which a guest's partition table counts.

use crate::bench::{has_qemu, Bench};
use serde_json::json;

const SIZE: u64 = 8 << 20;

/// A GUID as it is in a VHDX.
pub(crate) fn guid(text: &str) -> [u8; 16] {
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let mut bytes = u128::from_str_radix(&digits, 16).unwrap().to_be_bytes();
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}

fn word(bytes: &[u8], at: usize, len: usize) -> usize {
    let mut word = [0; 8];
    word[..len].copy_from_slice(&bytes[at..at + len]);
    u64::from_le_bytes(word) as usize
}

/// Makes `raw`, with a GPT header in the sector 1 of 4096 bytes, and `a.vhdx` of it, whose metadata say 4096.
fn vhdx(bench: &Bench) {
    bench.sparse("raw", SIZE, &[(0, 4096), (3 << 20, 70_000)], 1);
    bench.poke("raw", 4096, b"EFI PART");
    bench.qemu("qemu-img convert -f raw -O vhdx raw a.vhdx");
    let bytes = bench.bytes("a.vhdx");
    let metadata = guid("8B7CA206-4790-4B9A-B8FE-575F050F886E");
    let region = [0x30010, 0x30030].into_iter();
    let mut region = region.filter(|at| bytes[*at..].starts_with(&metadata));
    let table = word(&bytes, region.next().unwrap() + 16, 8);
    let wanted = [
        "8141BF1D-A96F-4709-BA47-F233A8FAAB5F",
        "CDA348C7-445D-4471-9CC9-E9885251C556",
    ];
    let wanted = wanted.map(guid);
    let mut changed = 0;
    for item in (0..5).map(|number| table + 32 + 32 * number) {
        if wanted.iter().any(|guid| bytes[item..].starts_with(guid)) {
            let at = table + word(&bytes, item + 16, 4);
            bench.poke("a.vhdx", at as u64, &4096_u32.to_le_bytes());
            changed += 1;
        }
    }
    assert_eq!(changed, 2);
}

/// The size of sectors that the program shows, as JSON and for a person.
fn sector(bench: &Bench, image: &str) -> u64 {
    let text = bench.good(&format!("info {image}"));
    let info = bench.json(&format!("info {image}"));
    let size = info[0]["sector_size"].as_u64().unwrap();
    assert!(
        text.contains(&format!("logical sectors: {size} bytes")),
        "{text}"
    );
    size
}

#[test]
fn a_copy_or_a_child_keeps_the_sectors_where_its_format_can_say_them() {
    if !has_qemu("a_copy_or_a_child_keeps_the_sectors_where_its_format_can_say_them") {
        return;
    }
    let bench = Bench::new();
    vhdx(&bench);
    assert_eq!(sector(&bench, "vhdx:a.vhdx"), 4096);
    bench.good("convert vhdx:a.vhdx qcow2:a.qcow2");
    bench.good("convert qcow2:a.qcow2 qcow2:b.qcow2");
    bench.good("convert vhdx:a.vhdx qcow2:packed --compress");
    bench.good("create qcow2:child --parent vhdx:a.vhdx");
    bench.good("snapshot qcow2:a.qcow2 qcow2:snap");
    // QEMU's tools make children, and keep what they do not know in a header.
    bench.qemu("qemu-img create -f qcow2 -b b.qcow2 -F qcow2 theirs");
    bench.qemu("qemu-img amend -f qcow2 -o lazy_refcounts=on b.qcow2");
    for name in ["a.qcow2", "b.qcow2", "packed", "child", "snap", "theirs"] {
        assert_eq!(sector(&bench, &format!("qcow2:{name}")), 4096, "{name}");
        // QEMU does not open a VHDX with such sectors.
        if name != "child" {
            bench.qemu(&format!("qemu-img check -f qcow2 {name}"));
        }
        bench.good(&format!("compare --strict aio:raw qcow2:{name}"));
    }
    let chain = bench.json("info --chain qcow2:theirs");
    assert_eq!(chain[1]["sector_size"], 4096, "{chain}");
    // Without the image below they are those that it had.
    bench.good("rebase qcow2:theirs --no-parent");
    bench.good("rebase qcow2:child --no-parent");
    for name in ["theirs", "child"] {
        assert_eq!(sector(&bench, &format!("qcow2:{name}")), 4096, "{name}");
        bench.qemu(&format!("qemu-img compare -f raw -F qcow2 raw {name}"));
    }
    assert_eq!(sector(&bench, "aio:raw"), 512);
    bench.good("convert aio:raw qcow2:plain");
    assert_eq!(sector(&bench, "qcow2:plain"), 512);
}

#[test]
fn a_format_without_a_place_for_them_is_refused_unless_that_is_meant() {
    if !has_qemu("a_format_without_a_place_for_them_is_refused_unless_that_is_meant") {
        return;
    }
    let bench = Bench::new();
    vhdx(&bench);
    for kind in ["aio", "vhd", "vmdk", "qcow"] {
        let said = bench.bad(2, &format!("convert vhdx:a.vhdx {kind}:copy"));
        for part in ["--sector-size 512", "sector-size=4096,", "qcow2"] {
            assert!(said.contains(part), "{kind}: {said}");
        }
        assert_eq!(bench.files(), ["a.vhdx", "raw"], "{kind}");
        bench.good(&format!(
            "convert vhdx:a.vhdx {kind}:copy --sector-size 512"
        ));
        assert_eq!(sector(&bench, &format!("{kind}:copy")), 512);
        bench.good(&format!("compare --strict aio:raw {kind}:copy"));
        std::fs::remove_file(bench.path("copy")).unwrap();
        let said = bench.bad(2, &format!("create {kind}:copy 8M --sector-size 4096"));
        assert!(said.contains("--sector-size 512"), "{kind}: {said}");
    }
    let said = bench.bad(2, "convert vhdx:a.vhdx vmdk:copy --compress");
    assert!(said.contains("--sector-size 512"), "{said}");
    // A raw file does not say which it has: its user does.
    bench.good("convert aio:raw qcow2:large --sector-size 4096");
    bench.good("convert vhdx:a.vhdx qcow2:small --sector-size 512");
    bench.good("create qcow2:over --parent qcow2:large --sector-size 512");
    let all = [("large", 4096), ("small", 512), ("over", 512)];
    for (name, size) in all {
        assert_eq!(sector(&bench, &format!("qcow2:{name}")), size, "{name}");
    }
    let same = bench.json("info --chain qcow2:over");
    assert_eq!(
        json!([same[0]["sector_size"], same[1]["sector_size"]]),
        json!([512, 4096])
    );
    let said = bench.bad(6, "commit qcow2:over");
    assert!(said.contains("logical sectors of 512"), "{said}");
    // Part of a sector is none.
    for line in [
        "create qcow2:odd 1049088 --sector-size 4096",
        "create qcow2:odd 1049088 --parent qcow2:large",
    ] {
        let said = bench.bad(2, line);
        assert!(said.contains("no whole number"), "{said}");
    }
    let said = bench.bad(6, "resize qcow2:large +512");
    assert!(said.contains("no whole number"), "{said}");
    bench.good("resize qcow2:large +4K");
    assert_eq!(sector(&bench, "qcow2:large"), 4096);
}

/// A number of another program in the extension is no size of a sector.
#[test]
fn an_impossible_size_is_refused() {
    let bench = Bench::new();
    bench.good("create qcow2:a 1M --sector-size 4096");
    let bytes = bench.bytes("a");
    let at = bytes.windows(4).position(|part| part == b"xbls").unwrap();
    for size in [0_u32, 511, 1000, 8192, u32::MAX] {
        bench.poke("a", at as u64 + 8, &size.to_be_bytes());
        let said = bench.bad(6, "convert qcow2:a aio:b");
        assert!(said.contains("logical sector"), "{size}: {said}");
    }
}
