// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the kernel is told of places it reads and writes for as long as it likes, beside a process that does the
//! rest: the disk is the same, and when that process dies, what it told is what the image says.

use crate::common::tools::{folder, has_qemu, tool_in};
use crate::crash::{cases, content, first, fresh, opened, Case, SECTORS, SIZE};
use crate::memory::{read_all, sector, stamps, Chance, Memory, SECTOR};
use diskio::{Bytes, Data, Runtime};
use drivers::{Attributes, Disk, Place};
use formats::qcow2::Qcow2;
use formats::{Options, Parts, Storage};
use ring::tap::extent::{Access, BackingNumber, Extent, Sectors, Source};
use ring::tap::map::tree::{Leaf, Slot};
use ring::tap::map::{Backing, Map};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// What an image of QEMU has in all its sectors.
const BEFORE: u32 = 0x5555_5555;
/// Bytes around a request that are looked up.
const WINDOW: u64 = 64 << 10;
const PIECES: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write(u32),
    Zeroes,
    Discard,
}

/// The kernel, a process with the image, and what the guest may read.
struct Host {
    case: Case,
    memory: Memory,
    disk: Disk,
    map: RefCell<Map<Vec<Slot>, Vec<Leaf>>>,
    /// What each sector holds; nothing where it was discarded.
    model: RefCell<Vec<Option<u32>>>,
    chance: Chance,
    hits: Cell<u64>,
    looks: Cell<u64>,
}

impl Host {
    /// A disk that holds what `first` says.
    fn new(
        runtime: &Runtime,
        case: &Case,
        image: Vec<u8>,
        seed: u64,
        first: impl Fn(u64) -> u32,
    ) -> Rc<Self> {
        let memory = Memory::new(image, seed, true);
        let (slots, leaves) = (vec![Slot::FREE; 8], vec![Leaf::FREE; 8]);
        let mut map = Map::new(slots, leaves, SECTORS, true);
        let backing = Backing {
            sectors: 0,
            block: 1,
            writable: true,
        };
        assert!(map.add_backing(BackingNumber::new(0).unwrap(), backing));
        Rc::new(Self {
            disk: opened(runtime, &memory, case, true),
            case: case.clone(),
            memory,
            map: RefCell::new(map),
            model: RefCell::new((0..SECTORS).map(|number| Some(first(number))).collect()),
            chance: Chance::new(seed),
            hits: Cell::new(0),
            looks: Cell::new(0),
        })
    }

    /// Where all of a range is, if the kernel may do that.
    fn hit(&self, range: &Sectors, access: Access) -> Option<Vec<Extent>> {
        let mut pieces = [Extent::NOTHING; PIECES];
        let count = self.map.borrow_mut().translate(range, access, &mut pieces);
        Some(pieces[..count.ok()?].to_vec())
    }

    async fn request(self: Rc<Self>, range: Sectors, kind: Kind) {
        let access = match kind {
            Kind::Read => Access::Read,
            _ => Access::ReadWrite,
        };
        let pieces = match kind {
            Kind::Read | Kind::Write(_) => self.hit(&range, access),
            Kind::Zeroes | Kind::Discard => None,
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
            Kind::Read => return,
            Kind::Write(stamp) => Some(stamp),
            Kind::Zeroes => Some(0),
            Kind::Discard => None,
        };
        self.model.borrow_mut()[range.start() as usize..range.end() as usize].fill(new);
    }

    async fn by_kernel(&self, piece: &Extent, kind: Kind, model: &[Option<u32>]) {
        let (at, count) = (piece.place * SECTOR, piece.range.count() as usize);
        match kind {
            Kind::Write(stamp) => {
                let bytes = Bytes::copied(&sector(stamp).repeat(count)).unwrap();
                self.memory.write(at, bytes).await.unwrap();
            }
            _ => {
                let data = Data::zeroed(count * SECTOR as usize).unwrap();
                self.memory.read_padded(at, data.clone()).await.unwrap();
                self.judge("the kernel", piece.range.start(), &data.to_vec(), model);
            }
        }
    }

    /// As the kernel delivers it, and takes the answer.
    async fn by_process(&self, range: &Sectors, kind: Kind, model: &[Option<u32>]) {
        let changes = || match kind {
            Kind::Read => {}
            Kind::Write(_) => self.map.borrow_mut().written(range),
            Kind::Zeroes | Kind::Discard => self.map.borrow_mut().recall(range),
        };
        changes();
        let (at, len) = (range.start() * SECTOR, range.count() * SECTOR);
        let how = Attributes::default();
        match kind {
            Kind::Read => {
                let data = Data::zeroed(len as usize).unwrap();
                self.disk.read(at, data.clone()).await.unwrap();
                self.judge("the process", range.start(), &data.to_vec(), model);
            }
            Kind::Write(stamp) => {
                let bytes = sector(stamp).repeat(range.count() as usize);
                let bytes = Bytes::copied(&bytes).unwrap();
                self.disk.write(at, bytes, how).await.unwrap();
            }
            Kind::Zeroes => self.disk.write_zeroes(at, len, how).await.unwrap(),
            Kind::Discard => self.disk.discard(at, len, how).await.unwrap(),
        }
        changes();
    }

    fn judge(&self, who: &str, from: u64, bytes: &[u8], model: &[Option<u32>]) {
        for (number, found) in (from..).zip(stamps(bytes)) {
            if let Some(wanted) = model[number as usize] {
                let case = self.case.name;
                assert_eq!(found, Some(wanted), "{case}: {who} reads sector {number}");
            }
        }
    }

    /// The process looks where something is, and tells the kernel.
    async fn look(self: Rc<Self>, from: u64) {
        let generation = self.map.borrow().generation();
        let places = self
            .disk
            .places(from, WINDOW.min(SIZE - from))
            .await
            .unwrap();
        let sectors = self.memory.size().unwrap() / SECTOR;
        let mut map = self.map.borrow_mut();
        map.resize_backing(BackingNumber::new(0).unwrap(), sectors);
        let told = places
            .iter()
            .filter(|place| map.set(&extent(place), generation).is_ok());
        let told: Vec<&Place> = told.collect();
        drop(map);
        // A death now: the next process finds the same.
        if !told.is_empty() && self.chance.below(8) == 0 {
            self.looks.set(self.looks.get() + 1);
            self.same_after_death(&told);
        }
    }

    fn same_after_death(&self, told: &[&Place]) {
        let bytes = self.memory.bytes();
        let read = content(&Runtime::new(), &self.case, bytes.clone());
        for place in told {
            let (from, to) = (place.offset / SECTOR, (place.offset + place.len) / SECTOR);
            let here = stamps(&bytes[place.at as usize..][..place.len as usize]);
            let then = &read[from as usize..to as usize];
            assert_eq!(here, then, "{}: {place:?}", self.case.name);
        }
    }
}

fn extent(place: &Place) -> Extent {
    Extent {
        range: Sectors::new(place.offset / SECTOR, place.len / SECTOR).unwrap(),
        place: place.at / SECTOR,
        source: Source::Backing(BackingNumber::new(0).unwrap()),
        access: match place.writable {
            true => Access::ReadWrite,
            false => Access::Read,
        },
    }
}

/// Some requests of which none overlaps another, and looks beside them.
fn round(runtime: &Runtime, host: &Rc<Host>, stamp: &mut u32) {
    let chance = &host.chance;
    let mut busy: Vec<Sectors> = Vec::new();
    for _ in 0..1 + chance.below(8) {
        let len = 1 + match chance.below(6) {
            0 => chance.below(SECTORS / 2),
            1 => chance.below(64),
            _ => chance.below(8),
        };
        let from = chance.below(SECTORS);
        let range = Sectors::between(from, (from + len).min(SECTORS)).unwrap();
        if busy.iter().any(|other| other.common(&range).is_some()) {
            continue;
        }
        busy.push(range);
        let kind = match chance.below(10) {
            0 => Kind::Zeroes,
            1 => Kind::Discard,
            2..5 => Kind::Read,
            _ => {
                *stamp += 1;
                Kind::Write(*stamp)
            }
        };
        runtime.tasks.spawn(host.clone().request(range, kind));
        if chance.below(3) > 0 {
            let from = chance.below(SECTORS) * SECTOR;
            runtime.tasks.spawn(host.clone().look(from));
        }
    }
    runtime.finish().unwrap();
}

/// Many of those, and then all of the disk is looked at.
fn rounds(runtime: &Runtime, host: &Rc<Host>) {
    let mut stamp = 1;
    for number in 0..40 {
        round(runtime, host, &mut stamp);
        if number % 8 == 0 {
            let disk = host.disk.clone();
            let flushed = runtime.block_on(async move { disk.flush().await });
            flushed.unwrap().unwrap();
        }
    }
    let disk = host.disk.clone();
    let all = runtime.block_on(async move { read_all(&disk, SIZE).await });
    let model = host.model.borrow();
    host.judge("whoever reads all", 0, &all.unwrap().unwrap(), &model);
}

#[test]
fn what_is_told_stays_true() {
    let runtime = Runtime::new();
    for case in cases() {
        let (mut hits, mut looks) = (0, 0);
        for seed in 0..24 {
            let image = fresh(&runtime, &case);
            let host = Host::new(&runtime, &case, image, seed, |at| first(&case, at));
            rounds(&runtime, &host);
            hits += host.hits.get();
            looks += host.looks.get();
        }
        println!("{}: {hits} by the kernel, {looks} deaths", case.name);
        assert!(hits > 100 && looks > 20, "{}: {hits} {looks}", case.name);
    }
}

/// An image with a snapshot of a full disk, in clusters of 4 KiB.
fn with_snapshot() -> Vec<u8> {
    let folder = folder();
    let size = SIZE.to_string();
    let create = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4096",
        "image",
        &size,
    ];
    let fill = format!("write -q -P 0x55 0 {SIZE}");
    tool_in("qemu-img", &create, folder.path());
    tool_in(
        "qemu-io",
        &["-f", "qcow2", "-c", &fill, "image"],
        folder.path(),
    );
    tool_in(
        "qemu-img",
        &["snapshot", "-c", "one", "image"],
        folder.path(),
    );
    std::fs::read(folder.path().join("image")).unwrap()
}

/// What others have, too, is theirs as it is.
#[test]
fn clusters_of_a_snapshot_are_not_told() {
    if !has_qemu("clusters_of_a_snapshot_are_not_told") {
        return;
    }
    let (runtime, image) = (Runtime::new(), with_snapshot());
    let case = &cases()[0];
    for seed in 0..8 {
        let host = Host::new(&runtime, case, image.clone(), seed, |_| BEFORE);
        let disk = host.disk.clone();
        let places = runtime.block_on(async move { disk.places(0, SIZE).await });
        assert_eq!(places.unwrap().unwrap(), []);
        rounds(&runtime, &host);
        assert!(host.hits.get() > 0);
        let options = Options {
            writable: false,
            snapshot: Some("one".into()),
            ..Options::new(case.name)
        };
        let snapshot = Disk::new(Qcow2::new(host.memory.clone(), Parts::default(), options));
        let bytes = runtime.block_on(async move {
            snapshot.activate().await.unwrap();
            // Nothing of it ever changes, so the kernel may read it wherever it is.
            let places = snapshot.places(0, SIZE).await.unwrap();
            assert!(!places.is_empty() && places.iter().all(|place| !place.writable));
            read_all(&snapshot, SIZE).await
        });
        assert_eq!(
            stamps(&bytes.unwrap().unwrap()),
            [Some(BEFORE); SECTORS as usize]
        );
    }
}

/// What the image says of features that nobody keeps up to date would be wrong after a write of the kernel.
#[test]
fn nothing_is_written_before_the_first_write() {
    const AUTOCLEAR: usize = 88;
    let runtime = Runtime::new();
    let case = &cases()[0];
    let mut image = fresh(&runtime, case);
    let memory = Memory::new(image.clone(), 1, false);
    let disk = opened(&runtime, &memory, case, true);
    let data = || Bytes::copied(&sector(7)).unwrap();
    let its = disk.clone();
    let written = runtime.block_on(async move {
        its.write(0, data(), Attributes::default()).await?;
        its.close().await
    });
    written.unwrap().unwrap();
    image = memory.bytes();
    image[AUTOCLEAR + 7] |= 1;
    let disk = opened(&runtime, &Memory::new(image, 1, false), case, true);
    let (before, after) = runtime
        .block_on(async move {
            let before = disk.places(0, SECTOR).await.unwrap();
            disk.write(0, data(), Attributes::default()).await.unwrap();
            (before, disk.places(0, SECTOR).await.unwrap())
        })
        .unwrap();
    assert_eq!([before.len(), after.len()], [1, 1]);
    assert!(!before[0].writable && after[0].writable);
}
