// SPDX-License-Identifier: MIT OR Apache-2.0
//! VHDs with a footer, a parent or entries that are not as they should be.

use crate::bench::{has_qemu, Bench};

/// Seals a footer: its checksum is that of all other bytes.
fn sealed(mut footer: Vec<u8>) -> Vec<u8> {
    footer[64..68].fill(0);
    let sum = footer
        .iter()
        .fold(0_u32, |sum, byte| sum + u32::from(*byte));
    footer[64..68].copy_from_slice(&(!sum).to_be_bytes());
    footer
}

#[test]
fn a_footer_that_is_damaged_or_missing_is_told() {
    let bench = Bench::new();
    bench.sparse("raw", 4 << 20, &[(0, 4 << 20)], 1);
    bench.good("convert aio:raw vhd:good");
    bench.good("check vhd:good");
    let good = bench.bytes("good");
    let end = good.len() - 512;
    let mut first = good.clone();
    first[100] ^= 1;
    let mut last = good.clone();
    last[end + 100] ^= 1;
    let none = good[..end].to_vec();
    // As when the size was being changed.
    let mut other = good.clone();
    other[end + 48..end + 56].copy_from_slice(&(6_u64 << 20).to_be_bytes());
    let footer = sealed(other[end..].to_vec());
    other[end..].copy_from_slice(&footer);
    for (bytes, why) in [
        (first, "at the beginning of the VHD is damaged"),
        (last, "at the end of the VHD is damaged"),
        (none, "no footer at the end"),
        (other, "are different"),
    ] {
        std::fs::write(bench.path("a"), &bytes).unwrap();
        let said = bench.bad(1, "check vhd:a");
        assert!(said.contains(why), "{said}");
        let found = bench.json("check vhd:a");
        assert_eq!(found["sound"], false, "{found}");
        let said = bench.named("vhd-util", "check -n a");
        assert_ne!(said.status, Some(0), "{said:?}");
        assert!(said.err.contains(why), "{said:?}");
        assert!(!said.err.contains("\\n"), "{said:?}");
        let said = bench.named("vhd-util", "check -i -n a");
        assert_eq!(said.status, Some(0), "{said:?}");
        // The other one is enough.
        bench.good("compare --strict aio:raw vhd:a");
        assert!(bench.bytes("a") == bytes, "it was written");
    }
}

#[test]
fn a_child_without_a_parent_is_an_error() {
    let bench = Bench::new();
    bench.good("create vhd:a 4M");
    let mut bytes = bench.bytes("a");
    let mut footer = bytes[..512].to_vec();
    footer[60..64].copy_from_slice(&4_u32.to_be_bytes());
    let footer = sealed(footer);
    let end = bytes.len() - 512;
    bytes[..512].copy_from_slice(&footer);
    bytes[end..].copy_from_slice(&footer);
    std::fs::write(bench.path("a"), bytes).unwrap();
    for line in ["query -p -n a", "query -d -n a", "scan -f a"] {
        let said = bench.named("vhd-util", line);
        assert_ne!(said.status, Some(0), "{line}: {said:?}");
        assert!(said.err.contains("does not name it"), "{line}: {said:?}");
    }
    let said = bench.named("vhd-util", "scan -f -c a");
    assert!(said.out.contains("scan-error="), "{said:?}");
}

/// Other programs have zeroes there, and no program ever reads them.
#[test]
fn entries_behind_the_end_of_the_disk_may_be_0() {
    let bench = Bench::new();
    bench.sparse("raw", 4 << 20, &[(0, 4 << 20)], 1);
    bench.good("convert aio:raw vhd:a --reserve 64M");
    let table = bench.peek("a", 512 + 16);
    let entries = bench.peek("a", 512 + 24) & 0xffff_ffff;
    assert_eq!(entries, 32);
    // Behind the last one there is nothing that looks like an entry.
    for at in (2..128).step_by(2) {
        assert_eq!(bench.peek("a", table + at * 4), u64::MAX, "{at}");
    }
    bench.poke("a", table + 8, &[0; 30 * 4]);
    bench.good("check vhd:a");
    bench.good("compare --strict aio:raw vhd:a");
    if has_qemu("entries_behind_the_end_of_the_disk_may_be_0") {
        bench.qemu("qemu-img compare -f raw -F vpc raw a");
    }
    bench.good("resize vhd:a 8M");
    bench.good("check --data vhd:a");
    bench.qemu("truncate -s 8M raw");
    bench.good("compare --strict aio:raw vhd:a");
    // One of the disk's own is damage.
    bench.poke("a", table, &[0; 4]);
    bench.bad(1, "check vhd:a");
}
