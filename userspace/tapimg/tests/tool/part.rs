// SPDX-License-Identifier: MIT OR Apache-2.0
//! Copies and comparisons of the changed ranges of a disk, as increments of a backup need them.

use crate::bench::{places, Bench};
use std::fs;
use std::time::{Duration, Instant};

const SIZE: u64 = 24 << 20;
const MIB: u64 = 1 << 20;

/// A disk whose copy is `full.qcow2`, and that has changed at 3 and 9 MiB and become zeroes at 12.
fn changed() -> Bench {
    let bench = Bench::new();
    bench.sparse("disk", SIZE, &places(5, SIZE, 40), 5);
    bench.poke("disk", 12 * MIB, &[7; 70_000]);
    bench.good("convert aio:disk qcow2:full.qcow2");
    bench.poke("disk", 3 * MIB, &[1; 70_000]);
    bench.poke("disk", 9 * MIB + 512, &[2; 600]);
    bench.poke("disk", 12 * MIB, &[0; 70_000]);
    bench
}

#[test]
fn an_increment_has_the_changed_ranges_and_all_else_from_its_parent() {
    let bench = changed();
    let ranges = format!(
        "{} 131072\n{} 65536\n{} 131072\n",
        3 * MIB,
        9 * MIB,
        12 * MIB
    );
    fs::write(bench.path("ranges"), ranges).expect("write");
    let line = "convert aio:disk qcow2:new.qcow2 --parent qcow2:full.qcow2 --changed ranges";
    let copied = |line: &str| bench.json(line)["copied"].as_u64().expect("bytes");
    // The zeroes do not count.
    let plain = copied(line);
    assert!((70_600..4 << 16).contains(&plain), "{plain}");
    bench.good("compare --strict aio:disk qcow2:new.qcow2");
    let packed = copied(&format!("{line} --compress --force"));
    assert!((3 << 16..=4 << 16).contains(&packed), "{packed}");
    bench.good("compare --strict aio:disk qcow2:new.qcow2");
    bench.good(&format!("{line} --force"));
    bench.good("check --data qcow2:new.qcow2");
    assert!(fs::metadata(bench.path("new.qcow2")).expect("it").len() < 2 * MIB);
    // What no range names is not looked at.
    bench.poke("disk", 20 * MIB, &[9; 4096]);
    bench.good("compare aio:disk qcow2:new.qcow2 --changed ranges");
    bench.bad(1, "compare aio:disk qcow2:new.qcow2");
    bench.good(&format!("{line} --force"));
    bench.bad(1, "compare aio:disk qcow2:new.qcow2");
    bench.poke("disk", 9 * MIB + 1024, &[3]);
    bench.bad(1, "compare aio:disk qcow2:new.qcow2 --changed ranges");
}

#[test]
fn ranges_need_a_parent_and_lines_that_are_ranges() {
    let bench = changed();
    fs::write(bench.path("ranges"), "0 512\n").expect("write");
    let why = bench.bad(2, "convert aio:disk qcow2:new.qcow2 --changed ranges");
    assert!(why.contains("--parent"), "{why}");
    fs::write(bench.path("wrong"), "0 512\n0 512\n").expect("write");
    let why = bench.bad(
        2,
        "convert aio:disk qcow2:new.qcow2 --parent qcow2:full.qcow2 --changed wrong",
    );
    assert!(why.contains("line 2"), "{why}");
    assert!(!bench.path("new.qcow2").exists());
}

#[test]
fn a_rate_is_kept() {
    let bench = Bench::new();
    fs::write(bench.path("disk"), vec![1; 3 << 20]).expect("write");
    let begun = Instant::now();
    bench.good("convert aio:disk qcow2:new.qcow2 --rate 2");
    assert!(begun.elapsed() > Duration::from_millis(1400));
}

#[test]
fn work_for_a_program_that_has_ended_is_not_begun() {
    let bench = changed();
    bench.bad(6, "convert aio:disk qcow2:new.qcow2 --die-with 4194304");
    assert!(!bench.path("new.qcow2").exists());
    let own = std::process::id();
    bench.good(&format!(
        "convert aio:disk qcow2:new.qcow2 --die-with {own}"
    ));
}
