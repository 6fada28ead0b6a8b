// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! A guest that is suspended in the middle of its work, and resumes on its host or on another one: with another
//! backend, another ring and other queues, on one disk.
//!
//! Hosts act as under Xen: they copy the memory of the guest while it runs (see [`crate::passes`]). When it is
//! suspended, its backend finishes the running requests and answers into the ring, which perhaps no guest ever reads;
//! only then another backend begins. Each host has its own instance of the real engine.

use std::cell::RefCell;
use std::rc::Rc;

use blkback::engine::Backend;
use ring::request::RequestLimits;

use crate::again::{Again, Age};
use crate::machine::{Habits, Machine, MachineFault, MachineSetup, SharedMachine};
use crate::port::FakeDisk;
use crate::process::ProcessPlan;
use crate::queues::Queues;
use crate::rng::Rng;
use crate::schedule::{borrow_pages, give_back_mapped, prepare, random_setup, served_setup};
use crate::tap::TapBackend;
use crate::world::{EngineWorld, ReservedMemory};

/// Steps after which a phase counts as stuck.
const BOUND: u32 = 200_000;

/// End of a suspension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SuspensionEnd {
    /// The guest resumes with its ring, because the suspend was cancelled or was a checkpoint.
    Cancelled,
    /// The guest resumes on another host.
    Moved,
    /// Either, at random.
    Either,
}

/// How data is transferred from and to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransferMode {
    /// Any way, at random.
    Any,
    /// Data is copied.
    Copied,
    /// Pages are mapped for each request.
    Mapped,
    /// Pages are mapped and stay mapped.
    Kept,
}

/// Events of a guest's life.
#[derive(Clone, Copy, Debug)]
pub struct Journey {
    /// Number of times that it is suspended.
    pub suspends: u32,
    /// End of each suspension.
    pub end: SuspensionEnd,
    /// Age of its frontend: one of these.
    pub ages: &'static [Age],
    /// How its data is transferred.
    pub way: TransferMode,
    /// Hosts differ from earlier ones in rings, queues and limits.
    pub others: bool,
    /// Its memory is copied while it runs.
    pub passes: bool,
    /// The guest copies data that it has read away from pages that stay granted.
    pub bounces: bool,
    /// A process serves the disk.
    pub served: Option<ProcessPlan>,
}

impl Default for Journey {
    fn default() -> Self {
        Self {
            suspends: 3,
            end: SuspensionEnd::Either,
            ages: &[Age::Old, Age::OldTable, Age::New],
            way: TransferMode::Any,
            others: true,
            passes: false,
            bounces: true,
            served: None,
        }
    }
}

/// Events of a case, to show that it exercised something.
#[derive(Clone, Copy, Debug, Default)]
pub struct MoveCounts {
    /// Guests that resumed on another host.
    pub moved: u64,
    /// Guests that resumed on their host.
    pub cancelled: u64,
    /// Requests whose answers a guest had not seen when it was moved.
    pub unheard: u64,
    /// Requests that repeated them.
    pub again: u64,
    /// Requests that were in flight when a guest was suspended.
    pub under_way: u64,
    /// Pages that were copied to other hosts.
    pub copied: u64,
    /// Hosts that offer a guest less than the one before: segments, discards, barriers or flushes.
    pub poorer: u64,
    /// Hosts with another number of queues than the one before, or with other rings.
    pub rings: u64,
    /// Processes that died.
    pub deaths: u64,
}

impl MoveCounts {
    /// Adds the counts of another case.
    pub fn add(&mut self, other: &Self) {
        self.moved += other.moved;
        self.cancelled += other.cancelled;
        self.unheard += other.unheard;
        self.again += other.again;
        self.under_way += other.under_way;
        self.copied += other.copied;
        self.poorer += other.poorer;
        self.rings += other.rings;
        self.deaths += other.deaths;
    }
}

struct Trip<'j> {
    journey: &'j Journey,
    fault: Option<MachineFault>,
    machine: SharedMachine,
    rng: Rng,
    age: Age,
    queues: usize,
    left: u32,
    counts: MoveCounts,
}

/// Runs the case of a seed, with a planted fault if there is one. Returns the violations, and the counts.
pub fn run_journey(
    seed: u64,
    journey: &Journey,
    fault: Option<MachineFault>,
) -> (Vec<String>, MoveCounts) {
    let mut rng = Rng::new(seed);
    let age = rng.pick(journey.ages);
    let (setup, queues) = host(&mut rng, journey, age, None);
    let mut machine = Machine::new(setup, rng.bits());
    machine.habits = Habits {
        travels: true,
        small_ids: age != Age::New,
        keeps_data: if journey.passes { 8 } else { 0 },
        bounces: journey.bounces,
    };
    prepare(&mut machine, &mut rng, None);
    machine.plan = 0;
    let mut trip = Trip {
        journey,
        fault,
        machine: Rc::new(RefCell::new(machine)),
        rng,
        age,
        queues,
        left: journey.suspends,
        counts: MoveCounts::default(),
    };
    loop {
        let again = match journey.served {
            Some(plan) => {
                trip.serve(plan);
                trip.stay(TapBackend::new)
            }
            None => trip.stay(FakeDisk::new),
        };
        match again {
            Some(again) => trip.arrive(again),
            None => break,
        }
    }
    let mut m = trip.machine.borrow_mut();
    m.look_at_content();
    let left = m.asked.left();
    if left > 0 {
        m.problem(format!("nothing was ever heard of {left} requests"));
    }
    trip.counts.copied = m.copied;
    trip.counts.deaths = m.tap.counts.deaths;
    (std::mem::take(&mut m.problems), trip.counts)
}

/// Returns a random host with the disk of another one, and the number of the guest's queues there.
fn host(
    rng: &mut Rng,
    journey: &Journey,
    age: Age,
    before: Option<&MachineSetup>,
) -> (MachineSetup, usize) {
    let served = journey.served.is_some();
    let mut setup = match served {
        true => served_setup(rng),
        false => random_setup(rng),
    };
    if !served && journey.way == TransferMode::Any && rng.percent(40) {
        borrow_pages(&mut setup, rng);
    }
    let like = before.unwrap_or(&setup).clone();
    setup = MachineSetup {
        protocol: like.protocol,
        limits: RequestLimits {
            sectors: like.limits.sectors.min(4096),
            block_sectors: like.limits.block_sectors,
            read_only: false,
            ..setup.limits
        },
        maptrack: 4096,
        no_space: 0,
        stuck: 0,
        hostile: 0,
        lawless: 0,
        scribble: false,
        bad_sectors: 0..0,
        ..setup
    };
    go(journey.way, &mut setup);
    // After a death, failed and returned requests wake only one queue of the fakes.
    let one = journey.served.is_some_and(|plan| plan.deaths > 0);
    let mut queues = rng.range(1, if one { 1 } else { 4 }) as usize;
    if age != Age::New {
        // The old frontend knows neither of these.
        setup.order = 0;
        setup.limits.max_indirect_segments = 0;
        setup.keeps_grants = false;
        queues = 1;
    }
    give_back_mapped(&mut setup, rng);
    (setup, queues)
}

fn go(way: TransferMode, setup: &mut MachineSetup) {
    let pages = |setup: &mut MachineSetup, copied: u16, keeps: bool| {
        setup.copy_pages = 352;
        setup.own_pages = u16::MAX;
        setup.lendable = 0;
        setup.map_pages = 512;
        setup.copy_max_segments = copied;
        setup.keeps_grants = keeps;
    };
    match way {
        TransferMode::Any => {}
        TransferMode::Copied => {
            pages(setup, u16::MAX, false);
            setup.map_pages = 0;
        }
        TransferMode::Mapped => pages(setup, 0, false),
        TransferMode::Kept => pages(setup, u16::MAX, true),
    }
}

impl Trip<'_> {
    fn serve(&mut self, plan: ProcessPlan) {
        let plan = ProcessPlan {
            enabled: true,
            fetch: self.rng.pick(&[1usize, 4, 32]),
            ..plan
        };
        let first = self.rng.below(3) as u16;
        let mut m = self.machine.borrow_mut();
        m.serve_here(first, self.queues, plan);
    }

    /// Runs the guest on a host until it moves. Returns the requests that it must repeat, or `None` when it has
    /// finished.
    fn stay<B: Backend>(&mut self, backend: fn(SharedMachine) -> B) -> Option<Vec<Again>> {
        let setup = self.machine.borrow().setup.clone();
        let mut storages: Vec<ReservedMemory> = (0..self.queues)
            .map(|_| ReservedMemory::new(&setup))
            .collect();
        let mut queues = Queues::new(self.machine.clone(), self.queues);
        let mut worlds = Vec::new();
        for (at, storage) in storages.iter_mut().enumerate() {
            queues.look_at(at);
            // Some rings wrap.
            let index = 0u32.wrapping_sub(self.rng.below(64) as u32);
            let backend = backend(self.machine.clone());
            worlds.push(EngineWorld::attach(
                storage,
                self.machine.clone(),
                index,
                backend,
            ));
        }
        queues.look_at(0);
        self.replay();
        while self.left > 0 && self.is_well() {
            self.left -= 1;
            self.work(&mut queues, &mut worlds);
            self.suspend(&mut queues);
            if self.is_cancelled() {
                self.counts.cancelled += 1;
                self.cancel(&mut queues, &mut worlds);
            } else {
                self.counts.moved += 1;
                return Some(self.leave(queues, worlds));
            }
        }
        self.finish(&mut queues, &mut worlds);
        None
    }

    /// Returns true unless a violation ends the case. A planted fault does not end it, because the checks at the end
    /// must find it.
    fn is_well(&self) -> bool {
        self.fault.is_some() || self.machine.borrow().problems.is_empty()
    }

    fn is_cancelled(&mut self) -> bool {
        match self.journey.end {
            SuspensionEnd::Cancelled => true,
            SuspensionEnd::Moved => false,
            SuspensionEnd::Either => self.rng.percent(50),
        }
    }

    /// A frontend of the old age puts all repeated requests into the ring at once.
    fn replay(&mut self) {
        if self.age == Age::New {
            return;
        }
        let mut m = self.machine.borrow_mut();
        while m.front.has_room() {
            let Some(again) = m.again.pop_front() else {
                break;
            };
            m.post_again(again);
        }
        m.push();
    }

    /// One step, in any of the queues; returns false if that one has nothing left to do.
    fn turn<B: Backend>(&mut self, queues: &mut Queues, worlds: &mut [EngineWorld<'_, B>]) -> bool {
        let at = self.rng.index(worlds.len());
        queues.look_at(at);
        worlds[at].turn()
    }

    /// Lets the guest work, while its memory is copied.
    fn work<B: Backend>(&mut self, queues: &mut Queues, worlds: &mut [EngineWorld<'_, B>]) {
        self.machine.borrow_mut().plan += self.rng.pick(&[10u32, 60, 150]);
        let steps = self.rng.pick(&[10u64, 100, 400]);
        let begin = self.rng.below(steps / 2);
        let armed = match self.fault {
            // The fault is active all the time, but does harm only where a pass has been.
            Some(MachineFault::MarkEarly | MachineFault::LateUnmap) => begin,
            _ => steps - steps / 4,
        };
        for step in 0..steps {
            if step == begin && self.journey.passes {
                self.each(queues, Machine::begin_passes);
            }
            if step == armed {
                self.machine.borrow_mut().fault = self.fault.map(|fault| (fault, 0));
            }
            let _idle = self.turn(queues, worlds);
        }
    }

    fn each(&self, queues: &mut Queues, what: fn(&mut Machine)) {
        for at in 0..queues.len() {
            queues.look_at(at);
            what(&mut self.machine.borrow_mut());
        }
    }

    fn suspend(&mut self, queues: &mut Queues) {
        {
            let mut m = self.machine.borrow_mut();
            m.suspended = true;
            m.fault = self.fault.map(|fault| (fault, 0));
        }
        self.each(queues, |m| {
            if let Some(passes) = &mut m.front.passes {
                passes.finish();
            }
            if m.commit(MachineFault::AbortAtSuspend) {
                m.disk.give_up();
                m.give_up_jobs();
            }
        });
        for at in 0..queues.len() {
            queues.look_at(at);
            self.counts.under_way += u64::from(self.machine.borrow().front.outstanding());
        }
    }

    /// Runs all queues until nothing is left to do.
    fn rest<B: Backend>(&mut self, queues: &mut Queues, worlds: &mut [EngineWorld<'_, B>]) {
        for _ in 0..BOUND {
            if self.turn(queues, worlds) {
                continue;
            }
            let mut rests = true;
            for (at, world) in worlds.iter_mut().enumerate() {
                queues.look_at(at);
                rests &= !world.turn();
            }
            if rests {
                return;
            }
        }
        let what = format!("no end after {BOUND} steps");
        self.machine.borrow_mut().problem(what);
    }

    /// Resumes the guest with its rings, perhaps before all running requests have ended.
    fn cancel<B: Backend>(&mut self, queues: &mut Queues, worlds: &mut [EngineWorld<'_, B>]) {
        if self.rng.percent(50) {
            self.rest(queues, worlds);
        } else {
            for _ in 0..self.rng.below(20) {
                let _idle = self.turn(queues, worlds);
            }
        }
        self.each(queues, |m| m.front.passes = None);
        let mut m = self.machine.borrow_mut();
        m.suspended = false;
        m.fault = None;
    }

    /// Leaves the host. Returns the requests whose answers the guest has not seen.
    fn leave<B: Backend>(
        &mut self,
        mut queues: Queues,
        mut worlds: Vec<EngineWorld<'_, B>>,
    ) -> Vec<Again> {
        let leaves = self.fault == Some(MachineFault::LeaveRunning);
        if leaves {
            self.each(&mut queues, Machine::leave_running);
        }
        // The copy of the memory is completed, and running requests end.
        self.rest(&mut queues, &mut worlds);
        self.each(&mut queues, Machine::copy_later);
        let mut again = Vec::new();
        for (at, world) in worlds.into_iter().enumerate() {
            queues.look_at(at);
            self.machine.borrow_mut().check_passes();
            // No running request is left to wait for, unless it was dropped.
            let left = world.engine.in_flight();
            drop(world.engine.detach());
            let mut m = self.machine.borrow_mut();
            if left > 0 && self.fault.is_none() {
                m.problem(format!(
                    "{left} requests are under way when the image is given up"
                ));
            }
            again.extend(m.unheard_of());
        }
        // Requests that the guest had yet to repeat.
        again.extend(self.machine.borrow_mut().again.drain(..));
        self.counts.unheard += again.len() as u64;
        again
    }

    /// Moves the guest to another host.
    fn arrive(&mut self, again: Vec<Again>) {
        let before = self.machine.borrow().setup.clone();
        let (setup, queues) = match self.journey.others {
            true => host(&mut self.rng, self.journey, self.age, Some(&before)),
            false => (before.clone(), self.queues),
        };
        let (old, new) = (before.limits, setup.limits);
        let less = |old: bool, new: bool| old && !new;
        let poorer = new.max_indirect_segments < old.max_indirect_segments
            || less(old.flush, new.flush)
            || less(old.barrier, new.barrier)
            || less(old.discard, new.discard);
        self.counts.poorer += u64::from(poorer);
        self.counts.rings += u64::from(queues != self.queues || setup.order != before.order);
        self.queues = queues;
        let mut m = self.machine.borrow_mut();
        m.arrive(setup);
        m.fault = self.fault.map(|fault| (fault, 0));
        self.counts.again += m.ask_again(again, self.age);
        m.fault = None;
    }

    /// Lets the guest finish its work.
    fn finish<B: Backend>(&mut self, queues: &mut Queues, worlds: &mut [EngineWorld<'_, B>]) {
        self.rest(queues, worlds);
        for (at, world) in worlds.iter_mut().enumerate() {
            queues.look_at(at);
            world.rest();
            world.close();
            let problems = world.verdict();
            self.machine.borrow_mut().problems.extend(problems);
        }
    }
}
