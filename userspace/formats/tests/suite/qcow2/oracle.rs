// SPDX-License-Identifier: MIT OR Apache-2.0
//! The driver reads the images of QEMU's tools, and these find the driver's images to be right.

use super::memory::{exercise, read_all, sector, MemoryRng, RequestKind};
use crate::common::tools::{command, folder, has_qemu, tool_in as tool};
use diskio::{Bytes, File, Runtime};
use drivers::{Attributes, Content, Disk, Driver, Raw};
use formats::qcow2::{create, header, snapshots, BackingImage, Compression, Qcow2, Qcow2Create};
use formats::{ImageParts, Options};
use std::path::{Path, PathBuf};

const SIZE: u64 = 3 << 20;

fn file(runtime: &Runtime, path: &Path) -> File {
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    File::new(&runtime.io, file.into()).unwrap()
}

/// Opens an image with its backing images, which it names as files of its folder.
fn chain(runtime: &Runtime, path: &Path, writable: bool) -> Disk {
    let image = file(runtime, path);
    let head = {
        let image = image.clone();
        runtime
            .block_on(async move { header(&image).await })
            .unwrap()
            .unwrap()
    };
    let beside = |name: &str| path.with_file_name(name);
    let below = head.backing.map(|backing| match backing.format.as_deref() {
        Some("qcow2") => chain(runtime, &beside(&backing.name), false),
        _ => Disk::new(Raw::new(file(runtime, &beside(&backing.name)), false)),
    });
    let data_file = head.data_file.map(|name| file(runtime, &beside(&name)));
    let parts = ImageParts {
        parent: below,
        extents: data_file.into_iter().collect(),
    };
    let options = Options {
        writable,
        ..Options::new(path.display().to_string())
    };
    Disk::new(Qcow2::new(image, parts, options))
}

fn active(runtime: &Runtime, path: &Path, writable: bool) -> Disk {
    let disk = chain(runtime, path, writable);
    let its = disk.clone();
    let shape = runtime
        .block_on(async move { its.activate().await })
        .unwrap();
    assert_eq!(shape.unwrap().size, SIZE);
    disk
}

fn content(runtime: &Runtime, path: &Path) -> Vec<u8> {
    let disk = active(runtime, path, false);
    runtime
        .block_on(async move { read_all(&disk, SIZE).await })
        .unwrap()
        .unwrap()
}

/// Returns the content that QEMU reads.
fn converted(path: &Path) -> Vec<u8> {
    let folder = path.parent().unwrap();
    let name = path.file_name().unwrap().to_str().unwrap();
    tool(
        "qemu-img",
        &["convert", "-f", "qcow2", "-O", "raw", name, "converted"],
        folder,
    );
    std::fs::read(folder.join("converted")).unwrap()
}

/// Options of qemu-img, and whether the image lies over others.
const CREATED: [(&str, bool); 22] = [
    ("compat=1.1", false),
    ("compat=1.1", true),
    ("compat=0.10", false),
    ("compat=0.10", true),
    ("cluster_size=512", false),
    ("cluster_size=512,refcount_bits=64", true),
    ("cluster_size=512,refcount_bits=1", false),
    ("cluster_size=2M", true),
    ("cluster_size=4k,refcount_bits=1", true),
    ("refcount_bits=2", false),
    ("refcount_bits=4", false),
    ("refcount_bits=8", false),
    ("refcount_bits=32", false),
    ("refcount_bits=64", false),
    ("extended_l2=on", false),
    ("extended_l2=on,cluster_size=16k", true),
    ("extended_l2=on,cluster_size=2M", true),
    ("lazy_refcounts=on", false),
    ("preallocation=metadata", false),
    ("preallocation=full", false),
    ("compression_type=zstd", true),
    ("data_file=data.raw", false),
];

/// An image of QEMU in a folder, over two others if so wanted.
fn made(folder: &Path, options: &str, over: bool) -> PathBuf {
    let size = SIZE.to_string();
    if !over {
        tool(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-o", options, "image", &size],
            folder,
        );
        return folder.join("image");
    }
    // The lowest image is smaller than those above it.
    std::fs::write(folder.join("bottom"), sector(0xb0).repeat(2048 + 3)).unwrap();
    let middle = [
        "create", "-q", "-f", "qcow2", "-b", "bottom", "-F", "raw", "middle", "2M",
    ];
    tool("qemu-img", &middle, folder);
    tool(
        "qemu-io",
        &[
            "-f",
            "qcow2",
            "-c",
            "write -P 0x11 70k 300k",
            "-c",
            "write -z 600k 128k",
            "middle",
        ],
        folder,
    );
    let top = [
        "create", "-q", "-f", "qcow2", "-b", "middle", "-F", "qcow2", "-o", options, "image", &size,
    ];
    tool("qemu-img", &top, folder);
    folder.join("image")
}

fn scribble(folder: &Path) {
    let all = [
        "write -P 0x21 0 64k",
        "write -P 0x22 100k 1k",
        "write -P 0x23 1M 700k",
        "discard 1100k 128k",
        "write -P 0x24 3071k 1k",
        "write -P 0x25 1500k 512",
    ];
    let args: Vec<&str> = ["-f", "qcow2"]
        .into_iter()
        .chain(all.iter().flat_map(|step| ["-c", step]))
        .collect();
    tool("qemu-io", &[&args[..], &["image"]].concat(), folder);
}

/// Compressed clusters and zero clusters, where the image can have them.
fn more(folder: &Path, options: &str) {
    // Only where nothing is yet, and not in a data file.
    if !options.contains("data_file") && !options.contains("preallocation") {
        // Whole clusters, even of the largest images.
        tool(
            "qemu-io",
            &["-f", "qcow2", "-c", "write -c -P 0x31 2M 1M", "image"],
            folder,
        );
    }
    if !options.contains("0.10") {
        tool(
            "qemu-io",
            &["-f", "qcow2", "-c", "write -z 1900k 200k", "image"],
            folder,
        );
    }
}

/// Makes random changes, and checks that the driver and QEMU read the same.
fn change(runtime: &Runtime, path: &Path, seed: u64, what: &str) {
    let before = content(runtime, path);
    let disk = active(runtime, path, true);
    let chance = MemoryRng::new(seed);
    let history = exercise(runtime, &disk, SIZE / 512, 120, &chance, || 0);
    let its = disk.clone();
    let now = runtime
        .block_on(async move { read_all(&its, SIZE).await })
        .unwrap()
        .unwrap();
    let mut expected = before;
    let mut unsure = vec![false; (SIZE / 512) as usize];
    for change in &history.changes {
        for number in change.sectors.clone() {
            let bytes = &mut expected[number as usize * 512..][..512];
            unsure[number as usize] = change.kind == RequestKind::Discard;
            match change.kind {
                RequestKind::Write(stamp) => bytes.copy_from_slice(&sector(stamp)),
                RequestKind::Zero => bytes.fill(0),
                RequestKind::Discard => {}
            }
        }
    }
    for (number, unsure) in unsure.into_iter().enumerate() {
        let range = number * 512..(number + 1) * 512;
        assert!(
            unsure || now[range.clone()] == expected[range],
            "{what}: sector {number}"
        );
    }
    let close = async move {
        disk.flush().await?;
        disk.close().await
    };
    runtime.block_on(close).unwrap().unwrap();
    let folder = path.parent().unwrap();
    tool("qemu-img", &["check", "-f", "qcow2", "image"], folder);
    assert!(converted(path) == now, "{what}: QEMU reads something else");
    assert!(
        content(runtime, path) == now,
        "{what}: it is not in the image"
    );
}

#[test]
fn images_of_qemu_are_read_and_written() {
    if !has_qemu("images_of_qemu_are_read_and_written") {
        return;
    }
    for (number, (options, over)) in CREATED.into_iter().enumerate() {
        let folder = folder();
        let path = made(folder.path(), options, over);
        more(folder.path(), options);
        scribble(folder.path());
        let runtime = Runtime::new();
        assert!(
            content(&runtime, &path) == converted(&path),
            "{options}: it reads differently"
        );
        change(&runtime, &path, number as u64 + 1, options);
        // And once more: clusters that became free are used again.
        change(&runtime, &path, number as u64 + 100, options);
    }
}

/// A snapshot shares clusters, which are copied before they change.
#[test]
fn snapshots_stay_as_they_were() {
    if !has_qemu("snapshots_stay_as_they_were") {
        return;
    }
    for options in [
        "compat=1.1",
        "compat=0.10",
        "extended_l2=on",
        "refcount_bits=32",
        "cluster_size=512",
    ] {
        let folder = folder();
        let path = made(folder.path(), options, true);
        more(folder.path(), options);
        scribble(folder.path());
        let before = converted(&path);
        tool(
            "qemu-img",
            &["snapshot", "-c", "one", "image"],
            folder.path(),
        );
        let runtime = Runtime::new();
        change(&runtime, &path, 7, options);
        let args = [
            "convert",
            "-l",
            "snapshot.name=one",
            "-f",
            "qcow2",
            "-O",
            "raw",
            "image",
            "old",
        ];
        tool("qemu-img", &args, folder.path());
        assert!(
            std::fs::read(folder.path().join("old")).unwrap() == before,
            "{options}: the snapshot has changed"
        );
        tool(
            "qemu-img",
            &["snapshot", "-d", "one", "image"],
            folder.path(),
        );
        tool(
            "qemu-img",
            &["check", "-f", "qcow2", "image"],
            folder.path(),
        );
    }
}

#[test]
fn images_of_ours_are_read_and_written_by_qemu() {
    if !has_qemu("images_of_ours_are_read_and_written_by_qemu") {
        return;
    }
    let plan = |cluster: u64| Qcow2Create {
        cluster,
        ..Qcow2Create::new(SIZE)
    };
    let below = |plan: Qcow2Create| Qcow2Create {
        backing: Some(BackingImage {
            name: "middle".into(),
            format: Some("qcow2".into()),
        }),
        ..plan
    };
    let bits = |refcount_bits, plan: Qcow2Create| Qcow2Create {
        refcount_bits,
        ..plan
    };
    let mut plans = vec![
        plan(65536),
        below(plan(65536)),
        plan(512),
        below(plan(2 << 20)),
        Qcow2Create {
            version: 2,
            ..plan(65536)
        },
        Qcow2Create {
            version: 2,
            ..below(plan(4096))
        },
        Qcow2Create {
            extended: true,
            ..below(plan(16384))
        },
        Qcow2Create {
            compression: Compression::Zstd,
            ..plan(65536)
        },
        Qcow2Create {
            data_file: Some(("data.raw".into(), false)),
            ..plan(65536)
        },
        Qcow2Create {
            data_file: Some(("data.raw".into(), true)),
            ..plan(65536)
        },
    ];
    plans.extend((0..=6).map(|order| bits(1 << order, plan(1024))));
    for (number, plan) in plans.into_iter().enumerate() {
        let folder = folder();
        // Backing images for the plans that need one.
        made(folder.path(), "compat=1.1", true);
        let path = folder.path().join("image");
        std::fs::File::create(&path).unwrap();
        std::fs::File::create(folder.path().join("data.raw"))
            .unwrap()
            .set_len(SIZE)
            .unwrap();
        let runtime = Runtime::new();
        let (image, its) = (file(&runtime, &path), plan.clone());
        runtime
            .block_on(async move { create(&image, &its).await })
            .unwrap()
            .unwrap();
        tool(
            "qemu-img",
            &["check", "-f", "qcow2", "image"],
            folder.path(),
        );
        let what = format!("{plan:?}");
        change(&runtime, &path, number as u64 + 1, &what);
        scribble(folder.path());
        assert!(
            content(&runtime, &path) == converted(&path),
            "{what}: it reads differently"
        );
        change(&runtime, &path, number as u64 + 50, &what);
        if let Some((_, true)) = plan.data_file {
            let raw = std::fs::read(folder.path().join("data.raw")).unwrap();
            assert!(
                raw == content(&runtime, &path),
                "the data file is not the disk"
            );
        }
    }
}

#[test]
fn bitmaps_are_kept_while_the_image_is_written() {
    if !has_qemu("bitmaps_are_kept_while_the_image_is_written") {
        return;
    }
    let folder = folder();
    let path = made(folder.path(), "compat=1.1", false);
    tool(
        "qemu-img",
        &["bitmap", "--add", "image", "changes"],
        folder.path(),
    );
    let runtime = Runtime::new();
    let disk = active(&runtime, &path, true);
    let its = disk.clone();
    runtime
        .block_on(async move { read_all(&its, SIZE).await })
        .unwrap()
        .unwrap();
    let info = || tool("qemu-img", &["info", "image"], folder.path());
    assert!(
        info().contains("changes") && !info().contains("inconsistent"),
        "{}",
        info()
    );
    let write = async move {
        disk.write(0, Bytes::copied(&[1; 512])?, Attributes::default())
            .await?;
        disk.close().await
    };
    runtime.block_on(write).unwrap().unwrap();
    assert!(
        info().contains("changes") && !info().contains("in-use"),
        "{}",
        info()
    );
    tool("qemu-img", &["check", "image"], folder.path());
    assert_eq!(converted(&path)[..512], [1; 512]);
}

#[test]
fn what_is_not_supported_is_named() {
    if !has_qemu("what_is_not_supported_is_named") {
        return;
    }
    let folder = folder();
    let secret = "secret,id=s,data=abc";
    let options = "encrypt.format=aes,encrypt.key-secret=s";
    let args = [
        "create", "-q", "--object", secret, "-f", "qcow2", "-o", options, "image", "1M",
    ];
    tool("qemu-img", &args, folder.path());
    let runtime = Runtime::new();
    let image = file(&runtime, &folder.path().join("image"));
    let failure = runtime
        .block_on(async move { header(&image).await })
        .unwrap()
        .unwrap_err();
    assert!(failure.message.contains("with AES"), "{failure}");
    made(folder.path(), "compat=1.1", false);
    let path = folder.path().join("image");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[72] = 0x80;
    std::fs::write(&path, &bytes).unwrap();
    let runtime = Runtime::new();
    let image = file(&runtime, &path);
    let failure = runtime
        .block_on(async move { header(&image).await })
        .unwrap()
        .unwrap_err();
    assert!(failure.message.contains("bit 63"), "{failure}");
}

#[test]
fn a_layer_says_what_it_has_itself() {
    if !has_qemu("a_layer_says_what_it_has_itself") {
        return;
    }
    let folder = folder();
    let path = made(folder.path(), "compat=1.1", true);
    tool(
        "qemu-io",
        &[
            "-f",
            "qcow2",
            "-c",
            "write -P 1 128k 64k",
            "-c",
            "write -z 192k 64k",
            "image",
        ],
        folder.path(),
    );
    let runtime = Runtime::new();
    let disk = active(&runtime, &path, false);
    let (own, all) = runtime
        .block_on(async move {
            let (mut own, mut all) = (Vec::new(), Vec::new());
            let mut at = 0;
            while at < 320 << 10 {
                let found = disk.layer(at, (320 << 10) - at).await.unwrap();
                at += found.iter().map(|extent| extent.len).sum::<u64>();
                own.extend(
                    found
                        .iter()
                        .map(|extent| (extent.len >> 10, extent.content)),
                );
            }
            at = 0;
            while at < SIZE {
                let found = disk.extents(at, SIZE - at).await.unwrap();
                at += found.iter().map(|extent| extent.len).sum::<u64>();
                all.extend(found.iter().map(|extent| extent.content));
            }
            (own, all)
        })
        .unwrap();
    let expected = [
        (128, Content::Below),
        (64, Content::Data),
        (64, Content::Hole),
        (64, Content::Below),
    ];
    assert_eq!(own, expected);
    assert!(!all.contains(&Content::Below) && all.last() == Some(&Content::Hole));
}

/// An image that was not closed has refcounts that are out of date.
#[test]
fn a_dirty_image_is_repaired_before_it_is_written() {
    if !has_qemu("a_dirty_image_is_repaired_before_it_is_written") {
        return;
    }
    for options in [
        "lazy_refcounts=on",
        "lazy_refcounts=on,cluster_size=512,refcount_bits=64",
        "lazy_refcounts=on,extended_l2=on",
    ] {
        let folder = folder();
        let path = made(folder.path(), options, false);
        let args = [
            "-f",
            "qcow2",
            "-c",
            "write -P 0x41 100k 900k",
            "-c",
            "flush",
            "-c",
            "sigraise 9",
            "image",
        ];
        // qemu-io kills itself, without a core.
        command("qemu-io", &args)
            .current_dir(folder.path())
            .output()
            .unwrap();
        let is_dirty = || std::fs::read(&path).unwrap()[79] & 1 != 0;
        assert!(is_dirty(), "{options}: qemu-io has closed the image");
        let runtime = Runtime::new();
        let read = content(&runtime, &path);
        assert!(is_dirty() && read[100 << 10..1000 << 10].iter().all(|byte| *byte == 0x41));
        let disk = active(&runtime, &path, true);
        runtime
            .block_on(async move { disk.close().await })
            .unwrap()
            .unwrap();
        assert!(!is_dirty());
        tool(
            "qemu-img",
            &["check", "-f", "qcow2", "image"],
            folder.path(),
        );
        assert!(converted(&path) == read);
        change(&runtime, &path, 3, options);
    }
}

#[test]
fn snapshots_are_listed_and_read() {
    if !has_qemu("snapshots_are_listed_and_read") {
        return;
    }
    let folder = folder();
    let path = made(folder.path(), "compat=1.1", false);
    scribble(folder.path());
    let before = converted(&path);
    tool(
        "qemu-img",
        &["snapshot", "-c", "one", "image"],
        folder.path(),
    );
    tool(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 9 0 2M", "image"],
        folder.path(),
    );
    tool(
        "qemu-img",
        &["snapshot", "-c", "two", "image"],
        folder.path(),
    );
    let runtime = Runtime::new();
    let image = file(&runtime, &path);
    let listed = {
        let image = image.clone();
        runtime
            .block_on(async move { snapshots(&image).await })
            .unwrap()
            .unwrap()
    };
    let names: Vec<&str> = listed
        .iter()
        .map(|snapshot| snapshot.name.as_str())
        .collect();
    assert_eq!((names, listed[0].size), (vec!["one", "two"], SIZE));
    let options = Options {
        writable: false,
        snapshot: Some("one".into()),
        ..Options::new("image")
    };
    let disk = Disk::new(Qcow2::new(image, ImageParts::default(), options));
    let all = runtime.block_on(async move {
        disk.activate().await.unwrap();
        read_all(&disk, SIZE).await
    });
    assert!(all.unwrap().unwrap() == before);
}

#[test]
fn a_disk_grows() {
    if !has_qemu("a_disk_grows") {
        return;
    }
    for (options, over, size) in [
        ("compat=1.1", false, 40 << 30),
        ("cluster_size=512", false, 64 << 20),
        ("cluster_size=512,refcount_bits=64", true, 9 << 20),
        // The L1 table has more clusters than a refcount block counts, and than the blocks count that one counts.
        ("cluster_size=512", true, 1 << 30),
        ("cluster_size=512,refcount_bits=64", false, 9 << 30),
        ("cluster_size=4096", false, 3 << 40),
        ("compat=0.10", true, 1 << 40),
        ("extended_l2=on", true, 5 << 20),
    ] {
        let folder = folder();
        let path = made(folder.path(), options, over);
        scribble(folder.path());
        if over {
            // There is more below, which must not appear.
            tool(
                "qemu-img",
                &["resize", "-q", "-f", "qcow2", "middle", "4M"],
                folder.path(),
            );
            tool(
                "qemu-io",
                &["-f", "qcow2", "-c", "write -P 0x77 3M 1M", "middle"],
                folder.path(),
            );
        }
        let runtime = Runtime::new();
        let before = content(&runtime, &path);
        let image = file(&runtime, &path);
        let parts = ImageParts {
            parent: over.then(|| chain(&runtime, &path.with_file_name("middle"), false)),
            ..ImageParts::default()
        };
        let image = Qcow2::new(image, parts, Options::new("image"));
        let grown = runtime.block_on(async move {
            image.activate().await?;
            image.grow(size).await?;
            assert_eq!(Driver::resize(&image).await?, size);
            let write = |at| {
                Driver::write(
                    &image,
                    at,
                    Bytes::copied(&[5; 4096]).unwrap(),
                    Attributes::default(),
                )
            };
            write(size - 4096).await.unwrap();
            write(SIZE).await.unwrap();
            Driver::close(&image).await.unwrap();
            Ok::<_, control::Failure>(())
        });
        grown.unwrap().unwrap();
        tool(
            "qemu-img",
            &["check", "-f", "qcow2", "image"],
            folder.path(),
        );
        let mut expected = before;
        expected.extend([5; 4096]);
        expected.resize(5 << 20, 0);
        let dump = [
            "dd", "-f", "qcow2", "-O", "raw", "bs=1M", "count=5", "if=image", "of=dump",
        ];
        tool("qemu-img", &dump, folder.path());
        let found = std::fs::read(folder.path().join("dump")).unwrap();
        let wrong = found.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(
            (wrong, found.len()),
            (
                size.eq(&(5 << 20)).then_some((5 << 20) - 4096),
                expected.len()
            ),
            "{options}"
        );
    }
}
