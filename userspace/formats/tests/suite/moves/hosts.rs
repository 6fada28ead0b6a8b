// SPDX-License-Identifier: MIT OR Apache-2.0
//! The hosts: the times at which each has the image, and its knowledge of it.

use super::guest::{GuestRequest, MovingGuest};
use crate::common::{SeededRng, SparseContent, World, WorldFile};
use diskio::{Errno, Runtime};
use drivers::Disk;
use std::future::poll_fn;
use std::io;
use std::task::Poll;

/// Rules for hosts that share an image.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SharingRules {
    /// A host relies on no data of the image that it read before the other one has closed it.
    pub(crate) waits: bool,
    /// A host closes the image only when no request of its guest is under way.
    pub(crate) drains: bool,
    /// A host that opens the image again reads all of it anew.
    pub(crate) forgets: bool,
}

impl SharingRules {
    pub(crate) const ALL: Self = Self {
        waits: true,
        drains: true,
        forgets: true,
    };
}

type Open = dyn Fn(WorldFile, bool) -> Disk;

/// Image of a test.
pub(crate) struct Format {
    pub(crate) name: &'static str,
    /// Bytes of the disk.
    pub(crate) size: u64,
    /// Unit of allocation in bytes.
    pub(crate) unit: u64,
    pub(crate) files: Vec<SparseContent>,
    /// Opens the disk in the image; the argument says whether it may be changed.
    pub(crate) open: Box<Open>,
    /// The number in a sector that was not written.
    pub(crate) base: fn(u64) -> u32,
    /// Checks an image that is not in use.
    pub(crate) is_sound: fn(WorldFile) -> Result<(), String>,
}

/// Counts of a run.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RunCounts {
    /// Moves of the guest to the other host, and moves that were cancelled.
    pub(crate) moved: u64,
    pub(crate) stayed: u64,
    /// Writes of the guest, and requests that it repeated on the other side.
    pub(crate) written: u64,
    pub(crate) again: u64,
}

impl RunCounts {
    pub(crate) fn add(&mut self, other: &Self) {
        self.moved += other.moved;
        self.stayed += other.stayed;
        self.written += other.written;
        self.again += other.again;
    }
}

struct MoveStory<'f> {
    format: &'f Format,
    rules: SharingRules,
    world: World,
    runtime: Runtime,
    chance: SeededRng,
    guest: MovingGuest,
    counts: RunCounts,
    /// Disk that each host has open.
    hosts: [Option<Disk>; 2],
    /// Host on which the guest runs.
    here: usize,
}

fn begin(format: &Format, rules: SharingRules, seed: u64) -> Result<MoveStory<'_>, String> {
    let mut chance = SeededRng(seed);
    let world = World::new(format.files.clone());
    world.shuffle(chance.next());
    let story = MoveStory {
        rules,
        runtime: Runtime::new(),
        chance,
        guest: MovingGuest::new(format.base),
        counts: RunCounts::default(),
        hosts: [Some((format.open)(world.file(0), true)), None],
        here: 0,
        world,
        format,
    };
    story.activate(0)?;
    Ok(story)
}

/// Other hosts look at the size again and again, while the first requests of a guest make the image longer.
pub(crate) fn look_while_it_grows(format: &Format, seed: u64) -> Result<(), String> {
    let mut story = begin(format, SharingRules::ALL, seed)?;
    let group = story.group();
    story.begin(&group, &[]);
    for turns in 0..60 {
        story.look(turns);
    }
    story.end()
}

/// Runs the guest, suspends it, and resumes it on either host, again and again.
pub(crate) fn move_about(
    format: &Format,
    rules: SharingRules,
    seed: u64,
) -> Result<RunCounts, String> {
    let mut story = begin(format, rules, seed)?;
    for _ in 0..6 {
        for _ in 0..story.chance.below(4) {
            let group = story.group();
            story.begin(&group, &[]);
            story.end()?;
        }
        story.suspend()?;
    }
    story.look_back()?;
    Ok(story.counts)
}

impl MoveStory<'_> {
    fn disk(&self, host: usize) -> Disk {
        self.hosts[host].clone().expect("it has opened the image")
    }

    fn group(&mut self) -> Vec<GuestRequest> {
        let (sectors, unit) = (self.format.size / 512, self.format.unit / 512);
        let group = self.guest.group(&mut self.chance, sectors, unit);
        self.counts.written += group.iter().filter(|request| request.is_write()).count() as u64;
        group
    }

    /// The guest asks for these at its host; the answers to those that are `lost` it does not hear.
    fn begin(&mut self, group: &[GuestRequest], lost: &[bool]) {
        for (at, request) in group.iter().enumerate() {
            self.guest.ask(*request);
            let hears = !lost.get(at).copied().unwrap_or(false);
            let send = self
                .guest
                .clone()
                .send(self.disk(self.here), *request, hears);
            // Storage that is slow, where that matters.
            let turns = if self.rules.drains {
                0
            } else {
                self.chance.below(400)
            };
            self.runtime.tasks.spawn(async move {
                pass(turns).await;
                send.await;
            });
        }
    }

    /// All that is under way ends.
    fn end(&self) -> Result<(), String> {
        self.runtime.finish().map_err(|error| error.to_string())?;
        self.guest.verdict()
    }

    fn activate(&self, host: usize) -> Result<(), String> {
        let disk = self.disk(host);
        let active = self.runtime.block_on(async move { disk.activate().await });
        match active.map_err(|error| error.to_string())? {
            Ok(shape) if shape.size == self.format.size => Ok(()),
            other => Err(format!("it cannot be used: {other:?}")),
        }
    }

    /// A host that is to be the next one learns how large the disk is, as tapdisk does: from a copy that is only read,
    /// and that is gone afterwards. The copy begins after `turns` turns.
    fn look(&self, turns: u64) {
        let mut file = self.world.file(0);
        file.read_only = true;
        let disk = (self.format.open)(file, false);
        let (guest, size) = (self.guest.clone(), self.format.size);
        self.runtime.tasks.spawn(async move {
            pass(turns).await;
            match disk.activate().await {
                Ok(shape) if shape.size == size => {}
                other => guest.complain(format!("the size cannot be seen: {other:?}")),
            }
            if let Err(error) = disk.close().await {
                guest.complain(format!("what was only read cannot be closed: {error}"));
            }
        });
    }

    /// The other host opens the image, perhaps earlier than it may. True if it takes it that it knows the image.
    fn open_there(&mut self, group: &[GuestRequest]) -> bool {
        let there = 1 - self.here;
        self.look(0);
        if !self.rules.forgets && self.hosts[there].is_some() {
            return true;
        }
        let disk = (self.format.open)(self.world.file(0), true);
        self.hosts[there] = Some(disk.clone());
        if !self.rules.waits {
            // It reads what a program on that host may look for, such as partitions.
            let (guest, group) = (self.guest.clone(), group.to_vec());
            self.runtime.tasks.spawn(async move {
                match disk.activate().await {
                    Ok(_) => MovingGuest::peek(disk, group).await,
                    Err(failure) => guest.complain(format!("it cannot be used: {failure}")),
                }
            });
        }
        false
    }

    /// Suspends the guest with requests under way, and resumes it on either host.
    fn suspend(&mut self) -> Result<(), String> {
        let group = self.group();
        // A host that does not wait for them cannot get their answers.
        let all = !self.rules.drains;
        let lost: Vec<bool> = group
            .iter()
            .map(|_| all || self.chance.below(3) == 0)
            .collect();
        let knows = self.open_there(&group);
        if !self.rules.waits && self.chance.below(2) == 0 {
            // Before the last requests, or beside them.
            self.end()?;
        }
        self.begin(&group, &lost);
        let again = group.iter().zip(&lost).filter(|(_, lost)| **lost);
        let again: Vec<GuestRequest> = again.map(|(request, _)| *request).collect();
        if self.rules.drains {
            self.end()?;
            self.let_go()?;
            if self.chance.below(3) == 0 {
                return self.stay(&again, knows);
            }
        }
        self.here = 1 - self.here;
        if self.rules.waits && !knows {
            self.activate(self.here)?;
        }
        self.counts.moved += 1;
        // On the new host the guest repeats the requests that got no answer.
        self.counts.again += again.len() as u64;
        self.ask(again)?;
        if !self.rules.drains {
            // Old and new requests are under way at the same time.
            let over = self.guest.over(&group);
            self.ask(over)?;
            let more = self.group();
            self.begin(&more, &[]);
        }
        self.end()
    }

    /// Resumes the guest on its host after a cancelled move: its ring is the old one, with the answers in it.
    fn stay(&mut self, unheard: &[GuestRequest], other_knows: bool) -> Result<(), String> {
        if self.rules.forgets {
            self.activate(self.here)?;
        }
        if !other_knows {
            self.hosts[1 - self.here] = None;
        }
        for request in unheard {
            self.guest.hear_late(*request);
        }
        self.counts.stayed += 1;
        self.guest.verdict()
    }

    /// The guest asks for these, one after the other, and waits for the answers.
    fn ask(&mut self, requests: Vec<GuestRequest>) -> Result<(), String> {
        let (guest, disk) = (self.guest.clone(), self.disk(self.here));
        let work = async move {
            for request in requests {
                guest.ask(request);
                guest.clone().send(disk.clone(), request, true).await;
            }
        };
        let done = self.runtime.block_on(work);
        done.map_err(|error| error.to_string())?;
        self.guest.verdict()
    }

    /// Closes the image on the guest's host.
    fn let_go(&mut self) -> Result<(), String> {
        let disk = self.disk(self.here);
        if self.rules.forgets {
            let let_go = self
                .runtime
                .block_on(async move { disk.inactivate().await });
            left(let_go)?;
            if self.chance.below(2) == 0 {
                self.hosts[self.here] = Some((self.format.open)(self.world.file(0), true));
            }
            return Ok(());
        }
        // The host has stored everything, and assumes that it knows the image.
        left(self.runtime.block_on(async move { disk.flush().await }))
    }

    /// Everything is there in the end, in an image that is sound.
    fn look_back(&mut self) -> Result<(), String> {
        let disk = self.disk(self.here);
        let closed = self.runtime.block_on(async move { disk.close().await });
        left(closed)?;
        self.hosts = [None, None];
        let disk = (self.format.open)(self.world.file(0), true);
        self.hosts[self.here] = Some(disk.clone());
        self.activate(self.here)?;
        self.runtime
            .tasks
            .spawn(self.guest.clone().look_at_all(disk));
        self.end()?;
        (self.format.is_sound)(self.world.file(0))
    }
}

fn left(result: io::Result<Result<(), Errno>>) -> Result<(), String> {
    let result = result.map_err(|error| error.to_string())?;
    result.map_err(|error| format!("the image cannot be left: {error}"))
}

/// Yields to other tasks `turns` times.
async fn pass(mut turns: u64) {
    poll_fn(move |cx| {
        if turns == 0 {
            return Poll::Ready(());
        }
        turns -= 1;
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
