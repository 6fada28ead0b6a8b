// SPDX-License-Identifier: MIT OR Apache-2.0
//! Places that a disk reports to the kernel stay true; it does not report clusters with another user.

use super::crash::{
    below, cases, checked, first, fresh, opened, options, parts, CrashCase, SECTORS, SIZE,
};
use super::memory::{read_all, sector, stamps, MemoryImage, SECTOR};
use crate::common::history::Trial;
use crate::common::places::{told_is_sure, PlacesHost, Subject};
use crate::common::tools::{folder, has_qemu, tool_in, PARENT_BACKING};
use crate::common::SparseContent;
use diskio::{Bytes, Runtime};
use drivers::{Attributes, Disk};
use formats::qcow2::Qcow2;
use formats::{ImageParts, Options};
use futures::future::join_all;
use seeds::Seeds;
use std::rc::Rc;

/// Number in all sectors of QEMU's image.
const BEFORE: u32 = 0x5555_5555;

/// An image, and what its disk held before.
struct Tried {
    case: CrashCase,
    memory: MemoryImage,
    first: fn(&CrashCase, u64) -> u32,
}

impl Subject for Tried {
    type Storage = MemoryImage;

    fn name(&self) -> String {
        self.case.name.into()
    }

    fn storage(&self) -> MemoryImage {
        self.memory.clone()
    }

    fn there(&self, at: u64, len: u64) -> Vec<u8> {
        self.memory.bytes()[at as usize..][..len as usize].to_vec()
    }

    fn below(&self) -> Option<(u16, Disk)> {
        let below = self.case.below.then(below)?;
        let its = below.clone();
        let active = Runtime::new().block_on(async move { its.activate().await });
        active.unwrap().unwrap();
        Some((PARENT_BACKING, below))
    }

    fn next(&self) -> Disk {
        checked(&Runtime::new(), &self.case, self.memory.bytes())
    }

    fn sector(&self, number: u32, _at: u64) -> Vec<u8> {
        sector(number)
    }

    fn number(&self, bytes: &[u8], _at: u64) -> Option<u32> {
        stamps(bytes)[0]
    }

    fn first(&self, at: u64) -> u32 {
        (self.first)(&self.case, at)
    }
}

fn host(
    runtime: &Runtime,
    case: &CrashCase,
    image: Vec<u8>,
    seed: u64,
    first: fn(&CrashCase, u64) -> u32,
) -> Rc<PlacesHost<Tried>> {
    let memory = MemoryImage::new(image, seed, true);
    let disk = opened(runtime, &memory, case, true);
    let case = case.clone();
    PlacesHost::new(
        Tried {
            case,
            memory,
            first,
        },
        disk,
        SECTORS,
        seed,
    )
}

#[test]
fn what_is_told_stays_true() {
    let runtime = Runtime::new();
    for case in cases() {
        let (mut hits, mut deaths) = (0, 0);
        let (mut zeroes, mut from_below) = (0, 0);
        for seed in Seeds::few(12) {
            let host = host(&runtime, &case, fresh(&runtime, &case), seed, first);
            host.rounds(&runtime);
            hits += host.hits.get();
            deaths += host.deaths.get();
            zeroes += host.zeroes.get();
            from_below += host.below.get();
        }
        let what = format!(
            "{}: {hits} by the kernel, with {zeroes} zeroes and {from_below} from below, {deaths} deaths",
            case.name
        );
        println!("{what}");
        // A run with few requests proves nothing; the number depends on the seeds.
        assert!(
            hits > 50 && deaths > 10 && zeroes + from_below > 0,
            "{what}"
        );
        assert!(from_below > 0 || !case.below, "{what}");
    }
}

#[test]
fn what_is_not_sure_is_not_told() {
    let runtime = Runtime::new();
    for case in cases().into_iter().filter(|case| !case.below) {
        let image = SparseContent::from(&fresh(&runtime, &case));
        told_is_sure(|| {
            let its = case.clone();
            Trial {
                name: case.name.into(),
                size: SIZE,
                files: vec![image.clone()],
                open: Rc::new(move |world| {
                    let options = options(&its, true);
                    Disk::new(Qcow2::new(world.file(0), parts(&its), options))
                }),
                base: Rc::new(|_| 0),
                unit: case.plan.cluster,
                seed: 1,
            }
        });
    }
}

/// An image with a snapshot of a full disk, in clusters of 4 KiB.
fn with_snapshot() -> Vec<u8> {
    let folder = folder();
    let size = SIZE.to_string();
    let create = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4096",
        "image",
        &size,
    ];
    let fill = format!("write -q -P 0x55 0 {SIZE}");
    tool_in("qemu-img", &create, folder.path());
    tool_in(
        "qemu-io",
        &["-f", "qcow2", "-c", &fill, "image"],
        folder.path(),
    );
    tool_in(
        "qemu-img",
        &["snapshot", "-c", "one", "image"],
        folder.path(),
    );
    std::fs::read(folder.path().join("image")).unwrap()
}

/// Clusters that a snapshot also uses keep their content.
#[test]
fn clusters_of_a_snapshot_are_not_told() {
    if !has_qemu("clusters_of_a_snapshot_are_not_told") {
        return;
    }
    let (runtime, image) = (Runtime::new(), with_snapshot());
    let case = &cases()[0];
    for seed in Seeds::few(8) {
        let host = host(&runtime, case, image.clone(), seed, |_, _| BEFORE);
        let disk = host.disk.clone();
        let places = runtime.block_on(async move { disk.places(0, SIZE).await });
        assert_eq!(places.unwrap().unwrap(), []);
        host.rounds(&runtime);
        assert!(host.hits.get() > 0);
        let options = Options {
            writable: false,
            snapshot: Some("one".into()),
            ..Options::new(case.name)
        };
        let snapshot = Disk::new(Qcow2::new(
            host.subject.memory.clone(),
            ImageParts::default(),
            options,
        ));
        let bytes = runtime.block_on(async move {
            snapshot.activate().await.unwrap();
            // Nothing of it ever changes, so the kernel may read it wherever it is.
            let places = snapshot.places(0, SIZE).await.unwrap();
            assert!(!places.is_empty() && places.iter().all(|place| !place.writable));
            read_all(&snapshot, SIZE).await
        });
        assert_eq!(
            stamps(&bytes.unwrap().unwrap()),
            [Some(BEFORE); SECTORS as usize]
        );
    }
}

/// The autoclear features in the header would be wrong after a write of the kernel, because no program updates them.
#[test]
fn nothing_is_written_before_the_first_write() {
    const AUTOCLEAR: usize = 88;
    let runtime = Runtime::new();
    let case = &cases()[0];
    let mut image = fresh(&runtime, case);
    let memory = MemoryImage::new(image.clone(), 1, false);
    let disk = opened(&runtime, &memory, case, true);
    let data = || Bytes::copied(&sector(7)).unwrap();
    let its = disk.clone();
    let written = runtime.block_on(async move {
        its.write(0, data(), Attributes::default()).await?;
        its.close().await
    });
    written.unwrap().unwrap();
    image = memory.bytes();
    image[AUTOCLEAR + 7] |= 1;
    let disk = opened(&runtime, &MemoryImage::new(image, 1, false), case, true);
    let (before, after) = runtime
        .block_on(async move {
            let before = disk.places(0, SECTOR).await.unwrap();
            disk.write(0, data(), Attributes::default()).await.unwrap();
            (before, disk.places(0, SECTOR).await.unwrap())
        })
        .unwrap();
    assert_eq!([before.len(), after.len()], [1, 1]);
    assert!(!before[0].writable && after[0].writable);
}

/// A sequential writer finds the next clusters allocated, so that the kernel can serve it.
#[test]
fn the_next_clusters_of_a_row_are_there() {
    const CLUSTER: u64 = 4096;
    const ROW: u64 = 24;
    let runtime = Runtime::new();
    let case = &cases()[0];
    let memory = MemoryImage::new(fresh(&runtime, case), 1, false);
    let disk = opened(&runtime, &memory, case, true);
    let its = disk.clone();
    let places = runtime.block_on(async move {
        // All at once, as a guest does.
        let writes = (0..ROW).map(|number| {
            let data = Bytes::copied(&sector(7).repeat(8)).unwrap();
            its.write(number * CLUSTER, data, Attributes::default())
        });
        for written in join_all(writes).await {
            written.unwrap();
        }
        its.places(0, SIZE).await.unwrap()
    });
    let places = places.unwrap();
    let written: u64 = places
        .iter()
        .filter(|place| place.writable)
        .map(|place| place.len)
        .sum();
    // The 16th was long enough a row to have as much again behind it.
    assert_eq!(written, 32 * CLUSTER, "{places:?}");
}
