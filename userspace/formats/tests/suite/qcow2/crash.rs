// SPDX-License-Identifier: MIT OR Apache-2.0
//! A process may die, and power may fail, between any two writes to an image: answered changes are there after a death
//! and flushed ones after a power cut, and no read returns data that was never stored there.

use super::memory::{
    allowed, apply, exercise, read_all, sector, stamps, ImageEvent, ImageHistory, MemoryImage,
    MemoryRng,
};
use crate::common::tools::{command, folder, has_qemu, Pattern, PARENT_BACKING};
use diskio::Runtime;
use drivers::{Disk, Driver};
use formats::qcow2::{create, BackingImage, Qcow2, Qcow2Create};
use formats::{ImageParts, Options};
use seeds::Seeds;

pub(crate) const SECTORS: u64 = 640;
pub(crate) const SIZE: u64 = SECTORS * 512;
/// Number in all sectors of the backing image.
const BELOW: u32 = 0xbebebebe;
/// Sectors of the image below: fewer than the disk has.
const BELOW_SECTORS: u64 = 505;

/// Layout of an image, and whether it has a backing image.
#[derive(Clone, Debug)]
pub(crate) struct CrashCase {
    pub(crate) name: &'static str,
    pub(crate) plan: Qcow2Create,
    pub(crate) below: bool,
}

pub(crate) fn cases() -> Vec<CrashCase> {
    let plan = |cluster: u64| Qcow2Create {
        cluster,
        ..Qcow2Create::new(SIZE)
    };
    let case = |name, plan, below| CrashCase { name, plan, below };
    vec![
        case("alone", plan(4096), false),
        case("overlay", plan(4096), true),
        case("large clusters over an image", plan(65536), true),
        case(
            "subclusters",
            Qcow2Create {
                extended: true,
                ..plan(16384)
            },
            false,
        ),
        case(
            "subclusters over an image",
            Qcow2Create {
                extended: true,
                ..plan(16384)
            },
            true,
        ),
        case(
            "large subclusters over an image",
            Qcow2Create {
                extended: true,
                ..plan(65536)
            },
            true,
        ),
        case(
            "smallest clusters",
            Qcow2Create {
                refcount_bits: 64,
                ..plan(512)
            },
            true,
        ),
        case(
            "refcounts of one bit",
            Qcow2Create {
                refcount_bits: 1,
                ..plan(1024)
            },
            false,
        ),
        case(
            "version 2",
            Qcow2Create {
                version: 2,
                ..plan(4096)
            },
            true,
        ),
        case(
            "version 2 alone",
            Qcow2Create {
                version: 2,
                ..plan(4096)
            },
            false,
        ),
    ]
}

/// The image below.
pub(crate) fn below() -> Disk {
    let below = Disk::new(Pattern {
        size: BELOW_SECTORS * 512,
        number: |_| BELOW,
        sector: |number, _| sector(number),
    });
    below.set_backing(Some(PARENT_BACKING));
    below
}

pub(crate) fn parts<S>(case: &CrashCase) -> ImageParts<S> {
    ImageParts {
        parent: case.below.then(below),
        ..ImageParts::default()
    }
}

pub(crate) fn options(case: &CrashCase, writable: bool) -> Options {
    Options {
        writable,
        // Few slices, so that they come and go.
        cache: 1,
        ..Options::new(case.name)
    }
}

pub(crate) fn fresh(runtime: &Runtime, case: &CrashCase) -> Vec<u8> {
    let memory = MemoryImage::new(Vec::new(), 1, false);
    let mut plan = case.plan.clone();
    plan.backing = case.below.then(|| BackingImage {
        name: "below.img".into(),
        format: Some("raw".into()),
    });
    let file = memory.clone();
    let made = runtime.block_on(async move { create(&file, &plan).await });
    made.unwrap().unwrap();
    memory.bytes()
}

pub(crate) fn opened(
    runtime: &Runtime,
    memory: &MemoryImage,
    case: &CrashCase,
    writable: bool,
) -> Disk {
    let (parts, options) = (parts(case), options(case, writable));
    let disk = Disk::new(Qcow2::new(memory.clone(), parts, options));
    let its = disk.clone();
    let shape = runtime
        .block_on(async move { its.activate().await })
        .unwrap();
    // The disk may have grown.
    assert!(shape.unwrap().size >= SIZE);
    disk
}

/// Returns the disk of an image that may have leaked clusters, but no other fault.
pub(crate) fn checked(runtime: &Runtime, case: &CrashCase, bytes: Vec<u8>) -> Disk {
    let memory = MemoryImage::new(bytes, 1, false);
    let image = Qcow2::new(memory.clone(), parts(case), options(case, false));
    let found = runtime.block_on(async move {
        image.activate().await.unwrap();
        image.findings().await.unwrap()
    });
    let found = found.unwrap();
    assert_eq!(
        (found.unsafe_clusters, found.damaged),
        (0, 0),
        "{}: {found:?}",
        case.name
    );
    opened(runtime, &memory, case, false)
}

/// Returns the number in each sector of that disk.
fn content(runtime: &Runtime, case: &CrashCase, bytes: Vec<u8>) -> Vec<Option<u32>> {
    let disk = checked(runtime, case, bytes);
    let all = runtime.block_on(async move { read_all(&disk, SIZE).await });
    stamps(&all.unwrap().unwrap())
}

pub(crate) fn first(case: &CrashCase, sector: u64) -> u32 {
    match case.below && sector < BELOW_SECTORS {
        true => BELOW,
        false => 0,
    }
}

/// Checks the content after the death of the process at `now`.
fn judge_death(
    case: &CrashCase,
    history: &ImageHistory,
    now: usize,
    found: &[Option<u32>],
    seed: u64,
) {
    for (number, stamp) in found.iter().enumerate() {
        let number = number as u64;
        let its = history
            .changes
            .iter()
            .filter(|change| change.sectors.contains(&number));
        let begun = its.filter(|change| change.begun <= now);
        let may = allowed(
            first(case, number),
            begun.map(|change| (change, change.answered <= now)),
        );
        assert!(
            stamp.is_some_and(|stamp| may.contains(&stamp)),
            "{}, seed {seed}: after a death at {now} sector {number} has {stamp:x?}, not one of {may:x?}",
            case.name
        );
    }
}

/// Checks the content after a power cut at `now`.
fn judge_cut(
    case: &CrashCase,
    history: &ImageHistory,
    now: usize,
    found: &[Option<u32>],
    seed: u64,
) {
    let flushed = history
        .flushes
        .iter()
        .filter(|(_, answered)| *answered <= now);
    let flushed = flushed.map(|(begun, _)| *begun).max();
    for (number, stamp) in found.iter().enumerate() {
        let number = number as u64;
        let its = history
            .changes
            .iter()
            .filter(|change| change.sectors.contains(&number));
        let begun = its.filter(|change| change.begun <= now);
        let sure = |answered| flushed.is_some_and(|flushed| answered <= flushed);
        let may = allowed(
            first(case, number),
            begun.map(|change| (change, sure(change.answered))),
        );
        assert!(
            stamp.is_some_and(|stamp| may.contains(&stamp)),
            "{}, seed {seed}: after a power cut at {now} sector {number} has {stamp:x?}, not one of {may:x?}",
            case.name
        );
    }
}

/// Returns the image after a power cut: all flushed sectors, and any of the later ones.
fn cut(base: &[u8], log: &[ImageEvent], chance: &MemoryRng) -> Vec<u8> {
    let mut sure = 0;
    for (at, event) in log.iter().enumerate() {
        let ImageEvent::FlushEnd(number) = event else {
            continue;
        };
        let begin = log[..at]
            .iter()
            .position(|event| matches!(event, ImageEvent::FlushBegin(other) if other == number));
        sure = sure.max(begin.unwrap());
    }
    let mut bytes = base.to_vec();
    for event in &log[..sure] {
        apply(&mut bytes, event);
    }
    for event in &log[sure..] {
        match event {
            ImageEvent::Write(at, data) => {
                for (number, sector) in data.chunks(512).enumerate() {
                    if chance.below(2) == 0 {
                        apply(
                            &mut bytes,
                            &ImageEvent::Write(at + number as u64 * 512, sector.to_vec()),
                        );
                    }
                }
            }
            event if chance.below(2) == 0 => apply(&mut bytes, event),
            _ => {}
        }
    }
    bytes
}

/// Checks an image with QEMU: only leaked clusters are allowed, and these only if `leaks` is set.
fn check(bytes: &[u8], case: &CrashCase, leaks: bool, when: &str) {
    let folder = folder();
    let below = sector(BELOW).repeat(BELOW_SECTORS as usize);
    std::fs::write(folder.path().join("below.img"), below).unwrap();
    std::fs::write(folder.path().join("image"), bytes).unwrap();
    let args = ["check", "-f", "qcow2", "image"];
    let output = command("qemu-img", &args)
        .current_dir(folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    let is_right = match output.status.code() {
        Some(0) => true,
        Some(3) => leaks,
        _ => false,
    };
    assert!(is_right, "{}, {when}: {said}", case.name);
}

fn run(case: &CrashCase, seed: u64, steps: u64, has_qemu: bool) {
    let runtime = Runtime::new();
    let base = fresh(&runtime, case);
    let memory = MemoryImage::new(base.clone(), seed, true);
    let disk = opened(&runtime, &memory, case, true);
    let chance = MemoryRng::new(seed);
    let log = memory.clone();
    let history = exercise(&runtime, &disk, SECTORS, steps, &chance, move || log.now());
    let log = memory.log();
    let mut bytes = base.clone();
    let qemu = |bytes: &[u8], leaks, now: usize| {
        if has_qemu {
            check(bytes, case, leaks, &format!("seed {seed}, at {now}"));
        }
    };
    for now in 0..=log.len() {
        let found = content(&runtime, case, bytes.clone());
        judge_death(case, &history, now, &found, seed);
        if now % 211 == 0 || now == log.len() {
            qemu(&bytes, true, now);
        }
        if now % 7 == 0 {
            let bytes = cut(&base, &log[..now], &chance);
            judge_cut(
                case,
                &history,
                now,
                &content(&runtime, case, bytes.clone()),
                seed,
            );
            if now % 203 == 0 {
                qemu(&bytes, true, now);
            }
        }
        if let Some(event) = log.get(now) {
            apply(&mut bytes, event);
        }
    }
    // Closed, it has not even leaks.
    let expected = content(&runtime, case, memory.bytes());
    runtime
        .block_on(async move { disk.close().await })
        .unwrap()
        .unwrap();
    assert_eq!(content(&runtime, case, memory.bytes()), expected);
    qemu(&memory.bytes(), false, log.len());
}

#[test]
fn every_prefix_of_the_writes_is_an_image_that_shows_what_it_must() {
    let has_qemu = has_qemu("every_prefix_of_the_writes_is_an_image_that_shows_what_it_must");
    for case in cases() {
        for seed in Seeds::few(3) {
            run(&case, seed, 40, has_qemu);
        }
    }
}

/// The L1 table gets more clusters than a refcount block counts, and than the blocks count that one counts.
#[test]
fn every_prefix_of_a_large_growth_is_the_same_disk() {
    let has_qemu = has_qemu("every_prefix_of_a_large_growth_is_the_same_disk");
    for (refcount_bits, size) in [(16, 1 << 30), (64, 9 << 30)] {
        let case = CrashCase {
            name: "a large growth",
            plan: Qcow2Create {
                cluster: 512,
                refcount_bits,
                ..Qcow2Create::new(SIZE)
            },
            below: true,
        };
        let runtime = Runtime::new();
        let base = fresh(&runtime, &case);
        let expected = content(&runtime, &case, base.clone());
        let memory = MemoryImage::new(base.clone(), 1, true);
        let disk = opened(&runtime, &memory, &case, true);
        let work = async move {
            disk.grow(size).await.unwrap();
            disk.close().await.unwrap();
        };
        runtime.block_on(work).unwrap();
        let (log, chance) = (memory.log(), MemoryRng::new(1));
        let mut bytes = base.clone();
        for now in 0..=log.len() {
            if now % 3 == 0 || now == log.len() {
                assert_eq!(content(&runtime, &case, bytes.clone()), expected, "{now}");
                let cut = cut(&base, &log[..now], &chance);
                assert_eq!(content(&runtime, &case, cut.clone()), expected, "{now}");
                if has_qemu && now % 33 == 0 {
                    check(&cut, &case, true, &format!("at {now}"));
                }
            }
            if let Some(event) = log.get(now) {
                apply(&mut bytes, event);
            }
        }
        assert_eq!(bytes, memory.bytes());
        if has_qemu {
            check(&bytes, &case, false, "closed");
        }
        let disk = checked(&runtime, &case, bytes);
        let shape = runtime.block_on(async move { disk.activate().await });
        assert_eq!(shape.unwrap().unwrap().size, size);
    }
}

/// The test repeats writes that fail; all others must be there. A failed write may have taken effect or not, also in a
/// place that a table was to get.
#[test]
fn a_disk_without_room_loses_nothing() {
    let (mut failed, mut larger) = (0, [0; 2]);
    for case in cases() {
        for seed in Seeds::new(40) {
            let runtime = Runtime::new();
            let memory = MemoryImage::new(fresh(&runtime, &case), seed, true);
            let disk = opened(&runtime, &memory, &case, true);
            memory.fail(60);
            let chance = MemoryRng::new(seed);
            let log = memory.clone();
            let now = move || log.now();
            let mut history = exercise(&runtime, &disk, SECTORS, 30, &chance, now.clone());
            // Its L1 table has to go somewhere else for this.
            for more in [64 << 20, 128 << 20, 1 << 30] {
                let (its, size) = (disk.clone(), SIZE + more);
                let grown = runtime.block_on(async move { its.grow(size).await });
                larger[usize::from(grown.unwrap().is_ok())] += 1;
                let more = exercise(&runtime, &disk, SECTORS, 10, &chance, now.clone());
                history.changes.extend(more.changes);
                history.flushes.extend(more.flushes);
            }
            failed += history.failed();
            memory.fail(0);
            // The death of the process with it.
            drop(disk);
            let found = content(&runtime, &case, memory.bytes());
            judge_death(&case, &history, memory.now(), &found, seed);
            // The next process continues.
            let disk = opened(&runtime, &memory, &case, true);
            let bytes = diskio::Bytes::copied(&sector(9).repeat(SECTORS as usize)).unwrap();
            let again = disk.clone();
            let write = async move {
                again
                    .write(0, bytes, drivers::Attributes::default())
                    .await?;
                again.flush().await?;
                again.close().await
            };
            runtime.block_on(write).unwrap().unwrap();
            assert_eq!(
                content(&runtime, &case, memory.bytes()),
                vec![Some(9); SECTORS as usize]
            );
        }
    }
    assert!(failed > 0 && larger[0] > 0 && larger[1] > 0);
}

/// One write fills a subcluster and the beginning of the next one, while another one changes that one's end: the bytes
/// that the first one copies must not undo the second.
#[test]
fn a_write_does_not_undo_another_one_into_the_next_subcluster() {
    let case = CrashCase {
        name: "neighbours",
        plan: Qcow2Create {
            cluster: 65536,
            extended: true,
            ..Qcow2Create::new(SIZE)
        },
        below: false,
    };
    // Sectors of a subcluster.
    const PART: u64 = 4;
    for seed in Seeds::new(50) {
        let runtime = Runtime::new();
        let memory = MemoryImage::new(fresh(&runtime, &case), seed, true);
        let disk = opened(&runtime, &memory, &case, true);
        let write = |first: u64, count: u64, stamp| {
            let disk = disk.clone();
            let bytes = diskio::Bytes::copied(&sector(stamp).repeat(count as usize)).unwrap();
            async move {
                let how = drivers::Attributes::default();
                disk.write(first * 512, bytes, how).await.unwrap();
            }
        };
        // The second subcluster is there, the first one is not.
        runtime.block_on(write(PART, PART, 1)).unwrap();
        runtime.tasks.spawn(write(1, PART, 2));
        runtime.tasks.spawn(write(PART + 2, 2, 3));
        runtime.finish().unwrap();
        let found = content(&runtime, &case, memory.bytes());
        let expected = [0, 2, 2, 2, 2, 1, 3, 3].map(Some);
        assert_eq!(found[..8], expected, "seed {seed}");
    }
}
