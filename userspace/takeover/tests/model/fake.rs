// SPDX-License-Identifier: MIT OR Apache-2.0
//! A host that is none, at which each call may fail.

use jsonpages::JsonPages;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::sync::OnceLock;
use std::time::Duration;
use takeover::rings::RingHead;
use takeover::{
    take_over, BackendDriver, BegunAttempt, BusDevice, Host, Modules, OfferedLimits, SwapOutcome,
    SwapPlan,
};

/// How long our module takes to give back what it has of a disk, of which the bus waits for nothing.
const GIVES_BACK: Duration = Duration::from_millis(300);

#[derive(Clone, Debug)]
pub(crate) struct FakeVbd {
    pub(crate) driver: Option<BackendDriver>,
    /// The backend has announced persistent grants when the guest connected.
    pub(crate) is_told: bool,
    /// Indexes of its rings.
    pub(crate) rings: Vec<RingHead>,
    /// Its storage does not answer.
    pub(crate) hangs: bool,
}

/// Fault of a call of the host that changes something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HostFault {
    /// The operation fails, and nothing has happened.
    Before,
    /// The operation fails, and has happened.
    After,
    /// We end.
    Killed,
}

#[derive(Default)]
pub(crate) struct FakeHost {
    pub(crate) vbds: RefCell<BTreeMap<BusDevice, FakeVbd>>,
    pub(crate) keys: RefCell<BTreeMap<String, String>>,
    pub(crate) paused: RefCell<BTreeMap<u16, i32>>,
    pub(crate) loaded: RefCell<Vec<BackendDriver>>,
    pub(crate) begun: RefCell<Option<BegunAttempt>>,
    pub(crate) refuses: Cell<Option<BackendDriver>>,
    /// The driver serves with smaller requests than the other one.
    pub(crate) is_small: Cell<Option<BackendDriver>>,
    /// The guest is destroyed when its first disk has no driver.
    pub(crate) vanishes: Cell<bool>,
    /// Calls until the fault.
    pub(crate) fault: Cell<Option<(usize, HostFault)>>,
    pub(crate) calls: Cell<usize>,
    pub(crate) is_dead: Cell<bool>,
    pub(crate) now: Cell<Duration>,
    pub(crate) wrong: RefCell<Vec<String>>,
    /// The module of this driver that is loaded, if it is.
    pub(crate) version: Cell<Version>,
    /// Installed version.
    pub(crate) installed: Cell<Version>,
    /// Version that cannot be loaded.
    pub(crate) unloadable: Cell<Option<Version>>,
    /// Version that takes smaller requests than its guests send.
    pub(crate) weak: Cell<Option<Version>>,
    /// A copy of the module from before is there.
    pub(crate) has_copy: Cell<bool>,
    pub(crate) no_autoprobe: Cell<bool>,
    /// Tap disks have nodes, and those hold the module.
    pub(crate) nodes: Cell<bool>,
    /// Until then our module still has something of a disk that was taken from it.
    gives_back: Cell<Duration>,
    /// There are tap disks.
    pub(crate) has_taps: Cell<bool>,
    /// The supervisor of tap disks does not answer.
    pub(crate) is_silent: Cell<bool>,
    /// A guest that is made while no module is there.
    pub(crate) newcomer: Cell<bool>,
}

/// A module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Version {
    #[default]
    Old,
    New,
}

pub(crate) fn device(domid: u16, handle: u32) -> BusDevice {
    BusDevice::named(&format!("vbd-{domid}-{handle}")).unwrap()
}

impl FakeHost {
    /// Guests 1 and 2 have two disks each, of which one has two queues and one is not connected.
    pub(crate) fn new(from: BackendDriver) -> FakeHost {
        let fake = FakeHost::default();
        fake.loaded.borrow_mut().push(from);
        for (domid, handle, queues) in [(1, 51712, 1), (1, 51728, 2), (2, 51712, 2), (2, 51728, 0)]
        {
            fake.add(from, domid, handle, queues);
        }
        fake
    }

    pub(crate) fn add(&self, from: BackendDriver, domid: u16, handle: u32, queues: u32) {
        let device = device(domid, handle);
        let front = format!("/local/domain/{domid}/device/vbd/{handle}");
        let head = |_| RingHead {
            requested: 40,
            answered: 30,
        };
        // This driver did not say so in its first versions.
        let is_told = from == BackendDriver::C || domid == 2;
        let vbd = FakeVbd {
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

    pub(crate) fn set(&self, key: &str, value: &str) {
        self.keys.borrow_mut().insert(key.into(), value.into());
    }

    pub(crate) fn front(&self, device: &BusDevice, key: &str) -> Option<String> {
        let keys = self.keys.borrow();
        let front = keys.get(&device.back("frontend"))?;
        keys.get(&format!("{front}/{key}")).cloned()
    }

    /// Guests that are not paused send requests, and older ones are answered.
    pub(crate) fn live(&self) {
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
    pub(crate) fn call<T>(&self, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        self.call_that(true, work)
    }

    /// Makes a call; `may_be_done` if it may have happened although it fails.
    pub(crate) fn call_that<T>(
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
                if fault == HostFault::Killed || fault == HostFault::After && may_be_done {
                    work()?;
                }
                self.is_dead.set(fault == HostFault::Killed);
                Err(io::Error::other("planted"))
            }
            _ => work(),
        }
    }

    pub(crate) fn alive(&self) -> io::Result<()> {
        match self.is_dead.get() {
            true => Err(io::Error::other("dead")),
            false => Ok(()),
        }
    }

    pub(crate) fn wrong(&self, what: String) {
        self.wrong.borrow_mut().push(what);
    }

    pub(crate) fn plan(&self, to: BackendDriver) -> SwapPlan {
        SwapPlan {
            from: to.other(),
            to,
            patience: Duration::from_millis(300),
            dry_run: false,
        }
    }

    pub(crate) fn run(&self, to: BackendDriver) -> io::Result<Vec<SwapOutcome>> {
        take_over(self, self.plan(to), &[], |outcome| {
            assert_documented("takeover", outcome);
        })
    }

    /// Checks that a dry run changes nothing, and names the disks that an earlier attempt has left.
    pub(crate) fn only_says(&self, to: BackendDriver, when: &str) {
        let state = || format!("{:?} {:?}", self.keys, self.paused);
        let (before, begun) = (state(), self.begun.borrow().clone());
        let plan = SwapPlan {
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

    pub(crate) fn served_by(&self, driver: BackendDriver) -> usize {
        let vbds = self.vbds.borrow();
        vbds.values()
            .filter(|vbd| vbd.driver == Some(driver))
            .count()
    }

    pub(crate) fn assert_sound(&self, when: &str) {
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
        assert!(!self.no_autoprobe.get(), "{when}");
        assert_eq!(self.nodes.get(), self.has_taps.get(), "{when}: tap disks");
    }

    /// A module is loaded.
    fn insert(&self, version: Version) -> io::Result<()> {
        if self.unloadable.get() == Some(version) {
            return Err(io::Error::other("invalid module format"));
        }
        if !self.no_autoprobe.get() && self.vbds.borrow().values().any(|vbd| vbd.driver.is_none()) {
            self.wrong("a module comes that takes all devices by itself".into());
        }
        self.version.set(version);
        Ok(())
    }
}

impl Host for FakeHost {
    fn devices(&self) -> io::Result<Vec<(BusDevice, Option<BackendDriver>)>> {
        self.alive()?;
        let vbds = self.vbds.borrow();
        let all = vbds
            .iter()
            .map(|(device, vbd)| (device.clone(), vbd.driver));
        Ok(all.collect())
    }

    fn driver(&self, device: &BusDevice) -> io::Result<Option<BackendDriver>> {
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

    fn renew(&self, device: &BusDevice) -> io::Result<bool> {
        let online = self.read(&device.back("online"))?;
        if online.as_deref() == Some("0") {
            return Ok(false);
        }
        self.write(&device.back("state"), "3")?;
        Ok(true)
    }

    fn load(&self, driver: BackendDriver) -> io::Result<()> {
        self.call(|| {
            if !self.loaded.borrow().contains(&driver) {
                if driver == BackendDriver::Rs {
                    self.insert(self.installed.get())?;
                }
                self.loaded.borrow_mut().push(driver);
            }
            Ok(())
        })
    }

    fn is_loaded(&self, driver: BackendDriver) -> io::Result<bool> {
        self.alive()?;
        Ok(self.loaded.borrow().contains(&driver))
    }

    fn modules(&self) -> io::Result<Modules> {
        self.alive()?;
        Ok(
            match (
                self.version.get() == self.installed.get(),
                self.has_copy.get(),
            ) {
                (true, _) => Modules::Same,
                (false, true) => Modules::WayBack,
                (false, false) => Modules::NoWayBack("there".into()),
            },
        )
    }

    fn has_other_copy(&self) -> bool {
        self.has_copy.get() && self.version.get() != Version::Old
    }

    fn load_back(&self) -> io::Result<()> {
        self.call(|| {
            if !self.has_copy.get() {
                return Err(io::ErrorKind::NotFound.into());
            }
            self.insert(Version::Old)?;
            self.loaded.borrow_mut().push(BackendDriver::Rs);
            Ok(())
        })
    }

    fn set_autoprobe(&self, is_on: bool) -> io::Result<()> {
        self.call(|| {
            self.no_autoprobe.set(!is_on);
            Ok(())
        })
    }

    fn ask_supervisor(&self) -> io::Result<()> {
        match self.is_silent.get() {
            true => Err(io::Error::other("it does not answer")),
            false => self.alive(),
        }
    }

    fn park(&self) -> io::Result<()> {
        self.call(|| {
            if self.served_by(BackendDriver::Rs) > 0 {
                return Err(io::Error::other("a guest is attached"));
            }
            if self.now.get() < self.gives_back.get() {
                return Err(io::Error::other("the kernel serves a guest from it"));
            }
            self.nodes.set(false);
            Ok(())
        })
    }

    fn unpark(&self) -> io::Result<()> {
        self.call(|| {
            if !self.loaded.borrow().contains(&BackendDriver::Rs) {
                return Err(io::ErrorKind::NotFound.into());
            }
            self.nodes.set(self.has_taps.get());
            Ok(())
        })
    }

    fn unload(&self, driver: BackendDriver) -> io::Result<()> {
        self.call(|| {
            if self.served_by(driver) > 0 {
                self.wrong(format!("{driver:?} is unloaded and serves"));
            }
            if driver == BackendDriver::Rs && self.nodes.get() {
                return Err(io::ErrorKind::ResourceBusy.into());
            }
            self.loaded.borrow_mut().retain(|other| *other != driver);
            if self.newcomer.take() {
                self.add(driver, 5, 51712, 0);
                let mut vbds = self.vbds.borrow_mut();
                vbds.get_mut(&device(5, 51712)).unwrap().driver = None;
            }
            Ok(())
        })
    }

    fn limits(&self, _: BackendDriver) -> OfferedLimits {
        OfferedLimits {
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

    fn ring(&self, domid: u16, reference: u32) -> io::Result<RingHead> {
        self.live();
        self.alive()?;
        let vbds = self.vbds.borrow();
        let vbd = &vbds[&device(domid, reference / 8)];
        Ok(vbd.rings[reference as usize % 8])
    }

    fn unbind(&self, driver: BackendDriver, device: &BusDevice) -> io::Result<()> {
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
            if driver == BackendDriver::Rs {
                self.gives_back.set(self.now.get() + GIVES_BACK);
            }
            if self.vanishes.get() {
                vbds.retain(|other, _| other.domid != device.domid);
                self.paused.borrow_mut().remove(&device.domid);
            }
            Ok(())
        })
    }

    fn bind(&self, driver: BackendDriver, device: &BusDevice) -> io::Result<()> {
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
            let is_tap = self.keys.borrow().contains_key(&device.back("tap-minor"));
            if is_tap && !self.nodes.get() {
                self.wrong(format!("{} comes before the tap disks", device.name));
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
            let is_weak =
                driver == BackendDriver::Rs && self.weak.get() == Some(self.version.get());
            let segments = match self.is_small.get() == Some(driver) || is_weak {
                true => "16",
                false => "256",
            };
            self.set(&device.back("feature-max-indirect-segments"), segments);
            Ok(())
        })
    }

    fn remember(&self, begun: Option<&BegunAttempt>) -> io::Result<()> {
        self.call(|| {
            *self.begun.borrow_mut() = begun.cloned();
            Ok(())
        })
    }

    fn remembered(&self) -> io::Result<Option<BegunAttempt>> {
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

/// Compares what a verb of xen-blkback-rs prints for programs with the pages of the reference.
pub(crate) fn assert_documented(verb: &str, result: &impl serde::Serialize) {
    static PAGES: OnceLock<JsonPages> = OnceLock::new();
    let pages = PAGES.get_or_init(JsonPages::of_checkout);
    let line = control::json_line(result).expect("JSON");
    pages.assert_documented(&format!("xen-blkback-rs {verb}"), &line);
}
