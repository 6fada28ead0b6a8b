// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disks from their beginning to their end, in pieces, several at once. Holes are not read.

use crate::image_spec::ImageSpec;
use crate::open::failed;
use crate::part::DiskRanges;
use crate::salvage::Lost;
use control::Failure;
use diskio::{Bytes, Data, Io};
use drivers::{Attributes, Content, Disk, Extent};
use futures::stream::{self, StreamExt};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::rc::Rc;

/// Bytes of a piece that is read. Pieces end where a multiple of this does, so that no two of them share a
/// cluster, but for the largest.
pub(crate) const PIECE: u64 = 512 << 10;
/// Pieces under way: with two disks, twice as many bytes are in memory.
const UNDER_WAY: usize = 16;
/// Memory for them, which is used again and again.
pub(crate) const BUFFERS: usize = 2 * UNDER_WAY * PIECE as usize;
/// Bytes of a hole that are one piece, and for which extents are requested at once.
const HOLE: u64 = 1 << 30;

/// A disk that is walked over. It continues for ever, as a hole.
#[derive(Debug)]
pub(crate) struct Side {
    image: ImageSpec,
    disk: Disk,
    size: u64,
    /// Extents from `at` on.
    known: VecDeque<Extent>,
    at: u64,
    /// Unreadable parts count as holes, and are collected here.
    lost: Option<Rc<Lost>>,
}

/// Where all sides are alike: each holds data, or nothing but zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece<const N: usize> {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// Sides that have data.
    pub(crate) data: [bool; N],
}

/// Walks over disks side by side.
#[derive(Debug)]
pub(crate) struct Walk<const N: usize> {
    sides: [Side; N],
    at: u64,
    end: u64,
    /// The walk leaves out what is in none of these.
    ranges: Option<DiskRanges>,
}

impl Side {
    pub(crate) fn new(image: &ImageSpec, disk: &Disk, size: u64) -> Self {
        Self {
            image: image.clone(),
            disk: disk.clone(),
            size,
            known: VecDeque::new(),
            at: 0,
            lost: None,
        }
    }

    /// Treats unreadable parts as holes, and collects them in `lost`.
    pub(crate) fn salvaged(self, lost: Option<Rc<Lost>>) -> Self {
        Self { lost, ..self }
    }

    /// Returns the remaining bytes of the extent at `offset`, and whether they are data.
    async fn see(&mut self, offset: u64) -> Result<(u64, bool), Failure> {
        if offset >= self.size {
            return Ok((u64::MAX, false));
        }
        loop {
            match self.known.front() {
                Some(extent) if self.at + extent.len > offset => {
                    let left = self.at + extent.len - offset;
                    return Ok((left, extent.content == Content::Data));
                }
                Some(extent) => {
                    self.at += extent.len;
                    self.known.pop_front();
                }
                None => {
                    let len = (self.size - offset).min(HOLE);
                    self.known = match (self.disk.extents(offset, len).await, &self.lost) {
                        (Ok(found), _) => found.into(),
                        (Err(_), Some(lost)) => {
                            let len = lost.step_at(offset).min(len);
                            lost.add(offset, len);
                            let content = Content::Hole;
                            [Extent { len, content }].into()
                        }
                        (Err(error), None) => {
                            return Err(failed("find out what is in", &self.image, offset, error))
                        }
                    };
                    self.at = offset;
                }
            }
        }
    }
}

impl<const N: usize> Walk<N> {
    /// From 0 to `end`.
    pub(crate) fn new(sides: [Side; N], end: u64) -> Self {
        Self {
            sides,
            at: 0,
            end,
            ranges: None,
        }
    }

    /// Visits these ranges only, if there are some.
    pub(crate) fn within(self, ranges: Option<DiskRanges>) -> Self {
        Self { ranges, ..self }
    }

    /// The next piece; nothing at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Piece<N>>, Failure> {
        let mut end = self.end;
        if let Some(ranges) = &mut self.ranges {
            let Some((from, to)) = ranges.next(self.at) else {
                return Ok(None);
            };
            (self.at, end) = (from, to.min(end));
        }
        if self.at >= end {
            return Ok(None);
        }
        let mut len = end - self.at;
        let mut data = [false; N];
        for (side, data) in self.sides.iter_mut().zip(&mut data) {
            let (left, is_data) = side.see(self.at).await?;
            len = len.min(left);
            *data = is_data;
        }
        let most = match data.contains(&true) {
            true => PIECE - self.at % PIECE,
            false => HOLE,
        };
        let piece = Piece {
            offset: self.at,
            len: len.min(most),
            data,
        };
        self.at += piece.len;
        Ok(Some(piece))
    }

    /// Does `work` for every piece, several at once, until one fails or `stops` says so. Pieces that are under way then
    /// are finished.
    pub(crate) async fn each<F: Future<Output = Result<(), Failure>>>(
        self,
        stops: impl Fn() -> bool,
        work: impl Fn(Piece<N>) -> F,
    ) -> Result<(), Failure> {
        let failure = RefCell::new(None);
        let fail = |what| {
            failure.borrow_mut().get_or_insert(what);
        };
        let (failure_ref, fail, stops) = (&failure, &fail, &stops);
        let pieces = stream::unfold(self, move |mut walk| async move {
            if failure_ref.borrow().is_some() || stops() {
                return None;
            }
            match walk.next().await {
                Ok(piece) => piece.map(|piece| (piece, walk)),
                Err(failure) => {
                    fail(failure);
                    None
                }
            }
        });
        pieces
            .for_each_concurrent(UNDER_WAY, |piece| {
                let work = work(piece);
                async move {
                    if let Err(failure) = work.await {
                        fail(failure);
                    }
                }
            })
            .await;
        match failure.into_inner() {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }
}

/// Reads the bytes of a piece.
pub(crate) async fn read(
    io: &Io,
    image: &ImageSpec,
    disk: &Disk,
    offset: u64,
    len: u64,
) -> Result<Data, Failure> {
    let work = async {
        // CAST: at most `PIECE`.
        let data = io.buffer(len as usize)?;
        disk.read(offset, data.clone()).await?;
        Ok(data)
    };
    work.await
        .map_err(|error| failed("read", image, offset, error))
}

/// Writes bytes to a disk.
pub(crate) async fn write(
    image: &ImageSpec,
    disk: &Disk,
    at: u64,
    data: Bytes,
) -> Result<(), Failure> {
    let done = disk.write(at, data, Attributes::default()).await;
    done.map_err(|error| failed("write", image, at, error))
}

/// Makes a range of a disk read as zeroes.
pub(crate) async fn zero(image: &ImageSpec, disk: &Disk, at: u64, len: u64) -> Result<(), Failure> {
    let done = disk.write_zeroes(at, len, Attributes::default()).await;
    done.map_err(|error| failed("write zeroes to", image, at, error))
}

/// Returns the allocated parts of an image: at least one extent from a byte on, and nothing beyond `len`.
pub(crate) async fn layer(
    image: &ImageSpec,
    disk: &Disk,
    at: u64,
    len: u64,
) -> Result<Vec<Extent>, Failure> {
    let found = disk.layer(at, len).await;
    found.map_err(|error| failed("find out what is in", image, at, error))
}
