// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory with a name. It is as an image that the supervisor makes for the first disk that names it, of zeroes, and
//! gives back with the last one: who may have it beside whom is decided as of an image.
//!
//! Memory belongs to a disk while the disk's record names it. So there is nothing to count, and an interruption leaves
//! at most unused memory, which is found when a disk ends, or by the next supervisor. Where it is not known what some
//! disk has, nothing is given back and nothing is made anew.

use super::unreadable_records::IgnoredDisk;
use super::Registry;
use crate::folder;
use crate::image::{self, Identity, Image};
use crate::log::{tell, LogContext};
use crate::ram_files;
use crate::record::RecordPeek;
use control::tapdisk::Open;
use control::{Code, Failure, MemoryName, Target};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

/// State of named memory beside the records.
#[derive(Default)]
pub(super) struct NamedMemories {
    /// Memory that running verbs are about to use.
    pinned: RefCell<Vec<(MemoryName, u64)>>,
    /// How many times records are being read at the moment.
    reading: Cell<u32>,
    /// There are disks, or processes, of which nothing is known.
    incomplete: Cell<bool>,
    /// Disks whose records were removed, and which processes may still serve.
    forgotten: RefCell<Vec<IgnoredDisk>>,
}

/// Memory that a disk is about to have: it is not given back meanwhile.
pub struct PinnedMemory {
    registry: Rc<Registry>,
    name: MemoryName,
    size: u64,
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        {
            let mut pinned = self.registry.memories.pinned.borrow_mut();
            let is_ours =
                |(name, size): &(MemoryName, u64)| *name == self.name && *size == self.size;
            if let Some(at) = pinned.iter().position(is_ours) {
                pinned.swap_remove(at);
            }
        }
        // A thread that panics has perhaps recorded more than it knows.
        if !std::thread::panicking() {
            self.registry.give_memory_back();
        }
    }
}

/// Records are being read: of some disks it is not known yet what they have.
pub struct RecordReading(Rc<Registry>);

impl Drop for RecordReading {
    fn drop(&mut self) {
        let left = self.0.memories.reading.get().saturating_sub(1);
        self.0.memories.reading.set(left);
        if !std::thread::panicking() {
            self.0.give_memory_back();
        }
    }
}

/// A user of memory.
struct MemoryUser {
    /// Name of the user, for a message.
    name: String,
    /// Bytes of it, if that is known.
    size: Option<u64>,
}

impl Registry {
    /// Returns the image to be served, for a disk that has it already, or may have it.
    ///
    /// # Errors
    /// It is not there.
    pub async fn image_of(&self, open: &Open) -> Result<Option<Arc<Image>>, Failure> {
        let Some(name) = open.target.name() else {
            return image::of(open).await;
        };
        match ram_files::find_named(&self.folder, name)? {
            Some(image) => Ok(Some(Arc::new(image))),
            None => Err(ram_files::lost(&self.folder, name)),
        }
    }

    /// Returns the image for a disk that is about to use it; memory that no disk has is made. The pin holds the memory
    /// until the record has it.
    ///
    /// # Errors
    /// It is not there, or has another size.
    pub async fn image_for(
        self: &Rc<Self>,
        open: &Open,
    ) -> Result<(Option<Arc<Image>>, Option<PinnedMemory>), Failure> {
        let Some((name, size)) = named(&open.target) else {
            return Ok((self.image_of(open).await?, None));
        };
        if !self.is_memory_of_others(name, size)? {
            ram_files::make_named(&self.folder, name, size)?;
        }
        let pin = (name.clone(), size);
        self.memories.pinned.borrow_mut().push(pin);
        let pinned = PinnedMemory {
            registry: self.clone(),
            name: name.clone(),
            size,
        };
        Ok((self.image_of(open).await?, Some(pinned)))
    }

    /// Returns the image for a query: no memory is made, and memory that would be new is none.
    ///
    /// # Errors
    /// It is not there, or has another size.
    pub async fn image_that_would_be(&self, open: &Open) -> Result<Option<Arc<Image>>, Failure> {
        match named(&open.target) {
            Some((name, size)) if !self.is_memory_of_others(name, size)? => Ok(None),
            _ => self.image_of(open).await,
        }
    }

    /// Whether disks have memory of this name, so that another one gets what they have.
    ///
    /// # Errors
    /// It has another size, is lost, or it is not known whether another disk has it.
    fn is_memory_of_others(&self, name: &MemoryName, size: u64) -> Result<bool, Failure> {
        let image = ram_files::find_named(&self.folder, name)?;
        let users = self.users_of_memory(name, image.as_ref());
        let other = users.iter().find_map(|user| {
            let its = user.size.filter(|its| *its != size)?;
            Some((user, its))
        });
        if let Some((user, its)) = other {
            return Err(Failure::new(
                Code::Exists,
                format!(
                    "the memory {name} has {its} bytes, by which {} has it, and not {size}: write name={name},ram:{its}, \
                     choose another name, or destroy all disks that have it first",
                    user.name
                ),
            ));
        }
        match (image, users.first()) {
            (Some(_), Some(_)) => Ok(true),
            (None, Some(user)) => {
                let lost = ram_files::lost(&self.folder, name);
                let why = format!("{lost}, such as {}", user.name);
                Err(Failure::new(lost.code, why))
            }
            (None, None) => Ok(false),
            (Some(_), None) => match self.may_be_anybodys() {
                None => Ok(false),
                Some(why) => Err(Failure::new(
                    Code::Busy,
                    format!(
                        "the memory {name} is there, and it is not known which disk has it, because {why}; or choose \
                         another name"
                    ),
                )),
            },
        }
    }

    /// Gives back memory that no disk has any more.
    pub fn give_memory_back(&self) {
        let names = match ram_files::names(&self.folder) {
            Ok(names) => names,
            Err(error) => {
                tell!(
                    error,
                    LogContext::default().because(&error),
                    "cannot see in {} which memory has a name: {error}",
                    self.folder.memory().display()
                );
                return;
            }
        };
        if names.is_empty() || self.may_be_anybodys().is_some() {
            return;
        }
        for name in names {
            if let Err(failure) = self.give_back(&name) {
                tell!(
                    error,
                    LogContext::default().failed(&failure),
                    "the memory {name} is not given back: {failure}"
                );
            }
        }
    }

    fn give_back(&self, name: &MemoryName) -> Result<(), Failure> {
        let image = ram_files::find_named(&self.folder, name)?;
        if !self.users_of_memory(name, image.as_ref()).is_empty() {
            return Ok(());
        }
        let place = self.folder.memory_named(name);
        folder::remove(&place)
            .map_err(|error| Failure::system(format!("cannot remove {}", place.display()), &error))
    }

    /// Records are being read from now on, until what is returned is dropped.
    pub fn reading(self: &Rc<Self>) -> RecordReading {
        let reading = self.memories.reading.get().saturating_add(1);
        self.memories.reading.set(reading);
        RecordReading(self.clone())
    }

    /// There are disks or processes of which nothing can be known.
    pub fn knows_not_all(&self) {
        self.memories.incomplete.set(true);
    }

    /// Keeps a disk whose record was removed, and which a process may still serve.
    pub(super) fn forgotten(&self, disk: IgnoredDisk) {
        self.memories.forgotten.borrow_mut().push(disk);
    }

    /// Returns the users of memory of this name, or of this file, under any name.
    fn users_of_memory(&self, name: &MemoryName, image: Option<&Image>) -> Vec<MemoryUser> {
        let file = image.map(Image::identity);
        let mut users = Vec::new();
        let mut look = |who: &str, target: Option<&Target>, identity: Option<Identity>| {
            let said = target.filter(|target| target.name() == Some(name));
            if said.is_some() || (file.is_some() && identity == file) {
                let (name, size) = (who.to_owned(), said.and_then(Target::size));
                users.push(MemoryUser { name, size });
            }
        };
        for disk in self.all() {
            let (who, record) = (disk.name(), disk.record.borrow());
            let open = record.open.as_ref().map(|open| &open.target);
            look(&who, open, record.identity);
            if let Some(next) = &record.next {
                look(&who, Some(&next.open.target), next.identity);
            }
        }
        for left in self.left_alone_or_forgotten() {
            let who = format!("tap disk {}, which is ignored,", left.minor);
            let open = left.peek.open.as_ref().map(|open| &open.target);
            look(&who, open, left.peek.identity);
            if let Some(next) = &left.peek.next {
                let open = next.open.as_ref().map(|open| &open.target);
                look(&who, open, next.identity);
            }
        }
        let pinned = self.memories.pinned.borrow();
        for (_, size) in pinned.iter().filter(|(pinned, _)| pinned == name) {
            let (name, size) = ("a disk that is being made".to_owned(), Some(*size));
            users.push(MemoryUser { name, size });
        }
        users
    }

    fn left_alone_or_forgotten(&self) -> Vec<IgnoredDisk> {
        let mut all = self.left_alone();
        all.extend(self.memories.forgotten.borrow().iter().cloned());
        all
    }

    /// Returns the reason why an unknown disk may have any memory, and the remedy; nothing if all disks are known.
    fn may_be_anybodys(&self) -> Option<String> {
        if self.memories.reading.get() > 0 {
            return Some("records are being read: wait for that".into());
        }
        if self.memories.incomplete.get() {
            return Some(
                "not all records or processes could be read: see `tap-ctl events --after 0`, and start blktapctrl anew"
                    .into(),
            );
        }
        let all = self.left_alone_or_forgotten();
        let unclear = all.iter().find(|disk| has_unknown(&disk.peek))?;
        Some(format!(
            "tap disk {0} is not understood: take it over (`tap-ctl adopt -m {0}`), or remove its record (`tap-ctl forget -m {0}`)",
            unclear.minor
        ))
    }
}

/// The name and the size of the memory that is to be served, if it has a name.
fn named(target: &Target) -> Option<(&MemoryName, u64)> {
    target.name().zip(target.size())
}

/// Whether an ignored disk has, or is to have, an image that is not known.
fn has_unknown(peek: &RecordPeek) -> bool {
    let next = peek.next.as_ref();
    (peek.open.is_none() && peek.identity.is_none())
        || next.is_some_and(|next| next.open.is_none() && next.identity.is_none())
}
