// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the kernel may do without this process: read and write where the image has the disk, a block device or a
//! file.
//!
//! Nobody else tells the kernel of it. Of an image that is the disk byte for byte it gets all, and flushes: when the
//! disk is served, and again after what it forgot by itself, the range of each discard that it delivers. Of
//! others it gets [part by part](parts) what was asked of this process, and what will be. It is taken back before the image may be somebody else's, and before others than the guest use the disk
//! ([`Ban`]): the kernel knows the order of the guest's requests only. To take it back waits for I/O of the
//! kernel, in a helper thread, and nothing is given meanwhile.

mod parts;

use control::Failure;
use diskio::{Gate, Io};
use drivers::{Holder, Place};
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
pub(crate) struct Image {
    /// Has the thread in which a recall waits.
    pub(crate) io: Io,
    pub(crate) mapper: Arc<dyn Mapper>,
    /// Bytes of the disk.
    pub(crate) size: u64,
    pub(crate) writable: bool,
    /// It has the disk in parts, and the driver says where.
    pub(crate) in_parts: bool,
}

impl Image {
    /// What the kernel is told of it, as of a generation of its mappings.
    fn ops(&self, generation: u32) -> Vec<MapOp> {
        let set = self.set(
            &Place {
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
        // Nobody flushes what nobody writes.
        let flush = self.writable.then_some(flush);
        [set].into_iter().chain(flush).collect()
    }

    /// Where a part of the disk is, as known in a generation.
    fn set(&self, place: &Place, generation: u32) -> MapOp {
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

/// What the kernel was told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Told {
    /// Nothing that still holds.
    #[default]
    Nothing,
    /// By this process nothing; what the process before has told may still be under way.
    Before,
    /// Where the disk is.
    Image,
    /// That this does not hold any more. It may still be using the image.
    Recalled,
}

/// What the kernel may do now.
#[derive(Debug, Default)]
pub struct Direct {
    image: RefCell<Option<Image>>,
    told: Cell<Told>,
    /// It is to be told where the disk is.
    due: Cell<bool>,
    /// The same, once it has what was answered before: it forgets a range with the answer, too.
    due_later: Cell<bool>,
    /// It is told nothing more of this image: it cannot use it, or does not listen.
    is_vain: Cell<bool>,
    /// Those who want it to do nothing.
    bans: Cell<u32>,
    /// Requests under way of which it forgets the range.
    forgets: Cell<u32>,
    /// Of what it is to be told where that is.
    missed: Missed,
    /// Grows when what was looked up before may not be true any more, though the kernel would not know.
    era: Cell<u64>,
    /// Recalls come one after the other.
    gate: Gate,
}

/// The kernel does nothing by itself while this is there.
#[derive(Debug)]
#[must_use = "the kernel goes on when this is dropped"]
pub(crate) struct Ban(Rc<Direct>);

impl Ban {
    fn new(direct: &Rc<Direct>) -> Self {
        direct.bans.set(direct.bans.get() + 1);
        direct.end_era();
        Self(direct.clone())
    }
}

impl Drop for Ban {
    fn drop(&mut self) {
        self.0.bans.set(self.0.bans.get() - 1);
    }
}

/// A request of which the kernel forgets the range, until it is answered.
#[derive(Debug)]
pub(crate) struct Forgets(Rc<Direct>);

impl Drop for Forgets {
    fn drop(&mut self) {
        self.0.forgets.set(self.0.forgets.get() - 1);
        self.0.due_later.set(true);
    }
}

impl Direct {
    /// From now on the kernel may use this image.
    pub(crate) fn offer(&self, image: Image) {
        self.missed.begin(image.in_parts);
        self.end_era();
        *self.image.borrow_mut() = Some(image);
        if self.told.get() == Told::Nothing {
            self.told.set(Told::Before);
        }
        self.is_vain.set(false);
        self.due.set(true);
    }

    fn end_era(&self) {
        self.era.set(self.era.get().wrapping_add(1));
    }

    /// The disk has another size.
    pub(crate) fn resize(&self, size: u64) {
        if let Some(image) = self.image.borrow_mut().as_mut() {
            image.size = size;
            self.due.set(true);
        }
    }

    /// The kernel has forgotten the range of a request that was delivered; it is told again where that is
    /// once for all that are under way.
    pub(crate) fn forgets(self: &Rc<Self>) -> Forgets {
        self.forgets.set(self.forgets.get() + 1);
        Forgets(self.clone())
    }

    /// What was answered before is on its way, and is there when the kernel is told something in the next turn.
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

    /// The kernel may be told where something is.
    fn may_tell(&self) -> bool {
        !self.is_vain.get() && self.bans.get() == 0 && self.told.get() != Told::Recalled
    }

    fn told_or_vain(&self, told: io::Result<()>) {
        if let Err(error) = told {
            diskio::say!("tapdisk: the kernel does not serve the disk by itself: {error}");
            self.is_vain.set(true);
        }
    }

    fn tell(&self, image: &Image) -> io::Result<()> {
        let Some((generation, _)) = self.generation(image)? else {
            return Ok(());
        };
        self.told.set(Told::Image);
        image.mapper.maps(&image.ops(generation)).map(drop)
    }

    /// That of the kernel's mappings, and one bit for each backing; nothing if nobody has given it the image.
    fn generation(&self, image: &Image) -> io::Result<Option<(u32, u32)>> {
        let now = image.mapper.maps(&[])?;
        let has_image = now.backings >> BACKING & 1 != 0;
        self.is_vain.set(!has_image);
        Ok(has_image.then_some((now.generation, now.backings)))
    }

    /// Waits until the kernel does nothing by itself. It does not until the ban is dropped.
    ///
    /// # Errors
    /// As the kernel says. It may be using the image.
    pub(crate) async fn forbid(self: &Rc<Self>) -> Result<Ban, Failure> {
        let ban = Ban::new(self);
        let _alone = self.gate.alone().await;
        let image = self.image.borrow().clone();
        let Some(image) = image.filter(|_| self.told.get() != Told::Nothing) else {
            return Ok(ban);
        };
        // One that does not listen, of which was told, has nothing under way.
        let is_deaf = self.told.get() == Told::Before && self.is_vain.get();
        // If nobody waits for it any more, the recall may come at any time, so nothing is told after this.
        self.told.set(Told::Recalled);
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
        self.told.set(Told::Nothing);
        self.missed.forgotten();
        self.due.set(true);
        Ok(ban)
    }

    /// The same for good: the image is not the disk's any more.
    ///
    /// # Errors
    /// As for [`forbid`](Self::forbid).
    pub(crate) async fn end(self: &Rc<Self>) -> Result<(), Failure> {
        let _ban = self.forbid().await?;
        *self.image.borrow_mut() = None;
        Ok(())
    }

    /// The node is given back, and with it all that the kernel was told by this process.
    pub(crate) fn leave(&self) {
        *self.image.borrow_mut() = None;
        self.end_era();
        self.told.set(Told::Nothing);
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
