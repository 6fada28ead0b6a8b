// SPDX-License-Identifier: MIT OR Apache-2.0
//! VHD: fixed, dynamic and differencing, as Windows, QEMU and tapdisk have them.
//!
//! A disk has at most 2 TiB less a little, because the table counts sectors with 32 bits.
//!
//! The bitmap before a block has a bit for each sector that is in this image. A dynamic disk uses it only to mark zero
//! sectors, so this driver sets all bits of a new block, and later writes to it change no metadata. In a differencing
//! disk a clear bit leads to the parent, whose data is never copied.
//!
//! Space for many blocks is reserved at once: a footer goes to the new end of the image, the bytes between the last
//! block and that footer are zeroed, and a flush makes both durable. So a block that the table points to holds only
//! data of this disk, even after a power cut.

mod active;
mod batmap;
mod block_alloc;
mod blocks;
mod create;
mod facts;
mod fixed;
mod footer;
mod front;
mod header;
mod image;
mod locator;
mod rename;
mod resize;

pub use create::{create, ParentOf, VhdCreate};
pub use facts::{facts, hide, Facts};
pub use footer::VhdKind;
pub use image::{footers, id, look, spelled};
pub use rename::set_parent;
pub use resize::grow;

use crate::barrier::Barrier;
use crate::base::{self, Base};
use crate::field::{failed, no_extents, refused};
use crate::{ImageParts, Options, Storage};
use active::Active;
use control::Failure;
use diskio::{Bytes, Data, Errno};
use drivers::{Attributes, DiskInfo, Driver, DriverLimits, Extent, Fence, MappedExtent, QueuedIo};
use fixed::Fixed;
use image::VhdImage;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Size of the largest disk in bytes, which other programs have as their limit, too.
pub const MOST: u64 = 2040 << 30;
/// Bytes that are zeroed or discarded at once.
const ZEROES: u64 = 256 << 20;

/// A disk in a VHD.
#[derive(Debug)]
pub struct Vhd<S> {
    storage: Rc<S>,
    parent: Option<Rc<Base>>,
    /// Other files that were given: there must be none.
    extents: usize,
    options: Options,
    /// State that serves the disk while it is active.
    body: RefCell<Option<DiskBody<S>>>,
}

#[derive(Debug)]
enum DiskBody<S> {
    Fixed(Rc<Fixed<S>>, Barrier<S>),
    Blocks(Rc<Active<S>>),
}

impl<S> Clone for DiskBody<S> {
    fn clone(&self) -> Self {
        match self {
            Self::Fixed(fixed, barrier) => Self::Fixed(fixed.clone(), barrier.clone()),
            Self::Blocks(active) => Self::Blocks(active.clone()),
        }
    }
}

impl<S: Storage> Vhd<S> {
    /// Returns the disk in `storage`, on top of its parent if it is a differencing disk.
    pub fn new(storage: S, parts: ImageParts<S>, options: Options) -> Self {
        Self {
            storage: Rc::new(storage),
            parent: parts.parent.map(|disk| Rc::new(Base::new(disk))),
            extents: parts.extents.len(),
            options,
            body: RefCell::new(None),
        }
    }

    fn body(&self) -> Result<DiskBody<S>, Errno> {
        self.body.borrow().clone().ok_or(Errno::NXIO)
    }

    /// Checks that differencing disks, and only these, have a parent.
    async fn check_parent(&self, kind: VhdKind) -> Result<(), Failure> {
        no_extents("VHD", self.extents)?;
        match (kind, &self.parent) {
            (VhdKind::Differencing, Some(parent)) => parent.activate().await,
            (VhdKind::Differencing, None) => Err(refused(
                "the VHD is a differencing one and its parent was not given: open that too",
            )),
            (_, Some(_)) => Err(refused(
                "a parent was given for a VHD that is not a differencing one: leave that out",
            )),
            (_, None) => Ok(()),
        }
    }

    async fn start(&self) -> Result<DiskInfo, Failure> {
        let image = VhdImage::read(&*self.storage).await?;
        self.check_parent(image.footer.kind).await?;
        let size = image.footer.size;
        let body = match image.header {
            None => {
                let barrier = Barrier::new(vec![(*self.storage).clone()]);
                DiskBody::Fixed(Rc::new(Fixed::new(self.fixed(size)?, size)), barrier)
            }
            Some(header) => {
                let parent = self.parent.clone();
                let active = Active::open(
                    self.storage.clone(),
                    image.footer,
                    header,
                    parent,
                    &self.options,
                );
                DiskBody::Blocks(Rc::new(active.await?))
            }
        };
        *self.body.borrow_mut() = Some(body);
        Ok(DiskInfo {
            size,
            logical_block: base::sector(self.parent.as_deref(), size),
            physical_block: 4096,
            discard: Some(4096),
            write_cache: true,
            fua: false,
            limits: DriverLimits {
                zeroes: ZEROES,
                align: header::BLOCK,
                ..DriverLimits::default()
            },
        })
    }

    /// The storage of a fixed disk. The footer is right behind it, and must stay at the end of the file.
    fn fixed(&self, size: u64) -> Result<Rc<S>, Failure> {
        if size % block_alloc::PAGE == 0 {
            return Ok(self.storage.clone());
        }
        let storage = self.storage.keep_size();
        Ok(Rc::new(storage.map_err(failed("cannot use the image"))?))
    }

    /// Flushes the content, which alone decides the result, and then tidies up: that may fail on a full file system
    /// without any loss.
    async fn finish(&self) -> Result<(), Errno> {
        let body = self.body.borrow_mut().take();
        if !self.options.may_write(&*self.storage)? {
            return Ok(());
        }
        match body {
            Some(DiskBody::Blocks(active)) => {
                active.flush().await?;
                active.tidy(&self.options.name).await;
                Ok(())
            }
            Some(DiskBody::Fixed(_, barrier)) => barrier.flush().await,
            None => Ok(()),
        }
    }
}

impl<S: Storage> Driver for Vhd<S> {
    async fn activate(&self) -> Result<DiskInfo, Failure> {
        let shape = self.start().await;
        shape.map_err(|failure| self.options.named(failure))
    }

    fn fence(&self) -> Fence {
        self.storage.fence()
    }

    fn is_verbatim(&self) -> bool {
        match self.body() {
            Ok(DiskBody::Fixed(fixed, _)) => fixed.is_direct(),
            _ => false,
        }
    }

    fn has_places(&self) -> bool {
        matches!(self.body(), Ok(DiskBody::Blocks(_))) && self.storage.is_direct()
    }

    async fn places(&self, offset: u64, len: u64) -> Result<Vec<MappedExtent>, Errno> {
        match self.body()? {
            DiskBody::Fixed(..) => Ok(Vec::new()),
            DiskBody::Blocks(active) => active.places(offset, len).await,
        }
    }

    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        match self.body()? {
            DiskBody::Fixed(fixed, _) => fixed.read(offset, data).await,
            DiskBody::Blocks(active) => active.read(offset, data).await,
        }
    }

    async fn write(&self, offset: u64, data: Bytes, _how: Attributes) -> Result<(), Errno> {
        match self.body()? {
            DiskBody::Fixed(fixed, _) => fixed.write(offset, data).await,
            DiskBody::Blocks(active) => active.write(offset, data).await,
        }
    }

    fn begin_read(&self, offset: u64, data: &Data) -> Option<QueuedIo> {
        match self.body.borrow().as_ref()? {
            DiskBody::Fixed(fixed, _) => fixed.begin_read(offset, data),
            DiskBody::Blocks(active) => active.begin_read(offset, data),
        }
    }

    fn begin_write(&self, offset: u64, data: &Bytes) -> Option<QueuedIo> {
        match self.body.borrow().as_ref()? {
            DiskBody::Fixed(fixed, _) => fixed.begin_write(offset, data),
            DiskBody::Blocks(active) => active.begin_write(offset, data),
        }
    }

    async fn flush(&self) -> Result<(), Errno> {
        match self.body()? {
            DiskBody::Fixed(_, barrier) => barrier.flush().await,
            DiskBody::Blocks(active) => active.flush().await,
        }
    }

    fn owes(&self) -> bool {
        match self.body() {
            Ok(DiskBody::Fixed(_, barrier)) => barrier.owes(),
            Ok(DiskBody::Blocks(active)) => active.owes(),
            Err(_) => false,
        }
    }

    async fn discard(&self, offset: u64, len: u64, _how: Attributes) -> Result<(), Errno> {
        match self.body()? {
            DiskBody::Fixed(fixed, _) => fixed.discard(offset, len).await,
            DiskBody::Blocks(active) => active.discard(offset, len).await,
        }
    }

    async fn write_zeroes(&self, offset: u64, len: u64, _how: Attributes) -> Result<(), Errno> {
        match self.body()? {
            DiskBody::Fixed(fixed, _) => fixed.write_zeroes(offset, len).await,
            DiskBody::Blocks(active) => active.write_zeroes(offset, len).await,
        }
    }

    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        match self.body()? {
            DiskBody::Fixed(fixed, _) => fixed.extents(offset, len).await,
            DiskBody::Blocks(active) => active.extents(offset, len, true).await,
        }
    }

    async fn layer(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        match self.body()? {
            DiskBody::Fixed(fixed, _) => fixed.extents(offset, len).await,
            DiskBody::Blocks(active) => active.extents(offset, len, false).await,
        }
    }

    async fn resize(&self) -> Result<u64, Failure> {
        let image = VhdImage::read(&*self.storage).await;
        let image = image.map_err(|failure| self.options.named(failure))?;
        let body = self
            .body()
            .map_err(failed("cannot look at the size of a VHD that is not open"))?;
        match (body, image.header) {
            (DiskBody::Fixed(fixed, _), None) => fixed.resize(image.footer.size),
            (DiskBody::Blocks(active), Some(header)) => active.resize(image.footer, &header),
            _ => Err(refused(
                "the VHD became one of another type while it was open",
            )),
        }
    }

    fn stats(&self) -> BTreeMap<String, u64> {
        match self.body() {
            Ok(DiskBody::Blocks(active)) => active.stats(),
            _ => BTreeMap::new(),
        }
    }

    async fn goes_on(&self) -> Result<bool, Failure> {
        base::must_stay(self.parent.as_deref(), "a VHD")
    }

    async fn inactivate(&self) -> Result<(), Errno> {
        let finished = self.finish().await;
        // Cached metadata is dropped even if an earlier step failed.
        let parent = base::inactivate(self.parent.as_deref()).await;
        let forgotten = self.storage.forget();
        finished.and(parent).and(forgotten)
    }

    async fn close(&self) -> Result<(), Errno> {
        let finished = self.finish().await;
        let parent = base::close(self.parent.as_deref()).await;
        finished.and(parent)
    }
}
