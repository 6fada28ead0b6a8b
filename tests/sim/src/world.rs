// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The engine in its machine, driven as by the worker thread.

use std::cell::RefCell;
use std::rc::Rc;

use blkback::engine::{
    Backend, BlockGroup, Config, Engine, EngineTables, Fetch, Latencies, Mapping, Pass,
    PendingRequest, ReapContext, SegmentEntry, Stats, TableShape,
};
use ring::abi::{REQ_PROD, RSP_EVENT, RSP_PROD};
use ring::index::BackRing;

use crate::grants::FakeGrants;
use crate::machine::{Machine, MachineFault, MachineSetup, SharedMachine};
use crate::port::FakeDisk;
use crate::process::ProcessPlan;
use crate::ring::FakeRing;
use crate::schedule;
use crate::spec::Spec;
use crate::tap::{SimTap, TapBackend};

/// The memory that a connection reserves.
#[derive(Debug)]
pub struct ReservedMemory {
    slots: Vec<PendingRequest>,
    entries: Vec<SegmentEntry>,
    groups: Vec<BlockGroup>,
    mappings: Vec<Mapping>,
    fetches: Vec<Option<Fetch>>,
    stats: Stats,
    latencies: Latencies,
}

impl ReservedMemory {
    /// Allocates the memory for a setup.
    pub fn new(setup: &MachineSetup) -> Self {
        let size = setup.protocol.ring_size(setup.order).expect("order");
        let pages = setup.copy_pages + setup.map_pages + setup.rest_entries();
        Self {
            slots: vec![PendingRequest::FREE; size as usize],
            entries: vec![SegmentEntry::EMPTY; usize::from(pages)],
            groups: vec![BlockGroup::EMPTY; BlockGroup::needed(setup.copy_pages)],
            mappings: vec![Mapping::FREE; usize::from(setup.map_pages)],
            fetches: vec![None; usize::from(setup.descriptor_buffers)],
            stats: Stats::default(),
            latencies: Latencies::OFF,
        }
    }
}

/// The engine in its machine.
#[derive(Debug)]
pub struct EngineWorld<'a, B = FakeDisk> {
    /// Everything around the engine.
    pub machine: SharedMachine,
    /// The engine.
    pub engine: Engine<'a, FakeRing, FakeGrants, B>,
    /// Result of the last pass.
    pub last: Pass,
    awake: bool,
    /// Work done up to the last pass, and the number of passes since then that did nothing.
    progress: (u64, u64, usize),
    idle_passes: u32,
}

impl<'a> EngineWorld<'a> {
    /// Connects an engine to a fresh machine.
    pub fn new(storage: &'a mut ReservedMemory, setup: MachineSetup, seed: u64) -> Self {
        Self::attached_at(storage, setup, seed, 0)
    }

    /// Connects an engine to a ring of a fresh machine, with its indices at `index`.
    pub fn attached_at(
        storage: &'a mut ReservedMemory,
        setup: MachineSetup,
        seed: u64,
        index: u32,
    ) -> Self {
        let machine = Rc::new(RefCell::new(Machine::new(setup, seed)));
        let backend = FakeDisk::new(machine.clone());
        Self::attach(storage, machine, index, backend)
    }

    /// Checks that the engine's counters match the disk's, whatever the disk gave back. The caller does this when the
    /// queue is idle.
    pub fn check_counters(&mut self) {
        let stats = self.engine.stats();
        let counted = (stats.rd_sect, stats.wr_sect);
        let failed = stats.failed > 0;
        let mut m = self.machine.borrow_mut();
        let moved = m.disk.sectors_moved;
        // An I/O that was begun as a whole and given back may fail before all of its pieces are done.
        let may_be_more = failed && m.disk.given_back != (0, 0);
        let more = counted.0 >= moved.0 && counted.1 >= moved.1;
        if counted != moved && !(may_be_more && more) {
            m.problem(format!(
                "{counted:?} sectors are counted, {moved:?} were moved"
            ));
        }
    }
}

impl<'a> EngineWorld<'a, TapBackend> {
    /// Connects an engine to a fresh machine whose disk is served by a process, for the frontend's queue number
    /// `queue`.
    pub fn served(
        storage: &'a mut ReservedMemory,
        setup: MachineSetup,
        plan: ProcessPlan,
        queue: u16,
        seed: u64,
        index: u32,
    ) -> Self {
        let mut machine = Machine::new(setup, seed);
        machine.tap = SimTap::new(machine.ring.size(), queue, plan);
        let machine = Rc::new(RefCell::new(machine));
        let backend = TapBackend::new(machine.clone());
        Self::attach(storage, machine, index, backend)
    }

    /// Disconnects at once, because the guest is gone. Returns the machine, for the next guest, and the number of
    /// requests that the process has.
    pub fn let_go(self) -> (SharedMachine, u32) {
        let machine = self.machine;
        drop(self.engine.detach());
        let orphans = machine.borrow_mut().orphan();
        (machine, orphans)
    }

    /// Connects the next guest to the machine of one that is gone.
    pub fn again(storage: &'a mut ReservedMemory, machine: SharedMachine, index: u32) -> Self {
        machine.borrow_mut().reconnect();
        let backend = TapBackend::new(machine.clone());
        Self::attach(storage, machine, index, backend)
    }

    /// Connects an engine to the ring of a guest that another engine has served, in its current state.
    pub fn back(storage: &'a mut ReservedMemory, machine: SharedMachine) -> Self {
        machine.borrow_mut().closing = false;
        let backend = TapBackend::new(machine.clone());
        Self::join(storage, machine, backend)
    }
}

impl<'a, B: Backend> EngineWorld<'a, B> {
    /// Connects an engine to a fresh machine, with another backend in front of the disk.
    pub fn behind(
        storage: &'a mut ReservedMemory,
        setup: MachineSetup,
        seed: u64,
        backend: impl FnOnce(FakeDisk) -> B,
    ) -> Self {
        let machine = Rc::new(RefCell::new(Machine::new(setup, seed)));
        let backend = backend(FakeDisk::new(machine.clone()));
        Self::attach(storage, machine, 0, backend)
    }

    /// Connects an engine to the ring of a machine, which is new there.
    pub(crate) fn attach(
        storage: &'a mut ReservedMemory,
        machine: SharedMachine,
        index: u32,
        backend: B,
    ) -> Self {
        {
            let mut m = machine.borrow_mut();
            m.front.start_at(index);
            m.taken = index;
            m.ring.store(REQ_PROD, index);
            m.ring.store(RSP_PROD, index);
            m.ring.store(RSP_EVENT, index.wrapping_add(1));
        }
        Self::join(storage, machine, backend)
    }

    fn join(storage: &'a mut ReservedMemory, machine: SharedMachine, backend: B) -> Self {
        let (setup, size) = {
            let mut m = machine.borrow_mut();
            // The backend refuses the rings of a guest that breaks the rules before it is served.
            m.lawful = true;
            (m.setup.clone(), m.ring.size())
        };
        let ring = BackRing::attach(FakeRing::new(machine.clone()), size)
            .expect("indices are possible and the size is a power of two");
        machine.borrow_mut().lawful = false;
        let engine = Engine::new(
            ring,
            FakeGrants::new(machine.clone()),
            backend,
            EngineTables {
                slots: &mut storage.slots,
                entries: &mut storage.entries,
                groups: &mut storage.groups,
                mappings: &mut storage.mappings,
                fetches: &mut storage.fetches,
                stats: &mut storage.stats,
                latencies: &mut storage.latencies,
            },
            TableShape {
                copy: setup.copy_pages,
                own: setup.own_pages,
                map: setup.map_pages,
            },
            Config {
                protocol: setup.protocol,
                copy_max_segments: setup.copy_max_segments,
                keeps_grants: setup.keeps_grants,
            },
            setup.limits,
        );
        Self {
            machine,
            engine,
            last: Pass::default(),
            awake: true,
            progress: (0, 0, 0),
            idle_passes: 0,
        }
    }

    /// Posts requests of the guest and publishes them at once. Returns their identifiers.
    pub fn send(&mut self, specs: &[Spec]) -> Vec<u64> {
        let mut m = self.machine.borrow_mut();
        let ids = specs.iter().map(|spec| m.post(spec)).collect();
        m.push();
        ids
    }

    /// Makes one pass and its follow-up work, as the worker does.
    pub fn pass(&mut self) -> Pass {
        self.measure();
        self.machine.borrow_mut().looks = 0;
        let pass = self.engine.pass();
        self.looks_rarely();
        self.last = pass;
        self.after(pass);
        self.give_back();
        self.awake = pass.again || self.engine.must_stay_awake() || pass.held;
        if pass.held {
            self.machine.borrow_mut().storage_lets_go();
        } else {
            self.must_not_spin();
        }
        pass
    }

    /// Switches measuring on or off now and then.
    fn measure(&mut self) {
        let mut m = self.machine.borrow_mut();
        let percent = m.setup.measures;
        if percent > 0 && m.rng.percent(percent) {
            let is_on = self.engine.latencies().is_on();
            self.engine.latencies().switch(!is_on);
        }
    }

    /// Checks that the engine reads the clock rarely, because that costs time: at most five times a pass with latency
    /// statistics, and twice without.
    fn looks_rarely(&mut self) {
        let most = match self.engine.latencies().is_on() {
            true => 5,
            false => 2,
        };
        let mut m = self.machine.borrow_mut();
        if m.looks > most {
            let looks = m.looks;
            m.problem(format!("{looks} looks at the clock in a pass"));
        }
        let flight = self.engine.flight();
        if flight.oldest.is_some_and(|begun| begun > m.now) {
            m.problem(format!("begun in the future: {flight:?}"));
        }
        // Time advances with each pass.
        m.now += 1_000;
    }

    /// Gives back borrowed memory that is not in use now and then, as the worker does.
    fn give_back(&mut self) {
        if self.engine.kept() > 0 && self.machine.borrow_mut().rng.percent(3) {
            let all = self.machine.borrow_mut().rng.percent(50);
            let _left = self.engine.sweep(all);
        }
        let (unused, asked) = {
            let mut m = self.machine.borrow_mut();
            if m.setup.own_pages >= m.setup.copy_pages {
                return;
            }
            (m.rng.percent(10), m.rng.percent(5))
        };
        if unused {
            let pages = self.engine.unused();
            self.engine.give_back(pages);
        }
        if asked {
            self.engine.give_back(u16::MAX);
        }
    }

    /// Checks that a worker that stays awake has work.
    fn must_not_spin(&mut self) {
        let mut m = self.machine.borrow_mut();
        let (at_once, late) = m.disk.given_back;
        let batches = m.disk.batches + at_once + late;
        let now = (m.accesses.slots, batches, m.front.answers.len());
        let idle = self.awake && now == self.progress;
        self.progress = now;
        self.idle_passes = if idle { self.idle_passes + 1 } else { 0 };
        if self.idle_passes > 3 {
            m.problem("the worker is kept awake by nothing".into());
        }
    }

    /// Sends the frontend an event if `notify`.
    fn tell(&mut self, notify: bool) {
        let mut m = self.machine.borrow_mut();
        if notify && !m.commit(MachineFault::LoseInterrupt) {
            m.front.interrupt = true;
        }
    }

    fn after(&mut self, pass: Pass) {
        self.tell(pass.notify);
        let mut m = self.machine.borrow_mut();
        m.late_copy();
        if m.host.is_late() && m.rng.percent(20) {
            m.copy_later();
        }
    }

    /// Runs until nothing is left to do; records violations in the machine.
    pub fn run(&mut self) {
        let bound = 200_000;
        if !self.run_for(bound) {
            self.machine
                .borrow_mut()
                .problem(format!("no end after {bound} steps"));
        }
    }

    /// Runs for at most `steps` steps; returns true if nothing is left to do or there is a violation.
    pub fn run_for(&mut self, steps: u32) -> bool {
        for _ in 0..steps {
            if !self.turn() {
                self.rest();
                return true;
            }
            if !self.awake && !self.machine.borrow().problems.is_empty() {
                return true;
            }
        }
        false
    }

    /// Makes the next step; returns false if nothing is left to do.
    pub(crate) fn turn(&mut self) -> bool {
        if self.awake {
            let _pass = self.pass();
            self.elsewhere();
            return true;
        }
        if self.completion_answers() {
            return true;
        }
        let mut m = self.machine.borrow_mut();
        if m.event || m.disk.wake {
            m.event = false;
            m.disk.wake = false;
            self.awake = true;
            return true;
        }
        asleep_is_right(&mut m, self.engine.in_flight(), self.last.broken);
        drop(m);
        if self.is_rung() {
            return true;
        }
        step(&mut self.machine.borrow_mut())
    }

    /// Lets the alarm of a brief sleep ring, sometimes. Returns true if it did. Checks that the worker sleeps no longer while
    /// requests that it could take are in the ring.
    fn is_rung(&mut self) -> bool {
        let is_brief = self.engine.must_sleep_briefly() && {
            let mut m = self.machine.borrow_mut();
            !m.commit(MachineFault::SleepLong)
        };
        let waiting = {
            let m = self.machine.borrow();
            let is_honest = !self.last.broken
                && !m.hosed
                && !m.suspended
                && m.setup.lawless == 0
                && !m.is_misleading();
            is_honest && m.front.pushed() != m.taken
        };
        if waiting && !is_brief && self.engine.has_requests() {
            let mut m = self.machine.borrow_mut();
            m.problem("asleep without a limit, with requests in the ring and no event".into());
        }
        let mut m = self.machine.borrow_mut();
        self.awake = is_brief && m.rng.percent(5);
        self.awake
    }

    /// Lets completions that find the worker asleep answer in its place, sometimes. Returns true if they did.
    fn completion_answers(&mut self) -> bool {
        let context = self.engine.can_lend();
        let before = {
            let mut m = self.machine.borrow_mut();
            if !m.disk.wake || context == ReapContext::Thread || m.rng.percent(40) {
                return false;
            }
            m.disk.wake = false;
            m.looks = 0;
            m.accesses
        };
        let answers = self.engine.answer_completed();
        self.looks_rarely();
        self.tell(answers.notify);
        let mut m = self.machine.borrow_mut();
        m.answered_asleep += u64::from(answers.answered);
        m.taken_asleep += u64::from(answers.taken);
        let now = m.accesses;
        let is_more =
            (now.slots, now.copies, now.maps) != (before.slots, before.copies, before.maps);
        if context == ReapContext::Any && is_more {
            m.problem("a completion did more than answer".into());
        }
        self.awake = answers.rest && !m.commit(MachineFault::SleepOn);
        true
    }

    /// Checks the state when nothing is left to do.
    pub(crate) fn rest(&mut self) {
        at_rest(&mut self.machine.borrow_mut(), self.last.broken);
    }

    /// Lets other CPUs make progress while the worker is awake.
    fn elsewhere(&mut self) {
        let mut m = self.machine.borrow_mut();
        if m.rng.percent(50) {
            step(&mut m);
        }
    }

    /// Tears down: takes nothing more and waits for what was taken.
    pub fn close(&mut self) {
        self.machine.borrow_mut().closing = true;
        for _ in 0..100_000 {
            let pass = self.engine.drain_pass();
            self.after(pass);
            let mut m = self.machine.borrow_mut();
            let left = self.engine.in_flight();
            if left == 0 {
                let (taken, answers) = (m.accesses.slots, m.front.answers.len());
                if taken != answers as u64 {
                    m.problem(format!("{taken} requests were taken, {answers} answered"));
                }
                return;
            }
            let results = m.disk.has_completions() || m.tap.has_results();
            if pass.held {
                m.storage_lets_go();
            }
            if !pass.again && !pass.held && !m.backend_busy() && !results {
                m.problem(format!("{left} requests keep the queue from closing"));
                return;
            }
            m.backend_step();
        }
        self.machine
            .borrow_mut()
            .problem("closing has no end".into());
    }

    /// Tears down after the guest is gone, without answers. Returns all violations.
    pub fn abandon(self) -> Vec<String> {
        let machine = self.machine;
        let before = machine.borrow().accesses;
        let mut rest = self.engine.detach();
        // From here on the thread may wait for storage.
        machine.borrow_mut().gone = true;
        while rest.drain() {
            let mut m = machine.borrow_mut();
            if m.disk.running() == 0 && !m.disk.has_completions() {
                m.problem("requests keep the queue from being abandoned".into());
                break;
            }
            m.disk_step();
        }
        let mut m = machine.borrow_mut();
        if m.accesses != before {
            m.problem("the ring was used after it was let go".into());
        }
        // The grant port unmaps last what storage still holds, and waits for that.
        let held = std::mem::take(&mut m.host.held);
        m.host.mappings.retain(|page, _| !held.contains(page));
        m.check_mappings();
        m.check_free_pages();
        std::mem::take(&mut m.problems)
    }

    /// Checks that an idle queue has mapped only pages that it keeps, and that it can release them.
    fn check_kept(&mut self) {
        let (kept, mapped, closing) = {
            let m = self.machine.borrow();
            let mapped = m.host.mappings.len() - usize::from(m.host.lost());
            (usize::from(self.engine.kept()), mapped, m.closing)
        };
        if kept != mapped {
            let what = format!("{mapped} pages are mapped, and {kept} of them kept");
            self.machine.borrow_mut().problem(what);
        }
        if closing || kept == 0 {
            let _none = self.engine.sweep(true);
            self.machine.borrow_mut().check_mappings();
        }
    }

    /// Checks the state of an idle queue. Returns all violations, of which there should be none.
    pub fn verdict(&mut self) -> Vec<String> {
        self.machine.borrow_mut().host.held.clear();
        self.check_kept();
        let free = self.engine.free_pages();
        let in_flight = self.engine.in_flight();
        let mut m = self.machine.borrow_mut();
        let pages = m.setup.copy_pages - m.host.absent.len() as u16;
        let map_pages = m.setup.map_pages - m.host.lost();
        let all = (pages, map_pages, m.setup.rest_entries());
        if free != all {
            m.problem(format!("{free:?} of {all:?} pages are free"));
        }
        if in_flight != 0 {
            m.problem(format!("{in_flight} slots are in use"));
        }
        m.check_free_pages();
        if !m.setup.limits.flush {
            let now = m.clock;
            m.check_durable(now);
        }
        m.check_content();
        m.check_order();
        for what in m.history.judge() {
            m.problem(what);
        }
        std::mem::take(&mut m.problems)
    }

    /// Runs, then fails the test on any violation.
    #[track_caller]
    pub fn run_clean(&mut self) {
        self.run();
        let problems = self.verdict();
        assert!(problems.is_empty(), "{problems:#?}");
    }

    /// Closes the queue, then fails the test on any violation.
    #[track_caller]
    pub fn close_clean(&mut self) {
        self.close();
        let problems = self.verdict();
        assert!(problems.is_empty(), "{problems:#?}");
    }

    /// Sends requests, runs, and fails the test on any violation. Returns the answers.
    #[track_caller]
    pub fn serve(&mut self, specs: &[Spec]) -> Vec<crate::frontend::GuestAnswer> {
        let before = self.machine.borrow().front.answers.len();
        for chunk in specs.chunks(32) {
            self.send(chunk);
            self.run_clean();
        }
        self.machine.borrow().front.answers[before..].to_vec()
    }

    /// Checks that the guest's later, valid requests are served normally.
    #[track_caller]
    pub fn still_works(&mut self) {
        let read_only = self.machine.borrow().setup.limits.read_only;
        let op = u8::from(!read_only);
        self.serve(&[Spec::pages(op, 8, 3), Spec::indirect(op, 64, 16)]);
        self.serve(&[Spec::pages(0, 8, 3), Spec::indirect(0, 64, 16)]);
    }
}

/// Checks the state when neither side has work.
fn at_rest(m: &mut Machine, broken: bool) {
    if m.guest_overslept() {
        m.problem("the guest was not told of responses".into());
    }
    m.consume();
    let left = m.front.outstanding();
    if left > 0 && !broken && !m.hosed {
        m.problem(format!("{left} requests were never answered"));
    }
}

/// Reports a violation if the worker sleeps with work left and no wake-up is due.
fn asleep_is_right(m: &mut Machine, in_flight: u16, broken: bool) {
    // A suspended guest misses nothing.
    if m.backend_busy() || broken || m.hosed || m.is_misleading() || m.suspended {
        return;
    }
    let waiting = m.front.pushed().wrapping_sub(m.taken);
    if waiting > 0 || in_flight > 0 {
        m.problem(format!(
            "asleep with {waiting} requests in the ring and {in_flight} taken, nothing running"
        ));
    }
}

/// Makes a step outside of the worker; returns false if there is none.
fn step(m: &mut Machine) -> bool {
    let lawless = m.setup.lawless > 0;
    let mut choices = [0u8; 6];
    let mut n = 0;
    let mut choice = |possible: bool, what: u8| {
        if possible {
            choices[n] = what;
            n += 1;
        }
    };
    choice(m.backend_busy(), 0);
    let told = m.front.interrupt || (lawless && m.front.unseen() > 0);
    choice(told && !m.suspended, 1);
    let wants = !m.again.is_empty() || (m.plan > 0 && !m.waits());
    choice(wants && m.front.has_room() && !m.suspended, 2);
    choice(lawless && m.is_misleading(), 3);
    choice(m.is_copying(), 4);
    choice(m.disk.has_strays() && !m.suspended, 5);
    if n == 0 {
        return false;
    }
    match choices[m.rng.index(n)] {
        0 => m.backend_step(),
        1 => m.consume(),
        2 => schedule::post_some(m),
        3 => m.set_right(),
        4 => m.copied += m.copy_some(),
        _ => m.land_stray(),
    }
    true
}
