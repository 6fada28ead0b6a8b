// SPDX-License-Identifier: MIT OR Apache-2.0
//! A verb that is ended by a signal cleans up first.

use crate::progress::Progress;
use control::{Code, Failure};
use diskio::Runtime;
use std::cell::Cell;
use std::rc::Rc;

/// Whether it is to end.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stop(Rc<Cell<bool>>);

impl Stop {
    /// From now on SIGINT, SIGTERM and SIGHUP only say that it is to end.
    pub(crate) fn listen(runtime: &Runtime) -> Result<Self, Failure> {
        let failed = |error| Failure::system("cannot wait for signals", &error);
        let signals = diskio::signals(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP]);
        let signals = Rc::new(signals.map_err(failed)?);
        let stop = Self::default();
        let (io, wanted) = (runtime.io.clone(), stop.0.clone());
        runtime.tasks.spawn(async move {
            if let Err(error) = io.readable(&signals).await {
                diskio::say!("tapimg: cannot wait for signals: {error}");
                return;
            }
            wanted.set(true);
        });
        Ok(stop)
    }

    pub(crate) fn is_wanted(&self) -> bool {
        self.0.get()
    }

    /// Says how far it was when it was ended, and what that left behind.
    pub(crate) fn check(&self, progress: &Progress, left: &str) -> Result<(), Failure> {
        match self.is_wanted() {
            true => Err(Failure::new(
                Code::Other,
                format!(
                    "ended by a signal when {} % were done{left}",
                    progress.share()
                ),
            )),
            false => Ok(()),
        }
    }
}
