// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dropping the backing image of an image that is in use, with a power cut at any moment.

use super::crash::{cases, fresh, opened, SIZE};
use super::memory::{apply, sector, ImageEvent, MemoryImage};
use super::rename::{header_of, torn};
use diskio::{Bytes, Errno, Runtime};
use drivers::Attributes;

#[test]
fn every_prefix_has_the_image_below_or_needs_none() {
    let runtime = Runtime::new();
    let mut tried = 0;
    for case in cases() {
        let first = fresh(&runtime, &case);
        let memory = MemoryImage::new(first.clone(), 1, false);
        let disk = opened(&runtime, &memory, &case, true);
        let its = disk.clone();
        let goes_on = runtime.block_on(async move { its.goes_on().await });
        if !goes_on.unwrap().unwrap() {
            continue;
        }
        tried += 1;
        let (before, done) = (header_of(&runtime, &first), memory.log().len());
        let its = disk.clone();
        let work = async move {
            its.stand_alone().await?;
            let again = its.goes_on().await?;
            // Later changes of the header must keep the change.
            its.grow(2 * SIZE).await.map(|()| again)
        };
        assert!(!runtime.block_on(work).unwrap().unwrap(), "{}", case.name);
        let mut bytes = first;
        for (number, event) in memory.log().iter().enumerate() {
            let whole = bytes.clone();
            for state in torn(&bytes, event).into_iter().chain([whole]) {
                let found = header_of(&runtime, &state);
                let known = found.backing.is_none() || found.backing == before.backing;
                assert!(known, "{}: {found:?}", case.name);
                assert!(number >= done || found.backing == before.backing);
            }
            apply(&mut bytes, event);
        }
        let last = header_of(&runtime, &bytes);
        assert_eq!(
            (&last.backing, last.size),
            (&None, 2 * SIZE),
            "{}",
            case.name
        );
    }
    assert!(tried > 4, "{tried} of them go on from another image");
}

/// Content that is in memory and not in the image would be lost together with the backing image.
#[test]
fn what_a_write_or_a_flush_has_failed_to_bring_is_brought_first_or_it_is_refused() {
    let runtime = Runtime::new();
    let all = cases();
    let case = all.iter().find(|case| case.name == "overlay").unwrap();
    let first = fresh(&runtime, case);
    let memory = MemoryImage::new(first, 1, false);
    let disk = opened(&runtime, &memory, case, true);
    // Tables have writes of this size, and data has not; the header could.
    let refused = |event: &ImageEvent| matches!(event, ImageEvent::Write(at, data) if *at > 0 && data.len() == 4096);
    memory.refuse(refused);
    let its = disk.clone();
    let bytes = Bytes::copied(&sector(7)).unwrap();
    let work = async move { its.write(512, bytes, Attributes::default()).await };
    assert_eq!(runtime.block_on(work).unwrap(), Err(Errno::IO));
    let its = disk.clone();
    let failed = runtime.block_on(async move { its.stand_alone().await });
    assert!(failed.unwrap().is_err(), "it has forgotten what is below");
    assert!(header_of(&runtime, &memory.bytes()).backing.is_some());
    memory.refuse(|event| matches!(event, ImageEvent::FlushEnd(_)));
    let its = disk.clone();
    let failed = runtime.block_on(async move { its.flush().await });
    assert_eq!(failed.unwrap(), Err(Errno::IO));
    memory.refuse(|_| false);
    let its = disk.clone();
    let refused = runtime.block_on(async move { its.stand_alone().await });
    let refused = refused.unwrap().unwrap_err();
    assert!(refused.message.contains("a flush has failed"), "{refused}");
    assert!(header_of(&runtime, &memory.bytes()).backing.is_some());
    // Opened again, the disk has the content of the image.
    let its = disk.clone();
    let again = async move {
        its.inactivate().await?;
        its.activate().await.map(drop).map_err(|_| Errno::IO)
    };
    runtime.block_on(again).unwrap().unwrap();
    let its = disk.clone();
    let alone = runtime.block_on(async move { its.stand_alone().await });
    alone.unwrap().unwrap();
    assert!(header_of(&runtime, &memory.bytes()).backing.is_none());
}
