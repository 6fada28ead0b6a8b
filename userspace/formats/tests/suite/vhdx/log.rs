// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images that were not closed: what their log has is shown as if it had been replayed, which QEMU does.

use super::build::{
    self, header, log, open_log, seal, seal_in, BuiltEntry, ImagePlan, LogChange, BAT, HEADERS,
    LOG, LOG_GUID, METADATA, MIB, MISSING, PRESENT, SECTOR, UNMAPPED, ZERO,
};
use super::oracle;
use crate::common::tools::{command, content, file, folder, has_qemu, text, tool};
use crate::common::{run, SeededRng, SparseContent, World};
use diskio::Runtime;
use formats::vhdx::unreplayed;
use seeds::Seeds;
use std::fs;
use std::path::{Path, PathBuf};

/// Returns the content that QEMU shows after it has replayed the log, in a copy.
fn replayed(path: &Path, folder: &Path) -> Vec<u8> {
    let copy: PathBuf = folder.join("copy.vhdx");
    fs::copy(path, &copy).unwrap();
    let args = ["check", "-q", "-T", "unsafe", "-f", "vhdx", "-r", "all"];
    tool("qemu-img", &[&args[..], &[text(&copy)]].concat());
    content("vhdx", &copy, folder)
}

/// Lets QEMU write to an image whose table fails, so that the log stays.
fn write_and_fail(path: &Path, line: &str) {
    // The table is behind a log of one MiB, and all of it that is used is in its first sectors.
    let image = format!(
        r#"json:{{"driver":"vhdx","file":{{"driver":"blkdebug","image":{{"driver":"file","filename":"{}"}},
        "inject-error":[{{"event":"none","iotype":"write","sector":{}}}]}}}}"#,
        text(path),
        2 * MIB / 512
    );
    let said = command("qemu-io", &["-c", line, &image]).output().unwrap();
    let said =
        String::from_utf8_lossy(&said.stdout).into_owned() + &String::from_utf8_lossy(&said.stderr);
    assert!(said.contains("write failed"), "{said}");
}

#[test]
fn a_log_that_qemu_left_is_replayed() {
    if !has_qemu("a_log_that_qemu_left_is_replayed") {
        return;
    }
    for seed in Seeds::few(4) {
        let folder = folder();
        let path = folder.path().join("a.vhdx");
        let size = 24 * MIB + 512;
        oracle::create(&path, "subformat=dynamic,block_size=2M", size);
        let mut chance = SeededRng(seed);
        let mut model = vec![0; size as usize];
        // Into the first blocks, so that the last are new.
        oracle::scribble(&path, &mut model[..12 << 20], &mut chance, 6);
        let (at, len) = (14 * MIB + 4096 * chance.below(200), 65536);
        write_and_fail(&path, &format!("write -P 99 {at} {len}"));
        model[at as usize..][..len].fill(99);
        let before = fs::read(&path).unwrap();
        assert!(oracle::read(&path) == model, "seed {seed}");
        assert!(replayed(&path, folder.path()) == model, "seed {seed}: QEMU");
        assert!(fs::read(&path).unwrap() == before, "it was written");
        let runtime = Runtime::new();
        let io = runtime.io.clone();
        let work = async move { unreplayed(&file(&io, &path, false)).await };
        assert!(runtime.block_on(work).unwrap().unwrap() > 0);
    }
}

/// An image with blocks, and how many it has.
fn base(chance: &mut SeededRng) -> (ImagePlan, SparseContent) {
    let plan = ImagePlan::new(9 * MIB - 512 * chance.below(2000));
    let mut image = plan.image();
    for block in 0..plan.blocks() {
        let state = [PRESENT, PRESENT, MISSING, ZERO, UNMAPPED][chance.below(5) as usize];
        let bytes: Vec<u8> = (0..MIB).map(|at| (at >> 12) as u8 ^ block as u8).collect();
        plan.put(&mut image, block, state, &bytes);
    }
    // Blocks that the table does not lead to yet.
    let at = image.len;
    image.write(at, &vec![0xcc; 2 * MIB as usize]);
    (plan, image)
}

/// The sector of the table, with another entry.
fn changed_table(plan: &ImagePlan, image: &SparseContent, chance: &mut SeededRng) -> Vec<u8> {
    let mut table = vec![0; SECTOR];
    image.read(BAT, &mut table);
    let entry = match chance.below(4) {
        0 => ZERO,
        1 => MISSING,
        _ => (image.len - MIB * (1 + chance.below(2))) | PRESENT,
    };
    let at = (plan.entry(chance.below(plan.blocks())) - BAT) as usize;
    table[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    table
}

/// Changes by chance, to the table and to blocks; `image` has those that were before.
fn changes(
    plan: &ImagePlan,
    image: &mut SparseContent,
    chance: &mut SeededRng,
    count: u64,
) -> Vec<LogChange> {
    let mut all = Vec::new();
    for _ in 0..count {
        let sectors = (image.len - plan.first()) / SECTOR as u64;
        let at = plan.first() + chance.below(sectors) * SECTOR as u64;
        let change = match chance.below(12) {
            0..4 => LogChange::Data(BAT, changed_table(plan, image, chance)),
            4 => {
                let most = (image.len - at).min(40 << 12);
                LogChange::Zero(at, chance.below(most / 4096 + 1) * 4096)
            }
            5 if chance.below(8) == 0 => LogChange::Zero(BAT, 4096),
            _ => {
                let bytes = (0..SECTOR).map(|_| chance.next() as u8).collect();
                LogChange::Data(at, bytes)
            }
        };
        change.apply(image);
        all.push(change);
    }
    all
}

/// An image with a log by chance, as it is and as it is to be, and whether QEMU replays that.
fn logged(chance: &mut SeededRng) -> (SparseContent, SparseContent, bool) {
    let (plan, mut image) = base(chance);
    let mut wanted = image.clone();
    let first = chance.below(256) * SECTOR as u64;
    let (mut at, mut sequence) = (first, 8 + chance.below(1 << 40));
    if chance.below(2) == 0 {
        // Older entries, none of which counts any more.
        let place = (first + 128 * 4096) % MIB;
        let old = entry(
            &image,
            sequence - 7,
            place,
            vec![LogChange::Zero(plan.first(), MIB)],
        );
        log(&mut image, place, &old.bytes());
    }
    // QEMU takes entries that begin again at the beginning of the ring for a sequence of its own, and reads all sectors
    // with descriptors to the same place. QEMU itself makes no such entries.
    let mut is_judge = true;
    for number in 0..1 + chance.below(4) {
        // More than one sector of descriptors, now and then.
        let count = match chance.below(4) {
            0 => chance.below(2),
            1 if number == 0 => 127 + chance.below(20),
            _ => chance.below(15),
        };
        let changes = changes(&plan, &mut wanted, chance, count);
        is_judge &= changes.len() <= 126 && (number == 0 || at > first);
        let next = entry(&image, sequence, first, changes);
        at = log(&mut image, at, &next.bytes());
        sequence += 1;
    }
    let rubbish: Vec<u8> = (0..SECTOR).map(|_| chance.next() as u8).collect();
    log(&mut image, at, &rubbish);
    open_log(&mut image);
    (image, wanted, is_judge)
}

/// By chance, beside a model and beside QEMU: entries of all sizes, anywhere in the ring, over its end, with older ones
/// and rubbish around them.
#[test]
fn logs_are_replayed_as_qemu_does() {
    let has_qemu = has_qemu("logs_are_replayed_as_qemu_does");
    let mut judged = 0;
    for seed in Seeds::few(12) {
        let (image, wanted, is_judge) = logged(&mut SeededRng(seed));
        let wanted = build::read(wanted, None).unwrap();
        let found = build::read(image.clone(), None).unwrap();
        assert!(found == wanted, "seed {seed}");
        if has_qemu {
            let folder = folder();
            let path = folder.path().join("a.vhdx");
            fs::write(&path, image.to_vec()).unwrap();
            assert!(oracle::read(&path) == wanted, "seed {seed}: from a file");
            if is_judge {
                judged += 1;
                let theirs = replayed(&path, folder.path());
                assert!(theirs == wanted, "seed {seed}: QEMU");
            }
        }
    }
    println!("QEMU was asked about {judged}");
}

fn sector(byte: u8) -> Vec<u8> {
    (0..SECTOR).map(|at| byte ^ at as u8).collect()
}

/// Makes a disk with one allocated block.
fn one_block() -> (ImagePlan, SparseContent) {
    let plan = ImagePlan::new(MIB);
    let mut image = plan.image();
    plan.put(&mut image, 0, PRESENT, &[1; MIB as usize]);
    (plan, image)
}

fn entry(image: &SparseContent, sequence: u64, tail: u64, changes: Vec<LogChange>) -> BuiltEntry {
    BuiltEntry {
        sequence,
        tail,
        flushed: image.len,
        last: image.len,
        changes,
    }
}

/// A change that has reached its place is not replayed, because the block may have another use now.
#[test]
fn what_the_newest_entry_leaves_behind_does_not_count() {
    let (plan, mut image) = one_block();
    let old = entry(&image, 4, 0, vec![LogChange::Data(plan.first(), sector(4))]);
    let next = log(&mut image, 0, &old.bytes());
    let new = entry(
        &image,
        5,
        next,
        vec![LogChange::Data(plan.first() + 4096, sector(5))],
    );
    log(&mut image, next, &new.bytes());
    open_log(&mut image);
    let found = build::read(image, None).unwrap();
    assert!(found[..4096].iter().all(|byte| *byte == 1));
    assert!(found[4096..8192] == sector(5));
}

/// A power cut may happen in the middle of an entry, and between the growth of the file and the entry.
#[test]
fn what_was_not_written_as_a_whole_does_not_count() {
    let (plan, mut image) = one_block();
    let place = plan.first();
    let first = entry(&image, 4, 0, vec![LogChange::Data(place, sector(4))]);
    let next = log(&mut image, 0, &first.bytes());
    let second = entry(&image, 5, 0, vec![LogChange::Data(place, sector(5))]);
    let bytes = second.bytes();
    for torn in (0..bytes.len()).step_by(SECTOR) {
        let mut image = image.clone();
        let mut bytes = bytes.clone();
        bytes[torn..torn + SECTOR].fill(0);
        log(&mut image, next, &bytes);
        open_log(&mut image);
        let found = build::read(image, None).unwrap();
        assert!(found[..4096] == sector(4), "{torn}");
    }
    log(&mut image, next, &bytes);
    open_log(&mut image);
    assert!(build::read(image, None).unwrap()[..4096] == sector(5));
}

#[test]
fn a_file_becomes_as_long_as_its_log_says() {
    let (plan, mut image) = one_block();
    let begin = image.len;
    let mut table = vec![0; SECTOR];
    table[..8].copy_from_slice(&(begin | PRESENT).to_le_bytes());
    let longer = BuiltEntry {
        last: begin + MIB,
        ..entry(&image, 1, 0, vec![LogChange::Data(BAT, table.clone())])
    };
    log(&mut image, 0, &longer.bytes());
    open_log(&mut image);
    let found = build::read(image.clone(), None).unwrap();
    assert!(found.iter().all(|byte| *byte == 0));
    // Too short for the block, which then is an error and not zeroes.
    let shorter = entry(&image, 1, 0, vec![LogChange::Data(BAT, table)]);
    log(&mut image, 0, &shorter.bytes());
    let failure = build::read(image.clone(), None).unwrap_err();
    assert!(failure.contains("cannot be read"), "{failure}");
    // And the file that the log speaks of was longer.
    let cut = BuiltEntry {
        flushed: image.len + MIB,
        ..shorter
    };
    log(&mut image, 0, &cut.bytes());
    let failure = build::read(image, None).unwrap_err();
    assert!(failure.contains("cut off"), "{failure}");
    assert!(plan.first() < begin);
}

/// Damages each field of an entry, and corrects the checksum where that would hide the damage.
#[test]
fn an_entry_with_a_wrong_field_is_none() {
    let (plan, image) = one_block();
    let changes = vec![
        LogChange::Data(plan.first(), sector(4)),
        LogChange::Zero(plan.first() + 4096, 4096),
    ];
    let good = entry(&image, 0x1_0000_0004, 0, changes).bytes();
    let refuse = |name: &str, edit: &dyn Fn(&mut Vec<u8>), is_sealed: bool| {
        let (mut image, mut bytes) = (image.clone(), good.clone());
        edit(&mut bytes);
        if is_sealed {
            seal(&mut bytes);
        }
        log(&mut image, 0, &bytes);
        open_log(&mut image);
        let failure = build::read(image, None).expect_err(name);
        assert!(failure.contains("was not closed"), "{name}: {failure}");
        assert!(failure.contains("image: "), "{name}: {failure}");
    };
    let set = |at: usize, value: u64, len: usize| {
        move |bytes: &mut Vec<u8>| bytes[at..at + len].copy_from_slice(&value.to_le_bytes()[..len])
    };
    refuse("signature", &set(0, 0, 4), true);
    refuse("checksum", &set(4, 7, 4), false);
    refuse("length 0", &set(8, 0, 4), true);
    refuse("odd length", &set(8, 8191, 4), true);
    refuse("long", &set(8, 1 << 31, 4), true);
    refuse("other length", &set(8, 4096, 4), true);
    refuse("odd tail", &set(12, 100, 4), true);
    refuse("tail elsewhere", &set(12, 8192, 4), true);
    refuse("tail outside", &set(12, MIB, 4), true);
    refuse("sequence 0", &set(16, 0, 8), true);
    refuse("other sequence", &set(16, 5, 8), true);
    refuse("more descriptors", &set(24, 3, 4), true);
    refuse("too many descriptors", &set(24, u64::MAX, 4), true);
    refuse("other log", &set(32, 0, 8), true);
    refuse("size without end", &set(56, u64::MAX, 8), true);
    refuse("kind of a descriptor", &set(64, 0, 4), true);
    refuse("place of a descriptor", &set(80, plan.first() + 1, 8), true);
    refuse("sequence of a descriptor", &set(88, 3, 8), true);
    refuse("length of zeroes", &set(104, 100, 8), true);
    refuse("signature of data", &set(4096, 0, 4), true);
    refuse("sequence of data", &set(4100, 0, 4), true);
    refuse("end of data", &set(8188, 9, 4), true);
    let mut empty = image.clone();
    open_log(&mut empty);
    assert!(build::read(empty, None).unwrap_err().contains("not closed"));
}

/// A log may change tables, but neither the structures that locate the log nor itself.
#[test]
fn a_log_that_changes_headers_or_itself_is_refused() {
    let (_, image) = one_block();
    for change in [
        LogChange::Data(0, sector(1)),
        LogChange::Data(HEADERS[1], sector(1)),
        LogChange::Zero(188 << 10, 8192),
        LogChange::Zero(MIB - 4096, 8192),
        LogChange::Data(LOG, sector(1)),
        LogChange::Zero(METADATA - 4096, 4096),
        LogChange::Zero(u64::MAX - 4095, 4096),
        LogChange::Zero(METADATA, u64::MAX - 4095),
    ] {
        let mut image = image.clone();
        let entry = entry(&image, 1, 0, vec![change.clone()]);
        log(&mut image, 0, &entry.bytes());
        open_log(&mut image);
        let failure = build::read(image, None).unwrap_err();
        assert!(failure.contains("log changes"), "{change:?}: {failure}");
    }
}

/// A log may change what says where everything is.
#[test]
fn tables_are_read_as_the_log_has_them() {
    let plan = ImagePlan::new(MIB);
    let mut image = plan.image();
    plan.put(&mut image, 0, PRESENT, &sector(9));
    let broken = image.clone();
    let mut good = vec![0; SECTOR];
    let changes = [192 << 10, 256 << 10, METADATA, METADATA + (64 << 10), BAT].map(|at| {
        broken.read(at, &mut good);
        image.write(at, &[0xff; SECTOR]);
        LogChange::Data(at, good.clone())
    });
    assert!(build::read(image.clone(), None).is_err());
    let entry = entry(&image, 1, 0, changes.to_vec());
    log(&mut image, 0, &entry.bytes());
    open_log(&mut image);
    assert!(build::read(image, None).unwrap()[..4096] == sector(9));
}

/// Fields of the header about the log.
#[test]
fn a_log_that_cannot_be_there_is_refused() {
    let (_, good) = one_block();
    for (at, value, len, why) in [
        (64, 1, 2, "version 1"),
        (68, 0, 4, "is not in the image"),
        (68, 9 << 20, 4, "is not in the image"),
        (68, 1000, 4, "multiples of 1 MiB"),
        (72, 0, 8, "multiples of 1 MiB"),
        (72, 4097, 8, "multiples of 1 MiB"),
        (72, 1 << 40, 8, "is not in the image"),
        (72, u64::MAX << 20, 8, "multiples of 1 MiB"),
    ] {
        let mut image = good.clone();
        let mut bytes = header(9, LOG_GUID);
        bytes[at..at + len].copy_from_slice(&u64::to_le_bytes(value)[..len]);
        image.write(HEADERS[0], &bytes);
        seal_in(&mut image, HEADERS[0], SECTOR);
        let failure = build::read(image, None).unwrap_err();
        assert!(failure.contains(why), "{at} {value}: {failure}");
    }
}

/// Entries that claim all of the log, one in each sector, and descriptors without end: neither takes long, nor much
/// memory.
#[test]
fn a_log_without_end_is_refused() {
    let (_, image) = one_block();
    let long = entry(&image, 1, 0, Vec::new());
    let mut bytes = long.bytes();
    bytes[8..12].copy_from_slice(&(MIB as u32).to_le_bytes());
    let mut overlapping = image.clone();
    for at in (0..MIB).step_by(SECTOR) {
        overlapping.write(LOG + at, &bytes);
    }
    open_log(&mut overlapping);
    let failure = build::read(overlapping, None).unwrap_err();
    assert!(failure.contains("lie over each other"), "{failure}");
    // A log of 64 MiB, behind the blocks, with one entry of many zeroes, each in another place.
    let mut image = image;
    let begin = image.len;
    let zeroes = (0..160_000).map(|at| LogChange::Zero(begin + (64 << 20) + at * 8192, 4096));
    let entry = entry(&image, 1, 0, zeroes.collect());
    image.write(begin, &entry.bytes());
    image.set_len(begin + (64 << 20));
    let mut bytes = header(9, LOG_GUID);
    bytes[68..72].copy_from_slice(&(64_u32 << 20).to_le_bytes());
    bytes[72..80].copy_from_slice(&begin.to_le_bytes());
    seal(&mut bytes);
    image.write(HEADERS[0], &bytes);
    let failure = build::read(image.clone(), None).unwrap_err();
    assert!(failure.contains("more than 131072 changes"), "{failure}");
    // A larger log is not read at all.
    bytes[68..72].copy_from_slice(&(65_u32 << 20).to_le_bytes());
    seal(&mut bytes);
    image.write(HEADERS[0], &bytes);
    image.set_len(begin + (65 << 20));
    let failure = build::read(image, None).unwrap_err();
    assert!(failure.contains("65 MiB"), "{failure}");
}

/// Entries in the log mean that the image was not closed.
#[test]
fn changes_in_the_log_are_counted() {
    let (plan, mut image) = one_block();
    let file = World::new(vec![image.clone()]).file(0);
    assert_eq!(run(async move { unreplayed(&file).await }).unwrap(), 0);
    let entry = entry(&image, 1, 0, vec![LogChange::Zero(plan.first(), 8192)]);
    log(&mut image, 0, &entry.bytes());
    open_log(&mut image);
    let file = World::new(vec![image]).file(0);
    assert_eq!(run(async move { unreplayed(&file).await }).unwrap(), 1);
}
