// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest: its requests and the answers that it got, wherever it runs.

use crate::common::history::{number, stamp};
use crate::common::{SeededRng, SECTOR};
use diskio::{Bytes, Data, Errno};
use drivers::{Attributes, Disk};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Something that a guest asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GuestRequest {
    step: GuestStep,
    /// Sectors.
    at: u64,
    len: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GuestStep {
    Read,
    /// Stores this number in each sector.
    Write(u32),
    Zeroes,
    Discard,
    Flush,
}

/// The guest. Copies are the same one.
#[derive(Clone)]
pub(crate) struct MovingGuest(Rc<RefCell<GuestState>>);

struct GuestState {
    /// The numbers that a sector may have; several while something is under way.
    sectors: BTreeMap<u64, Vec<u32>>,
    base: fn(u64) -> u32,
    /// Last number that a write used.
    stamps: u32,
    wrong: Option<String>,
}

impl MovingGuest {
    pub(crate) fn new(base: fn(u64) -> u32) -> Self {
        Self(Rc::new(RefCell::new(GuestState {
            sectors: BTreeMap::new(),
            base,
            stamps: 0x4000_0000,
            wrong: None,
        })))
    }

    /// Returns the first error.
    pub(crate) fn verdict(&self) -> Result<(), String> {
        self.0.borrow().wrong.clone().map_or(Ok(()), Err)
    }

    pub(crate) fn complain(&self, what: String) {
        self.0.borrow_mut().wrong.get_or_insert(what);
    }

    /// Returns the sectors with a known number.
    pub(crate) fn known(&self) -> Vec<u64> {
        self.0.borrow().sectors.keys().copied().collect()
    }

    /// Returns requests that do not overlap, for a disk of `sectors` sectors.
    pub(crate) fn group(
        &self,
        chance: &mut SeededRng,
        sectors: u64,
        unit: u64,
    ) -> Vec<GuestRequest> {
        let mut group: Vec<GuestRequest> = Vec::new();
        for _ in 0..1 + chance.below(8) {
            // Near to the borders of few units, so that hosts meet.
            let border = chance.below(3) * (sectors / 3) + chance.below(12) * unit;
            let at = match chance.below(3) {
                0 => border,
                1 => border.saturating_sub(chance.below(4)),
                _ => border + chance.below(unit),
            };
            let at = at % sectors;
            let len = match chance.below(8) {
                0 => unit.min(256) + 3,
                1..5 => 8,
                _ => 1 + chance.below(24),
            };
            let len = len.min(sectors - at);
            let step = self.step(chance);
            let is_free = |other: &GuestRequest| at + len <= other.at || other.at + other.len <= at;
            if group.iter().all(is_free) {
                group.push(GuestRequest { step, at, len });
            }
        }
        group
    }

    fn step(&self, chance: &mut SeededRng) -> GuestStep {
        match chance.below(16) {
            0 => GuestStep::Zeroes,
            1 => GuestStep::Discard,
            2 => GuestStep::Flush,
            3..7 => GuestStep::Read,
            _ => {
                let mut inner = self.0.borrow_mut();
                inner.stamps += 1;
                GuestStep::Write(inner.stamps)
            }
        }
    }

    /// Writes to where these are.
    pub(crate) fn over(&self, group: &[GuestRequest]) -> Vec<GuestRequest> {
        let writes = group.iter().filter(|request| request.is_write());
        let mut inner = self.0.borrow_mut();
        let over = writes.map(|request| {
            inner.stamps += 1;
            GuestRequest {
                step: GuestStep::Write(inner.stamps),
                ..*request
            }
        });
        over.collect()
    }

    /// Reads requests' ranges on a host that has no guest yet; any content is right.
    pub(crate) async fn peek(disk: Disk, group: Vec<GuestRequest>) {
        for request in group {
            let request = GuestRequest {
                step: GuestStep::Read,
                ..request
            };
            let _whatever = execute(&disk, request).await;
        }
    }

    /// From now on it may be executed.
    pub(crate) fn ask(&self, request: GuestRequest) {
        let mut inner = self.0.borrow_mut();
        let Some(number) = request.leaves() else {
            return;
        };
        let base = inner.base;
        for sector in request.at..request.at + request.len {
            let allowed = inner.sectors.entry(sector);
            allowed.or_insert_with(|| vec![base(sector)]).push(number);
            if request.step == GuestStep::Discard {
                // A discarded sector may show the backing image.
                inner.sectors.entry(sector).or_default().push(base(sector));
            }
        }
    }

    /// Executes a request on this disk; the guest gets the answer if `hears` is set.
    pub(crate) async fn send(self, disk: Disk, request: GuestRequest, hears: bool) {
        match execute(&disk, request).await {
            Ok(data) if hears => self.hear(request, &data),
            Ok(_) => {}
            Err(error) => self.complain(format!("{request:?} fails: {error}")),
        }
    }

    fn hear(&self, request: GuestRequest, data: &[u8]) {
        let mut inner = self.0.borrow_mut();
        let sectors = request.at..request.at + request.len;
        match request.step {
            GuestStep::Flush | GuestStep::Discard => {}
            GuestStep::Read => {
                for (sector, bytes) in sectors.zip(data.chunks(SECTOR)) {
                    inner.look(sector, bytes);
                }
            }
            GuestStep::Write(number) => inner.settle(sectors, number),
            GuestStep::Zeroes => inner.settle(sectors, 0),
        }
    }

    /// Answers a request that was executed while no host listened for it, and that is not executed again.
    pub(crate) fn hear_late(&self, request: GuestRequest) {
        if request.step != GuestStep::Read {
            self.hear(request, &[]);
        }
    }

    /// The content of the disk in the end.
    pub(crate) async fn look_at_all(self, disk: Disk) {
        for sector in self.known() {
            let request = GuestRequest {
                step: GuestStep::Read,
                at: sector,
                len: 1,
            };
            self.clone().send(disk.clone(), request, true).await;
        }
    }
}

impl GuestState {
    fn settle(&mut self, sectors: std::ops::Range<u64>, number: u32) {
        for sector in sectors {
            self.sectors.insert(sector, vec![number]);
        }
    }

    fn look(&mut self, sector: u64, bytes: &[u8]) {
        let base = (self.base)(sector);
        let fresh = [base];
        let allowed = self.sectors.get(&sector).map_or(&fresh[..], |a| &a[..]);
        match number(bytes, sector) {
            Some(found) if allowed.contains(&found) => {}
            found => {
                let what = format!("sector {sector} has {found:x?}, and may have {allowed:x?}");
                self.wrong.get_or_insert(what);
            }
        }
    }
}

impl GuestRequest {
    /// The number that it leaves in its sectors.
    fn leaves(&self) -> Option<u32> {
        match self.step {
            GuestStep::Write(number) => Some(number),
            GuestStep::Zeroes | GuestStep::Discard => Some(0),
            GuestStep::Read | GuestStep::Flush => None,
        }
    }

    pub(crate) fn is_write(&self) -> bool {
        matches!(self.step, GuestStep::Write(_))
    }
}

async fn execute(disk: &Disk, request: GuestRequest) -> Result<Vec<u8>, Errno> {
    let how = Attributes::default();
    let (offset, len) = (request.at * SECTOR as u64, request.len * SECTOR as u64);
    match request.step {
        GuestStep::Read => {
            let data = Data::zeroed(len as usize)?;
            disk.read(offset, data.clone()).await?;
            return Ok(data.to_vec());
        }
        GuestStep::Write(number) => {
            let sectors = request.at..request.at + request.len;
            let content: Vec<u8> = sectors.flat_map(|sector| stamp(number, sector)).collect();
            disk.write(offset, Bytes::copied(&content)?, how).await?;
        }
        GuestStep::Zeroes => disk.write_zeroes(offset, len, how).await?,
        GuestStep::Discard => match disk.discard(offset, len, how).await {
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(error) => return Err(error),
        },
        GuestStep::Flush => disk.flush().await?,
    }
    Ok(Vec::new())
}
