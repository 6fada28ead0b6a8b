// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Random requests, good and bad, on a live ring; a seed repeats them.
//!
//! Good requests have their own part of the disk, and their data is checked. Bad ones may do anything to the rest.

use crate::lab::Lab;
use crate::queue::ANSWER;
use crate::report::AttackReport;
use crate::rng::Rng;
use crate::session::{FrontendShape, Session, DESCRIPTOR_PAGE, WIDE};
use crate::vbd::Mode;
use crate::wire::{flush, rw, Seg, WireRequest, WireResponse, ERROR, OKAY, UNSUPPORTED};
use anyhow::{ensure, Context, Result};
use ring::abi::{Protocol, OP_READ, OP_WRITE, REQ_PROD};
use std::path::PathBuf;
use std::sync::atomic::Ordering::{Relaxed, Release};
use std::time::Instant;

/// Sectors from here on are for bad requests.
const BAD_SECTORS: u64 = 8192;
/// Flag in the identifiers of bad requests.
const BAD_ID: u64 = 1 << 63;
/// Data pages from here on are for bad requests.
const BAD_PAGES: usize = 24;
/// Number of batches after which the oracle checks all of dom0.
const CHECK_EVERY: u32 = 100;

/// Runs `cases` batches; returns true when all went well.
pub(crate) fn run(seed: u64, cases: u32, device: Option<&PathBuf>) -> Result<bool> {
    let name = format!("hostile.fuzz_seed_{seed}_cases_{cases}");
    reported(&name, device, seed, |lab| {
        batches(lab, seed, cases)?;
        Ok(None)
    })
}

/// Runs a function that is reported as one case, with a note; returns true when it went well.
pub(crate) fn reported(
    name: &str,
    device: Option<&PathBuf>,
    seed: u64,
    body: impl FnOnce(&mut Lab) -> Result<Option<String>>,
) -> Result<bool> {
    let mut lab = Lab::new(device, seed)?;
    let mut report = AttackReport::open(1)?;
    let start = Instant::now();
    let outcome = body(&mut lab).and_then(|note| note.map_or(Ok(()), |note| report.note(&note)));
    report.verdict(name, start.elapsed().as_secs_f64(), &outcome)?;
    if outcome.is_ok() {
        lab.finish()?;
    }
    Ok(report.passed())
}

fn batches(lab: &mut Lab, seed: u64, cases: u32) -> Result<()> {
    let mut rng = Rng::new(seed);
    let mut fuzz = Fuzz::start(lab, &mut rng)?;
    lab.begin()?;
    for case in 0..cases {
        let place = || format!("seed {seed}, batch {case}");
        fuzz.batch(&mut rng).with_context(place)?;
        if rng.below(50) == 0 {
            fuzz.break_ring(&mut rng).with_context(place)?;
        }
        if case % CHECK_EVERY == CHECK_EVERY - 1 {
            // The counters must return to their old values, so the session is closed first.
            fuzz.session.finish().with_context(place)?;
            lab.check().with_context(place)?;
            lab.begin()?;
            fuzz = Fuzz::start(lab, &mut rng)?;
        }
    }
    fuzz.session.finish()?;
    lab.check().with_context(|| format!("seed {seed}, the end"))
}

struct Fuzz {
    session: Session,
    shape: FrontendShape,
    /// Content of each page of the disk for good requests.
    content: [u32; Fuzz::PAGES],
}

impl Fuzz {
    /// Number of pages of the disk for good requests.
    const PAGES: usize = 64;

    fn start(lab: &Lab, rng: &mut Rng) -> Result<Fuzz> {
        let shape = FrontendShape {
            queues: WIDE.queues,
            order: rng.below(3) as u8,
            protocol: rng.pick(&[Protocol::Abi64, Protocol::Abi32]),
        };
        let session = lab.session_on(&lab.disk, Mode::ReadWrite, shape)?;
        let mut fuzz = Fuzz {
            session,
            shape,
            content: [0; Fuzz::PAGES],
        };
        // The content of the disk is unknown, because other attacks ran before.
        for page in 0..Fuzz::PAGES {
            fuzz.fill(0, 0);
            let request = rw(OP_WRITE, 1, page as u64 * 8, &[fuzz.session.seg(0)]);
            fuzz.session.expect(&request, OKAY)?;
        }
        Ok(fuzz)
    }

    fn fill(&self, page: usize, value: u32) {
        for word in self.session.data.page(page) {
            word.store(value, Relaxed);
        }
    }

    /// One ring of requests, good and bad, and their answers.
    fn batch(&mut self, rng: &mut Rng) -> Result<()> {
        let count = 1 + rng.below(u64::from(self.session.queue().size().min(32))) as usize;
        let mut requests = Vec::new();
        let mut goods = Vec::new();
        // Each good request of a batch has its own data page and its own page of the disk.
        let base = rng.below(Fuzz::PAGES as u64) as usize;
        for index in 0..count {
            if index < BAD_PAGES && rng.below(2) == 0 {
                let place = (base + index) % Fuzz::PAGES;
                let write = rng.below(2) == 0;
                let value = rng.next() as u32;
                self.fill(index, value);
                if write {
                    self.content[place] = value;
                }
                let op = if write { OP_WRITE } else { OP_READ };
                let seg = self.session.seg(index);
                requests.push(rw(op, index as u64, place as u64 * 8, &[seg]));
                goods.push((index, place));
            } else {
                requests.push(self.bad(rng, BAD_ID | index as u64));
            }
        }
        let queue = rng.below(self.session.queues.len() as u64) as usize;
        let queue = &mut self.session.queues[queue];
        for request in &requests {
            queue.push(request);
        }
        queue.publish()?;
        let answers = queue.wait(count, ANSWER)?;
        check_answers(&requests, &answers)?;
        for (page, place) in goods {
            let wanted = self.content[place];
            let words = self.session.data.page(page);
            ensure!(
                words.iter().all(|word| word.load(Relaxed) == wanted),
                "page {place} of the disk does not hold {wanted:#x}"
            );
        }
        Ok(())
    }

    /// Stores an impossible index, then reconnects.
    fn break_ring(&mut self, rng: &mut Rng) -> Result<()> {
        let queue = self.session.queue();
        let jump = queue.size() + 1 + rng.below(1 << 31) as u32;
        let index = queue.prod().wrapping_add(jump);
        queue.word(REQ_PROD).store(index, Release);
        queue.channel.notify()?;
        self.session.reconnect(self.shape)
    }

    fn bad(&self, rng: &mut Rng, id: u64) -> WireRequest {
        let segs = self.bad_segs(rng, 11);
        match rng.below(8) {
            0 => WireRequest::Other {
                op: rng.pick(&[4, 7, 8, 100, 255]),
                id,
            },
            1 => flush(id),
            2 => WireRequest::Discard {
                flag: rng.next() as u8,
                id,
                sector: self.bad_sector(rng),
                sectors: rng.pick(&[0, 1, 8, 64, u64::MAX, 1 << 63]),
            },
            3 | 4 => self.bad_indirect(rng, id),
            _ => WireRequest::Rw {
                op: rng.pick(&[0, 0, 1, 1, 2, 3]),
                count: rng.pick(&[0, segs.len() as u8, segs.len() as u8, 11, 12, 255]),
                handle: rng.next() as u16,
                id,
                sector: self.bad_sector(rng),
                segs,
            },
        }
    }

    fn bad_indirect(&self, rng: &mut Rng, id: u64) -> WireRequest {
        let segs = self.bad_segs(rng, 40);
        // All bad indirect requests of a batch share their descriptors, which change during the requests.
        let page = self.session.data.page(DESCRIPTOR_PAGE);
        for (index, seg) in segs.iter().enumerate() {
            page[index * 2].store(seg.gref, Relaxed);
            let bounds = u32::from(seg.first) | u32::from(seg.last) << 8;
            page[index * 2 + 1].store(bounds, Relaxed);
        }
        let gref = self.session.data.grefs()[DESCRIPTOR_PAGE];
        let mut grefs = [gref; 8];
        if rng.below(8) == 0 {
            grefs[0] = rng.next() as u32 | 0x8000_0000;
        }
        let count = segs.len() as u16;
        WireRequest::Indirect {
            op: rng.pick(&[0, 0, 1, 1, 2, 6, 255]),
            count: rng.pick(&[count, count, count, 0, 257, 513, u16::MAX]),
            id,
            sector: self.bad_sector(rng),
            grefs,
        }
    }

    fn bad_segs(&self, rng: &mut Rng, most: u64) -> Vec<Seg> {
        // Reads may go anywhere in the pages of bad requests, including their descriptors.
        let pages = &self.session.data.grefs()[BAD_PAGES..];
        let mut seg = || Seg {
            gref: match rng.below(12) {
                0 => rng.next() as u32 | 0x8000_0000,
                _ => rng.pick(pages),
            },
            first: rng.pick(&[0, 0, 0, 0, 0, 3, 7, 255]),
            last: rng.pick(&[7, 7, 7, 7, 7, 7, 3, 8]),
        };
        let first = seg();
        let mut segs = vec![first];
        segs.extend((1..most).map(|_| seg()));
        segs.truncate(1 + rng.below(most) as usize);
        segs
    }

    fn bad_sector(&self, rng: &mut Rng) -> u64 {
        let end = self.session.sectors;
        match rng.below(6) {
            0 => u64::MAX - rng.below(4096),
            1 => end - rng.below(64),
            2 => rng.next() | 1 << 40,
            _ => BAD_SECTORS + rng.below(end - BAD_SECTORS),
        }
    }
}

/// Checks that each request has one answer of its own, and that the good ones succeed.
fn check_answers(requests: &[WireRequest], answers: &[WireResponse]) -> Result<()> {
    ensure!(
        answers.len() == requests.len(),
        "{} answers to {} requests",
        answers.len(),
        requests.len()
    );
    for request in requests {
        let own: Vec<&WireResponse> = answers
            .iter()
            .filter(|answer| answer.id == request.id())
            .collect();
        ensure!(
            own.len() == 1,
            "{} answers to {request:?}: {own:?}",
            own.len()
        );
        let answer = own[0];
        ensure!(
            answer.op == request.echo() && answer.padding == [0; 5],
            "{answer:?} answers {request:?}"
        );
        let allowed: &[i16] = if request.id() & BAD_ID == 0 {
            &[OKAY]
        } else {
            &[OKAY, ERROR, UNSUPPORTED]
        };
        ensure!(
            allowed.contains(&answer.status),
            "{answer:?} answers {request:?}"
        );
    }
    Ok(())
}
