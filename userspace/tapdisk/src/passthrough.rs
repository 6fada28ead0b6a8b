// SPDX-License-Identifier: MIT OR Apache-2.0
//! Passthrough, which the kernel serves without this process: reads and writes where the image has the disk, on a block
//! device or in a file.
//!
//! Only this process sends mappings to the kernel. For an image that is the disk byte for byte it maps the whole disk,
//! and flushes: when it begins to serve the disk, and again after each discard that the kernel delivered, because the
//! kernel then drops the mapping of that range. For other images it maps [part by part](parts) the ranges that requests
//! to this process touched, and those that it expects next. It revokes all mappings before another process may use the
//! image, and before clients other than the guest use the disk ([`PassthroughBan`]), because the kernel knows only the order of
//! the guest's requests. A revocation waits for I/O of the kernel, in a helper thread, and no mapping is sent during
//! that time.

mod parts;

use control::Failure;
use diskio::{Gate, Io};
use drivers::{Holder, MappedExtent};
use parts::Missed;
use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use tapdev::abi::{
    MapOp, MAP_FLUSH, MAP_NO_BACKING, MAP_READ, MAP_RECALL, MAP_SET, MAP_WRITE, MAP_ZERO,
};
use tapdev::Mapper;

/// The number of the backing that is the image; the supervisor gives it to the kernel.
const BACKING: u16 = 0;

/// An image that the kernel may use.
#[derive(Clone, Debug)]
pub(crate) struct PassthroughImage {
    /// Runtime whose helper thread waits during a revocation.
    pub(crate) io: Io,
    pub(crate) mapper: Arc<dyn Mapper>,
    /// Bytes of the disk.
    pub(crate) size: u64,
    pub(crate) writable: bool,
    /// True if the disk is in the image in parts, whose places the driver reports.
    pub(crate) in_parts: bool,
}

impl PassthroughImage {
    /// Returns the mappings for the kernel, for a generation of its table.
    fn ops(&self, generation: u32) -> Vec<MapOp> {
        let set = self.set(
            &MappedExtent {
                offset: 0,
                len: self.size,
                holder: Holder::Image,
                at: 0,
                writable: true,
            },
            generation,
        );
        let flush = MapOp {
            op: MAP_FLUSH,
            ..MapOp::default()
        };
        // A read-only disk needs no flushes.
        let flush = self.writable.then_some(flush);
        [set].into_iter().chain(flush).collect()
    }

    /// Returns the mapping of a part of the disk, for a generation of the kernel's table.
    fn set(&self, place: &MappedExtent, generation: u32) -> MapOp {
        let (backing, flags) = match place.holder {
            Holder::Image if self.writable && place.writable => (BACKING, MAP_WRITE),
            Holder::Image => (BACKING, 0),
            Holder::Below(number) => (number, 0),
            Holder::Nothing => (MAP_NO_BACKING, MAP_ZERO),
        };
        MapOp {
            op: MAP_SET,
            flags: MAP_READ | flags,
            backing,
            generation,
            sector: place.offset >> 9,
            sectors: place.len >> 9,
            offset: place.at,
            ..MapOp::default()
        }
    }
}

/// State of the kernel's mappings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum KernelMappings {
    /// The kernel has no valid mapping.
    #[default]
    Nothing,
    /// This process has sent none; I/O by mappings of the previous process may still be under way.
    Before,
    /// This process has sent mappings.
    Image,
    /// A revocation is under way or has failed, so the kernel may still be using the image.
    Recalled,
}

/// Passthrough of a disk.
#[derive(Debug, Default)]
pub struct Direct {
    image: RefCell<Option<PassthroughImage>>,
    told: Cell<KernelMappings>,
    /// True if the mapping of the disk is to be sent.
    due: Cell<bool>,
    /// True if the mapping is to be sent once the kernel has the earlier answers, because an answer also drops the
    /// mapping of its range.
    due_later: Cell<bool>,
    /// True if no more mappings of this image are sent, because the kernel cannot use it or refuses them.
    is_vain: Cell<bool>,
    /// Number of [`PassthroughBan`]s.
    bans: Cell<u32>,
    /// Number of requests under way whose ranges the kernel has dropped from its mappings.
    forgets: Cell<u32>,
    /// Ranges whose mappings are to be sent.
    missed: Missed,
    /// Grows when places that were looked up before may have changed without the kernel's knowledge.
    era: Cell<u64>,
    /// Serialises revocations.
    gate: Gate,
}

/// Passthrough is suspended while this exists.
#[derive(Debug)]
#[must_use = "the kernel may use the image again when this is dropped"]
pub(crate) struct PassthroughBan(Rc<Direct>);

impl PassthroughBan {
    fn new(direct: &Rc<Direct>) -> Self {
        direct.bans.set(direct.bans.get() + 1);
        direct.end_era();
        Self(direct.clone())
    }
}

impl Drop for PassthroughBan {
    fn drop(&mut self) {
        self.0.bans.set(self.0.bans.get() - 1);
    }
}

/// A request whose range the kernel has dropped from its mappings, until it is answered.
#[derive(Debug)]
pub(crate) struct ForgottenRange(Rc<Direct>);

impl Drop for ForgottenRange {
    fn drop(&mut self) {
        self.0.forgets.set(self.0.forgets.get() - 1);
        self.0.due_later.set(true);
    }
}

impl Direct {
    /// From now on the kernel may use this image.
    pub(crate) fn offer(&self, image: PassthroughImage) {
        self.missed.begin(image.in_parts);
        self.end_era();
        *self.image.borrow_mut() = Some(image);
        if self.told.get() == KernelMappings::Nothing {
            self.told.set(KernelMappings::Before);
        }
        self.is_vain.set(false);
        self.due.set(true);
    }

    fn end_era(&self) {
        self.era.set(self.era.get().wrapping_add(1));
    }

    /// The kernel may be using the image.
    pub(crate) fn is_used(&self) -> bool {
        self.told.get() != KernelMappings::Nothing && self.image.borrow().is_some()
    }

    /// The disk has another size.
    pub(crate) fn resize(&self, size: u64) {
        if let Some(image) = self.image.borrow_mut().as_mut() {
            image.size = size;
            self.due.set(true);
        }
    }

    /// DirtyBitmap that the kernel has dropped the mapping of a delivered request's range; this process sends one new mapping
    /// once all such requests are over.
    pub(crate) fn forgets(self: &Rc<Self>) -> ForgottenRange {
        self.forgets.set(self.forgets.get() + 1);
        ForgottenRange(self.clone())
    }

    /// DirtyBitmap that earlier answers are on their way: they reach the kernel before a mapping that the next turn sends.
    pub(crate) fn answered(&self) {
        if self.forgets.get() == 0 && self.due_later.take() {
            self.due.set(true);
        }
    }

    /// Tells the kernel where the disk is, if it is time for that. To be called again and again.
    pub(crate) fn turn(&self) {
        if !self.due.get() || self.forgets.get() > 0 || !self.may_tell() {
            return;
        }
        self.due.set(false);
        let image = self.image.borrow().clone();
        if let Some(image) = image.filter(|image| !image.in_parts) {
            self.told_or_vain(self.tell(&image));
        }
    }

    /// Returns true if mappings may be sent.
    fn may_tell(&self) -> bool {
        !self.is_vain.get() && self.bans.get() == 0 && self.told.get() != KernelMappings::Recalled
    }

    fn told_or_vain(&self, told: io::Result<()>) {
        if let Err(error) = told {
            diskio::say!("tapdisk: the kernel does not serve the disk by itself: {error}");
            self.is_vain.set(true);
        }
    }

    fn tell(&self, image: &PassthroughImage) -> io::Result<()> {
        let Some((generation, _)) = self.generation(image)? else {
            return Ok(());
        };
        self.told.set(KernelMappings::Image);
        image.mapper.maps(&image.ops(generation)).map(drop)
    }

    /// Returns the generation of the kernel's mappings and one bit for each backing; `None` if the supervisor has not
    /// given the image to the kernel.
    fn generation(&self, image: &PassthroughImage) -> io::Result<Option<(u32, u32)>> {
        let now = image.mapper.maps(&[])?;
        let has_image = now.backings >> BACKING & 1 != 0;
        self.is_vain.set(!has_image);
        Ok(has_image.then_some((now.generation, now.backings)))
    }

    /// Waits until no I/O of the kernel in passthrough is under way. Passthrough stays suspended until the ban is
    /// dropped.
    ///
    /// # Errors
    /// The kernel returns an error. The kernel may be using the image.
    pub(crate) async fn forbid(self: &Rc<Self>) -> Result<PassthroughBan, Failure> {
        let ban = PassthroughBan::new(self);
        let _alone = self.gate.alone().await;
        let image = self.image.borrow().clone();
        let Some(image) = image.filter(|_| self.told.get() != KernelMappings::Nothing) else {
            return Ok(ban);
        };
        // A kernel that refuses mappings, and that got some only from the previous process, has no I/O under way.
        let is_deaf = self.told.get() == KernelMappings::Before && self.is_vain.get();
        // If the caller drops this future, the revocation still happens at some time, so no mapping may be sent after
        // this.
        self.told.set(KernelMappings::Recalled);
        let mapper = image.mapper;
        let recalled = image.io.elsewhere(move || recall(&*mapper)).await;
        let recalled = recalled.unwrap_or_else(|error| Err(error.into()));
        recalled.or_else(|error| match is_deaf {
            true => Ok(()),
            false => {
                let what = "the kernel does not let go of the image";
                Err(Failure::system(what, &error))
            }
        })?;
        self.told.set(KernelMappings::Nothing);
        self.missed.forgotten();
        self.due.set(true);
        Ok(ban)
    }

    /// Revokes all mappings for good, because the image ceases to be the disk's.
    ///
    /// # Errors
    /// As for [`forbid`](Self::forbid).
    pub(crate) async fn end(self: &Rc<Self>) -> Result<(), Failure> {
        let _ban = self.forbid().await?;
        *self.image.borrow_mut() = None;
        Ok(())
    }

    /// Forgets the image when this process gives the node back, because the kernel drops all mappings with it.
    pub(crate) fn leave(&self) {
        *self.image.borrow_mut() = None;
        self.end_era();
        self.told.set(KernelMappings::Nothing);
    }
}

/// Takes everything back, and waits until no I/O of the kernel is running.
fn recall(mapper: &dyn Mapper) -> io::Result<()> {
    let everything = MapOp {
        op: MAP_RECALL,
        sectors: u64::MAX,
        ..MapOp::default()
    };
    loop {
        match mapper.maps(&[everything]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            told => return told.map(drop),
        }
    }
}
