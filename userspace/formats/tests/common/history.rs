// SPDX-License-Identifier: MIT OR Apache-2.0
//! The requests that a disk got, sector by sector, and checks that reads agree with them: at the end, after the death
//! of the process at any change of the image, and after a power cut.

use super::{SeededRng, SparseContent, What, World, SECTOR};
use diskio::{Bytes, Data, Errno, Runtime};
use drivers::{Attributes, Disk};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

/// Effect of one request on a sector: the number that it stored, 0 for zeroes, `None` for a discard.
#[derive(Clone, Copy, Debug)]
struct SectorEffect {
    number: Option<u32>,
    /// Number of the images' changes when the request began, and when it was answered.
    begin: usize,
    end: usize,
}

/// Opens the disk in the files of a world.
pub(crate) type OpenFn = dyn Fn(&World) -> Disk;

/// A disk that is tried out.
pub(crate) struct Trial {
    pub(crate) name: String,
    pub(crate) size: u64,
    /// The files before the first request.
    pub(crate) files: Vec<SparseContent>,
    pub(crate) open: Rc<OpenFn>,
    /// The number in a sector that was not written.
    pub(crate) base: Rc<dyn Fn(u64) -> u32>,
    /// Bytes that requests like to be near to the borders of.
    pub(crate) unit: u64,
    pub(crate) seed: u64,
}

#[derive(Clone, Copy, Debug)]
enum HistoryStep {
    Write,
    Zeroes,
    Discard,
    Read,
}

/// The bytes of a sector with a number in it.
pub(crate) fn stamp(number: u32, sector: u64) -> Vec<u8> {
    if number == 0 {
        return vec![0; SECTOR];
    }
    let mut word = number.to_le_bytes().to_vec();
    word.extend((sector as u32).to_le_bytes());
    word.repeat(SECTOR / 8)
}

/// Returns the number in a sector, if all of the sector carries it.
pub(crate) fn number(bytes: &[u8], sector: u64) -> Option<u32> {
    let number = u32::from_le_bytes(bytes[..4].try_into().unwrap());
    (bytes == stamp(number, sector)).then_some(number)
}

/// After how many changes of the image it is looked at.
#[derive(Clone, Copy)]
struct Then {
    /// Requests that were answered before this change have taken effect.
    sure: usize,
    /// Requests that began after this change have not.
    begun: usize,
    /// The power was lost.
    cut: bool,
}

const NOW: Then = Then {
    sure: usize::MAX,
    begun: usize::MAX,
    cut: false,
};

fn all(_: u64, _: &[SectorEffect]) -> bool {
    true
}

#[derive(Default)]
struct SectorHistory {
    sectors: BTreeMap<u64, Vec<SectorEffect>>,
    /// Numbers of changes when the guest's flushes began and ended.
    flushes: Vec<(usize, usize)>,
}

impl Trial {
    /// Returns the numbers that may be in a sector: the durable one, and those of all later requests.
    fn allowed(
        &self,
        told: &[SectorEffect],
        sector: u64,
        sure: usize,
        begun: usize,
        cut: bool,
    ) -> Vec<u32> {
        let base = (self.base)(sector);
        let mut allowed = vec![base];
        for one in told {
            if one.begin >= begun && begun != usize::MAX {
                continue;
            }
            let is_sure = one.end <= sure;
            match one.number {
                Some(number) if is_sure => allowed = vec![number],
                Some(number) => allowed.push(number),
                None => allowed.extend([0, base]),
            }
            if cut && !is_sure {
                // A sector that was being written has the old content, the new one, or none.
                allowed.push(0);
            }
        }
        allowed
    }

    /// Reads the sectors that `wanted` picks, and looks whether they are allowed.
    fn check(
        &self,
        history: &SectorHistory,
        disk: &Disk,
        then: Then,
        wanted: &dyn Fn(u64, &[SectorEffect]) -> bool,
    ) {
        let picked = history
            .sectors
            .iter()
            .filter(|(sector, told)| wanted(**sector, told));
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for (sector, _) in picked {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == *sector && *count < 4000 => *count += 1,
                _ => runs.push((*sector, 1)),
            }
        }
        let Then { sure, begun, cut } = then;
        let what = format!(
            "{} seed {} after {begun} changes, {sure} of them sure",
            self.name, self.seed
        );
        let runtime = Runtime::new();
        for (first, count) in runs {
            let disk = disk.clone();
            let bytes = runtime.block_on(async move {
                let data = Data::zeroed(count as usize * SECTOR).unwrap();
                disk.read(first * SECTOR as u64, data.clone())
                    .await
                    .map(|()| data.to_vec())
            });
            let bytes = bytes.unwrap();
            let bytes = bytes.unwrap_or_else(|error| panic!("{what}: sector {first}: {error}"));
            for (sector, bytes) in (first..).zip(bytes.chunks(SECTOR)) {
                let told = &history.sectors[&sector];
                let allowed = self.allowed(told, sector, sure, begun, cut);
                match number(bytes, sector) {
                    Some(number) if allowed.contains(&number) => {}
                    found => panic!(
                        "{what}: sector {sector} has {found:?} ({:02x?}), allowed {allowed:?}, told {told:?}",
                        &bytes[..16]
                    ),
                }
            }
        }
    }

    pub(crate) fn active(&self, world: &World) -> Disk {
        let disk = (self.open)(world);
        let its = disk.clone();
        let shape = Runtime::new()
            .block_on(async move { its.activate().await })
            .unwrap();
        let shape =
            shape.unwrap_or_else(|failure| panic!("{} seed {}: {failure}", self.name, self.seed));
        assert_eq!(shape.size, self.size, "{}", self.name);
        disk
    }

    /// Requests that do not overlap, at the same time.
    fn group(&self, chance: &mut SeededRng) -> Vec<(HistoryStep, u64, u64)> {
        let sectors = self.size / SECTOR as u64;
        let unit = self.unit / SECTOR as u64;
        let mut group: Vec<(HistoryStep, u64, u64)> = Vec::new();
        for _ in 0..1 + chance.below(8) {
            let border = chance.below(sectors.div_ceil(unit)) * unit;
            let at = match chance.below(3) {
                0 => border,
                1 => border.saturating_sub(chance.below(4)),
                _ => border + chance.below(unit),
            };
            let at = at.min(sectors - 1);
            let len = match chance.below(16) {
                0 => unit,
                1 => unit + 3,
                2..10 => 8,
                _ => 1 + chance.below(24),
            };
            let len = len.min(sectors - at).min(8192);
            let step = match chance.below(12) {
                0..7 => HistoryStep::Write,
                7 => HistoryStep::Zeroes,
                8 => HistoryStep::Discard,
                _ => HistoryStep::Read,
            };
            if group
                .iter()
                .all(|(_, other, count)| at + len <= *other || other + count <= at)
            {
                group.push((step, at, len));
            }
        }
        group
    }

    /// Does it all: `groups` of requests, then the checks.
    pub(crate) fn run(&self, groups: usize) {
        let world = World::new(self.files.clone());
        let mut chance = SeededRng(self.seed);
        world.shuffle(chance.next());
        let disk = self.active(&world);
        let history = Rc::new(RefCell::new(SectorHistory::default()));
        let mut stamps = 0x4000_0000;
        for _ in 0..groups {
            let runtime = Runtime::new();
            for (step, at, len) in self.group(&mut chance) {
                stamps += 1;
                let request = request(
                    world.clone(),
                    disk.clone(),
                    history.clone(),
                    step,
                    at,
                    len,
                    stamps,
                );
                runtime.tasks.spawn(request);
            }
            runtime.finish().unwrap();
            if chance.below(5) == 0 {
                let (begin, its) = (world.changes(), disk.clone());
                runtime
                    .block_on(async move { its.flush().await })
                    .unwrap()
                    .unwrap();
                history.borrow_mut().flushes.push((begin, world.changes()));
            }
        }
        let history = history.borrow();
        self.check(&history, &disk, NOW, &all);
        let its = disk.clone();
        Runtime::new()
            .block_on(async move { its.inactivate().await })
            .unwrap()
            .unwrap();
        self.check(&history, &self.active(&world), NOW, &all);
        self.deaths(&world, &history, &mut chance);
        self.power_cuts(&world, &history, &mut chance);
    }

    /// The process dies after each change of the image.
    fn deaths(&self, world: &World, history: &SectorHistory, chance: &mut SeededRng) {
        let mut files = self.files.clone();
        let log = world.log();
        for count in 0..=log.len() {
            if count > 0 {
                let (file, what) = &log[count - 1];
                files[*file].apply(what);
            }
            // A request that was answered between two changes was answered before the next one.
            let world = World::new(files.clone());
            let disk = self.active(&world);
            let then = Then {
                sure: count,
                begun: count + 1,
                cut: false,
            };
            // Check the sectors of requests that were under way, and some of the others.
            let some = chance.below(64);
            self.check(history, &disk, then, &|sector, told| {
                (sector >> 3) % 64 == some
                    || told
                        .iter()
                        .any(|one| one.begin <= count && one.end.saturating_add(1) >= count)
            });
            if chance.below(24) == 0 {
                self.go_on(&world, &disk, history, count, chance);
            }
        }
    }

    /// An image that was left in the middle of something can be used.
    fn go_on(
        &self,
        world: &World,
        disk: &Disk,
        history: &SectorHistory,
        count: usize,
        chance: &mut SeededRng,
    ) {
        let mut more = SectorHistory::default();
        more.sectors.clone_from(&history.sectors);
        for told in more.sectors.values_mut() {
            told.retain(|one| one.begin < count + 1);
        }
        for number in 0..12 {
            let at = chance.below(self.size / SECTOR as u64);
            let its = disk.clone();
            let bytes = Bytes::copied(&stamp(77 + number, at)).unwrap();
            let write = async move {
                its.write(at * SECTOR as u64, bytes, Attributes::default())
                    .await
            };
            Runtime::new().block_on(write).unwrap().unwrap();
            let told = SectorEffect {
                number: Some(77 + number),
                begin: 0,
                end: 0,
            };
            more.sectors.entry(at).or_default().push(told);
        }
        let then = Then { sure: count, ..NOW };
        let some = chance.below(16);
        self.check(&more, disk, then, &|sector, _| (sector >> 3) % 16 == some);
        let its = disk.clone();
        Runtime::new()
            .block_on(async move { its.close().await })
            .unwrap()
            .unwrap();
        self.check(&more, &self.active(world), then, &all);
    }

    /// Simulates power cuts: of the changes since the last flush, some sectors survive.
    fn power_cuts(&self, world: &World, history: &SectorHistory, chance: &mut SeededRng) {
        let log = world.log();
        for _ in 0..20 {
            let count = chance.below(log.len() as u64 + 1) as usize;
            let sure = history.flushes.iter().filter(|(_, end)| *end <= count);
            let sure = sure.map(|(begin, _)| *begin).max().unwrap_or(0);
            let mut files = self.files.clone();
            for (at, (file, what)) in log[..count].iter().enumerate() {
                let is_flush =
                    |(other, what): &(usize, What)| other == file && matches!(what, What::Flush);
                match log[at..count].iter().any(is_flush) {
                    true => files[*file].apply(what),
                    false => lose(&mut files[*file], what, chance),
                }
            }
            let disk = self.active(&World::new(files));
            let then = Then {
                sure,
                begun: count + 1,
                cut: true,
            };
            self.check(history, &disk, then, &all);
        }
    }
}

/// Visits every state that a power cut after any change of `log` from `begin` on can leave, if each change survives as
/// a whole or not at all. There must be few changes between two flushes.
pub(crate) fn every_cut(
    files: &[SparseContent],
    log: &[(usize, What)],
    begin: usize,
    look: impl Fn(Vec<SparseContent>, String),
) {
    for end in begin..=log.len() {
        let flush = |at: &usize| matches!(log[*at].1, What::Flush);
        let sure = (0..end).rev().find(flush).unwrap_or(0);
        let mut safe = files.to_vec();
        for (file, what) in &log[..sure] {
            safe[*file].apply(what);
        }
        let rest = &log[sure..end];
        assert!(rest.len() <= 12, "{} changes without a flush", rest.len());
        for kept in 0..1_usize << rest.len() {
            let mut files = safe.clone();
            for (at, (file, what)) in rest.iter().enumerate() {
                if kept >> at & 1 == 1 {
                    files[*file].apply(what);
                }
            }
            look(files, format!("after {end} changes, of {rest:?} {kept:#b}"));
        }
    }
}

/// Applies some sectors of a change at random.
fn lose(file: &mut SparseContent, what: &What, chance: &mut SeededRng) {
    match what {
        What::Write(at, bytes) => {
            for (number, sector) in bytes.chunks(SECTOR).enumerate() {
                if chance.below(2) == 0 {
                    file.write(at + (number * SECTOR) as u64, sector);
                }
            }
        }
        other if chance.below(2) == 0 => file.apply(other),
        _ => {}
    }
}

async fn request(
    world: World,
    disk: Disk,
    history: Rc<RefCell<SectorHistory>>,
    step: HistoryStep,
    at: u64,
    len: u64,
    stamps: u32,
) {
    let (offset, bytes) = (at * SECTOR as u64, len * SECTOR as u64);
    let begin = world.changes();
    let how = Attributes::default();
    let number = match step {
        HistoryStep::Write => Some(stamps),
        HistoryStep::Zeroes => Some(0),
        _ => None,
    };
    // The request may take effect from now on.
    if !matches!(step, HistoryStep::Read) {
        for sector in at..at + len {
            let told = SectorEffect {
                number,
                begin,
                end: usize::MAX,
            };
            history
                .borrow_mut()
                .sectors
                .entry(sector)
                .or_default()
                .push(told);
        }
    }
    match step {
        HistoryStep::Write => {
            let content: Vec<u8> = (at..at + len)
                .flat_map(|sector| stamp(stamps, sector))
                .collect();
            disk.write(offset, Bytes::copied(&content).unwrap(), how)
                .await
                .unwrap();
        }
        HistoryStep::Zeroes => disk.write_zeroes(offset, bytes, how).await.unwrap(),
        HistoryStep::Discard => disk.discard(offset, bytes, how).await.unwrap(),
        HistoryStep::Read => {
            let data = Data::zeroed(bytes as usize).unwrap();
            disk.read(offset, data.clone()).await.unwrap();
            let extents = disk.extents(offset, bytes).await.unwrap();
            assert!(extents.iter().map(|extent| extent.len).sum::<u64>() <= bytes);
            return;
        }
    }
    let end = world.changes();
    let mut history = history.borrow_mut();
    for sector in at..at + len {
        let told = history
            .sectors
            .get_mut(&sector)
            .and_then(|told| told.last_mut());
        told.unwrap().end = end;
    }
}

/// Request that makes a disk's changes durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asks {
    /// The guest flushes.
    Flush,
    /// The image is closed for some time, because the guest is suspended or the disk paused.
    Inactivate,
    /// The image is closed.
    Close,
}

/// A flush that the disk makes for its own tables fails, and with it other writes are lost: the next flush, or the end,
/// must report that once.
pub(crate) fn lost_flush_is_told(trial: impl Fn() -> Trial) {
    for asks in [Asks::Flush, Asks::Inactivate, Asks::Close] {
        let lost = (0..16)
            .filter(|changes| lost_flush_is_told_by(&trial(), asks, *changes))
            .count();
        assert!(lost > 0, "no flush failed");
    }
}

/// True if it was a flush that failed.
fn lost_flush_is_told_by(trial: &Trial, asks: Asks, changes: usize) -> bool {
    let world = World::new(trial.files.clone());
    let (disk, unit, failing) = (trial.active(&world), trial.unit, world.clone());
    let work = async move {
        let how = Attributes::default();
        let data = |at: u64| Bytes::copied(&stamp(7, at / SECTOR as u64)).unwrap();
        disk.write(0, data(0), how).await.unwrap();
        failing.fail_once(changes, Errno::IO);
        let written = disk.write(2 * unit, data(2 * unit), how).await;
        let is_lost = failing.has_lost_flush();
        // A failure that has not happened yet must not happen now.
        failing.fail_never();
        let (first, second) = match asks {
            Asks::Flush => (disk.flush().await, disk.flush().await),
            Asks::Inactivate => (disk.inactivate().await, Ok(())),
            Asks::Close => (disk.close().await, Ok(())),
        };
        (is_lost, written, first, second)
    };
    let (is_lost, written, first, second) = Runtime::new().block_on(work).unwrap();
    if is_lost {
        assert_eq!(written, Err(Errno::IO), "{changes}");
    }
    assert_eq!(
        first.is_err(),
        is_lost,
        "{}: {asks:?} {changes}",
        trial.name
    );
    assert_eq!(second, Ok(()), "{}: {changes}", trial.name);
    is_lost
}

/// The storage tells an error to one of the flushes that are under way. If that is one that the disk has made of its own
/// accord, the guest's beside it fails as well.
pub(crate) fn lost_flush_is_told_beside(trial: impl Fn(u64) -> Trial) {
    let mut lost = 0;
    for seed in 1..400 {
        let trial = trial(seed);
        let world = World::new(trial.files.clone());
        let (disk, unit, runtime) = (trial.active(&world), trial.unit, Runtime::new());
        world.shuffle(seed);
        let how = Attributes::default();
        let data = |at: u64| Bytes::copied(&stamp(7, at / SECTOR as u64)).unwrap();
        let (its, first) = (disk.clone(), data(0));
        let written = runtime.block_on(async move { its.write(0, first, how).await });
        written.unwrap().unwrap();
        world.fail_once(seed as usize % 8, Errno::IO);
        let written = Rc::new(Cell::new(None));
        let (its, done, new) = (disk.clone(), written.clone(), data(2 * unit));
        runtime.tasks.spawn(async move {
            done.set(Some(its.write(2 * unit, new, how).await));
        });
        let (failing, flushed) = (world.clone(), Rc::new(Cell::new(None)));
        let done = flushed.clone();
        runtime.tasks.spawn(async move {
            let begin = failing.changes();
            let told = disk.flush().await;
            done.set(Some((told, failing.has_lost_since(begin))));
        });
        runtime.finish().unwrap();
        let (told, had_failed) = flushed.take().unwrap();
        if had_failed {
            lost += u64::from(written.take().unwrap().is_err());
            assert!(told.is_err(), "{}: seed {seed}", trial.name);
        }
    }
    assert!(lost > 0, "no flush failed for a write");
}
