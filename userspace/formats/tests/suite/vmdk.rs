// SPDX-License-Identifier: MIT OR Apache-2.0
//! VMDK: the driver reads the images of other programs and they read the driver's, and no data is lost or shown that
//! should not be.

use crate::common::history::{lost_flush_is_told, lost_flush_is_told_beside, stamp, Trial};
use crate::common::places::{told_is_sure, told_stays_true};
use crate::common::tools::{
    content, failed_writes_stay_undone, file, first_write_survives_a_cut, folder,
    goes_on_with_qemu, has_qemu, parent, parent_number, parent_or_new_after_a_cut,
    pause_fails_only_if_something_is_lost, scribble, text, tool, try_wrong, whole, PARENT_SIZE,
};
use crate::common::{run, SeededRng, SparseContent, World, SECTOR};
use control::Code;
use diskio::{Bytes, Data, File, Io, Runtime};
use drivers::{Attributes, Disk};
use formats::vmdk::{create, id, look, plan, Form, Vmdk, VmdkCreate};
use formats::{ImageParts, Options};
use seeds::Seeds;
use std::path::{Path, PathBuf};
use std::rc::Rc;

const SIZE: u64 = (9 << 20) + 3 * 512;

fn make(form: Form, size: u64, has_parent: bool) -> VmdkCreate {
    VmdkCreate {
        form,
        size,
        name: "a.vmdk".into(),
        parent: has_parent.then(|| ("base.vmdk".into(), 0xabcd)),
        cid: 0x1234_5678,
    }
}

/// The files of a new image: the image, and its extents.
fn image(what: &VmdkCreate) -> Vec<SparseContent> {
    let count = plan(what).unwrap().len();
    let world = World::new(vec![SparseContent::default(); 1 + count]);
    let (first, rest) = (
        world.file(0),
        (1..=count)
            .map(|number| world.file(number))
            .collect::<Vec<_>>(),
    );
    let what = what.clone();
    run(async move { create(&first, &rest, &what).await }).unwrap();
    world.files()
}

fn open(world: &World, has_parent: bool) -> Disk {
    let extents = (1..world.files().len())
        .map(|number| world.file(number))
        .collect();
    let parent = has_parent.then(parent);
    let options = Options {
        cache: 4096,
        ..Options::new("image")
    };
    Disk::new(Vmdk::new(
        world.file(0),
        ImageParts { parent, extents },
        options,
    ))
}

fn trial(form: Form, has_parent: bool, seed: u64) -> Trial {
    Trial {
        name: format!("vmdk {form:?} {has_parent}"),
        size: SIZE,
        files: image(&make(form, SIZE, has_parent)),
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
    for (form, has_parent) in [
        (Form::MonolithicSparse, false),
        (Form::MonolithicSparse, true),
        (Form::TwoGbMaxExtentSparse, true),
        (Form::MonolithicFlat, false),
        (Form::TwoGbMaxExtentFlat, false),
    ] {
        for seed in Seeds::few(4) {
            trial(form, has_parent, seed).run(20);
        }
    }
}

#[test]
fn first_write_survives_the_loss_of_power() {
    first_write_survives_a_cut(
        &image(&make(Form::MonolithicSparse, SIZE, false)),
        &|world| open(world, false),
    );
}

/// Opens the image at `path` with the extents that it names.
async fn open_file(io: &Io, path: &Path, write: bool) -> Disk {
    let image: File = file(io, path, write);
    let needs = look(&image).await.unwrap();
    let folder = path.parent().unwrap();
    let names = needs.extents.iter().map(|extent| folder.join(&extent.name));
    let parts = ImageParts {
        parent: None,
        extents: names.map(|path| file(io, &path, write)).collect(),
    };
    Disk::new(Vmdk::new(image, parts, Options::new("image")))
}

const FORMS: [(Form, &str); 4] = [
    (Form::MonolithicSparse, "monolithicSparse"),
    (Form::MonolithicFlat, "monolithicFlat"),
    (Form::TwoGbMaxExtentSparse, "twoGbMaxExtentSparse"),
    (Form::TwoGbMaxExtentFlat, "twoGbMaxExtentFlat"),
];

#[test]
fn qemu_reads_what_is_written() {
    if !has_qemu("qemu_reads_what_is_written") {
        return;
    }
    for (form, name) in FORMS {
        let folder = folder();
        let path = folder.path().join("a.vmdk");
        let runtime = Runtime::new();
        let (io, its) = (runtime.io.clone(), path.clone());
        let model = runtime.block_on(async move {
            let what = make(form, SIZE, false);
            let extents: Vec<File> = plan(&what)
                .unwrap()
                .iter()
                .map(|new| file(&io, &its.with_file_name(&new.name), true))
                .collect();
            let image = file(&io, &its, true);
            create(&image, &extents, &what).await.unwrap();
            let disk = open_file(&io, &its, true).await;
            disk.activate().await.unwrap();
            let mut model = vec![0; SIZE as usize];
            scribble(&disk, &mut model, 1, 60).await.unwrap();
            disk.inactivate().await.unwrap();
            assert_ne!(
                id(&image).await.unwrap(),
                "12345678",
                "the content has changed"
            );
            model
        });
        assert!(
            content("vmdk", &path, folder.path()) == model.unwrap(),
            "{name}"
        );
        let info = tool("qemu-img", &["info", "-f", "vmdk", text(&path)]);
        assert!(info.contains(&format!("create type: {name}")), "{info}");
        tool("qemu-img", &["check", "-f", "vmdk", text(&path)]);
    }
}

#[test]
fn what_qemu_writes_is_read_and_both_go_on() {
    if !has_qemu("what_qemu_writes_is_read_and_both_go_on") {
        return;
    }
    let writes = [
        "write -P 7 1M 3M",
        "write -P 9 4095k 5k",
        "write -z 2M 128k",
        "write -P 3 8704k 4k",
    ];
    let names = FORMS.map(|(_, name)| name).into_iter();
    for options in names.chain(["monolithicSparse,zeroed_grain=on"]) {
        let folder = folder();
        let path = folder.path().join("a.vmdk");
        let options = format!("subformat={options}");
        let open = async |io: Io, path: PathBuf| open_file(&io, &path, true).await;
        goes_on_with_qemu("vmdk", &path, &["-o", &options], &writes, open, || {
            tool("qemu-img", &["check", "-f", "vmdk", text(&path)]);
        });
    }
}

#[test]
fn compressed_images_are_read_and_not_written() {
    if !has_qemu("compressed_images_are_read_and_not_written") {
        return;
    }
    let folder = folder();
    let (raw, path) = (folder.path().join("a.raw"), folder.path().join("a.vmdk"));
    let mut chance = SeededRng(4);
    let model: Vec<u8> = (0..(9 << 20) + (5 << 10))
        .map(|at| match at >> 18 & 3 {
            0 => 0,
            1 => (at >> 9) as u8,
            // Incompressible bytes.
            _ => chance.next() as u8,
        })
        .collect();
    std::fs::write(&raw, &model).unwrap();
    let args = [
        "convert",
        "-f",
        "raw",
        "-O",
        "vmdk",
        "-o",
        "subformat=streamOptimized",
        text(&raw),
        text(&path),
    ];
    tool("qemu-img", &args);
    let runtime = Runtime::new();
    let (io, its) = (runtime.io.clone(), path.clone());
    runtime
        .block_on(async move {
            let disk = open_file(&io, &its, false).await;
            let shape = disk.activate().await.unwrap();
            let bytes = whole(&disk, shape.size).await.unwrap();
            assert!(
                bytes[..model.len()] == model && bytes[model.len()..].iter().all(|byte| *byte == 0)
            );
            let failure = open_file(&io, &its, true)
                .await
                .activate()
                .await
                .unwrap_err();
            assert_eq!(failure.code, Code::Image);
            assert!(failure.message.contains("streamOptimized"), "{failure}");
        })
        .unwrap();
}

#[test]
fn parents_are_named_and_wanted() {
    if has_qemu("parents_are_named_and_wanted") {
        let folder = folder();
        let (base, path) = (
            folder.path().join("base.vmdk"),
            folder.path().join("a.vmdk"),
        );
        tool(
            "qemu-img",
            &["create", "-q", "-f", "vmdk", text(&base), "9M"],
        );
        tool(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                "vmdk",
                "-b",
                "base.vmdk",
                "-F",
                "vmdk",
                text(&path),
            ],
        );
        let runtime = Runtime::new();
        let io = runtime.io.clone();
        runtime
            .block_on(async move {
                let needs = look(&file(&io, &path, false)).await.unwrap();
                let parent = needs.parent.unwrap();
                assert_eq!(parent.names, ["base.vmdk"]);
                let its = id(&file(&io, &base, false)).await.unwrap();
                assert_eq!(parent.id, Some(its));
            })
            .unwrap();
    }
    let world = World::new(image(&make(Form::MonolithicSparse, SIZE, true)));
    run(async move {
        let failure = open(&world, false).activate().await.unwrap_err();
        assert!(failure.message.contains("parent"), "{failure}");
    });
}

#[test]
fn new_disks_have_names_and_limits() {
    let what = make(Form::TwoGbMaxExtentSparse, 5 << 30, false);
    let names: Vec<String> = plan(&what)
        .unwrap()
        .into_iter()
        .map(|new| new.name)
        .collect();
    assert_eq!(names, ["a-s001.vmdk", "a-s002.vmdk", "a-s003.vmdk"]);
    for wrong in [
        make(Form::MonolithicSparse, 3 << 40, false),
        make(Form::MonolithicFlat, 512, true),
        make(Form::MonolithicSparse, 511, false),
        VmdkCreate {
            name: "../a.vmdk".into(),
            ..make(Form::MonolithicSparse, 512, false)
        },
    ] {
        assert_eq!(plan(&wrong).unwrap_err().code, Code::Invalid);
    }
}

#[test]
fn disk_of_several_files_is_one() {
    let size = (4 << 30) + 512;
    let world = World::new(image(&make(Form::TwoGbMaxExtentSparse, size, false)));
    let disk = open(&world, false);
    run(async move {
        assert_eq!(disk.activate().await.unwrap().size, size);
        let border = 0x8000_0000 - 65536;
        for at in [0, border - 4096, size - 8192] {
            let bytes = Bytes::copied(&[(at >> 20) as u8 | 1; 8192]).unwrap();
            disk.write(at, bytes, Attributes::default()).await.unwrap();
        }
        disk.inactivate().await.unwrap();
        let disk = open(&world, false);
        disk.activate().await.unwrap();
        for at in [0, border - 4096, size - 8192] {
            let data = diskio::Data::zeroed(8192).unwrap();
            disk.read(at, data.clone()).await.unwrap();
            assert_eq!(data.to_vec(), [(at >> 20) as u8 | 1; 8192]);
        }
    });
}

#[test]
fn wrong_images_are_refused_or_served_and_never_worse() {
    let mut opened = 0;
    for form in [Form::MonolithicSparse, Form::TwoGbMaxExtentFlat] {
        let world = World::new(image(&make(form, SIZE, false)));
        let disk = open(&world, false);
        run(async move {
            disk.activate().await.unwrap();
            let mut model = vec![0; SIZE as usize];
            scribble(&disk, &mut model, 3, 20).await.unwrap();
            disk.inactivate().await.unwrap();
        });
        let good = world.files();
        let mut chance = SeededRng(99);
        for round in 0..400 {
            let mut files = good.clone();
            let length = files[0].len;
            for _ in 0..1 + chance.below(3) {
                // The header, the descriptor, the directories, the tables.
                let at = match chance.below(4) {
                    0 => chance.below(80),
                    1 => 512 + chance.below(600),
                    2 => 21 * 512 + chance.below(8),
                    _ => chance.below(16384),
                };
                let at = at.min(length - 8);
                let value = match chance.below(4) {
                    0 => u64::MAX,
                    1 => length / 512,
                    2 => chance.below(1 << 24),
                    _ => chance.next(),
                };
                let count = 1 << chance.below(4);
                files[0].write(at, &value.to_le_bytes()[..count]);
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
    failed_writes_stay_undone(
        &image(&make(Form::MonolithicSparse, SIZE, false)),
        &|world| open(world, false),
        64 << 10,
    );
}

/// A hostile image must not let its guest overwrite data that the driver trusts.
#[test]
fn grain_on_the_descriptor_or_a_directory_is_refused() {
    // The header, the descriptor from sector 1 on, the second map from 21 on, and the first from 26 on.
    let good = image(&make(Form::MonolithicSparse, SIZE, false));
    let mut head = vec![0; 128 * 512];
    good[0].read(0, &mut head);
    for sector in [1_u32, 2, 20, 21, 22, 26] {
        let mut files = good.clone();
        files[0].write(27 * 512, &sector.to_le_bytes());
        head[27 * 512..][..4].copy_from_slice(&sector.to_le_bytes());
        let world = World::new(files);
        let disk = open(&world, false);
        run(async move {
            let how = Attributes::default();
            disk.activate().await.unwrap();
            let data = Data::zeroed(SECTOR).unwrap();
            assert!(disk.read(0, data).await.is_err(), "{sector}");
            let bytes = Bytes::copied(&[7; SECTOR]).unwrap();
            for at in [0, 512, 4 * 512] {
                assert!(
                    disk.write(at, bytes.clone(), how).await.is_err(),
                    "{sector}"
                );
                assert!(disk.write_zeroes(at, 512, how).await.is_err(), "{sector}");
                assert!(disk.discard(at, 512, how).await.is_err(), "{sector}");
            }
        });
        let mut found = vec![0; head.len()];
        world.files()[0].read(0, &mut found);
        // The number of the content changes with any attempt.
        let is_same = |range: std::ops::Range<usize>| found[range.clone()] == head[range];
        assert!(is_same(0..512) && is_same(1024..head.len()), "{sector}");
    }
    // Places of a table must be refused as well.
    for sector in [1_u32, 19, 21, 26] {
        let mut files = good.clone();
        files[0].write(26 * 512, &sector.to_le_bytes());
        let disk = open(&World::new(files), false);
        let failure = run(async move { disk.activate().await }).unwrap_err();
        assert_eq!(failure.code, Code::Image, "{sector}");
    }
}

#[test]
fn pause_without_space_loses_nothing() {
    pause_fails_only_if_something_is_lost(
        &image(&make(Form::MonolithicSparse, SIZE, false)),
        &|world| open(world, false),
    );
}

/// A disk of extents, each with a line of its own.
fn lines(lines: &[&str]) -> SparseContent {
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"custom\"\n{}\n",
        lines.join("\n")
    );
    SparseContent::from(text.as_bytes())
}

#[test]
fn file_with_two_names_is_refused() {
    let known = |list: &[&str]| {
        let storage = World::new(vec![lines(list)]).file(0);
        run(async move { look(&storage).await })
    };
    for wrong in [
        ["RW 8 SPARSE \"a\"", "RW 8 SPARSE \"a\""],
        ["RW 8 SPARSE \"a\"", "RW 8 FLAT \"a\" 64"],
        ["RW 8 FLAT \"a\" 7", "RW 8 FLAT \"a\" 0"],
        ["RW 8 FLAT \"a\" 0", "RW 8 FLAT \"a\" 0"],
    ] {
        let failure = known(&wrong).unwrap_err();
        assert_eq!(failure.code, Code::Image, "{wrong:?}");
        assert!(failure.message.contains("names a for two"), "{failure}");
    }
    // Partitions of a disk.
    let needs = known(&["RW 8 FLAT \"a\" 8", "RW 8 FLAT \"a\" 0", "RW 8 ZERO"]).unwrap();
    assert_eq!((needs.size, needs.extents.len()), (24 * 512, 2));
}

/// Extents that are small and say that they are large must not take memory each.
#[test]
fn directories_have_a_budget_together() {
    let mut head = vec![0; 512];
    head[..4].copy_from_slice(b"KDMV");
    head[4] = 1;
    // A second directory, both of 16 MiB, for grains of 8 sectors in tables of 512.
    head[8] = 2;
    let sectors: u64 = 8 * 512 * (4 << 20);
    for (at, number) in [(12, sectors), (20, 8), (48, 1), (56, 1)] {
        head[at..at + 8].copy_from_slice(&u64::to_le_bytes(number));
    }
    head[44..48].copy_from_slice(&512_u32.to_le_bytes());
    let mut extent = SparseContent::from(&head);
    extent.set_len(17 << 20);
    let names = [
        "RW 8 SPARSE \"a\"",
        "RW 8 SPARSE \"b\"",
        "RW 8 SPARSE \"c\"",
    ];
    let files = vec![lines(&names), extent.clone(), extent.clone(), extent];
    let disk = open(&World::new(files), false);
    let failure = run(async move { disk.activate().await }).unwrap_err();
    assert_eq!(failure.code, Code::Image);
    assert!(failure.message.contains("64 MiB"), "{failure}");
}

#[test]
fn power_cut_over_a_parent_leaves_old_or_new() {
    parent_or_new_after_a_cut(
        &image(&make(Form::MonolithicSparse, SIZE, true)),
        &|world| open(world, true),
        64 << 10,
    );
}

#[test]
fn what_the_kernel_is_told_stays_true() {
    for has_parent in [false, true] {
        told_stays_true(has_parent, |seed| {
            trial(Form::MonolithicSparse, has_parent, seed)
        });
    }
}

/// A program that compares the image with an older copy must see that the content has changed.
#[test]
fn nothing_is_written_before_the_image_shows_it() {
    let world = World::new(image(&make(Form::MonolithicSparse, SIZE, false)));
    let bytes = || Bytes::copied(&stamp(1, 0)).unwrap();
    let first = open(&world, false);
    run(async move {
        first.activate().await.unwrap();
        first
            .write(0, bytes(), Attributes::default())
            .await
            .unwrap();
        first.close().await.unwrap();
    });
    let disk = open(&world, false);
    let (before, after) = run(async move {
        disk.activate().await.unwrap();
        let before = disk.places(0, SECTOR as u64).await.unwrap();
        disk.write(0, bytes(), Attributes::default()).await.unwrap();
        (before, disk.places(0, SECTOR as u64).await.unwrap())
    });
    assert_eq!([before.len(), after.len()], [1, 1]);
    assert!(!before[0].writable && after[0].writable);
}

#[test]
fn what_is_not_sure_is_not_told() {
    told_is_sure(|| trial(Form::MonolithicSparse, false, 1));
}

#[test]
fn a_flush_that_fails_within_a_write_is_told() {
    lost_flush_is_told(|| trial(Form::MonolithicSparse, true, 1));
}

#[test]
fn a_flush_that_fails_beside_the_guests_is_told() {
    lost_flush_is_told_beside(|seed| trial(Form::MonolithicSparse, true, seed));
}
