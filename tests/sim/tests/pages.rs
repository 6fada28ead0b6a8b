// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The segment table: which pages a request gets.

use blkback::engine::segments::{Pool, SegmentEntry, Segments};
use ring::abi::RawSegment;
use ring::segment::Segment;
use zerocopy::FromBytes;

fn segment(gref: u32) -> Segment {
    let mut raw = [0; 8];
    raw[..4].copy_from_slice(&gref.to_le_bytes());
    raw[5] = 7;
    let raw = RawSegment::read_from_bytes(&raw).expect("8 bytes");
    Segment::check(&raw).expect("a whole page")
}

/// Takes a chain, fills it, and says which pages it has.
fn take(table: &mut Segments<'_>, pool: Pool, count: u16) -> Option<Vec<u16>> {
    let head = table.alloc(pool, count)?;
    let mut at = head;
    for gref in 0..u32::from(count) {
        at = table.fill(at, segment(gref));
    }
    Some(table.slices(head, count).map(|slice| slice.page).collect())
}

#[test]
fn pages_that_come_back_are_given_out_again_in_the_same_order() {
    let mut entries = [SegmentEntry::EMPTY; 24];
    let mut table = Segments::new(&mut entries, 16);
    for _ in 0..3 {
        let first = take(&mut table, Pool::Copy, 8).expect("there are 16");
        let second = take(&mut table, Pool::Copy, 8).expect("there are 8 more");
        assert_eq!(first, (0..8).collect::<Vec<u16>>());
        assert_eq!(second, (8..16).collect::<Vec<u16>>());
        assert_eq!(take(&mut table, Pool::Copy, 1), None);
        table.release(Pool::Copy, 8, 8);
        table.release(Pool::Copy, 0, 8);
    }
    assert_eq!(table.free(Pool::Copy), 16);
    assert_eq!(table.free(Pool::Map), 8);
}

#[test]
fn every_page_belongs_to_one_chain() {
    let mut entries = [SegmentEntry::EMPTY; 20];
    let mut table = Segments::new(&mut entries, 12);
    let mut taken: Vec<Vec<u16>> = Vec::new();
    for step in 0u16..1000 {
        let count = step * 7 % 5;
        match take(&mut table, Pool::Copy, count) {
            Some(pages) if step % 3 != 0 || count == 0 => taken.push(pages),
            got => {
                // Chains come back in another order than they were taken.
                if let Some(pages) = got {
                    taken.push(pages);
                }
                let pages = taken.remove(usize::from(step) % taken.len());
                let head = pages.first().copied().unwrap_or(u16::MAX);
                table.release(Pool::Copy, head, pages.len() as u16);
            }
        }
        let mut all: Vec<u16> = taken.iter().flatten().copied().collect();
        all.sort_unstable();
        let many = all.len();
        all.dedup();
        assert_eq!(all.len(), many, "a page has two owners in step {step}");
        assert!(
            all.iter().all(|page| *page < 12),
            "a page of the other pool"
        );
        assert_eq!(usize::from(table.free(Pool::Copy)) + many, 12);
    }
}
