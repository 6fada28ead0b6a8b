// SPDX-License-Identifier: MIT OR Apache-2.0
//! `null`: nothing, to measure what everything else costs.

use crate::open::size;
use crate::{Attributes, Content, Disk, DiskInfo, Driver, DriverLimits, Extent, Fence};
use control::tapdisk::Open;
use control::Failure;
use diskio::{Bytes, Data, Errno, File};

/// Opens a disk of the size in its target.
pub(crate) fn open(open: &Open, _: Option<File>) -> Result<Disk, Failure> {
    Ok(Disk::new(Null::new(size(open)?)))
}

/// Makes nothing, because there is no image.
pub(crate) async fn create(_: &File, _: u64) -> Result<(), Errno> {
    Err(Errno::OPNOTSUPP)
}

/// A disk that reads as zeroes and discards writes.
#[derive(Debug)]
pub struct Null {
    size: u64,
}

impl Null {
    /// A disk of `size` bytes.
    pub fn new(size: u64) -> Self {
        Self { size }
    }
}

impl Driver for Null {
    async fn activate(&self) -> Result<DiskInfo, Failure> {
        Ok(DiskInfo {
            size: self.size,
            logical_block: 512,
            physical_block: 512,
            discard: Some(512),
            write_cache: false,
            fua: true,
            limits: DriverLimits::default(),
        })
    }

    fn fence(&self) -> Fence {
        Fence::Local
    }

    async fn read(&self, _offset: u64, data: Data) -> Result<(), Errno> {
        data.fill(0, data.len(), 0);
        Ok(())
    }

    async fn write(&self, _offset: u64, _data: Bytes, _how: Attributes) -> Result<(), Errno> {
        Ok(())
    }

    async fn extents(&self, _offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        let content = Content::Hole;
        Ok(vec![Extent { len, content }])
    }

    async fn flush(&self) -> Result<(), Errno> {
        Ok(())
    }

    async fn discard(&self, _offset: u64, _len: u64, _how: Attributes) -> Result<(), Errno> {
        Ok(())
    }

    async fn write_zeroes(&self, _offset: u64, _len: u64, _how: Attributes) -> Result<(), Errno> {
        Ok(())
    }
}
