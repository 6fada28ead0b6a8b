// SPDX-License-Identifier: MIT OR Apache-2.0
//! `aio` and `sync`: the image is the disk, byte for byte.

use crate::{Driver, Extent, Shape};
use control::{Code, Failure};
use diskio::{Data, Errno, File};

/// Bytes of a hole that file systems can make.
const HOLE: u32 = 4096;

/// A raw file or block device.
#[derive(Debug)]
pub struct Raw {
    file: File,
    discard: bool,
}

impl Raw {
    /// Serves `file`; guests may discard if `discard`.
    pub fn new(file: File, discard: bool) -> Self {
        Self { file, discard }
    }

    /// Size of the disk. A file with a part of a block at its end is refused: it is either broken, or
    /// no raw image, and what it has there would be out of reach.
    fn size(&self, block: u32) -> Result<u64, Failure> {
        let size = self
            .file
            .size()
            .map_err(|error| Failure::system("cannot see the image's size", &error))?;
        if size % u64::from(block) != 0 {
            return Err(Failure::new(
                Code::Image,
                format!(
                    "the image has {size} bytes, which is not a multiple of its block of {block}: if \
                     it is a raw image, make it larger with truncate --size=%{block}"
                ),
            ));
        }
        if size == 0 {
            return Err(Failure::new(
                Code::Image,
                "the image is empty: make it as large as the disk is to be, with truncate or fallocate",
            ));
        }
        Ok(size)
    }

    fn blocks(&self) -> Result<(u32, u32), Failure> {
        self.file
            .blocks()
            .map_err(|error| Failure::system("cannot see the image's blocks", &error))
    }
}

impl Driver for Raw {
    async fn activate(&self) -> Result<Shape, Failure> {
        let (logical_block, physical_block) = self.blocks()?;
        let unit = match self.file.is_device() {
            true => physical_block,
            false => HOLE.max(physical_block),
        };
        Ok(Shape {
            size: self.size(logical_block)?,
            logical_block,
            physical_block,
            discard: self.discard.then_some(unit),
            write_cache: true,
        })
    }

    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        self.file.read(offset, data).await
    }

    async fn write(&self, offset: u64, data: Data) -> Result<(), Errno> {
        self.file.write(offset, data).await
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.file.flush().await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        match self.discard {
            true => self.file.discard(offset, len).await,
            false => Err(Errno::OPNOTSUPP),
        }
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.file.write_zeroes(offset, len).await
    }

    fn map(&self, offset: u64, len: u64) -> Extent {
        Extent::Image { offset, len }
    }

    async fn resize(&self) -> Result<u64, Failure> {
        self.size(self.blocks()?.0)
    }
}
