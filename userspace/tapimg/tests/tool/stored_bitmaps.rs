// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dirty bitmaps that QEMU keeps in qcow2 images, shown to NBD clients as `qemu-nbd -B` shows them.

use crate::bench::{has_qemu, places, Bench};
use crate::serve::ServedDisk;
use rustix::process::{kill_process, Signal};
use serde_json::Value;
use std::collections::BTreeSet;
use std::process::Command;

const SIZE: u64 = 64 << 20;
const GRANULE: u64 = 64 << 10;
/// Where a record of the directory has these: 8 bytes, 4, and one.
const AT_TABLE: u64 = 0;
const AT_ENTRIES: u64 = 8;
const AT_SHIFT: u64 = 17;

/// Returns the options of an NBD client that reads a bitmap at a socket.
fn opts(bench: &Bench, socket: &str, bitmap: &str) -> String {
    format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}",
        bench.path(socket).display()
    )
}

/// Returns the extents of a bitmap, whose server is at a socket: offset, length, and whether it is dirty.
fn map(bench: &Bench, socket: &str, bitmap: &str) -> Vec<(u64, u64, bool)> {
    let opts = opts(bench, socket, bitmap);
    let text = bench.qemu(&format!("qemu-img map --output=json --image-opts {opts}"));
    let all: Value = serde_json::from_str(&text).unwrap();
    let each = all.as_array().unwrap().iter();
    each.map(|one| {
        let number = |key: &str| one[key].as_u64().unwrap();
        // QEMU shows a dirty range as a hole.
        let is_dirty = !one["data"].as_bool().unwrap();
        (number("start"), number("length"), is_dirty)
    })
    .collect()
}

/// Returns the extents of a bitmap as QEMU shows those of an image.
fn map_of_qemu(bench: &Bench, name: &str, bitmap: &str) -> Vec<(u64, u64, bool)> {
    bench.shell(&format!(
        "qemu-nbd -r -f qcow2 -B {bitmap} -k {} --fork --pid-file=pid {name}",
        bench.path("q").display()
    ));
    let found = map(bench, "q", bitmap);
    bench.shell("kill $(cat pid); while test -e q; do sleep 0.01; done; rm -f pid");
    found
}

/// Returns the granules of a map that are dirty.
fn granules(map: &[(u64, u64, bool)]) -> BTreeSet<u64> {
    dirty_units(map, GRANULE)
}

/// Returns the parts of `unit` bytes of which something is dirty.
fn dirty_units(map: &[(u64, u64, bool)], unit: u64) -> BTreeSet<u64> {
    let dirty = map.iter().filter(|(_, _, is_dirty)| *is_dirty);
    dirty
        .flat_map(|(at, len, _)| at / unit..(at + len).div_ceil(unit))
        .collect()
}

/// Returns the names of the contexts of a bitmap that `nbdinfo` lists.
fn listed(bench: &Bench, served: &ServedDisk) -> Vec<String> {
    let output = bench
        .command("nbdinfo", "--json")
        .arg(served.uri())
        .output();
    let output = output.unwrap();
    assert!(output.status.success(), "{output:?}");
    let info: Value = serde_json::from_slice(&output.stdout).unwrap();
    let all = info["exports"][0]["contexts"].as_array().cloned();
    let names = all.unwrap_or_default().into_iter();
    let names = names.map(|name| name.as_str().unwrap().to_string());
    names.filter(|name| name.starts_with("qemu:")).collect()
}

/// Returns the extents of a bitmap that `nbdinfo` reads.
fn map_of_nbdinfo(bench: &Bench, served: &ServedDisk, bitmap: &str) -> Vec<(u64, u64, bool)> {
    let map = format!("--json --map=qemu:dirty-bitmap:{bitmap}");
    let output = bench.command("nbdinfo", &map).arg(served.uri()).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{output:?}");
    let all: Value = serde_json::from_slice(&output.stdout).unwrap();
    let each = all.as_array().unwrap().iter();
    each.map(|one| {
        let number = |key: &str| one[key].as_u64().unwrap();
        (number("offset"), number("length"), number("type") == 1)
    })
    .collect()
}

fn has_nbdinfo() -> bool {
    Command::new("nbdinfo").arg("--version").output().is_ok()
}

/// Returns the place of the directory of bitmaps in an image.
fn directory(bench: &Bench, name: &str) -> u64 {
    let head = bench.bytes(name);
    let extension = 0x2385_2875_u32.to_be_bytes();
    let at = head.windows(4).position(|bytes| bytes == extension);
    bench.peek(name, at.unwrap() as u64 + 24)
}

/// An image with a bitmap that records, one of the smallest granules that does not, and one that is empty.
fn image(bench: &Bench, options: &str, seed: u64) {
    bench.qemu(&format!("qemu-img create -q -f qcow2 {options} a {SIZE}"));
    bench.qemu("qemu-img bitmap --add -g 512 -f qcow2 a fine");
    for (at, len) in places(seed, SIZE, 40) {
        bench.qemu_write("a", &format!("write -q -P 9 {at} {len}"));
    }
    bench.qemu("qemu-img bitmap --disable -f qcow2 a fine");
    bench.qemu(&format!("qemu-img bitmap --add -g {GRANULE} -f qcow2 a on"));
    bench.qemu_write("a", "write -q -P 5 5M 100k");
    bench.qemu("qemu-img bitmap --add -g 2G -f qcow2 a coarse");
}

#[test]
fn a_client_sees_the_bitmaps_that_qemu_shows() {
    if !has_qemu("a_client_sees_the_bitmaps_that_qemu_shows") {
        return;
    }
    for (options, seed) in [
        ("", 1),
        ("-o cluster_size=512", 2),
        ("-o cluster_size=2M", 3),
        ("-o data_file=data", 4),
    ] {
        let bench = Bench::new();
        image(&bench, options, seed);
        let names = ["fine", "on", "coarse"];
        let expected = names.map(|name| map_of_qemu(&bench, "a", name));
        assert!(expected[0].len() > 40, "{:?}", expected[0]);
        let served = ServedDisk::new(&bench, "qcow2:a s");
        for (name, expected) in names.iter().zip(&expected) {
            assert_eq!(&map(&bench, "s", name), expected, "{options} {name}");
            if has_nbdinfo() {
                let found = map_of_nbdinfo(&bench, &served, name);
                assert_eq!(&found, expected, "{options} {name}");
            }
        }
        if has_nbdinfo() {
            let all = names.map(|name| format!("qemu:dirty-bitmap:{name}"));
            assert_eq!(listed(&bench, &served), all);
        }
        assert_eq!(served.end(Signal::TERM), Some(0));
    }
}

/// A bit may stand for a part of a sector of the disk, and a sector of which a part is dirty is dirty.
#[test]
fn a_client_of_large_sectors_sees_whole_ones() {
    if !has_qemu("a_client_of_large_sectors_sees_whole_ones") {
        return;
    }
    let bench = Bench::new();
    image(&bench, "", 11);
    let expected = dirty_units(&map_of_qemu(&bench, "a", "fine"), 4096);
    let target = format!("sector-size=4096,qcow2:{}", bench.path("a").display());
    let served = ServedDisk::new(&bench, &format!("{target} s"));
    assert_eq!(served.ready["block"], 4096);
    let found = map(&bench, "s", "fine");
    let is_whole = |(at, len, _): &(u64, u64, bool)| at % 4096 == 0 && len % 4096 == 0;
    assert!(found.iter().all(is_whole), "{found:?}");
    assert_eq!(dirty_units(&found, 4096), expected);
    assert_eq!(served.end(Signal::TERM), Some(0));
}

#[test]
fn a_client_sees_each_write_that_was_answered() {
    if !has_qemu("a_client_sees_each_write_that_was_answered") {
        return;
    }
    for (options, seed) in [("", 5), ("-o cluster_size=4096", 6)] {
        let bench = Bench::new();
        image(&bench, options, seed);
        let fine = map_of_qemu(&bench, "a", "fine");
        let mut expected = granules(&map_of_qemu(&bench, "a", "on"));
        let served = ServedDisk::new(&bench, "--write qcow2:a s");
        let plain = format!(
            "driver=nbd,server.type=unix,server.path={}",
            bench.path("s").display()
        );
        for (number, (at, len)) in places(seed + 10, SIZE, 20).into_iter().enumerate() {
            let what = if number % 3 == 0 { "-z" } else { "-P 7" };
            bench.qemu_io_plain(&plain, &format!("write -q {what} {at} {len}"));
            expected.extend(at / GRANULE..(at + len).div_ceil(GRANULE));
            assert_eq!(granules(&map(&bench, "s", "on")), expected, "{at} {len}");
        }
        assert_eq!(map(&bench, "s", "fine"), fine, "it does not record");
        assert_eq!(served.end(Signal::TERM), Some(0));
        // QEMU finds in the image what the clients saw.
        assert_eq!(granules(&map_of_qemu(&bench, "a", "on")), expected);
        bench.qemu("qemu-img check -f qcow2 a");
    }
}

/// A process that dies leaves a bitmap that no client gets: it would miss writes.
#[test]
fn a_bitmap_that_is_void_is_not_shown() {
    if !has_qemu("a_bitmap_that_is_void_is_not_shown") {
        return;
    }
    let bench = Bench::new();
    image(&bench, "", 7);
    let served = ServedDisk::new(&bench, "--write qcow2:a s");
    let plain = format!(
        "driver=nbd,server.type=unix,server.path={}",
        bench.path("s").display()
    );
    bench.qemu_io_plain(&plain, "write -q -P 7 1M 64k");
    kill_process(served.pid, Signal::KILL).unwrap();
    served.end(Signal::TERM);
    let served = ServedDisk::new(&bench, "qcow2:a s");
    let shown = |name: &str| {
        let opts = opts(&bench, "s", name);
        bench.try_qemu(&format!("qemu-img map --image-opts {opts}"))
    };
    assert!(shown("fine") && !shown("on") && !shown("none"));
    if has_nbdinfo() {
        assert_eq!(listed(&bench, &served), ["qemu:dirty-bitmap:fine"]);
    }
    assert_eq!(served.end(Signal::TERM), Some(0));
}

/// The bitmaps belong to the disk in the image, not to the one of a guest that writes into memory over it.
#[test]
fn only_the_disk_itself_has_bitmaps() {
    if !has_qemu("only_the_disk_itself_has_bitmaps") || !has_nbdinfo() {
        return;
    }
    let bench = Bench::new();
    image(&bench, "", 8);
    let cow = format!("cow:qcow2:{}", bench.path("a").display());
    for (target, count) in [("qcow2:a", 3), (&cow, 0)] {
        let served = ServedDisk::new(&bench, &format!("{target} s"));
        assert_eq!(listed(&bench, &served).len(), count, "{target}");
        assert_eq!(served.end(Signal::TERM), Some(0));
    }
}

/// Damage of a bitmap is an error for a client that reads it, never an empty bitmap, and for no other client.
#[test]
fn damage_of_a_bitmap_is_an_error_for_its_client_alone() {
    if !has_qemu("damage_of_a_bitmap_is_an_error_for_its_client_alone") {
        return;
    }
    let bench = Bench::new();
    image(&bench, "", 9);
    bench.qemu("qemu-img convert -f qcow2 -O raw a content");
    bench.shell("cp a whole");
    let record = directory(&bench, "a");
    // The bitmap `fine` is the first one.
    let table = bench.peek("a", record + AT_TABLE);
    let (bits, l1) = (bench.peek("a", table), bench.peek("a", 40));
    let end = bench.bytes("a").len() as u64;
    let behind = (end / GRANULE + 8) * GRANULE;
    let long = |number: u64| number.to_be_bytes().to_vec();
    assert!(!map_of_qemu(&bench, "a", "fine").is_empty());
    // With a record that cannot be, no bitmap of the directory is known; with other damage, one bitmap is not.
    for (what, is_known, at, bytes) in [
        ("nothing", true, record + AT_TABLE, long(table)),
        ("a table in the L1 table", true, record + AT_TABLE, long(l1)),
        (
            "a table behind the end",
            true,
            record + AT_TABLE,
            long(behind),
        ),
        (
            "a table that is too short",
            true,
            record + AT_ENTRIES,
            vec![0; 4],
        ),
        ("bits in the L1 table", true, table, long(l1)),
        ("bits behind the end", true, table, long(behind)),
        ("bits in no cluster", true, table, long(bits + 512)),
        (
            "bits with a reserved flag",
            true,
            table,
            long(bits | 1 << 60),
        ),
        ("bits that are also all set", true, table, long(bits | 1)),
        (
            "a table in no cluster",
            false,
            record + AT_TABLE,
            long(table + 8),
        ),
        (
            "a table without end",
            false,
            record + AT_ENTRIES,
            vec![0xff; 4],
        ),
        ("granules of 2^63", false, record + AT_SHIFT, vec![63]),
    ] {
        bench.shell("cp whole a");
        bench.poke("a", at, &bytes);
        let served = ServedDisk::new(&bench, "qcow2:a s");
        let can_map = |name: &str| {
            let opts = opts(&bench, "s", name);
            bench.try_qemu(&format!("qemu-img map --output=json --image-opts {opts}"))
        };
        assert_eq!(can_map("fine"), what == "nothing", "{what}");
        assert_eq!(can_map("on"), is_known, "{what}");
        if has_nbdinfo() {
            let count = if is_known { 3 } else { 0 };
            assert_eq!(listed(&bench, &served).len(), count, "{what}");
        }
        let plain = format!(
            "driver=nbd,server.type=unix,server.path={}",
            bench.path("s").display()
        );
        let raw = "driver=raw,file.filename=content";
        bench.qemu(&format!("qemu-img compare --image-opts {plain} {raw}"));
        assert_eq!(served.end(Signal::TERM), Some(0), "{what}");
    }
}
