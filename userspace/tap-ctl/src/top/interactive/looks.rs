// SPDX-License-Identifier: MIT OR Apache-2.0
//! Past looks, and the time of the next one. A look may take any time, and the earlier ones stay until it ends.

use crate::sample::{HostSample, SampledDisk};
use crate::status::verdict::Limits;
use crate::status::{self, Line};
use crate::top::picture::DiskPicture;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// From when on a look takes long: blktapctrl waits a second for processes that do not answer.
const LONG: Duration = Duration::from_secs(2);

/// Past looks.
#[derive(Default)]
pub(super) struct SampleHistory {
    /// The last ones, the newest at the end: as many as a verdict is made of.
    seen: VecDeque<Rc<HostSample>>,
    /// The picture that is shown.
    picture: Option<DiskPicture>,
    /// Since when a look is under way.
    begun: Option<Instant>,
    limits: Limits,
}

impl SampleHistory {
    /// How long it is until the next look; nothing while one is under way.
    pub(super) fn next_in(&self, now: Instant, interval: Duration) -> Option<Duration> {
        if self.begun.is_some() {
            return None;
        }
        let age = self.age(now).unwrap_or(Duration::MAX);
        Some(interval.saturating_sub(age))
    }

    /// A look begins.
    pub(super) fn begin(&mut self, now: Instant) {
        self.begun = Some(now);
    }

    /// A look has come to its end. A look whose picture is not needed any more is dropped.
    pub(super) fn end(&mut self, look: HostSample, is_wanted: bool) {
        self.begun = None;
        if !is_wanted {
            return;
        }
        let look = Rc::new(look);
        let before = self.seen.back().map(Rc::as_ref);
        self.picture = Some(DiskPicture::new(before, look.clone()));
        // The first one that is left is as old as it takes to call a disk hung, or the oldest that there is.
        let is_old = |other: &Rc<HostSample>| {
            look.at.saturating_duration_since(other.at) >= self.limits.hung
        };
        while self.seen.get(1).is_some_and(is_old) {
            self.seen.pop_front();
        }
        self.seen.push_back(look);
    }

    /// Returns the picture that is shown.
    pub(super) fn picture(&self) -> Option<&DiskPicture> {
        self.picture.as_ref()
    }

    /// How old that is.
    pub(super) fn age(&self, now: Instant) -> Option<Duration> {
        let picture = self.picture.as_ref()?;
        Some(now.saturating_duration_since(picture.now.at))
    }

    /// For how long a look has been under way that takes long.
    pub(super) fn late(&self, now: Instant) -> Option<Duration> {
        let taken = now.saturating_duration_since(self.begun?);
        (taken >= LONG).then_some(taken)
    }

    /// Returns the verdict of `tap-ctl status` on a disk of the picture; nothing after a single look.
    pub(super) fn verdict(&self, disk: &SampledDisk) -> Option<Line> {
        let (first, last) = (self.seen.front()?, self.seen.back()?);
        (!Rc::ptr_eq(first, last)).then(|| status::line(disk, first, last, self.limits))
    }
}
