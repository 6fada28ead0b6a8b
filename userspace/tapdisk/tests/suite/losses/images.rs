// SPDX-License-Identifier: MIT OR Apache-2.0
//! The images of a disk: the one that it is served from, and the one that it is copied to.

use super::chance::Chance;
use super::storage::{memory, reopen, Volatile};
use super::subject::Subject;
use diskio::{Io, Op, OperationFate};
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::rc::Rc;

/// An image on storage of its own.
#[derive(Clone)]
pub(super) struct StoredImage {
    pub(super) subject: Subject,
    pub(super) storage: Volatile,
    /// Memory that a process leaves to the next one that has the image.
    kept: Rc<RefCell<Option<File>>>,
}

impl StoredImage {
    fn new(subject: Subject, chance: &mut Chance) -> Self {
        Self {
            subject,
            storage: Volatile::new(subject.image(), Chance(chance.next())),
            kept: Rc::default(),
        }
    }

    /// The descriptor that belongs to a question to open it.
    pub(super) fn descriptors(&self) -> Vec<OwnedFd> {
        let has_file = !self.subject.is_export();
        has_file
            .then(|| self.storage.descriptor())
            .into_iter()
            .collect()
    }

    /// The memory for the next process, of `size` bytes.
    pub(super) fn kept(&self, size: u64) -> OwnedFd {
        let mut kept = self.kept.borrow_mut();
        let file = kept.get_or_insert_with(|| {
            let file = memory(&[]);
            file.set_len(size).expect("memory");
            file
        });
        reopen(file, true)
    }
}

/// All images of a disk.
pub(super) struct DiskImages {
    /// The image below others, which never changes.
    pub(super) base: File,
    served: RefCell<StoredImage>,
    /// The image that the disk is copied to, or was until a process died.
    other: RefCell<Option<StoredImage>>,
    /// The process of now copies the disk there.
    is_copied: Cell<bool>,
    chance: RefCell<Chance>,
}

impl DiskImages {
    pub(super) fn new(subject: Subject, mut chance: Chance) -> Rc<Self> {
        Rc::new(Self {
            base: Subject::base(),
            served: RefCell::new(StoredImage::new(subject, &mut chance)),
            other: RefCell::default(),
            is_copied: Cell::new(false),
            chance: RefCell::new(chance),
        })
    }

    pub(super) fn served(&self) -> StoredImage {
        self.served.borrow().clone()
    }

    fn all(&self) -> Vec<StoredImage> {
        let other = self.other.borrow().clone();
        [self.served()].into_iter().chain(other).collect()
    }

    /// The image that a server has.
    pub(super) fn exported(&self) -> Option<StoredImage> {
        let mut all = self.all().into_iter();
        all.find(|image| image.subject.is_export())
    }

    /// A process begins, whose operations on the images are decided here.
    pub(super) fn attend(self: &Rc<Self>, io: &Io) {
        for image in self.all() {
            image.storage.revive();
        }
        let images = self.clone();
        io.decide_by(move |op| images.decide(op));
        let images = self.clone();
        io.forget_by(move |file| {
            let all = images.all().into_iter();
            for image in all.filter(|image| image.storage.is(file)) {
                image.storage.evict();
            }
        });
    }

    fn decide(&self, op: &Op) -> OperationFate {
        let file = match op {
            Op::Read { file, .. }
            | Op::Write { file, .. }
            | Op::Sync { file }
            | Op::Zero { file, .. }
            | Op::Discard { file, .. } => file,
            Op::Ready { .. } | Op::Command { .. } => return OperationFate::Execute,
        };
        let mut all = self.all().into_iter();
        let image = all.find(|image| image.storage.is(file));
        image.map_or(OperationFate::Execute, |image| image.storage.decide(op))
    }

    /// The process is dead.
    pub(super) fn die(&self) {
        for image in self.all() {
            image.storage.die();
        }
        self.is_copied.set(false);
    }

    /// Memory is short.
    pub(super) fn evict(&self) {
        for image in self.all() {
            image.storage.evict();
        }
    }

    /// The image that the disk is to be copied to; nothing if it is being copied, or has no other image.
    pub(super) fn copied(&self) -> Option<StoredImage> {
        let mut chance = self.chance.borrow_mut();
        let subject = self.served().subject.copy(&mut chance);
        let subject = subject.filter(|_| !self.is_copied.get())?;
        // An image from before has old content, which no reader may ever see.
        let mut other = self.other.borrow_mut();
        let other = other.get_or_insert_with(|| StoredImage::new(subject, &mut chance));
        self.is_copied.set(true);
        Some(other.clone())
    }

    /// The disk was being copied until now.
    pub(super) fn has_copy(&self) -> bool {
        self.is_copied.get()
    }

    /// The copying has ended. If it has failed, the supervisor releases the image only with the end of the process, so
    /// this process gets another one.
    pub(super) fn end_copy(&self, has_failed: bool) {
        if self.is_copied.replace(false) && has_failed {
            self.other.take();
        }
    }

    /// The disk is served from the copy from now on.
    pub(super) fn switch(&self) {
        self.is_copied.set(false);
        if let Some(other) = self.other.take() {
            self.served.replace(other);
        }
    }
}
