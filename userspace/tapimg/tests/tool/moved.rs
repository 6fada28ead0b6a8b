// SPDX-License-Identifier: MIT OR Apache-2.0
//! Parents that are in another place than their children say, as after a move to another host.

use crate::bench::{has_qemu, qemu_name, Bench};
use crate::sectors::guid;

const SIZE: u64 = 8 << 20;

/// The file system of an old host, in which `old/base` is the parent of `vm/top`, and that of a new one: the parent is in
/// `new` under the given name. `raw` is what the disk shows.
fn moved(bench: &Bench, parent: &str, child: &str, name: &str) {
    for folder in ["old", "new", "vm"] {
        std::fs::create_dir(bench.path(folder)).unwrap();
    }
    bench.sparse("raw", SIZE, &[(0, 70_000), (5 << 20, 300_000)], 1);
    bench.good(&format!("convert aio:raw {parent}:old/base"));
    bench.good(&format!("create {child}:vm/top --parent {parent}:old/base"));
    std::fs::rename(bench.path("old/base"), bench.path(&format!("new/{name}"))).unwrap();
    std::fs::remove_dir(bench.path("old")).unwrap();
}

const PAIRS: [(&str, &str); 5] = [
    ("qcow2", "qcow2"),
    ("aio", "qcow"),
    ("vhd", "vhd"),
    ("aio", "vhd"),
    ("vmdk", "vmdk"),
];

#[test]
fn a_parent_is_read_where_the_user_says_that_it_is() {
    for (parent, child) in PAIRS {
        let bench = Bench::new();
        moved(&bench, parent, child, "base");
        let top = format!("{child}:vm/top --parent-kind aio");
        let said = bench.run(&format!("convert {top} aio:copy"));
        assert_eq!(said.status, Some(4), "{parent} {child}: {said:?}");
        assert!(said.err.contains("--moved --parent"), "{said:?}");
        // By its name in a folder, by itself, and with another name.
        bench.good(&format!("compare --strict aio:raw {top} --parent-at new"));
        bench.good(&format!("info --chain {top} --parent-at new/base"));
        std::fs::rename(bench.path("new/base"), bench.path("new/other")).unwrap();
        bench.bad(4, &format!("compare aio:raw {top} --parent-at new"));
        bench.good(&format!("convert {top} aio:copy --parent-at new/other"));
        bench.good("compare --strict aio:raw aio:copy");
        let said = bench.bad(4, &format!("compare aio:raw {top} --parent-at nowhere"));
        assert!(said.contains("nowhere"), "{said}");
    }
}

#[test]
fn a_child_is_told_where_its_parent_is_while_the_chain_is_broken() {
    for (parent, child) in PAIRS {
        let bench = Bench::new();
        moved(&bench, parent, child, "longer=name");
        let top = format!("{child}:vm/top --parent-kind aio");
        let line = format!("rebase {top} --moved --parent {parent}:new/longer=name");
        let done = bench.json(&line);
        let name = done["parent"].as_str().unwrap();
        assert!(name.ends_with("/new/longer=name"), "{done}");
        bench.good(&format!("compare --strict aio:raw {top}"));
        // Again, to a shorter name and one in the same folder.
        std::fs::rename(bench.path("new/longer=name"), bench.path("vm/b")).unwrap();
        bench.good(&format!("rebase {top} --moved --parent {parent}:vm/b"));
        bench.good(&format!("compare --strict aio:raw {top}"));
        bench.good(&format!("check {top}"));
        if has_qemu("a_child_is_told_where_its_parent_is_while_the_chain_is_broken")
            && !matches!(child, "vhd" | "qcow")
        {
            let format = qemu_name(child);
            bench.qemu(&format!("qemu-img compare -f raw -F {format} raw vm/top"));
            bench.qemu(&format!("qemu-img check -f {format} vm/top"));
        }
    }
}

/// A file of VMware's, which is a text and names its parent on Windows.
#[test]
fn a_descriptor_that_is_a_file_of_its_own_keeps_its_other_lines() {
    let bench = Bench::new();
    bench.sparse("raw", SIZE, &[(0, 70_000)], 1);
    bench.good("convert aio:raw vmdk:base.vmdk");
    let bytes = bench.bytes("base.vmdk");
    let text = String::from_utf8_lossy(&bytes[512..4096]).into_owned();
    let cid = text.split("\nCID=").nth(1).unwrap()[..8].to_string();
    bench.good("create vmdk:delta.vmdk --parent vmdk:base.vmdk");
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID={cid}\ncreateType=\"twoGbMaxExtentSparse\"\n\
         parentFileNameHint=\"D:\\VMs\\a folder\\base.vmdk\"\nRW {} SPARSE \"delta.vmdk\"\nddb.comment = \"last\"\n",
        SIZE / 512
    );
    std::fs::write(bench.path("top.vmdk"), &text).unwrap();
    bench.bad(4, "convert vmdk:top.vmdk aio:copy");
    std::fs::create_dir(bench.path("new")).unwrap();
    std::fs::rename(bench.path("base.vmdk"), bench.path("new/base.vmdk")).unwrap();
    bench.good("compare --strict aio:raw vmdk:top.vmdk --parent-at new");
    bench.good("rebase vmdk:top.vmdk --moved --parent vmdk:new/base.vmdk");
    bench.good("compare --strict aio:raw vmdk:top.vmdk");
    let now = String::from_utf8(bench.bytes("top.vmdk")).unwrap();
    let other = |text: &str| -> Vec<String> {
        let lines = text
            .lines()
            .filter(|line| !line.starts_with("parentFileName"));
        lines
            .filter(|line| !line.is_empty())
            .map(String::from)
            .collect()
    };
    assert_eq!(other(&now), other(&text));
}

#[test]
fn another_image_is_not_the_parent() {
    for (parent, child) in [("vhd", "vhd"), ("vmdk", "vmdk")] {
        let bench = Bench::new();
        moved(&bench, parent, child, "base");
        bench.good(&format!("convert aio:raw {parent}:new/wrong"));
        let before = bench.bytes("vm/top");
        let line = format!("rebase {child}:vm/top --moved --parent {parent}:new/wrong");
        let said = bench.bad(6, &line);
        assert!(said.contains("not the parent that is meant"), "{said}");
        assert!(bench.bytes("vm/top") == before, "{child}");
        let line = format!("convert {child}:vm/top aio:copy --parent-at new/wrong");
        assert_ne!(bench.run(&line).status, Some(0), "{child}");
        assert!(!bench.path("copy").exists());
        bench.good(&format!(
            "convert {child}:vm/top aio:copy --parent-at new/wrong --parent-at new/base"
        ));
        bench.good("compare --strict aio:raw aio:copy");
    }
    let bench = Bench::new();
    moved(&bench, "qcow2", "qcow2", "base");
    let said = bench.bad(2, "rebase qcow2:vm/top --moved --parent aio:new/base");
    assert!(said.contains("kind qcow2"), "{said}");
    let said = bench.bad(2, "rebase qcow2:new/base --moved --parent aio:raw");
    assert!(said.contains("no backing image"), "{said}");
}

/// Makes the VHDX `name`, which has no content of its own, a child of `parent`, to which `path` leads.
fn make_child(bench: &Bench, name: &str, parent: &str, path: &str) {
    let head = bench.bytes(parent);
    let header = [64 << 10, 128 << 10]
        .into_iter()
        .max_by_key(|at| u64::from_le_bytes(head[at + 8..at + 16].try_into().unwrap()));
    let at = header.unwrap() + 32;
    let mut id: [u8; 16] = head[at..at + 16].try_into().unwrap();
    id[..4].reverse();
    id[4..6].reverse();
    id[6..8].reverse();
    let hex = format!("{:032x}", u128::from_be_bytes(id));
    let (a, b, c, d) = (&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20]);
    let linkage = format!("{{{a}-{b}-{c}-{d}-{}}}", &hex[20..]);
    let utf16 =
        |text: &str| -> Vec<u8> { text.encode_utf16().flat_map(u16::to_le_bytes).collect() };
    let mut locator = guid("B04AEFB7-D19E-4A81-B789-25B8E9445913").to_vec();
    locator.extend([0, 0, 2, 0]);
    let mut texts = Vec::new();
    for (key, value) in [
        ("parent_linkage", linkage.as_str()),
        ("relative_path", path),
    ] {
        let (key, value) = (utf16(key), utf16(value));
        let at = 44 + texts.len() as u32;
        locator.extend(at.to_le_bytes());
        locator.extend((at + key.len() as u32).to_le_bytes());
        locator.extend((key.len() as u16).to_le_bytes());
        locator.extend((value.len() as u16).to_le_bytes());
        texts.extend([key, value].concat());
    }
    locator.extend(texts);
    let bytes = bench.bytes(name);
    let is_table = |at: &usize| bytes[*at..].starts_with(b"metadata");
    let table = (0..bytes.len()).step_by(1 << 20).find(is_table).unwrap();
    let count = bytes[table + 10];
    let entries = bytes[table + 32..].chunks_exact(32).take(count.into());
    let parameters = guid("CAA16737-FA36-4D43-B3B6-33F0AA44E76B");
    let entry = entries.into_iter().find(|entry| entry[..16] == parameters);
    let item = u32::from_le_bytes(entry.unwrap()[16..20].try_into().unwrap());
    bench.poke(name, table as u64 + u64::from(item) + 4, &[2]);
    let place = 512_u32 << 10;
    let mut entry = guid("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C").to_vec();
    entry.extend(place.to_le_bytes());
    entry.extend((locator.len() as u32).to_le_bytes());
    entry.extend(4_u32.to_le_bytes());
    bench.poke(name, (table + 32 + 32 * usize::from(count)) as u64, &entry);
    bench.poke(name, table as u64 + 10, &[count + 1]);
    bench.poke(name, table as u64 + u64::from(place), &locator);
}

/// A VHDX is never changed, so its parent is named anew each time; messages recommend nothing else.
#[test]
fn the_moved_parent_of_a_vhdx_is_named_each_time() {
    if !has_qemu("the_moved_parent_of_a_vhdx_is_named_each_time") {
        return;
    }
    let bench = Bench::new();
    for folder in ["old", "new", "vm"] {
        std::fs::create_dir(bench.path(folder)).unwrap();
    }
    bench.sparse("raw", SIZE, &[(0, 70_000), (5 << 20, 300_000)], 1);
    bench.qemu("qemu-img convert -f raw -O vhdx raw old/base.vhdx");
    bench.qemu(&format!(
        "qemu-img create -q -f vhdx -o block_size=1M,block_state_zero=off vm/top.vhdx {SIZE}"
    ));
    make_child(&bench, "vm/top.vhdx", "old/base.vhdx", "..\\old\\base.vhdx");
    bench.good("compare --strict aio:raw vhdx:vm/top.vhdx");
    std::fs::rename(bench.path("old/base.vhdx"), bench.path("new/base.vhdx")).unwrap();
    let said = bench.bad(4, "convert vhdx:vm/top.vhdx aio:copy");
    assert!(said.contains("--parent-at PARENT"), "{said}");
    assert!(!said.contains("--moved"), "{said}");
    let before = bench.bytes("vm/top.vhdx");
    let line = "rebase vhdx:vm/top.vhdx --moved --parent vhdx:new/base.vhdx";
    let said = bench.bad(2, line);
    assert!(said.contains("--parent-at"), "{said}");
    assert!(bench.bytes("vm/top.vhdx") == before);
    for place in ["new", "new/base.vhdx"] {
        let line = format!("compare --strict aio:raw vhdx:vm/top.vhdx --parent-at {place}");
        bench.good(&line);
    }
    bench.good("convert vhdx:vm/top.vhdx qcow2:whole --parent-at new/base.vhdx");
    bench.good("compare --strict aio:raw qcow2:whole");
}
