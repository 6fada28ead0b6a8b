// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disks that this supervisor does not understand: it cannot read the record of an earlier or a newer one, or a process
//! serves a disk without a record. They are left alone, shown and told about, until an administrator says what to do.

use super::Registry;
use crate::blocking_io::{blocking_io, LIMIT};
use crate::folder;
use crate::image::{self, Identity};
use crate::kernel;
use crate::log::{tell, LogContext};
use crate::process::{Process, SOON};
use crate::record::{DesiredState, Record, RecordPeek, UnreadRecord};
use control::supervisor::{Mode, Row, What};
use control::tapdisk::{State, Status};
use control::{Code, Failure};
use rustix::fs::{stat, FileType};
use std::fs;
use std::path::Path;

/// A disk that is left alone.
#[derive(Clone, Debug)]
pub struct IgnoredDisk {
    /// Its node.
    pub minor: u32,
    /// Reason for which it is not understood.
    pub why: String,
    /// The known part of it.
    pub peek: RecordPeek,
    /// A process may serve it.
    pub may_be_served: bool,
}

impl IgnoredDisk {
    /// Returns its row of a list.
    #[must_use]
    pub fn row(&self) -> Row {
        let open = self.peek.open.as_ref();
        Row {
            minor: Some(self.minor),
            pid: self.peek.process.map(|process| process.pid),
            state: None,
            kernel: None,
            target: open.map(|open| open.target.clone()),
            mode: self.peek.mode,
            vbd: self.peek.vbd.clone(),
            disk: None,
            restarts: 0,
            doing: None,
            unknown: Some(self.why.clone()),
            stopped: None,
            state_bytes: 0,
            binary: None,
        }
    }
}

impl Registry {
    /// A record is not understood. The supervisor asks its process about it, because other disks must not get its
    /// image.
    pub async fn leave_alone(&self, unread: UnreadRecord) {
        let Some(minor) = unread.minor else {
            self.knows_not_all();
            self.events.add(None, What::Unknown { why: unread.why });
            return;
        };
        let why = format!(
            "{}; it is served on, but its process is not replaced: take it over (`tap-ctl adopt -m {minor}`), or remove its record (`tap-ctl forget -m {minor}`)",
            unread.why
        );
        let mut unknown = IgnoredDisk {
            minor,
            why: why.clone(),
            peek: *unread.peek,
            may_be_served: true,
        };
        let asked = self.ask_unknown(minor).await;
        unknown.may_be_served = !matches!(asked, Ok(None));
        if let Ok(None) = asked {
            // The process that listened there is dead.
            let socket = self.folder.tapdisk(minor);
            if let Err(error) = folder::remove(&socket) {
                tell!(
                    warn,
                    LogContext::disk(minor).because(&error),
                    "cannot remove {}: {error}",
                    socket.display()
                );
            }
            unknown.peek.process = None;
        }
        if let Ok(Some((process, status))) = asked {
            unknown.peek.process = Some(process.known());
            if let Some(open) = status.open {
                if unknown.peek.identity.is_none() {
                    let image = self.image_of(&open).await.ok().flatten();
                    unknown.peek.identity = image.map(|image| image.identity());
                }
                unknown.peek.open = Some(open);
            }
        }
        self.unknown.borrow_mut().insert(minor, unknown);
        self.events.add(Some(minor), What::Unknown { why });
    }

    /// The process that listens for a disk, and what it says; nothing if there is none.
    async fn ask_unknown(&self, minor: u32) -> Result<Option<(Process, Status)>, Failure> {
        let socket = self.folder.tapdisk(minor);
        match Process::find(&socket, SOON).await? {
            Some(process) => {
                let status = process.status().await?;
                Ok(Some((process, status)))
            }
            None => Ok(None),
        }
    }

    /// All disks that are left alone.
    pub fn left_alone(&self) -> Vec<IgnoredDisk> {
        self.unknown.borrow().values().cloned().collect()
    }

    /// Returns true if the disk is supervised or ignored.
    pub fn knows(&self, minor: u32) -> bool {
        self.disks.borrow().contains_key(&minor) || self.unknown.borrow().contains_key(&minor)
    }

    /// Restores the supervision of an ignored disk: its record is stored, anew if it cannot be read. Nothing if another
    /// caller was faster.
    ///
    /// # Errors
    /// Not enough is known about it.
    pub async fn understand(&self, minor: u32) -> Result<Option<Record>, Failure> {
        if self.get(minor).is_some() {
            return Err(Failure::new(
                Code::Exists,
                format!("disk {minor} is supervised already"),
            ));
        }
        let known = self.unknown.borrow().get(&minor).cloned();
        // It may be readable by now.
        let record = match Record::read(&self.folder.disk(minor)) {
            Ok(record) => record,
            Err(unread) => {
                let peek = known.map_or(*unread.peek, |unknown| unknown.peek);
                self.make_record(minor, peek).await?
            }
        };
        if self.get(minor).is_some() {
            return Ok(None);
        }
        self.records.write(&record).map_err(|error| {
            Failure::system(format!("cannot write down what disk {minor} is"), &error)
        })?;
        self.unknown.borrow_mut().remove(&minor);
        Ok(Some(record))
    }

    /// Refuses what would have to do with a disk that is left alone.
    ///
    /// # Errors
    /// It is one.
    pub fn check_unknown(&self, minor: u32) -> Result<(), Failure> {
        match self.unknown.borrow().get(&minor) {
            None => Ok(()),
            Some(unknown) => Err(Failure::new(
                Code::Busy,
                format!("disk {minor} is ignored: {}", unknown.why),
            )),
        }
    }

    /// Makes the record of a disk anew, of what is left of the old one and what its process and the
    /// kernel say.
    async fn make_record(&self, minor: u32, peek: RecordPeek) -> Result<Record, Failure> {
        let node = kernel::node(&*self.kernel, minor)
            .map_err(|error| Failure::system("cannot ask the kernel", &error))?;
        let node = node.ok_or_else(|| {
            let message =
                format!("node {minor} does not exist any more; to remove its record: `tap-ctl forget -m {minor}`");
            Failure::new(Code::NotFound, message)
        })?;
        let (process, status) = self.ask_unknown(minor).await?.ok_or_else(|| {
            Failure::new(
                Code::State,
                format!(
                    "no process serves disk {minor}, so its properties are unknown: run `tap-ctl forget -m {minor}`, then `tap-ctl free -m {minor}`"
                ),
            )
        })?;
        // Its process may have all of them.
        let parts = peek.all_parts().cloned().collect();
        let mut record = Record::new(minor, peek.policy.unwrap_or_default());
        record.parts = parts;
        if let Some(open) = status.open.filter(|_| status.state != State::Idle) {
            let image = self.image_of(&open).await?;
            if let Some(image) = image {
                let (pid, identity) = (process.pid(), image.identity());
                let place = image.path().to_path_buf();
                let running = status.state == State::Running;
                let holds = blocking_io(&place, LIMIT, move || Ok(holds(pid, identity))).await?;
                // Of an export a process has a connection, which says nothing.
                if running && !holds && !image.is_export() {
                    return Err(image::not_the_same(&image));
                }
                (record.identity, record.born) = (Some(identity), image.born());
            }
            record.mode = peek.mode.unwrap_or(mode_of(open.read_only, open.shared));
            record.open = Some(open);
            record.want = match status.state {
                State::Running | State::Inactive => DesiredState::Served,
                State::Paused => DesiredState::Paused,
                State::Attached | State::Idle => DesiredState::Idle,
            };
        }
        record.files = peek.files;
        if let Some(next) = peek.next {
            if record.open.as_ref().map(|open| &open.target)
                == next.open.as_ref().map(|open| &open.target)
            {
                record.files = next.files;
            }
        }
        record.vbd = match (peek.vbd, node.bound) {
            (Some(vbd), _) => Some(vbd),
            (None, Some((domain, device))) => self.directory_of(minor, domain, device).await?,
            (None, None) => None,
        };
        record.nbd = self.folder.nbd(minor).exists();
        record.inherit_leases(peek.lease, peek.reserved, peek.leases);
        record.process = Some(process.known());
        Ok(record)
    }

    /// The backend's directory of a node that a frontend is bound to.
    async fn directory_of(
        &self,
        minor: u32,
        domain: u32,
        device: u32,
    ) -> Result<Option<String>, Failure> {
        let Some(store) = self.store() else {
            return Ok(None);
        };
        for kind in ["vbd", "vbd3"] {
            let directory = format!("backend/{kind}/{domain}/{device}");
            let its = store.read(&format!("{directory}/tap-minor")).await;
            let its = its.map_err(|error| {
                Failure::system(format!("cannot read {directory} in xenstore"), &error)
            })?;
            if its.and_then(|text| text.parse().ok()) == Some(minor) {
                return Ok(Some(directory));
            }
        }
        Ok(None)
    }

    /// Removes the record of an ignored disk.
    ///
    /// # Errors
    /// It is none, or the record cannot be removed.
    pub fn forget(&self, minor: u32) -> Result<(), Failure> {
        if !self.unknown.borrow().contains_key(&minor) {
            return Err(Failure::new(
                Code::NotFound,
                format!("disk {minor} is not an ignored one (unknown= in `tap-ctl list`)"),
            ));
        }
        self.records.remove(minor).map_err(|error| {
            Failure::system(format!("cannot remove the record of disk {minor}"), &error)
        })?;
        let unknown = self.unknown.borrow_mut().remove(&minor);
        // The image that it serves from stays its own until the next supervisor has looked.
        if let Some(unknown) = unknown.filter(|unknown| unknown.may_be_served) {
            self.forgotten(unknown);
        }
        self.give_memory_back();
        Ok(())
    }
}

fn mode_of(read_only: bool, shared: bool) -> Mode {
    match (read_only, shared) {
        (true, false) => Mode::Read,
        (true, true) => Mode::ReadShared,
        (false, false) => Mode::Write,
        (false, true) => Mode::WriteShared,
    }
}

/// A process has an image open.
fn holds(pid: u32, image: Identity) -> bool {
    let folder = format!("/proc/{pid}/fd");
    let Ok(entries) = fs::read_dir(Path::new(&folder)) else {
        return false;
    };
    let is_it = |entry: std::io::Result<fs::DirEntry>| {
        let stat = stat(entry.ok()?.path()).ok()?;
        let identity = match FileType::from_raw_mode(stat.st_mode) {
            FileType::BlockDevice => Identity::Device { rdev: stat.st_rdev },
            _ => Identity::File {
                dev: stat.st_dev,
                ino: stat.st_ino,
            },
        };
        Some(identity == image)
    };
    entries.filter_map(is_it).any(|is_it| is_it)
}
