// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images as other programs write them.

use crate::bench::{has_qemu, Bench};

/// The text of a VMDK with these extents.
fn descriptor(head: &str, kind: &str, extents: &[&str]) -> String {
    let extents = extents.join("\n");
    format!(
        "{head}\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"{kind}\"\n\n# Extent description\n\
         {extents}\n\n# The Disk Data Base\n#DDB\n\nddb.adapterType = \"lsilogic\"\n"
    )
}

#[test]
fn lines_of_a_vmdk_are_those_of_all_programs() {
    let bench = Bench::new();
    bench.sparse("one", 1 << 20, &[(0, 1 << 20)], 1);
    bench.sparse("two=2", 1 << 20, &[(0, 1 << 20)], 2);
    let both = [bench.bytes("one"), bench.bytes("two=2")].concat();
    std::fs::write(bench.path("want"), both).unwrap();
    let head = "# Disk DescriptorFile";
    for (head, lines) in [
        (
            head,
            [r#"RW 2048 FLAT "one" 0"#, r#"RW 2048 FLAT "two=2" 0"#],
        ),
        (
            head,
            [
                r#"RW 2048 FLAT "one" 0 partitionUUID 01020304 device"#,
                r#"RW  2048  FLAT  "two=2"  0"#,
            ],
        ),
        (
            "# made by a script\n# Disk Descriptor File\nencoding=\"GBK\"",
            [r#"RW 2048 FLAT "one" 0"#, r#"RW 2048 FLAT "two=2" 0"#],
        ),
    ] {
        let text = descriptor(head, "twoGbMaxExtentFlat", &lines);
        std::fs::write(bench.path("a.vmdk"), text).unwrap();
        assert_eq!(bench.json("info vmdk:a.vmdk")[0]["size"], 2 << 20);
        bench.good("compare --strict aio:want vmdk:a.vmdk");
        if has_qemu("lines_of_a_vmdk_are_those_of_all_programs") {
            bench.qemu("qemu-img compare -f raw -F vmdk want a.vmdk");
        }
    }
}

/// Lost parts of an image are not zeroes, wherever it was cut off.
#[test]
fn an_image_that_was_cut_off_inside_of_its_last_cluster_is_damaged() {
    let bench = Bench::new();
    bench.sparse("raw", 4 << 20, &[(0, 4 << 20)], 1);
    let makers = ["own", "qemu"];
    for (kind, maker) in ["qcow2", "qcow", "vmdk", "vhdx"]
        .iter()
        .flat_map(|kind| makers.map(|maker| (kind, maker)))
    {
        let is_qemu = maker == "qemu";
        if is_qemu && !has_qemu("an_image_that_was_cut_off_inside_of_its_last_cluster_is_damaged") {
            continue;
        }
        match (is_qemu, *kind) {
            (true, kind) => drop(bench.qemu(&format!("qemu-img convert -f raw -O {kind} raw a"))),
            (false, "vhdx") => continue,
            (false, kind) => drop(bench.good(&format!("convert aio:raw {kind}:a --force"))),
        }
        bench.good(&format!("compare --strict aio:raw {kind}:a"));
        let whole = bench.bytes("a");
        // Where the last bytes of the disk are: nothing is behind them.
        let last = &bench.bytes("raw")[(4 << 20) - 64..];
        let place = whole.windows(64).rposition(|bytes| bytes == last).unwrap();
        for lost in [1, 3000] {
            std::fs::write(bench.path("a"), &whole[..place + 64 - lost]).unwrap();
            let said = bench.bad(1, &format!("check {kind}:a"));
            assert!(said.contains("damaged"), "{kind} {maker}: {said}");
            bench.bad(6, &format!("convert {kind}:a aio:b"));
            assert!(!bench.path("b").exists(), "{kind} {maker}");
            if *kind == "vhdx" {
                continue;
            }
            // Nothing makes it longer, by zeroes.
            let before = bench.bytes("a");
            bench.qemu("truncate -s 4M c");
            bench.good("create qcow2:over --parent aio:c --force");
            if *kind == "qcow2" {
                let said = bench.bad(6, "rebase qcow2:a --parent qcow2:over");
                assert!(said.contains("cut off"), "{said}");
            }
            assert!(bench.bytes("a") == before, "{kind} {maker}");
        }
        std::fs::remove_file(bench.path("a")).unwrap();
    }
}

/// The end of a disk that is no whole number of clusters need not be in the file.
#[test]
fn what_is_behind_the_end_of_the_disk_may_be_missing() {
    // It puts clusters into the file in the order of the disk.
    if !has_qemu("what_is_behind_the_end_of_the_disk_may_be_missing") {
        return;
    }
    let bench = Bench::new();
    bench.sparse("raw", (1 << 20) + 512, &[(0, (1 << 20) + 512)], 1);
    for kind in ["qcow2", "qcow", "vmdk"] {
        bench.qemu(&format!("qemu-img convert -f raw -O {kind} raw a"));
        let whole = bench.bytes("a");
        let last = &bench.bytes("raw")[(1 << 20) + 448..];
        let place = whole.windows(64).rposition(|bytes| bytes == last).unwrap();
        std::fs::write(bench.path("a"), &whole[..place + 64]).unwrap();
        bench.good(&format!("check {kind}:a"));
        bench.good(&format!("compare --strict aio:raw {kind}:a"));
    }
}

/// Version 2 had no extensions, so its old images have the parent's name where those begin now.
#[test]
fn headers_of_old_qcow2_images_are_understood() {
    if !has_qemu("headers_of_old_qcow2_images_are_understood") {
        return;
    }
    let bench = Bench::new();
    bench.sparse("base", 1 << 20, &[(0, 1 << 20)], 1);
    std::fs::hard_link(bench.path("base"), bench.path("base-of-it.raw")).unwrap();
    bench.qemu("qemu-img create -q -f qcow2 -o compat=0.10 -b base -F raw a");
    bench.poke("a", 72, &[0; 200]);
    bench.poke("a", 72, b"base-of-it.raw");
    bench.poke("a", 8, &72_u64.to_be_bytes());
    bench.poke("a", 16, &14_u32.to_be_bytes());
    bench.good("compare --parent-kind aio --strict aio:base qcow2:a");
    bench.good("rebase --parent-kind aio qcow2:a --parent aio:base");
    bench.good("compare --strict aio:base qcow2:a");
    bench.qemu("qemu-img compare -f raw -F qcow2 base a");
    // The name of a format may have zeroes behind it.
    let length = bench.peek("a", 72) & 0xffff_ffff;
    assert_eq!(length, 3, "of raw");
    bench.poke("a", 76, &8_u32.to_be_bytes());
    assert_eq!(bench.json("info qcow2:a")[0]["parent"]["kind"], "raw");
    bench.good("compare --strict aio:base qcow2:a");
    bench.qemu("qemu-img compare -f raw -F qcow2 base a");
}

#[test]
fn names_with_a_colon_are_files() {
    let bench = Bench::new();
    bench.sparse("a:b.raw", 1 << 20, &[(0, 1 << 20)], 1);
    for kind in ["qcow2", "vhd", "qcow"] {
        bench.good(&format!("create {kind}:a:c.{kind} --parent aio:a:b.raw"));
        bench.good(&format!(
            "compare --parent-kind aio --strict aio:a:b.raw {kind}:a:c.{kind}"
        ));
    }
    let names = bench.json("info qcow2:a:c.qcow2")[0]["parent"]["names"].clone();
    assert_eq!(names[0], "./a:b.raw");
    if has_qemu("names_with_a_colon_are_files") {
        bench.qemu("qemu-img compare -f raw -F qcow2 ./a:b.raw ./a:c.qcow2");
    }
}

/// A chain that is too long to be served is made shorter.
#[test]
fn a_chain_of_70_is_made_shorter() {
    let bench = Bench::new();
    bench.sparse("0", 1 << 20, &[(0, 1 << 20)], 1);
    bench.good("create qcow2:1 --parent aio:0");
    for number in 2..=70 {
        let below = number - 1;
        bench.good(&format!("create qcow2:{number} --parent aio:0"));
        bench.good(&format!(
            "rebase --unsafe qcow2:{number} --parent qcow2:{below}"
        ));
    }
    // It is not made longer.
    let said = bench.bad(6, "create qcow2:71 --parent qcow2:70");
    assert!(said.contains("one more"), "{said}");
    let all = bench.json("info --chain qcow2:70");
    assert_eq!(all.as_array().unwrap().len(), 71);
    bench.good("convert qcow2:70 aio:copy");
    assert!(bench.bytes("copy") == bench.bytes("0"));
    bench.good("commit qcow2:70");
    bench.good("rebase qcow2:69 --parent qcow2:1");
    assert_eq!(
        bench
            .json("info --chain qcow2:69")
            .as_array()
            .unwrap()
            .len(),
        3
    );
    bench.good("compare --strict aio:0 qcow2:69");
}
