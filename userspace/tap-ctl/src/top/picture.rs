// SPDX-License-Identifier: MIT OR Apache-2.0
//! Work of all disks between two looks.

use crate::sample::{HostSample, SampledDisk, Supervisor};
use crate::sample_delta::Figures;
use std::rc::Rc;
use std::time::Duration;

/// All disks at one moment, and what they did since the look before.
pub(super) struct DiskPicture {
    /// The moment.
    pub(super) now: Rc<HostSample>,
    /// How long before that the other look was, and the part of this time that other domains had the processors,
    /// of 1.
    pub(super) since: Option<(Duration, f64)>,
    /// Figures of each disk, in the order of disks.
    figures: Vec<Option<Figures>>,
}

/// A disk, and what it did since the last picture.
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    pub(super) disk: &'a SampledDisk,
    /// Nothing in the first picture that has the disk, or another process of it.
    pub(super) figures: Option<&'a Figures>,
}

impl DiskPicture {
    /// Makes a picture of a look, with the figures since `before`, if that is given.
    pub(super) fn new(before: Option<&HostSample>, now: Rc<HostSample>) -> DiskPicture {
        let figures = |disk: &SampledDisk| {
            let before = before?;
            let old = disk.among(&before.disks)?;
            let pid = |disk: &SampledDisk| disk.tap.as_ref().map(|tap| tap.row.pid);
            (pid(old) == pid(disk)).then_some(())?;
            Figures::between(old, disk, now.at.saturating_duration_since(before.at))
        };
        let figures = now.disks.iter().map(figures).collect();
        let since = before.map(|before| {
            let elapsed = now.at.saturating_duration_since(before.at);
            (elapsed, now.processors.stolen_since(&before.processors))
        });
        DiskPicture {
            figures,
            since,
            now,
        }
    }

    /// The disks, in the order of guests.
    pub(super) fn rows(&self) -> Vec<Row<'_>> {
        let both = self.now.disks.iter().zip(&self.figures);
        both.map(|(disk, figures)| Row {
            disk,
            figures: figures.as_ref(),
        })
        .collect()
    }

    /// Reason why blktapctrl does not answer; nothing if it answers.
    pub(super) fn silent(&self) -> Option<&str> {
        match &self.now.supervisor {
            Supervisor::Silent(why) => Some(why),
            Supervisor::Answers => None,
        }
    }

    /// Returns the failures of the look, with their reasons, a sentence each.
    pub(super) fn lacks(&self) -> Vec<String> {
        let silent = self
            .silent()
            .map(|why| format!("blktapctrl does not answer, so processes are not shown: {why}"));
        let unread = self.now.unread.iter();
        let unread =
            unread.map(|file| format!("cannot read {}: {}", file.path.display(), file.why));
        silent.into_iter().chain(unread).collect()
    }
}

impl Row<'_> {
    /// Requests in a second.
    pub(super) fn load(&self) -> f64 {
        self.figures
            .map_or(0.0, |figures| figures.reads + figures.writes)
    }
}
