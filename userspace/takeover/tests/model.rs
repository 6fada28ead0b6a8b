// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whatever fails, and whenever it ends: each disk has a driver, no guest stays paused, and no driver gets a ring on
//! which something is half done.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::time::Duration;
use takeover::rings::Head;
use takeover::{retire, take_over, Begun, Device, Driver, Host, Limits, Outcome, Plan, Retired};

#[derive(Clone, Debug)]
struct Vbd {
    driver: Option<Driver>,
    /// Its guest was told, when it connected, that its pages stay mapped.
    is_told: bool,
    /// Indexes of its rings.
    rings: Vec<Head>,
    /// Its storage does not answer.
    hangs: bool,
}

/// What goes wrong at a call of the host that changes something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// It fails, and nothing has happened.
    Before,
    /// It fails, and has happened.
    After,
    /// We end.
    Killed,
}

#[derive(Default)]
struct Fake {
    vbds: RefCell<BTreeMap<Device, Vbd>>,
    keys: RefCell<BTreeMap<String, String>>,
    paused: RefCell<BTreeMap<u16, i32>>,
    loaded: RefCell<Vec<Driver>>,
    begun: RefCell<Option<Begun>>,
    refuses: Cell<Option<Driver>>,
    /// It serves with smaller requests than the other one.
    is_small: Cell<Option<Driver>>,
    /// The guest is destroyed when its first disk has no driver.
    vanishes: Cell<bool>,
    /// Calls until the fault.
    fault: Cell<Option<(usize, Fault)>>,
    calls: Cell<usize>,
    is_dead: Cell<bool>,
    now: Cell<Duration>,
    wrong: RefCell<Vec<String>>,
}

fn device(domid: u16, handle: u32) -> Device {
    Device::named(&format!("vbd-{domid}-{handle}")).unwrap()
}

impl Fake {
    /// Guests 1 and 2 have two disks each, of which one has two queues and one is not connected.
    fn new(from: Driver) -> Fake {
        let fake = Fake::default();
        fake.loaded.borrow_mut().push(from);
        for (domid, handle, queues) in [(1, 51712, 1), (1, 51728, 2), (2, 51712, 2), (2, 51728, 0)]
        {
            fake.add(from, domid, handle, queues);
        }
        fake
    }

    fn add(&self, from: Driver, domid: u16, handle: u32, queues: u32) {
        let device = device(domid, handle);
        let front = format!("/local/domain/{domid}/device/vbd/{handle}");
        let head = |_| Head {
            requested: 40,
            answered: 30,
        };
        // This driver did not say so in its first versions.
        let is_told = from == Driver::C || domid == 2;
        let vbd = Vbd {
            driver: Some(from),
            is_told,
            rings: (0..queues).map(head).collect(),
            hangs: false,
        };
        let state = if queues > 0 { "4" } else { "2" };
        self.set(&device.back("frontend"), &front);
        self.set(&device.back("state"), state);
        self.set(&device.back("online"), "1");
        self.set(&device.back("feature-max-indirect-segments"), "256");
        self.set(&device.back("dev"), &format!("xvd{handle}"));
        self.set(
            &format!("{front}/state"),
            if queues > 0 { "4" } else { "1" },
        );
        self.set(&format!("{front}/feature-persistent"), "1");
        if is_told {
            self.set(&device.back("feature-persistent"), "1");
        }
        if queues > 1 {
            self.set(
                &format!("{front}/multi-queue-num-queues"),
                &queues.to_string(),
            );
            for queue in 0..queues {
                let key = format!("{front}/queue-{queue}/ring-ref");
                self.set(&key, &(handle * 8 + queue).to_string());
            }
        } else {
            self.set(&format!("{front}/ring-ref"), &(handle * 8).to_string());
        }
        self.vbds.borrow_mut().insert(device, vbd);
    }

    fn set(&self, key: &str, value: &str) {
        self.keys.borrow_mut().insert(key.into(), value.into());
    }

    fn front(&self, device: &Device, key: &str) -> Option<String> {
        let keys = self.keys.borrow();
        let front = keys.get(&device.back("frontend"))?;
        keys.get(&format!("{front}/{key}")).cloned()
    }

    /// Guests that are not paused ask for more, and what was asked is answered.
    fn live(&self) {
        for (device, vbd) in self.vbds.borrow_mut().iter_mut() {
            let is_paused = self
                .paused
                .borrow()
                .get(&device.domid)
                .is_some_and(|n| *n > 0);
            for ring in &mut vbd.rings {
                if !is_paused && ring.requested.wrapping_sub(ring.answered) < 30 {
                    ring.requested = ring.requested.wrapping_add(3);
                }
                if vbd.driver.is_some() && !vbd.hangs && ring.answered != ring.requested {
                    ring.answered = ring.answered.wrapping_add(1);
                }
            }
        }
    }

    /// A call that changes something.
    fn call<T>(&self, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        self.call_that(true, work)
    }

    /// The same; `may_be_done` if it may have happened although it fails.
    fn call_that<T>(
        &self,
        may_be_done: bool,
        work: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        self.live();
        self.alive()?;
        let call = self.calls.get();
        self.calls.set(call + 1);
        match self.fault.get() {
            Some((at, fault)) if at == call => {
                if fault == Fault::Killed || fault == Fault::After && may_be_done {
                    work()?;
                }
                self.is_dead.set(fault == Fault::Killed);
                Err(io::Error::other("planted"))
            }
            _ => work(),
        }
    }

    fn alive(&self) -> io::Result<()> {
        match self.is_dead.get() {
            true => Err(io::Error::other("dead")),
            false => Ok(()),
        }
    }

    fn wrong(&self, what: String) {
        self.wrong.borrow_mut().push(what);
    }

    fn plan(&self, to: Driver) -> Plan {
        Plan {
            from: to.other(),
            to,
            patience: Duration::from_millis(300),
            dry_run: false,
        }
    }

    fn run(&self, to: Driver) -> io::Result<Vec<Outcome>> {
        take_over(self, self.plan(to), &[], |_| ())
    }

    /// Asked for words only, nothing is done, and it is said which disks an earlier attempt has left.
    fn only_says(&self, to: Driver, when: &str) {
        let state = || format!("{:?} {:?}", self.keys, self.paused);
        let (before, begun) = (state(), self.begun.borrow().clone());
        let plan = Plan {
            dry_run: true,
            ..self.plan(to)
        };
        let said = take_over(self, plan, &[], |_| ()).unwrap();
        let unfinished = said.iter().filter(|outcome| outcome.is_unfinished);
        let left: Vec<_> = unfinished.map(|outcome| outcome.left.len()).collect();
        let wanted: Vec<_> = begun.iter().map(|begun| begun.disks.len()).collect();
        assert_eq!(left, wanted, "{when}");
        assert_eq!((state(), &*self.begun.borrow()), (before, &begun), "{when}");
    }

    fn served_by(&self, driver: Driver) -> usize {
        let vbds = self.vbds.borrow();
        vbds.values()
            .filter(|vbd| vbd.driver == Some(driver))
            .count()
    }

    fn assert_sound(&self, when: &str) {
        assert_eq!(*self.wrong.borrow(), [""; 0], "{when}");
        for (device, vbd) in self.vbds.borrow().iter() {
            assert!(
                vbd.driver.is_some(),
                "{when}: {} has no driver",
                device.name
            );
            let state = &self.keys.borrow()[&device.back("state")];
            let wanted = if vbd.rings.is_empty() { "2" } else { "4" };
            assert_eq!(state, wanted, "{when}: {}", device.name);
        }
        let paused = self.paused.borrow();
        assert!(
            paused.values().all(|count| *count == 0),
            "{when}: {paused:?}"
        );
        assert_eq!(*self.begun.borrow(), None, "{when}");
    }
}

impl Host for Fake {
    fn devices(&self) -> io::Result<Vec<(Device, Option<Driver>)>> {
        self.alive()?;
        let vbds = self.vbds.borrow();
        let all = vbds
            .iter()
            .map(|(device, vbd)| (device.clone(), vbd.driver));
        Ok(all.collect())
    }

    fn driver(&self, device: &Device) -> io::Result<Option<Driver>> {
        self.alive()?;
        let vbds = self.vbds.borrow();
        Ok(vbds.get(device).and_then(|vbd| vbd.driver))
    }

    fn read(&self, key: &str) -> io::Result<Option<String>> {
        self.live();
        self.alive()?;
        Ok(self.keys.borrow().get(key).cloned())
    }

    fn write(&self, key: &str, value: &str) -> io::Result<()> {
        self.call(|| {
            self.set(key, value);
            Ok(())
        })
    }

    fn renew(&self, device: &Device) -> io::Result<bool> {
        let online = self.read(&device.back("online"))?;
        if online.as_deref() == Some("0") {
            return Ok(false);
        }
        self.write(&device.back("state"), "3")?;
        Ok(true)
    }

    fn load(&self, driver: Driver) -> io::Result<()> {
        self.call(|| {
            if !self.loaded.borrow().contains(&driver) {
                self.loaded.borrow_mut().push(driver);
            }
            Ok(())
        })
    }

    fn unload(&self, driver: Driver) -> io::Result<()> {
        self.call(|| {
            if self.served_by(driver) > 0 {
                self.wrong(format!("{driver:?} is unloaded and serves"));
            }
            self.loaded.borrow_mut().retain(|other| *other != driver);
            Ok(())
        })
    }

    fn limits(&self, _: Driver) -> Limits {
        Limits {
            queues: Some(4),
            ring_order: Some(4),
            segments: Some(256),
        }
    }

    fn pause(&self, domid: u16) -> io::Result<()> {
        self.call_that(false, || {
            *self.paused.borrow_mut().entry(domid).or_default() += 1;
            Ok(())
        })
    }

    fn unpause(&self, domid: u16) -> io::Result<()> {
        self.call_that(false, || {
            let mut paused = self.paused.borrow_mut();
            match paused.get_mut(&domid) {
                Some(count) if *count > 0 => *count -= 1,
                _ => return Err(io::ErrorKind::InvalidInput.into()),
            }
            Ok(())
        })
    }

    fn ring(&self, domid: u16, reference: u32) -> io::Result<Head> {
        self.live();
        self.alive()?;
        let vbds = self.vbds.borrow();
        let vbd = &vbds[&device(domid, reference / 8)];
        Ok(vbd.rings[reference as usize % 8])
    }

    fn unbind(&self, driver: Driver, device: &Device) -> io::Result<()> {
        self.call(|| {
            let mut vbds = self.vbds.borrow_mut();
            let Some(vbd) = vbds.get_mut(device) else {
                return Err(io::ErrorKind::NotFound.into());
            };
            if vbd.driver != Some(driver) {
                return Err(io::ErrorKind::NotFound.into());
            }
            if !vbd.rings.iter().all(|ring| ring.is_drained()) {
                self.wrong(format!("{} is taken away with requests", device.name));
            }
            vbd.driver = None;
            if self.vanishes.get() {
                vbds.retain(|other, _| other.domid != device.domid);
                self.paused.borrow_mut().remove(&device.domid);
            }
            Ok(())
        })
    }

    fn bind(&self, driver: Driver, device: &Device) -> io::Result<()> {
        self.call(|| {
            let mut vbds = self.vbds.borrow_mut();
            let Some(vbd) = vbds.get_mut(device) else {
                return Err(io::ErrorKind::NotFound.into());
            };
            if !self.loaded.borrow().contains(&driver) {
                return Err(io::ErrorKind::NotFound.into());
            }
            if vbd.driver.is_some() {
                return Err(io::ErrorKind::NotFound.into());
            }
            let keeps = self.front(device, "feature-persistent").as_deref() != Some("0");
            if keeps != vbd.is_told && !vbd.rings.is_empty() {
                let told = vbd.is_told;
                self.wrong(format!(
                    "{}: pages stay mapped: {keeps}, told: {told}",
                    device.name
                ));
            }
            // For who connects from now on.
            self.set(&device.back("feature-persistent"), "1");
            vbd.driver = Some(driver);
            let state = match (vbd.rings.is_empty(), self.refuses.get() == Some(driver)) {
                (true, _) => "2",
                (false, true) => "5",
                (false, false) => "4",
            };
            self.set(&device.back("state"), state);
            let segments = match self.is_small.get() == Some(driver) {
                true => "16",
                false => "256",
            };
            self.set(&device.back("feature-max-indirect-segments"), segments);
            Ok(())
        })
    }

    fn remember(&self, begun: Option<&Begun>) -> io::Result<()> {
        self.call(|| {
            *self.begun.borrow_mut() = begun.cloned();
            Ok(())
        })
    }

    fn remembered(&self) -> io::Result<Option<Begun>> {
        self.alive()?;
        Ok(self.begun.borrow().clone())
    }

    fn sleep(&self, time: Duration) {
        self.live();
        self.now.set(self.now.get() + time);
    }

    fn now(&self) -> Duration {
        self.now.get()
    }

    fn is_interrupted(&self) -> bool {
        false
    }
}

fn both(test: impl Fn(Driver)) {
    Driver::ALL.into_iter().for_each(test);
}

#[test]
fn all_disks_go_to_the_other_driver_which_alone_stays() {
    both(|to| {
        let fake = Fake::new(to.other());
        let outcomes = fake.run(to).unwrap();
        assert_eq!(outcomes.len(), 2);
        assert!(
            outcomes.iter().all(|outcome| outcome.left.is_empty()),
            "{outcomes:?}"
        );
        assert_eq!(fake.served_by(to), 4);
        fake.assert_sound("after all");
        // Somebody uses it yet.
        fake.fault.set(Some((fake.calls.get(), Fault::Before)));
        let retired = retire(&fake, fake.plan(to)).unwrap();
        assert!(matches!(retired, Retired::Stays(_)), "{retired:?}");
        let retired = retire(&fake, fake.plan(to)).unwrap();
        assert!(matches!(retired, Retired::Unloaded), "{retired:?}");
        assert_eq!(*fake.loaded.borrow(), [to]);
    });
}

#[test]
fn storage_that_does_not_answer_keeps_its_disk_where_it_is() {
    both(|to| {
        let fake = Fake::new(to.other());
        fake.vbds
            .borrow_mut()
            .get_mut(&device(1, 51728))
            .unwrap()
            .hangs = true;
        let outcomes = fake.run(to).unwrap();
        assert_eq!((outcomes[0].moved.len(), outcomes[0].left.len()), (1, 1));
        assert!(
            outcomes[0].left[0].why.contains("are not answered"),
            "{outcomes:?}"
        );
        assert_eq!(fake.served_by(to), 3);
        fake.assert_sound("after all");
        let retired = retire(&fake, fake.plan(to)).unwrap();
        assert!(matches!(retired, Retired::Serves), "{retired:?}");
        assert_eq!(fake.loaded.borrow().len(), 2);
    });
}

#[test]
fn a_driver_that_takes_less_than_the_guest_may_send_gives_them_back() {
    both(|to| {
        let fake = Fake::new(to.other());
        fake.is_small.set(Some(to));
        let outcomes = fake.run(to).unwrap();
        assert_eq!(fake.served_by(to), 1, "the one that is not connected");
        let left = &outcomes[0].left[0].why;
        assert!(left.contains("256 indirect segments"), "{left}");
        fake.assert_sound("after all");
    });
}

#[test]
fn a_guest_that_is_destroyed_meanwhile_leaves_nothing_to_do() {
    both(|to| {
        let fake = Fake::new(to.other());
        fake.vanishes.set(true);
        let outcomes = fake.run(to).unwrap();
        assert!(outcomes[0].moved.is_empty() && outcomes[0].left.len() >= 2);
        assert_eq!(fake.vbds.borrow().len(), 0, "{outcomes:?}");
        fake.run(to).unwrap();
        fake.assert_sound("asked again");
    });
}

#[test]
fn a_driver_that_refuses_gives_them_back() {
    both(|to| {
        let fake = Fake::new(to.other());
        fake.refuses.set(Some(to));
        let outcomes = fake.run(to).unwrap();
        assert_eq!(fake.served_by(to), 1, "the one that is not connected");
        assert!(outcomes.iter().any(|outcome| outcome.left.len() == 2));
        fake.assert_sound("after all");
    });
}

#[test]
fn what_is_not_safe_is_refused_by_its_reason() {
    let refused = |to: Driver, prepare: fn(&Fake), words: &str| {
        let fake = Fake::new(to.other());
        prepare(&fake);
        let outcomes = fake.run(to).unwrap();
        let left: Vec<_> = outcomes.iter().flat_map(|outcome| &outcome.left).collect();
        assert!(
            left.len() == 1 && left[0].why.contains(words),
            "{words}: {left:?}"
        );
        assert_eq!(*fake.wrong.borrow(), [""; 0]);
    };
    refused(
        Driver::C,
        |fake| fake.set(&device(1, 51712).back("tap-minor"), "3"),
        "tap disk",
    );
    both(|to| {
        refused(
            to,
            |fake| fake.set(&device(1, 51712).back("online"), "0"),
            "detached",
        );
        refused(
            to,
            |fake| fake.set("/local/domain/1/device/vbd/51712/ring-page-order", "9"),
            "takes 4",
        );
        refused(
            to,
            |fake| {
                fake.set(
                    "/local/domain/1/device/vbd/51728/multi-queue-num-queues",
                    "4000000000",
                )
            },
            "takes 4",
        );
        refused(
            to,
            |fake| fake.set("/local/domain/1/device/vbd/51712/state", "pear"),
            "no number",
        );
        refused(
            to,
            |fake| fake.set("/local/domain/1/device/vbd/51712/ring-ref", "pear"),
            "names no ring",
        );
        refused(
            to,
            |fake| {
                let from = fake.loaded.borrow()[0];
                fake.add(from, 0, 51712, 1);
            },
            "domain 0",
        );
    });
}

#[test]
fn whatever_fails_each_disk_has_a_driver_and_no_guest_is_paused() {
    both(|to| {
        let calls = {
            let fake = Fake::new(to.other());
            fake.run(to).unwrap();
            fake.calls.get()
        };
        assert!(calls > 20, "{calls}");
        for at in 0..calls + 5 {
            for fault in [Fault::Before, Fault::After, Fault::Killed] {
                let when = format!("to {to:?}, {fault:?} at {at}");
                let fake = Fake::new(to.other());
                fake.fault.set(Some((at, fault)));
                let first = fake.run(to);
                let is_finished = first
                    .as_ref()
                    .is_ok_and(|outcomes| outcomes.iter().all(|outcome| !outcome.is_unfinished));
                if !fake.is_dead.get() && is_finished && fake.begun.borrow().is_none() {
                    fake.assert_sound(&when);
                }
                // The next one puts right what is left.
                fake.is_dead.set(false);
                fake.fault.set(None);
                fake.only_says(to, &when);
                let second = fake.run(to);
                let second = second.unwrap_or_else(|error| panic!("{when}: {error}"));
                assert!(
                    second.iter().all(|outcome| outcome.left.is_empty()),
                    "{when}: {second:?}"
                );
                fake.assert_sound(&when);
                assert_eq!(fake.served_by(to), 4, "{when}");
            }
        }
    });
}
