// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images over other ones than before.

use crate::bench::{has_qemu, places, qemu_name, Bench};

const SIZE: u64 = 24 << 20;

/// `old` and `new` in their formats, and `top` over `old` with something of its own; `before` is what it shows.
fn chain(bench: &Bench, old: (&str, u64), new: (&str, u64), seed: u64) {
    bench.sparse("old.raw", old.1, &places(seed, old.1, 30), seed);
    // Some of it is the same.
    std::fs::copy(bench.path("old.raw"), bench.path("new.raw")).unwrap();
    let file = std::fs::File::options()
        .write(true)
        .open(bench.path("new.raw"));
    file.unwrap().set_len(new.1).unwrap();
    for (at, len) in places(seed + 1, new.1, 12) {
        bench.poke("new.raw", at, &vec![0xa5; len as usize]);
    }
    for (at, len) in places(seed + 2, new.1, 6) {
        bench.poke("new.raw", at, &vec![0; len as usize]);
    }
    bench.good(&format!("convert aio:old.raw {}:old", old.0));
    bench.good(&format!("convert aio:new.raw {}:new", new.0));
    bench.good(&format!("create qcow2:top {SIZE} --parent {}:old", old.0));
    write_own(bench);
    bench.good("convert --parent-kind aio qcow2:top aio:before");
}

/// A guest's writes to `top`, of data and of zeroes, by QEMU.
fn write_own(bench: &Bench) {
    let mut command = std::process::Command::new("qemu-io");
    command.args(["-f", "qcow2"]);
    for line in [
        "write -P 9 1M 300k",
        "write -P 8 5000k 3k",
        "write -z 7M 2M",
        "write -P 7 23M 1M",
    ] {
        command.args(["-c", line]);
    }
    let done = command.arg("top").current_dir(bench.path("")).output();
    let done = done.unwrap();
    assert!(done.status.success(), "{done:?}");
}

#[test]
fn a_rebased_image_holds_the_same() {
    if !has_qemu("a_rebased_image_holds_the_same") {
        return;
    }
    for (seed, old, new) in [
        (1, ("aio", SIZE), ("qcow2", SIZE)),
        (2, ("qcow2", SIZE), ("aio", SIZE / 2)),
        (3, ("vhd", SIZE / 3), ("vmdk", SIZE + (3 << 20))),
        (4, ("vmdk", SIZE + (1 << 20)), ("vhd", SIZE / 2)),
    ] {
        let bench = Bench::new();
        chain(&bench, old, new, seed);
        let done = bench.json(&format!("rebase qcow2:top --parent {}:new", new.0));
        assert_eq!(done["parent"], "new", "{done}");
        assert!(done["written"].as_u64().unwrap() > 0, "{done}");
        // Nothing of the old one is needed.
        std::fs::remove_file(bench.path("old")).unwrap();
        bench.good("compare --strict aio:before qcow2:top");
        bench.qemu("qemu-img check -f qcow2 top");
        bench.qemu("qemu-img compare -f raw -F qcow2 before top");
        let info = bench.qemu("qemu-img info --output=json -f qcow2 top");
        let format = format!("\"backing-filename-format\": \"{}\"", qemu_name(new.0));
        assert!(info.contains(&format), "{info}");
        // QEMU changes the backing image from there, and back.
        let format = qemu_name(new.0);
        bench.qemu(&format!("qemu-img create -q -f raw empty {SIZE}"));
        bench.qemu("qemu-img rebase -q -f qcow2 -F raw -b empty top");
        bench.good(&format!("rebase qcow2:top --parent {}:new", new.0));
        bench.qemu(&format!(
            "qemu-img rebase -q -f qcow2 -F {format} -b new top"
        ));
        bench.good("compare --strict aio:before qcow2:top");
        let done = bench.json("rebase qcow2:top --no-parent");
        assert_eq!(done["parent"], serde_json::Value::Null, "{done}");
        std::fs::remove_file(bench.path("new")).unwrap();
        bench.qemu("qemu-img check -f qcow2 top");
        bench.qemu("qemu-img compare -f raw -F qcow2 before top");
    }
}

#[test]
fn a_rebased_vhd_holds_the_same() {
    for (seed, old, new) in [
        (1, ("aio", SIZE), ("vhd", SIZE)),
        (2, ("vhd", SIZE), ("aio", SIZE)),
        (3, ("vhd", SIZE / 3), ("vhd", SIZE / 2)),
    ] {
        let bench = Bench::new();
        bench.sparse("old.raw", old.1, &places(seed, old.1, 30), seed);
        bench.sparse("new.raw", new.1, &places(seed + 6, new.1, 20), seed);
        bench.sparse("want", SIZE, &places(seed + 1, SIZE, 20), seed + 1);
        bench.good(&format!("convert aio:old.raw {}:old", old.0));
        bench.good(&format!("convert aio:new.raw {}:new", new.0));
        bench.good(&format!("convert aio:want vhd:top --parent {}:old", old.0));
        let done = bench.json(&format!("rebase vhd:top --parent {}:new", new.0));
        assert_eq!(done["parent"], "new", "{done}");
        assert!(done["written"].as_u64().unwrap() > 0, "{done}");
        // Nothing of the old one is needed.
        std::fs::remove_file(bench.path("old")).unwrap();
        bench.good("check vhd:top");
        bench.good("compare --strict aio:want vhd:top");
        // And one that was moved.
        std::fs::create_dir(bench.path("elsewhere")).unwrap();
        std::fs::rename(bench.path("new"), bench.path("elsewhere/new")).unwrap();
        bench.bad(4, "compare --strict aio:want vhd:top");
        bench.good(&format!(
            "rebase vhd:top --unsafe --parent {}:elsewhere/new",
            new.0
        ));
        bench.good("compare --strict aio:want vhd:top");
    }
}

#[test]
fn what_is_the_same_is_not_written() {
    let bench = Bench::new();
    bench.sparse("base", SIZE, &places(7, SIZE, 30), 7);
    bench.good("convert aio:base vhd:same");
    bench.good("create qcow2:top --parent aio:base");
    let space = bench.allocated("top");
    let done = bench.json("rebase qcow2:top --parent vhd:same");
    assert_eq!(done["written"], 0, "{done}");
    assert_eq!(bench.allocated("top"), space);
    bench.good("compare --strict aio:base qcow2:top");
}

#[test]
fn an_unsafe_one_changes_the_name_only() {
    let bench = Bench::new();
    bench.sparse("base", SIZE, &places(8, SIZE, 10), 8);
    bench.good("create qcow2:top --parent aio:base");
    let before = bench.bytes("top");
    std::fs::rename(bench.path("base"), bench.path("moved")).unwrap();
    let said = bench.bad(4, "rebase qcow2:top --parent aio:moved");
    assert!(said.contains("/base"), "{said}");
    assert!(bench.bytes("top") == before);
    let said = bench.good("rebase qcow2:top --parent aio:moved --unsafe");
    assert!(said.contains("was not looked at"), "{said}");
    assert!(bench.bytes("top")[65536..] == before[65536..]);
    bench.good("compare --strict aio:moved qcow2:top");
}

#[test]
fn what_cannot_be_rebased_is_named() {
    let bench = Bench::new();
    bench.sparse("base", 1 << 20, &[(0, 4096)], 2);
    bench.good("create qcow2:a --parent aio:base");
    bench.good("create qcow2:b --parent qcow2:a");
    bench.good("create vhd:c --parent aio:base");
    for (line, why) in [
        ("rebase vhd:c --no-parent", "tapimg convert"),
        ("rebase vhd:c --parent qcow2:a", "use qcow2"),
        ("rebase vmdk:c --parent aio:base", "tapimg convert"),
        ("rebase qcow2:a --parent qcow2:a", "name another image"),
        ("rebase qcow2:a --parent qcow2:b", "name another image"),
        (
            "rebase qcow2:a --parent qcow2:b --unsafe",
            "name another image",
        ),
        ("rebase qcow2:a", "--parent"),
    ] {
        let said = bench.bad(2, line);
        assert!(said.contains(why), "{line}: {said}");
    }
    bench.good("compare --strict aio:base qcow2:b");
}

#[test]
fn snapshots_keep_what_they_show() {
    if !has_qemu("snapshots_keep_what_they_show") {
        return;
    }
    let bench = Bench::new();
    bench.sparse("base", 1 << 20, &[(0, 4096)], 2);
    bench.good("create qcow2:a --parent aio:base");
    bench.qemu("qemu-img snapshot -c one a");
    let said = bench.bad(6, "rebase qcow2:a --no-parent");
    assert!(said.contains("1 snapshots"), "{said}");
}

/// Whenever it dies, the image holds what it held, over the one image or the other.
#[test]
fn a_death_leaves_the_same_disk() {
    for share in [1, 20, 60] {
        let bench = Bench::new();
        bench.sparse("base", 256 << 20, &[(0, 96 << 20)], 6);
        bench.good("create aio:empty 256M");
        bench.good("create qcow2:top --parent aio:base");
        bench.kill("rebase qcow2:top --parent aio:empty", "top", share << 20);
        bench.good("check qcow2:top");
        bench.good("compare --strict aio:base qcow2:top");
        let info = bench.json("info qcow2:top");
        assert_eq!(info[0]["parent"]["names"][0], "base", "{info}");
        bench.good("rebase qcow2:top --parent aio:empty");
        std::fs::remove_file(bench.path("empty")).unwrap();
        bench.good("create aio:empty 256M");
        bench.good("compare --strict aio:base qcow2:top");
    }
}
