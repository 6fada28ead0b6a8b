// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Requests and keys of a publication, and the view of the toolstack and of the frontend at each moment of it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use xenbus::proto::publish::{self, publish, Present, PublishedKey, Values};
use xenbus::proto::state::{OnlineWish, Publishing, XenbusState};

/// Keys that libxl makes for a disk of a driver domain, its directory among them, and those of the hotplug script.
const TOOLSTACK: usize = 18;
/// Keys that the C driver writes for a disk that can discard, and for one that cannot.
const C_KEYS: [usize; 2] = [14, 11];
/// Keys that a domain may have (`quota-maxentity` and `--entry-nb` of both daemons).
const QUOTA: usize = 1000;

/// An act of the toolstack between two requests of the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meddling {
    Nothing,
    /// `xl block-detach`.
    Detach,
    /// The directory is removed.
    Remove,
    /// The directory is removed, and one of a new device is there.
    Renew,
    /// A key that is none of the backend's business.
    Other,
}

type Tree = BTreeMap<String, String>;

/// The directory of one device in xenstore.
struct DeviceDirectory {
    tree: RefCell<Tree>,
    /// Requests so far.
    requests: Cell<u32>,
    /// Requests of transactions, with their begin and end.
    in_transactions: Cell<u32>,
    meddling: Meddling,
    /// Number of the request before which the toolstack acts.
    at: u32,
    /// Most keys at any time.
    most: Cell<usize>,
    /// Each state that was to be seen, with the tree at that moment.
    seen: RefCell<Vec<Tree>>,
}

fn toolstack(state: &str) -> Tree {
    let keys = [
        ("frontend", "/local/domain/7/device/vbd/51712"),
        ("online", "1"),
        ("state", state),
    ];
    keys.map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
}

impl DeviceDirectory {
    fn new(meddling: Meddling, at: u32) -> Self {
        Self {
            tree: RefCell::new(toolstack("1")),
            requests: Cell::new(0),
            in_transactions: Cell::new(0),
            meddling,
            at,
            most: Cell::new(0),
            seen: RefCell::default(),
        }
    }

    /// The backend's state is InitWait.
    fn offered(&self) {
        self.tree.borrow_mut().insert("state".into(), "2".into());
    }

    fn request(&self) {
        let number = self.requests.get();
        self.requests.set(number + 1);
        if number == self.at {
            self.meddle();
        }
        assert!(number < 1000, "it does not end");
    }

    fn meddle(&self) {
        let mut tree = self.tree.borrow_mut();
        let mut set = |key: &str, value: &str| tree.insert(key.to_owned(), value.to_owned());
        match self.meddling {
            Meddling::Nothing => {}
            Meddling::Detach => {
                set("online", "0");
                set("state", "5");
            }
            Meddling::Remove => tree.clear(),
            Meddling::Renew => *tree = toolstack("1"),
            Meddling::Other => {
                set("physical-device", "fd:1");
            }
        }
    }

    fn see(&self) {
        let tree = self.tree.borrow();
        self.most.set(self.most.get().max(tree.len()));
        self.seen.borrow_mut().push(tree.clone());
    }

    fn get(&self, key: &str) -> Option<String> {
        self.tree.borrow().get(key).cloned()
    }

    /// The backend's keys.
    fn own(&self) -> usize {
        let tree = self.tree.borrow();
        let own = PublishedKey::ALL
            .iter()
            .filter(|key| tree.contains_key(key.name().to_str().unwrap()));
        own.count()
    }
}

impl publish::BackendStore for DeviceDirectory {
    type Error = ();
    type Transaction<'t> = Within<'t>;

    fn present(&mut self) -> Result<Option<Present>, ()> {
        self.request();
        let tree = self.tree.borrow();
        if tree.is_empty() {
            return Ok(None);
        }
        let mut present = Present::default();
        tree.keys().for_each(|name| present.note(name.as_bytes()));
        Ok(Some(present))
    }

    fn write(&mut self, key: PublishedKey, value: u64) -> Result<(), ()> {
        self.request();
        let name = key.name().to_str().unwrap().to_owned();
        self.tree.borrow_mut().insert(name, value.to_string());
        self.see();
        Ok(())
    }

    fn atomically<T>(
        &mut self,
        mut body: impl FnMut(&Within<'_>) -> Result<T, ()>,
    ) -> Result<T, ()> {
        loop {
            let before = self.requests.get();
            self.request();
            let within = Within {
                store: self,
                tree: RefCell::new(self.tree.borrow().clone()),
                read: RefCell::default(),
            };
            let result = body(&within)?;
            let (read, tree) = (within.read.into_inner(), within.tree.into_inner());
            self.request();
            let count = self.requests.get() - before;
            self.in_transactions.set(self.in_transactions.get() + count);
            // Xenstore's daemons begin anew if what was read has changed.
            let same = read.iter().all(|(key, value)| self.get(key) == *value);
            if same {
                let merged = merge(&self.tree.borrow(), &tree, &read);
                *self.tree.borrow_mut() = merged;
                self.see();
                return Ok(result);
            }
        }
    }
}

type Read = BTreeMap<String, Option<String>>;

/// Keys that the transaction has read or written come from it, all others stay.
fn merge(now: &Tree, within: &Tree, read: &Read) -> Tree {
    if within.is_empty() {
        return Tree::new();
    }
    let mut merged = now.clone();
    for key in read.keys() {
        match within.get(key) {
            Some(value) => merged.insert(key.clone(), value.clone()),
            None => merged.remove(key),
        };
    }
    merged
}

struct Within<'t> {
    store: &'t DeviceDirectory,
    tree: RefCell<Tree>,
    read: RefCell<Read>,
}

impl Within<'_> {
    fn read(&self, key: &str) -> Option<String> {
        self.store.request();
        let value = self.tree.borrow().get(key).cloned();
        let mut read = self.read.borrow_mut();
        read.entry(key.to_owned()).or_insert_with(|| value.clone());
        value
    }
}

impl publish::Transaction for Within<'_> {
    type Error = ();

    fn state(&self) -> Result<Option<XenbusState>, ()> {
        let text = self.read("state");
        Ok(text.map(|text| XenbusState::from_number(text.parse().unwrap())))
    }

    fn online(&self) -> Result<OnlineWish, ()> {
        let text = self.read("online");
        Ok(OnlineWish::of(text.map(|text| text.parse().unwrap())))
    }

    fn set_state(&self, state: XenbusState) -> Result<(), ()> {
        self.store.request();
        let number = state.number().to_string();
        self.tree.borrow_mut().insert("state".into(), number);
        Ok(())
    }

    fn remove_leftovers(&self) -> Result<(), ()> {
        if self.read("frontend").is_none() {
            self.store.request();
            self.tree.borrow_mut().clear();
        }
        Ok(())
    }
}

fn offer(queues: u64) -> Values {
    let mut values = Values::default();
    values.set(PublishedKey::Segments, 256);
    values.set(PublishedKey::Queues, queues);
    values.set(PublishedKey::Order, 4);
    values
}

/// A disk as the driver describes it.
fn disk(discard: bool, queues: u64) -> Values {
    let mut values = Values::default();
    values.set(PublishedKey::Flush, 1);
    values.set(PublishedKey::Discard, discard.into());
    if discard {
        values.set(PublishedKey::DiscardGranularity, 4096);
        values.set(PublishedKey::DiscardAlignment, 0);
        values.set(PublishedKey::DiscardSecure, 0);
    }
    values.set(PublishedKey::Barrier, (queues == 1).into());
    values.set(PublishedKey::Segments, 256);
    values.set(PublishedKey::Persistent, 1);
    values.set(PublishedKey::Sectors, 1 << 20);
    values.set(PublishedKey::Info, 0);
    values.set(PublishedKey::SectorSize, 512);
    values.set(PublishedKey::PhysicalSectorSize, 512);
    values
}

/// The value that a frontend takes from the directory, with the defaults of `blkif.h`.
fn read_by_frontend(tree: &Tree, key: PublishedKey) -> Option<u64> {
    let get =
        |key: PublishedKey| -> Option<u64> { tree.get(key.name().to_str().unwrap())?.parse().ok() };
    get(key).or_else(|| match key {
        PublishedKey::PhysicalSectorSize => get(PublishedKey::SectorSize),
        PublishedKey::Queues => Some(1),
        PublishedKey::DiscardGranularity
        | PublishedKey::Sectors
        | PublishedKey::Info
        | PublishedKey::SectorSize => None,
        _ => Some(0),
    })
}

fn connect(store: &mut DeviceDirectory, values: &Values) -> Publishing {
    publish(store, XenbusState::InitWait, XenbusState::Connected, values).unwrap()
}

#[test]
fn a_transaction_has_the_state_and_what_decides_about_it() {
    let mut store = DeviceDirectory::new(Meddling::Nothing, 0);
    let offered = publish(
        &mut store,
        XenbusState::Initialising,
        XenbusState::InitWait,
        &offer(4),
    );
    assert_eq!(offered, Ok(Publishing::Written));
    // Begin, read the state, write it, end: as many as `xenbus_switch_state` has.
    assert_eq!(store.in_transactions.get(), 4);
    assert!(store.requests.get() <= 8, "{:?}", store.requests);

    store.requests.set(0);
    store.in_transactions.set(0);
    assert_eq!(connect(&mut store, &disk(true, 4)), Publishing::Written);
    // Those, and `online`.
    assert_eq!(store.in_transactions.get(), 5);
    assert!(store.requests.get() <= 15, "{:?}", store.requests);
}

#[test]
fn a_disk_has_fewer_keys_than_with_the_c_driver() {
    for (discard, most) in [true, false].into_iter().zip(C_KEYS) {
        for queues in [1, 4] {
            let mut store = DeviceDirectory::new(Meddling::Nothing, 0);
            let offered = publish(
                &mut store,
                XenbusState::Initialising,
                XenbusState::InitWait,
                &offer(queues),
            );
            assert_eq!(offered, Ok(Publishing::Written));
            assert_eq!(
                connect(&mut store, &disk(discard, queues)),
                Publishing::Written
            );
            let own = store.own();
            assert!(own < most, "{own} keys, discard {discard}, queues {queues}");
            let (ours, theirs) = (QUOTA / (TOOLSTACK + own), QUOTA / (TOOLSTACK + most));
            assert!(
                ours > theirs,
                "{ours} disks, and {theirs} with the C driver"
            );
        }
    }
}

#[test]
fn a_frontend_that_sees_the_state_sees_all_values() {
    for discard in [true, false] {
        // The second connection is of another disk than the first: nothing of the first may be left.
        for first in [None, Some(true), Some(false)] {
            let mut store = DeviceDirectory::new(Meddling::Nothing, 0);
            store.offered();
            if let Some(first) = first {
                assert_eq!(connect(&mut store, &disk(first, 1)), Publishing::Written);
                store.offered();
                store.seen.borrow_mut().clear();
            }
            let values = disk(discard, 2);
            assert_eq!(connect(&mut store, &values), Publishing::Written);
            let seen = store.seen.borrow();
            let connected: Vec<_> = seen.iter().filter(|tree| tree["state"] == "4").collect();
            assert!(!connected.is_empty());
            for tree in connected {
                for key in PublishedKey::ALL {
                    if let Some(value) = values.get(key) {
                        assert_eq!(read_by_frontend(tree, key), Some(value), "{key:?}");
                    }
                }
            }
        }
    }
}

/// The toolstack acts before each of the requests, one after the other, until there are no more.
fn at_each_moment(meddling: Meddling, mut check: impl FnMut(&DeviceDirectory, Publishing, &str)) {
    let mut moments = 0;
    for at in 0.. {
        let mut store = DeviceDirectory::new(meddling, at);
        store.offered();
        let result = connect(&mut store, &disk(true, 2));
        let ended = store.requests.get() <= at;
        check(&store, result, &format!("{meddling:?} at {at}"));
        if ended {
            break;
        }
        moments += 1;
    }
    assert!(moments >= 14, "only {moments} moments");
}

#[test]
fn a_device_that_is_taken_away_in_the_middle_is_never_seen_connected() {
    at_each_moment(Meddling::Detach, |store, result, when| {
        let (state, online) = (store.get("state"), store.get("online"));
        match result {
            Publishing::Written => assert_eq!(online.as_deref(), Some("1"), "{when}"),
            _ => assert_eq!(state.as_deref(), Some("5"), "{when}"),
        }
        let seen = store.seen.borrow();
        let bad = |tree: &&Tree| tree["state"] == "4" && tree["online"] == "0";
        assert!(!seen.iter().any(|tree| bad(&tree)), "{when}");
    });
}

#[test]
fn a_directory_that_is_removed_in_the_middle_stays_gone() {
    at_each_moment(Meddling::Remove, |store, result, when| {
        if result == Publishing::Gone {
            let tree = store.tree.borrow();
            assert!(tree.is_empty(), "{when}: {tree:?}");
        } else {
            assert_eq!(result, Publishing::Written, "{when}");
            assert_eq!(store.get("state").as_deref(), Some("4"), "{when}");
        }
    });
}

#[test]
fn the_directory_of_a_new_device_keeps_its_state() {
    at_each_moment(Meddling::Renew, |store, result, when| {
        let state = store.get("state");
        let wanted = match result {
            Publishing::Written => "4",
            _ => "1",
        };
        assert_eq!(state.as_deref(), Some(wanted), "{when}");
        assert!(store.get("frontend").is_some(), "{when}");
    });
}

#[test]
fn a_key_that_the_toolstack_writes_in_the_middle_is_in_nobodys_way() {
    at_each_moment(Meddling::Other, |store, result, when| {
        assert_eq!(result, Publishing::Written, "{when}");
        assert_eq!(store.in_transactions.get(), 5, "{when}: it began anew");
    });
}
