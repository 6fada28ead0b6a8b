// SPDX-License-Identifier: MIT OR Apache-2.0
//! The backing disk of an image: any disk, shorter or longer than the image.

use control::Failure;
use diskio::{Data, Errno};
use drivers::{Content, Disk, Extent, Holder, MappedExtent, QueuedIo};
use std::cell::Cell;

/// Bytes of a logical sector, unless an image or its storage has others.
pub const SECTOR: u32 = 512;

/// Maximum number of extents that one query returns.
const EXTENTS: usize = 256;

/// A disk that is only read.
#[derive(Debug)]
pub(crate) struct Base {
    disk: Disk,
    size: Cell<u64>,
    /// Bytes of a logical sector.
    sector: Cell<u32>,
}

impl Base {
    pub(crate) fn new(disk: Disk) -> Self {
        Self {
            disk,
            size: Cell::new(0),
            sector: Cell::new(SECTOR),
        }
    }

    pub(crate) async fn activate(&self) -> Result<(), Failure> {
        let shape = self.disk.activate().await?;
        self.size.set(shape.size);
        self.sector.set(shape.logical_block);
        Ok(())
    }

    /// Bytes that it has.
    pub(crate) fn size(&self) -> u64 {
        self.size.get()
    }

    /// Reads a range; bytes behind the end of the disk are zero.
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

    /// Reports whether a range ends before the end of the disk.
    fn has_all(&self, offset: u64, len: u64) -> bool {
        let end = offset.checked_add(len);
        end.is_some_and(|end| end <= self.size.get())
    }

    /// Returns the disk if it has all of a range; `None` if the range ends behind it.
    pub(crate) fn all_of(&self, offset: u64, len: u64) -> Option<Disk> {
        self.has_all(offset, len).then(|| self.disk.clone())
    }

    /// Returns the disk to ask for a range: it skips the images of a chain that are known to hold nothing of the range,
    /// because asking each of them would cost some thousand instructions.
    fn holder(&self, offset: u64, len: u64) -> Disk {
        let mut holder = self.disk.clone();
        while let Some(below) = holder.passed(offset, len) {
            holder = below;
        }
        holder
    }

    /// Queues a read, see [`Driver::begin_read`](drivers::Driver::begin_read); `None` also if it ends behind the disk.
    pub(crate) fn begin_read(&self, offset: u64, data: &Data) -> Option<QueuedIo> {
        let len = data.len() as u64;
        self.has_all(offset, len)
            .then(|| self.holder(offset, len).begin_read(offset, data))?
    }

    /// Returns the places of a range that the kernel may use; the part behind the end of the disk is nowhere.
    async fn places(&self, offset: u64, len: u64) -> Result<Vec<MappedExtent>, Errno> {
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

    /// Returns the content of a range; the range behind the end of the disk is a hole.
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

/// Returns the bytes of a logical sector of a disk of `size` bytes, in a format that does not store them: those of the
/// backing disk, whose partition table counts in them. A disk that is no whole number of those has 512.
pub(crate) fn sector(parent: Option<&Base>, size: u64) -> u32 {
    let sector = parent.map_or(SECTOR, |parent| parent.sector.get());
    match size % u64::from(sector.max(SECTOR)) {
        0 => sector.max(SECTOR),
        _ => SECTOR,
    }
}

/// Returns false if an image has no backing image, and a failure if it has one, because its format must keep that.
pub(crate) fn must_stay(parent: Option<&Base>, what: &str) -> Result<bool, Failure> {
    match parent {
        None => Ok(false),
        Some(_) => Err(Failure::unsupported(format!(
            "a running disk cannot drop the backing image of {what}: detach the disk and make one image of both \
             (`tapimg convert IMAGE NEW`), or use qcow2"
        ))),
    }
}

/// Inactivates the backing disk of an image, if it has one.
pub(crate) async fn inactivate(parent: Option<&Base>) -> Result<(), Errno> {
    match parent {
        Some(parent) => parent.disk.inactivate().await,
        None => Ok(()),
    }
}

/// Closes the backing disk of an image, if it has one; no request may follow.
pub(crate) async fn close(parent: Option<&Base>) -> Result<(), Errno> {
    match parent {
        Some(parent) => parent.disk.close().await,
        None => Ok(()),
    }
}

/// Reads a range that an image does not hold: from its parent, or zeroes.
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
pub(crate) fn zeroes(offset: u64, len: u64) -> MappedExtent {
    MappedExtent {
        offset,
        len,
        holder: Holder::Nothing,
        at: 0,
        writable: false,
    }
}

/// Adds a place, or extends the last one if both are contiguous, because one answer holds a limited number of places.
pub(crate) fn add_place(places: &mut Vec<MappedExtent>, place: MappedExtent) {
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
    places: &mut Vec<MappedExtent>,
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

/// Contiguous extents; neighbours of the same content are merged.
#[derive(Debug, Default)]
pub(crate) struct ExtentRun {
    extents: Vec<Extent>,
    len: u64,
}

impl ExtentRun {
    pub(crate) fn push(&mut self, len: u64, content: Content) {
        self.len += len;
        match self.extents.last_mut() {
            Some(last) if last.content == content => last.len += len,
            _ if len > 0 => self.extents.push(Extent { len, content }),
            _ => {}
        }
    }

    /// Adds a range that the image does not hold: the content of its parent if `whole` is set, else one extent that
    /// refers to the parent.
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

    /// Returns true if it is long enough for one answer.
    pub(crate) fn is_full(&self) -> bool {
        self.extents.len() >= EXTENTS
    }

    pub(crate) fn finish(self) -> Vec<Extent> {
        self.extents
    }
}
