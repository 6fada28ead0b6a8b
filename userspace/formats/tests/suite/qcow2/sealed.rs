// SPDX-License-Identifier: MIT OR Apache-2.0
//! qcow2 that is encrypted with LUKS: both ways with QEMU, through deaths and power cuts, and without the key.

use crate::common::history::Trial;
use crate::common::secret::{key, of, Safe};
use crate::common::tools::{
    has_qemu, parent, parent_number, scribble, try_wrong, whole, PARENT_SIZE,
};
use crate::common::{run, SeededRng, SparseContent, World};
use control::Code;
use diskio::{Bytes, Data, Errno, Runtime};
use drivers::{Attributes, Disk, Driver};
use formats::luks::ImageKey;
use formats::qcow2::{check, create, look, set_backing, BackingImage, Qcow2, Qcow2Create};
use formats::{ImageParts, Options, Storage};
use seeds::Seeds;
use std::rc::Rc;

const SIZE: u64 = (3 << 20) + 512;

fn options(key: Option<ImageKey>) -> Options {
    Options {
        key,
        cache: 8192,
        ..Options::new("image")
    }
}

fn qcow2<S: Storage>(storage: S, parent: Option<Disk>, key: Option<ImageKey>) -> Qcow2<S> {
    let parts = ImageParts {
        parent,
        ..ImageParts::default()
    };
    Qcow2::new(storage, parts, options(key))
}

/// An image of QEMU with the cheapest key.
fn made(options: &str, size: u64) -> Safe {
    let safe = Safe::new();
    let keys = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1";
    safe.create("qcow2", &format!("{keys},{options}"), &size.to_string());
    safe
}

/// The clusters of small images are used by now.
const LAYOUTS: [&str; 5] = [
    "cluster_size=4k,encrypt.cipher-alg=aes-128,encrypt.hash-alg=sha1",
    "cluster_size=64k",
    "cluster_size=512",
    "compat=0.10",
    "cluster_size=16k,extended_l2=on",
];

#[test]
fn qemu_and_we_read_what_the_other_writes() {
    if !has_qemu("qemu_and_we_read_what_the_other_writes") {
        return;
    }
    for layout in LAYOUTS {
        let safe = made(layout, SIZE);
        let writes = [
            "write -P 7 0 1M",
            "write -P 9 2095104 1025k",
            "write -P 3 100k 512",
        ];
        safe.io("qcow2", &writes);
        let mut model = safe.read("qcow2");
        for seed in 0..2 {
            let runtime = Runtime::new();
            let storage = safe.file(&runtime, true);
            let work = async move {
                let image = qcow2(storage.clone(), None, Some(key()));
                image.activate().await.unwrap();
                let found = image.findings().await.unwrap();
                assert_eq!((found.unsafe_clusters, found.leaks), (0, 0), "{layout}");
                image.close().await.unwrap();
                let disk = Disk::new(qcow2(storage, None, Some(key())));
                assert_eq!(disk.activate().await.unwrap().size, SIZE);
                assert!(whole(&disk, SIZE).await.unwrap() == model, "{layout}");
                scribble(&disk, &mut model, seed, 40).await.unwrap();
                disk.inactivate().await.unwrap();
                model
            };
            model = runtime.block_on(work).unwrap();
            safe.check();
            assert!(safe.read("qcow2") == model, "{layout}");
            // QEMU continues where the driver stopped.
            safe.io("qcow2", &["write -P 8 700k 300k", "write -z 50k 9k"]);
            model[700 << 10..1000 << 10].fill(8);
            model[50 << 10..59 << 10].fill(0);
        }
    }
}

#[test]
fn far_end_of_a_large_image() {
    if !has_qemu("far_end_of_a_large_image") {
        return;
    }
    let size = 5 << 40;
    let safe = made("cluster_size=2M", size);
    let at = size - (64 << 10);
    let runtime = Runtime::new();
    let storage = safe.file(&runtime, true);
    let work = async move {
        let disk = Disk::new(qcow2(storage, None, Some(key())));
        disk.activate().await.unwrap();
        let bytes = Bytes::copied(&[6; 512]).unwrap();
        disk.write(at, bytes, Attributes::default()).await.unwrap();
        disk.inactivate().await.unwrap();
    };
    runtime.block_on(work).unwrap();
    let (before, behind) = (at - 512, at + 512);
    let [ours, before, behind] = [("6", at), ("0", before), ("0", behind)]
        .map(|(byte, at)| format!("read -P {byte} {at} 512"));
    safe.io("qcow2", &[&ours, &before, &behind]);
}

/// Answered changes survive a death, flushed ones a power cut, and a prepared cluster is not taken for zeroes, because
/// its decrypted content would be garbage.
#[test]
fn nothing_is_lost_and_nothing_stale_is_shown() {
    if !has_qemu("nothing_is_lost_and_nothing_stale_is_shown") {
        return;
    }
    for (layout, has_parent) in [
        (LAYOUTS[0], true),
        (LAYOUTS[1], false),
        (LAYOUTS[3], false),
        (LAYOUTS[4], true),
    ] {
        let files = over(&made(layout, SIZE), has_parent);
        for seed in Seeds::few(1) {
            let trial = Trial {
                name: format!("{layout} {has_parent}"),
                size: SIZE,
                files: files.clone(),
                open: Rc::new(move |world| {
                    Disk::new(qcow2(world.file(0), has_parent.then(parent), Some(key())))
                }),
                base: Rc::new(
                    move |sector| match has_parent && sector * 512 < PARENT_SIZE {
                        true => parent_number(sector),
                        false => 0,
                    },
                ),
                unit: 16 << 10,
                seed,
            };
            trial.run(3);
        }
    }
}

/// Gives the image a parent if `has_parent` is set.
fn over(safe: &Safe, has_parent: bool) -> Vec<SparseContent> {
    let world = World::new(safe.content());
    let backing = BackingImage {
        name: "base".into(),
        format: Some("raw".into()),
    };
    if has_parent {
        let file = world.file(0);
        run(async move { set_backing(&file, Some(&backing), None).await }).unwrap();
    }
    world.files()
}

#[test]
fn without_the_key_nothing_is_read_or_written() {
    if !has_qemu("without_the_key_nothing_is_read_or_written") {
        return;
    }
    let safe = made("cluster_size=4k,lazy_refcounts=on", SIZE);
    let mut files = safe.content();
    // The image was not closed, so that it would be repaired.
    files[0].write(79, &[1]);
    let world = World::new(files);
    for (wrong, why) in [
        (None, "write key=FILE"),
        (Some(of(b"wrong")), "opens none of the 1 key slots"),
    ] {
        let disk = Disk::new(qcow2(world.file(0), None, wrong));
        let failure = run(async move {
            let failure = disk.activate().await.expect_err("it opened");
            let data = Data::zeroed(512).unwrap();
            assert_eq!(disk.read(0, data).await, Err(Errno::BADFD));
            failure
        });
        assert_eq!(failure.code, Code::Denied, "{failure}");
        assert!(failure.message.contains(why), "{failure}");
    }
    assert_eq!(world.changes(), 0);
    // Facts that need no key are available: the header's names, and the result of a check of refcounts.
    let file = world.file(0);
    let found = run(async move {
        assert_eq!(look(&file).await.unwrap().size, SIZE);
        check(&file, "image", true).await.unwrap()
    });
    assert_eq!((found.leaks, found.unsafe_clusters), (0, 0), "{found:?}");
}

/// A user must not believe that a plain disk is encrypted.
#[test]
fn key_of_an_image_that_is_not_encrypted_is_refused() {
    let world = World::new(vec![SparseContent::default()]);
    let file = world.file(0);
    run(async move { create(&file, &Qcow2Create::new(SIZE)).await }).unwrap();
    let disk = Disk::new(qcow2(world.file(0), None, Some(key())));
    let failure = run(async move { disk.activate().await }).expect_err("it opened");
    assert!(failure.message.contains("remove key="), "{failure}");
}

#[test]
fn storage_sees_nothing_of_what_is_written_and_the_kernel_nothing_at_all() {
    if !has_qemu("storage_sees_nothing_of_what_is_written_and_the_kernel_nothing_at_all") {
        return;
    }
    let world = World::new(made("cluster_size=4k", SIZE).content());
    let image = qcow2(world.file(0), None, Some(key()));
    run(async move {
        image.activate().await.unwrap();
        let how = Attributes::default();
        for number in 0..200 {
            let same = Bytes::copied(&[0x5a; 4096]).unwrap();
            image.write(number * 4096, same, how).await.unwrap();
        }
        assert!(!image.has_places());
        assert_eq!(image.places(0, SIZE).await, Ok(Vec::new()));
        Driver::inactivate(&image).await.unwrap();
    });
    let bytes = world.files()[0].to_vec();
    assert!(!bytes.chunks(16).any(|block| block == [0x5a; 16]));
}

#[test]
fn what_a_header_cannot_say_is_refused_by_name() {
    if !has_qemu("what_a_header_cannot_say_is_refused_by_name") {
        return;
    }
    let image = made("cluster_size=4k", SIZE).content();
    let bytes = image[0].to_vec();
    let kind = 0x0537_be77_u32.to_be_bytes();
    let at = bytes.windows(4).position(|word| word == kind).unwrap() as u64;
    let place = u64::from_be_bytes(bytes[at as usize + 8..][..8].try_into().unwrap());
    let number = |number: u64| number.to_be_bytes().to_vec();
    for (at, bytes, why) in [
        (35, vec![1], "encrypted with AES"),
        (35, vec![3], "a method that is not known"),
        (at, vec![0x7f], "does not say where its keys are"),
        (at + 8, number(0), "cannot be there"),
        (at + 8, number(4097), "cannot be there"),
        (at + 8, number(u64::MAX - 4095), "cannot be there"),
        (at + 16, number(u64::MAX), "cannot be there"),
        (at + 16, number(100), "cut off"),
        (at + 16, number(4096), "where it cannot be"),
        (79, vec![4], "data in another file"),
        (place + 6, vec![0, 2], "LUKS version 2"),
    ] {
        let mut image = image.clone();
        image[0].write(at, &bytes);
        let disk = Disk::new(qcow2(World::new(image).file(0), None, Some(key())));
        let failure = run(async move { disk.activate().await }).expect_err("it opened");
        assert!(failure.message.contains(why), "{at}: {failure}");
    }
}

/// An entry must not lead to the keys, nor to a compressed cluster.
#[test]
fn entries_that_lead_to_the_keys_are_refused() {
    if !has_qemu("entries_that_lead_to_the_keys_are_refused") {
        return;
    }
    let safe = made("cluster_size=4k", SIZE);
    safe.io("qcow2", &["write -P 7 0 4k"]);
    let image = safe.content();
    let be64 = |at: u64| {
        let mut bytes = [0; 8];
        image[0].read(at, &mut bytes);
        u64::from_be_bytes(bytes)
    };
    let l2 = be64(be64(40)) & 0x00ff_ffff_ffff_fe00;
    let keys = {
        let bytes = image[0].to_vec();
        let kind = 0x0537_be77_u32.to_be_bytes();
        let at = bytes.windows(4).position(|word| word == kind).unwrap();
        be64(at as u64 + 8)
    };
    for (entry, reads) in [(1 << 63 | keys, true), (1 << 62 | keys, false)] {
        let mut image = image.clone();
        image[0].write(l2, &u64::to_be_bytes(entry));
        let world = World::new(image);
        let disk = Disk::new(qcow2(world.file(0), None, Some(key())));
        run(async move {
            disk.activate().await.unwrap();
            let data = Data::zeroed(512).unwrap();
            assert_eq!(disk.read(0, data.clone()).await.is_ok(), reads);
            if reads {
                let written = disk.write(0, data, Attributes::default()).await;
                assert_eq!(written, Err(Errno::IO));
            }
        });
    }
}

#[test]
fn damaged_images_do_no_harm() {
    if !has_qemu("damaged_images_do_no_harm") {
        return;
    }
    let safe = made("cluster_size=4k,encrypt.cipher-alg=aes-128", SIZE);
    safe.io("qcow2", &["write -P 7 0 300k"]);
    let image = safe.content();
    let mut opened = 0;
    for seed in Seeds::new(100) {
        let mut chance = SeededRng(seed);
        let mut bytes = image.clone();
        for _ in 0..1 + chance.below(3) {
            let at = 4 + chance.below(200);
            bytes[0].write(at, &[chance.next() as u8]);
        }
        let open = |world: &World| Disk::new(qcow2(world.file(0), None, Some(key())));
        opened += u32::from(try_wrong(bytes, &open, seed));
    }
    assert!((1..100).contains(&opened), "{opened}");
}
