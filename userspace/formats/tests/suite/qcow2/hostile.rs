// SPDX-License-Identifier: MIT OR Apache-2.0
//! Hostile images: whatever their content, the driver does not panic, every loop ends, and it uses no more memory than
//! its budget.

use super::memory::{read_all, sector, MemoryImage, MemoryRng};
use diskio::{Bytes, Runtime};
use drivers::{Attributes, Disk};
use formats::qcow2::{create, header, snapshots, Qcow2, Qcow2Create};
use formats::{ImageParts, Options};
use seeds::Seeds;

const SIZE: u64 = 1 << 20;

/// A sound image with some content.
fn sound(plan: Qcow2Create) -> Vec<u8> {
    let runtime = Runtime::new();
    let memory = MemoryImage::new(Vec::new(), 1, false);
    let its = memory.clone();
    runtime
        .block_on(async move { create(&its, &plan).await })
        .unwrap()
        .unwrap();
    let disk = Disk::new(Qcow2::new(
        memory.clone(),
        ImageParts::default(),
        Options::new("sound"),
    ));
    let fill = async move {
        disk.activate().await.unwrap();
        for number in 0..40 {
            let bytes = sector(number + 1).repeat(9);
            disk.write(
                u64::from(number) * 25 * 1024,
                Bytes::copied(&bytes)?,
                Attributes::default(),
            )
            .await?;
        }
        disk.close().await
    };
    runtime.block_on(fill).unwrap().unwrap();
    memory.bytes()
}

/// Sends requests of each kind to an image with any content. Each failure must be an error.
fn use_it(bytes: Vec<u8>) -> u64 {
    let runtime = Runtime::new();
    let memory = MemoryImage::new(bytes, 1, false);
    let options = Options {
        cache: 1 << 20,
        ..Options::new("hostile")
    };
    let disk = Disk::new(Qcow2::new(memory.clone(), ImageParts::default(), options));
    let work = async move {
        let Ok(shape) = disk.activate().await else {
            return 0;
        };
        let size = shape.size.min(4 << 20);
        let how = Attributes::default();
        let _ = read_all(&disk, size).await;
        let _ = disk.extents(0, size).await;
        let last = shape.size.saturating_sub(1 << 20) & !511;
        for at in [0, 25 << 10, 500 << 10, last] {
            let len = (shape.size - at.min(shape.size)).min(70 << 10);
            if len == 0 {
                continue;
            }
            let bytes = Bytes::copied(&vec![7; len as usize]).unwrap();
            let _ = disk.write(at, bytes, how).await;
            let _ = disk.discard(at, len, how).await;
            let _ = disk.write_zeroes(at, len.min(1536), how).await;
        }
        let _ = disk.flush().await;
        let memory = disk.stats()["metadata_bytes"];
        let _ = disk.close().await;
        memory
    };
    runtime.block_on(work).unwrap()
}

#[test]
fn damaged_metadata_does_no_harm() {
    let small = |cluster| Qcow2Create {
        cluster,
        ..Qcow2Create::new(SIZE)
    };
    let plans = [
        small(65536),
        small(512),
        small(4096),
        Qcow2Create {
            extended: true,
            ..small(16384)
        },
        Qcow2Create {
            refcount_bits: 1,
            ..small(4096)
        },
        Qcow2Create {
            version: 2,
            ..small(4096)
        },
    ];
    for plan in plans {
        let image = sound(plan.clone());
        let metadata = metadata(&image, plan.cluster as usize);
        for seed in Seeds::new(300) {
            let chance = MemoryRng::new(seed);
            let mut bytes = image.clone();
            for _ in 0..1 + chance.below(4) {
                let at = match chance.below(3) {
                    // The fields of the header are what most depends on.
                    0 => 4 + chance.below(108) as usize,
                    _ => metadata[chance.below(metadata.len() as u64) as usize],
                };
                bytes[at] = match chance.below(4) {
                    0 => 0xff,
                    1 => bytes[at] ^ 1 << chance.below(8),
                    2 => bytes[at].wrapping_add(1),
                    _ => chance.next() as u8,
                };
            }
            if chance.below(8) == 0 {
                bytes.truncate(chance.below(bytes.len() as u64) as usize);
            }
            let used = use_it(bytes);
            assert!(
                used <= 1 << 20,
                "{plan:?}, seed {seed}: {used} bytes of metadata in memory"
            );
        }
    }
}

/// The bytes that are not content: those of tables that are not zero, and some around them.
fn metadata(image: &[u8], cluster: usize) -> Vec<usize> {
    let number = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap()) as usize;
    let (l1, reftable) = (number(40), number(48));
    let mut tables = vec![0, l1, reftable];
    for table in [l1, reftable] {
        for at in (table..table + cluster).step_by(8) {
            let entry = number(at) & 0x00ff_ffff_ffff_fe00;
            if entry != 0 {
                tables.push(entry);
            }
        }
    }
    let used = |at: &usize| image[at & !7..][..8].iter().any(|byte| *byte != 0);
    tables
        .iter()
        .flat_map(|at| *at..(at + cluster).min(image.len()))
        .filter(used)
        .collect()
}

/// Entries that lead to where others are, and tables that are their own.
#[test]
fn tables_that_lead_to_themselves_do_no_harm() {
    let image = sound(Qcow2Create {
        cluster: 4096,
        ..Qcow2Create::new(SIZE)
    });
    let number = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    let (l1, reftable) = (number(40), number(48));
    let l2 = number(l1 as usize) & 0x00ff_ffff_ffff_fe00;
    let block = number(reftable as usize);
    let copied = 1_u64 << 63;
    for (at, entry) in [
        (l1, l1 | copied),
        (l1, copied),
        (l1, reftable | copied),
        (l2, l2 | copied),
        (l2, l1 | copied),
        (l2, block | copied),
        (l2, copied | 4096 << 40),
        (reftable, reftable),
        (reftable, l2),
        (reftable, 1 << 55),
        (l2, 1 << 62 | 0x3fff_ffff_ffff_ffff),
    ] {
        let mut bytes = image.clone();
        bytes[at as usize..at as usize + 8].copy_from_slice(&entry.to_be_bytes());
        use_it(bytes);
    }
}

#[test]
fn the_header_is_not_overwritten_by_way_of_an_entry() {
    let image = sound(Qcow2Create {
        cluster: 4096,
        ..Qcow2Create::new(SIZE)
    });
    let number = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    let l1 = number(40);
    let l2 = (number(l1 as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    let mut bytes = image.clone();
    bytes[l2..l2 + 8].copy_from_slice(&(l1 | 1 << 63).to_be_bytes());
    let runtime = Runtime::new();
    let memory = MemoryImage::new(bytes, 1, false);
    let disk = Disk::new(Qcow2::new(
        memory.clone(),
        ImageParts::default(),
        Options::new("hostile"),
    ));
    let write = async move {
        disk.activate().await.unwrap();
        disk.write(0, Bytes::copied(&[7; 512])?, Attributes::default())
            .await
    };
    assert_eq!(runtime.block_on(write).unwrap(), Err(diskio::Errno::IO));
    assert_eq!(
        memory.bytes()[l1 as usize..][..8],
        image[l1 as usize..][..8]
    );
}

/// An L1 entry says that its table has one user, and leads to none.
#[test]
fn a_write_below_an_empty_l1_entry_is_there() {
    let mut bytes = sound(Qcow2Create {
        cluster: 4096,
        ..Qcow2Create::new(SIZE)
    });
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
    bytes[l1..l1 + 8].copy_from_slice(&(1_u64 << 63).to_be_bytes());
    let runtime = Runtime::new();
    let disk = Disk::new(Qcow2::new(
        MemoryImage::new(bytes, 1, false),
        ImageParts::default(),
        Options::new("hostile"),
    ));
    let work = async move {
        disk.activate().await.unwrap();
        disk.write(512, Bytes::copied(&[7; 512])?, Attributes::default())
            .await?;
        read_all(&disk, 1536).await
    };
    let found = runtime.block_on(work).unwrap().unwrap();
    assert_eq!(found, [[0; 512], [7; 512], [0; 512]].concat());
}

/// An entry leads to a table instead of a cluster: a write, which releases the cluster, must not free the table.
#[test]
fn tables_are_not_freed_by_way_of_an_entry() {
    let image = sound(Qcow2Create {
        cluster: 4096,
        ..Qcow2Create::new(SIZE)
    });
    let number = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    let (l1, refs) = (number(40), number(48));
    let l2 = (number(l1 as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    // As if a snapshot had it too, and compressed.
    for entry in [l1, refs, 0, l1 | 1 << 62, refs | 1 << 62] {
        let mut bytes = image.clone();
        bytes[l2..l2 + 8].copy_from_slice(&entry.to_be_bytes());
        let runtime = Runtime::new();
        let memory = MemoryImage::new(bytes, 1, false);
        let disk = Disk::new(Qcow2::new(
            memory.clone(),
            ImageParts::default(),
            Options::new("hostile"),
        ));
        let write = async move {
            disk.activate().await.unwrap();
            let bytes = Bytes::copied(&[7; 4096]).unwrap();
            // The write may fail.
            let _ = disk.write(0, bytes, Attributes::default()).await;
            for _ in 0..2 {
                let _ = disk.flush().await;
            }
        };
        runtime.block_on(write).unwrap();
        let after = memory.bytes();
        for table in [0, l1, refs] {
            let table = table as usize;
            assert_eq!(after[table..][..8], image[table..][..8], "{entry:#x}");
        }
        // Its refcount is as it was, or the next cluster would be made there.
        let counts = number(refs as usize) as usize;
        for table in [0, l1, refs] {
            let place = counts + table as usize / 4096 * 2;
            assert_eq!(after[place..][..2], image[place..][..2], "{entry:#x}");
        }
    }
}

/// A thousand bitmaps, each as large as one can be: to look at them would take hours.
#[test]
fn bitmaps_without_end_are_refused() {
    let mut bytes = sound(Qcow2Create {
        cluster: 4096,
        ..Qcow2Create::new(SIZE)
    });
    let number = |bytes: &[u8], at: usize| {
        u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
    };
    let mut at = number(&bytes, 100);
    while number(&bytes, at) != 0 {
        at += 8 + number(&bytes, at + 4).next_multiple_of(8);
    }
    let directory = bytes.len().next_multiple_of(4096);
    let count = 1000_u32;
    let mut extension = 0x2385_2875_u32.to_be_bytes().to_vec();
    extension.extend(24_u32.to_be_bytes());
    extension.extend(count.to_be_bytes());
    extension.extend([0; 4]);
    extension.extend(u64::from(count * 24).to_be_bytes());
    extension.extend((directory as u64).to_be_bytes());
    bytes[at..at + extension.len()].copy_from_slice(&extension);
    // The image was not closed, so that the driver checks all users of clusters.
    bytes[79] |= 1;
    bytes.resize(directory, 0);
    for _ in 0..count {
        let mut record = (1_u64 << 40).to_be_bytes().to_vec();
        record.extend((8_u32 << 20).to_be_bytes());
        record.resize(24, 0);
        bytes.extend(record);
    }
    let memory = MemoryImage::new(bytes, 1, false);
    let disk = Disk::new(Qcow2::new(
        memory,
        ImageParts::default(),
        Options::new("hostile"),
    ));
    let opened = Runtime::new().block_on(async move { disk.activate().await });
    let said = opened.unwrap().unwrap_err().message;
    assert!(said.contains("bitmaps"), "{said}");
}

/// Puts a table of snapshots behind an image, each with the L1 table of the disk.
fn add_snapshots(bytes: &mut Vec<u8>, count: u32, name: usize) {
    let (entries, l1) = (bytes[36..40].to_vec(), bytes[40..48].to_vec());
    bytes.resize(bytes.len().next_multiple_of(4096), 0);
    let at = (bytes.len() as u64).to_be_bytes();
    bytes[60..64].copy_from_slice(&count.to_be_bytes());
    bytes[64..72].copy_from_slice(&at);
    for number in 0..count {
        let id = format!("{number:08}");
        let start = bytes.len();
        bytes.extend(&l1);
        bytes.extend(&entries);
        bytes.extend(8_u16.to_be_bytes());
        bytes.extend((name as u16).to_be_bytes());
        bytes.resize(start + 40, 0);
        bytes.extend(id.as_bytes());
        bytes.resize((start + 48 + name).next_multiple_of(8), b'n');
    }
}

/// A bitmap's name may have 64 KiB: the driver keeps no more of them in memory than QEMU allows.
#[test]
fn snapshots_without_end_are_refused() {
    let image = sound(Qcow2Create {
        cluster: 4096,
        ..Qcow2Create::new(SIZE)
    });
    for (count, is_right) in [(1000, true), (1100, false)] {
        let mut bytes = image.clone();
        add_snapshots(&mut bytes, count, 65528);
        let memory = MemoryImage::new(bytes, 1, false);
        let found = Runtime::new().block_on(async move { snapshots(&memory).await });
        match found.unwrap() {
            Ok(all) => assert!(is_right && all.len() == count as usize, "{}", all.len()),
            Err(failure) => assert!(!is_right && failure.message.contains("snapshots")),
        }
    }
}

/// Returns the failure of an activation of an image that was not closed.
fn refusal(mut bytes: Vec<u8>) -> String {
    bytes[79] |= 1;
    let disk = Disk::new(Qcow2::new(
        MemoryImage::new(bytes, 1, false),
        ImageParts::default(),
        Options::new("hostile"),
    ));
    let opened = Runtime::new().block_on(async move { disk.activate().await });
    opened.unwrap().unwrap_err().message
}

/// Many snapshots with one L1 table, and many entries with one L2 table: to walk all that once for each would take hours.
#[test]
fn tables_that_are_used_without_end_are_refused() {
    let mut image = sound(Qcow2Create {
        cluster: 4096,
        ..Qcow2Create::new(SIZE)
    });
    let number =
        |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let l1 = number(&image, 40) as usize;
    let entry = image[l1..l1 + 8].to_vec();
    // The table at the end, with an entry that is the same again and again.
    let end = image.len().next_multiple_of(4096);
    image.resize(end, 0);
    image[40..48].copy_from_slice(&(end as u64).to_be_bytes());
    // All in one place.
    let mut bytes = image.clone();
    bytes[36..40].copy_from_slice(&512_u32.to_be_bytes());
    bytes.extend(entry.repeat(512));
    add_snapshots(&mut bytes, 65536, 0);
    let said = refusal(bytes);
    assert!(said.contains("L1 tables"), "{said}");
    // And such that would.
    let mut bytes = image;
    bytes[36..40].copy_from_slice(&1600_u32.to_be_bytes());
    bytes.extend(entry.repeat(1600));
    bytes.resize(bytes.len().next_multiple_of(4096), 0);
    let records = bytes.len();
    add_snapshots(&mut bytes, 1000, 0);
    for number in 0..1000 {
        bytes.resize(bytes.len().next_multiple_of(4096), 0);
        let at = (bytes.len() as u64).to_be_bytes();
        bytes[records + number * 48..][..8].copy_from_slice(&at);
        bytes.extend(entry.repeat(1600));
    }
    let said = refusal(bytes);
    assert!(said.contains("refcounts"), "{said}");
}

#[test]
fn a_file_that_is_no_image_is_refused() {
    for bytes in [
        vec![],
        vec![0; 10],
        vec![0; 4096],
        b"QFI\xfb\0\0\0\x03".to_vec(),
        b"QFI\xfb\0\0\0\x01".repeat(64),
    ] {
        let runtime = Runtime::new();
        let memory = MemoryImage::new(bytes, 1, false);
        assert!(runtime
            .block_on(async move { header(&memory).await })
            .unwrap()
            .is_err());
    }
}

/// A sound image of clusters of 4 KiB with a bitmap that records, a bit for a sector, and the places of its record and of
/// its table.
fn with_bitmap() -> (Vec<u8>, usize, usize) {
    const CLUSTER: usize = 4096;
    let mut bytes = sound(Qcow2Create {
        cluster: CLUSTER as u64,
        ..Qcow2Create::new(SIZE)
    });
    let word = |bytes: &[u8], at: usize| {
        u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
    };
    let long = |bytes: &[u8], at: usize| {
        u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
    };
    let mut at = word(&bytes, 100);
    while word(&bytes, at) != 0 {
        at += 8 + word(&bytes, at + 4).next_multiple_of(8);
    }
    let record = bytes.len().next_multiple_of(CLUSTER);
    let table = record + CLUSTER;
    let extension = [
        &0x2385_2875_u32.to_be_bytes()[..],
        &24_u32.to_be_bytes(),
        &1_u32.to_be_bytes(),
        &[0; 4],
        &32_u64.to_be_bytes(),
        &(record as u64).to_be_bytes(),
    ]
    .concat();
    bytes[at..at + extension.len()].copy_from_slice(&extension);
    // The bitmaps have all changes.
    bytes[95] |= 1;
    let block = long(&bytes, long(&bytes, 48));
    for cluster in [record / CLUSTER, table / CLUSTER] {
        bytes[block + 2 * cluster + 1] = 1;
    }
    bytes.resize(table + CLUSTER, 0);
    let fields = [
        &(table as u64).to_be_bytes()[..],
        &1_u32.to_be_bytes(),
        &2_u32.to_be_bytes(),
        &[1, 9, 0, 1],
        &[0; 4],
        b"a",
    ]
    .concat();
    bytes[record..record + fields.len()].copy_from_slice(&fields);
    (bytes, record, table)
}

/// Writes to an image, and returns what it is then.
fn written(bytes: Vec<u8>, at: u64, len: usize) -> Vec<u8> {
    let memory = MemoryImage::new(bytes, 1, false);
    let disk = Disk::new(Qcow2::new(
        memory.clone(),
        ImageParts::default(),
        Options::new("noted"),
    ));
    let work = async move {
        disk.activate().await.unwrap();
        let data = Bytes::copied(&vec![9; len])?;
        disk.write(at, data, Attributes::default()).await?;
        disk.close().await
    };
    Runtime::new().block_on(work).unwrap().unwrap();
    memory.bytes()
}

#[test]
fn a_write_sets_the_bits_of_its_sectors() {
    let (bytes, record, table) = with_bitmap();
    let bytes = written(bytes, 512 * 11, 512 * 3);
    let place = u64::from_be_bytes(bytes[table..table + 8].try_into().unwrap()) as usize;
    let mut expected = vec![0; 4096];
    expected[1] = 0b11_1000;
    assert_eq!(bytes[place..place + 4096], expected);
    // It is not in use any more, and the header says that it has all changes.
    assert_eq!((bytes[record + 15], bytes[95] & 1), (2, 1));
    // A table that says that all bits are set stays.
    let (mut bytes, _, table) = with_bitmap();
    bytes[table + 7] = 1;
    let after = written(bytes, 0, 4096);
    assert_eq!(after[table..table + 8], [0, 0, 0, 0, 0, 0, 0, 1]);
}

#[test]
fn damaged_bitmaps_do_no_harm() {
    let (sound, record, table) = with_bitmap();
    let mut are_kept = 0;
    for seed in Seeds::new(300) {
        let chance = MemoryRng::new(seed);
        let mut bytes = sound.clone();
        for _ in 0..1 + chance.below(3) {
            let at = match chance.below(2) {
                0 => record + chance.below(32) as usize,
                _ => table + chance.below(8) as usize,
            };
            bytes[at] = match chance.below(3) {
                0 => 0xff,
                1 => bytes[at] ^ 1 << chance.below(8),
                _ => chance.next() as u8,
            };
        }
        let used = use_it(bytes.clone());
        assert!(used <= 1 << 20, "seed {seed}: {used} bytes of metadata");
        // A bitmap in data of the disk has the refcount of that: a check finds it, and no write can.
        let entry = u64::from_be_bytes(bytes[table..table + 8].try_into().unwrap());
        let its_table = u64::from_be_bytes(bytes[record..record + 8].try_into().unwrap());
        let is_inside = |place: u64| place > 0 && place < sound.len() as u64;
        if is_inside(entry & 0x00ff_ffff_ffff_fe00)
            || its_table != table as u64 && is_inside(its_table)
        {
            continue;
        }
        // A write arrives, whatever the bitmap is, and nothing else changes on the disk.
        let memory = MemoryImage::new(written(bytes, 512 * 40, 512), 1, false);
        let disk = Disk::new(Qcow2::new(
            memory.clone(),
            ImageParts::default(),
            Options::new("noted"),
        ));
        let read = async move {
            disk.activate().await.unwrap();
            read_all(&disk, SIZE).await
        };
        let now = Runtime::new().block_on(read).unwrap().unwrap();
        let expected = content(&sound);
        assert!(now[512 * 40..512 * 41] == [9; 512], "seed {seed}");
        assert!(
            now[..512 * 40] == expected[..512 * 40] && now[512 * 41..] == expected[512 * 41..],
            "seed {seed}"
        );
        are_kept += u32::from(memory.bytes()[95] & 1);
    }
    assert!(are_kept > 0, "no bitmap was kept");
}

/// The disk in an image.
fn content(bytes: &[u8]) -> Vec<u8> {
    let memory = MemoryImage::new(bytes.to_vec(), 1, false);
    let disk = Disk::new(Qcow2::new(
        memory,
        ImageParts::default(),
        Options::new("sound"),
    ));
    let read = async move {
        disk.activate().await.unwrap();
        read_all(&disk, SIZE).await
    };
    Runtime::new().block_on(read).unwrap().unwrap()
}
