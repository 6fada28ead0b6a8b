// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ram`: memory, of which only what was written exists.

use crate::{Driver, Shape};
use control::Failure;
use diskio::{Data, Errno};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

/// Bytes that are allocated at once.
const CHUNK: u64 = 64 << 10;

/// A disk in the memory of this process, with which it is lost.
#[derive(Debug)]
pub struct Ram {
    size: u64,
    chunks: RefCell<HashMap<u64, Data>>,
}

impl Ram {
    /// A disk of `size` bytes, all zero.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            chunks: RefCell::new(HashMap::new()),
        }
    }
}

/// A part of a range that is in one chunk.
struct Part {
    chunk: u64,
    /// Where it begins in the chunk.
    at: usize,
    /// Where it begins in the range.
    from: usize,
    len: usize,
}

fn parts(offset: u64, len: u64) -> impl Iterator<Item = Part> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let place = offset + done;
        let len = (len - done).min(CHUNK - place % CHUNK);
        // CAST: all are less than a chunk or the length of data.
        let part = Part {
            chunk: place / CHUNK,
            at: (place % CHUNK) as usize,
            from: done as usize,
            len: len as usize,
        };
        done += len;
        (len > 0).then_some(part)
    })
}

impl Driver for Ram {
    async fn activate(&self) -> Result<Shape, Failure> {
        Ok(Shape {
            size: self.size,
            logical_block: 512,
            physical_block: 4096,
            discard: Some(4096),
            write_cache: false,
        })
    }

    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        let chunks = self.chunks.borrow();
        for part in parts(offset, data.len() as u64) {
            match chunks.get(&part.chunk) {
                Some(chunk) => chunk.part(part.at, part.len).copy_to(&data, part.from),
                None => data.fill(part.from, part.len, 0),
            }
        }
        Ok(())
    }

    async fn write(&self, offset: u64, data: Data) -> Result<(), Errno> {
        let mut chunks = self.chunks.borrow_mut();
        for part in parts(offset, data.len() as u64) {
            let chunk = match chunks.get(&part.chunk) {
                Some(chunk) => chunk,
                None => {
                    // CAST: a small constant.
                    let chunk = Data::zeroed(CHUNK as usize)?;
                    chunks.entry(part.chunk).or_insert(chunk)
                }
            };
            data.part(part.from, part.len).copy_to(chunk, part.at);
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), Errno> {
        Ok(())
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.write_zeroes(offset, len).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let mut chunks = self.chunks.borrow_mut();
        for part in parts(offset, len) {
            if part.len as u64 == CHUNK {
                chunks.remove(&part.chunk);
            } else if let Some(chunk) = chunks.get(&part.chunk) {
                chunk.fill(part.at, part.len, 0);
            }
        }
        Ok(())
    }

    fn stats(&self) -> BTreeMap<String, u64> {
        let used = self.chunks.borrow().len() as u64 * CHUNK;
        BTreeMap::from([("memory_bytes".to_string(), used)])
    }
}
