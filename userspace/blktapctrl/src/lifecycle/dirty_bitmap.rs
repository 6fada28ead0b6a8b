// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dirty bitmaps: from named moments (marks) on, the disk records where its guest writes, so that repeated copies of
//! the disk take only those blocks (incremental backup).
//!
//! Each mark has a [map](crate::bitmap_files) of the writes from then until the next one. The mark is on the record before the
//! disk's process starts to use its map, so that each later process uses it as well; it is set when the process
//! confirms that, having finished its earlier requests. The changes since a mark are the union of all maps from that
//! one on, those of marks that were never set included: so it does not matter which of them a process uses.
//!
//! A map says too much rather than too little. Where that cannot be had, the marks are gone, and a copy begins anew.

use super::handoff::check_served;
use super::Lifecycle;
use crate::bitmap_files;
use crate::blocking_io::{blocking_io, LIMIT};
use crate::disk::Disk;
use crate::folder;
use crate::log::tell;
use crate::process::{Process, SOON};
use crate::record::MarkRecord;
use control::supervisor::{Mode, What};
use control::tapdisk::{self, Request, State};
use control::{Changed, Code, Failure, Mark, MarkName, MAX_MARKS};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Most maps of a disk, those that are no longer queried included.
const MAX_MAPS: usize = 2 * MAX_MARKS;

impl Lifecycle {
    /// Sets a mark.
    ///
    /// # Errors
    /// It cannot be; or it is not known whether it is, and then it is none: it is to be set once more.
    pub async fn mark(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        name: MarkName,
    ) -> Result<Vec<Mark>, Failure> {
        let _turn = disk.turn().await?;
        let (process, says) = self.introduced(disk).await?;
        if !says.notes {
            return Err(Failure::unsupported(format!(
                "the process of disk {0} is older, and does not track where the guest writes: replace it: \
                 `tap-ctl handoff {0}`",
                disk.minor
            )));
        }
        let wanted = next_mark(disk, name)?;
        let path = self.map(disk, &wanted);
        // The supervisor that created this map may have ended before the record had it.
        remove_map(disk, &path);
        bitmap_files::make(&path, wanted.size, wanted.unit)?;
        let number = wanted.number;
        let added = self.registry.change(disk, |record| {
            // The callers that set those bitmaps have had an error, so they are none.
            let open = record.marks.iter_mut().filter(|mark| !mark.is_set);
            open.for_each(|mark| mark.name = None);
            record.marks.push(wanted);
        });
        if let Err(failure) = added {
            remove_map(disk, &path);
            return Err(failure);
        }
        let map = self.open_notes(disk);
        let asked = async { have_noted(disk, &process, Some(map?)).await };
        match disk.unless_doomed(asked).await {
            Ok(()) => {}
            Err(failure) if matches!(failure.code, Code::Gone | Code::Timeout) => {
                let minor = disk.minor;
                return Err(Failure::new(
                    Code::System,
                    format!("the dirty bitmap of disk {minor} may not have been started, so it is not used: start it again: {failure}"),
                ));
            }
            Err(failure) => {
                // It notes where it did, or nowhere.
                self.registry.change(disk, |record| {
                    record.marks.retain(|mark| mark.number != number)
                })?;
                remove_map(disk, &path);
                return Err(failure);
            }
        }
        self.registry.change(disk, |record| {
            if let Some(last) = record.marks.last_mut() {
                (last.is_set, last.at_ms) = (true, now_ms());
            }
        })?;
        self.tidy_marks(disk).await;
        Ok(self.marks(disk))
    }

    /// The map of a mark.
    fn map(&self, disk: &Disk, mark: &MarkRecord) -> PathBuf {
        self.registry.folder.notes_of(disk.minor, mark.number)
    }

    /// The map in which the disk's process is to note.
    pub(super) fn open_notes(&self, disk: &Disk) -> Result<OwnedFd, Failure> {
        let last = disk.record.borrow().marks.last().cloned();
        let last = last.ok_or_else(|| {
            let why = format!("disk {} has no dirty bitmap", disk.minor);
            Failure::new(Code::NotFound, why)
        })?;
        bitmap_files::open(&self.map(disk, &last))
    }

    /// Takes a mark away. Its map stays as long as an older mark needs it.
    ///
    /// # Errors
    /// There is none, or the record cannot be changed.
    pub async fn unmark(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        name: &MarkName,
    ) -> Result<Vec<Mark>, Failure> {
        let _turn = disk.turn().await?;
        let named = |mark: &MarkRecord| mark.name.as_ref() == Some(name);
        if !disk.record.borrow().marks.iter().any(named) {
            return Err(no_mark(disk, name));
        }
        self.registry.change(disk, |record| {
            for mark in record.marks.iter_mut().filter(|mark| named(mark)) {
                mark.name = None;
            }
            if record.marks.iter().all(|mark| mark.name.is_none()) {
                record.marks.clear();
            }
        })?;
        if disk.record.borrow().marks.is_empty() {
            self.end_notes(disk).await;
        } else {
            self.tidy_marks(disk).await;
            if let Ok(process) = disk.serving() {
                self.tell_unmarked(disk, &process).await;
            }
        }
        Ok(self.marks(disk))
    }

    /// A mark is gone, and the disk's process may know of it. A process that misses this continues to report changes
    /// since the mark, until its end.
    async fn tell_unmarked(&self, disk: &Disk, process: &Process) {
        let told = async {
            match process.introduce(SOON).await?.marks {
                true => process.tell(&Request::Unmarked, None, SOON).await,
                false => Ok(()),
            }
        };
        if let Err(failure) = disk.unless_doomed(told).await {
            tell!(
                warn,
                disk.about().failed(&failure),
                "disk {}: its process does not know yet that a dirty bitmap was removed: {failure}",
                disk.minor
            );
        }
    }

    /// Ends the tracking of the guest's writes. A process that misses this continues to fill its map, which has no use,
    /// until its end.
    async fn end_notes(&self, disk: &Disk) {
        if let Ok(process) = disk.serving() {
            let told = disk.unless_doomed(have_noted(disk, &process, None)).await;
            if let Err(failure) = told {
                tell!(
                    warn,
                    disk.about().failed(&failure),
                    "disk {}: its process notes on where its guest writes: {failure}",
                    disk.minor
                );
            }
        }
        self.remove_maps(disk);
    }

    /// Merges maps that are no longer queried into the one before, or removes them. A map that stays for now does no
    /// harm.
    async fn tidy_marks(&self, disk: &Disk) {
        if let Err(failure) = self.try_to_tidy(disk).await {
            tell!(
                warn,
                disk.about().failed(&failure),
                "disk {}: a map of what its guest wrote stays: {failure}",
                disk.minor
            );
        }
    }

    async fn try_to_tidy(&self, disk: &Disk) -> Result<(), Failure> {
        loop {
            let marks = disk.record.borrow().marks.clone();
            // The process notes in that of the last mark that is set, or in a later one.
            let written = marks.iter().rposition(|mark| mark.is_set).unwrap_or(0);
            let mut still = marks.iter().take(written).enumerate();
            let Some((place, mark)) = still.find(|(_, mark)| mark.name.is_none()) else {
                return Ok(());
            };
            let from = self.map(disk, mark);
            if let Some(before) = place.checked_sub(1) {
                let (theirs, into) = (from.clone(), self.map(disk, &marks[before]));
                let place = into.clone();
                blocking_io(&place, LIMIT, move || bitmap_files::merge(&theirs, &into)).await?;
            }
            self.registry.change(disk, |record| {
                record.marks.retain(|m| m.number != mark.number)
            })?;
            remove_map(disk, &from);
        }
    }

    /// Returns the named marks of a disk that are set.
    #[must_use]
    pub fn marks(&self, disk: &Disk) -> Vec<Mark> {
        let record = disk.record.borrow();
        let mark = |noted: &MarkRecord| {
            Some(Mark {
                name: noted.name.clone()?,
                number: noted.number,
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
    /// There is none of that name, or the changes are not known.
    pub async fn changed(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        since: &MarkName,
        from: u64,
    ) -> Result<Changed, Failure> {
        let _turn = disk.turn().await?;
        self.finish_before(disk).await?;
        check_served(disk)?;
        let found = find(disk, since).ok_or_else(|| no_mark(disk, since))?;
        let status = disk.unless_doomed(disk.serving()?.status()).await?;
        let running = status.disk.filter(|_| status.state == State::Running);
        let size = running.map(|serves| serves.size).ok_or_else(|| {
            let why = format!("disk {} is not served at the moment: ask again", disk.minor);
            Failure::new(Code::State, why)
        })?;
        if status.open.is_none_or(|open| open.notes.is_none()) {
            let why = "its process says that it does not note where the guest writes";
            self.lose_marks(disk, why)?;
            return Err(no_mark(disk, since));
        }
        let maps = self.maps_since(disk, &found);
        self.look(&found, maps, size, from).await
    }

    /// Returns the changes for the disk's process, which gives the size of the disk, and knows itself that it fills a
    /// map. A verb on the disk may be waiting for that process, so this waits for no verb.
    pub(super) async fn changed_of(
        &self,
        disk: &Disk,
        number: u64,
        size: u64,
        from: u64,
    ) -> Result<Changed, Failure> {
        loop {
            let found = numbered(disk, number).ok_or_else(|| {
                let why = format!(
                    "disk {} no longer has the dirty bitmap {number}",
                    disk.minor
                );
                Failure::new(Code::NotFound, why)
            })?;
            let maps = self.maps_since(disk, &found);
            match self.look(&found, maps.clone(), size, from).await {
                // A map became one with the one before meanwhile.
                Err(_) if maps != self.maps_since(disk, &found) => {}
                result => return result,
            }
        }
    }

    /// A mark with this number is set.
    pub(super) fn has_mark(&self, disk: &Disk, number: u64) -> bool {
        numbered(disk, number).is_some()
    }

    /// The map of a mark and all later ones, each with the bytes that the disk had when it was made.
    fn maps_since(&self, disk: &Disk, since: &MarkRecord) -> Vec<(PathBuf, u64)> {
        let record = disk.record.borrow();
        let marks = record.marks.iter();
        let later = marks.filter(|mark| mark.number >= since.number);
        later
            .map(|mark| (self.map(disk, mark), mark.size))
            .collect()
    }

    /// Reads the maps of a mark and of all later ones.
    async fn look(
        &self,
        since: &MarkRecord,
        maps: Vec<(PathBuf, u64)>,
        size: u64,
        from: u64,
    ) -> Result<Changed, Failure> {
        let (folder, unit) = (self.registry.folder.notes(), since.unit);
        let look = move || bitmap_files::look(&maps, size, unit, from);
        let (extents, next) = blocking_io(&folder, LIMIT, look).await?;
        Ok(Changed {
            mark: since.number,
            size,
            extents,
            next,
        })
    }

    /// To be called before a process is to open the image of a disk. One that does not know of marks writes without
    /// noting it; and without its map a disk could not be served any more.
    pub(super) async fn check_marks(&self, disk: &Disk, process: &Process) -> Result<(), Failure> {
        let Some(last) = disk.record.borrow().marks.last().cloned() else {
            return Ok(());
        };
        if !process.introduce(SOON).await?.notes {
            return self.lose_marks(
                disk,
                "its process is older, and does not note where the guest writes",
            );
        }
        match self.map(disk, &last).exists() {
            true => Ok(()),
            false => self.lose_marks(
                disk,
                "where the guest has written was in a file that is gone",
            ),
        }
    }

    /// A disk is as large as its process says. Writes behind the end of a smaller disk are in no map.
    pub(super) async fn note_size(&self, disk: &Disk, process: &Process, serves: &tapdisk::Disk) {
        let was = {
            let record = disk.record.borrow();
            record.marks.iter().map(|mark| mark.size).max()
        };
        if was.is_none_or(|was| was <= serves.size) {
            return;
        }
        if let Err(failure) = self.lose_marks(disk, "the disk has become smaller") {
            tell!(
                error,
                disk.about().failed(&failure),
                "disk {}: {failure}",
                disk.minor
            );
            disk.record.borrow_mut().marks.clear();
            self.remove_maps(disk);
        }
        self.tell_unmarked(disk, process).await;
    }

    /// Drops all marks, because the changes are no longer known.
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
        if let Err(error) = bitmap_files::remove_all(&self.registry.folder, disk.minor) {
            tell!(
                error,
                disk.about().because(&error),
                "cannot remove where the guest of disk {} wrote: {error}",
                disk.minor
            );
        }
    }
}

fn remove_map(disk: &Disk, path: &Path) {
    if let Err(error) = folder::remove(path) {
        tell!(
            error,
            disk.about().because(&error),
            "cannot remove {}: {error}",
            path.display()
        );
    }
}

/// Has a process note in a map, or nowhere.
async fn have_noted(disk: &Disk, process: &Process, map: Option<OwnedFd>) -> Result<(), Failure> {
    let unit = disk.record.borrow().marks.last().map(|mark| mark.unit);
    let question = Request::Note {
        unit: unit.filter(|_| map.is_some()),
    };
    let map = map.as_ref().map(AsFd::as_fd);
    process.tell(&question, map, SOON).await
}

/// A mark that this disk may have.
fn next_mark(disk: &Disk, name: MarkName) -> Result<MarkRecord, Failure> {
    if find(disk, &name).is_some() {
        return Err(Failure::new(
            Code::Exists,
            format!(
                "disk {0} has a mark {name} already: choose another name, or take that one away: `tap-ctl dirty -m {0} \
                 --forget {name}`",
                disk.minor
            ),
        ));
    }
    let record = disk.record.borrow();
    let minor = disk.minor;
    if record.mode != Mode::Write {
        return Err(Failure::invalid(format!(
            "disk {minor} has the mode {}: only of a disk that its guest alone writes is known what has changed",
            record.mode
        )));
    }
    let named = record
        .marks
        .iter()
        .filter(|mark| mark.is_set && mark.name.is_some());
    if named.count() >= MAX_MARKS || record.marks.len() >= MAX_MAPS {
        return Err(Failure::new(
            Code::State,
            format!(
                "disk {minor} has {MAX_MARKS} marks, or what was left of as many, and no more are kept: take one away: \
                 `tap-ctl dirty -m {minor} --forget NAME`"
            ),
        ));
    }
    let size = disk.serves.borrow().as_ref().map(|serves| serves.size);
    let size = size.ok_or_else(|| {
        let why = format!("the size of disk {minor} is not known, because no process serves it");
        Failure::new(Code::State, why)
    })?;
    let (last, now) = (record.marks.last(), now_ms());
    Ok(MarkRecord {
        // So a map never has the name of one that was lost.
        number: last.map_or(now, |last| now.max(last.number + 1)),
        name: Some(name),
        at_ms: now,
        size,
        unit: last.map_or_else(|| bitmap_files::unit(size), |last| last.unit),
        is_set: false,
    })
}

/// A mark that is set.
fn find(disk: &Disk, name: &MarkName) -> Option<MarkRecord> {
    let record = disk.record.borrow();
    let mut marks = record.marks.iter().filter(|mark| mark.is_set);
    marks.find(|mark| mark.name.as_ref() == Some(name)).cloned()
}

/// Returns a mark by its number, if it is set and has a name.
fn numbered(disk: &Disk, number: u64) -> Option<MarkRecord> {
    let record = disk.record.borrow();
    let mut marks = record.marks.iter().filter(|mark| mark.is_set);
    let named = marks.find(|mark| mark.number == number && mark.name.is_some());
    named.cloned()
}

fn no_mark(disk: &Disk, name: &MarkName) -> Failure {
    Failure::new(
        Code::NotFound,
        format!(
            "disk {0} has no dirty bitmap {name}, so the changes since then are unknown: start one, and then copy all of \
             the disk: `tap-ctl dirty -m {0} --mark {name}`",
            disk.minor
        ),
    )
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or(Duration::ZERO).as_millis();
    u64::try_from(now).unwrap_or(u64::MAX)
}
