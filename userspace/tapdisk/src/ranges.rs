// SPDX-License-Identifier: MIT OR Apache-2.0
//! Ranges of the disk that requests are working on: requests that overlap, with a write on either side, take effect in
//! the order of their arrival, wherever they come from.
//!
//! The kernel orders the guest's requests among themselves; this orders those of NBD clients and jobs, with each other
//! and with the guest's. Usually there are no such requests, and then a request of the guest costs only its entry.

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// Origin of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The kernel, which has ordered it among its own.
    Guest,
    /// Any other client: an NBD client, or a job.
    Client,
}

/// A part of the disk, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Range {
    pub(crate) from: u64,
    pub(crate) end: u64,
    pub(crate) writes: bool,
}

impl Range {
    fn conflicts(&self, other: &Self) -> bool {
        (self.writes || other.writes) && self.from < other.end && other.from < self.end
    }
}

#[derive(Debug)]
struct RangeEntry {
    /// Numbers requests in the order of their arrival.
    ticket: u64,
    range: Range,
    waker: Option<Waker>,
}

#[derive(Debug, Default)]
struct RangeState {
    next: u64,
    /// By place; places are used again.
    guest: Vec<Option<RangeEntry>>,
    free: Vec<usize>,
    clients: Vec<RangeEntry>,
    /// Entries with a waker.
    waiting: usize,
}

impl RangeState {
    /// Something that came earlier is in the way.
    fn is_blocked(&self, source: Source, ticket: u64, range: &Range) -> bool {
        let before = |entry: &RangeEntry| entry.ticket < ticket && entry.range.conflicts(range);
        self.clients.iter().any(before)
            || (source == Source::Client && self.guest.iter().flatten().any(before))
    }

    fn entry(&mut self, source: Source, place: usize, ticket: u64) -> Option<&mut RangeEntry> {
        match source {
            Source::Guest => self.guest.get_mut(place)?.as_mut(),
            Source::Client => self.clients.iter_mut().find(|entry| entry.ticket == ticket),
        }
    }

    /// Wakes all waiting tasks, which check again.
    fn wake(&mut self) {
        if self.waiting == 0 {
            return;
        }
        self.waiting = 0;
        for entry in self.guest.iter_mut().flatten().chain(&mut self.clients) {
            if let Some(waker) = entry.waker.take() {
                waker.wake();
            }
        }
    }
}

/// The parts that are worked on. Copies are the same thing.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ranges(Rc<RefCell<RangeState>>);

/// A part that is worked on, until this is dropped.
#[derive(Debug)]
#[must_use = "the range is held as long as this"]
pub struct RangeClaim {
    state: Rc<RefCell<RangeState>>,
    source: Source,
    place: usize,
    ticket: u64,
}

impl Ranges {
    /// Waits for everything that came earlier and is in the way.
    pub(crate) async fn claim(&self, source: Source, range: Range) -> RangeClaim {
        let claim = self.enter(source, range);
        poll_fn(|cx| {
            let mut state = self.0.borrow_mut();
            if !state.is_blocked(source, claim.ticket, &range) {
                return Poll::Ready(());
            }
            if let Some(entry) = state.entry(source, claim.place, claim.ticket) {
                let is_new = entry.waker.replace(cx.waker().clone()).is_none();
                state.waiting += usize::from(is_new);
            }
            Poll::Pending
        })
        .await;
        claim
    }

    /// Returns true if a request of the guest would wait for nothing.
    pub(crate) fn is_free_for_guest(&self) -> bool {
        self.0.borrow().clients.is_empty()
    }

    /// Takes a place in the order, without waiting.
    pub(crate) fn enter(&self, source: Source, range: Range) -> RangeClaim {
        let mut state = self.0.borrow_mut();
        let ticket = state.next;
        state.next += 1;
        let entry = RangeEntry {
            ticket,
            range,
            waker: None,
        };
        let place = match source {
            Source::Client => {
                state.clients.push(entry);
                0
            }
            Source::Guest => match state.free.pop() {
                Some(place) => {
                    state.guest[place] = Some(entry);
                    place
                }
                None => {
                    state.guest.push(Some(entry));
                    state.guest.len() - 1
                }
            },
        };
        RangeClaim {
            state: self.0.clone(),
            source,
            place,
            ticket,
        }
    }
}

impl Drop for RangeClaim {
    fn drop(&mut self) {
        let mut state = self.state.borrow_mut();
        let left = match self.source {
            Source::Guest => {
                state.free.push(self.place);
                state.guest[self.place].take()
            }
            Source::Client => {
                let at = state
                    .clients
                    .iter()
                    .position(|entry| entry.ticket == self.ticket);
                at.map(|at| state.clients.swap_remove(at))
            }
        };
        state.waiting -= usize::from(left.is_some_and(|entry| entry.waker.is_some()));
        state.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::{Range, RangeClaim, Ranges, Source};
    use proptest::prelude::*;
    use std::future::Future;
    use std::pin::Pin;
    use std::task::{Context, Poll, Waker};

    type Waiting = Pin<Box<dyn Future<Output = RangeClaim>>>;

    fn ask(ranges: &Ranges, source: Source, from: u64, end: u64, writes: bool) -> Waiting {
        let ranges = ranges.clone();
        let range = Range { from, end, writes };
        Box::pin(async move { ranges.claim(source, range).await })
    }

    fn poll(waiting: &mut Waiting) -> Option<RangeClaim> {
        match waiting
            .as_mut()
            .poll(&mut Context::from_waker(Waker::noop()))
        {
            Poll::Ready(claim) => Some(claim),
            Poll::Pending => None,
        }
    }

    #[test]
    fn order_of_arrival_is_kept() {
        let ranges = Ranges::default();
        let first = poll(&mut ask(&ranges, Source::Guest, 0, 8, true)).unwrap();
        let mut client = ask(&ranges, Source::Client, 4, 12, false);
        assert!(
            poll(&mut client).is_none(),
            "it reads what is being written"
        );
        // This request came after one that waits, and waits behind it.
        let mut second = ask(&ranges, Source::Guest, 10, 11, true);
        assert!(poll(&mut second).is_none());
        assert!(poll(&mut ask(&ranges, Source::Guest, 12, 13, true)).is_some());
        drop(first);
        let held = poll(&mut client).unwrap();
        assert!(poll(&mut second).is_none());
        drop(held);
        assert!(poll(&mut second).is_some());
    }

    #[test]
    fn who_gives_up_is_in_nobodys_way() {
        let ranges = Ranges::default();
        let first = poll(&mut ask(&ranges, Source::Client, 0, 8, false)).unwrap();
        let mut second = ask(&ranges, Source::Client, 0, 8, true);
        assert!(poll(&mut second).is_none());
        let mut third = ask(&ranges, Source::Client, 0, 8, false);
        assert!(poll(&mut third).is_none());
        drop(second);
        assert!(poll(&mut third).is_some());
        drop(first);
        assert_eq!(ranges.0.borrow().waiting, 0);
    }

    proptest! {
        /// No two that overlap are worked on at once, and everybody gets their turn.
        #[test]
        fn nothing_overlaps_and_nobody_is_forgotten(
            wanted in prop::collection::vec((0..20_u64, 1..8_u64, any::<bool>(), any::<bool>()), 1..40),
            picks in prop::collection::vec(any::<prop::sample::Index>(), 200),
        ) {
            let ranges = Ranges::default();
            let mut waiting: Vec<(Range, Source, Waiting)> = Vec::new();
            let mut held: Vec<(Range, Source, RangeClaim)> = Vec::new();
            let mut wanted = wanted.into_iter();
            let mut picks = picks.into_iter();
            loop {
                if let Some((from, len, writes, is_guest)) = wanted.next() {
                    let source = if is_guest { Source::Guest } else { Source::Client };
                    let range = Range { from, end: from + len, writes };
                    waiting.push((range, source, ask(&ranges, source, from, from + len, writes)));
                } else if waiting.is_empty() {
                    break;
                }
                let mut left = Vec::new();
                for (range, source, mut future) in waiting {
                    match poll(&mut future) {
                        Some(claim) => held.push((range, source, claim)),
                        None => left.push((range, source, future)),
                    }
                }
                waiting = left;
                for (at, (range, source, _)) in held.iter().enumerate() {
                    for (other, its, _) in &held[at + 1..] {
                        let both_guest = *source == Source::Guest && *its == Source::Guest;
                        prop_assert!(both_guest || !range.conflicts(other));
                    }
                }
                prop_assert!(!held.is_empty(), "{} wait for each other", waiting.len());
                // Several are held for a while.
                if wanted.len() == 0 || picks.next().is_some_and(|pick| pick.index(4) == 0) {
                    let at = picks.next().map_or(0, |pick| pick.index(held.len()));
                    drop(held.swap_remove(at));
                }
            }
        }
    }
}
