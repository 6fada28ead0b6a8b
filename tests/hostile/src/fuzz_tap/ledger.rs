// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The requests of a batch, the completions of the process, and the results that they must have.

use crate::rng::Rng;
use crate::session::Session;
use crate::tap::TapNode;
use crate::wire::{flush, rw, Seg, WireRequest, WireResponse, ERROR, OKAY, UNSUPPORTED};
use anyhow::{ensure, Context, Result};
use ring::abi::{OP_READ, OP_WRITE, PAGE_SIZE};
use ring::tap::abi::{self, Desc};
use std::sync::atomic::Ordering::Relaxed;

/// Number of places on the disk; two requests at one place overlap.
const PLACES: usize = 24;
/// Number of pages of a place.
const PAGES: usize = 4;
/// Maximum number of requests of a batch.
const REQUESTS: u64 = 11;
/// Data pages before this one are for the honest test.
const FIRST_PAGE: usize = 3;
/// Number of sectors of a page.
const SECTORS: u64 = 8;

/// Result that a request must have.
#[derive(Clone, Debug)]
enum RequestFate {
    /// Executed; a read has these values, one for each page.
    Right(Vec<u32>),
    /// Failed by the process, with this status.
    Failed(i16),
    /// The process completed it without executing it.
    Lie,
}

#[derive(Clone, Debug)]
struct LedgerRequest {
    request: WireRequest,
    op: u8,
    place: usize,
    /// Its data pages.
    pages: std::ops::Range<usize>,
    /// Data of a write.
    value: u32,
    fate: Option<RequestFate>,
    /// A process had the request when it died.
    replay: bool,
}

/// Answer of the process to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LedgerVerdict {
    /// The process has executed the request.
    Right,
    /// The process failed the request, with this errno.
    Failed(i32),
    /// The process claims to have executed the request.
    Lie,
}

/// The requests of a batch, and the content of the disk.
pub(super) struct Ledger {
    asked: Vec<LedgerRequest>,
    /// Arrival number of the first of them.
    first: u64,
    content: [[u32; PAGES]; PLACES],
    /// A process died during the batch.
    died: bool,
}

impl Ledger {
    /// Returns the ledger of a disk full of zeroes.
    pub(super) fn new() -> Ledger {
        Ledger {
            asked: Vec::new(),
            first: 0,
            content: [[0; PAGES]; PLACES],
            died: false,
        }
    }

    /// Sends the requests of a batch. Returns their number.
    pub(super) fn ask(&mut self, session: &mut Session, rng: &mut Rng) -> Result<usize> {
        self.first += self.asked.len() as u64;
        self.asked.clear();
        self.died = false;
        let count = 1 + rng.below(REQUESTS);
        // All use one queue, so that their order identifies them.
        let queue = rng.below(session.queues.len() as u64) as usize;
        let mut page = FIRST_PAGE;
        for id in 0..count {
            let length = 1 + rng.below(PAGES as u64) as usize;
            let (place, value) = (rng.below(PLACES as u64) as usize, rng.next() as u32);
            let op = rng.pick(&[
                abi::OP_READ,
                abi::OP_READ,
                abi::OP_WRITE,
                abi::OP_WRITE,
                abi::OP_WRITE,
                abi::OP_FLUSH,
            ]);
            let length = if op == abi::OP_FLUSH { 0 } else { length };
            let pages = page..page + length;
            page = pages.end;
            let segs: Vec<Seg> = pages.clone().map(|page| session.seg(page)).collect();
            let request = match op {
                abi::OP_FLUSH => flush(id),
                abi::OP_READ => rw(OP_READ, id, sector(place), &segs),
                _ => rw(OP_WRITE, id, sector(place), &segs),
            };
            for word in pages.clone().flat_map(|page| session.data.page(page)) {
                // The page must not hold the result of a read already.
                word.store(if op == abi::OP_READ { !value } else { value }, Relaxed);
            }
            session.queues[queue].push(&request);
            self.asked.push(LedgerRequest {
                request,
                op,
                place,
                pages,
                value,
                fate: None,
                replay: false,
            });
        }
        session.queues[queue].publish()?;
        Ok(self.asked.len())
    }

    /// Skips `count` requests that are not of a batch.
    pub(super) fn skip(&mut self, count: u64) {
        self.first += count;
    }

    /// Returns true when all requests of the batch have a result.
    pub(super) fn is_over(&self) -> bool {
        self.asked.iter().all(|asked| asked.fate.is_some())
    }

    /// Returns the requests without a result.
    pub(super) fn open(&self) -> Vec<&WireRequest> {
        let open = self.asked.iter().filter(|asked| asked.fate.is_none());
        open.map(|asked| &asked.request).collect()
    }

    /// Returns the index of the request of a descriptor; `None` for one that is not of the batch.
    fn index(&self, desc: &Desc) -> Option<usize> {
        let index = usize::try_from(desc.sequence.checked_sub(self.first)?).ok()?;
        (index < self.asked.len()).then_some(index)
    }

    /// Checks a delivery.
    pub(super) fn delivered(&self, node: &TapNode, desc: &Desc) -> Result<()> {
        let mut bytes = 0;
        for segment in node.segments(desc)? {
            let end = u64::from(segment.offset) + u64::from(segment.len);
            ensure!(
                end <= node.info.arena_len && segment.offset % 512 == 0,
                "{segment:?} of {desc:?}"
            );
            bytes += u64::from(segment.len);
        }
        let data = matches!(desc.op, abi::OP_READ | abi::OP_WRITE);
        ensure!(
            bytes == if data { desc.sectors * 512 } else { 0 },
            "{bytes} bytes for {desc:?}"
        );
        let Some(index) = self.index(desc) else {
            return Ok(());
        };
        let asked = &self.asked[index];
        let wanted = match asked.op {
            abi::OP_FLUSH => (0, 0),
            _ => (sector(asked.place), asked.pages.len() as u64 * SECTORS),
        };
        ensure!(
            asked.op == desc.op && wanted == (desc.sector, desc.sectors),
            "{desc:?} for {:?}",
            asked.request
        );
        ensure!(
            asked.fate.is_none(),
            "{desc:?} has a result already: {:?}",
            asked.fate
        );
        let replay = desc.flags & abi::DESC_REPLAY != 0;
        ensure!(
            (replay || !asked.replay) && (self.died || !replay),
            "a wrong mark of a replay: {desc:?}"
        );
        // Overlapping requests are delivered one after the other.
        let data = |asked: &LedgerRequest| asked.op != abi::OP_FLUSH;
        for earlier in &self.asked[..index] {
            let reads = earlier.op == abi::OP_READ && asked.op == abi::OP_READ;
            let overlaps = data(asked) && data(earlier) && earlier.place == asked.place;
            ensure!(
                !overlaps || reads || earlier.fate.is_some(),
                "{desc:?} overtakes {:?}",
                earlier.request
            );
        }
        Ok(())
    }

    /// Records that a process dies which has this request.
    pub(super) fn left(&mut self, desc: &Desc) {
        if let Some(index) = self.index(desc) {
            self.asked[index].replay = true;
        }
    }

    /// Records that a process dies.
    pub(super) fn died(&mut self) {
        self.died = true;
    }

    /// Records the answer of the process to a request.
    pub(super) fn ended(&mut self, desc: &Desc, verdict: LedgerVerdict) {
        let Some(index) = self.index(desc) else {
            return;
        };
        let asked = &mut self.asked[index];
        let content = &mut self.content[asked.place][..asked.pages.len()];
        if verdict == LedgerVerdict::Right && asked.op == abi::OP_WRITE {
            content.fill(asked.value);
        }
        asked.fate = Some(match verdict {
            LedgerVerdict::Right => RequestFate::Right(content.to_vec()),
            LedgerVerdict::Failed(libc::EOPNOTSUPP) => RequestFate::Failed(UNSUPPORTED),
            LedgerVerdict::Failed(_) => RequestFate::Failed(ERROR),
            LedgerVerdict::Lie => RequestFate::Lie,
        });
    }

    /// Compares the answers of a batch with the completions of the process.
    pub(super) fn judge(&self, session: &Session, answers: &[WireResponse]) -> Result<()> {
        ensure!(answers.len() == self.asked.len(), "answers: {answers:?}");
        for asked in &self.asked {
            let request = &asked.request;
            let mut own = answers.iter().filter(|a| a.id == request.id());
            let answer = own.next().context("a request without an answer")?;
            ensure!(own.next().is_none(), "two answers to {request:?}");
            let fate = asked.fate.as_ref().context("no fate")?;
            let status = match fate {
                RequestFate::Right(_) | RequestFate::Lie => OKAY,
                RequestFate::Failed(status) => *status,
            };
            ensure!(
                answer.status == status && answer.op == request.echo(),
                "{answer:?} answers {request:?}, whose fate is {fate:?}"
            );
            if let (RequestFate::Right(values), abi::OP_READ) = (fate, asked.op) {
                for (page, value) in asked.pages.clone().zip(values) {
                    holds(session, page, *value).with_context(|| format!("{request:?}"))?;
                }
            }
        }
        Ok(())
    }

    /// Reads all places and checks their data.
    pub(super) fn verify(&self, session: &mut Session) -> Result<()> {
        let pages = FIRST_PAGE..FIRST_PAGE + PAGES;
        for (place, values) in self.content.iter().enumerate() {
            let segs: Vec<Seg> = pages.clone().map(|page| session.seg(page)).collect();
            session.expect(&rw(OP_READ, 1, sector(place), &segs), OKAY)?;
            for (page, value) in pages.clone().zip(values) {
                holds(session, page, *value).with_context(|| format!("place {place}"))?;
            }
        }
        Ok(())
    }
}

fn sector(place: usize) -> u64 {
    (place * PAGES) as u64 * SECTORS
}

fn holds(session: &Session, page: usize, value: u32) -> Result<()> {
    let words = session.data.page(page);
    let wrong = words.iter().position(|word| word.load(Relaxed) != value);
    ensure!(
        wrong.is_none() && words.len() * 4 == PAGE_SIZE,
        "data page {page} does not hold {value:#x} from word {wrong:?} on"
    );
    Ok(())
}
