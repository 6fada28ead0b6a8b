// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk, whatever its driver.

use crate::{Attributes, Driver, Extent, Fence, Limits, Shape};
use control::Failure;
use diskio::{of_earlier, Bytes, Data, Errno};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

type Later<'a, T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + 'a>>;

/// [`Driver`] in a form that can be pointed to.
trait Any {
    fn activate(&self) -> Later<'_, Shape, Failure>;
    fn fence(&self) -> Fence;
    fn read(&self, offset: u64, data: Data) -> Later<'_, (), Errno>;
    fn write(&self, offset: u64, data: Bytes, how: Attributes) -> Later<'_, (), Errno>;
    fn flush(&self) -> Later<'_, (), Errno>;
    fn discard(&self, offset: u64, len: u64, how: Attributes) -> Later<'_, (), Errno>;
    fn write_zeroes(&self, offset: u64, len: u64, how: Attributes) -> Later<'_, (), Errno>;
    fn extents(&self, offset: u64, len: u64) -> Later<'_, Vec<Extent>, Errno>;
    fn inactivate(&self) -> Later<'_, (), Errno>;
    fn resize(&self) -> Later<'_, u64, Failure>;
    fn stats(&self) -> BTreeMap<String, u64>;
    fn close(&self) -> Later<'_, (), Errno>;
}

impl<D: Driver> Any for D {
    fn activate(&self) -> Later<'_, Shape, Failure> {
        Box::pin(Driver::activate(self))
    }
    fn fence(&self) -> Fence {
        Driver::fence(self)
    }
    fn read(&self, offset: u64, data: Data) -> Later<'_, (), Errno> {
        Box::pin(Driver::read(self, offset, data))
    }
    fn write(&self, offset: u64, data: Bytes, how: Attributes) -> Later<'_, (), Errno> {
        Box::pin(Driver::write(self, offset, data, how))
    }
    fn flush(&self) -> Later<'_, (), Errno> {
        Box::pin(Driver::flush(self))
    }
    fn discard(&self, offset: u64, len: u64, how: Attributes) -> Later<'_, (), Errno> {
        Box::pin(Driver::discard(self, offset, len, how))
    }
    fn write_zeroes(&self, offset: u64, len: u64, how: Attributes) -> Later<'_, (), Errno> {
        Box::pin(Driver::write_zeroes(self, offset, len, how))
    }
    fn extents(&self, offset: u64, len: u64) -> Later<'_, Vec<Extent>, Errno> {
        Box::pin(Driver::extents(self, offset, len))
    }
    fn inactivate(&self) -> Later<'_, (), Errno> {
        Box::pin(Driver::inactivate(self))
    }
    fn resize(&self) -> Later<'_, u64, Failure> {
        Box::pin(Driver::resize(self))
    }
    fn stats(&self) -> BTreeMap<String, u64> {
        Driver::stats(self)
    }
    fn close(&self) -> Later<'_, (), Errno> {
        Box::pin(Driver::close(self))
    }
}

/// A disk, whatever serves its content. Copies are the same disk. The calls are those of
/// [`Driver`]; what a driver cannot do by itself is done here.
#[derive(Clone)]
pub struct Disk(Rc<Inner<dyn Any>>);

struct Inner<D: ?Sized> {
    /// What the driver said of itself.
    shape: Cell<Option<Shape>>,
    driver: D,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").finish_non_exhaustive()
    }
}

impl Disk {
    /// The disk that `driver` serves.
    pub fn new(driver: impl Driver) -> Self {
        Self(Rc::new(Inner {
            shape: Cell::new(None),
            driver,
        }))
    }

    /// See [`Driver::activate`].
    pub async fn activate(&self) -> Result<Shape, Failure> {
        let shape = self.0.driver.activate().await?;
        self.0.shape.set(Some(shape));
        Ok(shape)
    }

    /// See [`Driver::fence`].
    pub fn fence(&self) -> Fence {
        self.0.driver.fence()
    }

    /// See [`Driver::read`].
    pub async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        let whole = data.len() as u64;
        for (at, len) in self.pieces(offset, whole, |limits| limits.transfer) {
            // CAST: they are inside of the data.
            let part = data.part(at as usize, len as usize);
            self.0.driver.read(offset + at, part).await?;
        }
        Ok(())
    }

    /// See [`Driver::write`].
    pub async fn write(
        &self,
        offset: u64,
        data: impl Into<Bytes>,
        how: Attributes,
    ) -> Result<(), Errno> {
        let data = data.into();
        let whole = data.len() as u64;
        for (at, len) in self.pieces(offset, whole, |limits| limits.transfer) {
            // CAST: they are inside of the data.
            let part = data.part(at as usize, len as usize);
            self.0.driver.write(offset + at, part, how).await?;
        }
        self.settle(how).await
    }

    /// See [`Driver::flush`].
    pub async fn flush(&self) -> Result<(), Errno> {
        self.0.driver.flush().await
    }

    /// See [`Driver::discard`].
    pub async fn discard(&self, offset: u64, len: u64, how: Attributes) -> Result<(), Errno> {
        for (at, len) in self.pieces(offset, len, |limits| limits.zeroes) {
            self.0.driver.discard(offset + at, len, how).await?;
        }
        self.settle(how).await
    }

    /// See [`Driver::write_zeroes`].
    pub async fn write_zeroes(&self, offset: u64, len: u64, how: Attributes) -> Result<(), Errno> {
        for (at, len) in self.pieces(offset, len, |limits| limits.zeroes) {
            self.0.driver.write_zeroes(offset + at, len, how).await?;
        }
        self.settle(how).await
    }

    /// The pieces of a request, each from its beginning on and how long, none larger than the driver
    /// wants it.
    fn pieces(
        &self,
        offset: u64,
        len: u64,
        limit: impl Fn(&Limits) -> u64,
    ) -> impl Iterator<Item = (u64, u64)> {
        let limits = self.0.shape.get().map(|shape| shape.limits);
        let limits = limits.unwrap_or_default();
        let (most, align) = (limit(&limits).max(1), u64::from(limits.align.max(1)));
        let mut at = 0;
        std::iter::from_fn(move || {
            let left = len.checked_sub(at).filter(|left| *left > 0)?;
            let from = at;
            let mut count = left.min(most);
            let past = (offset + at + count) % align;
            if count < left && past < count {
                count -= past;
            }
            at += count;
            Some((from, count))
        })
    }

    /// Makes durable what a driver did not that knows nothing of [`Attributes::fua`].
    async fn settle(&self, how: Attributes) -> Result<(), Errno> {
        let heeded = self.0.shape.get().is_some_and(|shape| shape.fua);
        match how.fua && !heeded {
            true => self.flush().await.map_err(of_earlier),
            false => Ok(()),
        }
    }

    /// See [`Driver::extents`]. None reaches beyond the range.
    pub async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        let mut extents = self.0.driver.extents(offset, len).await?;
        let mut left = len;
        extents.retain_mut(|extent| {
            extent.len = extent.len.min(left);
            left -= extent.len;
            extent.len > 0
        });
        match extents.is_empty() {
            true => Err(Errno::IO),
            false => Ok(extents),
        }
    }

    /// See [`Driver::inactivate`].
    pub async fn inactivate(&self) -> Result<(), Errno> {
        self.0.driver.inactivate().await
    }

    /// See [`Driver::resize`].
    pub async fn resize(&self) -> Result<u64, Failure> {
        self.0.driver.resize().await
    }

    /// See [`Driver::stats`].
    pub fn stats(&self) -> BTreeMap<String, u64> {
        self.0.driver.stats()
    }

    /// See [`Driver::close`].
    pub async fn close(&self) -> Result<(), Errno> {
        self.0.driver.close().await
    }
}
