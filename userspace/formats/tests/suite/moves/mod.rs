// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest that moves between two hosts that share an image: the host that resumes it must find all that the other one
//! has stored, and nothing older. Schedules are random; if a test switches a rule off, the check must fail.

mod guest;
mod hosts;

use crate::common::tools::{parent, parent_number, PARENT_SIZE};
use crate::common::{run, SparseContent, World, WorldFile};
use drivers::Disk;
use formats::{qcow, qcow2, vhd, vmdk, ImageParts, Options};
use hosts::{look_while_it_grows, move_about, Format, RunCounts, SharingRules};
use seeds::Seeds;
use std::future::Future;

const SIZE: u64 = (9 << 20) + 3 * 512;
/// Schedules of each format that must go well.
const JOURNEYS: u64 = 40;
/// Number of schedules in which a missing rule must be noticed.
const SCHEDULES: u64 = 40;

/// The files of a new image.
fn made<F: Future<Output = ()> + 'static>(make: impl FnOnce(WorldFile) -> F) -> Vec<SparseContent> {
    let world = World::new(vec![SparseContent::default()]);
    run(make(world.file(0)));
    world.files()
}

fn nothing(_sector: u64) -> u32 {
    0
}

fn base(sector: u64) -> u32 {
    match sector * 512 < PARENT_SIZE {
        true => parent_number(sector),
        false => 0,
    }
}

fn parts(below: bool) -> ImageParts<WorldFile> {
    ImageParts {
        parent: below.then(parent),
        ..ImageParts::default()
    }
}

fn options(writable: bool) -> Options {
    Options {
        writable,
        // Few tables, so that they come and go.
        cache: 2048,
        ..Options::new("image")
    }
}

fn qcow2(cluster: u64, extended: bool, below: bool) -> Format {
    let plan = qcow2::Qcow2Create {
        cluster,
        extended,
        backing: below.then(|| qcow2::BackingImage {
            name: "base".into(),
            format: Some("raw".into()),
        }),
        ..qcow2::Qcow2Create::new(SIZE)
    };
    Format {
        name: "qcow2",
        size: SIZE,
        unit: cluster,
        files: made(move |file| async move { qcow2::create(&file, &plan).await.unwrap() }),
        open: Box::new(move |file, writable| {
            Disk::new(qcow2::Qcow2::new(file, parts(below), options(writable)))
        }),
        base: if below { base } else { nothing },
        is_sound: |file| {
            run(async move {
                match qcow2::check(&file, "image", false).await {
                    Ok(found) if found == qcow2::Findings::default() => Ok(()),
                    found => Err(format!("in the end: {found:?}")),
                }
            })
        },
    }
}

fn vhd(kind: vhd::VhdKind) -> Format {
    let below = kind == vhd::VhdKind::Differencing;
    let what = vhd::VhdCreate {
        kind,
        size: SIZE,
        id: [7; 16],
        parent: below.then(|| vhd::ParentOf {
            path: "base.vhd".into(),
            id: [9; 16],
        }),
        reserve: 0,
    };
    Format {
        name: "vhd",
        size: SIZE,
        unit: 2 << 20,
        files: made(move |file| async move { vhd::create(&file, &what).await.unwrap() }),
        open: Box::new(move |file, writable| {
            Disk::new(vhd::Vhd::new(file, parts(below), options(writable)))
        }),
        base: if below { base } else { nothing },
        is_sound: |_| Ok(()),
    }
}

fn qcow(below: bool) -> Format {
    let what = qcow::QcowCreate {
        size: SIZE,
        parent: below.then(|| "base".into()),
    };
    Format {
        name: "qcow",
        size: SIZE,
        unit: 4096,
        files: made(move |file| async move { qcow::create(&file, &what).await.unwrap() }),
        open: Box::new(move |file, writable| {
            Disk::new(qcow::Qcow::new(file, parts(below), options(writable)))
        }),
        base: if below { base } else { nothing },
        is_sound: |_| Ok(()),
    }
}

fn vmdk(below: bool) -> Format {
    let what = vmdk::VmdkCreate {
        form: vmdk::Form::MonolithicSparse,
        size: SIZE,
        name: "image".into(),
        parent: below.then(|| ("base.vmdk".into(), 0xabcd)),
        cid: 0x1234_5678,
    };
    Format {
        name: "vmdk",
        size: SIZE,
        unit: 64 << 10,
        files: made(move |file| async move { vmdk::create(&file, &[], &what).await.unwrap() }),
        open: Box::new(move |file, writable| {
            Disk::new(vmdk::Vmdk::new(file, parts(below), options(writable)))
        }),
        base: if below { base } else { nothing },
        is_sound: |_| Ok(()),
    }
}

fn formats() -> Vec<Format> {
    vec![
        qcow2(4096, false, false),
        qcow2(512, false, true),
        qcow2(65536, false, true),
        qcow2(16384, true, true),
        vhd(vhd::VhdKind::Dynamic),
        vhd(vhd::VhdKind::Differencing),
        qcow(true),
        vmdk(false),
        vmdk(true),
    ]
}

#[test]
fn s27_whoever_goes_on_finds_what_was_written() {
    let (mut all, mut schedules) = (RunCounts::default(), 0);
    for format in formats() {
        for seed in Seeds::new(JOURNEYS) {
            schedules += 1;
            let counts = move_about(&format, SharingRules::ALL, seed);
            let counts =
                counts.unwrap_or_else(|what| panic!("{}, seed {seed}: {what}", format.name));
            all.add(&counts);
        }
    }
    println!("{schedules} schedules: {all:?}");
    // A guest that neither moves nor writes shows nothing.
    assert!(
        all.moved > 3 * schedules && all.stayed > schedules,
        "{all:?}"
    );
    assert!(
        all.written > 15 * schedules && all.again > 3 * schedules,
        "{all:?}"
    );
}

#[test]
fn s27_the_size_is_seen_while_the_image_grows() {
    let mut wrong = Vec::new();
    for format in formats() {
        for seed in 0..SCHEDULES {
            let looked = look_while_it_grows(&format, seed);
            wrong.extend(
                looked
                    .map_err(|what| format!("{}, seed {seed}: {what}", format.name))
                    .err(),
            );
        }
    }
    assert!(wrong.is_empty(), "{}: {wrong:#?}", wrong.len());
}

/// Without a rule the guest is shown something wrong in a tenth of the schedules at least, with an image of every
/// format.
fn is_needed(rules: SharingRules) {
    for format in formats() {
        let what = format!("{} of {}", format.name, format.unit);
        let wrong = (0..SCHEDULES).filter_map(|seed| move_about(&format, rules, seed).err());
        let (shown, other): (Vec<_>, Vec<_>) = wrong.partition(|wrong| wrong.starts_with("sector"));
        println!(
            "{what}: {} of {SCHEDULES} and {} others, first {:?}",
            shown.len(),
            other.len(),
            shown.first()
        );
        assert!(
            shown.len() as u64 >= SCHEDULES / 10,
            "{what}: {rules:?} does harm in {} of {SCHEDULES} schedules",
            shown.len()
        );
    }
}

#[test]
fn h7_tables_that_were_read_before_the_other_host_let_go_are_found() {
    is_needed(SharingRules {
        waits: false,
        ..SharingRules::ALL
    });
}

#[test]
fn h7_tables_that_are_kept_for_the_guest_that_comes_back_are_found() {
    is_needed(SharingRules {
        forgets: false,
        ..SharingRules::ALL
    });
}

#[test]
fn h1_an_image_that_is_given_up_with_io_under_way_is_found() {
    is_needed(SharingRules {
        drains: false,
        ..SharingRules::ALL
    });
}
