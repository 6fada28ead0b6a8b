// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Random schedules of three hosts that want one image, each with two disks for it, on a storage with reservations:
//! commands whose answers are lost, writes that are under way for long, hosts that die and are booted, and an operator
//! who breaks reservations of the dead, or of living hosts.

use super::fake::{Initiator, ScsiTarget};
use super::key::ReservationKey;
use super::rules::{Party, Refusal, ReservationRules, ReservationStorage};
use crate::host::{Host as Name, LeaseClaim};
use crate::sim::{latency, Dice, Sim};
use control::{Code, Failure};
use diskio::reservation::{Reservation, ReservationKind, StorageAnswer};
use std::cell::{Cell as Var, RefCell};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::rc::Rc;
use std::time::Duration;

const BEAT: Duration = super::BEAT;

/// Rules that a test switches off, or breaks.
#[derive(Clone, Copy, Debug)]
struct ReservationSetup {
    rules: ReservationRules,
    kind: ReservationKind,
    /// The operator breaks any reservation at any time, although its holder lives.
    is_mistaken: bool,
    /// Something is reserved at all.
    has_lease: bool,
    /// The reservation is given up when no I/O is under way.
    drains: bool,
    /// Disks of each machine that want the image.
    disks: u8,
    /// One of them at a time has it, or asks for it.
    is_ordered: bool,
    /// A process stops when a write is refused, or when a heartbeat finds the reservation gone.
    stops: bool,
}

impl ReservationSetup {
    fn of(kind: ReservationKind) -> Self {
        Self {
            rules: ReservationRules::ALL,
            kind,
            is_mistaken: false,
            has_lease: true,
            drains: true,
            disks: 2,
            is_ordered: true,
            stops: true,
        }
    }
}

/// The image: which taking its writes are of.
#[derive(Default)]
struct ReservedImage {
    takings: Var<u64>,
    landed: Var<u64>,
    writes: Var<u64>,
    refused: Var<u64>,
    breaks: Var<u64>,
    wrong: RefCell<Option<String>>,
}

impl ReservedImage {
    fn complain(&self, what: String) {
        self.wrong.borrow_mut().get_or_insert(what);
    }
}

struct Schedule {
    setup: ReservationSetup,
    sim: Rc<Sim>,
    dice: Rc<Dice>,
    target: ScsiTarget,
    image: Rc<ReservedImage>,
}

/// A host's view of the storage: each command is done at some time before it ends, if it is, and its answer may be
/// lost.
#[derive(Clone)]
struct HostPath {
    all: Rc<Schedule>,
    by: Initiator,
    /// The storage has not learnt yet that the host was booted.
    is_connected: Rc<Var<bool>>,
}

impl HostPath {
    async fn operate<T: 'static>(
        &self,
        effect: impl FnOnce(&ScsiTarget) -> T + 'static,
    ) -> Result<T, Failure> {
        let (sim, dice) = (&self.all.sim, &self.all.dice);
        if dice.once_in(60) {
            sim.pass(dice.up_to(Duration::from_secs(15))).await;
        }
        let place: Rc<RefCell<Option<T>>> = Rc::default();
        let (takes, fails) = (latency(dice), dice.once_in(40));
        if !fails || dice.once_in(2) {
            let (there, me) = (place.clone(), self.clone());
            // Once asked for it is done, even if the host dies meanwhile, until it is booted.
            sim.after(dice.up_to(takes), move || {
                if me.is_connected.get() {
                    there.replace(Some(effect(&me.all.target)));
                }
            });
        }
        sim.pass(takes).await;
        match place.take() {
            Some(result) if !fails => Ok(result),
            _ => Err(Failure::new(Code::System, "the storage failed")),
        }
    }
}

impl ReservationStorage for HostPath {
    fn now(&self) -> Duration {
        self.all.sim.time()
    }

    async fn sleep(&self, time: Duration) {
        self.all.sim.pass(time).await;
    }

    async fn register(&self, old: u64, new: u64) -> Result<StorageAnswer, Failure> {
        let by = self.by;
        self.operate(move |target| target.register(by, old, new))
            .await
    }

    async fn reserve(&self, key: u64) -> Result<StorageAnswer, Failure> {
        let by = self.by;
        self.operate(move |target| target.reserve(by, key)).await
    }

    async fn preempt(&self, own: u64, victim: u64, aborts: bool) -> Result<StorageAnswer, Failure> {
        let by = self.by;
        self.operate(move |target| target.preempt(by, own, victim, aborts))
            .await
    }

    async fn keys(&self) -> Result<(u32, Vec<u64>), Failure> {
        self.operate(ScsiTarget::keys).await
    }

    async fn reservation(&self) -> Result<Option<Reservation>, Failure> {
        self.operate(ScsiTarget::reservation).await
    }
}

/// A disk of a machine, in one of its boots.
struct ModelDisk {
    way: HostPath,
    party: Party,
    /// One disk of a machine at a time has the image, or asks for it.
    lock: Rc<Var<bool>>,
    /// Its I/O that is under way.
    under_way: Var<u32>,
    /// The taking under which it writes.
    taking: Var<Option<u64>>,
    /// No new I/O.
    quiet: Var<bool>,
}

impl ModelDisk {
    /// A write of the guest.
    fn write(self: &Rc<Self>) {
        let Some(taking) = self.taking.get().filter(|_| !self.quiet.get()) else {
            return;
        };
        let (all, image) = (self.way.all.clone(), self.way.all.image.clone());
        let Some(number) = all.target.begin(self.way.by) else {
            image.refused.set(image.refused.get() + 1);
            if all.setup.stops {
                self.taking.set(None);
            }
            return;
        };
        let me = self.clone();
        self.under_way.set(self.under_way.get() + 1);
        all.sim.clone().after(latency(&all.dice), move || {
            me.under_way.set(me.under_way.get() - 1);
            if !all.target.land(number) {
                return;
            }
            if taking < image.landed.get() {
                let what = format!(
                    "a write of taking {taking} by host {} lands after one of taking {}",
                    me.way.by,
                    image.landed.get()
                );
                image.complain(what);
            }
            image.landed.set(taking.max(image.landed.get()));
            image.writes.set(image.writes.get() + 1);
        });
    }

    /// Takes it, writes for a while, gives it up, and again.
    async fn live(self: Rc<Self>) {
        let (all, way) = (self.way.all.clone(), self.way.clone());
        loop {
            way.sleep(all.dice.up_to(Duration::from_secs(3))).await;
            while all.setup.is_ordered && self.lock.replace(true) {
                way.sleep(Duration::from_millis(10)).await;
            }
            let wait = all.dice.up_to(Duration::from_secs(30));
            let taken = match all.setup.has_lease {
                true => self.party.take(&way, wait).await,
                false => Ok(ReservationKey(1)),
            };
            if let Ok(key) = taken {
                let taking = all.image.takings.get() + 1;
                all.image.takings.set(taking);
                self.hold(key, taking).await;
            }
            self.lock.set(false);
        }
    }

    async fn hold(self: &Rc<Self>, key: ReservationKey, taking: u64) {
        let (all, way) = (self.way.all.clone(), &self.way);
        self.quiet.set(false);
        self.taking.set(Some(taking));
        for _ in 0..1 + all.dice.below(8) {
            for _ in 0..all.dice.below(8) {
                let me = self.clone();
                all.sim.after(all.dice.up_to(BEAT), move || me.write());
            }
            way.sleep(BEAT).await;
            if all.setup.has_lease && all.setup.stops && self.has_lost(key).await {
                break;
            }
        }
        self.quiet.set(all.setup.stops);
        while all.setup.drains && self.under_way.get() > 0 {
            way.sleep(Duration::from_millis(10)).await;
        }
        if all.setup.has_lease {
            self.give_up(key).await;
        }
    }

    /// Until the storage has taken it back.
    async fn give_up(&self, key: ReservationKey) {
        while let Err(refusal) = self.party.give_up(&self.way, key).await {
            if matches!(refusal, Refusal::Lost(_)) {
                return;
            }
            self.way.sleep(Duration::from_millis(500)).await;
        }
    }

    /// A heartbeat.
    async fn has_lost(&self, key: ReservationKey) -> bool {
        let setup = &self.way.all.setup;
        let is_lost = matches!(self.party.keep(&self.way, key).await, Err(Refusal::Lost(_)));
        if is_lost && !setup.is_mistaken {
            let what = format!("host {} has lost a lease that was not broken", self.way.by);
            self.way.all.image.complain(what);
        }
        is_lost || self.taking.get().is_none()
    }
}

impl Schedule {
    fn disk(
        self: &Rc<Self>,
        way: &HostPath,
        boot: u8,
        number: u8,
        lock: &Rc<Var<bool>>,
    ) -> Rc<ModelDisk> {
        let by = way.by;
        Rc::new(ModelDisk {
            way: way.clone(),
            party: Party {
                claim: LeaseClaim {
                    host: Name {
                        name: format!("host{by}"),
                        machine: [by; 16],
                        boot: [boot; 16],
                    },
                    disk: format!("disk {number}"),
                    token: [number; 16],
                },
                rules: self.setup.rules,
            },
            lock: lock.clone(),
            under_way: Var::new(0),
            taking: Var::new(None),
            quiet: Var::new(false),
        })
    }

    fn way(self: &Rc<Self>, by: Initiator) -> HostPath {
        HostPath {
            all: self.clone(),
            by,
            is_connected: Rc::new(Var::new(true)),
        }
    }

    /// A machine with two disks for the image, that dies and is booted again. The storage ends what it had under way
    /// when it comes back, and not before.
    async fn machine(self: Rc<Self>, by: Initiator, dead: Rc<RefCell<Vec<Initiator>>>) {
        for boot in 1.. {
            let (life, way) = (Rc::new(Var::new(true)), self.way(by));
            let lock = Rc::default();
            let disks = (1..=self.setup.disks).map(|number| self.disk(&way, boot, number, &lock));
            let disks: Vec<_> = disks.collect();
            for disk in &disks {
                self.sim.spawn(&life, disk.clone().live());
            }
            let lives = Duration::from_secs(20) + self.dice.up_to(Duration::from_secs(100));
            self.sim.pass(lives).await;
            life.set(false);
            for disk in &disks {
                disk.taking.set(None);
            }
            dead.borrow_mut().push(by);
            let off = Duration::from_secs(5) + self.dice.up_to(Duration::from_secs(60));
            self.sim.pass(off).await;
            dead.borrow_mut().retain(|dead| *dead != by);
            way.is_connected.set(false);
            self.target.disconnect(by);
        }
    }

    /// Breaks reservations, at a host of its own.
    async fn operate(self: Rc<Self>, dead: Rc<RefCell<Vec<Initiator>>>) {
        const OPERATOR: Initiator = 100;
        let breaker = self.disk(&self.way(OPERATOR), 1, 1, &Rc::default());
        loop {
            let pause = self.dice.up_to(Duration::from_secs(20));
            self.sim.pass(pause).await;
            let (Some(held), Some(by)) = (self.target.reservation(), self.target.holder()) else {
                continue;
            };
            // The operator's own is of a break whose end failed.
            let is_over = by == OPERATOR || dead.borrow().contains(&by);
            if is_over || self.setup.is_mistaken {
                let broken = breaker
                    .party
                    .break_off(&breaker.way, ReservationKey(held.key))
                    .await;
                if matches!(broken, Ok(true)) {
                    self.image.breaks.set(self.image.breaks.get() + 1);
                }
            }
        }
    }
}

/// One schedule; what went wrong, if something did.
fn run(setup: ReservationSetup, seed: u64) -> (Rc<ReservedImage>, Option<String>) {
    let sim = Rc::new(Sim::default());
    let all = Rc::new(Schedule {
        setup,
        sim: sim.clone(),
        dice: Rc::new(Dice::new(seed)),
        target: ScsiTarget::of_kind(setup.kind),
        image: Rc::default(),
    });
    let always = Rc::new(Var::new(true));
    let dead = Rc::new(RefCell::default());
    for by in 1..=3 {
        sim.spawn(&always, all.clone().machine(by, Rc::clone(&dead)));
    }
    if setup.has_lease {
        sim.spawn(&always, all.clone().operate(dead));
    }
    sim.run(Duration::from_secs(600));
    let wrong = all.image.wrong.borrow().clone();
    (all.image.clone(), wrong)
}

/// Schedules that a rule which is switched off must be found in.
const SCHEDULES: u64 = 200;

fn found(setup: ReservationSetup) -> Option<(u64, String)> {
    (0..SCHEDULES).find_map(|seed| run(setup, seed).1.map(|wrong| (seed, wrong)))
}

fn nothing_goes_wrong(setup: ReservationSetup) {
    let (mut takings, mut writes, mut refused, mut breaks) = (0, 0, 0, 0);
    // Those of each run are new. A test that fails prints its seed, and `SEED` with that number begins there.
    let wanted = std::env::var("SEED").map(|text| text.parse().expect("SEED is a number"));
    let first = wanted.unwrap_or_else(|_| RandomState::new().build_hasher().finish() >> 32);
    for seed in first..first + SCHEDULES {
        let (image, wrong) = run(setup, seed);
        assert_eq!(wrong, None, "seed {seed}");
        takings += image.takings.get();
        writes += image.writes.get();
        refused += image.refused.get();
        breaks += image.breaks.get();
    }
    println!("{SCHEDULES} schedules: {takings} takings, {breaks} breaks, {writes} writes, {refused} refused");
    // A model that lets no host write would be right in a useless way.
    assert!(takings > 5 * SCHEDULES && writes > 50 * SCHEDULES && breaks > SCHEDULES / 10);
}

const KINDS: [ReservationKind; 2] = [
    ReservationKind::WriteExclusive,
    ReservationKind::WriteExclusiveRegistrants,
];

#[test]
fn s22_three_hosts_write_one_after_the_other_on_reserved_storage() {
    for kind in KINDS {
        nothing_goes_wrong(ReservationSetup::of(kind));
    }
}

#[test]
fn h8_a_break_while_the_holder_lives_makes_no_second_writer_on_reserved_storage() {
    for kind in KINDS {
        nothing_goes_wrong(ReservationSetup {
            is_mistaken: true,
            ..ReservationSetup::of(kind)
        });
    }
}

#[test]
fn h8_a_holder_that_writes_on_without_looking_is_refused_by_the_storage() {
    nothing_goes_wrong(ReservationSetup {
        is_mistaken: true,
        disks: 1,
        stops: false,
        ..ReservationSetup::of(ReservationKind::WriteExclusive)
    });
}

fn is_needed(setup: ReservationSetup) {
    let found = found(setup);
    println!("{found:?}");
    assert!(
        found.is_some(),
        "{setup:?}: no schedule shows that it is needed"
    );
}

#[test]
fn s19_without_a_reservation_late_writes_are_found() {
    is_needed(ReservationSetup {
        has_lease: false,
        ..ReservationSetup::of(ReservationKind::WriteExclusive)
    });
}

#[test]
fn h1_a_reservation_that_is_given_up_with_io_under_way_is_found() {
    is_needed(ReservationSetup {
        drains: false,
        ..ReservationSetup::of(ReservationKind::WriteExclusive)
    });
}

#[test]
fn s05_a_break_that_does_not_abort_is_found() {
    for kind in KINDS {
        let rules = ReservationRules {
            aborts: false,
            ..ReservationRules::ALL
        };
        is_needed(ReservationSetup {
            rules,
            ..ReservationSetup::of(kind)
        });
    }
}

#[test]
fn who_stays_registered_and_writes_on_is_found() {
    let rules = ReservationRules {
        leaves: false,
        ..ReservationRules::ALL
    };
    is_needed(ReservationSetup {
        rules,
        is_mistaken: true,
        is_ordered: false,
        stops: false,
        ..ReservationSetup::of(ReservationKind::WriteExclusiveRegistrants)
    });
}

#[test]
fn h8_what_is_free_after_a_break_is_found() {
    let rules = ReservationRules {
        idles: false,
        ..ReservationRules::ALL
    };
    is_needed(ReservationSetup {
        rules,
        is_mistaken: true,
        ..ReservationSetup::of(ReservationKind::WriteExclusive)
    });
}

#[test]
fn a_disk_that_takes_away_what_another_one_of_its_host_has_is_found() {
    let rules = ReservationRules {
        respects: false,
        ..ReservationRules::ALL
    };
    is_needed(ReservationSetup {
        rules,
        is_ordered: false,
        ..ReservationSetup::of(ReservationKind::WriteExclusive)
    });
}
