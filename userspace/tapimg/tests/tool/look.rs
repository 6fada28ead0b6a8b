// SPDX-License-Identifier: MIT OR Apache-2.0
//! Output about images.

use crate::bench::{has_qemu, Bench};
use serde_json::{json, Value};

#[test]
fn a_chain_is_told() {
    if !has_qemu("a_chain_is_told") {
        return;
    }
    let bench = Bench::new();
    bench.sparse("base", 4 << 20, &[(0, 4096)], 1);
    bench.qemu("qemu-img create -q -f qcow2 -F raw -b base middle");
    bench.qemu("qemu-img create -q -f qcow2 -F qcow2 -b middle top");
    let all = bench.json("info --chain qcow2:top");
    let kinds: Vec<&Value> = all
        .as_array()
        .unwrap()
        .iter()
        .map(|one| &one["kind"])
        .collect();
    assert_eq!(kinds, ["qcow2", "qcow2", "aio"], "{all}");
    assert_eq!(all[0]["parent"]["names"][0], "middle");
    assert_eq!(all[0]["parent"]["kind"], "qcow2");
    assert_eq!(all[2]["size"], 4 << 20);
    let alone = bench.json("info qcow2:top");
    assert_eq!(alone.as_array().unwrap().len(), 1);
    // A chain without an end.
    bench.qemu("qemu-img rebase -u -f qcow2 -F qcow2 -b top middle");
    let said = bench.bad(1, "info --chain qcow2:top");
    assert!(said.contains("lie over each other"), "{said}");
}

/// blktapctrl refuses a backing image that another program may write, or in another folder.
#[test]
fn a_parent_that_the_supervisor_would_refuse_is_noted() {
    let bench = Bench::new();
    bench.sparse("base", 4 << 20, &[(0, 4096)], 1);
    bench.good("create qcow2:top --parent aio:base");
    let notes = |line: &str| bench.json(line)[0]["notes"].to_string();
    let base = bench.path("base").display().to_string();
    let may_be_written = notes("info qcow2:top");
    assert!(
        may_be_written.contains(&format!("`chmod a-w {base}`")),
        "{may_be_written}"
    );
    bench.shell("chmod a-w base");
    assert_eq!(notes("info qcow2:top"), "null");
    bench.shell("mkdir elsewhere && mv top elsewhere/top");
    bench.good("rebase --unsafe qcow2:elsewhere/top --parent aio:base");
    let is_elsewhere = notes("info qcow2:elsewhere/top");
    assert!(
        is_elsewhere.contains("--files names") && is_elsewhere.contains(&base),
        "{is_elsewhere}"
    );
}

/// The maker of an image chose the name in it, which clears no screen and begins no line.
#[test]
fn a_name_in_an_image_does_nothing_to_a_terminal() {
    let bench = Bench::new();
    bench.sparse("base-of-that-image", 4 << 20, &[(0, 4096)], 1);
    bench.good("create qcow2:top --parent aio:base-of-that-image");
    let is_name = |at: &[u8]| at == b"base-of-that-image";
    let header = bench.bytes("top");
    let at = header.windows(18).position(is_name).expect("the name");
    bench.poke("top", at as u64, "\x1b[2J\n\u{9b}1m\rforged".as_bytes());
    let acts = |text: &str| text.replace('\n', "").contains(char::is_control);
    let said = bench.run("info qcow2:top");
    assert!(!acts(&said.out) && !acts(&said.err), "{said:?}");
    assert!(
        said.out.contains(r"\u{1b}[2J\n\u{9b}1m\rforged"),
        "{said:?}"
    );
    let said = bench.run("--json info --chain qcow2:top");
    assert!(!acts(&said.out) && !acts(&said.err), "{said:?}");
    assert!(
        said.out.contains(r"\u001b[2J\n\u009b1m\rforged"),
        "{said:?}"
    );
}

#[test]
fn a_parent_of_an_unknown_kind_is_not_guessed() {
    if !has_qemu("a_parent_of_an_unknown_kind_is_not_guessed") {
        return;
    }
    let bench = Bench::new();
    bench.sparse("base", 4 << 20, &[(0, 4096)], 1);
    bench.qemu("qemu-img create -q -f qcow -F raw -b base a 4M");
    let said = bench.bad(1, "info qcow:a");
    assert!(said.contains("not guessed"), "{said}");
    bench.good("info --parent-kind aio qcow:a");
    bench.good("compare --parent-kind aio qcow:a aio:base");
}

#[test]
fn differences_are_found_where_they_are() {
    let bench = Bench::new();
    bench.sparse("a", 64 << 20, &[(0, 8 << 20), (40 << 20, 4096)], 1);
    bench.good("convert aio:a qcow2:b");
    assert_eq!(bench.good("compare aio:a qcow2:b"), "they are the same\n");
    for at in [(40 << 20) + 4095, (8 << 20) - 1, 5_000_001, 0] {
        let byte = bench.bytes("a")[at as usize];
        bench.poke("a", at, &[byte ^ 1]);
        let verdict = bench.json("compare aio:a qcow2:b");
        assert_eq!(verdict["first_difference"], at, "{verdict}");
        assert_eq!(bench.run("compare qcow2:b aio:a").status, Some(1));
    }
}

#[test]
fn a_longer_disk_is_the_same_if_the_rest_is_zeroes() {
    let bench = Bench::new();
    bench.sparse("a", 4 << 20, &[(0, 4096)], 1);
    bench.sparse("b", 6 << 20, &[(0, 4096)], 1);
    assert!(bench
        .good("compare aio:a aio:b")
        .contains("the rest is zeroes"));
    bench.bad(1, "compare --strict aio:a aio:b");
    bench.poke("b", (5 << 20) + 7, b"x");
    let verdict = bench.json("compare aio:a aio:b");
    assert_eq!(verdict["first_difference"], (5 << 20) + 7, "{verdict}");
}

/// For each kind, the map tells the allocated parts of an image from those of its backing image.
#[test]
fn a_map_of_a_layer_is_of_that_alone() {
    for (kind, below) in [
        ("qcow2", "aio"),
        ("qcow", "aio"),
        ("vhd", "aio"),
        ("vhd", "vhd"),
        ("vmdk", "vmdk"),
    ] {
        let bench = Bench::new();
        let map = |layer: &str| {
            let map = bench.json(&format!("map --parent-kind {below} {layer} {kind}:top"));
            let rows = map["extents"].as_array().unwrap().clone();
            let of = |row: &serde_json::Value, key: &str| row[key].as_u64().unwrap();
            let row = |row: &serde_json::Value| {
                let content = row["content"].as_str().unwrap().to_owned();
                (of(row, "offset"), of(row, "length"), content)
            };
            rows.iter().map(row).collect::<Vec<_>>()
        };
        let found = |offset: u64, len: u64, content: &str| (offset, len, content.to_owned());
        bench.sparse("raw", 8 << 20, &[(0, 2 << 20)], 3);
        bench.good(&format!("convert aio:raw {below}:base"));
        bench.good(&format!("create {kind}:top 8M --parent {below}:base"));
        assert_eq!(map("--layer"), [found(0, 8 << 20, "below")], "{kind}");
        let all = [found(0, 2 << 20, "data"), found(2 << 20, 6 << 20, "hole")];
        assert_eq!(map(""), all, "{kind}");
        // A block of each kind, where there is nothing below.
        bench.sparse("raw", 8 << 20, &[(0, 2 << 20), (4 << 20, 2 << 20)], 3);
        bench.good(&format!(
            "convert --parent-kind {below} aio:raw {kind}:top --force --parent {below}:base"
        ));
        let own = [
            found(0, 4 << 20, "below"),
            found(4 << 20, 2 << 20, "data"),
            found(6 << 20, 2 << 20, "below"),
        ];
        assert_eq!(map("--layer"), own, "{kind}");
    }
}

#[test]
fn a_map_is_that_of_qemu() {
    if !has_qemu("a_map_is_that_of_qemu") {
        return;
    }
    let bench = Bench::new();
    bench.sparse(
        "raw",
        16 << 20,
        &[(0, 65536), (3 << 20, 2 << 20), (15 << 20, 65536)],
        1,
    );
    bench.good("convert aio:raw qcow2:a");
    let own = bench.json("map qcow2:a");
    let text = bench.qemu("qemu-img map --output=json -f qcow2 a");
    let others: Vec<Value> = serde_json::from_str(&text).unwrap();
    // Rows that follow each other in the file are apart there.
    let mut merged: Vec<(u64, u64, bool)> = Vec::new();
    for row in &others {
        let (start, length) = (
            row["start"].as_u64().unwrap(),
            row["length"].as_u64().unwrap(),
        );
        let data = row["data"] == json!(true);
        match merged.last_mut() {
            Some(last) if last.2 == data => last.1 += length,
            _ => merged.push((start, length, data)),
        }
    }
    let ours: Vec<(u64, u64, bool)> = own["extents"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| {
            let number = |name: &str| row[name].as_u64().unwrap();
            (number("offset"), number("length"), row["content"] == "data")
        })
        .collect();
    assert_eq!(ours, merged);
    assert!(bench.good("map qcow2:a").contains("hole"));
}

#[test]
fn help_teaches_and_the_manual_is_there() {
    let bench = Bench::new();
    let help = bench.good("--help");
    for part in [
        "Examples:",
        "Exit status,",
        "tap-ctl pause",
        "PATH.unfinished",
    ] {
        assert!(help.contains(part), "{part}: {help}");
    }
    let page = bench.good("generate man");
    for verb in ["INFO", "CREATE", "CONVERT", "CHECK", "COMPARE", "MAP"] {
        assert!(page.contains(&format!(".SH \"{verb}\"")), "{verb}");
    }
    assert!(bench.good("generate bash").contains("convert"));
}
