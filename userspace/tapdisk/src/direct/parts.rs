// SPDX-License-Identifier: MIT OR Apache-2.0
//! An image that has the disk in parts: the kernel is told where those are of which something was asked.
//!
//! A request that comes to the process was none for the kernel. When it is done, its surroundings are looked up, where
//! the next ones will be. What the driver says is true until the guest discards it, of which the kernel knows: it takes
//! no place that was looked up before. What others do it does not know: they have a [`Ban`](super::Ban), and
//! what was looked up before one is not told.

use super::{Direct, Image, Told};
use drivers::{Disk, Holder, Place};
use std::cell::{Cell, RefCell};
use std::io;
use tapdev::abi::MAX_MAP_OPS;

/// Bytes that are looked up at once, from a multiple of them on.
const WINDOW: u64 = 2 << 20;
/// Windows that wait to be looked up. What is missed then is missed again.
const WAITING: usize = 32;
/// What is told in one call: as much as the kernel takes.
const PLACES: usize = MAX_MAP_OPS as usize;

/// Of what the kernel is to be told.
#[derive(Debug, Default)]
pub(super) struct Missed {
    /// The image has the disk in parts.
    counts: Cell<bool>,
    /// Where the windows begin.
    windows: RefCell<Vec<u64>>,
    is_looking: Cell<bool>,
}

impl Missed {
    pub(super) fn begin(&self, counts: bool) {
        self.counts.set(counts);
        self.windows.take();
    }

    fn add(&self, offset: u64, len: u64) {
        let mut windows = self.windows.borrow_mut();
        let (first, last) = (offset / WINDOW, offset.saturating_add(len - 1) / WINDOW);
        for window in first..=last {
            let from = window * WINDOW;
            if windows.len() < WAITING && !windows.contains(&from) {
                windows.push(from);
            }
        }
    }
}

impl Direct {
    /// This process has done a read or a write of the guest.
    pub(crate) fn missed(&self, offset: u64, len: u64) {
        if self.missed.counts.get() && len > 0 && self.may_tell() {
            self.missed.add(offset, len);
        }
    }

    /// [`look`](Self::look) is to be called.
    pub(crate) fn must_look(&self) -> bool {
        let waits = self.missed.counts.get() && !self.missed.windows.borrow().is_empty();
        waits && self.may_tell() && !self.missed.is_looking.replace(true)
    }

    /// Tells the kernel where what it missed is, as far as `disk` knows.
    pub(crate) async fn look(&self, disk: &Disk) {
        let windows = self.missed.windows.take();
        let image = self.image.borrow().clone();
        if let Some(image) = image {
            self.told_or_vain(self.tell_of(&image, disk, windows).await);
        }
        self.missed.is_looking.set(false);
    }

    async fn tell_of(&self, image: &Image, disk: &Disk, windows: Vec<u64>) -> io::Result<()> {
        let era = self.era.get();
        for from in windows {
            let len = WINDOW.min(image.size.saturating_sub(from));
            // Where there is nothing to tell, nothing is asked; and what has to be read for it is here then.
            if len == 0 || places(disk, from, len).await.is_empty() {
                continue;
            }
            let Some((generation, backings)) = self.generation(image)? else {
                break;
            };
            let mut found = places(disk, from, len).await;
            found.retain(|place| match place.holder {
                Holder::Below(number) => backings.checked_shr(number.into()).unwrap_or(0) & 1 != 0,
                Holder::Image | Holder::Nothing => true,
            });
            if self.era.get() != era || !self.may_tell() {
                break;
            }
            self.told.set(Told::Image);
            for some in found.chunks(PLACES) {
                let told = some.iter().map(|place| image.set(place, generation));
                image.mapper.maps(&told.collect::<Vec<_>>())?;
            }
        }
        Ok(())
    }
}

/// What the driver says. Damage of the image is told to whoever asks for what is there.
async fn places(disk: &Disk, from: u64, len: u64) -> Vec<Place> {
    disk.places(from, len).await.unwrap_or_default()
}
