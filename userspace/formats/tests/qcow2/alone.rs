// SPDX-License-Identifier: MIT OR Apache-2.0
//! An image comes to need the one below it no more, whenever power fails.

use crate::crash::{cases, fresh, opened, SIZE};
use crate::memory::{apply, Event, Memory};
use diskio::Runtime;
use formats::qcow2::{header, Header};

fn header_of(runtime: &Runtime, bytes: &[u8]) -> Header {
    let file = Memory::new(bytes.to_vec(), 1, false);
    let work = async move { header(&file).await };
    runtime.block_on(work).unwrap().unwrap()
}

/// The image after an event of which only some sectors were done.
fn torn(before: &[u8], event: &Event) -> Vec<Vec<u8>> {
    let mut all = vec![before.to_vec()];
    if let Event::Write(at, data) = event {
        for end in (512..data.len()).step_by(512) {
            let mut bytes = before.to_vec();
            apply(&mut bytes, &Event::Write(*at, data[..end].to_vec()));
            all.push(bytes);
        }
    }
    all
}

#[test]
fn every_prefix_has_the_image_below_or_needs_none() {
    let runtime = Runtime::new();
    let mut tried = 0;
    for case in cases() {
        let first = fresh(&runtime, &case);
        let memory = Memory::new(first.clone(), 1, false);
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
            // What the header is changed to later knows of it.
            its.grow(2 * SIZE).await.map(|()| again)
        };
        assert!(!runtime.block_on(work).unwrap().unwrap(), "{}", case.name);
        let mut bytes = first;
        for (number, event) in memory.log().iter().enumerate() {
            for state in torn(&bytes, event) {
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
