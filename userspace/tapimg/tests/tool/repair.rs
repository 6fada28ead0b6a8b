// SPDX-License-Identifier: MIT OR Apache-2.0
//! Findings of a check of a qcow2 image, and the content that a repair keeps.

use crate::bench::{has_qemu, places, Bench};
use std::time::{Duration, Instant};

const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const CLUSTER: u64 = 65536;
const SIZE: u64 = 8 << 20;

/// Where the tables of the image `a` are.
struct TableOffsets {
    l1: u64,
    l2: u64,
    reftable: u64,
    block: u64,
    /// A cluster with content.
    data: u64,
}

/// A bench with the disk `raw` and the image `a` of it.
fn bench() -> (Bench, TableOffsets) {
    let bench = Bench::new();
    bench.sparse("raw", SIZE, &places(7, SIZE, 20), 7);
    bench.good("convert aio:raw qcow2:a");
    let tables = tables(&bench);
    (bench, tables)
}

fn tables(bench: &Bench) -> TableOffsets {
    let (l1, reftable) = (bench.peek("a", 40), bench.peek("a", 48));
    let l2 = bench.peek("a", l1) & OFFSET;
    let entries = (0..SIZE / CLUSTER).map(|number| bench.peek("a", l2 + number * 8) & OFFSET);
    TableOffsets {
        l1,
        l2,
        reftable,
        block: bench.peek("a", reftable),
        data: entries.max().unwrap(),
    }
}

fn poke(bench: &Bench, at: u64, word: u64) {
    bench.poke("a", at, &word.to_be_bytes());
}

/// The first entry of the L2 table that leads somewhere, after `skip` others.
fn entry(bench: &Bench, tables: &TableOffsets, skip: usize) -> u64 {
    (0..SIZE / CLUSTER)
        .map(|number| tables.l2 + number * 8)
        .filter(|at| bench.peek("a", *at) & OFFSET != 0)
        .nth(skip)
        .unwrap()
}

/// Nothing is wrong for QEMU either, and the disk is what it was.
fn is_whole(bench: &Bench) {
    bench.qemu("qemu-img check -q -f qcow2 a");
    bench.qemu("qemu-img compare -q -f raw -F qcow2 raw a");
    bench.good("compare --strict aio:raw qcow2:a");
}

#[test]
fn refcounts_that_lie_where_something_else_is_are_made_in_another_place() {
    if !has_qemu("refcounts_that_lie_where_something_else_is_are_made_in_another_place") {
        return;
    }
    let (bench, tables) = bench();
    let sound = bench.bytes("a");
    let far = 1 << 40;
    for (what, at, word) in [
        ("a block in content", tables.reftable, tables.data),
        ("a block in the L1 table", tables.reftable, tables.l1),
        ("a block in an L2 table", tables.reftable, tables.l2),
        ("a block in the header", tables.reftable, 512),
        ("a block behind the end", tables.reftable, far),
        (
            "a block in the refcount table",
            tables.reftable,
            tables.reftable,
        ),
        (
            "a block that is used twice",
            tables.reftable + 8,
            tables.block,
        ),
        ("no block", tables.reftable, 0),
        ("a table in content", 48, tables.data),
        ("a table in the L1 table", 48, tables.l1),
    ] {
        std::fs::write(bench.path("a"), &sound).unwrap();
        poke(&bench, at, word);
        bench.qemu("qemu-img compare -q -f raw -F qcow2 raw a");
        let found = bench.json("check qcow2:a");
        assert_eq!(found["sound"], false, "{what}: {found}");
        // The image says that it was not closed: what opens it to write repairs it unasked.
        let damaged = bench.bytes("a");
        poke(&bench, 72, bench.peek("a", 72) | 1);
        bench.good("resize qcow2:a 9M");
        bench.qemu("qemu-img check -q -f qcow2 a");
        bench.good("compare aio:raw qcow2:a");
        std::fs::write(bench.path("a"), damaged).unwrap();
        let said = bench.good("check --repair qcow2:a");
        assert!(said.contains("nothing is wrong"), "{what}: {said}");
        is_whole(&bench);
    }
}

#[test]
fn a_repair_that_might_lose_something_changes_nothing() {
    if !has_qemu("a_repair_that_might_lose_something_changes_nothing") {
        return;
    }
    let (bench, tables) = bench();
    let sound = bench.bytes("a");
    let first = entry(&bench, &tables, 0);
    let its = bench.peek("a", first);
    for (what, at, word, field) in [
        (
            "content in the L1 table",
            first,
            tables.l1 | COPIED,
            "overlapping_tables",
        ),
        (
            "content in an L2 table",
            first,
            tables.l2 | COPIED,
            "overlapping_tables",
        ),
        (
            "an L2 table in the L1 table",
            tables.l1,
            tables.l1 | COPIED,
            "overlapping_tables",
        ),
        (
            "an entry amid a cluster",
            first,
            its + 512,
            "damaged_entries",
        ),
        (
            "an entry that leads behind the end",
            first,
            1 << 40 | COPIED,
            "damaged_entries",
        ),
        (
            "bits without a meaning",
            first,
            its | 1 << 57,
            "reserved_bits",
        ),
        (
            "such of the L1 table",
            tables.l1,
            bench.peek("a", tables.l1) | 2,
            "reserved_bits",
        ),
    ] {
        std::fs::write(bench.path("a"), &sound).unwrap();
        poke(&bench, at, word);
        // A refcount is wrong, too, and the image was not closed.
        bench.poke("a", tables.block + 10, &[0, 7]);
        poke(&bench, 72, bench.peek("a", 72) | 1);
        let before = bench.bytes("a");
        let found = bench.json("check qcow2:a");
        assert_ne!(found[field], 0, "{what}: {found}");
        let said = bench.bad(1, "check --repair qcow2:a");
        assert!(said.contains("nothing was changed"), "{what}: {said}");
        assert!(bench.bytes("a") == before, "{what}");
        let said = bench.bad(6, "resize qcow2:a 9M");
        assert!(said.contains("nothing was changed"), "{what}: {said}");
        assert!(bench.bytes("a") == before, "{what}");
    }
}

#[test]
fn entries_that_deny_other_users_are_found_and_mended() {
    if !has_qemu("entries_that_deny_other_users_are_found_and_mended") {
        return;
    }
    let (bench, tables) = bench();
    // Two entries have one cluster.
    let (first, second) = (entry(&bench, &tables, 0), entry(&bench, &tables, 1));
    poke(&bench, second, bench.peek("a", first));
    bench.qemu("qemu-img convert -f qcow2 -O raw a raw");
    let said = bench.bad(1, "check qcow2:a");
    assert!(
        said.contains("2 entries deny that their cluster has other users"),
        "{said}"
    );
    bench.good("check --repair qcow2:a");
    is_whole(&bench);
    let before = bench.bytes("raw");
    let at = (second - tables.l2) / 8 * CLUSTER;
    bench.qemu("qemu-img create -q -f qcow2 -F qcow2 -b a child");
    bench.qemu_write("child", &format!("write -q -P 3 {at} 64k"));
    bench.good("commit qcow2:child");
    let mut wanted = before;
    wanted[at as usize..][..CLUSTER as usize].fill(3);
    std::fs::write(bench.path("raw"), wanted).unwrap();
    bench.good("compare --strict aio:raw qcow2:a");
    // The other entry is alone now, and does not say so.
    let found = bench.json("check qcow2:a");
    assert_eq!(
        (&found["sound"], &found["unmarked_entries"]),
        (&true.into(), &1.into()),
        "{found}"
    );
    bench.good("check --repair qcow2:a");
    is_whole(&bench);
    // An L1 entry of a snapshot's table.
    bench.qemu("qemu-img snapshot -c one a");
    poke(&bench, tables.l1, bench.peek("a", tables.l1) | COPIED);
    let found = bench.json("check qcow2:a");
    assert_eq!(found["shared_entries"], 1, "{found}");
    bench.good("check --repair qcow2:a");
    is_whole(&bench);
}

/// The refcounts know of a snapshot, and the entries of the disk deny it.
#[test]
fn a_write_does_not_trust_what_the_refcounts_deny() {
    if !has_qemu("a_write_does_not_trust_what_the_refcounts_deny") {
        return;
    }
    for flags_of_l1 in [true, false] {
        let (bench, old) = bench();
        bench.qemu("qemu-img snapshot -c one a");
        let tables = match flags_of_l1 {
            true => old,
            false => {
                // The disk gets an L2 table of its own.
                bench.qemu_write("a", "write -q -P 5 4M 64k");
                tables(&bench)
            }
        };
        poke(&bench, bench.peek("a", 40), tables.l2 | COPIED);
        for number in 0..SIZE / CLUSTER {
            let at = tables.l2 + number * 8;
            let word = bench.peek("a", at);
            if word & OFFSET != 0 {
                poke(&bench, at, word | COPIED);
            }
        }
        bench.qemu("qemu-img create -q -f qcow2 -F qcow2 -b a child");
        bench.qemu_write("child", "write -q -P 3 0 4000k");
        bench.good("commit qcow2:child");
        bench.good("convert --snapshot one qcow2:a aio:one");
        assert!(
            bench.bytes("one") == bench.bytes("raw"),
            "the snapshot was changed"
        );
        bench.good("convert qcow2:a aio:now");
        assert!(bench.bytes("now")[..4000 << 10]
            .iter()
            .all(|byte| *byte == 3));
        let found = bench.json("check qcow2:a");
        assert_eq!(found["unsafe_clusters"], 0, "{found}");
    }
}

/// Where version 3 says that an image was not closed, version 2 has the first extension of the header.
#[test]
fn a_repair_keeps_the_header_of_version_2() {
    if !has_qemu("a_repair_keeps_the_header_of_version_2") {
        return;
    }
    let bench = Bench::new();
    bench.good("create qcow2:base 1M");
    bench.qemu("qemu-img create -q -f qcow2 -o compat=0.10 -F qcow2 -b base a");
    let before = bench.bytes("a");
    bench.good("check --repair qcow2:a");
    assert!(bench.bytes("a") == before);
}

/// Tables that many snapshots share are read once, however many there are.
#[test]
fn an_image_with_many_snapshots_is_sound() {
    if !has_qemu("an_image_with_many_snapshots_is_sound") {
        return;
    }
    let bench = Bench::new();
    bench.good("create qcow2:a 256G");
    let writes = (0..512_u64).map(|number| format!("write -q {} 512\n", number << 29));
    std::fs::write(bench.path("writes"), writes.collect::<String>()).unwrap();
    bench.shell("qemu-io -f qcow2 a < writes > said");
    bench.shell("for name in $(seq 80); do qemu-img snapshot -c $name a || exit 1; done");
    let found = bench.json("check qcow2:a");
    assert_eq!(
        (&found["sound"], &found["leaks"]),
        (&true.into(), &0.into()),
        "{found}"
    );
    assert_eq!(found["unmarked_entries"], 0, "{found}");
    let before = bench.bytes("a");
    bench.good("check --repair qcow2:a");
    assert!(bench.bytes("a") == before);
}

/// A check does not look at unused parts piece by piece.
#[test]
fn a_check_takes_no_time_for_holes() {
    let bench = Bench::new();
    bench.sparse("raw", 7 << 40, &[(3 << 40, 4096)], 1);
    bench.good("create qcow2:a 64T");
    let begin = Instant::now();
    bench.good("check aio:raw");
    bench.good("check --data qcow2:a");
    // Piece by piece it is a hundred million questions.
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(60), "{took:?}");
}

/// Unreadable parts of a damaged image are zeroes in a copy, and all else is there.
#[test]
fn a_copy_of_a_damaged_image_has_all_that_is_left() {
    let (bench, tables) = bench();
    let mut wanted = bench.bytes("raw");
    let mut lost = 0;
    for (skip, change) in [(0, 512_u64), (3, 1 << 40), (4, 1 << 41)] {
        let at = entry(&bench, &tables, skip);
        poke(&bench, at, bench.peek("a", at) + change);
        let at = (at - tables.l2) / 8 * CLUSTER;
        wanted[at as usize..][..CLUSTER as usize].fill(0);
        lost += CLUSTER;
    }
    bench.bad(6, "convert qcow2:a aio:b");
    let said = bench.run("convert --damaged qcow2:a aio:b");
    assert_eq!(said.status, Some(0), "{said:?}");
    assert!(bench.bytes("b") == wanted);
    assert!(
        said.err.contains(&format!("{lost} bytes of qcow2:")),
        "{said:?}"
    );
    let at = (entry(&bench, &tables, 0) - tables.l2) / 8 * CLUSTER;
    assert!(said.err.contains(&format!("{at}+{CLUSTER}")), "{said:?}");
    // An L1 entry: none of its table is there.
    poke(&bench, tables.l1, tables.l2 + 512);
    let said = bench.run("convert --damaged --force qcow2:a aio:b");
    assert_eq!(said.status, Some(0), "{said:?}");
    assert!(
        said.err.contains(&format!("{SIZE} bytes of qcow2:")),
        "{said:?}"
    );
    assert!(bench.bytes("b").iter().all(|byte| *byte == 0));
}
