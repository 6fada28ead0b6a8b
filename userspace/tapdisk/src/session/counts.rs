// SPDX-License-Identifier: MIT OR Apache-2.0
//! Statistics: the session loads them at the beginning, and stores them for the next process again and again.

use super::Session;
use crate::stats_file::{self, PersistentStats};
use control::stats::Stats;
use control::tapdisk::RequestedFile;
use diskio::Errno;
use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

/// Time that the disk waits for an answer that it can do without.
const PATIENCE: Duration = Duration::from_secs(10);

impl Session {
    /// Asks for the memory that survives this process, and continues the counts of an earlier one.
    pub(super) async fn find_kept(&self) {
        let size = stats_file::SIZE;
        let ask = async { Ok(self.needs.ask(RequestedFile::State { size }).await) };
        let found = match self.runtime.io.within(PATIENCE, ask).await {
            Ok(Ok(given)) => PersistentStats::new(given.fd).map_err(io::Error::from),
            Ok(Err(failure)) => Err(io::Error::other(failure)),
            Err(error) => Err(error.into()),
        };
        let is_new = self.kept.borrow().is_none();
        match found {
            Ok((kept, before)) => {
                let owed = before.as_ref().and_then(|stats| stats.owed);
                if let Some(before) = before.filter(|_| is_new) {
                    *self.stats.borrow_mut() = before;
                }
                let kept = Rc::new(kept);
                self.lost.keep_by(
                    owed.filter(|_| is_new).map(Errno::from_raw_os_error),
                    keeper(self.stats.clone(), kept.clone()),
                );
                *self.kept.borrow_mut() = Some(kept);
            }
            Err(error) => self.note("the next process will count from 0", &error),
        }
    }

    /// Stores the statistics for the next process, if it is time for that or `must` is set.
    pub(super) fn keep(&self, must: bool) {
        let Some(kept) = self.kept.borrow().clone() else {
            return;
        };
        let stats = self.stats.borrow();
        match kept.is_due(&stats) {
            None => {}
            // No later event may wake this process at that time.
            Some(time) if !must && !time.is_zero() => self.keep_later(&kept, time),
            Some(_) => {
                if let Err(error) = kept.write(&stats) {
                    self.note("statistics are not kept", &error.into());
                }
            }
        }
    }

    fn keep_later(&self, kept: &Rc<PersistentStats>, time: Duration) {
        if !kept.must_await() {
            return;
        }
        let (runtime, kept) = (self.runtime.clone(), kept.clone());
        self.runtime.tasks.spawn(async move {
            match runtime.io.sleep(time).await {
                Ok(()) => kept.awaited(),
                // From now on it waits until something else happens.
                Err(error) => diskio::say!("tapdisk: statistics are kept late: {error}"),
            }
        });
    }
}

/// Returns the function that stores the guest's pending error for the next process, at once.
fn keeper(stats: Rc<RefCell<Stats>>, kept: Rc<PersistentStats>) -> Box<dyn Fn(Option<Errno>)> {
    Box::new(move |owed| {
        stats.borrow_mut().owed = owed.map(Errno::raw_os_error);
        if let Err(error) = kept.write(&stats.borrow()) {
            diskio::say!("tapdisk: the next process does not learn of what was lost: {error}");
        }
    })
}
