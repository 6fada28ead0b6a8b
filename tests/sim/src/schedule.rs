// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Random cases: setups, requests, and the order of events.

use ring::abi::{Protocol, OP_DISCARD, OP_FLUSH_DISKCACHE, OP_READ, OP_WRITE, OP_WRITE_BARRIER};
use ring::request::RequestLimits;

use crate::frontend::BAD_GREF;
use crate::machine::{Machine, MachineFault, MachineSetup};
use crate::process::ProcessPlan;
use crate::rng::Rng;
use crate::spec::{Expect, Gref, Spec};
use crate::tap::TapCounts;
use crate::world::{EngineWorld, ReservedMemory};

/// Sectors at the start of the disk that hold data before the guest comes.
const INSTALLED: u64 = 256;

/// Gives the queue few pages of its own, and lets it borrow the others.
pub(crate) fn borrow_pages(setup: &mut MachineSetup, rng: &mut Rng) {
    let largest = setup.limits.max_indirect_segments.max(16);
    setup.copy_pages = largest.next_multiple_of(8) + 8 * rng.below(20) as u16;
    setup.own_pages = rng.pick(&[16u16, 16, 24, 32]).min(setup.copy_pages);
    setup.map_pages = rng.pick(&[0, 0, largest]);
    setup.keeps_grants &= setup.map_pages > 0;
    setup.lendable = rng.pick(&[0, 8, 40, setup.copy_pages, setup.copy_pages]);
    setup.fickle = rng.pick(&[0u64, 2, 20]);
}

/// Lets the disk give back I/O with mapped data. Requests whose mappings are not kept may find no pages to copy to.
pub(crate) fn give_back_mapped(setup: &mut MachineSetup, rng: &mut Rng) {
    if setup.keeps_grants {
        setup.gives_back = rng.pick(&[0u64, 5, 30, 100]);
    }
}

/// Returns a random setup.
pub fn random_setup(rng: &mut Rng) -> MachineSetup {
    let max_indirect = rng.pick(&[0u16, 1, 16, 32, 64, 256]);
    let largest = max_indirect.max(11);
    let roomy = largest * rng.range(1, 3) as u16;
    let tight = largest + rng.below(12) as u16;
    let (copy_pages, map_pages) = match rng.below(5) {
        0 => (tight, 0),
        1 => (0, tight),
        2 => (11, tight),
        3 => (tight, 11 + rng.below(8) as u16),
        _ => (roomy, roomy),
    };
    let block_sectors = rng.pick(&[1u32, 1, 2, 8]);
    let sectors = match rng.below(4) {
        0 => 64,
        1 => 4096,
        // Large enough for discards that are executed in pieces.
        2 => 10 << 20,
        _ => 512,
    };
    let bad = rng.below(sectors.min(400));
    MachineSetup {
        protocol: rng.pick(&[Protocol::Abi64, Protocol::Abi32]),
        order: rng.pick(&[0u8, 0, 0, 1, 2, 3, 4]),
        copy_pages,
        own_pages: u16::MAX,
        lendable: 0,
        fickle: 0,
        map_pages,
        copy_max_segments: rng.pick(&[0u16, 11, 255, u16::MAX]),
        // Pages that cannot stay mapped are copied.
        keeps_grants: map_pages > 0 && copy_pages >= largest && rng.percent(60),
        limits: RequestLimits {
            sectors,
            block_sectors,
            read_only: rng.percent(10),
            max_indirect_segments: max_indirect,
            flush: rng.percent(60),
            barrier: rng.percent(60),
            discard: rng.percent(70),
            secure_discard: rng.percent(30),
        },
        descriptor_buffers: rng.pick(&[1u8, 2, 16, 32]),
        batch: rng.pick(&[1usize, 3, 16, 64, 1024]),
        maptrack: rng.pick(&[5usize, 40, 4096, 4096]),
        no_space: rng.pick(&[0u64, 0, 0, 2, 30, 100]),
        stuck: rng.pick(&[0u64, 0, 0, 0, 1, 20]),
        synchronous: rng.pick(&[0u64, 0, 30, 100]),
        holds: 0,
        gives_back: 0,
        reaps_anywhere: true,
        fifo: rng.percent(25),
        race: rng.pick(&[0u64, 5, 30]),
        measures: rng.pick(&[0u64, 0, 3, 30]),
        hostile: rng.pick(&[0u64, 0, 20, 60]),
        lawless: rng.pick(&[0u64, 0, 0, 0, 1, 5]),
        scribble: rng.percent(30),
        bad_sectors: if rng.percent(25) { bad..bad + 4 } else { 0..0 },
        junk: rng.pick(&[0u8, 0xa5, 0xff]),
    }
}

/// The guest makes some of its requests and publishes them.
pub fn post_some(m: &mut Machine) {
    if m.suspended {
        return;
    }
    let most = m.rng.pick(&[1u64, 2, 8, 64, 600]);
    let most = if m.tap.plan.patient { 2 } else { most };
    let count = m.rng.range(1, most);
    for _ in 0..count {
        if !m.front.has_room() {
            break;
        }
        if let Some(again) = m.again.pop_front() {
            m.post_again(again);
            continue;
        }
        if m.plan == 0 {
            break;
        }
        m.plan -= 1;
        let hostile = m.rng.percent(m.setup.hostile);
        let spec = if hostile {
            hostile_spec(m)
        } else {
            honest_spec(m)
        };
        if m.habits.travels && m.asked.meets(&spec) {
            continue;
        }
        m.post(&spec);
    }
    m.push();
}

/// Returns a random range of `sectors` sectors; most requests meet in the first few.
fn place(m: &mut Machine, sectors: u64) -> u64 {
    let block = u64::from(m.setup.limits.block_sectors);
    let last = m.setup.limits.sectors.saturating_sub(sectors);
    let sector = match m.rng.below(8) {
        0 => last,
        1 => m.rng.below(last + 1),
        _ => m.rng.below(last.min(96) + 1),
    };
    sector / block * block
}

fn random_segments(m: &mut Machine, count: usize) -> Vec<(Gref, u8, u8)> {
    let block = m.setup.limits.block_sectors as u8;
    let mut left = m.setup.limits.sectors;
    let mut segments: Vec<(Gref, u8, u8)> = Vec::new();
    let whole = m.rng.percent(50);
    for _ in 0..count {
        let (mut first, mut blocks) = (0, 8 / block);
        if !whole {
            // Whole blocks, at any sector of the page.
            first = m.rng.below(u64::from(9 - block)) as u8;
            blocks = m.rng.range(1, u64::from((8 - first) / block)) as u8;
        }
        let last = first + blocks * block - 1;
        let mut gref = Gref::Fresh;
        if let Some((Gref::Fresh, earlier, _)) = segments.last() {
            // Use the free front of the page before: one page, two segments.
            if *earlier > last && m.rng.percent(50) {
                gref = Gref::Same(segments.len() - 1);
            }
        }
        let here = u64::from(last - first) + 1;
        if here > left {
            break;
        }
        left -= here;
        segments.push((gref, first, last));
    }
    segments
}

fn transfer(m: &mut Machine, operation: u8) -> Spec {
    let max_indirect = m.setup.limits.max_indirect_segments;
    let indirect = operation <= OP_WRITE && max_indirect > 0 && m.rng.percent(40);
    let most = if indirect {
        u64::from(max_indirect)
    } else {
        11
    };
    let most = m.rng.pick(&[1, most, most.min(12)]);
    let count = m.rng.range(1, most) as usize;
    let mut spec = Spec::new(operation, 0);
    spec.indirect = indirect;
    spec.segments = random_segments(m, count);
    spec.sector = place(m, spec.sectors());
    if operation != OP_READ && m.rng.percent(30) {
        // A write needs only pages that the backend may read.
        spec.segments.iter_mut().for_each(|(gref, _, _)| {
            if *gref == Gref::Fresh {
                *gref = Gref::ReadOnly;
            }
        });
    }
    may_lack_room(m, &mut spec);
    spec
}

/// Expects that a request may fail, if its data cannot be mapped and there are not enough pages to copy it.
fn may_lack_room(m: &Machine, spec: &mut Spec) {
    let no_room = m.setup.no_space > 0 || m.setup.stuck > 0 || m.setup.maptrack < 256;
    if no_room && m.setup.copy_pages < spec.segments.len() as u16 {
        spec.expect = Expect::Any;
    }
}

fn honest_spec(m: &mut Machine) -> Spec {
    let limits = m.setup.limits;
    let mut spec = match m.rng.below(20) {
        0 => Spec::new(OP_FLUSH_DISKCACHE, m.rng.bits()),
        1 => Spec {
            operation: OP_FLUSH_DISKCACHE,
            ..transfer(m, OP_FLUSH_DISKCACHE)
        },
        2 if m.rng.percent(30) => Spec::new(OP_WRITE_BARRIER, m.rng.bits()),
        2 => transfer(m, OP_WRITE_BARRIER),
        3 => discard(m),
        n if n % 2 == 0 => transfer(m, OP_READ),
        _ => transfer(m, OP_WRITE),
    };
    if spec.operation == OP_DISCARD && !limits.discard
        || spec.operation == OP_WRITE_BARRIER && !limits.barrier
    {
        spec.expect = Expect::NotSupported;
    } else if limits.read_only && changes(&spec) {
        spec.expect = Expect::Error;
    }
    spec
}

fn changes(spec: &Spec) -> bool {
    match spec.operation {
        OP_READ => false,
        OP_FLUSH_DISKCACHE => !spec.segments.is_empty(),
        _ => true,
    }
}

fn discard(m: &mut Machine) -> Spec {
    let block = u64::from(m.setup.limits.block_sectors);
    let sectors = match m.rng.below(6) {
        0 => m.setup.limits.sectors,
        1 => 0,
        _ => m.rng.below(64),
    };
    let sectors = sectors.min(m.setup.limits.sectors) / block * block;
    let sector = place(m, sectors);
    Spec {
        discard: sectors,
        flag: m.rng.bits() as u8,
        ..Spec::new(OP_DISCARD, sector)
    }
}

/// Returns a hostile request; its answer is known nevertheless.
fn hostile_spec(m: &mut Machine) -> Spec {
    let limits = m.setup.limits;
    let op = m.rng.pick(&[OP_READ, OP_WRITE]);
    let at = place(m, 88);
    let one = |gref| Spec::new(op, at).with(&[(Gref::Fresh, 0, 7), (gref, 0, 7)]);
    let max = limits.max_indirect_segments;
    let mut spec = match m.rng.below(15) {
        0 => Spec::new(m.rng.pick(&[4u8, 7, 8, 77, 255]), at).expect(Expect::NotSupported),
        1 => Spec {
            count: Some(m.rng.pick(&[0u16, 12, 13, 255])),
            ..Spec::pages(op, at, 2)
        },
        2 => Spec::pages(op, at, 1).with(&[(Gref::Fresh, 5, 4)]),
        3 => {
            let last = m.rng.range(8, 255) as u8;
            Spec::pages(op, at, 1).with(&[(Gref::Fresh, 0, 7), (Gref::Fresh, 0, last)])
        }
        4 => Spec::pages(op, limits.sectors - 8 + 1, 1),
        5 => Spec::pages(op, u64::MAX - m.rng.below(8), 1),
        6 => one(Gref::Raw(BAD_GREF)),
        7 => one(Gref::Revoked),
        8 => Spec {
            count: Some(
                m.rng
                    .pick(&[0u16, max.saturating_add(1).max(257), 513, 65535]),
            ),
            ..Spec::indirect(op, at, 2)
        },
        9 => Spec {
            descriptor: Some(BAD_GREF),
            ..Spec::indirect(op, at, 3)
        },
        10 => Spec {
            operation: m.rng.range(2, 255) as u8,
            ..Spec::indirect(op, at, 1)
        },
        11 => Spec::indirect(op, at, 2).with(&[(Gref::Fresh, 0, 7), (Gref::Fresh, 3, 2)]),
        12 => Spec::pages(OP_READ, at, 1).with(&[(Gref::ReadOnly, 0, 7)]),
        13 if max >= 2 => {
            // The descriptors are overwritten by the data that they describe.
            let descriptor = (Gref::Descriptor, 0, 7);
            let mut spec = Spec::indirect(OP_READ, at, 2);
            spec.segments[m.rng.index(2)] = descriptor;
            may_lack_room(m, &mut spec);
            return spec;
        }
        _ => return overlapping(m, op),
    };
    if spec.expect == Expect::Okay {
        spec.expect = Expect::Error;
    }
    let id = m.rng.pick(&[0, u64::MAX]);
    if m.rng.percent(10) && !m.front.is_pending(id) {
        spec.id = Some(id);
    }
    spec
}

/// Names one page many times: legal, but the data is undefined.
fn overlapping(m: &mut Machine, operation: u8) -> Spec {
    let count = m.rng.range(2, 11) as usize;
    let mut segments = vec![(Gref::Same(0), 0, 7); count];
    segments[0] = (Gref::Fresh, 0, 7);
    let sectors = 8 * count as u64;
    let fits = sectors <= m.setup.limits.sectors;
    let mut spec = Spec::new(operation, place(m, sectors)).with(&segments);
    spec.wild = true;
    spec.expect = Expect::Any;
    if !fits || operation != OP_READ && m.setup.limits.read_only {
        spec.expect = Expect::Error;
        spec.wild = false;
    }
    spec
}

/// Result of a case.
#[derive(Clone, Debug, Default)]
pub struct CaseOutcome {
    /// Violations.
    pub problems: Vec<String>,
    /// Requests answered.
    pub answers: u64,
    /// Answers without an error.
    pub okay: u64,
    /// Requests whose pages were mapped.
    pub mapped: u64,
    /// Requests that completions answered while the worker slept.
    pub answered_asleep: u64,
    /// Requests that had to wait for room.
    pub waited: u64,
    /// Flushes, barriers and discards executed.
    pub special: u64,
    /// 1 if the guest broke its ring for good.
    pub broken: u64,
    /// I/Os that the disk gave back.
    pub given_back: u64,
}

/// Runs the case of a seed, with a planted fault if there is one.
pub fn run_case(seed: u64, fault: Option<MachineFault>) -> CaseOutcome {
    let mut rng = Rng::new(seed);
    let mut setup = random_setup(&mut rng);
    if rng.percent(40) {
        borrow_pages(&mut setup, &mut rng);
    }
    give_back_mapped(&mut setup, &mut rng);
    run_setup(setup, &mut rng, fault)
}

/// Prepares the disk's initial data, the guest's plan, and the planted fault.
pub(crate) fn prepare(m: &mut Machine, rng: &mut Rng, fault: Option<MachineFault>) {
    let installed = INSTALLED.min(m.setup.limits.sectors);
    m.install(0xffff_fff0, 0, installed);
    m.plan = rng.pick(&[10u32, 60, 150, 300]);
    if m.setup.fifo {
        // Long enough for a request to wait too long.
        m.plan *= 3;
    }
    m.fault = fault.map(|fault| (fault, rng.below(6) as u32));
}

/// Returns the setup of a disk that a process serves: everything is copied, and requests meet often.
pub(crate) fn served_setup(rng: &mut Rng) -> MachineSetup {
    let setup = random_setup(rng);
    let indirect = setup.limits.max_indirect_segments.min(32);
    let largest = indirect.max(11);
    MachineSetup {
        order: rng.pick(&[0u8, 0, 0, 1]),
        copy_pages: largest * rng.range(1, 4) as u16,
        own_pages: u16::MAX,
        lendable: 0,
        fickle: 0,
        map_pages: 0,
        copy_max_segments: u16::MAX,
        keeps_grants: false,
        limits: RequestLimits {
            sectors: match rng.below(16) {
                // Room for discards with ranges larger than any granule of the shadow's index; slow.
                0 => 10_000,
                1 | 2 => 4096,
                n => 64 << (n % 4),
            },
            read_only: false,
            max_indirect_segments: indirect,
            ..setup.limits
        },
        fifo: false,
        hostile: 0,
        lawless: 0,
        bad_sectors: 0..0,
        ..setup
    }
}

/// Result of a case at a disk that a process serves.
#[derive(Clone, Debug, Default)]
pub struct ServedOutcome {
    /// Violations.
    pub problems: Vec<String>,
    /// Requests answered.
    pub answers: u64,
    /// Requests that commits took while the worker slept.
    pub taken_asleep: u64,
    /// Counts of the processes' acts.
    pub counts: TapCounts,
}

/// Runs the case of a seed on a disk that processes serve, with a planted fault if there is one.
pub fn run_served(seed: u64, plan: &ProcessPlan, fault: Option<MachineFault>) -> ServedOutcome {
    let mut rng = Rng::new(seed);
    let mut setup = served_setup(&mut rng);
    if plan.patient {
        setup.race = 0;
    }
    if let Some(sectors) = plan.sectors {
        setup.limits.sectors = sectors;
    }
    let mut storage = ReservedMemory::new(&setup);
    let start = 0u32.wrapping_sub(rng.below(64) as u32);
    let queue = rng.below(3) as u16;
    let seed = rng.bits();
    let plan = ProcessPlan {
        enabled: true,
        fetch: rng.pick(&[1usize, 4, 32]),
        ..*plan
    };
    let mut world = EngineWorld::served(&mut storage, setup, plan, queue, seed, start);
    {
        let mut m = world.machine.borrow_mut();
        prepare(&mut m, &mut rng, fault);
        m.plan = rng.pick(&[20u32, 60, 120]);
    }
    world.run();
    world.close();
    let mut problems = world.verdict();
    let mut m = world.machine.borrow_mut();
    let mut info = ring::tap::abi::Info::default();
    m.tap.shadow.describe(&mut info, 0);
    m.tap.counts.replayed = info.replayed;
    if info.refused != m.tap.counts.refused {
        problems.push(format!("{info:?} and {:?}", m.tap.counts));
    }
    if info.waiting + info.delivered > 0 {
        problems.push(format!("all is answered, but {info:?}"));
    }
    ServedOutcome {
        problems,
        answers: m.front.answers.len() as u64,
        taken_asleep: m.taken_asleep,
        counts: m.tap.counts,
    }
}

/// A guest goes away in the middle of its work, and another one connects.
pub fn run_two_guests(seed: u64, plan: &ProcessPlan, fault: Option<MachineFault>) -> ServedOutcome {
    let mut rng = Rng::new(seed);
    let setup = served_setup(&mut rng);
    let (mut storage, mut second) = (ReservedMemory::new(&setup), ReservedMemory::new(&setup));
    let seed = rng.bits();
    let plan = ProcessPlan {
        enabled: true,
        ..*plan
    };
    let mut world = EngineWorld::served(&mut storage, setup, plan, 1, seed, 0);
    prepare(&mut world.machine.borrow_mut(), &mut rng, None);
    world.run_for(rng.range(1, 120) as u32);
    let (machine, orphans) = world.let_go();
    if fault != Some(MachineFault::ForgetOrphans) {
        let mut m = machine.borrow_mut();
        let mut steps = 0;
        while m.tap.shadow.orphans() > 0 && m.backend_busy() && steps < 10_000 {
            m.backend_step();
            steps += 1;
        }
        if m.tap.shadow.orphans() > 0 {
            let what = format!("orphans stay for ever: {:?}", m.tap.shadow);
            m.problem(what);
        }
        m.check_arena_is_ours();
    }
    let mut world = EngineWorld::again(&mut second, machine, rng.bits() as u32);
    world.machine.borrow_mut().plan = 40;
    world.run();
    world.close();
    let problems = world.verdict();
    let mut m = world.machine.borrow_mut();
    m.tap.counts.orphans = orphans.into();
    ServedOutcome {
        problems,
        answers: m.front.answers.len() as u64,
        taken_asleep: m.taken_asleep,
        counts: m.tap.counts,
    }
}

/// How a driver leaves a guest that stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaves {
    /// The driver answers all requests that it has taken.
    Answered,
    /// The driver leaves at once, and forgets requests that it has not answered.
    AtOnce,
}

/// The driver leaves a guest in the middle of its work, and attaches again to the rings.
pub fn run_rebound(seed: u64, plan: &ProcessPlan, leaves: Leaves) -> ServedOutcome {
    let mut rng = Rng::new(seed);
    let setup = served_setup(&mut rng);
    let (mut storage, mut second) = (ReservedMemory::new(&setup), ReservedMemory::new(&setup));
    let seed = rng.bits();
    let plan = ProcessPlan {
        enabled: true,
        ..*plan
    };
    let start = 0u32.wrapping_sub(rng.below(64) as u32);
    let mut world = EngineWorld::served(&mut storage, setup, plan, 1, seed, start);
    prepare(&mut world.machine.borrow_mut(), &mut rng, None);
    world.run_for(rng.range(1, 120) as u32);
    let under_way = world.engine.in_flight();
    if leaves == Leaves::Answered {
        world.close();
    }
    let (machine, orphans) = world.let_go();
    let mut steps = 0;
    while machine.borrow().tap.shadow.orphans() > 0 && steps < 10_000 {
        machine.borrow_mut().backend_step();
        steps += 1;
    }
    let mut world = EngineWorld::back(&mut second, machine);
    world.machine.borrow_mut().plan = 40;
    world.run();
    world.close();
    let problems = world.verdict();
    let mut m = world.machine.borrow_mut();
    m.tap.counts.orphans = orphans.into();
    m.tap.counts.under_way = under_way.into();
    ServedOutcome {
        problems,
        answers: m.front.answers.len() as u64,
        taken_asleep: m.taken_asleep,
        counts: m.tap.counts,
    }
}

/// Runs a random load on a setup.
pub fn run_setup(setup: MachineSetup, rng: &mut Rng, fault: Option<MachineFault>) -> CaseOutcome {
    let mut storage = ReservedMemory::new(&setup);
    // Half of the rings wrap during the case.
    let start = if rng.percent(50) {
        0u32.wrapping_sub(rng.below(64) as u32)
    } else {
        0
    };
    let mut world = EngineWorld::attached_at(&mut storage, setup, rng.bits(), start);
    prepare(&mut world.machine.borrow_mut(), rng, fault);
    let machine = world.machine.clone();
    let (stats, broken);
    // Run long enough for a planted fault to do harm.
    let end = if fault.is_some() { 2 } else { rng.below(4) };
    let problems = match end {
        0 => {
            // Stop in the middle of the work.
            let _over = world.run_for(rng.below(80) as u32);
            (stats, broken) = (*world.engine.stats(), world.last.broken);
            world.abandon()
        }
        1 => {
            if !world.run_for(rng.below(80) as u32) {
                world.close();
            }
            (stats, broken) = (*world.engine.stats(), world.last.broken);
            world.check_counters();
            world.verdict()
        }
        _ => {
            world.run();
            world.close();
            (stats, broken) = (*world.engine.stats(), world.last.broken);
            world.check_counters();
            world.verdict()
        }
    };
    let m = machine.borrow();
    CaseOutcome {
        problems,
        answers: m.front.answers.len() as u64,
        okay: m.front.answers.iter().filter(|a| a.status == 0).count() as u64,
        mapped: stats.mapped,
        answered_asleep: m.answered_asleep,
        waited: stats.oo_req,
        special: m.disk.special,
        given_back: m.disk.given_back.0 + m.disk.given_back.1,
        broken: u64::from(broken),
    }
}
