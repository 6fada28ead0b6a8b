// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The queue's thread and its I/O: begun in one step, executed sector by sector in any order, ended later.

use ring::numbers::DiskTag;
use ring::response::ResponseStatus;
use ring::tap::abi::OP_READ;
use ring::tap::extent::{DataExtent, ExpressExtent, ExtentAccess, Sectors, Source};
use ring::tap::shadow::passthrough::{RequestPart, RequestParts, Start, MAX_PARTS};
use ring::tap::shadow::{Op, PostedRequest};

use super::image::{BASE, FIRST, FOREIGN};
use super::{MappedFault, MappedScene};

/// A request that a queue executes.
#[derive(Clone, Debug)]
pub(super) struct RunningRequest {
    pub(super) tag: u16,
    pub(super) range: Sectors,
    pub(super) way: RequestWay,
    /// Many other steps happen during its execution.
    is_slow: bool,
    work: RequestWork,
}

/// Way in which a request was begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RequestWay {
    /// The shadow gave it to the queue.
    Shadow,
    /// The shadow does not know of it, because the queue has express.
    Express,
    /// The shadow does not know of it: a planted fault.
    Beside,
}

/// The queue's express.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SimExpress {
    /// Present while the queue has it.
    extent: Option<ExpressExtent>,
    /// The queue must give it up.
    is_withdrawn: bool,
}

#[derive(Clone, Debug)]
enum RequestWork {
    Flush(u16),
    /// Sectors of a store, or of zeroes, and the places of their data.
    Transfer {
        reads: bool,
        left: Vec<(Option<(u16, u64)>, usize)>,
    },
}

impl MappedScene {
    /// Begins a request that was just posted, if it needs no process and no other request blocks it.
    pub(super) fn begin(&mut self, tag: u16) {
        let mut parts = RequestParts::default();
        if let Some(start) = self.shadow.begin(DiskTag::new(tag), &mut parts) {
            self.run(tag, &start, parts.as_slice());
            self.take_express();
        }
    }

    fn take_express(&mut self) {
        if self.express.extent.is_none() {
            self.express.extent = self.shadow.offer_express(0);
        }
    }

    /// Notes that the queue must give express up.
    pub(super) fn withdraw_express(&mut self) {
        self.express.is_withdrawn |= self.shadow.take_withdrawn() & 1 != 0;
    }

    /// Begins a request without the shadow, if the queue has express and its extent has the request.
    pub(super) fn begin_in_express(&mut self, tag: u16, request: &PostedRequest) -> bool {
        let extent = self.express.extent.filter(|_| !self.express.is_withdrawn);
        let access = match request.op {
            Op::Read => ExtentAccess::Read,
            Op::Write => ExtentAccess::ReadWrite,
            _ => return false,
        };
        let place = extent.and_then(|extent| {
            // CAST: the number of one of a few backings.
            let store = extent.backing().index() as u16;
            let place = extent.place_of(request.sector, request.sectors, access)?;
            Some((store, place))
        });
        let Some((store, place)) = place else {
            return false;
        };
        let left = (0..request.sectors).map(|at| (Some((store, place + at)), at as usize));
        let work = RequestWork::Transfer {
            reads: request.op == Op::Read,
            left: left.collect(),
        };
        self.counts.begun_in_express += 1;
        self.push(tag, request, RequestWay::Express, work);
        true
    }

    /// Gives express up, in the thread of the queue, if it must and no request is left in it.
    fn give_up_express(&mut self) {
        let is_left = |running: &RunningRequest| running.way == RequestWay::Express;
        let is_busy = self.running.iter().any(is_left) && !self.commits(MappedFault::LeaveEarly);
        if !self.express.is_withdrawn || is_busy {
            return;
        }
        self.counts.left_express += 1;
        self.shadow.gave_up_express(0);
        self.express.is_withdrawn = false;
        if !self.commits(MappedFault::KeepExtent) {
            self.express.extent = None;
        }
        self.announce();
    }

    /// Begins a request whose data is in pages of the guest; takes it back if it cannot be begun.
    pub(super) fn begin_mapped(&mut self, tag: u16) {
        let mut parts = RequestParts::default();
        let disk_tag = DiskTag::new(tag);
        let mut may = self.shadow.clone();
        let is_blind = self.commits(MappedFault::ServeMapped)
            && may.begin_mapped(disk_tag, &mut parts).is_some();
        let start = match is_blind {
            true => self.shadow.begin(disk_tag, &mut parts),
            false => self.shadow.begin_mapped(disk_tag, &mut parts),
        };
        match start {
            Some(start) => {
                self.counts.begun_mapped += 1;
                self.run(tag, &start, parts.as_slice());
                self.take_express();
            }
            None => {
                self.counts.taken_back += 1;
                self.give_back(tag);
            }
        }
    }

    /// Resumes requests in the thread of the queue, after a wake-up.
    pub(super) fn resume(&mut self) {
        self.give_up_express();
        if !std::mem::replace(&mut self.told, false) {
            return;
        }
        let most = self.rng.pick(&[1, 2, usize::MAX]);
        let mut begun = Vec::new();
        let each =
            |tag: DiskTag, start, parts: &[RequestPart]| begun.push((tag, start, parts.to_vec()));
        self.shadow.resume(0, most, each);
        self.counts.resumed += begun.len() as u64;
        for (tag, start, parts) in begun {
            self.run(tag.number(), &start, &parts);
        }
        self.announce();
    }

    fn run(&mut self, tag: u16, start: &Start, parts: &[RequestPart]) {
        // CAST: the number of one of a few backings.
        let store = start
            .backing
            .map_or(FOREIGN, |number| number.index() as u16);
        let sectors = |part: &RequestPart| {
            let first = part.sector.map(|sector| (store, sector));
            (0..part.sectors).map(move |more| first.map(|(store, sector)| (store, sector + more)))
        };
        let left = parts.iter().flat_map(sectors).zip(0..);
        let request = self.guest.posted[&tag].request;
        let work = match request.op {
            Op::Flush => RequestWork::Flush(store),
            _ => RequestWork::Transfer {
                reads: start.op == OP_READ,
                left: left.collect(),
            },
        };
        self.push(tag, &request, RequestWay::Shadow, work);
    }

    fn push(&mut self, tag: u16, request: &PostedRequest, way: RequestWay, work: RequestWork) {
        let is_slow = self.rng.percent(self.plan.slow);
        self.running.push(RunningRequest {
            tag,
            range: range(request),
            way,
            is_slow,
            work,
        });
    }

    /// Begins a request that the shadow does not know of: a planted fault.
    pub(super) fn begin_beside(&mut self, tag: u16, queue: u16, request: &PostedRequest) -> bool {
        let work = match request.op {
            _ if queue != 0 => None,
            Op::Flush if self.commits(MappedFault::FlushOne) && self.plan.grows => {
                Some(RequestWork::Flush(FIRST))
            }
            Op::Read | Op::Write if self.commits(MappedFault::IgnoreOverlap) => self.found(request),
            _ => None,
        };
        let Some(work) = work else {
            return false;
        };
        self.push(tag, request, RequestWay::Beside, work);
        true
    }

    /// Returns the places that the map has for a request.
    fn found(&mut self, request: &PostedRequest) -> Option<RequestWork> {
        let reads = request.op == Op::Read;
        let access = if reads {
            ExtentAccess::Read
        } else {
            ExtentAccess::ReadWrite
        };
        let mut pieces = Vec::new();
        let each = |piece: &DataExtent| pieces.push(*piece);
        let found = self
            .map()
            .translate(&range(request), access, MAX_PARTS, each);
        found.ok()?;
        let mut left = Vec::new();
        for piece in pieces {
            for more in 0..piece.range.count() {
                let there = match piece.source {
                    // CAST: the number of one of a few backings.
                    Source::Backing(store) => Some((store.index() as u16, piece.place + more)),
                    Source::Zeroes => None,
                };
                left.push((there, left.len()));
            }
        }
        Some(RequestWork::Transfer { reads, left })
    }

    /// Executes a step of some I/O.
    pub(super) fn execute_some(&mut self) {
        if self.running.is_empty() {
            return;
        }
        let at = self.rng.index(self.running.len());
        if self.running[at].is_slow && !self.rng.percent(4) {
            return;
        }
        let mut running = self.running.swap_remove(at);
        let is_over = match &mut running.work {
            RequestWork::Flush(store) => {
                self.image.flush(*store);
                true
            }
            RequestWork::Transfer { reads, left } => {
                let next = self.rng.index(left.len().max(1));
                let next = (next < left.len()).then(|| left.swap_remove(next));
                if let Some(next) = next {
                    self.transfer(running.tag, *reads, next);
                }
                left.is_empty()
            }
        };
        if is_over {
            self.end(&running);
        } else {
            self.running.push(running);
        }
    }

    fn transfer(&mut self, tag: u16, reads: bool, (place, at): (Option<(u16, u64)>, usize)) {
        let there = place.map_or(Some(0), |(store, sector)| self.image.read(store, sector));
        let Some(there) = there else {
            return self.problem(format!("the kernel uses {place:?}, where no sector is"));
        };
        let posted = self.guest.posted.get_mut(&tag);
        let Some(data) = posted.and_then(|posted| posted.data.get_mut(at)) else {
            return self.problem(format!("tag {tag} has its result, and is still executed"));
        };
        let may = match place {
            Some((BASE, _)) | None => reads,
            Some((store, _)) => store != FOREIGN,
        };
        match place {
            _ if reads => *data = there,
            Some((store, sector)) if may => self.image.write(store, sector, *data),
            _ => {}
        }
        if !may {
            self.problem(format!("the kernel uses {place:?}, which it may not"));
        }
    }

    fn end(&mut self, running: &RunningRequest) {
        let is_flush = matches!(running.work, RequestWork::Flush(_));
        self.counts.flushed += u64::from(is_flush);
        self.counts.executed += 1;
        if running.way == RequestWay::Beside {
            return self.answer(running.tag, ResponseStatus::Okay);
        }
        let fails = !is_flush && self.rng.percent(self.plan.failing);
        let status = if fails {
            ResponseStatus::Error
        } else {
            ResponseStatus::Okay
        };
        if running.way == RequestWay::Express {
            self.counts.failed_mapped += u64::from(fails);
            return match fails {
                true => self.give_back(running.tag),
                false => self.answer(running.tag, status),
            };
        }
        let tag = DiskTag::new(running.tag);
        let is_mapped = self.shadow.is_mapped(tag);
        let ended = self.shadow.ended(tag, status);
        self.counts.redone += u64::from(fails);
        match ended {
            Some(status) => self.answer(running.tag, status),
            None if fails && is_mapped => {
                self.counts.failed_mapped += 1;
                self.give_back(running.tag);
            }
            None if fails => {}
            None if self.commits(MappedFault::GiveAway) => {}
            None => self.problem(format!("tag {} has ended twice", running.tag)),
        }
        self.announce();
    }
}

/// Returns the range of a request; that of a flush is the whole disk.
fn range(request: &PostedRequest) -> Sectors {
    Sectors::new(request.sector, request.sectors).unwrap_or(Sectors::ALL)
}
