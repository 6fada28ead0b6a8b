// SPDX-License-Identifier: MIT OR Apache-2.0
//! Hostile images: whatever their content, the driver does not panic, every loop ends, and it uses no more memory than
//! its budget.

use super::build::{
    self, guid, header, log, open_log, seal_in, BuiltEntry, ImagePlan, LogChange, BAT, HEADERS,
    ITEMS, LOG_GUID, METADATA, MIB, PARTLY, PRESENT, REGIONS, SECTOR,
};
use crate::common::tools::{parent, try_wrong};
use crate::common::{run, SeededRng, SparseContent, World};
use control::Code;
use diskio::{Bytes, Data, Errno};
use drivers::{Attributes, Disk};
use formats::vhdx::{look, Vhdx};
use formats::{ImageParts, Options};
use seeds::Seeds;

/// Makes a disk with some blocks and a log, and a parent if `has_parent` is set.
fn sound(has_parent: bool) -> (ImagePlan, SparseContent) {
    let plan = ImagePlan {
        parent: has_parent.then(|| {
            vec![
                (
                    "parent_linkage".into(),
                    "{83ed0ec3-24c8-49a6-a959-5e4bf1288bfb}".into(),
                ),
                ("relative_path".into(), ".\\base.vhdx".into()),
            ]
        }),
        ..ImagePlan::new(5 * MIB - 512)
    };
    let mut image = plan.image();
    for block in [0, 2, 3] {
        plan.put(
            &mut image,
            block,
            PRESENT,
            &vec![block as u8 + 1; MIB as usize],
        );
    }
    if has_parent {
        plan.put(&mut image, 1, PARTLY, &vec![9; MIB as usize]);
        plan.mark(&mut image, 1, &|sector| sector % 3 == 0);
    }
    let mut table = vec![0; SECTOR];
    image.read(BAT, &mut table);
    let entry = BuiltEntry {
        sequence: 5,
        tail: 0,
        flushed: image.len,
        last: image.len,
        changes: vec![
            LogChange::Data(BAT, table),
            LogChange::Zero(plan.first(), 8192),
            LogChange::Data(plan.first() + 4096, vec![3; SECTOR]),
        ],
    };
    log(&mut image, 0, &entry.bytes());
    open_log(&mut image);
    (plan, image)
}

fn reason(image: SparseContent) -> String {
    build::read(image, None).unwrap_err()
}

/// Corrects all checksums that may hide the change.
fn seal_all(image: &mut SparseContent) {
    for at in HEADERS {
        seal_in(image, at, SECTOR);
    }
    for at in REGIONS {
        seal_in(image, at, 64 << 10);
    }
    let mut head = vec![0; 12];
    image.read(build::LOG, &mut head);
    let len = u32::from_le_bytes([head[8], head[9], head[10], head[11]]) as usize;
    if (SECTOR..1 << 20).contains(&len) {
        seal_in(image, build::LOG, len);
    }
}

/// All fields, as ranges of bytes: those of the headers, of the tables, of the items, and of the log.
fn fields(has_parent: bool) -> Vec<(u64, usize)> {
    let mut all = vec![(0, 8)];
    for at in HEADERS {
        all.extend([(at, 4), (at + 8, 8), (at + 32, 16), (at + 48, 16)]);
        all.extend([(at + 64, 2), (at + 66, 2), (at + 68, 4), (at + 72, 8)]);
    }
    for at in REGIONS {
        all.extend([(at, 4), (at + 8, 4)]);
        for entry in [at + 16, at + 48, at + 80] {
            all.extend([
                (entry, 16),
                (entry + 16, 8),
                (entry + 24, 4),
                (entry + 28, 4),
            ]);
        }
    }
    all.extend([(METADATA, 8), (METADATA + 10, 2)]);
    for number in 0..7 {
        let entry = METADATA + 32 + number * 32;
        all.extend([
            (entry, 16),
            (entry + 16, 4),
            (entry + 20, 4),
            (entry + 24, 4),
        ]);
    }
    let items = METADATA + ITEMS;
    // Block size and flags, size, identity, sectors.
    all.extend([(items, 4), (items + 4, 4), (items + 8, 8), (items + 16, 16)]);
    all.extend([(items + 32, 4), (items + 36, 4)]);
    if has_parent {
        let locator = items + 40;
        all.extend([(locator, 16), (locator + 18, 2)]);
        for entry in [locator + 20, locator + 32] {
            all.extend([(entry, 4), (entry + 4, 4), (entry + 8, 2), (entry + 10, 2)]);
        }
        all.push((locator + 44, 8));
        // The entry of the bitmap.
        all.push((BAT + 4096 * 8, 8));
    }
    all.extend((0..6).map(|block| (BAT + block * 8, 8)));
    let log = build::LOG;
    all.extend([
        (log, 4),
        (log + 8, 4),
        (log + 12, 4),
        (log + 16, 8),
        (log + 24, 4),
    ]);
    all.extend([(log + 32, 16), (log + 48, 8), (log + 56, 8)]);
    for descriptor in [log + 64, log + 96, log + 128] {
        all.extend([(descriptor, 4), (descriptor + 8, 8), (descriptor + 16, 8)]);
        all.push((descriptor + 24, 8));
    }
    all.extend([(log + 4096, 4), (log + 4100, 4), (log + 8188, 4)]);
    all
}

fn open(has_parent: bool) -> impl Fn(&World) -> Disk {
    move |world| build::open(world, has_parent.then(parent))
}

/// Values that are the edge of something.
fn edges(length: u64) -> Vec<u64> {
    let mut all = vec![
        0,
        1,
        2,
        3,
        5,
        7,
        511,
        512,
        4095,
        4096,
        u64::MAX,
        u64::MAX - 7,
    ];
    for bit in [16, 20, 21, 28, 31, 32, 44, 46, 63] {
        all.extend([1 << bit, (1 << bit) - 1, (1 << bit) | 6, (1 << bit) | 7]);
    }
    all.extend([length, length - MIB, length | 6, (length - MIB) | 6]);
    all
}

/// Each field gets every boundary value: the result is an error or a disk that can be read.
#[test]
fn every_field_may_say_anything() {
    let (mut opened, mut tried) = (0, 0);
    for has_parent in [false, true] {
        let (_, good) = sound(has_parent);
        for (at, len) in fields(has_parent) {
            let step = if has_parent { 1 } else { 3 };
            for (number, value) in edges(good.len).into_iter().enumerate().step_by(step) {
                // Without its checksum little is ever looked at.
                for is_sealed in [true, false]
                    .into_iter()
                    .take(1 + usize::from(number % 8 == 0))
                {
                    let mut image = good.clone();
                    let bytes = [value.to_le_bytes(), value.to_le_bytes()].concat();
                    image.write(at, &bytes[..len]);
                    if is_sealed {
                        seal_all(&mut image);
                    }
                    tried += 1;
                    let seed = at ^ value;
                    opened += u64::from(try_wrong(vec![image], &open(has_parent), seed));
                }
            }
        }
    }
    println!("{opened} of {tried} were opened");
    assert!(
        opened > tried / 20 && opened < tried * 4 / 5,
        "{opened} of {tried}"
    );
}

/// Several fields at once, bytes anywhere in the tables, and files that are cut off.
#[test]
fn damaged_images_do_no_harm() {
    let mut opened = 0;
    let mut tried = 0;
    for has_parent in [false, true] {
        let (_, good) = sound(has_parent);
        let fields = fields(has_parent);
        for seed in Seeds::new(700) {
            let chance = &mut SeededRng(seed);
            let mut image = good.clone();
            for _ in 0..1 + chance.below(4) {
                let (at, len) = fields[chance.below(fields.len() as u64) as usize];
                let edges = edges(good.len);
                let value = match chance.below(3) {
                    0 => chance.next(),
                    1 => chance.next() >> chance.below(64),
                    _ => edges[chance.below(edges.len() as u64) as usize],
                };
                match chance.below(3) {
                    0 => image.write(at + chance.below(len as u64), &[chance.next() as u8]),
                    _ => {
                        let bytes = [value.to_le_bytes(), chance.next().to_le_bytes()].concat();
                        image.write(at, &bytes[..len]);
                    }
                }
            }
            if chance.below(8) == 0 {
                image.set_len(chance.below(good.len));
            }
            if chance.below(4) != 0 {
                seal_all(&mut image);
            }
            tried += 1;
            opened += u64::from(try_wrong(vec![image], &open(has_parent), seed));
        }
    }
    assert!(
        opened > tried / 50 && opened < tried * 9 / 10,
        "{opened} of {tried}"
    );
}

#[test]
fn a_file_that_is_no_vhdx_is_refused() {
    let text = b"vhdxfile".repeat(100_000);
    for bytes in [&b""[..], b"vhdxfile", &[0; 4096], &text] {
        let mut image = SparseContent::from(bytes);
        image.set_len(bytes.len() as u64);
        let failure = reason(image);
        assert!(failure.contains("VHDX"), "{failure}");
    }
    let (_, good) = sound(false);
    for len in [
        0,
        7,
        65536,
        70_000,
        150_000,
        200_000,
        300_000,
        MIB,
        2 * MIB,
        3 * MIB,
    ] {
        let mut image = good.clone();
        image.set_len(len);
        build::read(image, None).unwrap_err();
    }
}

/// A change of an image.
type Edit = Box<dyn Fn(&mut SparseContent)>;

/// A refusal says what is wrong, and names a feature that is unknown.
#[test]
fn refusals_say_what_is_wrong() {
    let plan = ImagePlan::new(5 * MIB - 512);
    let unknown = "12345678-9abc-def0-1234-56789abcdef0";
    let with = |edit: &dyn Fn(&mut SparseContent)| {
        let mut image = plan.image();
        edit(&mut image);
        seal_all(&mut image);
        build::read(image, None)
    };
    let region = |at: u64, len: u32, flags: u32| {
        let mut entry = guid(unknown).to_vec();
        entry.extend(at.to_le_bytes());
        entry.extend(len.to_le_bytes());
        entry.extend(flags.to_le_bytes());
        move |image: &mut SparseContent| {
            for table in REGIONS {
                image.write(table + 8, &[3]);
                image.write(table + 16 + 64, &entry);
            }
        }
    };
    let item = |flags: u8| {
        let mut entry = guid(unknown).to_vec();
        entry.extend((ITEMS as u32).to_le_bytes());
        entry.extend(8_u32.to_le_bytes());
        entry.extend([flags, 0, 0, 0, 0, 0, 0, 0]);
        move |image: &mut SparseContent| {
            image.write(METADATA + 10, &[6]);
            image.write(METADATA + 32 + 5 * 32, &entry);
        }
    };
    let both = |at: u64, bytes: &'static [u8]| {
        move |image: &mut SparseContent| {
            REGIONS
                .into_iter()
                .for_each(|table| image.write(table + at, bytes))
        }
    };
    let meta = |at: u64, bytes: &'static [u8]| {
        move |image: &mut SparseContent| image.write(METADATA + at, bytes)
    };
    let cases: Vec<(&str, Edit)> = vec![
        (
            "file identifier",
            Box::new(|image| image.write(0, b"conectix")),
        ),
        (
            "checksums of both headers",
            Box::new(|image| {
                HEADERS.into_iter().for_each(|at| image.write(at, b"HEAD"));
            }),
        ),
        (
            "version 2",
            Box::new(|image| {
                HEADERS
                    .into_iter()
                    .for_each(|at| image.write(at + 66, &[2]));
            }),
        ),
        (
            "say different things",
            Box::new(|image| {
                image.write(HEADERS[0] + 8, &[8]);
                image.write(HEADERS[0] + 32, b"other");
            }),
        ),
        ("tables of regions", Box::new(both(0, b"REGI"))),
        ("2048 entries", Box::new(both(8, &[0, 8]))),
        (unknown, Box::new(region(64 * MIB, MIB as u32, 1))),
        (unknown, Box::new(region(64 * MIB + 7, MIB as u32, 0))),
        (unknown, Box::new(region(0, MIB as u32, 0))),
        (unknown, Box::new(region(METADATA, MIB as u32, 0))),
        ("the log", Box::new(region(build::LOG, MIB as u32, 0))),
        ("no region of the metadata", Box::new(both(8, &[1]))),
        (
            "the metadata of the VHDX is there twice",
            Box::new(|image| {
                let mut entry = [0; 32];
                image.read(REGIONS[0] + 48, &mut entry);
                for table in REGIONS {
                    image.write(table + 8, &[3]);
                    image.write(table + 80, &entry);
                }
            }),
        ),
        (
            "virtual disk size twice",
            Box::new(|image| {
                let mut entry = [0; 32];
                image.read(METADATA + 64, &mut entry);
                image.write(METADATA + 10, &[6]);
                image.write(METADATA + 32 + 5 * 32, &entry);
            }),
        ),
        ("it is cut off", Box::new(both(16 + 20, &[9]))),
        ("there is no table", Box::new(meta(0, b"METADATA"))),
        ("2048 entries", Box::new(meta(10, &[0, 8]))),
        (unknown, Box::new(item(4))),
        (unknown, Box::new(item(7))),
        ("no physical sector size", Box::new(meta(10, &[4]))),
        (
            "no virtual disk id",
            Box::new(|image| {
                image.write(METADATA + 32 + 2 * 32, &[0]);
                image.write(METADATA + 32 + 2 * 32 + 24, &[0]);
            }),
        ),
        ("no parent locator", Box::new(meta(ITEMS + 4, &[2]))),
        (
            "virtual disk size cannot",
            Box::new(meta(32 + 32 + 16, &[0, 0, 0, 0])),
        ),
        (
            "virtual disk size cannot",
            Box::new(meta(32 + 32 + 16, &[0xff; 4])),
        ),
        (
            "virtual disk size of the VHDX has 7",
            Box::new(meta(32 + 32 + 20, &[7])),
        ),
        ("blocks of 3145728", Box::new(meta(ITEMS, &[0, 0, 0x30, 0]))),
        ("blocks of 524288", Box::new(meta(ITEMS, &[0, 0, 8, 0]))),
        (
            "blocks of 536870912",
            Box::new(meta(ITEMS, &[0, 0, 0, 0x20])),
        ),
        ("disk of 0 bytes", Box::new(meta(ITEMS + 8, &[0; 8]))),
        (
            "64 TiB",
            Box::new(meta(ITEMS + 8, &[0, 2, 0, 0, 0, 0x40, 0, 0])),
        ),
        ("whole sectors", Box::new(meta(ITEMS + 8, &[1]))),
        (
            "not enough for",
            Box::new(meta(ITEMS + 8, &[0, 0, 0, 0, 0, 1, 0, 0])),
        ),
        (
            "logical sector size of the VHDX is 1024",
            Box::new(meta(ITEMS + 32, &[0, 4])),
        ),
        (
            "physical sector size of the VHDX is 0",
            Box::new(meta(ITEMS + 36, &[0, 0])),
        ),
    ];
    for (why, edit) in cases {
        let failure = with(&*edit).map(drop).expect_err(why);
        assert!(failure.contains(why), "{why}: {failure}");
        assert!(failure.starts_with("image: "), "{failure}");
    }
    // Unknown features that are optional, and damage of one of two copies.
    let fine: [&dyn Fn(&mut SparseContent); 7] = [
        &|_| {},
        &region(64 * MIB, MIB as u32, 0),
        &item(0),
        &item(3),
        // The user's, which has the name of another one by chance.
        &|image| {
            let mut entry = vec![0; 32];
            image.read(METADATA + 32, &mut entry);
            entry[24] = 1;
            image.write(METADATA + 10, &[6]);
            image.write(METADATA + 32 + 5 * 32, &entry);
        },
        &|image| image.write(HEADERS[1], b"HEAD"),
        &|image| image.write(REGIONS[0], b"REGI"),
    ];
    for edit in fine {
        assert!(with(edit).unwrap().iter().all(|byte| *byte == 0));
    }
}

/// Of two headers the later one counts, wherever it is.
#[test]
fn the_header_that_counts_is_the_later_one() {
    let plan = ImagePlan::new(MIB);
    for (first, second) in [(3, 2), (2, 3)] {
        let mut image = plan.image();
        image.write(
            HEADERS[0],
            &header(first, if first > second { [0; 16] } else { LOG_GUID }),
        );
        image.write(
            HEADERS[1],
            &header(second, if first > second { LOG_GUID } else { [0; 16] }),
        );
        assert!(build::read(image, None).is_ok(), "{first} {second}");
    }
}

/// A structure that was cut off in a power cut has a wrong checksum, and its copy counts.
#[test]
fn what_has_a_wrong_checksum_does_not_count() {
    let plan = ImagePlan::new(MIB);
    let mut image = plan.image();
    // A header that would count, with a log, and another place for the table.
    let mut torn = header(99, LOG_GUID);
    torn[100] ^= 1;
    image.write(HEADERS[0], &torn);
    image.write(REGIONS[0] + 16 + 16, &(64 * MIB).to_le_bytes());
    assert!(build::read(image.clone(), None).is_ok());
    image.write(HEADERS[1] + 4095, &[1]);
    assert!(reason(image).contains("both headers"));
    let mut image = plan.image();
    for at in REGIONS {
        image.write(at + 65535, &[1]);
    }
    assert!(reason(image).contains("both tables of regions"));
}

/// The table leads to places where no block can be: their content is not the disk's.
#[test]
fn entries_that_cannot_be_are_errors() {
    let (plan, good) = sound(false);
    let length = good.len;
    for entry in [
        PRESENT,
        build::LOG | PRESENT,
        METADATA | PRESENT,
        BAT | PRESENT,
        length | PRESENT,
        (length - MIB + (1 << 19)) | PRESENT,
        (1 << 63) | PRESENT,
        !0xf_ffff | PRESENT,
        plan.first() | PRESENT | 8,
        plan.first() | PARTLY,
        4,
    ] {
        let mut image = good.clone();
        image.write(HEADERS[0], &header(9, [0; 16]));
        image.write(plan.entry(0), &entry.to_le_bytes());
        let disk = build::open(&World::new(vec![image]), None);
        run(async move {
            disk.activate().await.unwrap();
            let data = Data::zeroed(512).unwrap();
            assert_eq!(
                disk.read(0, data.clone()).await,
                Err(Errno::IO),
                "{entry:#x}"
            );
            assert!(disk.extents(0, 512).await.is_err(), "{entry:#x}");
            assert!(disk.read(2 * MIB, data).await.is_ok());
        });
    }
}

/// A disk without a parent has no sectors of one, whatever a bitmap claims.
#[test]
fn a_block_is_not_partly_there_without_a_parent() {
    let plan = ImagePlan::new(MIB);
    let mut image = plan.image();
    plan.put(&mut image, 0, PARTLY, &[1; MIB as usize]);
    plan.mark(&mut image, 0, &|_| true);
    assert!(reason(image).contains("cannot be read"));
}

/// The largest disk with the smallest blocks has a table of 512 MiB, little of which is kept in memory.
#[test]
fn a_large_table_takes_little_memory() {
    let plan = ImagePlan::new(64 << 40);
    let mut image = plan.image();
    let chance = &mut SeededRng(1);
    let mut blocks: Vec<u64> = (0..60).map(|_| chance.below(plan.blocks())).collect();
    blocks.push(plan.blocks() - 1);
    for (number, block) in blocks.iter().enumerate() {
        plan.put(&mut image, *block, PRESENT, &[number as u8 + 1; 512]);
    }
    let disk = build::open(&World::new(vec![image]), None);
    run(async move {
        assert_eq!(disk.activate().await.unwrap().size, 64 << 40);
        for (number, block) in blocks.iter().enumerate() {
            let data = Data::zeroed(512).unwrap();
            disk.read(block << 20, data.clone()).await.unwrap();
            assert_eq!(data.to_vec(), [number as u8 + 1; 512], "{block}");
            let used = disk.stats()["cache_bytes"];
            assert!(used <= 16 << 10, "{used} bytes of tables in memory");
        }
    });
}

/// Activation refuses a writable disk at once, and the message says how to write it after all.
#[test]
fn a_disk_that_may_be_written_is_refused() {
    let (_, image) = sound(false);
    let world = World::new(vec![image]);
    let writable = Vhdx::new(world.file(0), ImageParts::default(), Options::new("image"));
    let disk = build::open(&world, None);
    run(async move {
        let failure = Disk::new(writable).activate().await.unwrap_err();
        assert_eq!(failure.code, Code::Unsupported);
        for word in ["image: ", "read-only", "tapimg convert", "cow:"] {
            assert!(failure.message.contains(word), "{failure}");
        }
        disk.activate().await.unwrap();
        let how = Attributes::default();
        let bytes = Bytes::copied(&[7; 512]).unwrap();
        assert_eq!(disk.write(0, bytes, how).await, Err(Errno::ROFS));
        assert_eq!(disk.write_zeroes(0, 512, how).await, Err(Errno::ROFS));
        assert!(disk.discard(0, 512, how).await.is_err());
        disk.flush().await.unwrap();
        disk.inactivate().await.unwrap();
        let data = Data::zeroed(512).unwrap();
        assert_eq!(disk.read(0, data).await, Err(Errno::NXIO));
    });
    assert_eq!(world.changes(), 0);
}

/// A locator may have many entries, each of them long, that lie over each other.
#[test]
fn a_large_locator_is_looked_at_quickly() {
    let (_, mut image) = sound(true);
    image.write(HEADERS[0], &header(9, [0; 16]));
    let entry = METADATA + 32 + 5 * 32;
    image.write(entry + 16, &(66_u32 << 10).to_le_bytes());
    image.write(entry + 20, &(900_u32 << 10).to_le_bytes());
    let mut locator = guid("B04AEFB7-D19E-4A81-B789-25B8E9445913").to_vec();
    locator.extend([0, 0, 0xff, 0xff]);
    for _ in 0..0xffff {
        locator.extend(20_u32.to_le_bytes());
        locator.extend(20_u32.to_le_bytes());
        locator.extend([0xfe, 0xff, 0xfe, 0xff]);
    }
    image.write(METADATA + (66 << 10), &locator);
    let file = World::new(vec![image]).file(0);
    let failure = run(async move { look(&file).await }).unwrap_err();
    assert!(failure.message.contains("which content"), "{failure}");
}
