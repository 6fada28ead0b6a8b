// SPDX-License-Identifier: MIT OR Apache-2.0
//! QEMU's tools as a second opinion: the driver reads their images, and they read those that the tests build.

use super::build::{self, ImagePlan, MIB, MISSING, PRESENT, UNMAPPED, ZERO};
use crate::common::tools::{content, file, folder, has_qemu, text, tool, whole};
use crate::common::SeededRng;
use diskio::{Errno, Runtime};
use drivers::{Content as Held, Disk};
use formats::vhdx::Vhdx;
use formats::{ImageParts, Options};
use seeds::Seeds;
use std::path::Path;

/// Reads the whole disk in a file. A hole reads as zeroes.
pub(crate) fn read(path: &Path) -> Vec<u8> {
    let runtime = Runtime::new();
    let (io, path) = (runtime.io.clone(), path.to_path_buf());
    let work = async move {
        let image = file(&io, &path, false);
        let disk = Disk::new(Vhdx::new(
            image,
            ImageParts::default(),
            build::options("image"),
        ));
        let shape = disk.activate().await.unwrap();
        let bytes = whole(&disk, shape.size).await.unwrap();
        holes_are_zeroes(&disk, &bytes).await.unwrap();
        disk.close().await.unwrap();
        bytes
    };
    runtime.block_on(work).unwrap()
}

async fn holes_are_zeroes(disk: &Disk, bytes: &[u8]) -> Result<(), Errno> {
    let mut at = 0;
    while at < bytes.len() {
        for extent in disk.extents(at as u64, (bytes.len() - at) as u64).await? {
            let part = &bytes[at..at + extent.len as usize];
            let is_zero = part.iter().all(|byte| *byte == 0);
            assert!(extent.content == Held::Data || is_zero, "at {at}");
            at += part.len();
        }
    }
    Ok(())
}

/// Writes by chance with qemu-io, into the image and the model.
pub(crate) fn scribble(path: &Path, model: &mut [u8], chance: &mut SeededRng, count: usize) {
    let sectors = (model.len() / 512) as u64;
    let mut args: Vec<String> = vec!["-f".into(), "vhdx".into()];
    for _ in 0..count {
        let at = chance.below(sectors);
        let len = (1 + chance.below(3000)).min(sectors - at);
        let range = at as usize * 512..(at + len) as usize * 512;
        let byte = match chance.below(4) {
            0 => 0,
            _ => 1 + chance.below(254) as u8,
        };
        let how = match byte {
            0 => "-z".to_owned(),
            _ => format!("-P {byte}"),
        };
        args.push("-c".into());
        args.push(format!("write {how} {} {}", range.start, range.len()));
        model[range].fill(byte);
    }
    args.push(text(path).into());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    tool("qemu-io", &args);
}

pub(crate) fn create(path: &Path, options: &str, size: u64) {
    let size = size.to_string();
    let args = [
        "create",
        "-q",
        "-f",
        "vhdx",
        "-o",
        options,
        text(path),
        &size,
    ];
    tool("qemu-img", &args);
}

#[test]
fn what_qemu_writes_is_read() {
    if !has_qemu("what_qemu_writes_is_read") {
        return;
    }
    for (options, size) in [
        ("subformat=dynamic", 9 * MIB + 3 * 512),
        ("subformat=dynamic,block_size=1M", 9 * MIB + 512),
        ("subformat=dynamic,block_size=2M,log_size=4M", 9 * MIB),
        (
            "subformat=dynamic,block_size=1M,block_state_zero=off",
            7 * MIB - 512,
        ),
        ("subformat=dynamic,block_size=256M", 33 * MIB),
        ("subformat=fixed,block_size=1M", 9 * MIB + 3 * 512),
        ("subformat=fixed,block_size=8M,log_size=2M", 20 * MIB + 512),
        ("subformat=fixed", 512),
        ("subformat=dynamic", 512),
    ] {
        for seed in Seeds::few(2) {
            let folder = folder();
            let path = folder.path().join("a.vhdx");
            create(&path, options, size);
            let mut model = vec![0; size as usize];
            assert!(read(&path) == model, "{options}: new");
            let mut chance = SeededRng(seed);
            for _ in 0..2 {
                scribble(&path, &mut model, &mut chance, 12);
                assert!(read(&path) == model, "{options} seed {seed}");
                let theirs = content("vhdx", &path, folder.path());
                assert!(theirs == model, "{options} seed {seed}: QEMU");
            }
        }
    }
}

/// The entries of bitmaps are between those of blocks, also where there are no bitmaps.
#[test]
fn what_is_behind_a_chunk_is_read() {
    if !has_qemu("what_is_behind_a_chunk_is_read") {
        return;
    }
    const GIB: u64 = 1 << 30;
    for block in [1, 32, 256] {
        let folder = folder();
        let path = folder.path().join("a.vhdx");
        let size = 9 * GIB + 512;
        create(
            &path,
            &format!("subformat=dynamic,block_size={block}M"),
            size,
        );
        let places = [
            0,
            4 * GIB - 4096,
            4 * GIB,
            8 * GIB - 512,
            8 * GIB,
            size - 4608,
        ];
        let writes: Vec<String> = (1..)
            .zip(places)
            .map(|(number, at)| format!("write -P {number} {at} 4608"))
            .collect();
        let args: Vec<&str> = writes.iter().flat_map(|write| ["-c", write]).collect();
        tool(
            "qemu-io",
            &[&["-f", "vhdx"], &args[..], &[text(&path)]].concat(),
        );
        let runtime = Runtime::new();
        let io = runtime.io.clone();
        let work = async move {
            let image = file(&io, &path, false);
            let options = Options {
                cache: 4096,
                ..build::options("image")
            };
            let disk = Disk::new(Vhdx::new(image, ImageParts::default(), options));
            assert_eq!(disk.activate().await.unwrap().size, size);
            let byte = |at: u64| {
                // Later writes cover the end of earlier ones.
                let number = places
                    .iter()
                    .rposition(|place| (*place..place + 4608).contains(&at));
                number.map_or(0, |number| number as u8 + 1)
            };
            for place in places {
                let begin = place.saturating_sub(512);
                let len = (size - begin).min(6144);
                let data = diskio::Data::zeroed(len as usize).unwrap();
                disk.read(begin, data.clone()).await.unwrap();
                let wanted: Vec<u8> = (begin..begin + len).map(byte).collect();
                assert!(data.to_vec() == wanted, "{block} MiB at {begin}");
            }
        };
        runtime.block_on(work).unwrap();
    }
}

/// QEMU accepts the images that the tests build, and reads the same content.
#[test]
fn qemu_reads_what_is_built() {
    let plan = ImagePlan::new(6 * MIB - 512);
    let mut image = plan.image();
    let mut model = vec![0; plan.size as usize];
    for (block, state) in [PRESENT, MISSING, ZERO, UNMAPPED, PRESENT, PRESENT]
        .into_iter()
        .enumerate()
    {
        let bytes = vec![block as u8 + 1; MIB as usize];
        plan.put(&mut image, block as u64, state, &bytes);
        if state == PRESENT {
            let begin = block << 20;
            let end = (begin + (1 << 20)).min(model.len());
            model[begin..end].fill(block as u8 + 1);
        }
    }
    assert!(build::read(image.clone(), None).unwrap() == model);
    if !has_qemu("qemu_reads_what_is_built") {
        return;
    }
    let folder = folder();
    let path = folder.path().join("a.vhdx");
    std::fs::write(&path, image.to_vec()).unwrap();
    assert!(content("vhdx", &path, folder.path()) == model);
    tool("qemu-img", &["check", "-f", "vhdx", text(&path)]);
}
