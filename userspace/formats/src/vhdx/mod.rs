// SPDX-License-Identifier: MIT OR Apache-2.0
//! VHDX, as Hyper-V and QEMU write it, to read: fixed, dynamic and differencing.
//!
//! An image that was not closed has changes of its tables in a log. They are laid over the file in memory, and all
//! reads go through that: so the disk shows the state of the last writer, and the file is never changed.
//!
//! The parts are read in the order of the format: the valid header, the log, the table of regions, the metadata, and
//! the part of the block allocation table that a request needs.

mod blocks;
mod crc32c;
mod entry;
mod guid;
mod header;
mod image;
mod locator;
mod log;
mod log_overlay;
mod metadata;
mod region;

pub use image::{id, look, unreplayed};

use crate::base::{self, Base, ExtentRun};
use crate::field::{counters, no_extents, part, refused};
use crate::{ImageParts, Options, Storage};
use blocks::{BlockState, PayloadBlocks};
use control::Failure;
use diskio::{Bytes, Data, Errno};
use drivers::{Attributes, Content, DiskInfo, Driver, DriverLimits, Extent, Fence};
use image::VhdxImage;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// A disk in a VHDX, which is only read.
#[derive(Debug)]
pub struct Vhdx<S> {
    storage: S,
    parent: Option<Rc<Base>>,
    /// Other files that were given: there must be none.
    extents: usize,
    options: Options,
    active: RefCell<Option<Rc<PayloadBlocks<S>>>>,
}

impl<S: Storage> Vhdx<S> {
    /// Returns the disk in `storage`, on top of its parent if it is a differencing disk. Activation refuses a writable
    /// disk.
    pub fn new(storage: S, parts: ImageParts<S>, options: Options) -> Self {
        Self {
            storage,
            parent: parts.parent.map(|disk| Rc::new(Base::new(disk))),
            extents: parts.extents.len(),
            options,
            active: RefCell::new(None),
        }
    }

    fn active(&self) -> Result<Rc<PayloadBlocks<S>>, Errno> {
        self.active.borrow().clone().ok_or(Errno::NXIO)
    }

    async fn check_parent(&self, has_parent: bool) -> Result<(), Failure> {
        no_extents("VHDX", self.extents)?;
        match (has_parent, &self.parent) {
            (true, Some(parent)) => parent.activate().await,
            (true, None) => Err(refused(
                "the VHDX is a differencing one and its parent was not given: open that too",
            )),
            (false, Some(_)) => Err(refused(
                "a parent was given for a VHDX that is not a differencing one: leave that out",
            )),
            (false, None) => Ok(()),
        }
    }

    async fn start(&self) -> Result<DiskInfo, Failure> {
        if self.options.writable {
            return Err(Failure::unsupported(
                "a VHDX is only read: serve it read-only, make a qcow2 image of it (`tapimg convert IMAGE NEW`), or put one \
                 over it (`tapimg create NEW --parent IMAGE`, or cow: for changes that end with the disk)",
            ));
        }
        let image = VhdxImage::read(&self.storage).await?;
        self.check_parent(image.metadata.locator.is_some()).await?;
        let blocks = PayloadBlocks::new(image, self.options.cache)?;
        let metadata = &blocks.metadata;
        let shape = DiskInfo {
            size: metadata.size,
            logical_block: metadata.logical,
            physical_block: metadata.physical.max(metadata.logical),
            discard: None,
            write_cache: false,
            fua: false,
            limits: DriverLimits {
                align: metadata.block,
                ..DriverLimits::default()
            },
        };
        *self.active.borrow_mut() = Some(Rc::new(blocks));
        Ok(shape)
    }

    /// Reads a part of a block, some of whose sectors are the parent's.
    async fn read_partly(
        &self,
        blocks: &PayloadBlocks<S>,
        (block, within, at): (u64, u64, u64),
        offset: u64,
        data: Data,
    ) -> Result<(), Errno> {
        let mut done = 0;
        for (len, is_own) in blocks.runs(block, within, data.len() as u64).await? {
            let piece = part(&data, done, len);
            match is_own {
                true => {
                    blocks
                        .storage()
                        .read_exact(at + within + done, piece)
                        .await?
                }
                false => base::read(self.parent.as_deref(), offset + done, piece).await?,
            }
            done += len;
        }
        Ok(())
    }

    /// Returns the content of a range: with the backing images if `whole` is set, else of this image alone.
    async fn row(&self, offset: u64, len: u64, whole: bool) -> Result<Vec<Extent>, Errno> {
        let blocks = self.active()?;
        let mut row = ExtentRun::default();
        for (block, within, from, len) in blocks.pieces(offset, len)? {
            let (parent, from) = (self.parent.as_deref(), offset + from);
            match blocks.find(block).await? {
                BlockState::Missing => row.push_missing(parent, from, len, whole).await?,
                BlockState::Zeroes => row.push(len, Content::Hole),
                BlockState::At(at) => push_own(&blocks, at + within, len, &mut row).await?,
                BlockState::Partly(at) => {
                    let mut done = 0;
                    for (len, is_own) in blocks.runs(block, within, len).await? {
                        match is_own {
                            true => push_own(&blocks, at + within + done, len, &mut row).await?,
                            false => row.push_missing(parent, from + done, len, whole).await?,
                        }
                        done += len;
                        if row.is_full() {
                            return Ok(row.finish());
                        }
                    }
                }
            }
            if row.is_full() {
                break;
            }
        }
        Ok(row.finish())
    }
}

/// Adds the image's own content. All blocks of a fixed VHDX are allocated, and may be holes of its file.
async fn push_own<S: Storage>(
    blocks: &PayloadBlocks<S>,
    at: u64,
    len: u64,
    row: &mut ExtentRun,
) -> Result<(), Errno> {
    let mut done = 0;
    while done < len {
        let (count, is_data) = blocks.storage().part(at + done, len - done).await?;
        let content = match is_data {
            true => Content::Data,
            false => Content::Hole,
        };
        let count = count.min(len - done);
        if count == 0 {
            return Err(Errno::IO);
        }
        row.push(count, content);
        done += count;
    }
    Ok(())
}

impl<S: Storage> Driver for Vhdx<S> {
    async fn activate(&self) -> Result<DiskInfo, Failure> {
        let shape = self.start().await;
        shape.map_err(|failure| self.options.named(failure))
    }

    fn fence(&self) -> Fence {
        self.storage.fence()
    }

    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        let blocks = self.active()?;
        for (block, within, from, len) in blocks.pieces(offset, data.len() as u64)? {
            let (data, from) = (part(&data, from, len), offset + from);
            match blocks.find(block).await? {
                BlockState::Missing => base::read(self.parent.as_deref(), from, data).await?,
                BlockState::Zeroes => data.fill(0, data.len(), 0),
                BlockState::At(at) => blocks.storage().read_exact(at + within, data).await?,
                BlockState::Partly(at) => {
                    let place = (block, within, at);
                    self.read_partly(&blocks, place, from, data).await?;
                }
            }
        }
        Ok(())
    }

    async fn write(&self, _offset: u64, _data: Bytes, _how: Attributes) -> Result<(), Errno> {
        Err(Errno::ROFS)
    }

    async fn write_zeroes(&self, _offset: u64, _len: u64, _how: Attributes) -> Result<(), Errno> {
        Err(Errno::ROFS)
    }

    async fn flush(&self) -> Result<(), Errno> {
        Ok(())
    }

    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        self.row(offset, len, true).await
    }

    async fn layer(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        self.row(offset, len, false).await
    }

    fn stats(&self) -> BTreeMap<String, u64> {
        let Ok(blocks) = self.active() else {
            return BTreeMap::new();
        };
        let (bytes, hits, misses) = blocks.counts();
        counters([
            ("log_changes", blocks.storage().count() as u64),
            ("cache_bytes", bytes),
            ("cache_hits", hits),
            ("cache_misses", misses),
        ])
    }

    async fn goes_on(&self) -> Result<bool, Failure> {
        base::must_stay(self.parent.as_deref(), "a VHDX")
    }

    async fn inactivate(&self) -> Result<(), Errno> {
        *self.active.borrow_mut() = None;
        // Nothing may be left in memory.
        let parent = base::inactivate(self.parent.as_deref()).await;
        parent.and(self.storage.forget())
    }

    async fn close(&self) -> Result<(), Errno> {
        *self.active.borrow_mut() = None;
        base::close(self.parent.as_deref()).await
    }
}
