// SPDX-License-Identifier: MIT OR Apache-2.0
//! Second task of a flush: released clusters become free.

use super::memory::{sector, ImageEvent, MemoryImage};
use crate::common::history::{lost_flush_is_told, lost_flush_is_told_beside, Trial};
use crate::common::tools::parent;
use crate::common::{run, SparseContent, World};
use diskio::{Bytes, Errno, Runtime};
use drivers::{Attributes, Disk};
use formats::qcow2::{check, create, BackingImage, Findings, Qcow2, Qcow2Create};
use formats::{ImageParts, Options};

const CLUSTER: u64 = 4096;

/// Returns an active disk with one durable cluster of data.
fn disk(runtime: &Runtime) -> (MemoryImage, Disk) {
    let memory = MemoryImage::new(Vec::new(), 1, false);
    let file = memory.clone();
    let options = Options {
        discard: true,
        ..Options::new("flush")
    };
    let disk = Disk::new(Qcow2::new(memory.clone(), ImageParts::default(), options));
    let its = disk.clone();
    let begin = async move {
        let plan = Qcow2Create {
            cluster: CLUSTER,
            ..Qcow2Create::new(1 << 20)
        };
        create(&file, &plan).await.unwrap();
        its.activate().await.unwrap();
        let bytes = Bytes::copied(&sector(7).repeat(8)).unwrap();
        its.write(0, bytes, Attributes::default()).await?;
        its.flush().await
    };
    runtime.block_on(begin).unwrap().unwrap();
    (memory, disk)
}

fn memory_of(bytes: &[u8]) -> MemoryImage {
    MemoryImage::new(bytes.to_vec(), 1, false)
}

fn discard(runtime: &Runtime, disk: &Disk) {
    let its = disk.clone();
    let work = async move { its.discard(0, CLUSTER, Attributes::default()).await };
    runtime.block_on(work).unwrap().unwrap();
}

fn flush(runtime: &Runtime, disk: &Disk) -> Result<(), Errno> {
    let its = disk.clone();
    runtime.block_on(async move { its.flush().await }).unwrap()
}

fn close(runtime: &Runtime, disk: Disk) {
    let work = async move { disk.close().await };
    runtime.block_on(work).unwrap().unwrap();
}

fn findings(runtime: &Runtime, memory: &MemoryImage) -> Findings {
    let file = memory.clone();
    let work = async move { check(&file, "flush", false).await };
    runtime.block_on(work).unwrap().unwrap()
}

/// The guest's changes are durable. A cluster that cannot be freed is no error of the guest's request.
#[test]
fn a_flush_does_not_fail_because_a_cluster_cannot_be_freed() {
    let runtime = Runtime::new();
    let (memory, disk) = disk(&runtime);
    discard(&runtime, &disk);
    memory.refuse(|event| matches!(event, ImageEvent::Write(..)));
    assert_eq!(flush(&runtime, &disk), Ok(()));
    assert_eq!(disk.stats()["damage"], 1);
    memory.refuse(|_| false);
    close(&runtime, disk);
    let found = findings(&runtime, &memory);
    assert_eq!((found.unsafe_clusters, found.damaged), (0, 0));
}

/// To tell the storage that space is free is a hint.
#[test]
fn a_flush_does_not_fail_because_the_storage_keeps_its_space() {
    let runtime = Runtime::new();
    let (memory, disk) = disk(&runtime);
    discard(&runtime, &disk);
    memory.refuse(|event| matches!(event, ImageEvent::Discard(..)));
    assert_eq!(flush(&runtime, &disk), Ok(()));
    assert_eq!(disk.stats()["damage"], 0);
    assert_eq!(disk.stats()["clusters_freed"], 1);
    close(&runtime, disk);
    assert_eq!(findings(&runtime, &memory), Findings::default());
}

/// Another host may write an image that is not active here.
#[test]
fn an_image_that_is_let_go_of_is_not_in_the_cache() {
    let runtime = Runtime::new();
    let (memory, disk) = disk(&runtime);
    assert!(!memory.is_forgotten());
    let work = async move { disk.inactivate().await };
    runtime.block_on(work).unwrap().unwrap();
    assert!(memory.is_forgotten());

    let (image, data) = (memory_of(&[]), memory_of(&[0; 1 << 20]));
    let file = image.clone();
    let parts = ImageParts {
        extents: vec![data.clone()],
        ..ImageParts::default()
    };
    let disk = Disk::new(Qcow2::new(image.clone(), parts, Options::new("data")));
    let work = async move {
        let plan = Qcow2Create {
            data_file: Some(("data".into(), false)),
            ..Qcow2Create::new(1 << 20)
        };
        create(&file, &plan).await.unwrap();
        disk.activate().await.unwrap();
        disk.inactivate().await
    };
    runtime.block_on(work).unwrap().unwrap();
    assert!(image.is_forgotten() && data.is_forgotten());
}

/// A failed flush may have lost the change of an entry, which the next flush does not report: after a power cut the old
/// entry leads to the cluster, which must not have another use by then.
#[test]
fn what_a_flush_that_failed_was_to_make_durable_is_not_freed() {
    let runtime = Runtime::new();
    let (memory, disk) = disk(&runtime);
    discard(&runtime, &disk);
    memory.refuse(|event| matches!(event, ImageEvent::FlushEnd(_)));
    assert_eq!(flush(&runtime, &disk), Err(Errno::IO));
    memory.refuse(|_| false);
    assert_eq!(flush(&runtime, &disk), Ok(()));
    assert_eq!(disk.stats()["clusters_freed"], 0);
    // Clusters that are released later are freed.
    let its = disk.clone();
    let bytes = Bytes::copied(&sector(8).repeat(8)).unwrap();
    let work = async move { its.write(0, bytes, Attributes::default()).await };
    runtime.block_on(work).unwrap().unwrap();
    discard(&runtime, &disk);
    assert_eq!(flush(&runtime, &disk), Ok(()));
    assert_eq!(disk.stats()["clusters_freed"], 1);
    close(&runtime, disk);
    let leak = Findings {
        leaks: 1,
        ..Findings::default()
    };
    assert_eq!(findings(&runtime, &memory), leak);
}

/// Others may be next to use an image, whatever became of the flush: they must see what there is, and this
/// process must not keep anything else.
#[test]
fn an_image_is_let_go_of_even_if_its_flush_fails() {
    let runtime = Runtime::new();
    let (memory, disk) = disk(&runtime);
    memory.refuse(|event| matches!(event, ImageEvent::FlushEnd(_)));
    let its = disk.clone();
    let work = async move { its.inactivate().await };
    assert_eq!(runtime.block_on(work).unwrap(), Err(Errno::IO));
    assert!(memory.is_forgotten() && disk.stats().is_empty());
    memory.refuse(|_| false);
    close(&runtime, disk);
    let found = findings(&runtime, &memory);
    assert_eq!((found.unsafe_clusters, found.damaged), (0, 0));
}

/// An image with a backing image, so that the first write to a part of a cluster has to flush.
fn trial(seed: u64) -> Trial {
    let world = World::new(vec![SparseContent::default()]);
    let (file, size) = (world.file(0), 1 << 20);
    let plan = Qcow2Create {
        cluster: CLUSTER,
        backing: Some(BackingImage {
            name: "base".into(),
            format: Some("raw".into()),
        }),
        ..Qcow2Create::new(size)
    };
    run(async move { create(&file, &plan).await.unwrap() });
    Trial {
        name: "qcow2".into(),
        size,
        files: world.files(),
        open: std::rc::Rc::new(|world| {
            let parts = ImageParts {
                parent: Some(parent()),
                ..ImageParts::default()
            };
            let image = Qcow2::new(world.file(0), parts, Options::new("flush"));
            Disk::new(image)
        }),
        base: std::rc::Rc::new(|_| 0),
        unit: CLUSTER,
        seed,
    }
}

#[test]
fn a_flush_that_fails_within_a_write_is_told() {
    lost_flush_is_told(|| trial(1));
}

#[test]
fn a_flush_that_fails_beside_the_guests_is_told() {
    lost_flush_is_told_beside(trial);
}
