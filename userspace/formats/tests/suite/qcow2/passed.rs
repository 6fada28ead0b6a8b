// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images of a chain that have nothing of a range: a read passes them without asking each.

use super::memory::{sector, stamps, MemoryImage};
use diskio::{Bytes, Data, Errno, Runtime};
use drivers::{Attributes, Disk};
use formats::qcow2::{create, BackingImage, Qcow2, Qcow2Create};
use formats::{ImageParts, Options, Storage};
use std::future::Future;

/// Bytes of the disk, of its backing image, and of a cluster.
const SIZE: u64 = 1 << 20;
const SHORTER: u64 = SIZE - 2 * CLUSTER;
const CLUSTER: u64 = 64 << 10;
/// Sectors of 512 bytes of a cluster.
const SECTORS: u64 = CLUSTER / 512;

struct BackingHarness(Runtime);

impl BackingHarness {
    fn run<T: 'static>(&self, work: impl Future<Output = T> + 'static) -> T {
        self.0.block_on(work).unwrap()
    }

    fn image(&self, size: u64, backing: bool) -> MemoryImage {
        let memory = MemoryImage::new(Vec::new(), 1, false);
        let mut plan = Qcow2Create::new(size);
        plan.backing = backing.then(|| BackingImage {
            name: "below".into(),
            format: Some("qcow2".into()),
        });
        let file = memory.clone();
        self.run(async move { create(&file, &plan).await }).unwrap();
        memory
    }

    fn opened(&self, image: &MemoryImage, parent: Option<Disk>) -> Disk {
        let parts = ImageParts {
            parent,
            ..ImageParts::default()
        };
        let disk = Disk::new(Qcow2::new(image.clone(), parts, Options::new("image")));
        let its = disk.clone();
        self.run(async move { its.activate().await }).unwrap();
        disk
    }

    fn write(&self, disk: &Disk, number: u64, stamp: u32) {
        let (disk, bytes) = (disk.clone(), Bytes::copied(&sector(stamp)).unwrap());
        let how = Attributes::default();
        self.run(async move { disk.write(number * 512, bytes, how).await })
            .unwrap();
    }

    fn read(&self, disk: &Disk, number: u64) -> Option<u32> {
        let (disk, data) = (disk.clone(), Data::zeroed(512).unwrap());
        let into = data.clone();
        self.run(async move { disk.read(number * 512, into).await })
            .unwrap();
        stamps(&data.to_vec())[0]
    }
}

/// Returns the disk that has all of `count` sectors, according to the image's tables in memory.
fn passed(disk: &Disk, number: u64, count: u64) -> Option<Disk> {
    disk.passed(number * 512, count * 512)
}

#[test]
fn an_image_is_passed_where_it_is_known_to_have_nothing() {
    let bed = BackingHarness(Runtime::new());
    let below = bed.opened(&bed.image(SHORTER, false), None);
    bed.write(&below, 7, 70);
    bed.write(&below, 2 * SECTORS + 1, 71);
    let image = bed.image(SIZE, true);
    let disk = bed.opened(&image, Some(below.clone()));
    bed.write(&disk, 3 * SECTORS, 72);
    let zeroed = disk.clone();
    let how = Attributes::default();
    bed.run(async move { zeroed.write_zeroes(5 * CLUSTER, CLUSTER, how).await })
        .unwrap();
    let last = disk.clone();
    bed.run(async move { last.inactivate().await }).unwrap();
    assert!(passed(&disk, 7, 1).is_none(), "it is not served");

    let disk = bed.opened(&image, Some(below));
    assert!(passed(&disk, 7, 1).is_none(), "no table was read yet");
    assert_eq!(bed.read(&disk, 7), Some(70));
    let holder = passed(&disk, 7, 1).expect("nothing is there");
    assert_eq!(bed.read(&holder, 7), Some(70));
    let holder = passed(&disk, 0, 3 * SECTORS).expect("nothing is in a row of clusters");
    assert_eq!(bed.read(&holder, 2 * SECTORS + 1), Some(71));
    for (number, count, why) in [
        (3 * SECTORS, 1, "it is here"),
        (3 * SECTORS - 1, 2, "the end is here"),
        (3 * SECTORS, SECTORS + 1, "the beginning is here"),
        (5 * SECTORS, 1, "zeroes are here"),
        (4 * SECTORS, 2 * SECTORS, "zeroes are at the end"),
        (SHORTER / 512 - 1, 2, "what is below ends before"),
        (SHORTER / 512, 1, "what is below has ended"),
        (SIZE / 512 - 1, 2, "the disk ends before"),
    ] {
        assert!(passed(&disk, number, count).is_none(), "{why}");
    }
    assert_eq!(bed.read(&disk, 3 * SECTORS), Some(72));
    assert_eq!(bed.read(&disk, SHORTER / 512), Some(0));
}

#[test]
fn an_image_over_nothing_is_not_passed() {
    let bed = BackingHarness(Runtime::new());
    let disk = bed.opened(&bed.image(SIZE, false), None);
    assert_eq!(bed.read(&disk, 0), Some(0));
    assert!(passed(&disk, 0, 1).is_none());
}

/// The search for that disk meets damage first, and the read that follows meets it again; both together report it once.
#[test]
fn damage_is_told_once_for_each_read() {
    let bed = BackingHarness(Runtime::new());
    // The L1 table is the fourth cluster of a new image, and what it leads to the fifth.
    let (l1, l2) = (3 * CLUSTER, 4 * CLUSTER);
    for (at, word) in [(l2 + 7 * 8, 1_u64 << 63 | 512), (l1, 1 << 63 | 512)] {
        let (base, image) = (bed.image(SIZE, false), bed.image(SIZE, true));
        let disk = bed.opened(&image, Some(bed.opened(&base, None)));
        bed.write(&disk, 3 * SECTORS, 72);
        let its = disk.clone();
        bed.run(async move { its.inactivate().await }).unwrap();
        let file = image.clone();
        bed.run(async move {
            file.write(at, Bytes::copied(&word.to_be_bytes()).unwrap())
                .await
        })
        .unwrap();

        let damaged = bed.opened(&image, Some(bed.opened(&base, None)));
        let top = bed.opened(&bed.image(SIZE, true), Some(damaged.clone()));
        for count in 1..4 {
            let (its, data) = (top.clone(), Data::zeroed(512).unwrap());
            let read = bed.run(async move { its.read(7 * CLUSTER, data).await });
            assert_eq!(read, Err(Errno::IO));
            assert_eq!(damaged.stats()["damage"], count, "{at}");
        }
        assert!(passed(&damaged, 7 * SECTORS, 1).is_none());
        assert_eq!(damaged.stats()["damage"], 3, "{at}");
    }
}
