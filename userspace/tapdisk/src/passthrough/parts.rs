// SPDX-License-Identifier: MIT OR Apache-2.0
//! Mappings of an image that has the disk in parts: the kernel gets the parts that requests touched, and before any
//! request those at the beginning of the disk.
//!
//! A request that reaches the process had no mapping in the kernel. When it is done, this looks up the range around it,
//! where the next requests will be. While the process is idle, it looks up the disk from its beginning on, so that much
//! of the data that a booting guest reads is mapped before its requests. A place that the driver reports is valid until
//! the guest discards it, and the kernel knows of that: it refuses places that were looked up before. It does not know
//! of changes by other clients: they hold a [`PassthroughBan`](super::Ban), and places that were looked up before it are not sent.

use super::{Direct, KernelMappings, PassthroughImage};
use drivers::{Disk, Holder, MappedExtent};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use tapdev::abi::MAX_MAP_OPS;

/// Bytes that are looked up at once, from a multiple of them on.
const WINDOW: u64 = 2 << 20;
/// Windows that wait to be looked up. A window that does not fit is queued again at its next request.
const WAITING: usize = 32;
/// Windows behind a written one that are looked up with it, if all of it may be mapped for writing: the guest's next
/// requests are probably there, and the driver may have allocated clusters for them.
const BEHIND: u32 = 4;
/// Mappings in one call: the most that the kernel takes.
const PLACES: usize = MAX_MAP_OPS as usize;
/// Bytes at the beginning of the disk that are looked up before the first request, which reads only a small part of the
/// image's tables.
const AHEAD: u64 = 4 << 30;
/// Mappings that are sent that way: half of the kernel's initial capacity.
const PLACES_AHEAD: usize = 512;
/// Windows of those in one turn.
const WINDOWS_AHEAD: u64 = 8;

/// Ranges whose mappings are to be sent.
#[derive(Debug, Default)]
pub(super) struct Missed {
    /// The image has the disk in parts.
    counts: Cell<bool>,
    windows: RefCell<Vec<Window>>,
    is_looking: Cell<bool>,
    ahead: Cell<LookAhead>,
}

/// A part of the disk that is to be looked up.
#[derive(Clone, Copy, Debug)]
struct Window {
    from: u64,
    /// Number of windows behind it that may be looked up with it.
    behind: u32,
}

/// Progress of the look-up before the first request.
#[derive(Clone, Copy, Debug, Default)]
struct LookAhead {
    /// Bytes from the beginning on.
    until: u64,
    /// Contiguous runs of places.
    told: usize,
    last: Option<MappedExtent>,
}

impl LookAhead {
    fn add(&mut self, places: &[MappedExtent]) {
        for place in places {
            let goes_on = self.last.is_some_and(|last| last.is_continued_by(place));
            self.told += usize::from(!goes_on);
            self.last = Some(*place);
        }
    }
}

impl Missed {
    pub(super) fn begin(&self, counts: bool) {
        self.counts.set(counts);
        self.windows.take();
        self.forgotten();
    }

    /// The kernel knows nothing any more.
    pub(super) fn forgotten(&self) {
        self.ahead.take();
    }

    /// Returns true if the beginning of a disk of `size` bytes is not completely looked up yet.
    fn has_more(&self, size: u64) -> bool {
        let ahead = self.ahead.get();
        ahead.until < size.min(AHEAD) && ahead.told < PLACES_AHEAD
    }

    /// The next windows of those.
    fn more(&self, size: u64) -> Vec<Window> {
        let mut ahead = self.ahead.get();
        let from = ahead.until;
        ahead.until += WINDOWS_AHEAD * WINDOW;
        self.ahead.set(ahead);
        (from..ahead.until.min(size))
            .step_by(WINDOW as usize)
            .map(|from| Window { from, behind: 0 })
            .collect()
    }

    fn add(&self, offset: u64, len: u64, behind: u32) {
        let mut windows = self.windows.borrow_mut();
        let (first, last) = (offset / WINDOW, offset.saturating_add(len - 1) / WINDOW);
        for window in first..=last {
            let from = window * WINDOW;
            let has_room = windows.len() < WAITING;
            match windows.iter_mut().find(|window| window.from == from) {
                Some(known) => known.behind = known.behind.max(behind),
                None if has_room => windows.push(Window { from, behind }),
                None => {}
            }
        }
    }
}

impl Direct {
    /// DirtyBitmap a read or a write of the guest that this process has executed.
    pub(crate) fn missed(&self, offset: u64, len: u64, writes: bool) {
        if self.missed.counts.get() && len > 0 && self.may_tell() {
            self.missed
                .add(offset, len, if writes { BEHIND } else { 0 });
        }
    }

    /// [`look`](Self::look) is to be called. While this process has something else to do, it looks for nothing that was
    /// not asked for.
    pub(crate) fn must_look(&self, is_idle: bool) -> bool {
        let missed = &self.missed;
        if !missed.counts.get() || !self.may_tell() || missed.is_looking.get() {
            return false;
        }
        let image = self.image.borrow();
        let has_more = || {
            image
                .as_ref()
                .is_some_and(|image| missed.has_more(image.size))
        };
        let waits = !missed.windows.borrow().is_empty() || is_idle && has_more();
        missed.is_looking.set(waits);
        waits
    }

    /// Sends the mappings of missed windows, as far as `disk` knows their places; or if there are none, those of some
    /// more of the disk.
    pub(crate) async fn look(&self, disk: &Disk) {
        let image = self.image.borrow().clone();
        if let Some(image) = image {
            let missed = self.missed.windows.take();
            let told = match missed.is_empty() {
                true => self.tell_ahead(&image, disk).await,
                false => self.tell_of(&image, disk, missed).await.map(drop),
            };
            self.told_or_vain(told);
        }
        self.missed.is_looking.set(false);
    }

    async fn tell_ahead(&self, image: &PassthroughImage, disk: &Disk) -> io::Result<()> {
        let era = self.era.get();
        let windows = self.missed.more(image.size);
        let told = self.tell_of(image, disk, windows).await?;
        if self.era.get() == era {
            let mut ahead = self.missed.ahead.get();
            ahead.add(&told);
            self.missed.ahead.set(ahead);
        }
        Ok(())
    }

    /// Sends the mappings of windows, and returns them.
    async fn tell_of(
        &self,
        image: &PassthroughImage,
        disk: &Disk,
        windows: Vec<Window>,
    ) -> io::Result<Vec<MappedExtent>> {
        let era = self.era.get();
        let (mut windows, mut all) = (VecDeque::from(windows), Vec::new());
        while let Some(Window { from, behind }) = windows.pop_front() {
            let len = WINDOW.min(image.size.saturating_sub(from));
            // A window without places needs no call; and the look-up has read the tables that the next one needs.
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
            self.told.set(KernelMappings::Image);
            for some in found.chunks(PLACES) {
                let told = some.iter().map(|place| image.set(place, generation));
                image.mapper.maps(&told.collect::<Vec<_>>())?;
            }
            let next = Window {
                from: from + len,
                behind: behind.saturating_sub(1),
            };
            let goes_on =
                |last: &MappedExtent| last.writable && last.offset + last.len == next.from;
            let is_known = windows.iter().any(|window| window.from == next.from);
            if behind > 0 && !is_known && found.last().is_some_and(goes_on) {
                windows.push_back(next);
            }
            all.append(&mut found);
        }
        Ok(all)
    }
}

/// Returns the places that the driver reports. Damage of the image is no error here: the read of that range reports it.
async fn places(disk: &Disk, from: u64, len: u64) -> Vec<MappedExtent> {
    disk.places(from, len).await.unwrap_or_default()
}
