// SPDX-License-Identifier: MIT OR Apache-2.0
//! The parts of a damaged disk that cannot be read: they become zeroes in a copy, and are counted and listed.

use crate::image_spec::ImageSpec;
use control::Failure;
use diskio::{Data, Errno, Io};
use drivers::{Disk, DiskInfo};
use std::cell::RefCell;
use std::collections::BTreeMap;

/// Bytes that are lost at once, at most.
const STEP: u64 = 4096;
/// Ranges that are listed.
const LISTED: usize = 16;
/// Ranges that are kept: others are counted as bytes only.
const KEPT: usize = 65536;

/// Lost parts of a disk.
#[derive(Debug)]
pub(crate) struct Lost {
    step: u64,
    bytes: RefCell<u64>,
    /// Ends of ranges by their beginnings.
    ranges: RefCell<BTreeMap<u64, u64>>,
}

impl Lost {
    /// Nothing of a disk with that shape.
    pub(crate) fn new(shape: &DiskInfo) -> Self {
        let cluster = u64::from(shape.limits.align.max(512));
        Self {
            step: STEP.min(cluster),
            bytes: RefCell::default(),
            ranges: RefCell::default(),
        }
    }

    /// Bytes from an offset on that are tried together.
    pub(crate) fn step_at(&self, offset: u64) -> u64 {
        self.step - offset % self.step
    }

    /// A range cannot be read.
    pub(crate) fn add(&self, at: u64, len: u64) {
        *self.bytes.borrow_mut() += len;
        let mut ranges = self.ranges.borrow_mut();
        let (mut begin, mut end) = (at, at + len);
        if let Some(next) = ranges.remove(&end) {
            end = next;
        }
        if let Some((first, last)) = ranges.range(..begin).next_back().map(|(a, b)| (*a, *b)) {
            if last == begin {
                begin = first;
            }
        }
        if ranges.len() < KEPT || ranges.contains_key(&begin) {
            ranges.insert(begin, end);
        }
    }

    /// Reads a range in steps: those that cannot be read are zeroes.
    pub(crate) async fn read(
        &self,
        io: &Io,
        disk: &Disk,
        offset: u64,
        len: u64,
    ) -> Result<Data, Failure> {
        let work = async {
            // CAST: at most a piece.
            let data = io.buffer(len as usize)?;
            let mut at = 0;
            while at < len {
                let some = self.step_at(offset + at).min(len - at);
                let part = data.part(at as usize, some as usize);
                if disk.read(offset + at, part).await.is_err() {
                    data.fill(at as usize, some as usize, 0);
                    self.add(offset + at, some);
                }
                at += some;
            }
            Ok(data)
        };
        work.await
            .map_err(|error: Errno| Failure::system("cannot get memory", &error.into()))
    }

    /// Bytes that cannot be read.
    pub(crate) fn bytes(&self) -> u64 {
        *self.bytes.borrow()
    }

    /// The first lost ranges: the byte and the length in bytes of each.
    pub(crate) fn first(&self) -> Vec<[u64; 2]> {
        let ranges = self.ranges.borrow();
        let listed = ranges.iter().take(LISTED);
        listed.map(|(at, end)| [*at, end - at]).collect()
    }

    /// Returns a description of the losses of an image; nothing if all of it could be read.
    pub(crate) fn text(&self, image: &ImageSpec) -> Option<String> {
        let (bytes, ranges) = (*self.bytes.borrow(), self.ranges.borrow());
        if bytes == 0 {
            return None;
        }
        let listed = self.first().into_iter();
        let listed: Vec<_> = listed.map(|[at, len]| format!("{at}+{len}")).collect();
        let more = match ranges.len() - listed.len() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        Some(format!(
            "{bytes} bytes of {image} cannot be read and are zeroes in the copy, at {}{more} (byte+length)",
            listed.join(", ")
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::Lost;

    #[test]
    fn ranges_that_touch_are_one() {
        let lost = Lost {
            step: 512,
            bytes: Default::default(),
            ranges: Default::default(),
        };
        for at in [0, 1024, 512, 4096, 3584] {
            lost.add(at, 512);
        }
        assert_eq!(
            lost.ranges.take().into_iter().collect::<Vec<_>>(),
            [(0, 1536), (3584, 4608)]
        );
        assert_eq!(lost.bytes.take(), 2560);
    }
}
