// SPDX-License-Identifier: MIT OR Apache-2.0
//! One word of an image's metadata is wrong, and the disk still reads right for QEMU: then a repair keeps what it reads
//! as, and QEMU finds nothing wrong afterwards, or the repair has changed nothing.

use crate::bench::{has_qemu, places, qemu_name, Bench};

const SIZE: u64 = 3 << 20;
/// Mutations of each image, in the short run.
const SHORT: u64 = 12;
/// In the long one, unless `SEEDS` says how many.
const LONG: u64 = 1500;

/// A kind, what QEMU gets to make an image of it, and whether it has a snapshot.
const IMAGES: &[(&str, &str, bool)] = &[
    ("qcow2", "", false),
    ("qcow2", "-o cluster_size=512", false),
    ("qcow2", "-o cluster_size=4096", true),
    ("qcow2", "-o cluster_size=4096,refcount_bits=1", false),
    ("qcow2", "-o cluster_size=2048,refcount_bits=64", true),
    ("qcow2", "-o compat=0.10,cluster_size=4096", true),
    ("qcow2", "-o extended_l2=on,cluster_size=16384", false),
    ("qcow2", "-c -o cluster_size=4096", false),
    ("qcow", "", false),
    ("vhd", "", false),
    ("vmdk", "", false),
];

/// Numbers by chance.
struct MutationRng(u64);

impl MutationRng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, most: usize) -> usize {
        // CAST: less than `most`.
        (self.next() % most.max(1) as u64) as usize
    }
}

/// Results of the mutations.
#[derive(Debug, Default)]
struct MutationTally {
    read_right: u64,
    repaired: u64,
    unchanged: u64,
}

fn number(image: &[u8], at: usize) -> u64 {
    let bytes = image.get(at..at + 8);
    bytes.map_or(0, |bytes| u64::from_be_bytes(bytes.try_into().unwrap()))
}

/// Where the words of an image's metadata are.
fn words(kind: &str, image: &[u8]) -> Vec<usize> {
    if kind != "qcow2" {
        // Headers and tables are at the beginning, and a footer at the end.
        let head = (0..image.len().min(8192)).step_by(4);
        let foot = (image.len().saturating_sub(512)..image.len()).step_by(4);
        let used = |at: &usize| *at < 1024 || image[*at..*at + 4].iter().any(|byte| *byte != 0);
        return head.chain(foot).filter(used).collect();
    }
    let cluster = 1 << image[23];
    let (l1, reftable) = (number(image, 40) as usize, number(image, 48) as usize);
    let mut tables = vec![l1, reftable];
    for table in [l1, reftable] {
        let entries = (table..table + cluster).step_by(8);
        let leads = entries.map(|at| (number(image, at) & 0x00ff_ffff_ffff_fe00) as usize);
        tables.extend(leads.filter(|at| *at != 0));
    }
    // Each kind of word comes about as often as the others.
    let mut all: Vec<usize> = (4..112).step_by(4).collect();
    for table in tables {
        let used = |at: &usize| number(image, *at) != 0;
        let some = (table..table + cluster).step_by(8).filter(used);
        all.extend(some.take(64));
        all.extend([table, table + 8]);
    }
    all
}

fn mutate(chance: &mut MutationRng, kind: &str, image: &mut [u8], words: &[usize]) -> String {
    let at = words[chance.below(words.len())];
    let wide = kind == "qcow2" && at >= 112;
    let len = if wide { 8 } else { 4 };
    let old = image[at..at + len].to_vec();
    let cluster = 1_u64 << image[23].min(21);
    let new = match chance.below(6) {
        0 => 0,
        1 => number(image, at) ^ 1 << chance.below(64),
        // It leads to another cluster, as if that were its own.
        2 | 3 if wide => {
            let clusters = image.len() / cluster as usize;
            (chance.below(clusters) as u64 * cluster) | (number(image, at) & (1 << 63))
        }
        4 => number(image, words[chance.below(words.len())]),
        _ => number(image, at).wrapping_add(1 << chance.below(20)),
    };
    let new = new.to_be_bytes();
    match wide {
        true => image[at..at + 8].copy_from_slice(&new),
        false => image[at..at + 4].copy_from_slice(&new[..4]),
    }
    format!("{at:#x}: {old:02x?} became {:02x?}", &image[at..at + len])
}

/// A snapshot of an image as QEMU reads it, or the disk; nothing if it cannot be read.
fn content(bench: &Bench, kind: &str, snapshot: bool) -> Option<Vec<u8>> {
    let which = if snapshot { "-l snapshot.name=one" } else { "" };
    let _ = std::fs::remove_file(bench.path("read"));
    let format = qemu_name(kind);
    let line = format!("timeout 20 qemu-img convert -q {which} -f {format} -O raw a read");
    bench.try_qemu(&line).then(|| bench.bytes("read"))
}

fn mutations(count: u64) -> Vec<MutationTally> {
    let first: u64 = std::env::var("SEED").map_or(1, |seed| seed.parse().unwrap());
    let count = std::env::var("SEEDS").map_or(count, |seeds| seeds.parse().unwrap());
    let mut tallies = Vec::new();
    for (kind, how, has_snapshot) in IMAGES {
        let bench = Bench::new();
        bench.sparse("raw", SIZE, &places(5, SIZE, 9), 5);
        let format = qemu_name(kind);
        bench.qemu(&format!("qemu-img convert -f raw -O {format} {how} raw a"));
        if *has_snapshot {
            bench.qemu("qemu-img snapshot -c one a");
            bench.qemu_write("a", "write -q -P 9 1M 100k");
        }
        let sound = bench.bytes("a");
        let words = words(kind, &sound);
        let disk = content(&bench, kind, false).unwrap();
        let snapshot = has_snapshot.then(|| content(&bench, kind, true).unwrap());
        let mut tally = MutationTally::default();
        for seed in first..first + count {
            let mut chance = MutationRng(seed << 8);
            let mut damaged = sound.clone();
            let what = mutate(&mut chance, kind, &mut damaged, &words);
            let what = format!("{kind} {how}, SEED={seed}: {what}");
            std::fs::write(bench.path("a"), &damaged).unwrap();
            if content(&bench, kind, false).as_ref() != Some(&disk) {
                continue;
            }
            tally.read_right += 1;
            let kept = snapshot
                .as_ref()
                .filter(|_| content(&bench, kind, true) == snapshot);
            let said = bench.run(&format!("check --repair {kind}:a"));
            assert!(
                matches!(said.status, Some(0 | 1 | 2 | 4 | 6)),
                "{what}: {said:?}"
            );
            if bench.bytes("a") == damaged {
                tally.unchanged += 1;
                continue;
            }
            tally.repaired += 1;
            assert_eq!(said.status, Some(0), "{what}: {said:?}");
            assert!(
                content(&bench, kind, false).as_ref() == Some(&disk),
                "{what}: {said:?}"
            );
            if let Some(kept) = kept {
                assert!(
                    content(&bench, kind, true).as_ref() == Some(kept),
                    "{what}: {said:?}"
                );
            }
            let checked = bench.try_qemu("timeout 60 qemu-img check -q -f qcow2 a");
            assert!(checked, "{what}: {said:?}");
        }
        println!("{kind} {how}: {tally:?} of {count}");
        tallies.push(tally);
    }
    tallies
}

#[test]
fn a_repair_keeps_what_can_be_read() {
    if has_qemu("a_repair_keeps_what_can_be_read") {
        let repaired: u64 = mutations(SHORT).iter().map(|tally| tally.repaired).sum();
        assert!(repaired > 0, "nothing was repaired");
    }
}

/// The long run: `cargo test -p tapimg --test tool -- --ignored mutations`.
#[test]
#[ignore = "it takes an hour"]
fn a_repair_keeps_what_can_be_read_in_the_long_run() {
    if has_qemu("a_repair_keeps_what_can_be_read_in_the_long_run") {
        let tallies = mutations(LONG);
        let repaired: u64 = tallies.iter().map(|tally| tally.repaired).sum();
        assert!(repaired > 0, "nothing was repaired: {tallies:?}");
    }
}
