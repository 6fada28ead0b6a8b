// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an image goes on from: any disk, as long or as short as it is.

use control::Failure;
use diskio::{Data, Errno};
use drivers::{Content, Disk, Extent, Holder, Place};
use std::cell::Cell;

/// Extents that are told at once.
const EXTENTS: usize = 256;

/// A disk that is only read.
#[derive(Debug)]
pub(crate) struct Base {
    disk: Disk,
    size: Cell<u64>,
}

impl Base {
    pub(crate) fn new(disk: Disk) -> Self {
        Self {
            disk,
            size: Cell::new(0),
        }
    }

    pub(crate) async fn activate(&self) -> Result<(), Failure> {
        self.size.set(self.disk.activate().await?.size);
        Ok(())
    }

    /// Bytes that it has.
    pub(crate) fn size(&self) -> u64 {
        self.size.get()
    }

    /// Reads; what is behind its end is zero.
    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        let len = data.len() as u64;
        let there = self.size.get().saturating_sub(offset).min(len);
        if there > 0 {
            // CAST: it is at most the data's length.
            let part = data.part(0, there as usize);
            self.holder(offset, there).read(offset, part).await?;
        }
        if there < len {
            // CAST: as above.
            data.fill(there as usize, (len - there) as usize, 0);
        }
        Ok(())
    }

    /// It, as the disk that has all of a range; none if that is longer.
    pub(crate) fn all_of(&self, offset: u64, len: u64) -> Option<Disk> {
        let is_here = offset.checked_add(len)? <= self.size.get();
        is_here.then(|| self.disk.clone())
    }

    /// Who is asked for a range: not those of a chain that are known to have nothing of it, each of which would be
    /// some thousand instructions.
    fn holder(&self, offset: u64, len: u64) -> Disk {
        let mut holder = self.disk.clone();
        while let Some(below) = holder.passed(offset, len) {
            holder = below;
        }
        holder
    }

    /// Where a range is, of what the kernel has; behind the end it is nowhere.
    async fn places(&self, offset: u64, len: u64) -> Result<Vec<Place>, Errno> {
        let there = self.size.get().saturating_sub(offset).min(len);
        let mut places = match there {
            0 => Vec::new(),
            there => self.disk.places_below(offset, there).await?,
        };
        if there < len {
            places.push(zeroes(offset + there, len - there));
        }
        Ok(places)
    }

    /// What is in a range; behind its end there is nothing.
    pub(crate) async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        match self.size.get().saturating_sub(offset).min(len) {
            0 => Ok(vec![Extent {
                len,
                content: Content::Hole,
            }]),
            there => self.disk.extents(offset, there).await,
        }
    }
}

/// False if an image goes on from nothing; a failure if it does, as its format has to keep that.
pub(crate) fn must_stay(parent: Option<&Base>, what: &str) -> Result<bool, Failure> {
    match parent {
        None => Ok(false),
        Some(_) => Err(Failure::unsupported(format!(
            "{what} keeps the image below it as long as it is served: detach the disk and make one image of both \
             with tapimg convert, or use qcow2"
        ))),
    }
}

/// Lets go of what an image goes on from, if there is such.
pub(crate) async fn inactivate(parent: Option<&Base>) -> Result<(), Errno> {
    match parent {
        Some(parent) => parent.disk.inactivate().await,
        None => Ok(()),
    }
}

/// Nothing comes after this for what an image goes on from, if there is such.
pub(crate) async fn close(parent: Option<&Base>) -> Result<(), Errno> {
    match parent {
        Some(parent) => parent.disk.close().await,
        None => Ok(()),
    }
}

/// Reads what an image does not hold: its parent's, or zeroes.
pub(crate) async fn read(parent: Option<&Base>, offset: u64, data: Data) -> Result<(), Errno> {
    match parent {
        Some(parent) => parent.read(offset, data).await,
        None => {
            data.fill(0, data.len(), 0);
            Ok(())
        }
    }
}

/// A part that is nowhere.
pub(crate) fn zeroes(offset: u64, len: u64) -> Place {
    Place {
        offset,
        len,
        holder: Holder::Nothing,
        at: 0,
        writable: false,
    }
}

/// Adds a place, as a part of the last one if that goes on there: how many are told at once is limited.
pub(crate) fn add_place(places: &mut Vec<Place>, place: Place) {
    match places.last_mut() {
        Some(last) if last.is_continued_by(&place) => last.len += place.len,
        _ => places.push(place),
    }
}

/// Adds where a range is that an image does not hold. `offset` is that of the disk; both have it at the same one.
pub(crate) async fn add_places(
    parent: Option<&Base>,
    offset: u64,
    len: u64,
    places: &mut Vec<Place>,
) -> Result<(), Errno> {
    let more = match parent {
        Some(parent) => parent.places(offset, len).await?,
        None => vec![zeroes(offset, len)],
    };
    more.into_iter().for_each(|place| add_place(places, place));
    Ok(())
}

/// Nothing but zeroes would be read there.
pub(crate) async fn is_hole(parent: Option<&Base>, offset: u64, len: u64) -> Result<bool, Errno> {
    let Some(parent) = parent else {
        return Ok(true);
    };
    let mut done = 0;
    while done < len {
        for extent in parent.extents(offset + done, len - done).await? {
            if extent.content == Content::Data {
                return Ok(false);
            }
            done += extent.len;
        }
    }
    Ok(true)
}

/// Extents in a row, of which those that follow each other and are alike become one.
#[derive(Debug, Default)]
pub(crate) struct Row {
    extents: Vec<Extent>,
    len: u64,
}

impl Row {
    pub(crate) fn push(&mut self, len: u64, content: Content) {
        self.len += len;
        match self.extents.last_mut() {
            Some(last) if last.content == content => last.len += len,
            _ if len > 0 => self.extents.push(Extent { len, content }),
            _ => {}
        }
    }

    /// What an image does not hold: what its parent has there, if `whole` says so, or that it is the parent's.
    pub(crate) async fn push_missing(
        &mut self,
        parent: Option<&Base>,
        offset: u64,
        len: u64,
        whole: bool,
    ) -> Result<(), Errno> {
        let parent = match parent {
            Some(parent) if whole => parent,
            other => {
                let content = other.map_or(Content::Hole, |_| Content::Below);
                self.push(len, content);
                return Ok(());
            }
        };
        let mut done = 0;
        while done < len {
            for extent in parent.extents(offset + done, len - done).await? {
                let count = extent.len.min(len - done);
                self.push(count, extent.content);
                done += count;
            }
        }
        Ok(())
    }

    /// There is nothing in it.
    pub(crate) fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// It is long enough for one answer.
    pub(crate) fn is_full(&self) -> bool {
        self.extents.len() >= EXTENTS
    }

    pub(crate) fn finish(self) -> Vec<Extent> {
        self.extents
    }
}
