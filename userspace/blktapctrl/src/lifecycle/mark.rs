// SPDX-License-Identifier: MIT OR Apache-2.0
//! It is noted where a guest writes since moments that have a name: who copies the disk again and again copies only that.
//!
//! Each mark has a [map](crate::notes) of what was written from then until the next one. It is on the record before the
//! disk's process is asked to note there, so that each process after this one does; and it is set when the process says
//! so, having finished what was under way. Whoever asks what has changed since a mark hears all maps from that one on.
//!
//! A map says too much rather than too little. Where that cannot be had, the marks are gone, and a copy begins anew.

use super::handoff::check_served;
use super::Lifecycle;
use crate::apart::{apart, LIMIT};
use crate::disk::Disk;
use crate::folder;
use crate::link::unexpected;
use crate::notes;
use crate::process::SOON;
use crate::record::Noted;
use control::supervisor::{Mode, What};
use control::tapdisk::{self, Reply, Request};
use control::{Changed, Code, Failure, Mark, MarkName, MAX_MARKS};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

impl Lifecycle {
    /// Sets a mark.
    ///
    /// # Errors
    /// It cannot be; or it is not known whether it is, and the same question again finds out.
    pub async fn mark(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        name: MarkName,
    ) -> Result<Vec<Mark>, Failure> {
        let _turn = disk.turn().await?;
        self.finish_before(disk).await?;
        check_served(disk)?;
        let is_pending = disk.record.borrow().marks.last().is_some_and(is_open);
        self.settle_marks(disk).await?;
        if let Some(found) = find(disk, &name) {
            if is_pending && disk.record.borrow().marks.last() == Some(&found) {
                return Ok(self.marks(disk));
            }
            return Err(Failure::new(
                Code::Exists,
                format!(
                    "disk {} has a mark {name} already: choose another name, or take that one away with tap-ctl dirty \
                     --forget {name}",
                    disk.minor
                ),
            ));
        }
        let wanted = self.next_mark(disk, name)?;
        if disk.record.borrow().marks.is_empty() {
            // What a supervisor that has ended may have left.
            self.remove_maps(disk);
        }
        let path = self.registry.folder.notes_of(disk.minor, wanted.number);
        notes::make(&path, size(disk)?, wanted.unit)?;
        let added = |record: &mut crate::record::Record| record.marks.push(wanted);
        if let Err(failure) = self.registry.change(disk, added) {
            self.remove_map(&path);
            return Err(failure);
        }
        match self.settle_marks(disk).await {
            Ok(()) => Ok(self.marks(disk)),
            // The next question finds out.
            Err(failure) if matches!(failure.code, Code::Gone | Code::Timeout) => Err(failure),
            Err(failure) => {
                // It notes where it did, or nowhere.
                self.registry
                    .change(disk, |record| drop(record.marks.pop()))?;
                self.remove_map(&path);
                Err(failure)
            }
        }
    }

    /// A mark that this disk may have.
    fn next_mark(&self, disk: &Disk, name: MarkName) -> Result<Noted, Failure> {
        let record = disk.record.borrow();
        let minor = disk.minor;
        if record.mode != Mode::Write {
            return Err(Failure::invalid(format!(
                "disk {minor} has the mode {}: only of a disk that its guest alone writes is known what has changed",
                record.mode
            )));
        }
        if record.marks.len() >= MAX_MARKS {
            return Err(Failure::new(
                Code::State,
                format!(
                    "disk {minor} has {MAX_MARKS} marks, and no more are kept: take one away with tap-ctl dirty --forget"
                ),
            ));
        }
        let last = record.marks.last();
        let unit = match last {
            Some(last) => last.unit,
            None => notes::unit(size(disk)?),
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Ok(Noted {
            number: last.map_or(1, |last| last.number + 1),
            name: Some(name),
            at_ms: u64::try_from(now.unwrap_or(Duration::ZERO).as_millis()).unwrap_or(u64::MAX),
            unit,
            is_set: false,
        })
    }

    /// Has the disk's process note in the last map, if it was not heard to. The caller has the turn.
    async fn settle_marks(&self, disk: &Disk) -> Result<(), Failure> {
        if !disk.record.borrow().marks.last().is_some_and(is_open) {
            return Ok(());
        }
        let map = self.open_notes(disk)?;
        disk.unless_doomed(self.have_noted(disk, Some(map))).await?;
        self.registry.change(disk, |record| {
            if let Some(last) = record.marks.last_mut() {
                last.is_set = true;
            }
        })?;
        self.tidy_marks(disk).await
    }

    /// The map in which the disk's process is to note.
    pub(super) fn open_notes(&self, disk: &Disk) -> Result<OwnedFd, Failure> {
        let number = disk.record.borrow().marks.last().map(|mark| mark.number);
        let number = number.ok_or_else(|| {
            let why = format!("disk {} has no mark", disk.minor);
            Failure::new(Code::NotFound, why)
        })?;
        notes::open(&self.registry.folder.notes_of(disk.minor, number))
    }

    async fn have_noted(&self, disk: &Disk, map: Option<OwnedFd>) -> Result<(), Failure> {
        let unit = disk.record.borrow().marks.last().map(|mark| mark.unit);
        let question = Request::Note {
            unit: unit.filter(|_| map.is_some()),
        };
        let fds: Vec<_> = map.iter().map(AsFd::as_fd).collect();
        match disk.serving()?.ask(&question, &fds, SOON).await? {
            Reply::Done => Ok(()),
            reply => Err(unexpected(&reply)),
        }
    }

    /// Takes a mark away. Its map stays as long as an older mark needs it.
    ///
    /// # Errors
    /// There is none, or it cannot be written down.
    pub async fn unmark(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        name: &MarkName,
    ) -> Result<Vec<Mark>, Failure> {
        let _turn = disk.turn().await?;
        let found = find(disk, name).ok_or_else(|| no_mark(disk, name))?;
        self.registry.change(disk, |record| {
            for mark in &mut record.marks {
                if mark.number == found.number {
                    mark.name = None;
                }
            }
            if record.marks.iter().all(|mark| mark.name.is_none()) {
                record.marks.clear();
            }
        })?;
        if disk.record.borrow().marks.is_empty() {
            self.end_notes(disk).await;
        } else {
            self.tidy_marks(disk).await?;
        }
        Ok(self.marks(disk))
    }

    /// Nobody wants to know any more where the guest writes. A process that is not told notes on, for nobody, and until
    /// its end.
    async fn end_notes(&self, disk: &Disk) {
        let told = disk.unless_doomed(self.have_noted(disk, None)).await;
        if let Err(failure) = told.or_else(|failure| match failure.code {
            // Nobody serves it.
            Code::Gone | Code::State => Ok(()),
            _ => Err(failure),
        }) {
            tracing::warn!(
                "disk {}: its process notes on where its guest writes: {failure}",
                disk.minor
            );
        }
        self.remove_maps(disk);
    }

    /// Maps that nobody asks for become one with the one before, or go. The last one is being written, and stays.
    async fn tidy_marks(&self, disk: &Disk) -> Result<(), Failure> {
        loop {
            let marks = disk.record.borrow().marks.clone();
            let but_last = marks.len().saturating_sub(1);
            let mut unnamed = marks.iter().take(but_last).enumerate();
            let Some((place, mark)) = unnamed.find(|(_, mark)| mark.name.is_none()) else {
                return Ok(());
            };
            let path = |mark: &Noted| self.registry.folder.notes_of(disk.minor, mark.number);
            if let Some(before) = place.checked_sub(1) {
                let (from, into) = (path(mark), path(&marks[before]));
                let (size, unit) = (size(disk)?, mark.unit);
                let place = into.clone();
                apart(&place, LIMIT, move || {
                    notes::merge(&from, &into, size, unit)
                })
                .await?;
            }
            self.registry.change(disk, |record| {
                record.marks.retain(|m| m.number != mark.number)
            })?;
            self.remove_map(&path(mark));
        }
    }

    /// The marks of a disk that somebody has set.
    #[must_use]
    pub fn marks(&self, disk: &Disk) -> Vec<Mark> {
        let record = disk.record.borrow();
        let mark = |noted: &Noted| {
            Some(Mark {
                name: noted.name.clone()?,
                at_ms: noted.at_ms,
                unit: noted.unit,
            })
        };
        let set = record.marks.iter().filter(|mark| mark.is_set);
        set.filter_map(mark).collect()
    }

    /// Where the guest has written since a mark, from a place on.
    ///
    /// # Errors
    /// There is none of that name, or it cannot be said.
    pub async fn changed(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        since: &MarkName,
        from: u64,
    ) -> Result<Changed, Failure> {
        let _turn = disk.turn().await?;
        self.finish_before(disk).await?;
        check_served(disk)?;
        // What is noted by nobody must not be missing.
        self.settle_marks(disk).await?;
        let found = find(disk, since).ok_or_else(|| no_mark(disk, since))?;
        let maps: Vec<_> = {
            let record = disk.record.borrow();
            let marks = record.marks.iter();
            let since = marks.filter(|mark| mark.number >= found.number);
            since
                .map(|mark| self.registry.folder.notes_of(disk.minor, mark.number))
                .collect()
        };
        let (size, folder) = (size(disk)?, self.registry.folder.memory());
        apart(&folder, LIMIT, move || {
            notes::look(&maps, size, found.unit, from)
        })
        .await
    }

    /// A process serves the disk: if there are marks, it says that it notes. Older ones do not know of that.
    pub(super) fn notes_or_loses(&self, disk: &Disk, serves: &tapdisk::Disk) {
        if serves.notes {
            return;
        }
        if let Err(failure) = self.lose_marks(
            disk,
            "its process is older, and does not note where the guest writes",
        ) {
            // Nobody is told of what was not noted: without the maps nothing is.
            tracing::error!("disk {}: {failure}", disk.minor);
            disk.record.borrow_mut().marks.clear();
            self.remove_maps(disk);
        }
    }

    /// What has changed is not known any more.
    pub(super) fn lose_marks(&self, disk: &Disk, why: &str) -> Result<(), Failure> {
        if disk.record.borrow().marks.is_empty() {
            return Ok(());
        }
        self.registry.change(disk, |record| record.marks.clear())?;
        self.remove_maps(disk);
        let why = why.to_owned();
        self.registry
            .events
            .add(Some(disk.minor), What::Unmarked { why });
        Ok(())
    }

    fn remove_maps(&self, disk: &Disk) {
        if let Err(error) = notes::remove_all(&self.registry.folder, disk.minor) {
            tracing::error!(
                "cannot remove where the guest of disk {} wrote: {error}",
                disk.minor
            );
        }
    }

    fn remove_map(&self, path: &std::path::Path) {
        if let Err(error) = folder::remove(path) {
            tracing::error!("cannot remove {}: {error}", path.display());
        }
    }
}

/// No process was heard to note there.
fn is_open(mark: &Noted) -> bool {
    !mark.is_set
}

fn find(disk: &Disk, name: &MarkName) -> Option<Noted> {
    let record = disk.record.borrow();
    let mut marks = record.marks.iter();
    marks.find(|mark| mark.name.as_ref() == Some(name)).cloned()
}

fn no_mark(disk: &Disk, name: &MarkName) -> Failure {
    Failure::new(
        Code::NotFound,
        format!(
            "disk {} has no mark {name}, so nobody knows what has changed since: copy all of it, and set a mark before \
             with tap-ctl dirty --mark",
            disk.minor
        ),
    )
}

/// Bytes of the disk.
fn size(disk: &Disk) -> Result<u64, Failure> {
    let size = disk.serves.borrow().as_ref().map(|serves| serves.size);
    size.ok_or_else(|| {
        let why = format!(
            "it is not known how large disk {} is: nobody serves it",
            disk.minor
        );
        Failure::new(Code::State, why)
    })
}
