// SPDX-License-Identifier: MIT OR Apache-2.0
//! What happened, for who asks later and for who listens.

mod log;

use crate::disk::Disks;
use crate::log::About;
use control::supervisor::{Event, What};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::watch;

/// Events that are kept.
const KEPT: usize = 1024;

/// The events of this run, numbered from 1.
#[derive(Debug)]
pub struct Events {
    /// What an event is about.
    disks: Rc<Disks>,
    kept: RefCell<VecDeque<Event>>,
    last: watch::Sender<u64>,
}

impl Events {
    /// No events yet, of these disks.
    #[must_use]
    pub fn new(disks: Rc<Disks>) -> Events {
        Events {
            disks,
            kept: RefCell::default(),
            last: watch::Sender::new(0),
        }
    }

    /// Records an event of a disk and writes it to the log.
    pub fn add(&self, minor: Option<u32>, what: What) {
        let number = self.last.borrow().wrapping_add(1);
        log::write(&self.about(minor, &what, number), &what);
        let at_ms = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_millis().try_into().unwrap_or(u64::MAX));
        let mut kept = self.kept.borrow_mut();
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(Event {
            number,
            at_ms,
            minor,
            what,
        });
        self.last.send_replace(number);
    }

    /// What an event is about, for the log.
    fn about(&self, minor: Option<u32>, what: &What, number: u64) -> About {
        let disks = self.disks.try_borrow().ok();
        let disk = disks.and_then(|disks| disks.get(&minor?).cloned());
        let about = match (disk, minor) {
            (Some(disk), _) => disk.about(),
            (None, Some(minor)) => About::disk(minor),
            (None, None) => About::default(),
        };
        About {
            number: Some(number),
            ..log::with(about, what)
        }
    }

    /// Changes whenever there is a new event.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.last.subscribe()
    }

    /// The events after the one numbered `after`. If some of them are not kept any more, the first
    /// one says how many.
    pub fn after(&self, after: u64) -> Vec<Event> {
        let kept = self.kept.borrow();
        let mut events: Vec<Event> = kept
            .iter()
            .filter(|event| event.number > after)
            .cloned()
            .collect();
        if let Some(first) = events.first() {
            let count = first.number - after - 1;
            if count > 0 {
                let lost = Event {
                    number: first.number - 1,
                    at_ms: first.at_ms,
                    minor: None,
                    what: What::Lost { count },
                };
                events.insert(0, lost);
            }
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::{Events, KEPT};
    use control::supervisor::What;
    use std::rc::Rc;

    #[test]
    fn events_are_numbered_without_a_gap() {
        let events = Events::new(Rc::default());
        for _ in 0..3 {
            events.add(Some(4), What::Paused);
        }
        let numbers: Vec<u64> = events.after(1).iter().map(|event| event.number).collect();
        assert_eq!(numbers, [2, 3]);
        assert!(events.after(3).is_empty());
        assert_eq!(*events.subscribe().borrow(), 3);
    }

    #[test]
    fn who_was_away_too_long_is_told() {
        let events = Events::new(Rc::default());
        for _ in 0..KEPT + 5 {
            events.add(None, What::Paused);
        }
        let seen = events.after(0);
        assert_eq!(seen[0].what, What::Lost { count: 5 });
        assert_eq!(seen.len(), KEPT + 1);
        assert_eq!(events.after(5).len(), KEPT);
    }
}
