// SPDX-License-Identifier: MIT OR Apache-2.0
//! Snapshots of ESXi: COWD and seSparse over a parent. No other program makes them, so the tests do; QEMU reads them.

use crate::bench::{has_qemu, noise, Bench};

const SECTOR: usize = 512;
/// Sectors of the disk: two tables of COWD with grains of a sector, and a part of a third.
const SECTORS: usize = 2 * 4096 + 1000;
/// Entries of a table.
const ENTRIES: usize = 4096;

fn put(bytes: &mut Vec<u8>, at: usize, value: &[u8]) {
    if bytes.len() < at + value.len() {
        bytes.resize((at + value.len()).next_multiple_of(SECTOR), 0);
    }
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// A grain of a child: its number, and its content if it is not zeroes.
type Grain = (usize, Option<u64>);

/// Puts `grains` of `len` bytes into a model of the disk.
fn apply(model: &mut [u8], grains: &[Grain], len: usize) {
    for (number, seed) in grains {
        let at = number * len;
        let end = (at + len).min(model.len());
        match seed {
            Some(seed) => model[at..end].copy_from_slice(&noise(*seed, len)[..end - at]),
            None => model[at..end].fill(0),
        }
    }
}

/// A COWD file with these grains of a sector.
fn cowd(sectors: usize, grains: &[Grain]) -> Vec<u8> {
    let tables = sectors.div_ceil(ENTRIES);
    let mut bytes = vec![0; 2048];
    let words = [1, 3, sectors as u32, 1, 4, tables as u32];
    put(&mut bytes, 0, b"COWD");
    for (number, word) in words.into_iter().enumerate() {
        put(&mut bytes, 4 + number * 4, &word.to_le_bytes());
    }
    put(&mut bytes, 2048, &vec![0; tables * 4]);
    for (number, seed) in grains {
        let entry = 2048 + number / ENTRIES * 4;
        let mut table = u32::from_le_bytes(bytes[entry..entry + 4].try_into().unwrap());
        if table == 0 {
            table = (bytes.len() / SECTOR) as u32;
            put(&mut bytes, entry, &table.to_le_bytes());
            put(&mut bytes, table as usize * SECTOR, &vec![0; ENTRIES * 4]);
        }
        let at = bytes.len();
        put(&mut bytes, at, &noise(seed.unwrap(), SECTOR));
        let entry = table as usize * SECTOR + number % ENTRIES * 4;
        put(&mut bytes, entry, &((at / SECTOR) as u32).to_le_bytes());
    }
    bytes
}

/// A seSparse file with these grains of 4 KiB.
fn se_sparse(sectors: usize, grains: &[Grain]) -> Vec<u8> {
    let (directory, tables, first) = (8, 16, 16 + 64 * 3);
    let mut bytes = Vec::new();
    let words: [(usize, u64); 14] = [
        (0, 0xcafe_babe),
        (1, 0x2_0000_0001),
        (2, sectors as u64),
        (3, 8),
        (4, 64),
        (10, 1),
        (11, 1),
        (12, 2),
        (13, 2),
        (16, directory as u64),
        (17, 1),
        (18, tables as u64),
        (19, 64 * 3),
        (24, first as u64),
    ];
    for (number, word) in words {
        put(&mut bytes, number * 8, &word.to_le_bytes());
    }
    put(&mut bytes, SECTOR, &0xcafe_cafe_u64.to_le_bytes());
    put(&mut bytes, first * SECTOR - 1, &[0]);
    // The second table is the first one of the disk.
    put(
        &mut bytes,
        directory * SECTOR,
        &0x1000_0000_0000_0001_u64.to_le_bytes(),
    );
    for (place, (number, seed)) in grains.iter().enumerate() {
        let entry = match seed {
            Some(seed) => {
                put(
                    &mut bytes,
                    (first + place * 8) * SECTOR,
                    &noise(*seed, 4096),
                );
                0x3000_0000_0000_0000 | (place as u64 & 0xfff) << 48 | place as u64 >> 12
            }
            None if number % 2 == 0 => 0x1000_0000_0000_0000,
            None => 0x2000_0000_0000_0000_u64,
        };
        let at = (tables + 64) * SECTOR + number * 8;
        put(&mut bytes, at, &entry.to_le_bytes());
    }
    bytes
}

/// Makes `raw`, a disk of that many bytes, and `image`, a snapshot of ESXi with that content.
pub(crate) fn snapshot(bench: &Bench, size: u64, is_cowd: bool) {
    let sectors = size as usize / SECTOR;
    let grains = [(0, Some(1)), (500, Some(2)), (sectors / 8 - 1, Some(3))];
    let (kind, len, delta) = match is_cowd {
        true => (("vmfsSparse", "VMFSSPARSE"), SECTOR, cowd(sectors, &grains)),
        false => (("seSparse", "SESPARSE"), 4096, se_sparse(sectors, &grains)),
    };
    chain(bench, sectors, kind, (&grains, len), &delta);
    bench.shell("mv model raw && mv top.vmdk image");
}

/// Makes `model`, the disk, and `top.vmdk` over `base.vmdk` with its content in `delta.vmdk`.
fn chain(
    bench: &Bench,
    sectors: usize,
    kind: (&str, &str),
    (grains, len): (&[Grain], usize),
    delta: &[u8],
) {
    bench.sparse(
        "raw",
        (sectors * SECTOR) as u64,
        &[(0, 70_000), (3 << 20, 500_000)],
        7,
    );
    bench.good("convert aio:raw vmdk:base.vmdk");
    let mut model = bench.bytes("raw");
    apply(&mut model, grains, len);
    std::fs::write(bench.path("model"), model).unwrap();
    std::fs::write(bench.path("delta.vmdk"), delta).unwrap();
    let bytes = bench.bytes("base.vmdk");
    let text = String::from_utf8_lossy(&bytes[512..4096]).into_owned();
    let cid = &text.split("\nCID=").nth(1).unwrap()[..8];
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID=fffffffe\nparentCID={cid}\nisNativeSnapshot=\"no\"\n\
         createType=\"{}\"\nparentFileNameHint=\"base.vmdk\"\n# Extent description\nRW {sectors} {} \"delta.vmdk\"\n",
        kind.0, kind.1
    );
    std::fs::write(bench.path("top.vmdk"), text).unwrap();
}

#[test]
fn snapshots_of_esxi_are_read() {
    let sectors = [
        (0, Some(1)),
        (139, Some(2)),
        (4095, Some(3)),
        (4096, Some(4)),
        (9191, Some(5)),
    ];
    let grains = [
        (0, Some(1)),
        (5, None),
        (768, None),
        (800, Some(2)),
        (1148, Some(3)),
    ];
    for (kind, grains, len, delta) in [
        (
            ("vmfsSparse", "VMFSSPARSE"),
            &sectors,
            SECTOR,
            cowd(SECTORS, &sectors),
        ),
        (
            ("seSparse", "SESPARSE"),
            &grains,
            4096,
            se_sparse(SECTORS, &grains),
        ),
    ] {
        let bench = Bench::new();
        chain(&bench, SECTORS, kind, (grains, len), &delta);
        bench.good("compare --strict aio:model vmdk:top.vmdk");
        bench.good("convert vmdk:top.vmdk qcow2:copy");
        bench.good("compare --strict aio:model qcow2:copy");
        bench.good("check --data vmdk:top.vmdk");
        bench.good("create qcow2:child --parent vmdk:top.vmdk");
        bench.good("compare --strict aio:model qcow2:child");
        if has_qemu("snapshots_of_esxi_are_read") {
            bench.qemu("qemu-img compare -f raw -F vmdk model top.vmdk");
        }
    }
}

/// Nothing of a file counts that cannot be, and none makes the program fail otherwise than by a message.
#[test]
fn damaged_snapshots_of_esxi_are_refused() {
    let sectors = [(0, Some(1)), (5000, Some(2))];
    let grains = [(0, Some(1)), (800, Some(2))];
    for (kind, delta) in [
        (("vmfsSparse", "VMFSSPARSE"), cowd(SECTORS, &sectors)),
        (("seSparse", "SESPARSE"), se_sparse(SECTORS, &grains)),
    ] {
        let bench = Bench::new();
        chain(&bench, SECTORS, kind, (&[], 1), &delta);
        bench.good("convert vmdk:top.vmdk aio:copy");
        for at in [
            4, 12, 16, 20, 24, 32, 40, 80, 128, 136, 144, 152, 192, 512, 536, 2048, 4096,
        ] {
            for value in [u64::MAX, 1 << 62, 3] {
                let mut wrong = delta.clone();
                put(&mut wrong, at, &value.to_le_bytes());
                std::fs::write(bench.path("delta.vmdk"), wrong).unwrap();
                bench.run("convert vmdk:top.vmdk aio:copy --force");
            }
        }
        for lost in [1, delta.len() - 2049, delta.len() - 100] {
            std::fs::write(bench.path("delta.vmdk"), &delta[..delta.len() - lost]).unwrap();
            let said = bench.run("convert vmdk:top.vmdk aio:copy --force");
            assert_ne!(said.status, Some(0), "{lost} of {}: {said:?}", delta.len());
        }
        std::fs::write(bench.path("delta.vmdk"), &delta).unwrap();
    }
    // Changes that are in the journal only.
    let bench = Bench::new();
    chain(
        &bench,
        SECTORS,
        ("seSparse", "SESPARSE"),
        (&[], 1),
        &se_sparse(SECTORS, &grains),
    );
    bench.poke("delta.vmdk", 512 + 24, &[1]);
    let said = bench.bad(6, "convert vmdk:top.vmdk aio:copy");
    assert!(said.contains("was not closed"), "{said}");
}
