// SPDX-License-Identifier: MIT OR Apache-2.0
//! A xenstore in memory, and guests that are suspended when a test says so.

use blktapctrl::domains::Domains;
use blktapctrl::store::{Changes, LaterAnswer, Store};
use control::Failure;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::rc::Rc;
use tokio::sync::mpsc;

/// A path, and the receiver of its changes.
type PathWatch = (String, mpsc::UnboundedSender<String>);

/// Keys and watches.
#[derive(Clone, Default)]
pub(crate) struct FakeStore {
    keys: Rc<RefCell<BTreeMap<String, String>>>,
    watches: Rc<RefCell<Vec<PathWatch>>>,
    /// Prefix of the paths that cannot be read.
    hidden: Rc<RefCell<Option<String>>>,
    /// How often that was tried.
    refused: Rc<Cell<u32>>,
}

impl FakeStore {
    /// Writes keys below a directory.
    pub(crate) fn put(&self, directory: &str, keys: &[(&str, &str)]) {
        for (key, value) in keys {
            let path = format!("{directory}/{key}");
            self.keys.borrow_mut().insert(path.clone(), (*value).into());
            self.tell(&path);
        }
    }

    /// Makes the paths with this prefix unreadable.
    pub(crate) fn hide(&self, begin: &str) {
        self.hidden.replace(Some(begin.into()));
    }

    /// Returns the number of attempts to read them.
    pub(crate) fn refused(&self) -> u32 {
        self.refused.get()
    }

    /// Removes a directory.
    pub(crate) fn drop(&self, directory: &str) {
        let below = format!("{directory}/");
        self.keys
            .borrow_mut()
            .retain(|path, _| path != directory && !path.starts_with(&below));
        self.tell(directory);
    }

    /// The keys of a directory and their values.
    pub(crate) fn below(&self, directory: &str) -> Vec<(String, String)> {
        let below = format!("{directory}/");
        let keys = self.keys.borrow();
        let there = keys.iter().filter(|(path, _)| path.starts_with(&below));
        there
            .map(|(path, value)| (path.clone(), value.clone()))
            .collect()
    }

    /// The value of a key.
    pub(crate) fn get(&self, path: &str) -> Option<String> {
        self.keys.borrow().get(path).cloned()
    }

    fn tell(&self, path: &str) {
        self.watches.borrow_mut().retain(|(at, sender)| {
            let below = path
                .strip_prefix(at.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
            !below || sender.send(path.into()).is_ok()
        });
    }
}

impl Store for FakeStore {
    fn read<'a>(&'a self, path: &'a str) -> LaterAnswer<'a, io::Result<Option<String>>> {
        Box::pin(async move {
            match &*self.hidden.borrow() {
                Some(begin) if path.starts_with(begin) => {
                    self.refused.set(self.refused.get() + 1);
                    Err(io::ErrorKind::PermissionDenied.into())
                }
                _ => Ok(self.get(path)),
            }
        })
    }

    fn list<'a>(&'a self, path: &'a str) -> LaterAnswer<'a, io::Result<Vec<String>>> {
        Box::pin(async move {
            let below = format!("{path}/");
            let keys = self.keys.borrow();
            let names = keys.keys().filter_map(|key| key.strip_prefix(&below));
            let mut names: Vec<String> = names
                .filter_map(|rest| rest.split('/').next().map(str::to_owned))
                .collect();
            names.dedup();
            Ok(names)
        })
    }

    fn write<'a>(&'a self, path: &'a str, value: &'a str) -> LaterAnswer<'a, io::Result<()>> {
        Box::pin(async move {
            self.keys.borrow_mut().insert(path.into(), value.into());
            self.tell(path);
            Ok(())
        })
    }

    fn remove<'a>(&'a self, path: &'a str) -> LaterAnswer<'a, io::Result<()>> {
        Box::pin(async move {
            self.drop(path);
            Ok(())
        })
    }

    fn watch<'a>(&'a self, path: &'a str) -> LaterAnswer<'a, io::Result<Changes>> {
        Box::pin(async move {
            let (sender, mut receiver) = mpsc::unbounded_channel();
            sender.send(path.to_owned()).expect("we have the other end");
            self.watches.borrow_mut().push((path.into(), sender));
            let stream = futures::stream::poll_fn(move |context| receiver.poll_recv(context));
            Ok(Box::pin(stream) as Changes)
        })
    }
}

/// Guests of which a test says that they are suspended.
#[derive(Clone, Default)]
pub(crate) struct FakeDomains(pub(crate) Rc<RefCell<BTreeSet<u32>>>);

impl Domains for FakeDomains {
    fn suspended(&self) -> LaterAnswer<'_, Result<BTreeSet<u32>, Failure>> {
        Box::pin(async { Ok(self.0.borrow().clone()) })
    }
}
