// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images that are encrypted: what is in them is read with their key, and nothing is made that would show it.

use crate::bench::{has_qemu, Bench};
use std::fs;

/// An image of either kind with some content, the same in plain text, and their key.
fn made(test: &str) -> Option<Bench> {
    if !has_qemu(test) {
        return None;
    }
    let bench = Bench::new();
    fs::write(bench.path("key"), "a long word\n").unwrap();
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
    fs::write(bench.path("other"), "a long word").unwrap();
    let said = bench.bad(1, "info key=other,luks:a.luks");
    assert!(said.contains("a line's end too"), "{said}");
    let said = bench.bad(4, "compare key=nowhere,luks:a.luks aio:plain");
    assert!(said.contains("key=nowhere"), "{said}");
}

#[test]
fn nothing_is_made_that_would_be_in_plain_text() {
    let Some(bench) = made("nothing_is_made_that_would_be_in_plain_text") else {
        return;
    };
    let before = fs::read(bench.path("a.qcow2")).unwrap();
    for (line, why) in [
        ("create luks:new 1M", "qemu-img create -f luks"),
        ("create key=key,qcow2:new 1M", "qemu-img create -f luks"),
        ("convert aio:plain key=key,qcow2:new", "qemu-img convert -n"),
        ("snapshot key=key,qcow2:a.qcow2 qcow2:new", "would not be"),
        (
            "create qcow2:new --parent key=key,luks:a.luks",
            "would not be",
        ),
        ("commit key=key,qcow2:a.qcow2", "is encrypted"),
        ("resize key=key,luks:a.luks 2M", "anything but zeroes"),
        ("info key=key,aio:plain", "leave key= away"),
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
