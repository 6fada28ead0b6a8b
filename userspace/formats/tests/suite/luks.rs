// SPDX-License-Identifier: MIT OR Apache-2.0
//! LUKS images: the driver reads QEMU's images, QEMU reads the driver's, both refuse a wrong key, and hostile headers
//! do no harm.

use crate::common::secret::{key, of, Safe};
use crate::common::tools::{has_qemu, scribble, try_wrong, whole};
use crate::common::{run, SeededRng, SparseContent, What, World, SECTOR};
use control::{Code, Failure};
use diskio::{Bytes, Data, Errno, Runtime};
use drivers::{Attributes, Disk};
use formats::luks::{self, header, look, ImageKey, Luks};
use formats::{ImageParts, Options, Storage};
use seeds::Seeds;
use std::time::Duration;

fn options(key: Option<ImageKey>) -> Options {
    Options {
        key,
        ..Options::new("image")
    }
}

fn disk<S: Storage>(storage: S, key: Option<ImageKey>) -> Disk {
    Disk::new(Luks::new(storage, ImageParts::default(), options(key)))
}

/// Returns the reason why a disk cannot be used.
fn refused(world: &World, key: Option<ImageKey>) -> Failure {
    let disk = disk(world.file(0), key);
    run(async move { disk.activate().await }).expect_err("it opened")
}

#[test]
fn qemu_and_we_read_what_the_other_writes() {
    if !has_qemu("qemu_and_we_read_what_the_other_writes") {
        return;
    }
    const SIZE: u64 = (3 << 20) + 512;
    for (cipher, hash) in [
        ("aes-256", "sha256"),
        ("aes-128", "sha1"),
        ("aes-256", "sha1"),
        ("aes-128", "sha256"),
        ("aes-256", "sha512"),
    ] {
        let safe = Safe::new();
        safe.create_luks(
            &format!("cipher-alg={cipher},hash-alg={hash}"),
            &SIZE.to_string(),
        );
        safe.io(
            "luks",
            &[
                "write -P 7 0 1M",
                "write -P 9 2095104 1025k",
                "write -P 3 3145728 512",
            ],
        );
        let runtime = Runtime::new();
        let storage = safe.file(&runtime, true);
        let mut model = safe.read("luks");
        let work = async move {
            assert_eq!(look(&storage).await.unwrap().size, SIZE);
            let said = header(&storage).await.unwrap();
            assert_eq!(said.cipher(), format!("{cipher}-xts-plain64, {hash}"));
            let disk = disk(storage, Some(key()));
            assert_eq!(disk.activate().await.unwrap().size, SIZE);
            assert!(
                whole(&disk, SIZE).await.unwrap() == model,
                "{cipher} {hash}"
            );
            scribble(&disk, &mut model, 1, 40).await.unwrap();
            assert!(
                whole(&disk, SIZE).await.unwrap() == model,
                "{cipher} {hash}"
            );
            disk.inactivate().await.unwrap();
            model
        };
        let model = runtime.block_on(work).unwrap();
        assert!(safe.read("luks") == model, "{cipher} {hash}");
    }
}

/// The number of a sector has more than 32 bits there.
#[test]
fn far_end_of_a_large_image() {
    if !has_qemu("far_end_of_a_large_image") {
        return;
    }
    const SIZE: u64 = 3 << 40;
    let safe = Safe::new();
    safe.create_luks("cipher-alg=aes-256", "3T");
    let at = SIZE - (64 << 10);
    safe.io("luks", &[&format!("write -P 5 {at} 32k")]);
    let runtime = Runtime::new();
    let storage = safe.file(&runtime, true);
    let work = async move {
        let disk = disk(storage, Some(key()));
        assert_eq!(disk.activate().await.unwrap().size, SIZE);
        let data = Data::zeroed(32 << 10).unwrap();
        disk.read(at, data.clone()).await.unwrap();
        assert_eq!(data.to_vec(), [5; 32 << 10]);
        let ours = Bytes::copied(&[6; 32 << 10]).unwrap();
        disk.write(at + (32 << 10), ours, Attributes::default())
            .await
            .unwrap();
        disk.inactivate().await.unwrap();
    };
    runtime.block_on(work).unwrap();
    let ours = at + (32 << 10);
    safe.io(
        "luks",
        &[
            &format!("read -P 6 {ours} 32k"),
            &format!("read -P 5 {at} 32k"),
        ],
    );
}

#[test]
fn without_the_key_nothing_is_read_or_written() {
    if !has_qemu("without_the_key_nothing_is_read_or_written") {
        return;
    }
    let safe = Safe::new();
    safe.create_luks("cipher-alg=aes-128", "64k");
    let world = World::new(safe.content());
    for (wrong, why) in [
        (None, "write key=FILE"),
        (
            Some(of("a sécret".as_bytes())),
            "opens none of the 1 key slots",
        ),
        (Some(of(b"")), "a line's end too"),
    ] {
        let failure = refused(&world, wrong);
        assert_eq!(failure.code, Code::Denied, "{failure}");
        assert!(failure.message.contains(why), "{failure}");
        assert!(failure.message.starts_with("image: "), "{failure}");
        assert!(!failure.message.contains("sécret"), "{failure}");
    }
    let locked = disk(world.file(0), Some(of(b"wrong")));
    run(async move {
        let how = Attributes::default();
        locked.activate().await.unwrap_err();
        let data = Data::zeroed(SECTOR).unwrap();
        assert_eq!(locked.read(0, data.clone()).await, Err(Errno::BADFD));
        assert_eq!(locked.write(0, data, how).await, Err(Errno::BADFD));
    });
    assert_eq!(world.changes(), 0);
    assert_eq!(format!("{:?}", options(Some(key())).key), "Some(Key)");
}

/// No sector of the disk appears in the image in plain text, and equal sectors differ there.
#[test]
fn storage_sees_nothing_of_what_is_written() {
    if !has_qemu("storage_sees_nothing_of_what_is_written") {
        return;
    }
    let safe = Safe::new();
    safe.create_luks("cipher-alg=aes-128", "64k");
    let world = World::new(safe.content());
    let begin = world.files()[0].len - (64 << 10);
    let disk = disk(world.file(0), Some(key()));
    run(async move {
        disk.activate().await.unwrap();
        let how = Attributes::default();
        let same = Bytes::copied(&[0x5a; 32 << 10]).unwrap();
        disk.write(0, same.clone(), how).await.unwrap();
        disk.write_zeroes(32 << 10, 32 << 10, how).await.unwrap();
        // The buffer of the guest must not change.
        assert_eq!(same.to_vec(), [0x5a; 32 << 10]);
        disk.inactivate().await.unwrap();
    });
    let bytes = world.files()[0].to_vec();
    let mut blocks: Vec<&[u8]> = bytes[begin as usize..].chunks(16).collect();
    let count = blocks.len();
    blocks.sort_unstable();
    blocks.dedup();
    assert_eq!(
        blocks.len(),
        count,
        "blocks are alike that were alike before"
    );
    assert!(!blocks
        .iter()
        .any(|block| **block == [0x5a; 16] || **block == [0; 16]));
}

#[test]
fn what_may_not_be_written_is_not() {
    if !has_qemu("what_may_not_be_written_is_not") {
        return;
    }
    let safe = Safe::new();
    safe.create_luks("cipher-alg=aes-128", "64k");
    let world = World::new(safe.content());
    let options = Options {
        writable: false,
        discard: false,
        ..options(Some(key()))
    };
    let disk = Disk::new(Luks::new(world.file(0), ImageParts::default(), options));
    run(async move {
        disk.activate().await.unwrap();
        let how = Attributes::default();
        let data = Bytes::copied(&[1; SECTOR]).unwrap();
        assert_eq!(disk.write(0, data, how).await, Err(Errno::ROFS));
        assert_eq!(disk.discard(0, 4096, how).await, Err(Errno::OPNOTSUPP));
    });
    assert_eq!(world.changes(), 0);
}

/// New images equal QEMU's, and both programs read and write them.
#[test]
fn qemu_opens_what_is_made() {
    if !has_qemu("qemu_opens_what_is_made") {
        return;
    }
    const SIZE: u64 = (1 << 20) + 512;
    let safe = Safe::new();
    std::fs::write(safe.image(), []).unwrap();
    let runtime = Runtime::new();
    let storage = safe.file(&runtime, true);
    let how = luks::Encryption {
        key: key(),
        iter_time: Duration::from_millis(1),
    };
    let work = async move {
        luks::create(&storage, SIZE, &how).await.unwrap();
        assert_eq!(look(&storage).await.unwrap().size, SIZE);
        assert_eq!(header(&storage).await.unwrap().keys(), 1);
        let disk = disk(storage, Some(key()));
        disk.activate().await.unwrap();
        let mut model = whole(&disk, SIZE).await.unwrap();
        scribble(&disk, &mut model, 2, 40).await.unwrap();
        disk.inactivate().await.unwrap();
        model
    };
    let mut model = runtime.block_on(work).unwrap();
    assert!(safe.read("luks") == model);
    safe.io("luks", &["write -P 7 1M 512"]);
    model[1 << 20..].fill(7);
    let storage = safe.file(&runtime, false);
    let work = async move {
        let options = Options {
            writable: false,
            ..options(Some(key()))
        };
        let disk = Disk::new(Luks::new(storage, ImageParts::default(), options));
        disk.activate().await.unwrap();
        whole(&disk, SIZE).await.unwrap()
    };
    assert!(runtime.block_on(work).unwrap() == model);
}

/// An image of ours that is opened at once.
fn made(key: ImageKey, size: u64) -> World {
    let world = World::new(vec![SparseContent::from(&[])]);
    let file = world.file(0);
    let how = luks::Encryption {
        key,
        iter_time: Duration::from_millis(1),
    };
    run(async move { luks::create(&file, size, &how).await }).expect("it is made");
    world
}

/// Also when its last block becomes a part of one of its storage, or a whole one again: no write makes it longer.
#[test]
fn disk_grows_with_its_file_while_it_is_used() {
    const SIZE: u64 = 1 << 20;
    let world = made(key(), SIZE);
    let mut storage = world.file(0);
    storage.fills_blocks = true;
    let work = async move {
        let disk = disk(storage.clone(), Some(key()));
        disk.activate().await.unwrap();
        let begin = header(&storage).await.unwrap().begin();
        let mut model = whole(&disk, SIZE).await.unwrap();
        for (number, size) in (1..).zip([SIZE + 512, SIZE + 8192, SIZE + 8192 + 1536]) {
            disk.grow(size).await.unwrap();
            assert_eq!(disk.resize().await.unwrap(), size);
            let now = whole(&disk, size).await.unwrap();
            assert!(now[..model.len()] == model, "{size}");
            model = now;
            scribble(&disk, &mut model, number, 40).await.unwrap();
            let last = Bytes::copied(&[9; SECTOR]).unwrap();
            let at = size - SECTOR as u64;
            let how = Attributes::default();
            disk.write(at, last, how).await.unwrap();
            model[at as usize..].fill(9);
            assert_eq!(storage.size().unwrap(), begin + size);
            assert!(whole(&disk, size).await.unwrap() == model);
        }
        for wrong in [0, SIZE + 1, u64::MAX - 511] {
            let failure = disk.grow(wrong).await.expect_err("it grew");
            assert_eq!(failure.code, Code::Invalid, "{failure}");
            assert!(failure.message.starts_with("image: "), "{failure}");
        }
        disk.inactivate().await.unwrap();
        (storage, model)
    };
    let (storage, model) = run(work);
    // The next process reads the same content, and a reader does not make the file longer.
    let again = Options {
        writable: false,
        ..options(Some(key()))
    };
    let disk = Disk::new(Luks::new(storage, ImageParts::default(), again));
    run(async move {
        let shape = disk.activate().await.unwrap();
        assert_eq!(shape.size, model.len() as u64);
        assert!(whole(&disk, shape.size).await.unwrap() == model);
        disk.grow(2 * SIZE)
            .await
            .expect_err("it may not be written");
    });
}

/// A process that dies during the creation leaves a file that is no image, or one that the key opens; a failure of the
/// storage is reported.
#[test]
fn an_image_is_there_when_its_header_is() {
    const SIZE: u64 = 64 << 10;
    let world = made(key(), SIZE);
    let log = world.log();
    let mut content = SparseContent::from(&[]);
    for (number, (_, what)) in log.iter().enumerate() {
        content.apply(what);
        let world = World::new(vec![content.clone()]);
        let opened = disk(world.file(0), Some(key()));
        let done = run(async move { opened.activate().await });
        let rest = &log[number + 1..];
        let is_there = rest.iter().all(|(_, what)| matches!(what, What::Flush));
        assert_eq!(done.is_ok(), is_there, "{number}: {what:?}: {done:?}");
        if let Err(failure) = done {
            assert!(failure.message.contains("does not begin as"), "{failure}");
        }
    }
    for left in 0..log.len() {
        let world = World::new(vec![SparseContent::from(&[])]);
        world.fail_after(Some(left));
        let file = world.file(0);
        let how = luks::Encryption {
            key: key(),
            iter_time: Duration::from_millis(1),
        };
        let done = run(async move { luks::create(&file, SIZE, &how).await });
        assert_eq!(done.expect_err("it is told").code, Code::System, "{left}");
    }
}

/// Puts a number where it is in a header.
fn with(image: &[SparseContent], at: u64, bytes: &[u8]) -> World {
    let mut image = image.to_vec();
    image[0].write(at, bytes);
    World::new(image)
}

#[test]
fn what_a_header_cannot_say_is_refused_by_name() {
    if !has_qemu("what_a_header_cannot_say_is_refused_by_name") {
        return;
    }
    let safe = Safe::new();
    safe.create_luks("cipher-alg=aes-128", "64k");
    let image = safe.content();
    let word = |text: &str| text.as_bytes().to_vec();
    let number = |number: u32| number.to_be_bytes().to_vec();
    let slot = 208;
    for (at, bytes, why) in [
        (0, word("X"), "does not begin as one of LUKS"),
        (6, vec![0, 2], "LUKS version 2"),
        (6, vec![0, 9], "version 9"),
        (8, word("serpent\0"), "serpent-xts-plain64"),
        (40, word("cbc-essiv:sha256\0"), "aes-cbc-essiv:sha256"),
        (40, word("xts-plain\0"), "only aes-xts-plain64"),
        (40, vec![b'x'; 32], "not printable ASCII"),
        (40, word("\x07"), "not printable ASCII"),
        (72, word("ripemd160\0"), "ripemd160"),
        (104, number(0), "where the keys are"),
        (104, number(u32::MAX), "cut off"),
        (108, number(16), "a key of 16 bytes"),
        (108, number(u32::MAX), "a key of 4294967295 bytes"),
        (164, number(0), "no iterations"),
        (164, number(u32::MAX), "rounds of sha256"),
        (slot, number(1), "neither used nor free"),
        (slot, number(0xdead), "no key slot in use"),
        (slot + 4, number(0), "no iterations"),
        (slot + 4, number(u32::MAX), "shorter iter-time"),
        (slot + 40, number(1), "where it cannot be"),
        (slot + 40, number(u32::MAX), "where it cannot be"),
        (slot + 44, number(u32::MAX), "stripes"),
        (slot + 44, number(0), "0 stripes"),
    ] {
        let failure = refused(&with(&image, at, &bytes), Some(key()));
        assert!(failure.message.contains(why), "{at}: {failure}");
        assert!(failure.message.starts_with("image: "), "{at}: {failure}");
    }
    for (len, why) in [
        (300, "cut off"),
        (100_000, "where it cannot be"),
        (image[0].len - 1, "sectors"),
    ] {
        let mut cut = image.clone();
        cut[0].set_len(len);
        let failure = refused(&World::new(cut), Some(key()));
        assert!(failure.message.contains(why), "{len}: {failure}");
    }
}

/// As many as cryptsetup makes on a fast processor, where it takes two seconds for each.
#[test]
fn eight_keys_of_default_cost_are_not_too_many() {
    if !has_qemu("eight_keys_of_default_cost_are_not_too_many") {
        return;
    }
    let safe = Safe::new();
    safe.create_luks("cipher-alg=aes-256", "64k");
    let mut image = safe.content();
    let material = image[0].clone();
    let mut of_first = [0; 48];
    material.read(208, &mut of_first);
    let header = |image: &[SparseContent]| {
        let file = World::new(image.to_vec()).file(0);
        run(async move { luks::header(&file).await })
    };
    for (iterations, is_fine) in [(16_000_000_u32, true), (64_000_000, false)] {
        for slot in 0..8 {
            let mut bytes = of_first;
            bytes[4..8].copy_from_slice(&iterations.to_be_bytes());
            image[0].write(208 + slot * 48, &bytes);
        }
        assert_eq!(header(&image).is_ok(), is_fine, "{iterations}");
    }
}

/// No header makes the driver panic or run for long, and only the right key opens an image.
#[test]
fn damaged_headers_do_no_harm() {
    if !has_qemu("damaged_headers_do_no_harm") {
        return;
    }
    let safe = Safe::new();
    safe.create_luks("cipher-alg=aes-128", "64k");
    let image = safe.content();
    let mut opened = 0;
    for seed in Seeds::new(80) {
        let mut chance = SeededRng(seed);
        let mut bytes = image.clone();
        for _ in 0..1 + chance.below(3) {
            let at = chance.below(592);
            // A larger number of iterations that is allowed would only take long; other tests cover the limit.
            let of_slot = (at + 48 - 208 % 48) % 48;
            if (164..166).contains(&at) || at >= 208 && (4..6).contains(&of_slot) {
                continue;
            }
            bytes[0].write(at, &[chance.next() as u8]);
        }
        let open = |world: &World| disk(world.file(0), Some(key()));
        opened += u32::from(try_wrong(bytes, &open, seed));
    }
    // Some bytes do not matter, such as unused slots.
    assert!((1..80).contains(&opened), "{opened}");
}
