// SPDX-License-Identifier: MIT OR Apache-2.0
//! The image below gets another name: whatever the header has room for, and whenever it ends.

use super::memory::{apply, ImageEvent, MemoryImage};
use diskio::Runtime;
use formats::qcow2::{create, header, set_backing, BackingImage, Qcow2Create, Qcow2Header};

fn backing(name: &str, format: Option<&str>) -> Option<BackingImage> {
    Some(BackingImage {
        name: name.into(),
        format: format.map(str::to_string),
    })
}

/// Names that are absent, short, long, and longer than a header of 512 bytes has room for twice.
fn names() -> Vec<Option<BackingImage>> {
    vec![
        None,
        backing("a", Some("raw")),
        backing("base.qcow2", Some("qcow2")),
        backing("base.qcow2", None),
        backing(&"x".repeat(200), Some("vpc")),
        backing(&"y".repeat(330), Some("qcow2")),
    ]
}

pub(crate) fn header_of(runtime: &Runtime, bytes: &[u8]) -> Qcow2Header {
    let file = MemoryImage::new(bytes.to_vec(), 1, false);
    runtime
        .block_on(async move { header(&file).await })
        .unwrap()
        .unwrap()
}

fn made(runtime: &Runtime, plan: &Qcow2Create) -> Vec<u8> {
    let (file, plan) = (MemoryImage::new(Vec::new(), 1, false), plan.clone());
    let its = file.clone();
    let work = async move { create(&its, &plan).await };
    runtime.block_on(work).unwrap().unwrap();
    file.bytes()
}

/// Returns the image after each partial write of the first bytes, in whole sectors.
pub(crate) fn torn(before: &[u8], event: &ImageEvent) -> Vec<Vec<u8>> {
    let ImageEvent::Write(at, data) = event else {
        return Vec::new();
    };
    let parts = (0..data.len()).step_by(512).skip(1);
    parts
        .map(|end| {
            let mut bytes = before.to_vec();
            apply(&mut bytes, &ImageEvent::Write(*at, data[..end].to_vec()));
            bytes
        })
        .collect()
}

#[test]
fn every_prefix_of_another_name_is_the_old_one_or_the_new_one() {
    let runtime = Runtime::new();
    for (version, cluster) in [(2, 4096), (3, 512), (3, 65536)] {
        for old in names() {
            let plan = Qcow2Create {
                version,
                cluster,
                backing: old.clone(),
                ..Qcow2Create::new(1 << 20)
            };
            let first = made(&runtime, &plan);
            let before = header_of(&runtime, &first);
            assert_eq!(before.backing, old);
            for new in names() {
                let file = MemoryImage::new(first.clone(), 1, false);
                let (its, wanted) = (file.clone(), new.clone());
                let work = async move { set_backing(&its, wanted.as_ref(), None).await };
                runtime.block_on(work).unwrap().unwrap();
                let what = format!("version {version}, {cluster}: {old:?}, {new:?}");
                let mut bytes = first.clone();
                for event in file.log() {
                    let mut states = vec![bytes.clone()];
                    // A power cut in the middle: if the header has the format's place already, the format changes with
                    // the name.
                    let has_format = |backing: &Option<BackingImage>| {
                        backing.as_ref().is_some_and(|one| one.format.is_some())
                    };
                    if has_format(&old) && has_format(&new) {
                        states.extend(torn(&bytes, &event));
                    }
                    for state in states {
                        let found = header_of(&runtime, &state);
                        assert!([&old, &new].contains(&&found.backing), "{what}: {found:?}");
                        let mut same = found.clone();
                        same.backing.clone_from(&old);
                        assert_eq!(same, before, "{what}");
                    }
                    apply(&mut bytes, &event);
                }
                assert_eq!(header_of(&runtime, &bytes).backing, new, "{what}");
                assert!(bytes[cluster as usize..] == first[cluster as usize..]);
            }
        }
    }
}

#[test]
fn a_name_that_has_no_room_is_refused() {
    let runtime = Runtime::new();
    let plan = Qcow2Create {
        cluster: 512,
        ..Qcow2Create::new(1 << 20)
    };
    let file = MemoryImage::new(made(&runtime, &plan), 1, false);
    let before = file.bytes();
    let its = file.clone();
    let long = backing(&"z".repeat(400), Some("raw"));
    let work = async move { set_backing(&its, long.as_ref(), None).await };
    let failure = runtime.block_on(work).unwrap().unwrap_err();
    assert!(failure.message.contains("use a shorter one"), "{failure}");
    assert!(file.bytes() == before);
}
