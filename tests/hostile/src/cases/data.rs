// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Attacks with granted pages, and with pages that are not granted.

use super::{case, data, AttackCase};
use crate::grants::{GrantAccess, GrantPages};
use crate::lab::Lab;
use crate::queue::ANSWER;
use crate::session::{Session, DESCRIPTOR_PAGE, MAPPED, WIDE};
use crate::vbd::Mode;
use crate::wire::{flush, rw, Seg, WireRequest, ERROR, OKAY};
use anyhow::{ensure, Context, Result};
use ring::abi::{OP_READ, OP_WRITE};
use std::sync::atomic::Ordering::Relaxed;

pub(super) fn all() -> Vec<AttackCase> {
    vec![
        case!(
            data::h21_descriptor_grants,
            "descriptor pages that nobody granted"
        ),
        case!(
            data::h22_descriptors_are_data,
            "a read over its own descriptors"
        ),
        case!(
            data::h23_bad_grants,
            "references that were never granted, or taken back"
        ),
        case!(
            data::h24_read_into_read_only,
            "a read into pages that may only be read"
        ),
        case!(
            data::h25_taken_back_in_flight,
            "grants taken back under running I/O"
        ),
        case!(
            data::h26_one_grant_everywhere,
            "one reference in all segments of all requests"
        ),
        case!(
            data::h27_more_than_can_be_kept,
            "ever new references of a frontend that keeps its pages granted"
        ),
        case!(
            data::h28_taken_back_while_kept,
            "grants taken back that the backend keeps mapped"
        ),
        case!(data::h31_ring_page_as_data, "a read over the ring itself"),
    ]
}

/// Returns references that the backend must never accept.
fn bad_grefs() -> Result<Vec<u32>> {
    let taken_back = GrantPages::new(1, GrantAccess::ReadWrite)?;
    taken_back.revoke()?;
    let mut bad = taken_back.grefs().to_vec();
    bad.extend([u32::MAX, 0x7fff_ffff, 0x8000_0000, 0x10_0000, 0xffff]);
    Ok(bad)
}

fn h21_descriptor_grants(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    for count in [8, MAPPED] {
        for bad in bad_grefs()? {
            let segs = session.segs(count);
            let WireRequest::Indirect {
                op,
                count,
                id,
                sector,
                grefs,
            } = session.indirect(OP_READ, 0, &segs)
            else {
                continue;
            };
            let with = |grefs| WireRequest::Indirect {
                op,
                count,
                id,
                sector,
                grefs,
            };
            // Only the first page is needed for so few segments.
            let mut unneeded = [bad; 8];
            unneeded[0] = grefs[0];
            session.expect(&with(unneeded), OKAY)?;
            session.expect(&with([bad; 8]), ERROR)?;
        }
    }
    lab.finish_healthy(session)
}

fn h22_descriptors_are_data(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    for count in [8, MAPPED] {
        session.data.fill(0x5a);
        let segs = session.segs(count);
        let write = session.indirect(OP_WRITE, 1024, &segs);
        session.expect(&write, OKAY)?;
        session.data.fill(0);
        // The read overwrites the descriptors from the first one on.
        let mut segs = segs;
        segs[0] = session.seg(DESCRIPTOR_PAGE);
        let read = session.indirect(OP_READ, 1024, &segs);
        session.expect(&read, OKAY)?;
        for page in (1..count).chain([DESCRIPTOR_PAGE]) {
            let words = session.data.page(page).iter();
            let right = |word: &std::sync::atomic::AtomicU32| word.load(Relaxed) == 0x5a5a_5a5a;
            ensure!(
                words.clone().all(right),
                "page {page} did not get the data of the disk"
            );
        }
    }
    lab.finish_healthy(session)
}

fn h23_bad_grants(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    // Often enough for leaked pages to be noticed.
    for _ in 0..10 {
        for bad in bad_grefs()? {
            for place in [0, 5, 10] {
                let mut segs = session.segs(11);
                segs[place].gref = bad;
                session.expect(&rw(OP_READ, 1, 0, &segs), ERROR)?;
                session.expect(&rw(OP_WRITE, 2, 0, &segs), ERROR)?;
            }
            for place in [0, 17, MAPPED - 1] {
                let mut segs = session.segs(MAPPED);
                segs[place].gref = bad;
                let read = session.indirect(OP_READ, 0, &segs);
                session.expect(&read, ERROR)?;
                let write = session.indirect(OP_WRITE, 0, &segs);
                session.expect(&write, ERROR)?;
            }
        }
    }
    let segs = session.segs(MAPPED);
    let read = session.indirect(OP_READ, 0, &segs);
    session
        .expect(&read, OKAY)
        .context("pages of refused requests are lost")?;
    lab.finish_healthy(session)
}

fn h24_read_into_read_only(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    let pages = GrantPages::new(MAPPED, GrantAccess::ReadOnly)?;
    pages.fill(0x33);
    let segs: Vec<Seg> = pages.grefs().iter().copied().map(Seg::page).collect();
    for few in [1, 11] {
        session.expect(&rw(OP_WRITE, 1, 512, &segs[..few]), OKAY)?;
        session.expect(&rw(OP_READ, 2, 0, &segs[..few]), ERROR)?;
    }
    let write = session.indirect(OP_WRITE, 512, &segs);
    session.expect(&write, OKAY)?;
    let read = session.indirect(OP_READ, 0, &segs);
    session.expect(&read, ERROR)?;
    ensure!(
        pages
            .words()
            .iter()
            .all(|word| word.load(Relaxed) == 0x3333_3333),
        "a page granted read-only was written"
    );
    session.vbd.close()?;
    session.vbd.reopen()?;
    session.queues = crate::session::queues(WIDE)?;
    session.publish_keys(WIDE)?;
    lab.finish_healthy(session)
}

fn h25_taken_back_in_flight(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session_on(&lab.slow, Mode::ReadWrite, WIDE)?;
    for count in [8, MAPPED] {
        for op in [OP_READ, OP_WRITE] {
            let pages = GrantPages::new(count, GrantAccess::ReadWrite)?;
            let segs: Vec<Seg> = pages.grefs().iter().copied().map(Seg::page).collect();
            let request = session.indirect(op, 2048, &segs);
            let queue = session.queue();
            queue.push(&request);
            queue.publish()?;
            pages.revoke()?;
            drop(pages);
            // Any status is right, because the guest revoked its grants.
            queue.wait(1, ANSWER)?;
        }
    }
    lab.finish_healthy(session)
}

fn h26_one_grant_everywhere(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    let same = [session.seg(0); 11];
    for op in [OP_WRITE, OP_READ] {
        let requests: Vec<WireRequest> = (0..64).map(|id| rw(op, id, id * 88, &same)).collect();
        expect_all_okay(&mut session, &requests)?;
    }
    // The pages are mapped, not copied. The hypervisor allows at most 128 mappings of a page, so a request may fail
    // while others map the page, and one with 256 pages always does.
    for (segments, together) in [(100, 1), (100, 32), (256, 32)] {
        let many = vec![session.seg(0); segments];
        for op in [OP_WRITE, OP_READ] {
            let request = session.indirect(op, 0, &many);
            let answers = session.queue().batch(&vec![request; together])?;
            let fine = |status| status == OKAY || (status == ERROR && segments * together > 128);
            ensure!(
                answers.len() == together && answers.iter().all(|answer| fine(answer.status)),
                "{together} requests with one page {segments} times got {answers:?}"
            );
        }
    }
    let segs = session.segs(MAPPED);
    let request = session.indirect(OP_READ, 0, &segs);
    expect_all_okay(&mut session, &vec![request; 32])
        .context("pages of requests with one page many times are lost")?;
    lab.finish_healthy(session)
}

/// More pages than the 1024 that the backend keeps mapped for a queue.
const NEW_PAGES: usize = 1536;

fn h27_more_than_can_be_kept(lab: &mut Lab) -> Result<()> {
    // Number of pages that one process may grant.
    std::fs::write("/sys/module/xen_gntalloc/parameters/limit", "4096")
        .context("the number of pages that may be granted cannot be changed")?;
    let mut session = lab.session()?;
    session.keep_grants()?;
    let pages = GrantPages::new(NEW_PAGES, GrantAccess::ReadWrite)?;
    // Twice: in the second round some pages are kept mapped, and others were never kept.
    for round in 0..2 {
        let pattern = |at: usize| (at as u32).wrapping_mul(0x9e37_79b9) ^ round;
        for (at, word) in pages.words().iter().enumerate() {
            word.store(pattern(at), Relaxed);
        }
        let segs: Vec<Seg> = pages.grefs().iter().copied().map(Seg::page).collect();
        for op in [OP_WRITE, OP_READ] {
            let requests: Vec<WireRequest> = (0u64..)
                .zip(segs.chunks(8))
                .map(|(id, segs)| rw(op, id, id * 64, segs))
                .collect();
            for some in requests.chunks(32) {
                expect_all_okay(&mut session, some)?;
            }
            if op == OP_WRITE {
                pages.fill(0x11);
            }
        }
        let words = pages.words().iter().enumerate();
        let wrong = words.filter(|(at, word)| word.load(Relaxed) != pattern(*at));
        let count = wrong.count();
        ensure!(count == 0, "{count} words are not what was written");
    }
    lab.finish_healthy(session)
}

fn h28_taken_back_while_kept(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    session.keep_grants()?;
    for op in [OP_READ, OP_WRITE] {
        let pages = GrantPages::new(11, GrantAccess::ReadWrite)?;
        let segs: Vec<Seg> = pages.grefs().iter().copied().map(Seg::page).collect();
        session.expect(&rw(op, 1, 2048, &segs), OKAY)?;
        pages.revoke()?;
        drop(pages);
        // The pages are still granted, although the frontend does not promise that.
        for _ in 0..3 {
            let queue = session.queue();
            queue.push(&rw(op, 2, 2048, &segs));
            queue.publish()?;
            queue.wait(1, ANSWER)?;
        }
    }
    // A frontend that withdraws its feature key has no effect either.
    let key = format!("{}/feature-persistent", session.vbd.front);
    session.vbd.store.remove(&key)?;
    session.reconnect(WIDE)?;
    lab.finish_healthy(session)
}

fn expect_all_okay(session: &mut Session, requests: &[WireRequest]) -> Result<()> {
    let answers = session.queue().batch(requests)?;
    ensure!(
        answers.iter().all(|answer| answer.status == OKAY),
        "good requests failed: {answers:?}"
    );
    Ok(())
}

fn h31_ring_page_as_data(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    // Writing the ring page to the disk is a leak of the guest's own data only (H30).
    let ring = Seg::page(session.queue().pages.grefs()[0]);
    session.expect(&rw(OP_WRITE, 1, 4096, &[ring]), OKAY)?;
    for fill in [0xff, 0x00, 0x7f, 0x01] {
        session.data.fill(fill);
        let page = session.seg(0);
        session.expect(&rw(OP_WRITE, 2, 8192, &[page]), OKAY)?;
        let ring = session.queue().pages.grefs()[0];
        let tail = Seg {
            gref: ring,
            first: 7,
            last: 7,
        };
        // The last slots are not in use yet, so the read changes only these.
        session.expect(&rw(OP_READ, 3, 8192, &[tail]), OKAY)?;
        let queue = session.queue();
        queue.push(&rw(OP_READ, 4, 8192, &[Seg::page(ring)]));
        for id in 5..20 {
            queue.push(&flush(id));
        }
        queue.publish()?;
        // The indices now have the content of the disk, so the only requirement is that dom0 survives.
        crate::wait::until("the read over the ring", ANSWER, || {
            let word = session.data.page(0)[100].load(Relaxed);
            let ring = session.queues[0].pages.page(0)[1000].load(Relaxed);
            Ok((ring == word).then_some(()))
        })?;
        session.queue().channel.notify()?;
        lab.bystander()?;
        session.reconnect(WIDE)?;
    }
    lab.finish_healthy(session)
}
