// SPDX-License-Identifier: MIT OR Apache-2.0
//! `aio` and `sync`: the image is the disk, byte for byte.

use crate::{
    missing, Attributes, Content, Disk, DiskInfo, Driver, DriverLimits, Extent, Fence, QueuedIo,
};
use control::tapdisk::Open;
use control::{Code, Failure};
use diskio::{of_earlier, Barrier, Bytes, Data, Errno, File};

/// Bytes of a hole that file systems can make.
const HOLE: u32 = 4096;

/// Bytes that are zeroed or discarded at once: one call for all of a large image may take long, and some engines do
/// nothing else during it.
const ZEROES: u64 = 256 << 20;

/// Bytes of a logical block at most.
const MAX_BLOCK: u32 = 4096;

/// Opens a file or device, which is locked.
pub(crate) fn open(open: &Open, file: Option<File>) -> Result<Disk, Failure> {
    let mut file = file.ok_or_else(|| missing(open))?;
    let discard = open.discard && !open.read_only;
    if open.read_only {
        return Ok(Disk::new(Raw::new(file, discard)));
    }
    if open.whole_blocks {
        return Ok(Disk::new(Raw::new(file, discard).in_whole_blocks()));
    }
    let buffered = file.keep_size().map_err(|error| {
        Failure::system(
            format!("cannot look at the image of {}", open.target),
            &error,
        )
    })?;
    if buffered {
        diskio::say!(
            "{} goes through dom0's page cache: its size is no whole number of its storage's blocks; \
             make it one with truncate --size=%4096",
            open.target
        );
    }
    Ok(Disk::new(Raw::new(file, discard)))
}

/// Makes a file as long as the disk.
pub(crate) async fn create(file: &File, size: u64) -> Result<(), Errno> {
    file.set_size(size).await
}

/// A raw file or block device.
#[derive(Debug)]
pub struct Raw {
    file: File,
    discard: bool,
    whole_blocks: bool,
    /// All flushes of the file.
    flushes: Barrier,
}

impl Raw {
    /// Serves `file`; guests may discard if `discard`.
    pub fn new(file: File, discard: bool) -> Self {
        Self {
            file,
            discard,
            whole_blocks: false,
            flushes: Barrier::default(),
        }
    }

    /// Raises the guest's smallest write to a block of the storage, because other hosts write to the image, too.
    #[must_use]
    pub fn in_whole_blocks(self) -> Self {
        Self {
            whole_blocks: true,
            ..self
        }
    }

    /// Returns the size of the disk in bytes. A file with a part of a block at its end is refused: it is either damaged
    /// or no raw image, and the guest could not reach that part.
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

    /// Returns the unit in bytes of the size of a disk that is served.
    fn unit(&self) -> Result<u32, Failure> {
        // The last block of a file that tapdisk writes past the page cache must stay a whole one.
        let unit = u32::try_from(self.file.align().offset).unwrap_or(u32::MAX);
        Ok(self.blocks()?.0.max(unit))
    }

    /// Makes all writes durable that came since the driver had this number of [errors](Barrier::errors).
    async fn make_durable(&self, errors: u64) -> Result<(), Errno> {
        let flush = async || self.file.flush().await;
        self.flushes.settle_since(errors, flush).await
    }

    /// Makes what changed since then durable, if it is to be.
    async fn settle(&self, how: Attributes, errors: u64) -> Result<(), Errno> {
        match how.fua {
            true => self.make_durable(errors).await.map_err(of_earlier),
            false => Ok(()),
        }
    }

    /// Logical and physical blocks.
    fn blocks(&self) -> Result<(u32, u32), Failure> {
        let (logical, physical) = self
            .file
            .blocks()
            .map_err(|error| Failure::system("cannot see the image's blocks", &error))?;
        if !self.whole_blocks {
            return Ok((logical, physical));
        }
        let unit = u32::try_from(self.file.align().offset).unwrap_or(u32::MAX);
        let logical = logical.max(unit);
        if logical > MAX_BLOCK {
            return Err(Failure::new(
                Code::Image,
                format!(
                    "the image's storage writes {logical} bytes at once, and a guest's blocks have at most \
                     {MAX_BLOCK}: it cannot be shared with the mode w!"
                ),
            ));
        }
        Ok((logical, physical.max(logical)))
    }
}

impl Driver for Raw {
    async fn activate(&self) -> Result<DiskInfo, Failure> {
        let (logical_block, physical_block) = self.blocks()?;
        let unit = match self.file.is_device() {
            true => physical_block,
            false => HOLE.max(physical_block),
        };
        Ok(DiskInfo {
            size: self.size(logical_block)?,
            logical_block,
            physical_block,
            discard: self.discard.then_some(unit),
            write_cache: true,
            fua: true,
            limits: DriverLimits {
                zeroes: ZEROES,
                align: unit,
                ..DriverLimits::default()
            },
        })
    }

    fn fence(&self) -> Fence {
        Fence::of(&self.file)
    }

    fn is_verbatim(&self) -> bool {
        // If the system does not answer, use the path that always works.
        self.file.is_direct().unwrap_or(false)
    }

    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        self.file.read(offset, data).await
    }

    async fn write(&self, offset: u64, data: Bytes, how: Attributes) -> Result<(), Errno> {
        match how.fua {
            true => {
                let errors = self.flushes.errors();
                let flush = async || self.make_durable(errors).await;
                self.file.write_durable(offset, data, flush).await
            }
            false => self.file.write(offset, data).await,
        }
    }

    fn begin_read(&self, offset: u64, data: &Data) -> Option<QueuedIo> {
        self.file.begin_read(offset, data).map(QueuedIo::from)
    }

    fn begin_write(&self, offset: u64, data: &Bytes) -> Option<QueuedIo> {
        self.file.begin_write(offset, data).map(QueuedIo::from)
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.flushes.flush(async || self.file.flush().await).await
    }

    fn owes(&self) -> bool {
        self.flushes.owes()
    }

    async fn discard(&self, offset: u64, len: u64, how: Attributes) -> Result<(), Errno> {
        let errors = self.flushes.errors();
        match self.discard {
            true => self.file.discard(offset, len).await?,
            false => return Err(Errno::OPNOTSUPP),
        }
        self.settle(how, errors).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64, how: Attributes) -> Result<(), Errno> {
        let errors = self.flushes.errors();
        self.file.write_zeroes(offset, len).await?;
        self.settle(how, errors).await
    }

    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        extents(&self.file, offset, len).await
    }

    async fn inactivate(&self) -> Result<(), Errno> {
        let flushed = match self.file.is_writable().map_err(|error| number(&error))? {
            true => self.flush().await,
            false => Ok(()),
        };
        flushed.and(self.file.forget())
    }

    async fn resize(&self) -> Result<u64, Failure> {
        self.size(self.unit()?)
    }

    async fn grow(&self, size: u64) -> Result<(), Failure> {
        let unit = self.unit()?;
        if size % u64::from(unit) != 0 {
            return Err(Failure::invalid(format!(
                "{size} bytes are not whole blocks of {unit} bytes, which the image's storage has"
            )));
        }
        let errors = self.flushes.errors();
        let flush = async || self.make_durable(errors).await;
        resize(&self.file, size, flush).await
    }
}

/// Changes the size of a raw image, durably.
///
/// # Errors
/// The image is a device, or its file system refuses.
pub async fn set_size(file: &File, size: u64) -> Result<(), Failure> {
    resize(file, size, async || file.flush().await).await
}

/// Changes the size of a file, and makes it durable with `flush`.
async fn resize(
    file: &File,
    size: u64,
    flush: impl AsyncFnOnce() -> Result<(), Errno>,
) -> Result<(), Failure> {
    if file.is_device() {
        return Err(Failure::invalid(
            "it is a device, whose size is not an image's to change: use what made it, such as lvresize",
        ));
    }
    let work = async {
        file.set_size(size).await?;
        flush().await
    };
    let changed: Result<(), Errno> = work.await;
    changed.map_err(|error| Failure::system(format!("cannot make it {size} bytes"), &error.into()))
}

/// Returns the content of a file that is the disk byte for byte.
pub(crate) async fn extents(file: &File, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
    let (len, is_data) = file.part(offset, len).await?;
    let content = match is_data {
        true => Content::Data,
        false => Content::Hole,
    };
    Ok(vec![Extent { len, content }])
}

fn number(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
