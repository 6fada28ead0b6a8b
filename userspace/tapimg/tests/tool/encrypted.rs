// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images that are encrypted: what is in them is read with their key, and nothing is made that would show it.

use crate::bench::{has_qemu, Bench};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;

/// Options of QEMU's tools for a key and an image.
const OBJECT: &str = "--object secret,id=s,file=key";

fn opts(kind: &str, name: &str) -> String {
    let key = match kind {
        "luks" => "key-secret=s",
        _ => "encrypt.key-secret=s",
    };
    format!("driver={kind},{key},file.filename={name}")
}

/// Makes a file that no other user may read.
fn secret(bench: &Bench, name: &str, words: &str) {
    fs::write(bench.path(name), words).unwrap();
    allow(bench, name, 0o600);
}

fn allow(bench: &Bench, name: &str, mode: u32) {
    fs::set_permissions(bench.path(name), fs::Permissions::from_mode(mode)).unwrap();
}

/// An image of either kind with some content, the same in plain text, and their key.
fn made(test: &str) -> Option<Bench> {
    if !has_qemu(test) {
        return None;
    }
    let bench = Bench::new();
    secret(&bench, "key", "a long word\n");
    let object = "--object secret,id=s,file=key";
    let keys = "key-secret=s,iter-time=1";
    let inside = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1";
    for line in [
        format!("qemu-img create -q {object} -f luks -o {keys} a.luks 1M"),
        format!("qemu-img create -q {object} -f qcow2 -o {inside} a.qcow2 1M"),
        "qemu-img create -q -f raw plain 1M".into(),
    ] {
        bench.qemu(&line);
    }
    fs::write(bench.path("plain"), vec![0x5a; 1 << 20]).unwrap();
    for (driver, key) in [("luks", "key-secret=s"), ("qcow2", "encrypt.key-secret=s")] {
        let to = format!("driver={driver},{key},file.filename=a.{driver}");
        bench.qemu(&format!(
            "qemu-img convert -n {object} --target-image-opts -f raw plain {to}"
        ));
    }
    Some(bench)
}

#[test]
fn content_is_read_with_its_key() {
    let Some(bench) = made("content_is_read_with_its_key") else {
        return;
    };
    for kind in ["luks", "qcow2"] {
        let image = format!("key=key,{kind}:a.{kind}");
        bench.good(&format!("compare {image} aio:plain"));
        bench.good(&format!("convert {image} vhd:{kind}.vhd"));
        bench.good(&format!("compare vhd:{kind}.vhd aio:plain"));
        bench.good(&format!("check {image}"));
        let said = bench.good(&format!("info {image}"));
        assert!(
            said.contains("encrypted: LUKS, aes-256-xts-plain64, sha256, keys: 1"),
            "{said}"
        );
        assert!(!said.contains("note: "), "{said}");
    }
    bench.good("resize key=key,qcow2:a.qcow2 2M");
    bench.qemu(
        "qemu-img check -q --object secret,id=s,file=key --image-opts \
         driver=qcow2,encrypt.key-secret=s,file.filename=a.qcow2",
    );
    let said = bench.run("compare key=key,qcow2:a.qcow2 aio:plain");
    assert!(said.out.contains("the rest is zeroes"), "{said:?}");
}

#[test]
fn what_needs_no_key_is_told_without() {
    let Some(bench) = made("what_needs_no_key_is_told_without") else {
        return;
    };
    for kind in ["luks", "qcow2"] {
        let said = bench.good(&format!("info {kind}:a.{kind}"));
        assert!(said.contains("encrypted: LUKS, aes-256"), "{said}");
        assert!(said.contains("size of the disk: 1 MiB"), "{said}");
        assert!(said.contains("without its key"), "{said}");
        let said = bench.bad(6, &format!("compare {kind}:a.{kind} aio:plain"));
        assert!(said.contains("key=FILE"), "{said}");
    }
    secret(&bench, "other", "a long word");
    let said = bench.bad(1, "info key=other,luks:a.luks");
    assert!(said.contains("a line's end too"), "{said}");
    let said = bench.bad(4, "compare key=nowhere,luks:a.luks aio:plain");
    assert!(said.contains("nowhere, which key= names"), "{said}");
}

#[test]
fn nothing_is_made_that_would_be_in_plain_text() {
    let Some(bench) = made("nothing_is_made_that_would_be_in_plain_text") else {
        return;
    };
    let before = fs::read(bench.path("a.qcow2")).unwrap();
    for (line, why) in [
        ("create luks:new 1M", "write key=FILE,luks:"),
        ("convert aio:plain luks:new", "write key=FILE,luks:"),
        ("create qcow2:new 1M --iter-time 1", "there is none"),
        (
            "create key=key,luks:new --parent aio:plain",
            "cannot have a backing image",
        ),
        ("create key=plain,luks:plain 1M --force", "its own key"),
        ("create key=key,luks:new 1M --iter-time 10001", "iter-time"),
        ("snapshot key=key,qcow2:a.qcow2 qcow2:new", "would not be"),
        (
            "create qcow2:new --parent key=key,luks:a.luks",
            "would not be",
        ),
        ("commit key=key,qcow2:a.qcow2", "is encrypted"),
        ("info key=key,aio:plain", "remove key="),
    ] {
        let said = bench.bad(2, line);
        assert!(said.contains(why), "{line}: {said}");
        assert!(!bench.path("new").exists(), "{line}");
    }
    assert!(fs::read(bench.path("a.qcow2")).unwrap() == before);
    bench.qemu("qemu-img create -q -f qcow2 not 1M");
    let said = bench.bad(1, "info key=key,qcow2:not");
    assert!(said.contains("is not encrypted"), "{said}");
}

/// QEMU opens an image of this program with the key, and finds its content; the file holds none of it in plain text.
#[test]
fn what_is_made_is_for_qemu() {
    if !has_qemu("what_is_made_is_for_qemu") {
        return;
    }
    for (kind, options) in [
        ("luks", ""),
        ("qcow2", ""),
        ("qcow2", "--cluster-size 512"),
        ("qcow2", "--cluster-size 2M --subclusters"),
    ] {
        let bench = Bench::new();
        secret(&bench, "key", "a long word\n");
        let size = (3 << 20) + 512;
        let places = [(0, 4096), (1 << 20, 70_000 / 512 * 512), (size - 512, 512)];
        bench.sparse("plain", size, &places, 5);
        let image = format!("key=key,{kind}:a");
        bench.good(&format!(
            "convert aio:plain {image} --iter-time 1 {options}"
        ));
        let opened = opts(kind, "a");
        let compare = format!("qemu-img compare {OBJECT} --image-opts {opened}");
        let plain = "driver=raw,file.filename=plain";
        bench.qemu(&format!("{compare} {plain}"));
        bench.good(&format!("compare --strict {image} aio:plain"));
        bench.good(&format!("check --data {image}"));
        let info = bench.json(&format!("info {image}"));
        assert_eq!(info[0]["size"], size, "{info}");
        assert_eq!(info[0]["problems"], Value::Array(vec![]), "{info}");
        let map = bench.json(&format!("map {image}"));
        let first = &map["extents"][0];
        assert_eq!(
            (&first["offset"], &first["content"]),
            (&0.into(), &"data".into()),
            "{map}"
        );
        if kind == "qcow2" {
            bench.qemu(&format!("qemu-img check -q {OBJECT} --image-opts {opened}"));
            let extents = map["extents"].as_array().unwrap();
            assert!(extents.iter().any(|one| one["content"] == "hole"), "{map}");
        }
        let (whole, found) = (bench.bytes("a"), &bench.bytes("plain")[..512]);
        assert!(
            !whole.windows(512).any(|part| part == found),
            "{kind}: in plain text"
        );
        // And what QEMU writes there is read here.
        bench.qemu_io(&opened, "write -P 9 2M 64k");
        bench.poke("plain", 2 << 20, &[9; 64 << 10]);
        bench.good(&format!("compare --strict {image} aio:plain"));
        assert_eq!(bench.files(), ["a", "key", "plain"]);
    }
}

#[test]
fn an_empty_image_is_as_large_as_was_said() {
    if !has_qemu("an_empty_image_is_as_large_as_was_said") {
        return;
    }
    for (kind, options) in [("luks", ""), ("qcow2", ""), ("qcow2", "--parent aio:base")] {
        let bench = Bench::new();
        secret(&bench, "key", "a long word\n");
        bench.sparse("base", 1 << 20, &[(4096, 512)], 6);
        let image = format!("key=key,{kind}:a");
        bench.good(&format!("create {image} 30G --iter-time 1 {options}"));
        assert!(bench.allocated("a") < 4 << 20, "{kind}");
        let opened = opts(kind, "a");
        let said = bench.qemu(&format!(
            "qemu-img info {OBJECT} --output=json --image-opts {opened}"
        ));
        let info: Value = serde_json::from_str(&said).unwrap();
        assert_eq!(info["virtual-size"], 30_u64 << 30, "{info}");
        bench.good(&format!("check {image}"));
        let end = (30_u64 << 30) - 512;
        bench.qemu_io(&opened, &format!("write -P 7 {end} 512"));
        bench.good(&format!("info {image}"));
        if kind == "qcow2" {
            bench.qemu(&format!("qemu-img check -q {OBJECT} --image-opts {opened}"));
        }
    }
}

/// The time is that of who makes it; two keys are never alike.
#[test]
fn a_key_is_tried_for_the_time_that_was_said() {
    let bench = Bench::new();
    secret(&bench, "key", "a long word\n");
    for (name, time) in [("a", ""), ("b", "--iter-time 20"), ("c", "--iter-time 20")] {
        bench.good(&format!("create key=key,luks:{name} 1M {time}"));
    }
    let [a, b, c] = ["a", "b", "c"].map(|name| bench.bytes(name));
    let iterations = |bytes: &[u8]| u32::from_be_bytes(bytes[212..216].try_into().unwrap());
    assert!(
        iterations(&a) > 8 * iterations(&b),
        "{} {}",
        iterations(&a),
        iterations(&b)
    );
    let salt = 216..248;
    assert!(b[salt.clone()] != c[salt] && b[112..132] != c[112..132]);
}

/// As the supervisor has it.
#[test]
fn what_others_may_read_is_no_key() {
    let bench = Bench::new();
    secret(&bench, "key", "a long word\n");
    bench.good("create key=key,luks:a 1M --iter-time 1");
    for mode in [0o644, 0o604, 0o620, 0o601] {
        allow(&bench, "key", mode);
        for line in ["create key=key,luks:b 1M", "map key=key,luks:a"] {
            let said = bench.bad(6, line);
            assert!(
                said.contains("key= names") && said.contains("chmod 600"),
                "{said}"
            );
        }
        assert!(!bench.path("b").exists() && !bench.path("b.unfinished").exists());
    }
    allow(&bench, "key", 0o640);
    bench.good("map key=key,luks:a");
    fs::create_dir(bench.path("folder")).unwrap();
    let said = bench.bad(2, "map key=folder,luks:a");
    assert!(said.contains("no regular file"), "{said}");
}

/// A raw image has no header that says its size: that is its file's.
#[test]
fn a_raw_one_has_the_size_of_its_file() {
    if !has_qemu("a_raw_one_has_the_size_of_its_file") {
        return;
    }
    let bench = Bench::new();
    secret(&bench, "key", "a long word\n");
    bench.sparse(
        "plain",
        1 << 20,
        &[(0, 1 << 19), ((1 << 20) - 8192, 4096)],
        7,
    );
    bench.good("convert aio:plain key=key,luks:a --iter-time 1");
    let done = bench.good("resize luks:a 2M");
    assert!(done.contains("reads as anything"), "{done}");
    let opened = opts("luks", "a");
    let size = |bench: &Bench| {
        let said = bench.qemu(&format!(
            "qemu-img info {OBJECT} --output=json --image-opts {opened}"
        ));
        serde_json::from_str::<Value>(&said).unwrap()["virtual-size"].clone()
    };
    assert_eq!(size(&bench), 2 << 20);
    // Sectors that the guest never used are no loss; to know them takes the key.
    let said = bench.bad(6, "resize luks:a 1M --shrink");
    assert!(said.contains("write key=FILE"), "{said}");
    secret(&bench, "other", "a long word");
    for line in [
        "resize key=other,luks:a 3M",
        "resize key=other,luks:a 1M --shrink",
    ] {
        let said = bench.bad(6, line);
        assert!(said.contains("opens none"), "{said}");
    }
    assert_eq!(size(&bench), 2 << 20);
    let done = bench.json("resize key=key,luks:a 1M --shrink");
    assert_eq!(done["lost"], 0, "{done}");
    bench.good("compare --strict key=key,luks:a aio:plain");
    // Stored zeroes are cut off, data is not.
    let done = bench.json(&format!(
        "resize key=key,luks:a {} --shrink",
        (1 << 20) - 4096
    ));
    assert_eq!(done["lost"], 0, "{done}");
    let said = bench.bad(6, "resize key=key,luks:a 512K --shrink");
    assert!(
        said.contains("4 KiB of data behind byte 524288, the first at byte 1040384"),
        "{said}"
    );
    let done = bench.json("resize key=key,luks:a 512K --shrink --lose-data");
    assert_eq!(done["lost"], 4096, "{done}");
    assert_eq!(size(&bench), 512 << 10);
    // And what QEMU changes is seen here.
    bench.qemu(&format!(
        "qemu-img resize -q {OBJECT} --image-opts {opened} 3M"
    ));
    assert_eq!(bench.json("info luks:a")[0]["size"], 3 << 20);
}
