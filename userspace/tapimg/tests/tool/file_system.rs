// SPDX-License-Identifier: MIT OR Apache-2.0
//! A file system on a served disk: made there by an NBD client, and read back by another one. Neither needs root.

use crate::bench::{has_program, has_qemu, noise, Bench};
use crate::serve::ServedDisk;
use rustix::process::Signal;

/// Bytes of the disk.
const SIZE: u64 = 16 << 20;

/// Bytes of a file in it: several blocks, and a part of one.
const FILE: usize = 300_001;

/// Returns whether e2fsck finds nothing wrong with an image.
fn is_sound(bench: &Bench, image: &str) -> bool {
    let status = bench
        .command("e2fsck", "-fn")
        .arg(image)
        .output()
        .expect("e2fsck");
    status.status.code() == Some(0)
}

#[test]
fn an_ext4_file_system_is_whole_on_a_served_disk() {
    let test = "an_ext4_file_system_is_whole_on_a_served_disk";
    let has = |program: &str| has_program(test, program, "-V");
    if !has_qemu(test) || !["mkfs.ext4", "e2fsck", "debugfs"].into_iter().all(has) {
        return;
    }
    let bench = Bench::new();
    let content = noise(7, FILE);
    bench.shell("mkdir -p files/folder");
    std::fs::write(bench.path("files/folder/data"), &content).expect("written");
    bench.sparse("made", SIZE, &[], 1);
    bench.qemu("mkfs.ext4 -q -F -d files made");
    for kind in ["aio", "qcow2", "vhd"] {
        bench.good(&format!("create {kind}:a.{kind} {SIZE}"));
        let served = ServedDisk::new(&bench, &format!("--write {kind}:a.{kind} s"));
        bench.qemu(&format!(
            "qemu-img convert -n -f raw -O raw made {}",
            served.uri()
        ));
        assert_eq!(served.end(Signal::TERM), Some(0), "{kind}");
        // Another server, so that all is from the image.
        let served = ServedDisk::new(&bench, &format!("{kind}:a.{kind} s"));
        bench.qemu(&format!(
            "qemu-img convert -f raw -O raw {} back",
            served.uri()
        ));
        assert_eq!(served.end(Signal::TERM), Some(0), "{kind}");
        assert!(is_sound(&bench, "back"), "{kind}");
        let mut debugfs = bench.command("debugfs", "-R");
        let read = debugfs
            .args(["dump /folder/data data", "back"])
            .output()
            .expect("debugfs");
        assert!(read.status.success(), "{kind}: {read:?}");
        assert!(bench.bytes("data") == content, "{kind}: {read:?}");
        if kind != "aio" {
            bench.good(&format!("check {kind}:a.{kind}"));
        }
    }
    // e2fsck sees a lost write.
    bench.poke("back", 1024, &[0; 1024]);
    bench.poke("back", 8192, &noise(3, 64 << 10));
    assert!(!is_sound(&bench, "back"));
}
