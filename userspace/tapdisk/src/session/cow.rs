// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk whose guest writes into memory, on top of an image that does not change. The memory holds a qcow2 image on
//! top of that image, so a process that dies leaves the next one all changes.

use super::image::{below, kind, Parts};
use control::{Below, Code, Failure};
use diskio::{Errno, File};
use drivers::DiskInfo;
use formats::{Base, Files, ImageFormat, Options, OverlayPlan};
use std::path::Path;

/// Path of the memory in place of a file's name.
pub(super) const MEMORY: &str = "/memory";
/// Bytes at the beginning of an image that identify it: `formats::overlay` stores them last.
const MAGIC: usize = 4;

impl Parts<'_> {
    /// The image in the memory, which is made if nothing is there yet.
    pub(super) async fn over(&self, image: &Below, memory: File) -> Result<File, Failure> {
        let memory = memory.with_room(self.open.target.room());
        if !is_empty(&memory).await.map_err(unreadable)? {
            check_goes_on(image, &memory).await?;
            return Ok(memory);
        }
        if self.looks {
            // A new, empty memory would be another disk than the one that the other process serves.
            return Err(Failure::new(
                Code::State,
                format!("{} has written nothing yet", self.open.target),
            ));
        }
        let file = self.open(&image.path, false).await?;
        let kind_below = below(image.driver)?;
        let base = Base::of(kind_below, &image.path, &file, Path::new(MEMORY)).await?;
        let shape = self.shape_of(image, file).await?;
        let kind = ImageFormat::Qcow2;
        let plan = OverlayPlan {
            size: shape.size,
            sector: shape.logical_block,
            // Nothing is committed from memory, of which small clusters take less.
            unit: 1,
        };
        formats::overlay(&memory, kind, plan, &base).await?;
        Ok(memory)
    }

    /// Returns the properties of the disk in an image, with all of its backing images.
    async fn shape_of(&self, image: &Below, file: File) -> Result<DiskInfo, Failure> {
        let disk = match kind(image.driver) {
            None => self.raw(file),
            Some(kind) => {
                let options = Options {
                    writable: false,
                    ..self.options(&image.path)?
                };
                formats::open_chain(kind, file, &image.path, options, self).await?
            }
        };
        let shape = disk.activate().await?;
        let closed = disk.close().await;
        closed.map_err(|error| Failure::system("cannot let go of the image", &error.into()))?;
        Ok(shape)
    }
}

/// Nothing was made there, or that was not finished.
async fn is_empty(memory: &File) -> Result<bool, Errno> {
    let head = memory.io().buffer(MAGIC)?;
    memory.read_padded(0, head.clone()).await?;
    Ok(head.to_vec().iter().all(|&byte| byte == 0))
}

/// Checks that the memory was filled over this image, because over another one its content is garbage.
async fn check_goes_on(image: &Below, memory: &File) -> Result<(), Failure> {
    let needs = formats::look(ImageFormat::Qcow2, memory).await?;
    let parent = needs.parent.unwrap_or_default();
    let name = parent.names.first().map_or("", String::as_str);
    let driver = parent.driver.as_deref().unwrap_or_default();
    let is_same = formats::resolve(name, Path::new(MEMORY)).is_ok_and(|path| path == image.path);
    if is_same && driver.parse() == below(image.driver) {
        return Ok(());
    }
    Err(Failure::new(
        Code::Image,
        format!(
            "the guest's changes belong to {driver}:{name}, and to no other image: give that one, or make \
             another disk for {}",
            image.path.display()
        ),
    ))
}

fn unreadable(error: Errno) -> Failure {
    Failure::system("cannot read the memory of the disk", &error.into())
}
