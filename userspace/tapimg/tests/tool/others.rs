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
