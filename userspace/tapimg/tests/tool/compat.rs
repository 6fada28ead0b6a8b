// SPDX-License-Identifier: MIT OR Apache-2.0
//! The program under the names of older ones.

use crate::bench::{has_qemu, places, Bench, ProgramOutput};
use crate::wrong::lock;
use diskio::LockKind;

const MIB: u64 = 1 << 20;

fn vhd_util(bench: &Bench, line: &str) -> ProgramOutput {
    bench.named("vhd-util", line)
}

/// Returns its output if it succeeds.
fn good(bench: &Bench, line: &str) -> String {
    let said = vhd_util(bench, line);
    assert_eq!(said.status, Some(0), "vhd-util {line}: {said:?}");
    said.out
}

/// A chain of three, as scripts of blktap make it: `a` below `b` below `c`, each with something of its own; `want`
/// is what `c` shows.
fn chain(bench: &Bench) {
    good(bench, "create --debug -n a -s 24");
    bench.sparse("1", 24 * MIB, &places(1, 24 * MIB, 10), 1);
    bench.good("convert aio:1 vhd:a --force");
    for (image, parent, seed) in [("b", "a", 6), ("c", "b", 10)] {
        good(bench, &format!("snapshot --debug -n {image} -p {parent}"));
        bench.sparse("want", 24 * MIB, &places(seed, 24 * MIB, 10), seed);
        bench.good(&format!(
            "convert aio:want vhd:{image} --force --parent vhd:{parent}"
        ));
    }
}

/// As in `vhd-util scan ... | head` and `vhd-util ... 2>&1 | head`.
#[test]
fn a_reader_that_has_gone_is_no_panic() {
    let bench = Bench::new();
    chain(&bench);
    // A panic is 101.
    let answered = bench.unread("vhd-util", "query --debug -v -n c");
    assert_eq!(answered, Some(0));
    let refused = bench.unread("vhd-util", "query --debug -v -n none");
    assert!(
        refused.is_some_and(|status| !matches!(status, 0 | 101)),
        "{refused:?}"
    );
}

#[test]
fn a_chain_is_made_and_asked_about() {
    let bench = Bench::new();
    chain(&bench);
    bench.good("compare --strict aio:want vhd:c");
    let path = |name: &str| bench.path(name).display().to_string();
    let query =
        |options: &str, name: &str| good(&bench, &format!("query --debug {options} -n {name}"));
    assert_eq!(query("-v", "c"), "24\n");
    assert_eq!(query("-p", "c"), format!("{}\n", path("b")));
    assert!(query("-p", "a").contains("has no parent"));
    assert_eq!(query("-d", "c"), "chain depth: 3\n");
    assert_eq!(query("-s", "c"), format!("{}\n", bench.bytes("c").len()));
    let blocks: u64 = query("-a", "c").trim().parse().unwrap();
    assert!((1..=12).contains(&blocks), "{blocks}");
    // In the order of the program, whatever that of the options.
    let all = format!(
        "24\n{}\n{}\nhidden: 0\nchain depth: 3\n",
        bench.bytes("c").len(),
        path("b")
    );
    assert_eq!(query("-dfpsv", "c"), all);
    for (value, said) in [(1, "hidden: 1\n"), (0, "hidden: 0\n"), (1, "hidden: 1\n")] {
        good(&bench, &format!("set --debug -n a -f hidden -v {value}"));
        assert_eq!(query("-f", "a"), said);
        assert_eq!(
            good(&bench, "check --debug -n a"),
            format!("{} is valid\n", path("a"))
        );
    }
    let wanted = |name: &str, hidden: u8, parent: &str| {
        format!(
            "vhd=./{name} capacity={} size={} hidden={hidden} parent={parent}",
            24 * MIB,
            bench.bytes(name).len()
        )
    };
    // A file that is no VHD ends the scan, or is reported.
    let said = vhd_util(&bench, "scan -f -m ./*");
    assert!(said.status == Some(22) && said.out.is_empty(), "{said:?}");
    let rows = good(&bench, "scan -f -c -m ./*");
    for row in [
        wanted("a", 1, "none"),
        wanted("b", 0, &path("a")),
        wanted("c", 0, &path("b")),
    ] {
        assert!(rows.lines().any(|line| line == row), "{row}: {rows}");
    }
    assert!(rows.contains("vhd=./want scan-error="), "{rows}");
    bench.good("compare --strict aio:want vhd:c");
}

#[test]
fn a_chain_becomes_shorter() {
    let bench = Bench::new();
    chain(&bench);
    let said = good(&bench, "coalesce --debug -n b");
    assert!(
        said.starts_with("Coalesced ") && !said.contains(" 0 "),
        "{said}"
    );
    good(&bench, "modify --debug -p a -n c");
    std::fs::remove_file(bench.path("b")).unwrap();
    assert_eq!(good(&bench, "query --debug -d -n c"), "chain depth: 2\n");
    bench.good("compare --strict aio:want vhd:c");
    good(&bench, "check --debug -n c");
    if has_qemu("a_chain_becomes_shorter") {
        // QEMU knows no chains of VHDs.
        good(&bench, "coalesce --debug -n c");
        bench.qemu("qemu-img compare -f raw -F vpc want a");
    }
}

#[test]
fn a_disk_becomes_larger_where_there_is_room() {
    let bench = Bench::new();
    good(&bench, "create --debug -n a -s 8 -S 4096");
    assert_eq!(good(&bench, "query -vS -n a"), "8\n4096\n");
    good(&bench, "resize --debug -s 64 -n a -f");
    good(&bench, "snapshot -n b -p a");
    assert_eq!(good(&bench, "query -vS -n b"), "64\n64\n");
    let said = vhd_util(&bench, "resize --debug -s 128 -n b -f");
    assert!(
        said.status == Some(22) && said.err.contains("leave -f out"),
        "{said:?}"
    );
    good(&bench, "resize --debug -s 128 -n b -j journal");
    assert_eq!(good(&bench, "query -v -n b"), "128\n");
    good(&bench, "create -n f -s 8 -r");
    assert_eq!(bench.bytes("f").len() as u64, 8 * MIB + 512);
    good(&bench, "set -n f -f hidden -v 1");
    assert_eq!(good(&bench, "query -f -n f"), "hidden: 1\n");
}

#[test]
fn errors_are_told_by_their_number() {
    let bench = Bench::new();
    bench.good("create aio:raw 8M");
    good(&bench, "snapshot -n a -p raw -m");
    for (line, number, why) in [
        ("query -v -n gone", 2, "cannot open the image"),
        ("query -v -n raw", 22, "there is no footer"),
        ("modify -p raw -n raw", 22, "raw"),
        ("snapshot -n b -p a -l 2", 22, "snapshot depth exceeded"),
        ("coalesce -n raw", 22, "there is no footer"),
        ("set -n a -f marker -v 1", 2, "hidden"),
    ] {
        let said = vhd_util(&bench, line);
        assert_eq!(said.status, Some(number), "{line}: {said:?}");
        assert!(said.err.contains(why), "{line}: {said:?}");
    }
    // No other process may be using the changed image.
    let _held = lock(&bench, "a", LockKind::Read);
    let said = vhd_util(&bench, "set -n a -f hidden -v 1");
    assert!(said.status == Some(16), "{said:?}");
    assert_eq!(good(&bench, "query -f -n a"), "hidden: 0\n");
}

#[test]
fn blktaps_tools_for_qcow_are_there() {
    let bench = Bench::new();
    let good = |program: &str, line: &str| {
        let said = bench.named(program, line);
        assert_eq!(said.status, Some(0), "{program} {line}: {said:?}");
    };
    bench.sparse("raw", 24 * MIB, &places(3, 24 * MIB, 10), 3);
    good("img2qcow", "a raw");
    bench.good("compare --strict aio:raw qcow:a");
    // A child of a raw image, which need not be named, and one of a qcow image, which must.
    good("qcow-create", "24 b raw");
    good("qcow-create", "-r -f qcow 24 c a");
    for (child, options) in [("b", ""), ("c", "-f qcow")] {
        good("qcow2raw", &format!("{options} out {child}"));
        bench.good("compare --strict aio:raw aio:out");
    }
    if has_qemu("blktaps_tools_for_qcow_are_there") {
        bench.qemu("qemu-img compare -f raw -F qcow raw a");
        let info = bench.qemu("qemu-img info -f qcow b");
        assert!(
            info.contains("virtual size: 24 MiB") && info.contains("backing file: "),
            "{info}"
        );
    }
    // A raw image is not searched for a header: the table of `a` is data then.
    good("qcow2raw", "out c");
    bench.bad(1, "compare aio:raw aio:out");
    for (program, line, number, why) in [
        ("img2qcow", "d gone", 2, "gone"),
        ("qcow2raw", "out raw", 22, "raw"),
        ("qcow-create", "1 a a", 22, "same file"),
        ("qcow-create", "18446744073709551615 d", 22, "too many"),
    ] {
        let said = bench.named(program, line);
        assert_eq!(said.status, Some(number), "{program} {line}: {said:?}");
        assert!(said.err.contains(why), "{program} {line}: {said:?}");
    }
    // An image that a guest has is not replaced.
    let _held = lock(&bench, "a", LockKind::Read);
    let said = bench.named("img2qcow", "a raw");
    assert_eq!(said.status, Some(16), "{said:?}");
}
