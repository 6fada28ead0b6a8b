// SPDX-License-Identifier: MIT OR Apache-2.0
//! LUKS, version 1: a disk, encrypted sector by sector behind a header with its key, which a passphrase opens.

mod create;
mod hash;
mod header;
mod key;
mod sealed;
mod unlock;
mod xts;

pub use create::{create, Encryption, ITER_TIME};
pub(crate) use create::{header as new_header, PAYLOAD};
pub use header::LuksHeader;
pub use key::ImageKey;
pub(crate) use sealed::Sealed;
pub(crate) use xts::Cipher;

use crate::barrier::Barrier;
use crate::field::{failed, no_extents, refused};
use crate::{storage, ImageNeeds, ImageParts, Options, Storage};
use control::{Code, Failure};
use diskio::{Bytes, Data, Errno};
use drivers::{Attributes, DiskInfo, Driver, DriverLimits, Fence};
use std::cell::RefCell;
use std::rc::Rc;
use xts::SECTOR;

/// Bytes of a read or a write at once: to encrypt more would keep other requests waiting.
const TRANSFER: u64 = 1 << 20;
/// Bytes that are forgotten at once.
const ZEROES: u64 = 256 << 20;
/// Bytes of a hole that file systems can make.
const HOLE: u32 = 4096;

/// Reads the header at byte `at`. The header and its keys may take `room` bytes from there on.
pub(crate) async fn header_at<S: Storage>(
    file: &S,
    at: u64,
    room: u64,
) -> Result<LuksHeader, Failure> {
    let bytes = storage::bytes(file, at, header::LEN).await;
    let bytes = bytes.map_err(failed("cannot read the header of LUKS"))?;
    LuksHeader::parse(&bytes, room)
}

/// Returns the header of an image.
///
/// # Errors
/// The image cannot be served.
pub async fn header<S: Storage>(file: &S) -> Result<LuksHeader, Failure> {
    let size = file.size();
    let size = size.map_err(failed("cannot see the size of the image"))?;
    header_at(file, 0, size).await
}

/// Returns the files that an image needs: none, only its key.
pub async fn look<S: Storage>(file: &S) -> Result<ImageNeeds, Failure> {
    let header = header(file).await?;
    Ok(ImageNeeds {
        size: payload(file, &header)?,
        ..ImageNeeds::default()
    })
}

/// Bytes of the disk in an image.
fn payload<S: Storage>(file: &S, header: &LuksHeader) -> Result<u64, Failure> {
    let size = file.size();
    let size = size.map_err(failed("cannot see the size of the image"))?;
    let slots = header.slots.iter().map(|slot| slot.at);
    // CAST: a few hundred KiB.
    let keys = slots.max().unwrap_or(0) + header.stripes() as u64;
    if header.payload < keys {
        return Err(refused(format!(
            "the content begins at {}, where the keys are: the header of LUKS is damaged, or another file's",
            header.payload
        )));
    }
    match size.saturating_sub(header.payload) {
        0 => Err(refused(format!(
            "the image has {size} bytes, and its content begins behind them: it is cut off"
        ))),
        bytes if bytes % 512 != 0 => Err(refused(format!(
            "the content of the image has {bytes} bytes, which are no whole sectors: make it larger with truncate \
             --size=%512"
        ))),
        bytes => Ok(bytes),
    }
}

/// Makes the disk in an image `size` bytes large, by changing the size of its file. Sectors that it gains have
/// undefined content until the guest writes them. It is durable when this returns.
///
/// # Errors
/// The image is no LUKS image or is a device, or its storage refuses.
pub async fn set_size<S: Storage>(file: &S, size: u64) -> Result<(), Failure> {
    resize(file, size, &Barrier::new(vec![file.clone()])).await
}

/// Gives the disk of an image that is being served `size` bytes; `barrier` executes all of the image's flushes.
async fn resize<S: Storage>(file: &S, size: u64, barrier: &Barrier<S>) -> Result<(), Failure> {
    let header = header(file).await?;
    payload(file, &header)?;
    if size == 0 || size % SECTOR as u64 != 0 {
        return Err(Failure::invalid(format!(
            "a disk of {size} bytes has no whole sectors: give a multiple of {SECTOR}"
        )));
    }
    if file.is_fixed() {
        return Err(Failure::invalid(
            "it is on a device, whose size is not an image's to change: use what made that, such as lvresize",
        ));
    }
    let end = header.payload.checked_add(size);
    let end = end.ok_or_else(|| {
        Failure::invalid(format!(
            "no file can have {size} bytes: give a smaller size"
        ))
    })?;
    let work = async {
        file.set_size(end).await?;
        barrier.settle().await
    };
    let changed: Result<(), Errno> = work.await;
    changed.map_err(|error| Failure::system(format!("cannot make it {size} bytes"), &error.into()))
}

/// Returns the cipher of the image whose header is at a byte, once the key has opened it; a helper thread does the
/// computation.
///
/// # Errors
/// There is no key, or a wrong one.
pub(crate) async fn unlock<S: Storage>(
    file: &S,
    at: u64,
    header: &LuksHeader,
    key: Option<&ImageKey>,
) -> Result<Cipher, Failure> {
    let key = key.cloned().ok_or_else(no_key)?;
    let mut materials = Vec::new();
    for slot in &header.slots {
        let material = storage::bytes(file, at + slot.at, header.stripes()).await;
        materials.push(material.map_err(failed("cannot read a key slot"))?);
    }
    let its = header.clone();
    let work = move || unlock::unlock(&its, materials, &key);
    let opened = file.elsewhere(work).await;
    opened.map_err(failed("cannot open a key slot"))?.ok_or_else(|| {
        Failure::new(
            Code::Denied,
            format!(
                "the key opens none of the {} key slots of the image: name the file with the right one, of which each \
                 byte counts, a line's end too",
                header.keys()
            ),
        )
    })
}

/// Returns the failure for an encrypted image without a configured key.
pub(crate) fn no_key() -> Failure {
    Failure::new(
        Code::Denied,
        "the image is encrypted with LUKS, and no key was named: write key=FILE, before the driver; a backing image \
         cannot have one: decrypt it with qemu-img convert",
    )
}

/// An image as a driver.
pub struct Luks<S: Storage> {
    file: S,
    has_parent: bool,
    extents: usize,
    options: Options,
    content: RefCell<Option<Rc<Sealed<S>>>>,
    barrier: Barrier<S>,
}

impl<S: Storage> Luks<S> {
    /// The image in `file`, which is looked at when it is activated.
    pub fn new(file: S, parts: ImageParts<S>, options: Options) -> Self {
        Self {
            barrier: Barrier::new(vec![file.clone()]),
            file,
            has_parent: parts.parent.is_some(),
            extents: parts.extents.len(),
            options,
            content: RefCell::new(None),
        }
    }

    fn content(&self) -> Result<Rc<Sealed<S>>, Errno> {
        self.content.borrow().clone().ok_or(Errno::BADFD)
    }

    /// Returns the content for a request that changes it; [`Errno::ROFS`] if the image is read-only.
    fn changed(&self) -> Result<Rc<Sealed<S>>, Errno> {
        match self.options.writable {
            true => self.content(),
            false => Err(Errno::ROFS),
        }
    }

    async fn open(&self) -> Result<u64, Failure> {
        no_extents("image of LUKS", self.extents)?;
        if self.has_parent {
            return Err(refused(
                "a LUKS image cannot have a backing image, and one was given along",
            ));
        }
        let header = header(&self.file).await?;
        let size = payload(&self.file, &header)?;
        let cipher = unlock(&self.file, 0, &header, self.options.key.as_ref()).await?;
        // Its last block need not be a whole one of its storage, and no write makes it longer.
        let file = match self.options.writable {
            true => self.file.keep_size(),
            false => Ok(self.file.clone()),
        };
        let file = file.map_err(failed("cannot look at the image"))?;
        let sealed = Sealed::new(file, header.payload, cipher);
        *self.content.borrow_mut() = Some(Rc::new(sealed));
        Ok(size)
    }
}

impl<S: Storage> Driver for Luks<S> {
    async fn activate(&self) -> Result<DiskInfo, Failure> {
        let size = self.open().await;
        Ok(DiskInfo {
            size: size.map_err(|failure| self.options.named(failure))?,
            logical_block: 512,
            physical_block: 4096,
            discard: self.options.discard.then_some(HOLE),
            write_cache: true,
            fua: false,
            limits: DriverLimits {
                transfer: TRANSFER,
                zeroes: ZEROES,
                align: HOLE,
            },
        })
    }

    fn fence(&self) -> Fence {
        self.file.fence()
    }

    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        self.content()?.read(offset, data).await
    }

    async fn write(&self, offset: u64, data: Bytes, _how: Attributes) -> Result<(), Errno> {
        self.changed()?.write(offset, data).await
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.barrier.flush().await
    }

    fn owes(&self) -> bool {
        self.barrier.owes()
    }

    async fn discard(&self, offset: u64, len: u64, _how: Attributes) -> Result<(), Errno> {
        match self.options.discard {
            true => self.changed()?.discard(offset, len).await,
            false => Err(Errno::OPNOTSUPP),
        }
    }

    async fn resize(&self) -> Result<u64, Failure> {
        let named = |failure| self.options.named(failure);
        let header = header(&self.file).await.map_err(named)?;
        payload(&self.file, &header).map_err(named)
    }

    async fn grow(&self, size: u64) -> Result<(), Failure> {
        let named = |failure| self.options.named(failure);
        let failed = |error: Errno| {
            named(Failure::system(
                "cannot make the disk larger",
                &error.into(),
            ))
        };
        let sealed = self.changed().map_err(failed)?;
        resize(&self.file, size, &self.barrier)
            .await
            .map_err(named)?;
        // Its last block may be no whole one of its storage any more.
        let file = self.file.keep_size().map_err(failed)?;
        *self.content.borrow_mut() = Some(Rc::new(sealed.over(file)));
        Ok(())
    }

    async fn inactivate(&self) -> Result<(), Errno> {
        // The next to use it may have another key.
        self.content.borrow_mut().take();
        let flushed = match self.options.may_write(&self.file)? {
            true => self.barrier.flush().await,
            false => Ok(()),
        };
        flushed.and(self.file.forget())
    }
}
