// SPDX-License-Identifier: MIT OR Apache-2.0
//! Machines that other programs export as one file.

use crate::bench::{has_qemu, Bench};

const SIZE: u64 = 8 << 20;

/// Makes `a.ova` of `raw` and `second`, each as a streamOptimized VMDK, of which the first `disks` are inside.
fn ova(bench: &Bench, disks: usize) {
    bench.sparse("raw", SIZE, &[(0, 70_000), (5 << 20, 300_000)], 1);
    bench.sparse("second", SIZE, &[(1 << 20, 70_000)], 2);
    std::fs::write(bench.path("a.ovf"), "<Envelope/>").unwrap();
    let mut names = "a.ovf".to_string();
    for (from, to) in [("raw", "disk1.vmdk"), ("second", "disk2.vmdk")]
        .iter()
        .take(disks)
    {
        let line = "qemu-img convert -f raw -O vmdk -o subformat=streamOptimized";
        bench.qemu(&format!("{line} {from} {to}"));
        names = format!("{names} {to}");
    }
    bench.qemu(&format!("tar --format=ustar -cf a.ova {names}"));
}

#[test]
fn the_disk_in_an_ova_is_read() {
    if !has_qemu("the_disk_in_an_ova_is_read") {
        return;
    }
    let bench = Bench::new();
    ova(&bench, 1);
    std::fs::remove_file(bench.path("disk1.vmdk")).unwrap();
    bench.good("convert ova:a.ova qcow2:copy");
    bench.qemu("qemu-img compare -f raw -F qcow2 raw copy");
    bench.good("compare --strict aio:raw ova:a.ova");
    bench.good("map ova:a.ova");
    for line in [
        "info ova:a.ova",
        "check ova:a.ova",
        "create qcow2:b --parent ova:a.ova",
    ] {
        let said = bench.bad(2, line);
        assert!(said.contains("tapimg convert"), "{said}");
    }
    bench.bad(2, "convert aio:raw ova:b.ova");
    let whole = bench.bytes("a.ova");
    for len in [700, 2000, whole.len() / 3] {
        std::fs::write(bench.path("a.ova"), &whole[..len]).unwrap();
        bench.bad(6, "convert ova:a.ova aio:cut");
        assert!(!bench.path("cut").exists());
    }
    let said = bench.bad(6, "convert ova:raw aio:cut");
    assert!(said.contains("no OVA"), "{said}");
}

#[test]
fn one_of_several_disks_is_named() {
    if !has_qemu("one_of_several_disks_is_named") {
        return;
    }
    let bench = Bench::new();
    ova(&bench, 2);
    let said = bench.bad(6, "convert ova:a.ova aio:copy");
    assert!(
        said.contains("2 VMDKs") && said.contains("/a.ova/disk1.vmdk"),
        "{said}"
    );
    for (name, raw) in [("disk1.vmdk", "raw"), ("disk2.vmdk", "second")] {
        bench.good(&format!("compare --strict aio:{raw} ova:a.ova/{name}"));
    }
    let said = bench.bad(6, "convert ova:a.ova/disk3.vmdk aio:copy");
    assert!(said.contains("disk2.vmdk"), "{said}");
}
