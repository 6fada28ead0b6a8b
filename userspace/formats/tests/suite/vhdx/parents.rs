// SPDX-License-Identifier: MIT OR Apache-2.0
//! Differencing images, which QEMU neither makes nor reads: over images that it made, beside a model.

use super::build::{
    self, spelled, ImagePlan, DATA_GUID, HEADERS, MIB, MISSING, PARTLY, PRESENT, UNDEFINED,
    UNMAPPED, ZERO,
};
use super::oracle;
use crate::common::tools::{file, folder, has_qemu, parent, parent_number, whole, PARENT_SIZE};
use crate::common::{run, SeededRng, SparseContent, World};
use control::{Code, Failure};
use diskio::{File, Io, Runtime};
use drivers::{Content as Held, Disk, Raw};
use formats::vhdx::{id, look};
use formats::{open_chain, Files, ImageFormat};
use seeds::Seeds;
use std::fs;
use std::path::Path;

/// Entries of a child's parent locator.
fn names(linkage: &str, more: &[(&str, &str)]) -> Option<Vec<(String, String)>> {
    let mut all = vec![("parent_linkage".to_owned(), format!("{{{linkage}}}"))];
    all.extend(
        more.iter()
            .map(|(key, value)| (key.to_string(), value.to_string())),
    );
    Some(all)
}

fn child(size: u64, logical: u32) -> ImagePlan {
    ImagePlan {
        logical,
        parent: names(&spelled(DATA_GUID), &[("relative_path", ".\\base.vhdx")]),
        ..ImagePlan::new(size)
    }
}

/// Gives blocks random states, and returns the content of the disk over `below`.
fn fill(
    plan: &ImagePlan,
    image: &mut SparseContent,
    below: &[u8],
    chance: &mut SeededRng,
) -> Vec<u8> {
    let mut model = below.to_vec();
    model.resize(plan.size as usize, 0);
    let sector = plan.logical as usize;
    for block in 0..plan.blocks() {
        let begin = (block * plan.block) as usize;
        let end = (begin + plan.block as usize).min(model.len());
        let bytes: Vec<u8> = (0..plan.block)
            .map(|at| (at >> 9) as u8 ^ (block as u8) << 4 | 1)
            .collect();
        let state =
            [MISSING, UNDEFINED, ZERO, UNMAPPED, PRESENT, PARTLY, PARTLY][chance.below(7) as usize];
        plan.put(image, block, state, &bytes);
        let range = &mut model[begin..end];
        match state {
            MISSING => {}
            PRESENT => range.copy_from_slice(&bytes[..end - begin]),
            PARTLY => {
                // Runs of sectors, short and long.
                let unit = 1 + chance.below(40);
                let salt = chance.next();
                let own = move |sector: u64| SeededRng(salt ^ (sector / unit)).next() % 2 == 0;
                plan.mark(image, block, &own);
                for (number, part) in range.chunks_mut(sector).enumerate() {
                    if own(number as u64) {
                        let at = number * sector;
                        part.copy_from_slice(&bytes[at..at + part.len()]);
                    }
                }
            }
            _ => range.fill(0),
        }
    }
    model
}

/// The parent of other tests, which has holes and ends early.
fn below() -> Vec<u8> {
    let sectors = 0..PARENT_SIZE / 512;
    sectors
        .flat_map(|sector| crate::common::history::stamp(parent_number(sector), sector))
        .collect()
}

#[test]
fn blocks_of_all_states_are_read_over_a_parent() {
    let below = below();
    for logical in [512, 4096] {
        for seed in Seeds::few(8) {
            let chance = &mut SeededRng(seed);
            let units = u64::from(logical);
            let plan = child(9 * MIB - units * chance.below(100), logical);
            let mut image = plan.image();
            let model = fill(&plan, &mut image, &below, chance);
            let found = build::read(image.clone(), Some(parent())).unwrap();
            assert!(found == model, "{logical} seed {seed}");
            let disk = build::open(&World::new(vec![image]), Some(parent()));
            run(async move {
                let shape = disk.activate().await.unwrap();
                assert_eq!(shape.logical_block, logical);
                extents_are_true(&disk, &model).await;
            });
        }
    }
}

/// A hole reads as zeroes, and an extent of the backing image has the parent's content.
async fn extents_are_true(disk: &Disk, model: &[u8]) {
    let below = below();
    let mut at = 0;
    while at < model.len() {
        let len = (model.len() - at) as u64;
        let whole = disk.extents(at as u64, len).await.unwrap()[0];
        let layer = disk.layer(at as u64, len).await.unwrap()[0];
        let count = whole.len.min(layer.len) as usize;
        let part = &model[at..at + count];
        let is_zero = part.iter().all(|byte| *byte == 0);
        assert!(whole.content == Held::Data || is_zero, "at {at}");
        assert!(layer.content != Held::Hole || is_zero, "at {at}");
        if layer.content == Held::Below {
            let its = below.get(at..(at + count).min(below.len())).unwrap_or(&[]);
            assert!(part.starts_with(its), "at {at}");
            assert!(part[its.len()..].iter().all(|byte| *byte == 0), "at {at}");
        }
        at += count;
    }
}

/// Each chunk has a bitmap of its own, and a block may need more of it than one read returns.
#[test]
fn bitmaps_of_all_chunks_are_found() {
    let plan = ImagePlan {
        block: 32 * MIB,
        ..child(9 << 30, 512)
    };
    let mut image = plan.image();
    let blocks = [0, 1, 127, 128, 200, 255, 256, plan.blocks() - 1];
    let bytes = vec![7; plan.block as usize];
    let own = |block: u64, sector: u64| (sector / 3 + block) % 5 < 2;
    for block in blocks {
        plan.put(&mut image, block, PARTLY, &bytes);
        plan.mark(&mut image, block, &|sector| own(block, sector));
    }
    let below = below();
    let disk = build::open(&World::new(vec![image]), Some(parent()));
    run(async move {
        disk.activate().await.unwrap();
        for block in blocks {
            // The middle one crosses the end of one read of the bitmap.
            for within in [0, 16 * MIB - 16384, 32 * MIB - 32768] {
                let offset = block * plan.block + within;
                let data = diskio::Data::zeroed(32768).unwrap();
                disk.read(offset, data.clone()).await.unwrap();
                let wanted = (0..64).flat_map(|number| {
                    let at = (offset + number * 512) as usize;
                    match own(block, within / 512 + number) {
                        true => vec![7; 512],
                        false => below.get(at..at + 512).map_or(vec![0; 512], <[u8]>::to_vec),
                    }
                });
                assert!(
                    data.to_vec() == wanted.collect::<Vec<u8>>(),
                    "{block} {within}"
                );
            }
        }
    });
}

/// Files of a folder.
struct ParentFolder(Io);

impl Files<File> for ParentFolder {
    async fn open(&self, path: &Path, writable: bool) -> Result<File, Failure> {
        assert!(!writable);
        match path.exists() {
            true => Ok(file(&self.0, path, false)),
            false => Err(Failure::invalid(format!("{} is not there", path.display()))),
        }
    }

    fn raw(&self, file: File) -> Disk {
        Disk::new(Raw::new(file, false))
    }
}

/// All of the disk in a file over those that it names.
fn read_chain(path: &Path) -> Result<Vec<u8>, Failure> {
    let runtime = Runtime::new();
    let (io, path) = (runtime.io.clone(), path.to_path_buf());
    let work = async move {
        let (image, files) = (file(&io, &path, false), ParentFolder(io));
        let disk = open_chain(
            ImageFormat::Vhdx,
            image,
            &path,
            build::options("top"),
            &files,
        )
        .await?;
        let size = disk.activate().await?.size;
        Ok(whole(&disk, size).await.unwrap())
    };
    runtime.block_on(work).unwrap()
}

fn id_of(path: &Path) -> String {
    let runtime = Runtime::new();
    let image = file(&runtime.io, path, false);
    let found = runtime.block_on(async move { id(&image).await });
    found.unwrap().unwrap()
}

#[test]
fn children_lie_over_what_qemu_made_and_over_each_other() {
    if !has_qemu("children_lie_over_what_qemu_made_and_over_each_other") {
        return;
    }
    for seed in Seeds::few(3) {
        let folder = folder();
        let at = |name: &str| folder.path().join(name);
        let chance = &mut SeededRng(seed);
        let size = 8 * MIB + 512;
        oracle::create(&at("base.vhdx"), "subformat=dynamic,block_size=1M", size);
        let mut base = vec![0; size as usize];
        oracle::scribble(&at("base.vhdx"), &mut base, chance, 10);
        let plan = ImagePlan {
            parent: names(
                &id_of(&at("base.vhdx")),
                &[
                    ("absolute_win32_path", "\\\\?\\c:\\nowhere\\base.vhdx"),
                    ("relative_path", ".\\base.vhdx"),
                ],
            ),
            ..ImagePlan::new(size)
        };
        let mut image = plan.image();
        let model = fill(&plan, &mut image, &base, chance);
        fs::write(at("child.vhdx"), image.to_vec()).unwrap();
        assert!(
            read_chain(&at("child.vhdx")).unwrap() == model,
            "seed {seed}"
        );
        // Another image on top of it, with larger blocks, in a folder beside it.
        fs::create_dir(at("sub")).unwrap();
        let plan = ImagePlan {
            block: 4 * MIB,
            parent: names(&spelled(DATA_GUID), &[("relative_path", "..\\child.vhdx")]),
            ..ImagePlan::new(size)
        };
        let mut image = plan.image();
        let model = fill(&plan, &mut image, &model, chance);
        let top = at("sub").join("top.vhdx");
        fs::write(&top, image.to_vec()).unwrap();
        assert!(read_chain(&top).unwrap() == model, "seed {seed}: two");
        // The parent changes, as with any write, and is not the one that was meant.
        oracle::scribble(&at("base.vhdx"), &mut base, chance, 1);
        let failure = read_chain(&top).unwrap_err();
        assert_eq!(failure.code, Code::Image);
        let said = &failure.message;
        assert!(said.contains("base.vhdx is not the parent"), "{said}");
        assert!(said.contains("child.vhdx"), "{said}");
    }
}

#[test]
fn parents_are_named_as_the_format_has_it() {
    let linkage = "83ed0ec3-24c8-49a6-a959-5e4bf1288bfb";
    let plan = |more: &[(&str, &str)]| ImagePlan {
        parent: names(linkage, more),
        ..ImagePlan::new(MIB)
    };
    let look_at = |plan: &ImagePlan| {
        let file = World::new(vec![plan.image()]).file(0);
        run(async move { look(&file).await })
    };
    let all = [
        ("absolute_win32_path", "\\\\?\\d:\\vm\\base.vhdx"),
        (
            "volume_path",
            "\\\\?\\Volume{26A21BDA-A627-11D7-9931-806E6F6E6963}\\v\\base.vhdx",
        ),
        ("relative_path", "..\\bäse.vhdx"),
        ("something", "else"),
    ];
    let needs = look_at(&plan(&all)).unwrap();
    let parent = needs.parent.unwrap();
    assert_eq!(
        parent.names,
        ["../bäse.vhdx", "/v/base.vhdx", "/vm/base.vhdx"]
    );
    assert_eq!(parent.driver.as_deref(), Some("vhdx"));
    assert_eq!(parent.id.as_deref(), Some(linkage));
    assert_eq!((needs.size, parent.other_id), (MIB, None));
    for (wrong, why) in [
        (("parent_linkage", "{x}"), "twice"),
        (("parent_linkage2", "{x}"), "no GUID"),
        (("relative_path", "a\0b"), "not UTF-16 without zeroes"),
    ] {
        let failure = look_at(&plan(&[wrong])).unwrap_err();
        assert!(failure.message.contains(why), "{failure}");
    }
    let none = ImagePlan {
        parent: Some(vec![("relative_path".into(), "a".into())]),
        ..ImagePlan::new(MIB)
    };
    let failure = look_at(&none).unwrap_err();
    assert!(failure.message.contains("which content"), "{failure}");
}

/// During a merge into its parent a child has two names of the parent: the old one and the future one.
#[test]
fn a_parent_may_have_either_of_two_names() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let mut base = ImagePlan::new(MIB);
    base.block = 2 * MIB;
    let mut image = base.image();
    base.put(&mut image, 0, PRESENT, &[5; MIB as usize]);
    fs::write(at("base.vhdx"), image.to_vec()).unwrap();
    let other = "00000000-24c8-49a6-a959-5e4bf1288bfb";
    let own = format!("{{{}}}", spelled(DATA_GUID).to_uppercase());
    for (second, is_right) in [
        (own.as_str(), true),
        ("{10000000-24c8-49a6-a959-5e4bf1288bfb}", false),
    ] {
        let plan = ImagePlan {
            parent: names(
                other,
                &[("parent_linkage2", second), ("relative_path", "base.vhdx")],
            ),
            ..ImagePlan::new(MIB)
        };
        fs::write(at("child.vhdx"), plan.image().to_vec()).unwrap();
        let found = read_chain(&at("child.vhdx"));
        assert_eq!(found.is_ok(), is_right, "{second}");
        assert!(found.unwrap_or(vec![5; MIB as usize]) == vec![5; MIB as usize]);
    }
    fs::remove_file(at("base.vhdx")).unwrap();
    let failure = read_chain(&at("child.vhdx")).unwrap_err();
    assert!(
        failure.message.contains("base.vhdx is not there"),
        "{failure}"
    );
}

#[test]
fn a_parent_is_given_to_those_that_have_one() {
    let alone = ImagePlan::new(MIB).image();
    let failure = build::read(alone, Some(parent())).unwrap_err();
    assert!(failure.contains("leave that out"), "{failure}");
    let plan = child(MIB, 512);
    let failure = build::read(plan.image(), None).unwrap_err();
    assert!(failure.contains("parent was not given"), "{failure}");
    // A bitmap that is not there, or is no bitmap.
    for entry in [0, 6, (2 * MIB) | 6, MIB | 6, 1 << 50 | 6, 3 << 20 | 6] {
        let mut image = plan.image();
        plan.put(&mut image, 0, PARTLY, &[1; MIB as usize]);
        image.write(plan.bitmap(0), &u64::to_le_bytes(entry));
        let failure = build::read(image, Some(parent())).unwrap_err();
        assert!(failure.contains("cannot be read"), "{entry:#x}: {failure}");
    }
    assert!(HEADERS[0] < MIB);
}
