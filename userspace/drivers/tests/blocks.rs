// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images on storage that writes more than a sector at once.

use control::Code;
use diskio::{Align, Data, File, Runtime};
use drivers::{Attributes, Disk, DiskInfo, Raw};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

/// Bytes of a block, which the storage of these tests writes at once.
const BLOCK: usize = 4096;

/// The file as one more process has it: with a lock for reading and writing of its own.
fn file(runtime: &Runtime, image: &std::fs::File) -> File {
    let align = Align {
        memory: 512,
        offset: BLOCK,
    };
    let file = File::new(&runtime.io, image.try_clone().unwrap().into());
    file.unwrap().with_align(align)
}

fn image(size: u64) -> std::fs::File {
    let image = tempfile::tempfile().unwrap();
    image.set_len(size).unwrap();
    image
}

fn active(runtime: &Runtime, raw: Raw) -> (Disk, Result<DiskInfo, control::Failure>) {
    let disk = Disk::new(raw);
    let its = disk.clone();
    let shape = runtime.block_on(async move { its.activate().await });
    (disk, shape.unwrap())
}

/// Two hosts write one block each, of the size that the image reports.
#[test]
fn writers_of_a_shared_image_do_not_undo_each_others_writes() {
    let runtime = Runtime::new();
    let image = image(8 * BLOCK as u64);
    let both: Vec<(Disk, DiskInfo)> = (0..2)
        .map(|_| {
            let raw = Raw::new(file(&runtime, &image), false).in_whole_blocks();
            let (disk, shape) = active(&runtime, raw);
            (disk, shape.unwrap())
        })
        .collect();
    let unit = both[0].1.logical_block as usize;
    for (number, (disk, _)) in both.iter().enumerate() {
        let (disk, byte) = (disk.clone(), number as u8 + 1);
        runtime.tasks.spawn(async move {
            let (data, how) = (
                Data::copied(&vec![byte; unit]).unwrap(),
                Attributes::default(),
            );
            disk.write((number * unit) as u64, data, how).await.unwrap();
        });
    }
    runtime.finish().unwrap();
    let mut bytes = vec![0; 2 * unit];
    image.read_exact_at(&mut bytes, 0).unwrap();
    let expected = [vec![1; unit], vec![2; unit]].concat();
    assert!(bytes == expected, "a write of {unit} bytes is lost");
}

#[test]
fn shared_image_with_a_part_of_a_block_is_refused() {
    let runtime = Runtime::new();
    let image = image(8 * BLOCK as u64 + 512);
    let raw = Raw::new(file(&runtime, &image), false).in_whole_blocks();
    let failure = active(&runtime, raw).1.unwrap_err();
    assert_eq!(failure.code, Code::Image);
    assert!(failure.message.contains("--size=%4096"), "{failure}");
}

#[test]
fn last_sector_is_written_and_the_file_stays_as_long_as_it_is() {
    let runtime = Runtime::new();
    let size = 8 * BLOCK as u64 + 512;
    let image = image(size);
    image.write_all_at(&[9; 512], size - 1024).unwrap();
    let mut file = file(&runtime, &image);
    assert!(file.keep_size().unwrap(), "it goes through the page cache");
    let (disk, shape) = active(&runtime, Raw::new(file, false));
    assert_eq!(shape.unwrap().size, size);
    let write = async move {
        let how = Attributes::default();
        disk.write(size - 512, Data::copied(&[7; 512])?, how).await
    };
    runtime.block_on(write).unwrap().unwrap();
    assert_eq!(image.metadata().unwrap().len(), size);
    let mut bytes = [0; 1024];
    image.read_exact_at(&mut bytes, size - 1024).unwrap();
    assert_eq!(bytes, [[9; 512], [7; 512]].concat()[..]);
}

/// A connected disk that tapdisk writes past the page cache cannot come to have such a size either.
#[test]
fn direct_image_does_not_grow_by_a_part_of_a_block() {
    let runtime = Runtime::new();
    let image = image(8 * BLOCK as u64);
    let mut file = file(&runtime, &image);
    assert!(!file.keep_size().unwrap());
    let (disk, shape) = active(&runtime, Raw::new(file, false));
    assert_eq!(shape.unwrap().logical_block, 512);
    image.set_len(8 * BLOCK as u64 + 512).unwrap();
    let failure = runtime.block_on(async move { disk.resize().await });
    assert_eq!(failure.unwrap().unwrap_err().code, Code::Image);
}

/// The kernel writes past the page cache, so it may serve only an image that the process has opened with `O_DIRECT`.
#[test]
fn only_what_goes_past_the_page_cache_is_the_image_verbatim() {
    let runtime = Runtime::new();
    let image = image(8 * BLOCK as u64);
    let raw = Raw::new(file(&runtime, &image), false);
    assert!(!Disk::new(raw).is_verbatim());
    let direct = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(format!("/proc/self/fd/{}", image.as_raw_fd()))
        .unwrap();
    let raw = Raw::new(file(&runtime, &direct), false);
    assert!(Disk::new(raw).is_verbatim());
    assert!(!Disk::new(drivers::Null::new(8 * BLOCK as u64)).is_verbatim());
}

/// Storage with blocks of 4096 bytes, and a guest with sectors of 512: no write undoes another one in its block.
#[test]
fn sectors_that_are_smaller_than_a_block_are_written_each_for_itself() {
    let runtime = Runtime::new();
    let image = image(2 * BLOCK as u64);
    let raw = Raw::new(file(&runtime, &image), false).in_whole_blocks();
    let (disk, shape) = active(&runtime, raw);
    assert_eq!(shape.unwrap().logical_block, 4096);
    assert_eq!(disk.set_sector(512).unwrap().logical_block, 512);
    for number in 0..16 {
        let (disk, byte) = (disk.clone(), number as u8 + 1);
        runtime.tasks.spawn(async move {
            let data = Data::copied(&[byte; 512]).unwrap();
            let how = Attributes::default();
            disk.write(number * 512, data, how).await.unwrap();
        });
    }
    runtime.finish().unwrap();
    let mut bytes = vec![0; 2 * BLOCK];
    image.read_exact_at(&mut bytes, 0).unwrap();
    let expected: Vec<u8> = (1..=16).flat_map(|byte| [byte; 512]).collect();
    assert!(bytes == expected, "a write of a sector is lost");
}

#[test]
fn sectors_that_are_larger_than_the_storages_must_be_whole() {
    let runtime = Runtime::new();
    for (size, fits) in [(8 * BLOCK as u64, true), (8 * BLOCK as u64 + 512, false)] {
        let image = image(size);
        let raw = Raw::new(file(&runtime, &image), false);
        let disk = active(&runtime, raw).0;
        let set = disk.set_sector(4096);
        assert_eq!(set.is_ok(), fits, "{set:?}");
        let Ok(shape) = set else { continue };
        assert_eq!((shape.logical_block, shape.size), (4096, size));
        // They stay when another process has had the image.
        let its = disk.clone();
        let again = runtime.block_on(async move { its.activate().await });
        assert_eq!(again.unwrap().unwrap().logical_block, 4096);
    }
}
