// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ram`: sparse memory, which holds only the ranges that the guest has changed.

use crate::open::size;
use crate::raw::extents;
use crate::{missing, Attributes, Disk, DiskInfo, Driver, DriverLimits, Extent, Fence};
use control::tapdisk::Open;
use control::{Code, Failure};
use diskio::{Bytes, Data, Errno, File};
use std::collections::BTreeMap;

/// Opens a disk of the size in its target, in memory that came along.
pub(crate) fn open(open: &Open, file: Option<File>) -> Result<Disk, Failure> {
    let size = size(open)?;
    let memory = file.ok_or_else(|| missing(open))?;
    Ok(Disk::new(Ram::new(memory, size)))
}

/// Gives the memory its size.
pub(crate) async fn create(memory: &File, size: u64) -> Result<(), Errno> {
    memory.set_size(size).await
}

/// A disk in memory. The memory is a file that the supervisor keeps for the next process: it must hold all answered
/// writes when this one is dead.
#[derive(Debug)]
pub struct Ram {
    memory: File,
    size: u64,
}

impl Ram {
    /// A disk of `size` bytes in a file without a disk below.
    pub fn new(memory: File, size: u64) -> Self {
        Self { memory, size }
    }
}

impl Driver for Ram {
    async fn activate(&self) -> Result<DiskInfo, Failure> {
        let found = self
            .memory
            .size()
            .map_err(|error| Failure::system("cannot see the size of the memory", &error))?;
        if found != self.size {
            return Err(Failure::new(
                Code::Image,
                format!(
                    "the memory has {found} bytes and the disk {}: one of them is another disk's",
                    self.size
                ),
            ));
        }
        Ok(DiskInfo {
            size: self.size,
            logical_block: 512,
            physical_block: 4096,
            discard: Some(4096),
            write_cache: false,
            fua: true,
            limits: DriverLimits::default(),
        })
    }

    fn fence(&self) -> Fence {
        Fence::Local
    }

    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        self.memory.read(offset, data).await
    }

    async fn write(&self, offset: u64, data: Bytes, _how: Attributes) -> Result<(), Errno> {
        self.memory.write(offset, data).await
    }

    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        extents(&self.memory, offset, len).await
    }

    async fn flush(&self) -> Result<(), Errno> {
        Ok(())
    }

    async fn discard(&self, offset: u64, len: u64, _how: Attributes) -> Result<(), Errno> {
        self.memory.discard(offset, len).await
    }

    /// A hole reads as zeroes and needs no memory.
    async fn write_zeroes(&self, offset: u64, len: u64, _how: Attributes) -> Result<(), Errno> {
        self.memory.discard(offset, len).await
    }

    fn stats(&self) -> BTreeMap<String, u64> {
        let used = self.memory.allocated();
        used.map(|used| ("memory_bytes".to_string(), used))
            .into_iter()
            .collect()
    }
}
