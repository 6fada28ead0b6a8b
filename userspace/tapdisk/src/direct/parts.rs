// SPDX-License-Identifier: MIT OR Apache-2.0
//! An image that has the disk in parts: the kernel is told where those are of which something was asked, and before
//! that, where the beginning of the disk is.
//!
//! A request that comes to the process was none for the kernel. When it is done, its surroundings are looked up, where
//! the next ones will be. While nothing is to be done the disk is looked up from its beginning on, so that much of what
//! a guest reads when it boots is known before it asks. What the driver says is true until the guest discards it, of
//! which the kernel knows: it takes no place that was looked up before. What others do it does not know: they have a
//! [`Ban`](super::Ban), and what was looked up before one is not told.

use super::{Direct, Image, Told};
use drivers::{Disk, Holder, Place};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use tapdev::abi::MAX_MAP_OPS;

/// Bytes that are looked up at once, from a multiple of them on.
const WINDOW: u64 = 2 << 20;
/// Windows that wait to be looked up. What is missed then is missed again.
const WAITING: usize = 32;
/// Windows behind one that was written that are looked up with it, as long as all of it may be written: what a guest has
/// under way begins behind what is answered, and the driver may have made room there.
const BEHIND: u32 = 4;
/// What is told in one call: as much as the kernel takes.
const PLACES: usize = MAX_MAP_OPS as usize;
/// Bytes at the beginning of the disk that are looked up before something is asked: what has to be read for that from the
/// tables of an image is little.
const AHEAD: u64 = 4 << 30;
/// Places of which the kernel is told so: half of what it has room for at first.
const PLACES_AHEAD: usize = 512;
/// Windows of those in one turn.
const WINDOWS_AHEAD: u64 = 8;

/// Of what the kernel is to be told.
#[derive(Debug, Default)]
pub(super) struct Missed {
    /// The image has the disk in parts.
    counts: Cell<bool>,
    windows: RefCell<Vec<Window>>,
    is_looking: Cell<bool>,
    ahead: Cell<Ahead>,
}

/// A part of the disk that is to be looked up.
#[derive(Clone, Copy, Debug)]
struct Window {
    from: u64,
    /// Those behind it that may be looked up with it.
    behind: u32,
}

/// What was looked up before something was asked.
#[derive(Clone, Copy, Debug, Default)]
struct Ahead {
    /// Bytes from the beginning on.
    until: u64,
    /// Places that do not go on from one another.
    told: usize,
    last: Option<Place>,
}

impl Ahead {
    fn add(&mut self, places: &[Place]) {
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

    /// Something is to be looked up of a disk of `size` bytes before it is asked for.
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
    /// This process has done a read or a write of the guest.
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

    /// Tells the kernel where what it missed is, as far as `disk` knows; or where some of the disk is, if it missed nothing.
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

    async fn tell_ahead(&self, image: &Image, disk: &Disk) -> io::Result<()> {
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

    /// What the kernel was told of windows.
    async fn tell_of(
        &self,
        image: &Image,
        disk: &Disk,
        windows: Vec<Window>,
    ) -> io::Result<Vec<Place>> {
        let era = self.era.get();
        let (mut windows, mut all) = (VecDeque::from(windows), Vec::new());
        while let Some(Window { from, behind }) = windows.pop_front() {
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
            let next = Window {
                from: from + len,
                behind: behind.saturating_sub(1),
            };
            let goes_on = |last: &Place| last.writable && last.offset + last.len == next.from;
            let is_known = windows.iter().any(|window| window.from == next.from);
            if behind > 0 && !is_known && found.last().is_some_and(goes_on) {
                windows.push_back(next);
            }
            all.append(&mut found);
        }
        Ok(all)
    }
}

/// What the driver says. Damage of the image is told to whoever asks for what is there.
async fn places(disk: &Disk, from: u64, len: u64) -> Vec<Place> {
    disk.places(from, len).await.unwrap_or_default()
}
