// SPDX-License-Identifier: MIT OR Apache-2.0
//! `example`: a disk behind a header.

use control::tapdisk::Open;
use control::{Code, Failure};
use drivers::{
    missing, Attributes, Bytes, Data, Disk, DiskInfo, Driver, DriverLimits, Errno, Fence, File,
};
use std::cell::Cell;

const HEADER: u64 = 4096;
const MAGIC: &[u8; 8] = b"EXAMPLE1";

/// Opens an image, which is locked.
pub(crate) fn open(open: &Open, file: Option<File>) -> Result<Disk, Failure> {
    Ok(Disk::new(Example {
        file: file.ok_or_else(|| missing(open))?,
        writable: !open.read_only,
        size: Cell::new(0),
    }))
}

/// Makes an image in an empty file.
pub(crate) async fn create(file: &File, size: u64) -> Result<(), Errno> {
    let end = size.checked_add(HEADER).ok_or(Errno::FBIG)?;
    file.set_size(end).await?;
    let header = Data::zeroed(HEADER as usize)?;
    header.write(0, MAGIC);
    header.write(8, &size.to_le_bytes());
    file.write(0, header).await?;
    file.flush().await
}

/// A disk behind a header.
#[derive(Debug)]
struct Example {
    file: File,
    writable: bool,
    size: Cell<u64>,
}

fn failed(what: &str) -> impl FnOnce(Errno) -> Failure + '_ {
    move |error| Failure::system(what, &error.into())
}

impl Driver for Example {
    // The image is locked now, and may be looked at.
    async fn activate(&self) -> Result<DiskInfo, Failure> {
        let header = Data::zeroed(HEADER as usize).map_err(failed("no memory for the header"))?;
        let read = self.file.read(0, header.clone()).await;
        read.map_err(failed("cannot read the header"))?;
        let number = |at| {
            let mut bytes = [0; 8];
            header.read(at, &mut bytes);
            u64::from_le_bytes(bytes)
        };
        let (magic, size, opened) = (number(0), number(8), number(16));
        // Never trust a header: a guest, or whoever gave you the image, may have written it.
        let end = size
            .checked_add(HEADER)
            .filter(|_| size > 0 && size % 512 == 0);
        let length = self.file.size();
        let length = length.map_err(|error| Failure::system("cannot see the size", &error))?;
        if magic != u64::from_le_bytes(*MAGIC) || end.is_none_or(|end| end > length) {
            return Err(Failure::new(
                Code::Image,
                "the header is not that of an example image",
            ));
        }
        if self.writable {
            header.write(16, &opened.wrapping_add(1).to_le_bytes());
            let written = self.file.write(0, header).await;
            written.map_err(failed("cannot write the header"))?;
        }
        self.size.set(size);
        Ok(DiskInfo {
            size,
            logical_block: 512,
            physical_block: 4096,
            discard: None,
            write_cache: true,
            fua: false, // a durable write is flushed by the caller
            limits: DriverLimits::default(),
        })
    }

    // Its I/O is that of the file.
    fn fence(&self) -> Fence {
        Fence::of(&self.file)
    }

    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        self.file.read(HEADER + offset, data).await
    }

    async fn write(&self, offset: u64, data: Bytes, _: Attributes) -> Result<(), Errno> {
        self.file.write(HEADER + offset, data).await
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.file.flush().await
    }
}
