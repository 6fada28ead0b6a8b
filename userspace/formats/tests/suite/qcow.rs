// SPDX-License-Identifier: MIT OR Apache-2.0
//! qcow: what QEMU and blktap wrote is read, what we write QEMU reads, and nothing is lost or shown that
//! should not be.

use crate::common::history::{lost_flush_is_told, lost_flush_is_told_beside, Trial};
use crate::common::places::{told_is_sure, told_stays_true};
use crate::common::tools::{
    content, failed_writes_stay_undone, file, first_write_survives_a_cut, folder,
    goes_on_with_qemu, has_qemu, parent, parent_number, parent_or_new_after_a_cut,
    pause_fails_only_if_something_is_lost, scribble, text, tool, try_wrong, whole, PARENT_SIZE,
};
use crate::common::{run, SeededRng, SparseContent, World};
use control::Code;
use diskio::{Io, Runtime};
use drivers::Disk;
use formats::qcow::{create, look, Qcow, QcowCreate};
use formats::{ImageParts, Options};
use seeds::Seeds;
use std::path::PathBuf;
use std::rc::Rc;

const SIZE: u64 = (5 << 20) + 3 * 512;

fn make(size: u64, has_parent: bool) -> QcowCreate {
    QcowCreate {
        size,
        parent: has_parent.then(|| "base.img".into()),
    }
}

fn image(what: QcowCreate) -> Vec<SparseContent> {
    let world = World::new(vec![SparseContent::default()]);
    let storage = world.file(0);
    run(async move { create(&storage, &what).await }).unwrap();
    world.files()
}

fn open(world: &World, has_parent: bool) -> Disk {
    let parent = has_parent.then(parent);
    let options = Options {
        cache: 8192,
        ..Options::new("image")
    };
    Disk::new(Qcow::new(world.file(0), parts(parent), options))
}

fn parts<S>(parent: Option<Disk>) -> ImageParts<S> {
    ImageParts {
        parent,
        ..ImageParts::default()
    }
}

fn trial(has_parent: bool, seed: u64) -> Trial {
    Trial {
        name: format!("qcow {has_parent}"),
        size: SIZE,
        files: image(make(SIZE, has_parent)),
        open: Rc::new(move |world| open(world, has_parent)),
        base: match has_parent {
            true => Rc::new(|sector| match sector * 512 < PARENT_SIZE {
                true => parent_number(sector),
                false => 0,
            }),
            false => Rc::new(|_| 0),
        },
        unit: 64 << 10,
        seed,
    }
}

#[test]
fn nothing_is_lost_and_nothing_stale_is_shown() {
    for has_parent in [false, true] {
        for seed in Seeds::few(4) {
            trial(has_parent, seed).run(12);
        }
    }
}

#[test]
fn first_write_survives_the_loss_of_power() {
    first_write_survives_a_cut(&image(make(SIZE, false)), &|world| open(world, false));
}

#[test]
fn qemu_reads_what_is_written() {
    if !has_qemu("qemu_reads_what_is_written") {
        return;
    }
    let folder = folder();
    let path = folder.path().join("a.qcow");
    let runtime = Runtime::new();
    let storage = file(&runtime.io, &path, true);
    let model = runtime.block_on(async move {
        create(&storage, &make(SIZE, false)).await.unwrap();
        let disk = Disk::new(Qcow::new(
            storage,
            ImageParts::default(),
            Options::new("image"),
        ));
        disk.activate().await.unwrap();
        let mut model = vec![0; SIZE as usize];
        scribble(&disk, &mut model, 1, 40).await.unwrap();
        disk.inactivate().await.unwrap();
        model
    });
    assert!(content("qcow", &path, folder.path()) == model.unwrap());
}

#[test]
fn what_qemu_writes_is_read_and_both_go_on() {
    if !has_qemu("what_qemu_writes_is_read_and_both_go_on") {
        return;
    }
    let folder = folder();
    let (path, base) = (folder.path().join("a.qcow"), folder.path().join("base.raw"));
    std::fs::write(&base, vec![0x55; 5 << 20]).unwrap();
    let writes = [
        "write -P 7 1M 1M",
        "write -P 9 4095k 5k",
        "write -P 3 8704k 4k",
    ];
    for has_backing in [false, true] {
        let backing = ["-b", "base.raw", "-F", "raw"];
        let backing = if has_backing { &backing[..] } else { &[] };
        let base = base.clone();
        let open = async move |io: Io, path: PathBuf| {
            let storage = file(&io, &path, true);
            let parent = look(&storage).await.unwrap().parent;
            let names: Vec<String> = parent.into_iter().flat_map(|parent| parent.names).collect();
            assert_eq!(names, if has_backing { &["base.raw"][..] } else { &[] });
            let parent =
                has_backing.then(|| Disk::new(drivers::Raw::new(file(&io, &base, false), false)));
            Disk::new(Qcow::new(storage, parts(parent), Options::new("image")))
        };
        goes_on_with_qemu("qcow", &path, backing, &writes, open, || ());
    }
}

#[test]
fn compressed_clusters_are_read_and_written_over() {
    if !has_qemu("compressed_clusters_are_read_and_written_over") {
        return;
    }
    let folder = folder();
    let (raw, path) = (folder.path().join("a.raw"), folder.path().join("a.qcow"));
    let model: Vec<u8> = (0..9 << 20)
        .map(|at: u32| {
            if at >> 16 & 1 == 0 {
                (at >> 9) as u8
            } else {
                0
            }
        })
        .collect();
    std::fs::write(&raw, &model).unwrap();
    // QEMU 10 makes the image and still ends with an error, so the test compares its result.
    let args = [
        "convert",
        "-c",
        "-f",
        "raw",
        "-O",
        "qcow",
        text(&raw),
        text(&path),
    ];
    let _ = std::process::Command::new("qemu-img")
        .args(args)
        .status()
        .unwrap();
    let args = [
        "compare",
        "-f",
        "raw",
        "-F",
        "qcow",
        text(&raw),
        text(&path),
    ];
    tool("qemu-img", &args);
    assert!(path.metadata().unwrap().len() < 2 << 20, "it is compressed");
    let runtime = Runtime::new();
    let storage = file(&runtime.io, &path, true);
    let model = runtime.block_on(async move {
        let disk = Disk::new(Qcow::new(
            storage,
            ImageParts::default(),
            Options::new("image"),
        ));
        let shape = disk.activate().await.unwrap();
        assert!(whole(&disk, shape.size).await.unwrap() == model);
        let mut model = model;
        scribble(&disk, &mut model, 5, 30).await.unwrap();
        assert!(whole(&disk, shape.size).await.unwrap() == model);
        disk.close().await.unwrap();
        model
    });
    assert!(content("qcow", &path, folder.path()) == model.unwrap());
}

/// Makes an image of an early blktap: a header, and a first table whose numbers begin with the lowest byte.
fn early() -> (Vec<SparseContent>, Vec<u8>) {
    let world = World::new(image(make(SIZE, false)));
    let disk = open(&world, false);
    let model = run(async move {
        disk.activate().await.unwrap();
        let mut model = vec![0; SIZE as usize];
        scribble(&disk, &mut model, 8, 40).await.unwrap();
        disk.inactivate().await.unwrap();
        model
    });
    let mut files = world.files();
    files[0].write(48, b"XEN\xfb\0\0\0\0\0\0\x02\0\0\0\0\x01");
    for number in 0..3 {
        turn(&mut files[0], number);
    }
    (files, model)
}

fn turn(content: &mut SparseContent, number: u64) {
    let mut entry = [0; 8];
    content.read(4096 + number * 8, &mut entry);
    entry.reverse();
    content.write(4096 + number * 8, &entry);
}

#[test]
fn table_of_an_early_blktap_is_put_right_wherever_that_was_interrupted() {
    let (files, model) = early();
    let check = |files: Vec<SparseContent>, read_only: bool| {
        let world = World::new(files);
        let mut storage = world.file(0);
        storage.read_only = read_only;
        let (disk, model) = (
            Disk::new(Qcow::new(
                storage,
                ImageParts::default(),
                Options::new("image"),
            )),
            model.clone(),
        );
        run(async move {
            disk.activate().await.unwrap();
            assert!(whole(&disk, SIZE).await.unwrap() == model);
        });
        world
    };
    // A reader must not change it.
    assert_eq!(check(files.clone(), true).files(), files);
    let world = check(files.clone(), false);
    let mut flags = [0; 4];
    world.files()[0].read(60, &mut flags);
    assert_eq!(flags, [0, 0, 0, 3]);
    let mut then = files.clone();
    for (file, what) in world.log() {
        then[file].apply(&what);
        check(then.clone(), false);
    }
    // Another process died when it had turned some of them.
    let mut half = files;
    turn(&mut half[0], 1);
    check(half.clone(), false);
    half[0].write(4096, &[0xff; 8]);
    let failure = run({
        let disk = open(&World::new(half), false);
        async move { disk.activate().await.unwrap_err() }
    });
    assert!(failure.message.contains("either order"), "{failure}");
}

#[test]
fn encrypted_and_newer_images_are_refused_by_name() {
    let files = image(make(SIZE, false));
    for (at, bytes, word) in [(36, [0, 0, 0, 1], "encrypted"), (4, [0, 0, 0, 2], "qcow2")] {
        let mut files = files.clone();
        files[0].write(at, &bytes);
        let disk = open(&World::new(files), false);
        let failure = run(async move { disk.activate().await.unwrap_err() });
        assert_eq!(failure.code, Code::Image);
        assert!(failure.message.contains(word), "{failure}");
    }
}

#[test]
fn wrong_images_are_refused_or_served_and_never_worse() {
    let mut opened = 0;
    let (early, _) = early();
    let world = World::new(image(make(SIZE, false)));
    let disk = open(&world, false);
    run(async move {
        disk.activate().await.unwrap();
        let mut model = vec![0; SIZE as usize];
        scribble(&disk, &mut model, 3, 40).await.unwrap();
        disk.inactivate().await.unwrap();
    });
    for good in [early, world.files()] {
        let mut chance = SeededRng(99);
        for round in 0..400 {
            let mut files = good.clone();
            let length = files[0].len;
            for _ in 0..1 + chance.below(3) {
                // The header, the first table, and the second ones, which are behind it.
                let at = match chance.below(4) {
                    0 => chance.below(64),
                    1 => 4096 + chance.below(24),
                    _ => 8192 + chance.below(8192),
                };
                let value = match chance.below(4) {
                    0 => u64::MAX,
                    1 => length,
                    2 => chance.below(1 << 24) | 1 << 63,
                    _ => chance.next(),
                };
                let count = 1 << chance.below(4);
                files[0].write(at, &value.to_be_bytes()[8 - count..]);
            }
            if chance.below(8) == 0 {
                files[0].set_len(chance.below(length));
            }
            opened += usize::from(try_wrong(files, &|world| open(world, false), round));
        }
    }
    assert!((80..790).contains(&opened), "{opened} of 800 were opened");
}

#[test]
fn failed_write_is_not_carried_out_later() {
    failed_writes_stay_undone(&image(make(SIZE, false)), &|world| open(world, false), 4096);
}

#[test]
fn pause_without_space_loses_nothing() {
    pause_fails_only_if_something_is_lost(&image(make(SIZE, false)), &|world| open(world, false));
}

#[test]
fn power_cut_over_a_parent_leaves_old_or_new() {
    parent_or_new_after_a_cut(&image(make(SIZE, true)), &|world| open(world, true), 4096);
}

#[test]
fn what_the_kernel_is_told_stays_true() {
    for has_parent in [false, true] {
        told_stays_true(has_parent, |seed| trial(has_parent, seed));
    }
}

#[test]
fn what_is_not_sure_is_not_told() {
    told_is_sure(|| trial(false, 1));
}

#[test]
fn a_flush_that_fails_within_a_write_is_told() {
    lost_flush_is_told(|| trial(true, 1));
}

#[test]
fn a_flush_that_fails_beside_the_guests_is_told() {
    lost_flush_is_told_beside(|seed| trial(true, seed));
}
