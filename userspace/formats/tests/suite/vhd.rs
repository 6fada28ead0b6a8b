// SPDX-License-Identifier: MIT OR Apache-2.0
//! VHD: the driver reads the images of other programs and they read the driver's, and no data is lost or shown that
//! should not be.

use crate::common::history::{
    every_cut, lost_flush_is_told, lost_flush_is_told_beside, number, stamp, Trial,
};
use crate::common::places::{told_is_sure, told_stays_true};
use crate::common::tools::{
    content, failed_writes_stay_undone, file, folder, goes_on_with_qemu, has_qemu, parent,
    parent_number, parent_or_new_after_a_cut, pause_fails_only_if_something_is_lost, scribble,
    text, tool, try_wrong, PARENT_SIZE,
};
use crate::common::{run, SeededRng, SparseContent, What, World, SECTOR};
use control::Code;
use diskio::{Bytes, Data, Errno, Io, Runtime};
use drivers::{Attributes, Disk};
use formats::vhd::{
    create, footers, grow, id, look, set_parent, spelled, ParentOf, Vhd, VhdCreate, VhdKind,
};
use formats::{ImageParts, Options};
use seeds::Seeds;
use std::path::PathBuf;
use std::rc::Rc;

const SIZE: u64 = (9 << 20) + 3 * 512;

fn make(kind: VhdKind, size: u64, reserve: u64) -> VhdCreate {
    VhdCreate {
        kind,
        size,
        id: [7; 16],
        parent: (kind == VhdKind::Differencing).then(|| ParentOf {
            path: "base.vhd".into(),
            id: [9; 16],
        }),
        reserve,
    }
}

/// The files of a new image.
fn image(what: VhdCreate) -> Vec<SparseContent> {
    let world = World::new(vec![SparseContent::default()]);
    let storage = world.file(0);
    run(async move { create(&storage, &what).await }).unwrap();
    world.files()
}

fn open(world: &World, kind: VhdKind) -> Disk {
    let parent = (kind == VhdKind::Differencing).then(parent);
    let parts = ImageParts {
        parent,
        ..ImageParts::default()
    };
    let options = Options {
        cache: 2048,
        ..Options::new("image")
    };
    Disk::new(Vhd::new(world.file(0), parts, options))
}

fn trial(kind: VhdKind, seed: u64) -> Trial {
    Trial {
        name: format!("vhd {kind:?}"),
        size: SIZE,
        files: image(make(kind, SIZE, 0)),
        open: Rc::new(move |world| open(world, kind)),
        base: match kind {
            VhdKind::Differencing => Rc::new(|sector| match sector * 512 < PARENT_SIZE {
                true => parent_number(sector),
                false => 0,
            }),
            _ => Rc::new(|_| 0),
        },
        unit: 2 << 20,
        seed,
    }
}

#[test]
fn nothing_is_lost_and_nothing_stale_is_shown() {
    for kind in [VhdKind::Dynamic, VhdKind::Differencing, VhdKind::Fixed] {
        for seed in Seeds::few(6) {
            trial(kind, seed).run(24);
        }
    }
}

/// An image that went through many hands has gaps with the bytes of others in them.
#[test]
fn gaps_with_old_bytes_are_used_and_show_nothing() {
    let mut files = image(make(VhdKind::Dynamic, SIZE, 0));
    // Bytes that a process could have left when it died, and more.
    let end = files[0].len;
    files[0].write(end - 512, &vec![0xee; 12 << 20]);
    for seed in Seeds::few(3) {
        let mut trial = trial(VhdKind::Dynamic, seed);
        trial.files.clone_from(&files);
        trial.run(12);
    }
}

/// A block that was discarded gives its place to another one only when the table says so for good.
#[test]
fn place_of_a_discarded_block_is_not_reused_too_early() {
    const BLOCK: u64 = 2 << 20;
    let world = World::new(image(make(VhdKind::Dynamic, SIZE, 0)));
    let first = world.files();
    let disk = open(&world, VhdKind::Dynamic);
    let its = world.clone();
    let begin = run(async move {
        let how = Attributes::default();
        let bytes = |number| Bytes::copied(&stamp(number, 0)).unwrap();
        disk.activate().await.unwrap();
        disk.write(0, bytes(1), how).await.unwrap();
        disk.flush().await.unwrap();
        let begin = its.changes();
        disk.discard(0, BLOCK, how).await.unwrap();
        disk.write(BLOCK, bytes(2), how).await.unwrap();
        begin
    });
    let log = world.log();
    let is_flush = |(_, what): &(usize, What)| matches!(what, What::Flush);
    assert!(!log[begin..].iter().any(is_flush));
    every_cut(&first, &log, begin, |files, when| {
        let disk = open(&World::new(files), VhdKind::Dynamic);
        run(async move {
            disk.activate().await.unwrap();
            for (offset, mine) in [(0, 1), (BLOCK, 2)] {
                let data = Data::zeroed(SECTOR).unwrap();
                disk.read(offset, data.clone()).await.unwrap();
                let found = number(&data.to_vec(), 0);
                assert!(
                    found == Some(0) || found == Some(mine),
                    "{found:?} at {offset} {when}"
                );
            }
        });
    });
}

/// A gap between two blocks may hold any bytes; a new block there must not show them.
#[test]
fn gap_between_blocks_is_used_and_shows_nothing() {
    const BLOCK: u64 = 2 << 20;
    let world = World::new(image(make(VhdKind::Dynamic, SIZE, 0)));
    let step = |disk: Disk, offset, discarded: Option<u64>| {
        run(async move {
            let how = Attributes::default();
            disk.activate().await.unwrap();
            let bytes = Bytes::copied(&stamp(5, 0)).unwrap();
            disk.write(offset, bytes, how).await.unwrap();
            if let Some(at) = discarded {
                disk.discard(at, BLOCK, how).await.unwrap();
            }
            disk.close().await.unwrap();
        });
    };
    for block in 0..3 {
        step(open(&world, VhdKind::Dynamic), block * BLOCK, None);
    }
    let entry = |files: &[SparseContent], block: u64| {
        let mut bytes = [0; 4];
        // Behind the footer and the header.
        files[0].read(1536 + block * 4, &mut bytes);
        u64::from(u32::from_be_bytes(bytes)) * 512
    };
    let gap = entry(&world.files(), 1);
    step(open(&world, VhdKind::Dynamic), 0, Some(BLOCK));
    let mut files = world.files();
    let len = files[0].len;
    files[0].write(gap, &vec![0xee; BLOCK as usize]);
    let world = World::new(files);
    step(open(&world, VhdKind::Dynamic), 3 * BLOCK, None);
    assert_eq!((entry(&world.files(), 3), world.files()[0].len), (gap, len));
    let disk = open(&world, VhdKind::Dynamic);
    run(async move {
        disk.activate().await.unwrap();
        let data = Data::zeroed(BLOCK as usize).unwrap();
        disk.read(3 * BLOCK, data.clone()).await.unwrap();
        let bytes = data.to_vec();
        assert!(bytes[..SECTOR] == stamp(5, 0) && bytes[SECTOR..].iter().all(|byte| *byte == 0));
    });
}

#[test]
fn qemu_reads_what_is_written() {
    if !has_qemu("qemu_reads_what_is_written") {
        return;
    }
    for kind in [VhdKind::Fixed, VhdKind::Dynamic] {
        let folder = folder();
        let path = folder.path().join("a.vhd");
        let runtime = Runtime::new();
        let storage = file(&runtime.io, &path, true);
        let its = storage.clone();
        let model = runtime.block_on(async move {
            create(&its, &make(kind, SIZE, 0)).await.unwrap();
            let disk = Disk::new(Vhd::new(
                its.clone(),
                ImageParts::default(),
                Options::new("image"),
            ));
            disk.activate().await.unwrap();
            let mut model = vec![0; SIZE as usize];
            scribble(&disk, &mut model, 1, 60).await.unwrap();
            disk.inactivate().await.unwrap();
            model
        });
        assert!(
            content("vpc", &path, folder.path()) == model.unwrap(),
            "{kind:?}"
        );
        let info = tool("qemu-img", &["info", "-f", "vpc", text(&path)]);
        assert!(info.contains(&SIZE.to_string()), "{info}");
    }
}

/// A direct write of the last bytes makes a file longer if its size is no multiple of its storage's block.
#[test]
fn footer_stays_at_the_end() {
    if !has_qemu("footer_stays_at_the_end") {
        return;
    }
    // The last sector of the disk is right before the footer, and in the same block of 4 KiB.
    for (kind, size) in [("fixed", (3 << 20) + 512), ("dynamic", 4 << 20)] {
        let folder = folder();
        let (raw, path) = (folder.path().join("raw"), folder.path().join("a.vhd"));
        std::fs::write(&raw, vec![9; size]).unwrap();
        let options = format!("force_size=on,subformat={kind}");
        let (from, to) = (text(&raw), text(&path));
        let args = [
            "convert", "-f", "raw", "-O", "vpc", "-o", &options, from, to,
        ];
        tool("qemu-img", &args);
        let before = std::fs::metadata(&path).unwrap().len();
        assert!(before % 4096 != 0, "{kind}");
        let runtime = Runtime::new();
        let align = diskio::Align {
            memory: 512,
            offset: 4096,
        };
        let storage = file(&runtime.io, &path, true).with_align(align);
        let work = async move {
            let disk = Disk::new(Vhd::new(
                storage,
                ImageParts::default(),
                Options::new("image"),
            ));
            disk.activate().await.unwrap();
            let last = Bytes::copied(&[7; 512]).unwrap();
            let how = Attributes::default();
            disk.write(size as u64 - 512, last, how).await.unwrap();
            disk.close().await
        };
        runtime.block_on(work).unwrap().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(&bytes[bytes.len() - 512..][..8], b"conectix", "{kind}");
        let read = content("vpc", &path, folder.path());
        assert!(read[..size - 512].iter().all(|byte| *byte == 9), "{kind}");
        assert!(read[size - 512..].iter().all(|byte| *byte == 7), "{kind}");
        assert_eq!(read.len(), size, "{kind}");
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
        "write -P 3 8704k 4k",
    ];
    for options in [
        "subformat=fixed,force_size=on",
        "subformat=dynamic,force_size=on",
        "subformat=dynamic",
        "subformat=fixed",
    ] {
        let folder = folder();
        let path = folder.path().join("a.vhd");
        let open = async |io: Io, path: PathBuf| {
            let storage = file(&io, &path, true);
            Disk::new(Vhd::new(
                storage,
                ImageParts::default(),
                Options::new("image"),
            ))
        };
        goes_on_with_qemu("vpc", &path, &["-o", options], &writes, open, || ());
    }
}

#[test]
fn parent_is_named_as_tapdisk_does() {
    let files = image(make(VhdKind::Differencing, SIZE, 0));
    let storage = World::new(files).file(0);
    run(async move {
        let (kind, needs) = look(&storage).await.unwrap();
        assert_eq!((kind, needs.size), (VhdKind::Differencing, SIZE));
        let parent = needs.parent.unwrap();
        assert_eq!(parent.names, ["./base.vhd", "base.vhd"]);
        assert_eq!(parent.id, Some(spelled([9; 16])));
        assert_eq!(parent.driver.as_deref(), Some("vhd"));
        assert_eq!(id(&storage).await.unwrap(), [7; 16]);
        assert_eq!(spelled([9; 16]), "09090909-0909-0909-0909-090909090909");
        // Without its parent it is not served.
        let disk = Disk::new(Vhd::new(
            storage,
            ImageParts::default(),
            Options::new("image"),
        ));
        let failure = disk.activate().await.unwrap_err();
        assert_eq!(failure.code, Code::Image);
        assert!(failure.message.contains("parent"), "{failure}");
    });
}

/// The disk may have either size when this was interrupted, and always the content.
#[test]
fn growing_can_be_interrupted_at_any_change() {
    for (kind, reserve) in [
        (VhdKind::Fixed, 0),
        (VhdKind::Dynamic, 0),
        (VhdKind::Dynamic, 64 << 20),
        (VhdKind::Differencing, 0),
    ] {
        let large = 2100_u64 << 20;
        let large = if reserve > 0 { reserve } else { large };
        let world = World::new(image(make(kind, SIZE, reserve)));
        let (its, storage) = (open(&world, kind), world.file(0));
        run(async move {
            its.activate().await.unwrap();
            for at in [0, 3 << 20, SIZE - 512] {
                its.write(at, Bytes::copied(&[5; 512]).unwrap(), Attributes::default())
                    .await
                    .unwrap();
            }
            its.inactivate().await.unwrap();
        });
        let (mut files, from) = (world.files(), world.changes());
        run(async move { grow(&storage, large).await }).unwrap();
        let mut sizes = Vec::new();
        for count in from..=world.changes() {
            if count > from {
                let (file, what) = &world.log()[count - 1];
                files[*file].apply(what);
            }
            let disk = open(&World::new(files.clone()), kind);
            sizes.push(run(async move {
                let size = disk.activate().await.unwrap().size;
                for (at, byte) in [
                    (0, 5),
                    (3 << 20, 5),
                    (SIZE - 512, 5),
                    (size - 512, u8::from(size == SIZE) * 5),
                ] {
                    let data = Data::zeroed(512).unwrap();
                    disk.read(at, data.clone()).await.unwrap();
                    assert_eq!(data.to_vec(), [byte; 512], "{kind:?} at {at}");
                }
                if size == large {
                    disk.write(
                        size - 512,
                        Bytes::copied(&[6; 512]).unwrap(),
                        Attributes::default(),
                    )
                    .await
                    .unwrap();
                }
                size
            }));
        }
        sizes.dedup();
        assert_eq!(sizes, [SIZE, large], "{kind:?}");
        if kind != VhdKind::Fixed {
            all_is_in_front(&mut files[0]);
            let names = run(async move { look(&World::new(files).file(0)).await });
            let parent = names.unwrap().1.parent.map(|parent| parent.names);
            let expected = (kind == VhdKind::Differencing).then_some(["./base.vhd", "base.vhd"]);
            assert_eq!(
                parent,
                expected.map(|names| names.map(String::from).to_vec())
            );
        }
    }
}

/// In an image without blocks the footer at the end is behind the metadata, and in the way of more.
#[test]
fn an_image_without_blocks_keeps_its_footer() {
    for kind in [VhdKind::Dynamic, VhdKind::Differencing] {
        let world = World::new(image(make(kind, SIZE, 0)));
        let (storage, disk) = (world.file(0), open(&world, kind));
        run(async move {
            if kind == VhdKind::Differencing {
                for path in ["../other/a longer name.vhd", "b"] {
                    let (path, id) = (path.into(), [8; 16]);
                    let named = set_parent(&storage, &ParentOf { path, id }).await;
                    named.unwrap();
                    assert_eq!(footers(&storage).await, Ok(None), "{kind:?}");
                }
            }
            grow(&storage, 2100 << 20).await.unwrap();
            assert_eq!(footers(&storage).await, Ok(None), "{kind:?}");
            assert_eq!(disk.activate().await.unwrap().size, 2100 << 20);
        });
    }
}

/// The rule of blktap's vhd-util: no block lies before the end of the table, the batmap and the names of the parent.
fn all_is_in_front(file: &mut SparseContent) {
    let mut bytes = vec![0; 64 << 10];
    file.read(0, &mut bytes);
    let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    let long = |at: usize| (u64::from(word(at)) << 32 | u64::from(word(at + 4))) as usize;
    let (table, count) = (long(512 + 16), word(512 + 28) as usize);
    let batmap = table + (count * 4).next_multiple_of(512);
    assert_eq!(&bytes[batmap..batmap + 8], b"tdbatmap");
    let mut end = long(batmap + 8) + word(batmap + 16) as usize * 512;
    for name in (0..8).map(|number| 512 + 576 + 24 * number) {
        if word(name) != 0 {
            assert!(long(name + 16) >= batmap + 1024, "a name in a table");
            end = end.max(long(name + 16) + word(name + 4) as usize);
        }
    }
    let places = (0..count).map(|block| word(table + block * 4));
    let first = places.filter(|sector| *sector != u32::MAX).min().unwrap();
    assert!(first as usize * 512 >= end, "{first} and {end}");
}

/// After an interruption at any point the image has the old parent or the new one, and its own content.
#[test]
fn another_parent_is_named_at_once() {
    let kind = VhdKind::Differencing;
    let world = World::new(image(make(kind, SIZE, 0)));
    let (its, storage) = (open(&world, kind), world.file(0));
    run(async move {
        its.activate().await.unwrap();
        let bytes = Bytes::copied(&[5; 512]).unwrap();
        let how = Attributes::default();
        its.write(3 << 20, bytes, how).await.unwrap();
        its.inactivate().await.unwrap();
    });
    let (mut files, from) = (world.files(), world.changes());
    // Longer and shorter than the one before, and raw.
    let parents = [("../other/a longer name.vhd", [8; 16]), ("b", [0; 16])];
    run(async move {
        for (path, id) in parents {
            let path = path.into();
            let named = set_parent(&storage, &ParentOf { path, id }).await;
            named.unwrap();
        }
    });
    let mut seen = Vec::new();
    for count in from..=world.changes() {
        if count > from {
            let (file, what) = &world.log()[count - 1];
            files[*file].apply(what);
        }
        let now = World::new(files.clone());
        let (file, disk) = (now.file(0), open(&now, kind));
        seen.push(run(async move {
            let data = Data::zeroed(512).unwrap();
            disk.activate().await.unwrap();
            disk.read(3 << 20, data.clone()).await.unwrap();
            assert_eq!(data.to_vec(), [5; 512]);
            let parent = look(&file).await.unwrap().1.parent.unwrap();
            (parent.names, parent.id)
        }));
    }
    seen.dedup();
    let named = |names: &[&str], id: Option<u8>| {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        (names, id.map(|byte| spelled([byte; 16])))
    };
    assert_eq!(
        seen,
        [
            named(&["./base.vhd", "base.vhd"], Some(9)),
            named(
                &[
                    "../other/a longer name.vhd",
                    "./../other/a longer name.vhd",
                    "a longer name.vhd"
                ],
                Some(8)
            ),
            named(&["./b", "b"], None),
        ]
    );
    all_is_in_front(&mut files[0]);
    let alone = World::new(image(make(VhdKind::Dynamic, SIZE, 0)));
    let storage = alone.file(0);
    let refused = run(async move {
        let (path, id) = ("b".into(), [0; 16]);
        set_parent(&storage, &ParentOf { path, id }).await
    });
    assert_eq!(refused.unwrap_err().code, Code::Image);
    assert_eq!(alone.changes(), 0, "nothing is written into it");
}

#[test]
fn growing_is_seen_by_who_serves_the_disk() {
    let world = World::new(image(make(VhdKind::Dynamic, SIZE, 64 << 20)));
    let (disk, storage) = (open(&world, VhdKind::Dynamic), world.file(0));
    run(async move {
        disk.activate().await.unwrap();
        let write = |at| {
            let disk = disk.clone();
            async move {
                disk.write(at, Bytes::copied(&[6; 512]).unwrap(), Attributes::default())
                    .await
            }
        };
        assert!(write(60 << 20).await.is_err(), "behind the end");
        grow(&storage, 64 << 20).await.unwrap();
        assert_eq!(disk.resize().await.unwrap(), 64 << 20);
        write(60 << 20).await.unwrap();
        // A growth that has to move the table is refused while the image is served.
        grow(&storage, 80 << 20).await.unwrap();
        assert_eq!(disk.resize().await.unwrap_err().code, Code::Image);
    });
}

#[test]
fn size_has_a_limit_that_is_told() {
    let storage = World::new(vec![SparseContent::default()]).file(0);
    let failure = run(async move { create(&storage, &make(VhdKind::Dynamic, 2 << 40, 0)).await });
    let failure = failure.unwrap_err();
    assert_eq!(failure.code, Code::Invalid);
    assert!(
        failure.message.contains("2040 GiB") && failure.message.contains("qcow2"),
        "{failure}"
    );
    let files = image(make(VhdKind::Dynamic, 2040 << 30, 0));
    let disk = open(&World::new(files), VhdKind::Dynamic);
    run(async move {
        let size = disk.activate().await.unwrap().size;
        disk.write(
            size - 512,
            Bytes::copied(&[6; 512]).unwrap(),
            Attributes::default(),
        )
        .await
        .unwrap();
    });
}

/// The first bytes of a fixed VHD belong to the guest, which may have stored a footer there.
#[test]
fn guest_cannot_choose_the_type() {
    let mut files = image(make(VhdKind::Fixed, SIZE, 0));
    let other = image(make(VhdKind::Differencing, SIZE, 0));
    let mut head = vec![0; 1 << 20];
    other[0].read(0, &mut head);
    files[0].write(0, &head);
    let storage = World::new(files).file(0);
    let (kind, needs) = run(async move { look(&storage).await }).unwrap();
    assert_eq!((kind, needs.parent), (VhdKind::Fixed, None));
}

/// The checksum of a header or footer at `at`.
fn seal(bytes: &mut SparseContent, at: u64, len: usize, sum: usize) {
    let mut header = vec![0; len];
    bytes.read(at, &mut header);
    header[sum..sum + 4].fill(0);
    let total = header
        .iter()
        .fold(0_u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    bytes.write(at + sum as u64, &(!total).to_be_bytes());
}

#[test]
fn wrong_images_are_refused_or_served_and_never_worse() {
    let mut opened = 0;
    for kind in [VhdKind::Dynamic, VhdKind::Differencing] {
        let world = World::new(image(make(kind, SIZE, 0)));
        let disk = open(&world, kind);
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
                // The headers, the table, the batmap, the locators.
                let at = match chance.below(4) {
                    0 => chance.below(512),
                    1 => 512 + chance.below(1024),
                    _ => chance.below(8192),
                };
                let value = match chance.below(4) {
                    0 => u64::MAX,
                    1 => length,
                    2 => chance.below(1 << 24),
                    _ => chance.next(),
                };
                let bytes = value.to_be_bytes();
                let count = 1 << chance.below(4);
                files[0].write(at, &bytes[8 - count..]);
            }
            if chance.below(8) == 0 {
                files[0].set_len(chance.below(length));
            }
            if chance.below(8) > 0 {
                seal(&mut files[0], 0, 512, 64);
                seal(&mut files[0], 512, 1024, 36);
            }
            opened += usize::from(try_wrong(files, &|world| open(world, kind), round));
        }
    }
    assert!((80..790).contains(&opened), "{opened} of 800 were opened");
}

/// A failed change returns an error, and earlier changes stay.
#[test]
fn failures_are_told_and_nothing_is_lost() {
    for count in 0..12 {
        let world = World::new(image(make(VhdKind::Dynamic, SIZE, 0)));
        let disk = open(&world, VhdKind::Dynamic);
        run(async move {
            disk.activate().await.unwrap();
            let write = |at: u64, byte| {
                let disk = disk.clone();
                async move {
                    disk.write(
                        at,
                        Bytes::copied(&[byte; 4096]).unwrap(),
                        Attributes::default(),
                    )
                    .await
                }
            };
            write(0, 1).await.unwrap();
            world.fail_after(Some(count));
            let results = [
                write(4096, 2).await,
                write(5 << 20, 3).await,
                write(7 << 20, 4).await,
            ];
            world.fail_after(None);
            assert!(count >= 7 || results.iter().any(Result::is_err), "{count}");
            write(8 << 20, 5).await.unwrap();
            let again = open(&world, VhdKind::Dynamic);
            again.activate().await.unwrap();
            for (at, byte, result) in [
                (0, 1, &Ok(())),
                (4096, 2, &results[0]),
                (5 << 20, 3, &results[1]),
                (7 << 20, 4, &results[2]),
                (8 << 20, 5, &Ok(())),
            ] {
                let data = Data::zeroed(4096).unwrap();
                again.read(at, data.clone()).await.unwrap();
                let found = data.to_vec();
                match result {
                    Ok(()) => assert_eq!(found, [byte; 4096], "{count} at {at}"),
                    Err(_) => assert!(
                        found == [byte; 4096] || found == [0; 4096],
                        "{count} at {at}"
                    ),
                }
            }
        });
    }
}

#[test]
fn failed_write_is_not_carried_out_later() {
    failed_writes_stay_undone(
        &image(make(VhdKind::Dynamic, SIZE, 0)),
        &|world| open(world, VhdKind::Dynamic),
        2 << 20,
    );
}

/// A discard that failed leaves the block where it is, for good: also if what failed is in the image.
#[test]
fn failed_discard_is_not_carried_out_later() {
    const BLOCK: u64 = 2 << 20;
    for (error, is_late) in [(Errno::IO, false), (Errno::NOSPC, false), (Errno::IO, true)] {
        let world = World::new(image(make(VhdKind::Dynamic, SIZE, 0)));
        if is_late {
            world.fail_late();
        }
        let disk = open(&world, VhdKind::Dynamic);
        run(async move {
            let how = Attributes::default();
            let bytes = |number| Bytes::copied(&stamp(number, 0)).unwrap();
            disk.activate().await.unwrap();
            disk.write(0, bytes(1), how).await.unwrap();
            world.fail_once(0, error);
            assert_eq!(disk.discard(0, BLOCK, how).await, Err(error));
            disk.write(0, bytes(2), how).await.unwrap();
            disk.flush().await.unwrap();
            let again = open(&World::new(world.files()), VhdKind::Dynamic);
            again.activate().await.unwrap();
            let data = Data::zeroed(SECTOR).unwrap();
            again.read(0, data.clone()).await.unwrap();
            assert_eq!(number(&data.to_vec(), 0), Some(2), "{error} {is_late}");
            disk.write(BLOCK, bytes(3), how).await.unwrap();
            for disk in [disk, open(&World::new(world.files()), VhdKind::Dynamic)] {
                disk.activate().await.unwrap();
                for (offset, wanted) in [(0, 2), (BLOCK, 3)] {
                    let data = Data::zeroed(SECTOR).unwrap();
                    disk.read(offset, data.clone()).await.unwrap();
                    assert_eq!(
                        number(&data.to_vec(), 0),
                        Some(wanted),
                        "{error} at {offset}"
                    );
                }
            }
        });
    }
}

#[test]
fn pause_without_space_loses_nothing() {
    pause_fails_only_if_something_is_lost(&image(make(VhdKind::Dynamic, SIZE, 0)), &|world| {
        open(world, VhdKind::Dynamic)
    });
}

/// A flush that failed may have lost the change of the table, and the next one does not bring it back.
#[test]
fn place_of_a_discarded_block_is_not_reused_after_a_failed_flush() {
    const BLOCK: u64 = 2 << 20;
    let world = World::new(image(make(VhdKind::Dynamic, SIZE, 0)));
    let disk = open(&world, VhdKind::Dynamic);
    let place = |world: &World, block: u64| {
        let mut bytes = [0; 4];
        // Behind the footer and the header.
        world.files()[0].read(1536 + block * 4, &mut bytes);
        u32::from_be_bytes(bytes)
    };
    run(async move {
        let how = Attributes::default();
        let bytes = || Bytes::copied(&stamp(1, 0)).unwrap();
        disk.activate().await.unwrap();
        disk.write(0, bytes(), how).await.unwrap();
        disk.flush().await.unwrap();
        let first = place(&world, 0);
        disk.discard(0, BLOCK, how).await.unwrap();
        world.fail_once(0, Errno::IO);
        assert_eq!(disk.flush().await, Err(Errno::IO));
        disk.flush().await.unwrap();
        disk.write(BLOCK, bytes(), how).await.unwrap();
        assert_ne!(place(&world, 1), first);
        // Places that are released later are used again.
        let second = place(&world, 1);
        disk.discard(BLOCK, BLOCK, how).await.unwrap();
        disk.flush().await.unwrap();
        disk.write(2 * BLOCK, bytes(), how).await.unwrap();
        assert_eq!(place(&world, 2), second);
    });
}

#[test]
fn power_cut_over_a_parent_leaves_old_or_new() {
    parent_or_new_after_a_cut(
        &image(make(VhdKind::Differencing, SIZE, 0)),
        &|world| open(world, VhdKind::Differencing),
        512,
    );
}

#[test]
fn what_the_kernel_is_told_stays_true() {
    for kind in [VhdKind::Dynamic, VhdKind::Differencing] {
        told_stays_true(kind == VhdKind::Differencing, |seed| trial(kind, seed));
    }
}

#[test]
fn what_is_not_sure_is_not_told() {
    for kind in [VhdKind::Dynamic, VhdKind::Differencing] {
        told_is_sure(|| trial(kind, 1));
    }
}

#[test]
fn a_flush_that_fails_within_a_write_is_told() {
    lost_flush_is_told(|| trial(VhdKind::Differencing, 1));
}

#[test]
fn a_flush_that_fails_beside_the_guests_is_told() {
    lost_flush_is_told_beside(|seed| trial(VhdKind::Differencing, seed));
}
