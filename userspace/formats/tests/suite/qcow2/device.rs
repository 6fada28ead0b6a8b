// SPDX-License-Identifier: MIT OR Apache-2.0
//! An image on a device, which does not grow.

use super::memory::{sector, stamps, MemoryImage};
use diskio::{Bytes, Data, Errno, Runtime};
use drivers::{Attributes, Disk};
use formats::qcow2::{check, create, Findings, Qcow2, Qcow2Create};
use formats::{ImageParts, Options};

const SIZE: u64 = 1 << 20;
/// Bytes of a cluster: an L2 table is for 32 KiB, a refcount block for 128 KiB.
const CLUSTER: u64 = 512;

/// An image with nothing in it on a device.
fn device(runtime: &Runtime, size: u64) -> MemoryImage {
    let memory = MemoryImage::new(vec![0; size as usize], 1, false);
    memory.fix();
    let file = memory.clone();
    let plan = Qcow2Create {
        cluster: CLUSTER,
        ..Qcow2Create::new(SIZE)
    };
    runtime
        .block_on(async move { create(&file, &plan).await })
        .unwrap()
        .unwrap();
    memory
}

fn opened(runtime: &Runtime, memory: &MemoryImage) -> Disk {
    let options = Options::new("device");
    let disk = Disk::new(Qcow2::new(memory.clone(), ImageParts::default(), options));
    let its = disk.clone();
    runtime
        .block_on(async move { its.activate().await })
        .unwrap()
        .unwrap();
    disk
}

fn write(runtime: &Runtime, disk: &Disk, number: u64, stamp: u32) -> Result<(), Errno> {
    let disk = disk.clone();
    let bytes = Bytes::copied(&sector(stamp)).unwrap();
    let how = Attributes::default();
    runtime
        .block_on(async move { disk.write(number * 512, bytes, how).await })
        .unwrap()
}

fn read(runtime: &Runtime, disk: &Disk, number: u64) -> Option<u32> {
    let disk = disk.clone();
    let data = Data::zeroed(512).unwrap();
    let into = data.clone();
    runtime
        .block_on(async move { disk.read(number * 512, into).await })
        .unwrap()
        .unwrap();
    stamps(&data.to_vec())[0]
}

fn close(runtime: &Runtime, disk: Disk) {
    runtime
        .block_on(async move { disk.close().await })
        .unwrap()
        .unwrap();
}

fn findings(runtime: &Runtime, memory: &MemoryImage) -> Findings {
    let file = memory.clone();
    runtime
        .block_on(async move { check(&file, "device", false).await })
        .unwrap()
        .unwrap()
}

/// All writes that succeeded can be read, and failed ones leave no entries.
#[test]
fn what_a_device_has_no_room_for_is_refused_and_does_no_harm() {
    // The last one ends amid a cluster.
    for size in [100 << 10, 300 << 10, (300 << 10) + 100] {
        let runtime = Runtime::new();
        let memory = device(&runtime, size);
        let disk = opened(&runtime, &memory);
        let mut there = Vec::new();
        // Each write is in another part of the disk than the last one, so that tables are made until the end.
        for number in 0..SIZE / 512 {
            let at = number % 32 * 64 + number / 32;
            match write(&runtime, &disk, at, 7 + at as u32) {
                Ok(()) => there.push(at),
                Err(error) => assert_eq!(error, Errno::NOSPC),
            }
        }
        assert!(there.len() as u64 > size / 512 * 3 / 4, "{}", there.len());
        assert!((there.len() as u64) < size / 512, "{}", there.len());
        // Discarded clusters make room.
        let (gone, its) = (there.remove(0), disk.clone());
        let forget = async move {
            let how = Attributes::default();
            its.write_zeroes(gone * 512, 512, how).await?;
            its.flush().await
        };
        runtime.block_on(forget).unwrap().unwrap();
        write(&runtime, &disk, there[0] + 32, 9).unwrap();
        assert_eq!(read(&runtime, &disk, there[0] + 32), Some(9));
        close(&runtime, disk);
        assert_eq!(findings(&runtime, &memory), Findings::default(), "{size}");
        let disk = opened(&runtime, &memory);
        for at in there {
            assert_eq!(read(&runtime, &disk, at), Some(7 + at as u32), "{at}");
        }
    }
}

/// The refcounts of an image that was not closed become right without room behind it.
#[test]
fn refcounts_are_repaired_on_a_device_that_is_larger_than_they_cover() {
    // Blocks for all of it can be in the refcount table, or not.
    for size in [1 << 20, 20 << 20] {
        let runtime = Runtime::new();
        let memory = device(&runtime, size);
        let disk = opened(&runtime, &memory);
        // Some 300 KiB: the first three refcount blocks are for that.
        for at in 0..600 {
            write(&runtime, &disk, at, 7 + at as u32).unwrap();
        }
        close(&runtime, disk);
        let mut bytes = memory.bytes();
        let number = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        let reftable = number(48) as usize;
        assert_ne!(number(reftable + 16), 0);
        // The image was not closed, and a refcount block is missing.
        bytes[79] |= 1;
        bytes[reftable + 16..reftable + 24].fill(0);
        let memory = MemoryImage::new(bytes, 1, false);
        memory.fix();
        let disk = opened(&runtime, &memory);
        for at in 0..600 {
            assert_eq!(read(&runtime, &disk, at), Some(7 + at as u32), "{at}");
        }
        assert_eq!(findings(&runtime, &memory), Findings::default());
        for at in 600..1000 {
            write(&runtime, &disk, at, 7 + at as u32).unwrap();
        }
        close(&runtime, disk);
        assert_eq!(findings(&runtime, &memory), Findings::default());
        let disk = opened(&runtime, &memory);
        for at in 0..1000 {
            assert_eq!(read(&runtime, &disk, at), Some(7 + at as u32), "{at}");
        }
        assert_eq!(memory.bytes().len() as u64, size);
    }
}
