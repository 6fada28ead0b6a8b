// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images that are in use by another program, or that are wrong.

use crate::bench::{has_qemu, noise, places, Bench};
use diskio::{LockKind, Runtime};
use std::fs::File;

/// Locks an image as a tapdisk does.
pub(crate) fn lock(bench: &Bench, name: &str, kind: LockKind) -> diskio::File {
    let file = File::options()
        .read(true)
        .write(kind == LockKind::Write)
        .open(bench.path(name))
        .unwrap();
    let file = diskio::File::new(&Runtime::new().io, file.into()).unwrap();
    file.lock(kind).unwrap();
    file
}

#[test]
fn what_a_guest_writes_is_left_alone() {
    let bench = Bench::new();
    bench.sparse("a", 1 << 20, &[(0, 4096)], 1);
    bench.good("convert aio:a qcow2:b");
    let files = bench.files();
    let before = bench.bytes("b");
    let held = lock(&bench, "b", LockKind::Write);
    // Each waits a little, so all do it at once.
    let lines = [
        "info qcow2:b",
        "convert qcow2:b aio:c",
        "create qcow2:b 1M --force",
        "check --repair qcow2:b",
        "create qcow2:c --parent qcow2:b",
    ];
    let runs = lines.map(|line| (line, bench.start(line)));
    for (line, child) in runs {
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{line}: {said}");
        assert!(
            said.contains("/b is in use") && said.contains("`tap-ctl list --file "),
            "{said}"
        );
    }
    assert_eq!(bench.files(), files);
    assert!(bench
        .good("info --unlocked qcow2:b")
        .contains("size of the disk: 1 MiB"));
    drop(held);
    assert!(bench.bytes("b") == before);
    bench.good("info qcow2:b");
}

#[test]
fn what_others_read_can_be_read_and_not_replaced() {
    let bench = Bench::new();
    bench.sparse("a", 1 << 20, &[(0, 4096)], 1);
    let held = lock(&bench, "a", LockKind::Read);
    bench.good("convert aio:a qcow2:b");
    bench.bad(3, "convert qcow2:b aio:a --force");
    drop(held);
    bench.good("convert qcow2:b aio:a --force");
}

#[test]
fn what_is_not_there_is_named() {
    let bench = Bench::new();
    for line in [
        "info qcow2:none",
        "check vhd:none",
        "convert qcow:none aio:a",
        "map vmdk:none",
        "compare aio:none aio:none",
    ] {
        let said = bench.bad(4, line);
        assert!(said.contains("/none"), "{said}");
    }
    let said = bench.bad(6, "convert aio:/dev/null qcow2:a");
    assert!(said.contains("neither a file nor a block device"), "{said}");
    assert_eq!(bench.files(), [] as [&str; 0]);
    let json = bench.json("info qcow2:none");
    assert_eq!(json["error"]["code"], "not-found", "{json}");
}

/// A file below /dev would be in memory, and fill it.
#[test]
fn no_file_is_made_in_place_of_a_device() {
    let bench = Bench::new();
    bench.sparse("a", 1 << 20, &[(0, 1 << 20)], 1);
    for line in [
        "convert aio:a aio:/dev/xentap-none",
        "create aio:/dev/xentap-none 1M",
    ] {
        let said = bench.bad(4, line);
        assert!(said.contains("no device /dev/xentap-none"), "{said}");
    }
    assert!(!std::path::Path::new("/dev/xentap-none.unfinished").exists());
}

#[test]
fn a_size_may_be_an_amount() {
    let bench = Bench::new();
    bench.good("create aio:a 1.5MiB");
    let done = bench.json("resize aio:a +1M");
    assert_eq!(
        (&done["old_size"], &done["size"]),
        (&(3 << 19).into(), &(5 << 19).into())
    );
    let said = bench.bad(2, "create aio:b 64MB");
    assert!(said.contains("such as 10G"), "{said}");
}

#[test]
fn an_image_of_another_kind_is_refused() {
    let bench = Bench::new();
    bench.sparse("a", 1 << 20, &[(0, 1 << 20)], 1);
    for kind in ["qcow2", "qcow", "vhd", "vhdx", "vmdk"] {
        let said = bench.bad(1, &format!("info {kind}:a"));
        assert!(said.contains("cannot be served"), "{said}");
        let said = bench.bad(6, &format!("convert {kind}:a aio:b"));
        assert!(said.contains("/a: "), "{said}");
        assert!(!said.contains("/a: /"), "named once: {said}");
        bench.bad(1, &format!("check {kind}:a"));
    }
    // The content of a raw image never counts.
    bench.good("create qcow2:guest 1M");
    bench.good("convert aio:guest aio:copy");
    assert!(bench.bytes("copy") == bench.bytes("guest"));
}

#[test]
fn what_keeps_an_image_from_being_served_is_said() {
    if !has_qemu("what_keeps_an_image_from_being_served_is_said") {
        return;
    }
    let bench = Bench::new();
    bench.good("create qcow2:a 1M");
    let features = bench.peek("a", 72);
    bench.poke("a", 72, &(features | 1).to_be_bytes());
    assert!(bench
        .good("info qcow2:a")
        .contains("note: it was not closed"));
    bench.good("check --repair qcow2:a");
    assert_eq!(bench.peek("a", 72), features);
    bench.poke("a", 72, &(features | 2).to_be_bytes());
    let said = bench.bad(1, "info qcow2:a");
    assert!(
        said.contains("corrupt") && said.contains("qemu-img check -r all"),
        "{said}"
    );
    bench.bad(1, "check --repair qcow2:a");
    bench.qemu("qemu-img create -q -f qcow2 -o encrypt.format=aes,encrypt.key-secret=s --object secret,id=s,data=x b 1M");
    let said = bench.bad(1, "info qcow2:b");
    assert!(said.contains("encrypted with AES"), "{said}");
    bench.qemu("qemu-img create -q -f qcow2 base 1M");
    bench.qemu("qemu-img create -q -f qcow2 -F qcow2 -b base c");
    std::fs::remove_file(bench.path("base")).unwrap();
    let said = bench.bad(1, "info --chain qcow2:c");
    assert!(said.contains("/base"), "{said}");
}

#[test]
fn lost_clusters_are_found_and_taken_back() {
    if !has_qemu("lost_clusters_are_found_and_taken_back") {
        return;
    }
    let bench = Bench::new();
    bench.sparse("raw", 8 << 20, &places(2, 8 << 20, 20), 2);
    bench.good("convert aio:raw qcow2:a");
    let found = bench.json("check qcow2:a");
    assert_eq!(
        (&found["sound"], &found["leaks"]),
        (&true.into(), &0.into()),
        "{found}"
    );
    // The first refcount block is where the refcount table leads.
    let block = bench.peek("a", bench.peek("a", 48));
    let count = bench.peek("a", block + 8) & 0x0000_ffff_ffff_ffff;
    bench.poke("a", block + 8, &(count | 2 << 48).to_be_bytes());
    let found = bench.json("check qcow2:a");
    assert_eq!(
        (&found["sound"], &found["leaks"]),
        (&true.into(), &1.into()),
        "{found}"
    );
    let said = bench.good("check qcow2:a");
    assert!(said.contains("1 clusters are lost"), "{said}");
    // One that is in use and not counted is damage.
    bench.poke("a", block + 8, &count.to_be_bytes());
    let said = bench.bad(1, "check qcow2:a");
    assert!(
        said.contains("1 clusters are in use and may be allocated once more"),
        "{said}"
    );
    let said = bench.good("check --repair qcow2:a");
    assert!(
        said.contains("repaired") && said.contains("nothing is wrong"),
        "{said}"
    );
    bench.qemu("qemu-img check -f qcow2 a");
    bench.good("compare aio:raw qcow2:a");
    bench.bad(2, "check --repair aio:raw");
}

/// Cut off anywhere, or with any bytes changed in its tables, an image is an error and nothing else.
#[test]
fn damaged_images_are_errors() {
    let bench = Bench::new();
    bench.sparse("raw", 4 << 20, &places(3, 4 << 20, 30), 3);
    for kind in ["qcow2", "qcow", "vhd", "vmdk"] {
        bench.good(&format!("convert aio:raw {kind}:whole --force"));
        let whole = bench.bytes("whole");
        for part in [0, 100, 511, 600, 4096, whole.len() / 3] {
            std::fs::write(bench.path("a"), &whole[..part]).unwrap();
            let checked = bench.run(&format!("check --data {kind}:a"));
            assert_eq!(checked.status, Some(1), "{kind} {part}: {checked:?}");
            let said = bench.run(&format!("convert {kind}:a aio:b"));
            assert_eq!(said.status, Some(6), "{kind} {part}: {said:?}");
            assert!(said.err.contains("/a"), "{kind} {part}: {said:?}");
            assert!(!bench.path("b").exists(), "{kind} {part}");
        }
        for seed in 1..12_u64 {
            let mut bytes = whole.clone();
            let bad = noise(seed, 64);
            for (number, bad) in bad.iter().enumerate() {
                let most = (bytes.len() as u64).min(if seed % 2 == 0 { 1024 } else { 300_000 });
                let at = (seed * 7919 + number as u64 * 104_729) % most;
                bytes[at as usize] ^= bad;
            }
            std::fs::write(bench.path("a"), &bytes).unwrap();
            for line in ["info", "check --data", "map"] {
                let said = bench.run(&format!("{line} {kind}:a"));
                let status = said.status.unwrap();
                assert!(
                    matches!(status, 0 | 1 | 4 | 6),
                    "{kind} {seed} {line}: {said:?}"
                );
            }
        }
    }
}

/// A refusal for a read-only kind names an alternative, and the image stays as it was.
#[test]
fn a_vhdx_is_only_read() {
    if !has_qemu("a_vhdx_is_only_read") {
        return;
    }
    let bench = Bench::new();
    bench.sparse("raw", 4 << 20, &places(3, 4 << 20, 9), 3);
    bench.qemu("qemu-img convert -f raw -O vhdx raw a");
    bench.good("create qcow2:over --parent vhdx:a");
    bench.good("compare --strict aio:raw qcow2:over");
    let before = bench.bytes("a");
    for (status, line, why) in [
        (2, "create vhdx:b 1M", "make a qcow2 image"),
        (2, "create vhdx:b --parent vhdx:a", "make a qcow2 image"),
        (2, "convert aio:raw vhdx:b", "make a qcow2 image"),
        (2, "convert aio:raw vhdx:a --force", "make a qcow2 image"),
        (2, "snapshot vhdx:a vhdx:b", "make a qcow2 image"),
        (2, "create vhd:b --parent vhdx:a", "use qcow2"),
        (2, "resize vhdx:a 8M", "convert it to qcow2"),
        (2, "commit vhdx:a", "only qcow2, qcow and VHD"),
        (2, "rebase vhdx:a --no-parent", "tapimg convert"),
        (2, "check --repair vhdx:a", "leave --repair out"),
        (6, "commit qcow2:over", "a VHDX is only read"),
    ] {
        let said = bench.bad(status, line);
        assert!(said.contains(why), "{line}: {said}");
        assert!(bench.bytes("a") == before, "{line}");
        assert!(!bench.path("b").exists(), "{line}");
    }
    // It was cut off, or its tables are damaged.
    for part in [0, 100, 70_000, 300_000, before.len() / 2] {
        std::fs::write(bench.path("c"), &before[..part]).unwrap();
        bench.bad(1, "check --data vhdx:c");
        bench.bad(6, "convert vhdx:c aio:d");
        assert!(!bench.path("d").exists(), "{part}");
    }
}

/// The output shows the content with the log of an image applied, and says so.
#[test]
fn a_vhdx_that_was_not_closed_is_shown_as_it_would_be() {
    if !has_qemu("a_vhdx_that_was_not_closed_is_shown_as_it_would_be") {
        return;
    }
    let bench = Bench::new();
    bench.qemu("qemu-img create -q -f vhdx -o block_size=1M a 8M");
    let info = bench.json("info vhdx:a");
    assert!(info[0]["notes"].is_null(), "{info}");
    // QEMU cannot write the table, which is behind its log.
    let image = r#"json:{"driver":"vhdx","file":{"driver":"blkdebug",
        "image":{"driver":"file","filename":"a"},
        "inject-error":[{"event":"none","iotype":"write","sector":4096}]}}"#;
    let output = std::process::Command::new("qemu-io")
        .args(["-c", "write -P 7 3M 64k", image])
        .current_dir(bench.path(""))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned()
        + &String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("write failed"), "{said}");
    let info = bench.json("info vhdx:a");
    let note = info[0]["notes"][0].as_str().unwrap();
    assert!(note.contains("was not closed"), "{info}");
    let before = bench.bytes("a");
    bench.good("convert vhdx:a aio:b");
    assert!(bench.bytes("a") == before, "it was written");
    let mut wanted = vec![0; 8 << 20];
    wanted[3 << 20..][..65536].fill(7);
    assert!(bench.bytes("b") == wanted);
    bench.qemu("qemu-img check -q -f vhdx -r all a");
    bench.good("compare --strict vhdx:a aio:b");
    assert!(bench.json("info vhdx:a")[0]["notes"].is_null());
}
