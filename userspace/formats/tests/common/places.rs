// SPDX-License-Identifier: MIT OR Apache-2.0
//! Places that the kernel reads and writes for any time, beside a process that does the rest: both must see the same
//! disk, and when that process dies, the image must have the places that it reported.

use super::history::{number, stamp, Trial};
use super::tools::{parent, PARENT_BACKING};
use super::{SeededRng, World};
use diskio::{Bytes, Data, Errno, Runtime};
use drivers::{Attributes, Disk, Holder, MappedExtent};
use formats::Storage;
use ring::tap::extent::{BackingNumber, DataExtent, ExtentAccess, Sectors, Source};
use ring::tap::map::tree::{Leaf, LeafSlot};
use ring::tap::map::{ExtentMap, MapBacking};
use ring::tap::shadow::passthrough::MAX_PARTS;
use seeds::Seeds;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

const SECTOR: u64 = super::SECTOR as u64;
/// Bytes around a request that are looked up.
const WINDOW: u64 = 64 << 10;
/// Sectors at the beginning, where half of the requests are.
const HOT: u64 = 2048;
/// Groups of requests in one life of a process.
const ROUNDS: u64 = 40;

/// An image that is tried out.
pub(crate) trait Subject: 'static {
    type Storage: Storage;

    fn name(&self) -> String;
    /// Returns the storage that the kernel reads and writes.
    fn storage(&self) -> Self::Storage;
    /// Returns the current content of the image.
    fn there(&self, at: u64, len: u64) -> Vec<u8>;
    /// Returns the active backing disk, and its number in the kernel.
    fn below(&self) -> Option<(u16, Disk)>;
    /// The disk as the next process finds it if this one dies now.
    fn next(&self) -> Disk;
    /// The bytes of a sector with a number in it.
    fn sector(&self, number: u32, at: u64) -> Vec<u8>;
    /// The number in a sector, if it is one as a whole.
    fn number(&self, bytes: &[u8], at: u64) -> Option<u32>;
    /// Returns the number that a sector held at first.
    fn first(&self, at: u64) -> u32;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GuestOperation {
    Read,
    Write(u32),
    Zeroes,
    Discard,
}

/// The kernel, a process with the image, and the content that the guest may read.
pub(crate) struct PlacesHost<S: Subject> {
    pub(crate) subject: S,
    storage: S::Storage,
    pub(crate) disk: Disk,
    sectors: u64,
    map: RefCell<ExtentMap<Vec<LeafSlot>, Vec<Leaf>>>,
    /// Number in each sector; `None` where it was discarded.
    model: RefCell<Vec<Option<u32>>>,
    /// Changes that the process has begun and not answered.
    unanswered: RefCell<Vec<(Sectors, GuestOperation)>>,
    chance: RefCell<SeededRng>,
    /// Requests of the kernel, and deaths of the process.
    pub(crate) hits: Cell<u64>,
    /// Parts that the kernel read as zeroes, and below the image.
    pub(crate) zeroes: Cell<u64>,
    pub(crate) below: Cell<u64>,
    pub(crate) deaths: Cell<u64>,
}

impl<S: Subject> PlacesHost<S> {
    /// `disk` is that of the subject, and active.
    pub(crate) fn new(subject: S, disk: Disk, sectors: u64, seed: u64) -> Rc<Self> {
        let (slots, leaves) = (vec![LeafSlot::FREE; 8], vec![Leaf::FREE; 8]);
        let mut map = ExtentMap::new(slots, leaves, sectors, true);
        let backing = MapBacking {
            sectors: 0,
            block: 1,
            writable: true,
        };
        assert!(map.add_backing(BackingNumber::new(0).unwrap(), backing));
        if let Some((number, _)) = subject.below() {
            let backing = MapBacking {
                // The process must report no places behind its end.
                sectors: u64::MAX,
                writable: false,
                ..backing
            };
            assert!(map.add_backing(BackingNumber::new(number).unwrap(), backing));
        }
        Rc::new(Self {
            storage: subject.storage(),
            map: RefCell::new(map),
            model: RefCell::new((0..sectors).map(|at| Some(subject.first(at))).collect()),
            unanswered: RefCell::default(),
            chance: RefCell::new(SeededRng(seed)),
            subject,
            disk,
            sectors,
            hits: Cell::new(0),
            zeroes: Cell::new(0),
            below: Cell::new(0),
            deaths: Cell::new(0),
        })
    }

    fn below(&self, most: u64) -> u64 {
        self.chance.borrow_mut().below(most)
    }

    /// Returns the places of a range, if the kernel may serve all of it.
    fn hit(&self, range: &Sectors, access: ExtentAccess) -> Option<Vec<DataExtent>> {
        let mut pieces = Vec::new();
        let each = |piece: &DataExtent| pieces.push(*piece);
        let mut map = self.map.borrow_mut();
        map.translate(range, access, MAX_PARTS, each).ok()?;
        Some(pieces)
    }

    async fn request(self: Rc<Self>, range: Sectors, kind: GuestOperation) {
        let access = match kind {
            GuestOperation::Read => ExtentAccess::Read,
            _ => ExtentAccess::ReadWrite,
        };
        let pieces = match kind {
            GuestOperation::Read | GuestOperation::Write(_) => self.hit(&range, access),
            GuestOperation::Zeroes | GuestOperation::Discard => None,
        };
        let before = self.model.borrow().clone();
        match pieces {
            Some(pieces) => {
                self.hits.set(self.hits.get() + 1);
                for piece in pieces {
                    self.by_kernel(&piece, kind, &before).await;
                }
            }
            None => self.by_process(&range, kind, &before).await,
        }
        let new = match kind {
            GuestOperation::Read => return,
            GuestOperation::Write(stamp) => Some(stamp),
            GuestOperation::Zeroes => Some(0),
            GuestOperation::Discard => None,
        };
        self.model.borrow_mut()[range.start() as usize..range.end() as usize].fill(new);
    }

    /// Returns the bytes of a write to a range.
    fn bytes(&self, range: &Sectors, number: u32) -> Bytes {
        let sectors = (range.start()..range.end()).map(|at| self.subject.sector(number, at));
        Bytes::copied(&sectors.collect::<Vec<_>>().concat()).unwrap()
    }

    async fn by_kernel(&self, piece: &DataExtent, kind: GuestOperation, model: &[Option<u32>]) {
        let at = piece.place * SECTOR;
        match kind {
            GuestOperation::Write(number) => {
                let bytes = self.bytes(&piece.range, number);
                self.storage.write(at, bytes).await.unwrap();
            }
            _ => {
                let data = Data::zeroed((piece.range.count() * SECTOR) as usize).unwrap();
                match piece.source {
                    Source::Zeroes => self.zeroes.set(self.zeroes.get() + 1),
                    Source::Backing(number) if number.index() == 0 => {
                        self.storage.read_padded(at, data.clone()).await.unwrap();
                    }
                    Source::Backing(_) => {
                        self.below.set(self.below.get() + 1);
                        let (_, below) = self.subject.below().unwrap();
                        below.read(at, data.clone()).await.unwrap();
                    }
                }
                self.judge("the kernel", piece.range.start(), &data.to_vec(), model);
            }
        }
    }

    /// As the kernel delivers it, and takes the answer.
    async fn by_process(&self, range: &Sectors, kind: GuestOperation, model: &[Option<u32>]) {
        let changes = || match kind {
            GuestOperation::Read => {}
            GuestOperation::Write(_) => self.map.borrow_mut().written(range),
            GuestOperation::Zeroes | GuestOperation::Discard => self.map.borrow_mut().recall(range),
        };
        changes();
        let (at, len) = (range.start() * SECTOR, range.count() * SECTOR);
        let how = Attributes::default();
        self.unanswered.borrow_mut().push((*range, kind));
        match kind {
            GuestOperation::Read => {
                let data = Data::zeroed(len as usize).unwrap();
                self.disk.read(at, data.clone()).await.unwrap();
                self.judge("the process", range.start(), &data.to_vec(), model);
            }
            GuestOperation::Write(number) => {
                let bytes = self.bytes(range, number);
                self.disk.write(at, bytes, how).await.unwrap();
            }
            GuestOperation::Zeroes => self.disk.write_zeroes(at, len, how).await.unwrap(),
            GuestOperation::Discard => self.disk.discard(at, len, how).await.unwrap(),
        }
        let mut unanswered = self.unanswered.borrow_mut();
        unanswered.retain(|(other, _)| other != range);
        drop(unanswered);
        changes();
    }

    fn judge(&self, who: &str, from: u64, bytes: &[u8], model: &[Option<u32>]) {
        for (at, bytes) in (from..).zip(bytes.chunks(SECTOR as usize)) {
            if let Some(wanted) = model[at as usize] {
                let (name, found) = (self.subject.name(), self.subject.number(bytes, at));
                assert_eq!(found, Some(wanted), "{name}: {who} reads sector {at}");
            }
        }
    }

    /// The process looks where something is, and tells the kernel.
    async fn look(self: Rc<Self>, from: u64) {
        let generation = self.map.borrow().generation();
        let len = WINDOW.min(self.sectors * SECTOR - from);
        let places = self.disk.places(from, len).await.unwrap();
        let sectors = self.storage.size().unwrap() / SECTOR;
        let mut map = self.map.borrow_mut();
        map.resize_backing(BackingNumber::new(0).unwrap(), sectors);
        let told = places
            .iter()
            .filter(|place| map.set(&extent(place), generation).is_ok())
            .filter(|place| !self.may_be_old(place));
        let told: Vec<MappedExtent> = told.copied().collect();
        drop(map);
        // A death now: the next process finds the same.
        if !told.is_empty() && self.below(8) == 0 {
            self.deaths.set(self.deaths.get() + 1);
            self.same_after_death(told);
        }
    }

    /// Returns true if the image may have changed at a place, of which the kernel learns only with the answer: until
    /// then the guest may find either content, and the next process knows nothing of the old answer. Clusters of the
    /// image itself stay in place during a write.
    fn may_be_old(&self, place: &MappedExtent) -> bool {
        let its = extent(place).range;
        self.unanswered.borrow().iter().any(|(range, kind)| {
            let stays = match kind {
                GuestOperation::Read => true,
                GuestOperation::Write(_) => place.holder == Holder::Image,
                GuestOperation::Zeroes | GuestOperation::Discard => false,
            };
            !stays && range.common(&its).is_some()
        })
    }

    fn same_after_death(&self, told: Vec<MappedExtent>) {
        let disk = self.subject.next();
        for place in told {
            let here = match place.holder {
                Holder::Image => self.subject.there(place.at, place.len),
                Holder::Nothing => vec![0; place.len as usize],
                Holder::Below(_) => {
                    let (_, below) = self.subject.below().unwrap();
                    read(&below, place.at, place.len)
                }
            };
            let then = read(&disk, place.offset, place.len);
            assert!(here == then, "{}: {place:?}", self.subject.name());
        }
    }

    /// Runs requests that do not overlap, and looks up other ranges beside them.
    fn round(self: &Rc<Self>, runtime: &Runtime, number: &mut u32) {
        let mut busy: Vec<Sectors> = Vec::new();
        for _ in 0..1 + self.below(8) {
            let len = 1 + match self.below(6) {
                0 => self.below(self.sectors / 2),
                1 => self.below(64),
                _ => self.below(8),
            };
            let from = match self.below(2) {
                0 => self.below(self.sectors.min(HOT)),
                _ => self.below(self.sectors),
            };
            let range = Sectors::between(from, (from + len).min(self.sectors)).unwrap();
            if busy.iter().any(|other| other.common(&range).is_some()) {
                continue;
            }
            busy.push(range);
            let kind = match self.below(10) {
                0 => GuestOperation::Zeroes,
                1 => GuestOperation::Discard,
                2..5 => GuestOperation::Read,
                _ => {
                    *number += 1;
                    GuestOperation::Write(*number)
                }
            };
            runtime.tasks.spawn(self.clone().request(range, kind));
            if self.below(3) > 0 {
                let from = match self.below(2) {
                    0 => range.start(),
                    _ => self.below(self.sectors),
                } * SECTOR;
                runtime.tasks.spawn(self.clone().look(from));
            }
        }
        runtime.finish().unwrap();
    }

    /// Many of those, and then all of the disk is looked at.
    pub(crate) fn rounds(self: &Rc<Self>, runtime: &Runtime) {
        let mut number = 0x4000_0000;
        for round in 0..ROUNDS {
            self.round(runtime, &mut number);
            if round % 8 == 0 {
                let disk = self.disk.clone();
                let flushed = runtime.block_on(async move { disk.flush().await });
                flushed.unwrap().unwrap();
            }
        }
        let all = Sectors::between(0, self.sectors).unwrap();
        let (its, model) = (self.clone(), self.model.borrow().clone());
        let read = async move { its.by_process(&all, GuestOperation::Read, &model).await };
        runtime.block_on(read).unwrap();
    }
}

/// Reads a range of a disk.
fn read(disk: &Disk, at: u64, len: u64) -> Vec<u8> {
    let its = disk.clone();
    let read = async move {
        let data = Data::zeroed(len as usize)?;
        its.read(at, data.clone()).await?;
        Ok::<_, Errno>(data.to_vec())
    };
    Runtime::new().block_on(read).unwrap().unwrap()
}

fn extent(place: &MappedExtent) -> DataExtent {
    let number = |number| Source::Backing(BackingNumber::new(number).unwrap());
    DataExtent {
        range: Sectors::new(place.offset / SECTOR, place.len / SECTOR).unwrap(),
        place: place.at / SECTOR,
        source: match place.holder {
            Holder::Image => number(0),
            Holder::Below(backing) => number(backing),
            Holder::Nothing => Source::Zeroes,
        },
        access: match place.writable {
            true => ExtentAccess::ReadWrite,
            false => ExtentAccess::Read,
        },
    }
}

/// The disk of a trial.
struct Tried {
    trial: Trial,
    world: World,
}

impl Subject for Tried {
    type Storage = super::WorldFile;

    fn name(&self) -> String {
        self.trial.name.clone()
    }

    fn storage(&self) -> Self::Storage {
        self.world.file(0)
    }

    fn there(&self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.world.files()[0].read(at, &mut bytes);
        bytes
    }

    fn below(&self) -> Option<(u16, Disk)> {
        // An image without a parent never says so.
        Some((PARENT_BACKING, parent()))
    }

    fn next(&self) -> Disk {
        self.trial.active(&World::new(self.world.files()))
    }

    fn sector(&self, its: u32, at: u64) -> Vec<u8> {
        stamp(its, at)
    }

    fn number(&self, bytes: &[u8], at: u64) -> Option<u32> {
        number(bytes, at)
    }

    fn first(&self, at: u64) -> u32 {
        (self.trial.base)(at)
    }
}

/// A change fails although it is applied, and no later change can correct that: the places that the process then
/// reports must still agree with the image.
pub(crate) fn told_is_sure(trial: impl Fn() -> Trial) {
    for changes in 0..12 {
        let trial = trial();
        let world = World::new(trial.files.clone());
        let (disk, sectors, unit) = (trial.active(&world), trial.size / SECTOR, trial.unit);
        let host = PlacesHost::new(
            Tried {
                trial,
                world: world.clone(),
            },
            disk,
            sectors,
            changes,
        );
        let (its, failing) = (host.clone(), world.clone());
        let work = async move {
            let how = Attributes::default();
            let range = Sectors::between(0, 2 * unit / SECTOR).unwrap();
            its.disk.write(0, its.bytes(&range, 1), how).await.unwrap();
            failing.fail_late();
            failing.fail_once(changes as usize, Errno::IO);
            failing.fail_after(Some(changes as usize + 1));
            let results = [
                its.disk.discard(0, unit, how).await,
                its.disk.write_zeroes(unit, unit, how).await,
                its.disk.write(2 * unit, its.bytes(&range, 2), how).await,
            ];
            let places = its.disk.places(0, 4 * unit).await.unwrap();
            (results.iter().any(Result::is_err), places)
        };
        let (has_failed, places) = Runtime::new().block_on(work).unwrap();
        assert!(has_failed || !world.has_failed());
        host.same_after_death(places);
        // Writes that are answered from now on must be there for the next process.
        world.fail_after(None);
        world.fail_never();
        let its = host.clone();
        let range = Sectors::between(0, 8).unwrap();
        let written = async move {
            let bytes = its.bytes(&range, 3);
            its.disk.write(0, bytes, Attributes::default()).await
        };
        Runtime::new().block_on(written).unwrap().unwrap();
        let (next, data) = (host.subject.next(), Data::zeroed(4096).unwrap());
        let found = data.clone();
        let read = async move { next.read(0, data).await };
        Runtime::new().block_on(read).unwrap().unwrap();
        let written = host.bytes(&range, 3).to_vec();
        assert!(found.to_vec() == written, "after {changes} changes");
    }
}

/// Tests a format whose image is one file, with several seeds.
pub(crate) fn told_stays_true(has_parent: bool, trial: impl Fn(u64) -> Trial) {
    let (mut name, mut hits, mut deaths) = (String::new(), 0, 0);
    let (mut zeroes, mut below) = (0, 0);
    for seed in Seeds::few(6) {
        let (runtime, trial) = (Runtime::new(), trial(seed));
        let world = World::new(trial.files.clone());
        world.shuffle(seed);
        let (disk, sectors) = (trial.active(&world), trial.size / SECTOR);
        name = trial.name.clone();
        let host = PlacesHost::new(Tried { trial, world }, disk, sectors, seed);
        host.rounds(&runtime);
        hits += host.hits.get();
        deaths += host.deaths.get();
        zeroes += host.zeroes.get();
        below += host.below.get();
    }
    let what = format!(
        "{name}: {hits} by the kernel, with {zeroes} zeroes and {below} from below, {deaths} deaths"
    );
    println!("{what}");
    // A run with few requests proves nothing; the number depends on the seeds.
    assert!(hits > 20 && deaths > 5, "{what}");
    assert!(below > 0 || !has_parent, "{what}");
}
