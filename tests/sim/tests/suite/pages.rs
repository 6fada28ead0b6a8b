// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The segment table: which pages a request gets.

use blkback::engine::segments::{Pool, SegmentEntry, Segments, TableShape};
use blkback::engine::BlockGroup;
use ring::abi::{RawSegment, OP_READ, OP_WRITE};
use ring::segment::GrantSegment;
use sim::machine::MachineSetup;
use sim::rng::Rng;
use sim::spec::Spec;
use sim::world::{EngineWorld, ReservedMemory};
use zerocopy::FromBytes;

fn segment(gref: u32) -> GrantSegment {
    let mut raw = [0; 8];
    raw[..4].copy_from_slice(&gref.to_le_bytes());
    raw[5] = 7;
    let raw = RawSegment::read_from_bytes(&raw).expect("8 bytes");
    GrantSegment::check(&raw).expect("a whole page")
}

fn shape(copy: u16, map: u16) -> TableShape {
    TableShape {
        copy,
        own: copy,
        map,
    }
}

/// Takes a chain, fills it, and returns its pages.
fn take(table: &mut Segments<'_>, pool: Pool, count: u16) -> Option<Vec<u16>> {
    let head = table.alloc(pool, count)?;
    let mut at = head;
    for gref in 0..u32::from(count) {
        at = table.fill(at, segment(gref));
    }
    Some(
        table
            .slices(head, count)
            .map(|slice| slice.page.number())
            .collect(),
    )
}

#[test]
fn pages_that_come_back_are_given_out_again_in_the_same_order() {
    let (mut entries, mut groups) = ([SegmentEntry::EMPTY; 24], [BlockGroup::EMPTY; 1]);
    let mut table = Segments::new(&mut entries, &mut groups, shape(16, 8));
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
    // Pages that are not whole blocks as well.
    let (mut entries, mut groups) = ([SegmentEntry::EMPTY; 20], [BlockGroup::EMPTY; 1]);
    let mut table = Segments::new(&mut entries, &mut groups, shape(13, 7));
    let mut taken: Vec<Vec<u16>> = Vec::new();
    for step in 0u16..1000 {
        let count = step * 7 % 5;
        match take(&mut table, Pool::Copy, count) {
            Some(pages) if step % 3 != 0 || count == 0 => taken.push(pages),
            got => {
                // Chains are returned in another order than they were taken.
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
            all.iter().all(|page| *page < 13),
            "a page of the other pool"
        );
        assert_eq!(usize::from(table.free(Pool::Copy)) + many, 13);
    }
}

/// Returns the number of runs of adjacent pages.
fn runs(pages: &[u16]) -> usize {
    1 + pages.windows(2).filter(|p| p[0] + 1 != p[1]).count()
}

#[test]
fn after_random_requests_a_large_one_has_few_pieces() {
    const PAGES: u16 = 1024;
    let mut entries = vec![SegmentEntry::EMPTY; usize::from(PAGES)];
    let mut groups = vec![BlockGroup::EMPTY; BlockGroup::needed(PAGES)];
    let mut table = Segments::new(&mut entries, &mut groups, shape(PAGES, 0));
    let mut rng = Rng::new(7);
    let mut taken: Vec<Vec<u16>> = Vec::new();
    let give = |table: &mut Segments<'_>, pages: Vec<u16>| {
        table.release(Pool::Copy, pages[0], pages.len() as u16);
    };
    for _ in 0..20_000 {
        let count = rng.pick(&[1u16, 1, 1, 2, 3, 8, 11, 16, 32]);
        taken.extend(take(&mut table, Pool::Copy, count));
        // Up to 64 in flight, which complete in any order.
        while taken.len() > 64 || (rng.percent(30) && !taken.is_empty()) {
            let at = rng.index(taken.len());
            let pages = taken.swap_remove(at);
            give(&mut table, pages);
        }
    }
    let mut worst = 0;
    for _ in 0..200 {
        let pages = take(&mut table, Pool::Copy, 32).expect("less than half is in use");
        worst = worst.max(runs(&pages));
        give(&mut table, pages);
        let at = rng.index(taken.len());
        let pages = taken.swap_remove(at);
        let count = pages.len() as u16;
        give(&mut table, pages);
        taken.extend(take(&mut table, Pool::Copy, count));
    }
    assert!(worst <= 4, "128 KiB in {worst} pieces");
    for pages in taken {
        give(&mut table, pages);
    }
    assert_eq!(table.free(Pool::Copy), PAGES);
    let all = take(&mut table, Pool::Copy, PAGES).expect("all are free");
    assert_eq!(runs(&all), 1);
}

#[test]
fn the_largest_request_is_done_in_pieces_where_nothing_is_lent() {
    let setup = MachineSetup::poor();
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    world.serve(&[
        Spec::indirect(OP_WRITE, 0, 512),
        Spec::pages(OP_WRITE, 8192, 11),
        Spec::indirect(OP_WRITE, 4096, 300),
    ]);
    world.serve(&[
        Spec::indirect(OP_READ, 0, 512),
        Spec::indirect(OP_READ, 4096, 512),
    ]);
    let stats = world.engine.stats();
    assert_eq!((stats.rd_req, stats.wr_req), (2, 3), "each is counted once");
    assert_eq!(stats.rd_sect, 8192);
    assert_eq!(stats.wr_sect, 4096 + 88 + 2400);
    let batches = world.machine.borrow().disk.batches;
    assert!(batches >= 32 + 19 + 64, "in {batches} pieces");
    assert_eq!(world.engine.borrowed(), 0);
}

#[test]
fn what_is_borrowed_is_given_back_when_it_is_not_used() {
    let setup = MachineSetup {
        lendable: 512,
        fickle: 0,
        ..MachineSetup::poor()
    };
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    world.send(&[Spec::indirect(OP_WRITE, 0, 128)]);
    let _pass = world.engine.pass();
    assert_eq!(world.engine.pages(), 128, "as many as the request needs");
    assert_eq!(world.engine.unused(), 0);
    assert_eq!(world.engine.give_back(u16::MAX), 0, "all are in use");
    world.run();
    world.engine.unused();
    assert_eq!(world.engine.unused(), world.engine.borrowed());
    world.engine.give_back(u16::MAX);
    assert_eq!(world.engine.pages(), 16);
    let problems = world.verdict();
    assert!(problems.is_empty(), "{problems:#?}");
}
