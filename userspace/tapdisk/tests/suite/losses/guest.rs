// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest that knows, of each write, what it was promised.

use super::chance::Chance;
use super::images::DiskImages;
use super::subject::Subject;
use diskio::{Data, Runtime};
use drivers::Disk;
use ring::response::ResponseStatus;
use ring::tap::shadow::{Op, PostedRequest};
use std::collections::BTreeMap;
use tapdev::fake::FakeTap;

const SECTOR: usize = 512;
/// Units at the beginning of the disk in which all requests are, so that many meet each other.
const UNITS: u64 = 6;
/// Turns within which a process begins a request that was delivered, and within which an answer is seen.
const ON_ITS_WAY: u64 = 8;
/// Sectors of a request at most.
const LONGEST: u64 = 128;

/// The bytes of a sector with a number in it.
pub(super) fn stamp(number: u32, sector: u64) -> Vec<u8> {
    if number == 0 {
        return vec![0; SECTOR];
    }
    let mut word = number.to_le_bytes().to_vec();
    word.extend((sector as u32).to_le_bytes());
    word.repeat(SECTOR / 8)
}

/// The number in a sector, if one request wrote all of it.
fn number(bytes: &[u8], sector: u64) -> Option<u32> {
    let number = u32::from_le_bytes(bytes[..4].try_into().expect("a sector"));
    (bytes == stamp(number, sector)).then_some(number)
}

/// Promise to the guest about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Promise {
    /// Nothing yet: it was not acknowledged, or no flush that began later was answered.
    None,
    /// The write survives a loss of power.
    Durable,
    /// The first flush that began later and was answered has failed.
    Reported,
}

/// Effect of one request on a sector: the number that it wrote, or nothing for a discard.
#[derive(Clone, Copy, Debug)]
struct Told {
    request: u64,
    number: Option<u32>,
    acknowledged: Option<Moment>,
    promise: Promise,
}

/// When something was sent or seen: in the guest's order, and in turns of the process.
#[derive(Clone, Copy, Debug)]
struct Moment {
    clock: u64,
    turn: u64,
}

/// A request that is under way.
#[derive(Clone, Copy, Debug)]
struct Sent {
    tag: u16,
    op: Op,
    at: u64,
    len: u64,
    request: u64,
    /// When it was sent.
    posted: u64,
    /// Turn in which it was seen to be delivered to the process.
    delivered: Option<u64>,
    fua: bool,
    preflush: bool,
}

impl Sent {
    fn flushes(&self) -> bool {
        self.preflush || self.op == Op::Flush
    }
}

/// State of the guest.
pub(super) struct Guest {
    fake: FakeTap,
    subject: Subject,
    pub(super) chance: Chance,
    sectors: BTreeMap<u64, Vec<Told>>,
    sent: Vec<Sent>,
    /// Grows with each request and each answer.
    clock: u64,
    turn: u64,
    requests: u64,
    /// Flushes that were answered: well, and by an error.
    pub(super) flushed: u64,
    pub(super) failed: u64,
    /// Events, for a failure's report.
    pub(super) log: Vec<String>,
}

impl Guest {
    pub(super) fn new(fake: &FakeTap, subject: Subject, chance: Chance) -> Self {
        Self {
            fake: fake.clone(),
            subject,
            chance,
            sectors: BTreeMap::new(),
            sent: Vec::new(),
            clock: 0,
            turn: 0,
            requests: 0,
            flushed: 0,
            failed: 0,
            log: Vec::new(),
        }
    }

    pub(super) fn note(&mut self, what: impl Into<String>) {
        let clock = self.clock;
        self.log.push(format!("{clock}: {}", what.into()));
    }

    fn tick(&mut self) -> Moment {
        self.clock += 1;
        Moment {
            clock: self.clock,
            turn: self.turn,
        }
    }

    /// Now; what is acknowledged earlier has a smaller time.
    pub(super) fn now(&mut self) -> u64 {
        self.tick().clock
    }

    /// The image was opened: the process begins what is under way, again.
    pub(super) fn begins_again(&mut self) {
        for sent in &mut self.sent {
            sent.delivered = None;
        }
    }

    /// Requests that are under way.
    pub(super) fn under_way(&self) -> usize {
        self.sent.len()
    }

    /// A range that meets no request that is under way.
    fn range(&mut self) -> Option<(u64, u64)> {
        let (unit, size) = (self.subject.unit / 512, self.subject.size / 512);
        let chance = &mut self.chance;
        let units = (size / unit).min(UNITS);
        let within = match chance.below(3) {
            0 => 0,
            1 => chance.below(16.min(unit)),
            _ => chance.below(unit.min(64)),
        };
        let at = chance.below(units) * unit + within;
        let len = match chance.below(8) {
            0 => unit.min(LONGEST),
            1..4 => 8,
            _ => 1 + chance.below(16),
        };
        let len = len.min(size - at);
        let is_free = |sent: &Sent| at + len <= sent.at || sent.at + sent.len <= at;
        self.sent.iter().all(is_free).then_some((at, len))
    }

    /// Sends a request, unless its range is in use.
    pub(super) fn send(&mut self, op: Op) {
        let (at, len) = match op {
            Op::Flush => (0, 0),
            _ => match self.range() {
                Some(range) => range,
                None => return,
            },
        };
        let is_write = op == Op::Write;
        let fua = is_write && self.chance.one_in(8);
        let preflush = is_write && self.chance.one_in(12);
        self.requests += 1;
        let request = self.requests;
        // CAST: there are a few thousand. Smaller numbers are of what was there before.
        let stamped = 16 + request as u32;
        let number = match op {
            Op::Write => Some(stamped),
            Op::WriteZeroes => Some(0),
            _ => None,
        };
        let mut bytes = Vec::new();
        if is_write {
            bytes.extend((at..at + len).flat_map(|sector| stamp(stamped, sector)));
        }
        if op != Op::Flush {
            for sector in at..at + len {
                self.sectors.entry(sector).or_default().push(Told {
                    request,
                    number,
                    acknowledged: None,
                    promise: Promise::None,
                });
            }
        }
        let posted = self.tick().clock;
        let what = PostedRequest {
            op,
            preflush,
            fua,
            sector: at,
            sectors: len,
            segments: 0,
        };
        let tag = self.fake.post(what, &bytes).expect("a request");
        self.note(format!(
            "{op:?} {at}+{len} number {number:?} fua {fua} preflush {preflush}"
        ));
        self.sent.push(Sent {
            tag,
            op,
            at,
            len,
            request,
            posted,
            delivered: None,
            fua,
            preflush,
        });
    }

    /// Takes the answers that are there; true if a flush succeeded.
    pub(super) fn collect(&mut self) -> bool {
        self.turn += 1;
        if self.fake.info().waiting == 0 {
            for sent in &mut self.sent {
                sent.delivered = sent.delivered.or(Some(self.turn));
            }
        }
        let sent = std::mem::take(&mut self.sent);
        let (answered, rest) = sent
            .into_iter()
            .partition(|sent| self.fake.is_answered(sent.tag));
        self.sent = rest;
        let answered: Vec<Sent> = answered;
        let with_status = |sent: Sent| {
            let (status, _) = self.fake.answer(sent.tag, 0).expect("an answer");
            (sent, status == ResponseStatus::Okay)
        };
        let answered: Vec<(Sent, bool)> = answered.into_iter().map(with_status).collect();
        // The answers since the last look may have come in any order: a flush may have reported an error that a write
        // had before, one with a preflush as well. Of flushes that were under way together, one reports it.
        for (sent, is_well) in &answered {
            self.acknowledge(sent, *is_well);
        }
        let flushes = |is_well| {
            let answered = answered.iter();
            answered.filter(move |(sent, done)| sent.flushes() && *done == is_well)
        };
        for (sent, _) in flushes(false) {
            self.failed += 1;
            // A mirror may hold the range of a write, and the preflush begins only after that.
            let waits = sent.preflush && self.subject.moves;
            self.report(sent.delivered.filter(|_| !waits));
        }
        for (sent, _) in flushes(true) {
            self.flushed += 1;
            self.settle(sent.posted);
        }
        flushes(true).next().is_some()
    }

    /// A request was answered. One that writes is acknowledged if that went well.
    fn acknowledge(&mut self, sent: &Sent, is_well: bool) {
        let now = self.tick();
        self.note(format!("request of {}: {is_well}", sent.posted));
        if !is_well || sent.op == Op::Flush {
            return;
        }
        for sector in sent.at..sent.at + sent.len {
            let told = self.sectors.get_mut(&sector).expect("it was sent");
            let own = told.iter_mut().find(|one| one.request == sent.request);
            let own = own.expect("it was sent");
            own.acknowledged = Some(now);
            if sent.fua {
                own.promise = Promise::Durable;
                forget_older(told);
            }
        }
    }

    /// A flush that began at `begun` has succeeded, or a pause has.
    pub(super) fn settle(&mut self, begun: u64) {
        for told in self.sectors.values_mut() {
            for one in told.iter_mut() {
                let concerns = one.acknowledged.is_some_and(|then| then.clock < begun);
                if concerns && one.promise == Promise::None {
                    one.promise = Promise::Durable;
                }
            }
            forget_older(told);
        }
    }

    /// A flush has failed that was delivered in this turn. It has reported what was acknowledged before the process
    /// began it, and the guest cannot tell exactly what that was.
    fn report(&mut self, delivered: Option<u64>) {
        let last = delivered.map_or(u64::MAX, |turn| turn + ON_ITS_WAY);
        let told = self.sectors.values_mut().flatten();
        for one in told.filter(|one| one.promise == Promise::None) {
            let concerns = one.acknowledged.is_some_and(|then| then.turn <= last);
            if concerns {
                one.promise = Promise::Reported;
            }
        }
    }

    /// The numbers that a sector may have after a loss of power; nothing if it may have anything.
    fn allowed(&self, sector: u64, told: &[Told]) -> Option<Vec<u32>> {
        let is_known = told
            .first()
            .is_some_and(|one| one.promise == Promise::Durable);
        let mut allowed = Vec::new();
        if !is_known {
            allowed.push(self.subject.initial(sector)?);
        }
        for one in told {
            allowed.push(one.number?);
        }
        Some(allowed)
    }

    /// The power is lost now: each write that was promised is there.
    pub(super) fn check(&self, images: &DiskImages) -> Result<(), String> {
        let served = images.served();
        let image = served.storage.cut();
        let runtime = Runtime::new();
        let disk = served.subject.disk(&runtime, &image, &images.base);
        let its = disk.clone();
        let shape = runtime.block_on(async move { its.activate().await });
        shape
            .expect("it ends")
            .map_err(|failure| format!("the image cannot be opened: {failure}"))?;
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for sector in self.sectors.keys() {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == *sector => *count += 1,
                _ => runs.push((*sector, 1)),
            }
        }
        for (first, count) in runs {
            let bytes = read(&runtime, &disk, first, count)?;
            for (sector, bytes) in (first..).zip(bytes.chunks(SECTOR)) {
                let told = &self.sectors[&sector];
                let Some(allowed) = self.allowed(sector, told) else {
                    continue;
                };
                match number(bytes, sector) {
                    Some(number) if allowed.contains(&number) => {}
                    found => {
                        return Err(format!(
                            "sector {sector} has {found:?}, allowed are {allowed:?}: {told:?}"
                        ))
                    }
                }
            }
        }
        Ok(())
    }
}

/// Drops requests before the last one that is durable: their content cannot come back.
fn forget_older(told: &mut Vec<Told>) {
    let last = told.iter().rposition(|one| one.promise == Promise::Durable);
    told.drain(..last.unwrap_or(0));
}

fn read(runtime: &Runtime, disk: &Disk, first: u64, count: u64) -> Result<Vec<u8>, String> {
    let disk = disk.clone();
    // CAST: a disk of a test is small.
    let len = count as usize * SECTOR;
    let work = async move {
        let data = Data::zeroed(len)?;
        disk.read(first * SECTOR as u64, data.clone()).await?;
        Ok(data.to_vec())
    };
    let bytes: Result<Vec<u8>, diskio::Errno> = runtime.block_on(work).expect("it ends");
    bytes.map_err(|error| format!("sectors from {first} on cannot be read: {error}"))
}
