// SPDX-License-Identifier: MIT OR Apache-2.0
//! Logical sectors of an image over another one: a guest's partition table there counts in those of the backing disk.

use crate::common::{run, SparseContent, World, WorldFile};
use drivers::{Disk, Null};
use formats::{open, qcow, qcow2, vhd, vmdk, ImageFormat, ImageParts, Options};

const SIZE: u64 = 4 << 20;

/// A disk with sectors of 4096 bytes.
async fn below() -> Disk {
    let disk = Disk::new(Null::new(SIZE));
    disk.activate().await.unwrap();
    disk.set_sector(4096).unwrap();
    disk
}

/// An image over another one, of a format that stores no size of sectors, or does not store it.
async fn make(kind: ImageFormat, file: &WorldFile, size: u64) {
    let name = "base".to_string();
    let made = match kind {
        ImageFormat::Qcow2 => qcow2::create(file, &plan(size, None)).await,
        ImageFormat::Qcow => {
            let parent = Some(name);
            qcow::create(file, &qcow::QcowCreate { size, parent }).await
        }
        ImageFormat::Vhd => {
            let parent = vhd::ParentOf {
                path: name,
                id: [0; 16],
            };
            let what = vhd::VhdCreate {
                kind: vhd::VhdKind::Differencing,
                size,
                id: [7; 16],
                parent: Some(parent),
                reserve: 0,
            };
            vhd::create(file, &what).await
        }
        _ => {
            let what = vmdk::VmdkCreate {
                form: vmdk::Form::MonolithicSparse,
                size,
                name: "a".into(),
                parent: Some((name, 7)),
                cid: 8,
            };
            vmdk::create(file, &[], &what).await
        }
    };
    made.unwrap();
}

fn plan(size: u64, sector: Option<u32>) -> qcow2::Qcow2Create {
    let backing = qcow2::BackingImage {
        name: "base".into(),
        format: Some("raw".into()),
    };
    qcow2::Qcow2Create {
        backing: Some(backing),
        sector,
        ..qcow2::Qcow2Create::new(size)
    }
}

async fn over(kind: ImageFormat, file: WorldFile) -> Disk {
    let parts = ImageParts {
        parent: Some(below().await),
        ..ImageParts::default()
    };
    open(kind, file, parts, Options::new("a"))
}

#[test]
fn a_child_has_the_sectors_of_its_parent() {
    for kind in [
        ImageFormat::Qcow2,
        ImageFormat::Qcow,
        ImageFormat::Vhd,
        ImageFormat::Vmdk,
    ] {
        // A disk that ends within one has smaller ones.
        for (size, sector) in [(SIZE, 4096), (SIZE + 4096, 4096), (SIZE + 512, 512)] {
            let world = World::new(vec![SparseContent::default()]);
            let file = world.file(0);
            let shape = run(async move {
                make(kind, &file, size).await;
                over(kind, file).await.activate().await.unwrap()
            });
            assert_eq!((shape.logical_block, shape.size), (sector, size), "{kind}");
            assert!(
                shape.discard.is_none_or(|unit| unit % sector == 0),
                "{kind}"
            );
        }
    }
}

/// A disk does not lose the sectors of its backing image with that.
#[test]
fn an_image_stands_alone_if_it_stores_its_sectors() {
    for (stored, expected) in [
        (None, None),
        (Some(4096), Some(4096)),
        (Some(512), Some(512)),
    ] {
        let world = World::new(vec![SparseContent::default()]);
        let file = world.file(0);
        run(async move {
            qcow2::create(&file, &plan(SIZE, stored)).await.unwrap();
            let disk = over(ImageFormat::Qcow2, file.clone()).await;
            disk.activate().await.unwrap();
            let alone = disk.stand_alone().await;
            let Some(expected) = expected else {
                let failure = alone.unwrap_err();
                assert!(failure.message.contains("tapimg rebase"), "{failure}");
                assert!(disk.goes_on().await.is_err());
                return;
            };
            alone.unwrap();
            disk.close().await.unwrap();
            let disk = open(
                ImageFormat::Qcow2,
                file,
                ImageParts::default(),
                Options::new("a"),
            );
            assert_eq!(disk.activate().await.unwrap().logical_block, expected);
        });
    }
}
