// SPDX-License-Identifier: MIT OR Apache-2.0
//! What was counted is asked for at the beginning, and left to the next process again and again.

use super::Session;
use crate::kept::{self, Kept};
use control::tapdisk::Needed;
use std::io;
use std::rc::Rc;
use std::time::Duration;

/// How long the disk waits for something that it can do without.
const PATIENCE: Duration = Duration::from_secs(10);

impl Session {
    /// Asks for the memory that outlives this process, and goes on with what an earlier one counted.
    pub(super) async fn find_kept(&self) {
        let size = kept::SIZE;
        let ask = async { Ok(self.needs.ask(Needed::State { size }).await) };
        let found = match self.runtime.io.within(PATIENCE, ask).await {
            Ok(Ok(given)) => Kept::new(given.fd).map_err(io::Error::from),
            Ok(Err(failure)) => Err(io::Error::other(failure)),
            Err(error) => Err(error.into()),
        };
        let is_new = self.kept.borrow().is_none();
        match found {
            Ok((kept, before)) => {
                if let Some(before) = before.filter(|_| is_new) {
                    *self.stats.borrow_mut() = before;
                }
                *self.kept.borrow_mut() = Some(Rc::new(kept));
            }
            Err(error) => self.note("the next process will count from 0", &error),
        }
    }

    /// Leaves what was counted to the next process, if it is time for that or must be.
    pub(super) fn keep(&self, must: bool) {
        let Some(kept) = self.kept.borrow().clone() else {
            return;
        };
        let stats = self.stats.borrow();
        match kept.is_due(&stats) {
            None => {}
            // Nothing else may happen any more that would wake us by then.
            Some(time) if !must && !time.is_zero() => self.keep_later(&kept, time),
            Some(_) => {
                if let Err(error) = kept.write(&stats) {
                    self.note("what was counted is not kept", &error.into());
                }
            }
        }
    }

    fn keep_later(&self, kept: &Rc<Kept>, time: Duration) {
        if !kept.must_await() {
            return;
        }
        let (runtime, kept) = (self.runtime.clone(), kept.clone());
        self.runtime.tasks.spawn(async move {
            match runtime.io.sleep(time).await {
                Ok(()) => kept.awaited(),
                // From now on it waits until something else happens.
                Err(error) => diskio::say!("tapdisk: what was counted is kept late: {error}"),
            }
        });
    }
}
